"""What there is to draw, for the pictures of papers and for the page's charts alike: lines, points, ranges and looks.

One bad cell may not squeeze all others, so what lies far off is left outside the range and marked at its edge. Of
thousands of cells some hundred are drawn, spread evenly over the ranks, and the figures say so.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lab.reporting.cells import Board, Cell, Run
from lab.reporting.effects import Effects, Grid, effects, heat
from lab.reporting.numbers import short
from lab.reporting.reading import Curves, Point, curves
from lab.reporting.tuning import Tuning

MANY = 12  # up to so many cells are told apart; of more, the best BEST and the baseline
BEST = 8
ROWS = 40  # of the comparison
GREY = 100  # lines of other cells
DOTS = 400  # points of a scatter
REFERENCE = -1  # the look of the baseline that is compared with
UNITS = {
    "val_loss": "Validation loss (nats per token)",
    "best_val_loss": "Best validation loss (nats per token)",
    "train_loss": "Training loss (nats per token)",
    "seconds": "Training time (seconds)",
    "tokens_per_second": "Throughput (tokens per second)",
    "tokens": "Training tokens",
    "iters": "Updates",
    "parameters": "Parameters",
    "trainable_parameters": "Trainable parameters",
    "flops_per_token": "FLOPs per token",
    "flops": "FLOPs of training",
    "peak_memory_bytes": "Peak memory (bytes)",
}
MEASURES = ("tokens", "flops", "seconds")
SCALES = ("parameters", "flops", "seconds")


@dataclass(frozen=True)
class Line:
    """A cell's loss curve: mean, lowest and highest over its runs after the same updates.

    `x`: where these are, by measure, each a mean over the runs; measures that were not recorded are left out.
    `ended`: how the cell ended, where no run of it is done.
    """

    cell: Cell
    x: Mapping[str, tuple[float, ...]]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ended: str


@dataclass(frozen=True)
class Dot:
    """A cell in a scatter. `front`: no cell has both less of x and a better metric."""

    cell: Cell
    x: float
    y: float
    front: bool


@dataclass(frozen=True)
class Drawn:
    """All that is drawn of a board. `looks`: the number of the look of each cell that is told apart, by name.

    `lines` are in the order of the cells, `undrawn` says how many cells have none though they may have a curve; `dots` are
    by measure, only such in which cells differ.
    """

    board: Board
    tuning: Tuning | None
    effects: Effects
    grid: Grid | None
    looks: Mapping[str, int]
    lines: tuple[Line, ...]
    undrawn: int
    dots: Mapping[str, tuple[Dot, ...]]

    @property
    def measures(self) -> list[str]:
        """What lines can be drawn against; updates first where some runs have not recorded tokens."""
        found = [m for m in MEASURES if any(m in line.x for line in self.lines)]
        return ["iters", *found] if any("tokens" not in line.x for line in self.lines) else found

    def over(self, measure: str) -> list[Line]:
        """The lines that can be drawn against a measure, those of cells that are told apart last."""
        return sorted((x for x in self.lines if measure in x.x), key=lambda line: line.cell.name in self.looks)


def prepare(board: Board, tuning: Tuning | None) -> Drawn:
    """Reads the curves that are drawn, and computes the rest."""
    looks = chosen(board)
    others = [cell for cell in board.cells if cell.name not in looks]
    cells = [cell for cell in board.cells if cell.name in looks] + even(others, GREY)
    read = curves(cells)
    lines = tuple(made for cell in cells if (made := line(cell, read)))
    found = effects(board)
    dots = {field: some for field in SCALES if (some := scatter(board, field, looks))}
    return Drawn(board, tuning, found, heat(board, found), looks, lines, len(board.cells) - len(cells), dots)


def chosen(board: Board) -> dict[str, int]:
    """The cells that are told apart: all of a few, the best and the baseline of many."""
    some = [c for c in board.cells if c is not board.reference][: MANY if len(board.cells) <= MANY else BEST]
    found = {cell.name: i for i, cell in enumerate(some)}
    if board.reference:
        found[board.reference.name] = REFERENCE
    return found


def even(cells: Sequence[Cell], most: int) -> list[Cell]:
    """At most so many of the cells, spread evenly over their order."""
    return [cells[i * len(cells) // most] for i in range(most)] if len(cells) > most else list(cells)


def line(cell: Cell, read: Curves) -> Line | None:
    """The mean over the finished runs, or over all where there are none; after updates that all of them have."""
    runs = [run for run in cell.counted if run.listed.run_id in read]
    finished = [run for run in runs if run.value is not None]
    by_iter = [(run, {point.iter: point for point in read[run.listed.run_id]}) for run in finished or runs]
    if not by_iter:
        return None
    common = sorted(set.intersection(*(set(points) for _, points in by_iter)))
    if not common:
        by_iter = [max(by_iter, key=lambda one: len(one[1]))]
        common = sorted(by_iter[0][1])
    columns = [[points[at].loss for _, points in by_iter] for at in common]
    mean, low, high = (tuple(f(column) for column in columns) for f in (statistics.fmean, min, max))
    x = {"iters": tuple(map(float, common))}
    for measure in MEASURES:
        values = [[_at(run, points[at], measure) for run, points in by_iter] for at in common]
        if all(value is not None for row in values for value in row):
            x[measure] = tuple(statistics.fmean(v for v in row if v is not None) for row in values)
    return Line(cell, x, mean, low, high, "" if finished else _worst(runs))


def _at(run: Run, point: Point, measure: str) -> float | None:
    if measure == "seconds":
        return point.seconds
    each = run.number("flops_per_token") if measure == "flops" else 1
    return None if point.tokens is None or each is None else point.tokens * each


def _worst(runs: Sequence[Run]) -> str:
    statuses = {run.status for run in runs}
    return next((status for status in ("diverged", "failed", "pruned", "started") if status in statuses), "unfinished")


def scatter(board: Board, field: str, looks: Mapping[str, int]) -> tuple[Dot, ...]:
    """The cells against a measure, and which of them are on the Pareto front; empty where cells do not differ in it."""
    sign = 1 if board.mode == "min" else -1
    found = [(x, c.estimate.mean, c) for c in board.finished if c.estimate and (x := c.mean(field)) is not None]
    if len({x for x, _, _ in found}) < 2:
        return ()
    best, front = float("inf"), set()
    for _, y, cell in sorted(found, key=lambda one: (one[0], sign * one[1])):
        if sign * y < best:
            best = sign * y
            front.add(cell.name)
    kept = {c.name for c in even([c for _, _, c in found], DOTS)} | front | set(looks)
    return tuple(Dot(cell, x, y, cell.name in front) for x, y, cell in found if cell.name in kept)


# Names and ranges -----------------------------------------------------------------------------------------------------------


def label(cell: Cell, width: int) -> str:
    name = short(cell.name, width)
    return f"{name} (baseline)" if cell.baseline and "baseline" not in name else name


def title(field: str) -> str:
    """A measure or metric in words, with its unit."""
    return UNITS.get(field, short(field, 60))


def inliers(values: Sequence[float]) -> int:
    """How many of `values`, best first, share a scale: the rest would squeeze them into a sixth of it or less."""
    for i in range(max(2, (len(values) + 1) // 2), len(values)):
        span = abs(values[i - 1] - values[0])
        if span > 0 and abs(values[i] - values[0]) > 6 * span:
            return i
    return len(values)


def unit(top: float) -> tuple[str, float]:
    """What numbers up to `top` are counted in: a word and its size."""
    words = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
    for size, name in () if top >= 1e15 else words:
        if top >= size:
            return name, size
    return "", 1.0


def window(lines: Sequence[Line]) -> tuple[float, float]:
    """The range of losses shown: from the lowest up to where a usual run is after a seventh of training.

    Before that the loss only falls from that of a uniform guess, and showing it would flatten everything that matters.
    """
    finals = sorted(line.mean[-1] for line in lines if not line.ended) or sorted(line.mean[-1] for line in lines)
    finals = finals[: max(MANY, len(finals) * 9 // 10)]
    limit = finals[inliers(finals) - 1]
    kept = [line for line in lines if line.mean[-1] <= limit]
    low = min(min(line.low) for line in kept)
    early = []
    for line in kept:
        at = line.x["iters"]
        early.append(next((y for x, y in zip(at, line.mean, strict=True) if x >= at[-1] / 7), line.mean[0]))
    high = max(statistics.median(early), limit + 0.25 * (limit - low))
    if not low < high:
        low, high = low - 0.5, high + 0.5
    return low - 0.04 * (high - low), high + 0.02 * (high - low)


def rows(board: Board) -> list[Cell]:
    """The cells of the comparison: the best, and the reference in any case."""
    some = list(board.cells[:ROWS])
    if board.reference and board.reference not in some:
        some[-1] = board.reference
    return some


def limits(board: Board, cells: Sequence[Cell]) -> tuple[float, float]:
    """Room for the seeds of all cells but the off-scale ones, and for intervals that do not dwarf the seeds."""
    means = [cell.estimate.mean for cell in cells if cell.estimate]
    kept = [cell for cell in cells if cell.estimate][: inliers(sorted(means, reverse=board.mode == "max"))]
    if board.reference and board.reference in cells and board.reference not in kept:
        kept.append(board.reference)
    values = [value for cell in kept for value in cell.values.values()]
    low, high = min(values), max(values)
    span = high - low
    if span == 0:
        span = abs(low) * 0.02 or 1.0
    ends = [end for cell in kept if (e := cell.estimate) for end in (e.low, e.high) if end is not None]
    low = max(min([low, *ends]), low - 0.6 * span)
    high = min(max([high, *ends]), high + 0.6 * span)
    return low - 0.08 * span, high + 0.08 * span


def near(values: Sequence[float], mode: str) -> tuple[float, float]:
    """The range of means without those far off on the bad side."""
    ordered = sorted(values, reverse=mode == "max")
    kept = ordered[: inliers(ordered)]
    low, high = min(kept), max(kept)
    room = 0.08 * (high - low) or abs(low) * 0.01 or 0.5
    return low - room, high + room


def ratio(values: Sequence[float]) -> bool:
    """Whether an axis over these numbers should be logarithmic."""
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def shares(grid: Grid, mode: str) -> tuple[float, float]:
    """The best and the worst mean of a heat map that share a scale: the ends of its colours."""
    ordered = sorted((m for row in grid.means for m in row if m is not None), reverse=mode == "max")
    return ordered[0], ordered[inliers(ordered) - 1]
