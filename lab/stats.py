"""What many runs say together: seeds gathered into cells, their means and spreads, and the differences to a baseline.

Reads and writes no file. A run counts towards a mean only when it is done and its metric is a finite number; every
other run is counted by its status, so that a cell whose bad seeds died can be seen for what it is. Numbers become text
here, in one place.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

STATUSES = ("done", "diverged", "failed", "pruned", "started", "pending")
SEED_KEY = "train.seed"
LEVEL = 0.95


@dataclass(frozen=True)
class Listed:
    """One run, as the expansion lists it. `changed`: the swept keys; `baseline`: it belongs to a baseline cell."""

    run_id: str
    cell: str
    seed: int
    changed: dict[str, Any]
    folder: Path
    baseline: bool


@dataclass(frozen=True)
class Point:
    """One evaluation: completed updates, tokens seen (None: not recorded), validation loss in nats per token."""

    iter: int
    tokens: int | None
    loss: float


@dataclass(frozen=True)
class Run:
    """A listed run and what its folder says. `value`: the objective's metric, of a done run and finite."""

    listed: Listed
    status: str
    value: float | None
    result: Mapping[str, Any]
    curve: tuple[Point, ...] = ()
    error: str = ""

    def number(self, field: str) -> float | None:
        return finite(self.result.get(field))


@dataclass(frozen=True)
class Estimate:
    """A mean of n values; sd (n - 1) and the t interval `low`..`high` are None for n = 1, where no spread is known."""

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.high is None else self.high - self.mean

    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Cell:
    """The runs that differ in nothing but the seed. `rank` and `estimate` are None where no seed has finished.

    `difference` is mean minus baseline mean; `paired` the differences seed by seed on the seeds that both have;
    `corrected` is `paired` with the wider interval that allows for all comparisons of this board (Bonferroni).
    """

    name: str
    runs: tuple[Run, ...]
    baseline: bool
    changed: Mapping[str, Any]
    estimate: Estimate | None
    rank: int | None = None
    difference: float | None = None
    paired: Estimate | None = None
    corrected: Estimate | None = None

    @property
    def values(self) -> dict[int, float]:
        """Metric by seed, finished seeds alone."""
        return {run.listed.seed: run.value for run in self.runs if run.value is not None}

    def count(self, *statuses: str) -> int:
        return sum(run.status in statuses for run in self.runs)

    def mean(self, field: str) -> float | None:
        """Mean of a result's field over the finished seeds; of a run that ended otherwise where none has finished."""
        finished = [run for run in self.runs if run.value is not None] or list(self.runs)
        numbers = [number for run in finished if (number := run.number(field)) is not None]
        same = len(set(numbers)) == 1  # a count stays whole
        return numbers[0] if same else statistics.fmean(numbers) if numbers else None

    @property
    def status(self) -> str:
        """'done', or the count of every status: '2 done, 1 diverged'."""
        blank = sum(run.status == "done" and run.value is None for run in self.runs)
        if len(self.values) == len(self.runs):
            return "done"
        parts = [f"{n} {status}" for status in STATUSES if (n := self.count(status))]
        return ", ".join(parts + ([f"{blank} without the metric"] if blank else []))


@dataclass(frozen=True)
class Board:
    """A sweep's cells, best first, those without a finished seed last. `reference`: the baseline compared against."""

    name: str
    metric: str
    mode: str
    cells: tuple[Cell, ...]
    reference: Cell | None
    keys: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    @property
    def finished(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.rank is not None]

    @property
    def baselines(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.baseline]

    def counts(self) -> dict[str, int]:
        """How many runs have each status; every status is a key."""
        seen = Counter(run.status for run in self.runs)
        return {status: seen[status] for status in STATUSES}


