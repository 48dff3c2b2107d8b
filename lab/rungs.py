"""Early stopping: the rules, pure, and a judge that asks files, so that trials on any machine decide by themselves.

A run tells its validation loss at every rung. Halving (ASHA: Li et al., arXiv 1810.05934) lets the best one in `eta` of those
that have come to a rung go on, and the others wait there until more have come; what still waits when nothing else is left to do
is pruned. The median rule (Golovin et al., Google Vizier, KDD 2017) prunes a run whose best loss is worse than half of the
others were on average.

Every run of the sweep is compared with all others, whatever its seed, and runs of different lengths at equal iterations. Who
comes to a rung first depends on the machine, so a sweep that stops early is not reproducible bit for bit; the runs that go on
are.

Files: `<sweep>/rungs/<iteration>/<run_id>` holds the loss, the best and the mean so far; `<run_id>.go` beside it says that the
run may pass. All are written atomically and never changed to say something else, so nothing needs a lock.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from core.options import Mistake
from lab.searching import Stop
from lab.store import write_atomically
from train_args import Config
from variations import CATALOGUE

FOLDER = "rungs"
GO = ".go"
OTHERS = 4  # fewer have no median worth the name


# The rules ------------------------------------------------------------------------------------------------------------------


def rungs(stop: Stop, length: int) -> tuple[int, ...]:
    """The iterations below `length` at which a run of that length is judged: min_iters times a power of eta, or its multiples
    for the median rule. They are the same for all runs that are long enough."""
    if stop.method == "median":
        return tuple(range(stop.min_iters, length, stop.min_iters))
    made, at = [], stop.min_iters
    while at < length:
        made.append(at)
        at *= stop.eta
    return tuple(made)


def ranked(values: Mapping[str, float], mode: str = "min") -> list[str]:
    """The runs with a finite value, the best first; of equal ones the first by name."""
    sign = -1.0 if mode == "max" else 1.0
    return sorted((run for run, v in values.items() if math.isfinite(v)), key=lambda run: (sign * values[run], run))


def promotable(values: Mapping[str, float], eta: int, mode: str = "min", last: bool = False) -> list[str]:
    """The runs that may pass a rung at which these values were told, the best first: as many as one in `eta` of all that came.

    last: no others will come, so that at least the best of them passes. A value that is not finite counts, and never passes.
    """
    count = len(values) // eta
    return ranked(values, mode)[: max(1, count) if last else count]


def worse_than_median(best: float, means: Collection[float], mode: str = "min") -> bool:
    """Whether a run is to be pruned: its best value so far is worse than the median of the running means of the others, which
    is asked once there are four. What is not finite is worse than everything."""
    if len(means) < OTHERS:
        return False
    sign = -1.0 if mode == "max" else 1.0
    middle = median(_worst(sign * mean) for mean in means)
    return _worst(sign * best) > middle


def _worst(value: float) -> float:
    return value if math.isfinite(value) else math.inf


# Files ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a run told at a rung: its loss there, and of all rungs so far the best and the mean."""

    loss: float
    best: float
    mean: float


def recorded(folder: Path, iteration: int) -> dict[str, Record]:
    """What the runs of the sweep in `folder` have told at a rung."""
    made = {}
    for path in sorted((folder / FOLDER / str(iteration)).glob("[!.]*")):
        if path.suffix != GO and (record := _read(path)) is not None:
            made[path.name] = record
    return made


def passed(folder: Path, iteration: int) -> set[str]:
    """The runs that may pass a rung, or have."""
    return {path.name.removesuffix(GO) for path in (folder / FOLDER / str(iteration)).glob(f"[!.]*{GO}")}


def _read(path: Path) -> Record | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Record(*map(float, path.read_text().split()))
    return None


