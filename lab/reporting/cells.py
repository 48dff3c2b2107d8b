"""What many runs say together: seeds gathered into cells, their means and spreads, and the differences between cells.

Reads and writes no file. A run counts towards a mean only when it is done and its metric is a finite number; every
other run is counted by its status, so that a cell whose bad seeds died can be seen for what it is.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lab.stats import LEVEL, Estimate, estimate, finite, holm

STATUSES = ("done", "diverged", "failed", "pruned", "started", "pending")
OPEN = ("started", "pending")
SEED_KEY = "train.seed"
ALPHA = 1 - LEVEL
Mark = Literal["best", "same", "likely", "worse", "unknown"]


@dataclass(frozen=True)
class Listed:
    """One run, as the expansion lists it.

    `changed`: the swept keys; `baseline`: it belongs to a baseline cell; `phase`: "grid", "search" where a search chose the
    configuration, "confirm" where a chosen one is run again with fresh seeds, in the cell that was chosen.
    """

    run_id: str
    cell: str
    seed: int
    changed: dict[str, Any]
    folder: Path
    baseline: bool
    phase: str = "grid"


@dataclass(frozen=True)
class Run:
    """A listed run and what its folder says. `value`: the objective's metric, of a done run and finite.

    `iters`: completed updates, where they are known; `cause`: why a failed one ended (exception, oom, killed), or "".
    """

    listed: Listed
    status: str
    value: float | None
    result: Mapping[str, Any]
    error: str = ""
    iters: int | None = None
    cause: str = ""

    def number(self, field: str) -> float | None:
        """A field of the result that is a finite number; 'flops' is those of all its training."""
        if field == "flops":
            parts = finite(self.result.get("flops_per_token")), finite(self.result.get("tokens"))
            return None if None in parts else parts[0] * parts[1]  # type: ignore[operator]
        return finite(self.result.get(field))


@dataclass(frozen=True)
class Cell:
    """The runs that differ in nothing but the seed. `rank` and `estimate` are None where no seed has finished.

    `fresh`: it was chosen by a search and confirmed: the estimate is over its confirming runs alone.
    `difference` is mean minus baseline mean; `paired` the differences seed by seed on the seeds that both have;
    `corrected` is `paired` with the wider interval that allows for all comparisons of this board (Bonferroni), `adjusted`
    its p-value that does (Holm). `behind` is the paired difference to the best cell, and `mark` what that says: this is
    the best, cannot be told apart from it ('same': the 95% interval includes zero), is 'worse' also after Holm's
    correction for all these comparisons, is 'likely' worse (not after it), or nothing can be said (fewer than two common
    seeds).
    """

    name: str
    runs: tuple[Run, ...]
    baseline: bool
    changed: Mapping[str, Any]
    estimate: Estimate | None
    fresh: bool = False
    rank: int | None = None
    difference: float | None = None
    paired: Estimate | None = None
    corrected: Estimate | None = None
    adjusted: float | None = None
    behind: Estimate | None = None
    mark: Mark = "unknown"

    @cached_property
    def counted(self) -> tuple[Run, ...]:
        """The runs that the estimate may be over."""
        return tuple(run for run in self.runs if (run.listed.phase == "confirm") == self.fresh)

    @cached_property
    def values(self) -> dict[int, float]:
        """Metric by seed, finished seeds alone."""
        return {run.listed.seed: run.value for run in self.counted if run.value is not None}

    @property
    def selected(self) -> bool:
        """A search chose it and no fresh seed has confirmed it: its mean is optimistic."""
        return not self.fresh and any(run.listed.phase == "search" for run in self.runs)

    @property
    def survivors(self) -> bool:
        """Some of its seeds were pruned: a mean over the others is a mean of survivors."""
        return bool(self.values) and any(run.status == "pruned" for run in self.counted)

    @property
    def open(self) -> bool:
        """A run of it has not ended."""
        return any(run.status in OPEN for run in self.runs)

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before believing the mean, in few words."""
        several = (
            (self.fresh, "fresh seeds"),
            (self.selected, "selected by a search, not confirmed"),
            (self.survivors, "mean of survivors: seeds were pruned"),
            (self.open, "not finished"),
        )
        return [word for holds, word in several if holds]

    def count(self, *statuses: str) -> int:
        return sum(run.status in statuses for run in self.runs)

    def mean(self, field: str) -> float | None:
        """Mean of a result's field over the finished seeds; of a run that ended otherwise where none has finished."""
        finished = [run for run in self.counted if run.value is not None] or list(self.runs)
        numbers = [number for run in finished if (number := run.number(field)) is not None]
        same = len(set(numbers)) == 1  # a count stays whole
        return numbers[0] if same else statistics.fmean(numbers) if numbers else None

    @cached_property
    def status(self) -> str:
        """'done', or the count of every status: '2 done, 1 diverged'."""
        waiting = "" if self.fresh or len(self.counted) == len(self.runs) else "not confirmed yet"
        if len(self.values) == len(self.counted):
            return ", ".join(["done", *([waiting] if waiting else [])])
        counts = Counter(run.status for run in self.counted)
        blank = sum(run.status == "done" and run.value is None for run in self.counted)
        parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
        return ", ".join(parts + ([f"{blank} without the metric"] if blank else []) + ([waiting] if waiting else []))