def finite(value: Any) -> float | None:
    """`value` where it is a finite number, else None (booleans are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """The two-sided quantile of Student's t: |t| stays below it with `probability`.

    Source: for whole degrees of freedom the distribution is a finite sum in the angle atan(t / sqrt(degrees))
    (Abramowitz and Stegun, 26.7.3 and 26.7.4); inverted by bisection.
    Raises: ValueError where the probability is not inside (0, 1) or the degrees are below 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"t_quantile needs 0 < probability < 1 and degrees >= 1, not {probability} and {degrees}.")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < probability else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_inside(angle: float, degrees: int) -> float:
    """P(|t| < tan(angle) sqrt(degrees))."""
    odd, cosine = degrees % 2, math.cos(angle)
    total, term = 0.0, cosine if odd else 1.0
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate | None:
    """Mean, sd and t interval at `level`; None without values."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(1, mean)
    sd = statistics.stdev(values)
    half = t_quantile(level, len(values) - 1) * sd / math.sqrt(len(values))
    return Estimate(len(values), mean, sd, mean - half, mean + half)


def board(name: str, runs: Iterable[Run], metric: str, mode: str) -> Board:
    """Gathers runs into ranked cells. `mode` is 'min' or 'max'.

    Several cells can be baselines (a partial match names them). The best of them is the reference: a variation should
    beat the baseline at its best, and any other choice would flatter it.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.listed.cell, []).append(run)
    cells = [_cell(name, members) for name, members in groups.items()]
    sign = 1 if mode == "min" else -1
    finished = sorted((c for c in cells if c.estimate), key=lambda c: sign * c.estimate.mean if c.estimate else 0.0)
    ranked = [dataclasses.replace(cell, rank=i) for i, cell in enumerate(finished, 1)]
    reference = next((cell for cell in ranked if cell.baseline), None)
    compared = [_compare(cell, reference, len(ranked) - 1) for cell in ranked] if reference else ranked
    keys = dict.fromkeys(key for cell in cells for key in cell.changed)
    rest = [cell for cell in cells if cell.estimate is None]
    chosen = next((cell for cell in compared if cell.baseline), None)
    return Board(name, metric, mode, (*compared, *rest), chosen, tuple(keys))


def _cell(name: str, runs: list[Run]) -> Cell:
    changed = {key: value for key, value in runs[0].listed.changed.items() if key != SEED_KEY}
    values = [run.value for run in runs if run.value is not None]
    return Cell(name, tuple(runs), any(run.listed.baseline for run in runs), changed, estimate(values))


def _compare(cell: Cell, reference: Cell, comparisons: int) -> Cell:
    assert cell.estimate and reference.estimate
    difference = cell.estimate.mean - reference.estimate.mean
    if cell.name == reference.name:
        return dataclasses.replace(cell, difference=difference)
    mine, theirs = cell.values, reference.values
    pairs = [value - theirs[seed] for seed, value in mine.items() if seed in theirs]
    wider = estimate(pairs, 1 - (1 - LEVEL) / max(1, comparisons))
    return dataclasses.replace(cell, difference=difference, paired=estimate(pairs), corrected=wider)


def clean(text: str) -> str:
    """`text` on one line, without control, direction and surrogate characters: terminals and pictures show it."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(text: str, width: int) -> str:
    """`text` cleaned, with its middle left out where it is longer than `width`."""
    text = clean(text)
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[-(width - 1 - head) :]


def told(value: Any) -> str:
    """A swept value as text: words as they are, the rest as JSON, floats in full."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def decimal(value: float | None, signed: bool = False) -> str:
    """A metric for reading: four decimals, fewer of large numbers, four significant digits of tiny and huge ones."""
    if value is None:
        return ""
    value += 0.0  # no minus sign before a zero
    size = abs(value)
    form = ".4f" if size == 0 or 0.0005 <= size < 100 else ".2f" if 100 <= size < 1000 else ",.0f"
    if 0 < size < 0.0005 or size >= 1e9:
        form = ".4g"
    return f"{value:{'+' if signed else ''}{form}}".replace("-", "\N{MINUS SIGN}", value < 0)


def interval(estimate: Estimate) -> str:
    """[low, high] with signs, for differences."""
    return f"[{decimal(estimate.low, True)}, {decimal(estimate.high, True)}]"


def magnitude(value: float | None) -> str:
    """A count for reading: 123.6M."""
    if value is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds for reading: 8.2 s, 14 min 05 s, 3 h 20 min."""
    if seconds is None:
        return ""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
