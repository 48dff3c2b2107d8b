"""The two pictures of a report as PNG bytes: loss against tokens, and every cell's final metric.

Drawn on Figure objects, without pyplot: no display, no global state. Cells differ in colour (Okabe and Ito's palette,
safe for colour-blind readers) and in line style or marker, so the pictures read in grey. One bad cell may not squeeze
all others: what lies far off is marked at the edge, with its number.
"""

from __future__ import annotations

import io
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.stats import Board, Cell, Run, decimal, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MANY = 12  # up to so many cells are told apart; of more, the best BEST and the baseline
BEST = 8
ROWS = 40  # of the comparison
INK, FAINT, REST = "#222222", "#6b6b6b", "#b9b9b9"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.2, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.usetex": False,
    "text.parse_math": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.bbox": "standard",
    "path.simplify": True,
}
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
    "peak_memory_bytes": "Peak memory (bytes)",
}


@dataclass(frozen=True)
class Look:
    """How one cell is drawn in both pictures."""

    colour: str
    dash: Any
    marker: str


@dataclass(frozen=True)
class Line:
    """A cell's loss curve: mean, lowest and highest over its runs at every x. `ended`: how, where none is done."""

    cell: Cell
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ended: str


def looks(board: Board) -> dict[str, Look]:
    """The look of every cell that is told apart: all of a few, the best and the baseline of many."""
    chosen = [c for c in board.cells if c is not board.reference][: MANY if len(board.cells) <= MANY else BEST]
    found = {
        cell.name: Look(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, cell in enumerate(chosen)
    }
    if board.reference:
        found[board.reference.name] = Look("#000000", (0, (6, 1.5, 1, 1.5)), "d")
    return found


def _picture(width: float, height: float, draw: Callable[[Figure, Axes], None]) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a name in a script that the font lacks: boxes will do
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        draw(figure, axes)
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=22)
    axes.annotate(below, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8.5, color=FAINT)


def _nothing(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=FAINT, fontsize=11, transform=axes.transAxes)


def _label(cell: Cell, width: int) -> str:
    name = short(cell.name, width)
    return f"{name} (baseline)" if cell.baseline and "baseline" not in name else name