@dataclass(frozen=True)
class Board:
    """Cells, best first, those without a finished seed last. `reference`: the baseline compared against."""

    name: str
    metric: str
    mode: str
    cells: tuple[Cell, ...]
    reference: Cell | None
    keys: tuple[str, ...]

    @cached_property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    @cached_property
    def finished(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.rank is not None]

    @property
    def baselines(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.baseline]

    @cached_property
    def confirmed(self) -> bool:
        """Whether cells stand on fresh seeds, so that those a search only selected come after them."""
        return any(cell.fresh and cell.estimate for cell in self.cells)

    def counts(self) -> dict[str, int]:
        """How many runs have each status; every status is a key."""
        seen = Counter(run.status for run in self.runs)
        return {status: seen[status] for status in STATUSES}


def board(
    name: str, runs: Iterable[Run], metric: str, mode: str, is_reference: Callable[[Cell], bool] = lambda c: c.baseline
) -> Board:
    """Gathers runs into ranked cells. `mode` is 'min' or 'max'.

    Several cells can be baselines (a partial match names them). The best of them is the reference: a variation should
    beat the baseline at its best, and any other choice would flatter it.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.listed.cell, []).append(run)
    return ranked(name, [_cell(title, members) for title, members in groups.items()], metric, mode, is_reference)


def ranked(
    name: str,
    cells: Sequence[Cell],
    metric: str,
    mode: str,
    is_reference: Callable[[Cell], bool] = lambda c: c.baseline,
) -> Board:
    """A board of cells, each ranked and compared with the best of those that may be the reference, and with the best."""
    sign = 1 if mode == "min" else -1
    confirmed = any(cell.fresh and cell.estimate for cell in cells)

    def place(cell: Cell) -> tuple[bool, float]:
        assert cell.estimate
        return confirmed and cell.selected, sign * cell.estimate.mean

    finished = [replace(c, rank=i) for i, c in enumerate(sorted((c for c in cells if c.estimate), key=place), 1)]
    reference = next((cell for cell in finished if is_reference(cell)), None)
    if reference:
        finished = _against_reference(finished, reference)
    finished = _against_best(finished, sign)
    keys = dict.fromkeys(key for cell in cells for key in cell.changed)
    chosen = next((cell for cell in finished if reference and cell.rank == reference.rank), None)
    rest = [cell for cell in cells if cell.estimate is None]
    return Board(name, metric, mode, (*finished, *rest), chosen, tuple(keys))


def _cell(name: str, runs: list[Run]) -> Cell:
    changed = {key: value for key, value in runs[0].listed.changed.items() if key != SEED_KEY}
    fresh = any(run.listed.phase == "confirm" and run.status not in OPEN for run in runs)
    cell = Cell(name, tuple(runs), any(run.listed.baseline for run in runs), changed, None, fresh)
    return replace(cell, estimate=estimate(list(cell.values.values())))


def pairs(cell: Cell, other: Cell) -> list[float]:
    """The differences to another cell on the seeds that both have finished."""
    return [value - other.values[seed] for seed, value in cell.values.items() if seed in other.values]


def _against_reference(cells: list[Cell], reference: Cell) -> list[Cell]:
    assert reference.estimate
    made, wider = [], 1 - ALPHA / max(1, len(cells) - 1)
    for cell in cells:
        assert cell.estimate
        difference = cell.estimate.mean - reference.estimate.mean
        if cell.rank == reference.rank:
            made.append(replace(cell, difference=difference))
            continue
        some = pairs(cell, reference)
        made.append(replace(cell, difference=difference, paired=estimate(some), corrected=estimate(some, wider)))
    adjusted = holm([cell.paired.p if cell.paired else None for cell in made], len(cells) - 1)
    return [replace(cell, adjusted=p) for cell, p in zip(made, adjusted, strict=True)]


def _against_best(cells: list[Cell], sign: int) -> list[Cell]:
    """Marks what can be told apart from the best. Being compared with the best of many is a comparison with each of them."""
    if not cells:
        return []
    best, rest = cells[0], cells[1:]
    behind = [estimate(pairs(cell, best)) for cell in rest]
    adjusted = holm([found.p if found else None for found in behind], len(rest))
    made = [replace(best, mark="best")]
    for cell, found, p in zip(rest, behind, adjusted, strict=True):
        made.append(replace(cell, behind=found, mark=_mark(found, p, sign)))
    return made


def _mark(behind: Estimate | None, adjusted: float | None, sign: int) -> Mark:
    if behind is None or adjusted is None:
        return "unknown"
    if not behind.excludes_zero() or sign * behind.mean < 0:
        return "same"
    return "worse" if adjusted < ALPHA else "likely"