def told_at(folder: Path) -> list[int]:
    """The rungs at which anything was told, the last first."""
    names = (path.name for path in (folder / FOLDER).glob("*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


class FileJudge:
    """Judges one run of the sweep in `folder` at its `rungs`. `length` is the run's, in iterations; `mode` the objective's.

    At a rung the run records its loss and then asks for the verdict. Both may be done again, by an attempt that repeats the
    iteration.
    """

    def __init__(self, folder: Path, run_id: str, stop: Stop, length: int, mode: str = "min") -> None:
        self.folder, self.run_id, self.stop, self.mode = folder, run_id, stop, mode
        self.rungs = rungs(stop, length)

    def record(self, iteration: int, loss: float) -> None:
        """Tells the loss at a rung."""
        before = [_read(self._path(rung)) for rung in self.rungs if rung < iteration]
        losses = [*(record.loss for record in before if record is not None), float(loss)]
        finite = [one for one in losses if math.isfinite(one)]
        best = (max if self.mode == "max" else min)(finite, default=losses[-1])
        path = self._path(iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{losses[-1]!r} {best!r} {sum(losses) / len(losses)!r}\n")

    def verdict(self, iteration: int) -> str:
        """'go', 'pause' (it may be promoted once more runs have come to the rung) or 'prune', from what is recorded now."""
        known = recorded(self.folder, iteration)
        if self.stop.method == "median":
            means = [record.mean for run, record in known.items() if run != self.run_id]
            own = known.get(self.run_id)
            return "prune" if own is not None and worse_than_median(own.best, means, self.mode) else "go"
        if self.run_id in passed(self.folder, iteration):
            return "go"
        if self.run_id not in promotable(_losses(known), self.stop.eta, self.mode):
            return "pause"
        _let(self.folder, iteration, self.run_id)
        return "go"

    def _path(self, iteration: int) -> Path:
        return self.folder / FOLDER / str(iteration) / self.run_id


def promotions(
    folder: Path, paused: Iterable[str], stop: Stop, mode: str = "min", last: bool = False, out: Collection[str] = ()
) -> list[str]:
    """The paused runs that may go on now: those at the last rungs first, and of one rung the best first.

    last: nothing else is left to do in this sweep, so that the best of every rung passes, however few came to it. Where that
    gives none, what is paused is to be pruned. out: runs that passed a rung and then came to nothing, in whose place others may
    go on; otherwise one that diverges would take the whole sweep with it. Nothing is written: `promote` lets a run pass.
    """
    waiting, made = set(paused), []
    for iteration in told_at(folder) if stop.method == "halving" and waiting else ():
        known = _losses(recorded(folder, iteration))
        losses = {run: math.nan if run in out else loss for run, loss in known.items()}
        here = waiting & set(losses)  # a run waits at the last rung that it came to
        waiting -= here
        allowed = promotable(losses, stop.eta, mode, last)
        through = passed(folder, iteration)
        made += [run for run in allowed if run in here]
        made += [run for run in ranked({r: losses[r] for r in here & through}, mode) if run not in allowed]
    return made


def promote(folder: Path, run_id: str) -> None:
    """Lets a paused run pass the rung at which it waits."""
    for iteration in told_at(folder):
        if (folder / FOLDER / str(iteration) / run_id).exists():
            _let(folder, iteration, run_id)
            return


def _let(folder: Path, iteration: int, run_id: str) -> None:
    write_atomically(folder / FOLDER / str(iteration) / f"{run_id}{GO}", "")


def _losses(known: Mapping[str, Record]) -> dict[str, float]:
    return {run: record.loss for run, record in known.items()}


# What is said about it ------------------------------------------------------------------------------------------------------


def in_vain(stop: Stop | None, configs: Sequence[Config]) -> list[Mistake]:
    """A mistake where no run is long enough to be stopped."""
    longest = max((config.iterations for config in configs), default=0)
    if stop is None or stop.min_iters < longest:
        return []
    text = f"{stop.min_iters:,} iterations are no fewer than the longest run has, {longest:,}, so that nothing would be stopped"
    return [Mistake(("sweep", "stop", "min_iters"), text)]


def caveats(stop: Stop | None, configs: Sequence[Config]) -> list[str]:
    """What is to be known of a sweep that stops early, as sentences; none without `stop`."""
    if stop is None or not configs:
        return []
    how = f"one in {stop.eta} goes on" if stop.method == "halving" else "those worse than the median are pruned"
    said = [
        f"Runs are stopped early from iteration {stop.min_iters:,} on ({how}), by comparing all of them at equal iterations."
    ]
    if len({config.train.seed for config in configs}) > 1:
        said.append("Seeds take part like any other difference: a cell may keep only the seeds that were lucky early.")
    if any(_falls(config, rung) for config in configs for rung in rungs(stop, config.iterations)[:1]):
        said.append("They are compared before their learning rates have annealed; the order may be another at the end.")
    return said


def _falls(config: Config, rung: int) -> bool:
    """Whether the learning rate still falls after a rung."""
    made = CATALOGUE["schedule"][config.schedule.name](config.schedule.options, config.iterations)
    return bool(made.multiplier(rung) > made.multiplier(config.iterations - 1))