def inliers(values: Sequence[float]) -> int:
    """How many of `values`, best first, share a scale: the rest would squeeze them into a sixth of it or less."""
    for i in range(max(2, (len(values) + 1) // 2), len(values)):
        span = abs(values[i - 1] - values[0])
        if span > 0 and abs(values[i] - values[0]) > 6 * span:
            return i
    return len(values)


# Loss curves


def loss_curves(board: Board) -> bytes:
    """Validation loss against tokens (updates, where tokens were not recorded), a line per cell."""
    by_tokens = all(point.tokens is not None for run in board.runs for point in run.curve)
    lines = [line for cell in board.cells if (line := _line(cell, by_tokens))]
    top = max((line.x[-1] for line in lines), default=0.0)
    unit, scale = _unit(top) if by_tokens else ("updates", 1.0)
    seen = looks(board)

    def draw(figure: Figure, axes: Axes) -> None:
        if not lines:
            _nothing(axes, "No evaluation has been recorded yet.")
            return
        low, high = _window(lines)
        axes.set_xlim(0, (top or scale) / scale * 1.01)
        axes.set_ylim(low, high)
        axes.grid(color="#e8e8e8", linewidth=0.7)
        axes.set_xlabel(
            f"Training tokens ({unit})" if by_tokens and unit else "Training tokens" if by_tokens else "Updates"
        )
        axes.set_ylabel(UNITS["val_loss"])
        several = any(len(line.cell.values) > 1 for line in lines)
        below = "Mean of each cell's finished seeds; band: lowest to highest." if several else "One finished seed each."
        below += " Of cells without one: the runs so far." if any(line.ended for line in lines) else ""
        _title(axes, f"{short(board.name, 50)}: validation loss in training", below)
        _draw_lines(axes, lines, seen, scale)
        _name_lines(axes, lines, seen)

    return _picture(10, 5.6, draw)


def _line(cell: Cell, by_tokens: bool) -> Line | None:
    """The mean over the finished runs, or over all where there are none; at the points that all of them have."""
    runs = [run for run in cell.runs if run.curve]
    finished = [run for run in runs if run.value is not None]
    curves = [{(p.tokens if by_tokens else p.iter) or 0: p.loss for p in run.curve} for run in finished or runs]
    if not curves:
        return None
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not common:
        curves = [max(curves, key=len)]
        common = sorted(curves[0])
    columns = [[curve[x] for curve in curves] for x in common]
    mean, low, high = (tuple(f(column) for column in columns) for f in (statistics.fmean, min, max))
    return Line(cell, tuple(map(float, common)), mean, low, high, "" if finished else _worst(runs))


def _worst(runs: Sequence[Run]) -> str:
    statuses = {run.status for run in runs}
    return next((status for status in ("diverged", "failed", "pruned", "started") if status in statuses), "unfinished")


def _unit(top: float) -> tuple[str, float]:
    for size, name in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if top >= size:
            return name, size
    return "", 1.0


def _window(lines: Sequence[Line]) -> tuple[float, float]:
    """The range of losses shown: from the lowest up to where a usual run is after a seventh of training.

    Before that the loss only falls from that of a uniform guess, and showing it would flatten everything that matters.
    """
    finals = sorted(line.mean[-1] for line in lines if not line.ended) or sorted(line.mean[-1] for line in lines)
    finals = finals[: max(MANY, len(finals) * 9 // 10)]
    limit = finals[inliers(finals) - 1]
    kept = [line for line in lines if line.mean[-1] <= limit]
    low = min(min(line.low) for line in kept)
    early = [
        next((y for x, y in zip(line.x, line.mean, strict=True) if x >= line.x[-1] / 7), line.mean[0]) for line in kept
    ]
    high = max(statistics.median(early), limit + 0.25 * (limit - low))
    if not low < high:
        low, high = low - 0.5, high + 0.5
    return low - 0.04 * (high - low), high + 0.02 * (high - low)


def _draw_lines(axes: Axes, lines: Sequence[Line], seen: dict[str, Look], scale: float) -> None:
    rest = Look(REST, "solid", "")
    for line in sorted(lines, key=lambda line: line.cell.name in seen):  # the grey ones below
        look = seen.get(line.cell.name, rest)
        x, told = [value / scale for value in line.x], look is not rest
        if told and line.low != line.high:
            axes.fill_between(x, line.low, line.high, color=look.colour, alpha=0.13, linewidth=0)
        axes.plot(x, line.mean, color=look.colour, linestyle=look.dash, linewidth=1.7 if told else 0.5)
        if told:  # drawn whole at the frame, where the last point lies
            axes.plot(
                x[-1],
                line.mean[-1],
                look.marker,
                color=look.colour,
                markersize=4.5,
                clip_on=line.mean[-1] > axes.get_ylim()[1],
            )
        if line.ended == "diverged":
            at = min(line.mean[-1], axes.get_ylim()[1])
            axes.plot(x[-1], at, "x", color=look.colour, markersize=8, markeredgewidth=2, clip_on=False)


def _name_lines(axes: Axes, lines: Sequence[Line], seen: dict[str, Look]) -> None:
    """Names right of the frame, near the height where the line ends; those of off-scale and broken lines on top."""
    low, high = axes.get_ylim()
    named = [line for line in lines if line.cell.name in seen]

    def height(line: Line) -> float:
        off = line.ended in ("diverged", "failed") or line.mean[-1] > high
        return 1.01 if off else (line.mean[-1] - low) / (high - low)

    named.sort(key=height)
    others, gap = len(lines) - len(named), 0.054
    places = spread([height(line) for line in named], gap, 0.09 if others else 0.02, 1.0)
    for line, place in zip(named, places, strict=True):
        look, end = seen[line.cell.name], height(line)
        if end <= 1:
            axes.plot((1.008, 1.03), (end, place), color=REST, linewidth=0.7, transform=axes.transAxes, clip_on=False)
        handle = {
            "color": look.colour,
            "linestyle": look.dash,
            "linewidth": 1.7,
            "marker": look.marker,
            "markersize": 4.5,
        }
        axes.plot(
            (1.035, 1.06, 1.085), (place,) * 3, markevery=(1, 2), transform=axes.transAxes, clip_on=False, **handle
        )
        value = line.ended or decimal(line.mean[-1]) + (" (off scale)" if line.mean[-1] > high else "")
        axes.text(
            1.095, place, f"{value}  {_label(line.cell, 48)}", fontsize=8.5, va="center", transform=axes.transAxes
        )
    if others:
        text = f"grey: {others:,} other cells"
        axes.text(1.035, places[0] - 1.3 * gap, text, fontsize=8.5, va="center", color=FAINT, transform=axes.transAxes)


def spread(wanted: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """Places near `wanted` (rising), `gap` or more apart, in `bottom`..`top`: those that collide share a centre."""
    clusters: list[list[float]] = []  # of wanted - i * gap, whose means must rise
    for i, place in enumerate(wanted):
        clusters.append([place - i * gap])
        while len(clusters) > 1 and statistics.fmean(clusters[-2]) > statistics.fmean(clusters[-1]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    places = [statistics.fmean(cluster) for cluster in clusters for _ in cluster]
    limit = top - gap * (len(places) - 1)
    return [min(max(place, bottom), limit) + i * gap for i, place in enumerate(places)]


# Comparison


def comparison(board: Board) -> bytes:
    """The final metric, a row per cell, best on top: seeds, mean and 95% interval, the baseline as a dashed line."""
    rows = list(board.cells[:ROWS])
    if board.reference and board.reference not in rows:
        rows[-1] = board.reference
    valued = [cell for cell in rows if cell.estimate]
    seen, plain = looks(board), Look("#5a5a5a", "solid", "o")

    def draw(figure: Figure, axes: Axes) -> None:
        if not valued:
            _nothing(axes, "No run has finished yet." if board.runs else "The sweep lists no runs.")
            return
        low, high = _limits(board, valued)
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", color="#e8e8e8", linewidth=0.7)
        better = "lower" if board.mode == "min" else "higher"
        axes.set_xlabel(f"{UNITS.get(board.metric, short(board.metric, 60))}, {better} is better")
        labels = [_label(cell, 52) for cell in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(axis="y", length=0)
        hidden = len(board.cells) - len(rows)
        more = f" {hidden:,} more cells are in leaderboard.csv." if hidden else ""
        several = any(len(cell.values) > 1 for cell in valued)
        keys = (
            "Small: seeds. Large: their mean and its 95% t interval."
            if several
            else "One seed each: no spread is known."
        )
        keys += " Dashed: baseline." if board.reference else ""
        _title(axes, f"{short(board.name, 50)}: {short(board.metric, 40)} by cell", f"{keys}{more}")
        if board.reference and board.reference.estimate:
            axes.axvline(board.reference.estimate.mean, color="#000000", linestyle=(0, (5, 3)), linewidth=1, zorder=1)
        for at, cell in enumerate(rows):
            _draw_row(axes, at, cell, seen.get(cell.name, plain), board.mode)

    return _picture(10, 1.7 + 0.34 * max(3, len(rows)), draw)


def _limits(board: Board, cells: Sequence[Cell]) -> tuple[float, float]:
    """Room for the seeds of all cells but the off-scale ones, and for intervals that do not dwarf the seeds."""
    means = [cell.estimate.mean for cell in cells if cell.estimate]
    kept = list(cells[: inliers(means)])
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


def _draw_row(axes: Axes, at: int, cell: Cell, look: Look, mode: str) -> None:
    low, high = axes.get_xlim()
    found, note = cell.estimate, cell.status
    if found is not None:
        inside = [value for value in cell.values.values() if low <= value <= high]
        if found.n > 1:
            axes.plot(
                inside, [at + 0.26] * len(inside), "o", color=look.colour, markersize=3.2, alpha=0.75, markeredgewidth=0
            )
        if found.low is not None and found.high is not None and found.high > low and found.low < high:
            ends = max(found.low, low), min(found.high, high)
            axes.plot(ends, (at, at), color=look.colour, linewidth=1.8, solid_capstyle="butt")
            for end, limit, arrow in ((found.low, low, "<"), (found.high, high, ">")):
                if (end < limit) if arrow == "<" else (end > limit):
                    axes.plot(limit, at, arrow, color=look.colour, markersize=5, clip_on=False)
        if low <= found.mean <= high:
            axes.plot(
                found.mean,
                at,
                look.marker,
                color=look.colour,
                markersize=7.5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                zorder=4,
            )
        else:
            edge, arrow = (high, ">") if found.mean > high else (low, "<")
            axes.plot(edge, at, arrow, color=look.colour, markersize=9, clip_on=False, zorder=4)
        half = f" ± {decimal(found.half)}" if found.half is not None else " (1 seed)"
        off = "" if low <= found.mean <= high else ", off scale"
        note = f"{decimal(found.mean)}{half}{off}" + (f", {cell.status}" if cell.status != "done" else "")
    elif cell.count("diverged"):
        axes.plot(
            high if mode == "min" else low, at, "x", color=look.colour, markersize=7, markeredgewidth=2, clip_on=False
        )
    axes.text(
        1.02, at, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=INK if found else FAINT
    )
