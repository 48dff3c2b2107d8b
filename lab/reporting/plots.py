"""The pictures for papers, as PNG and SVG files: curves, the comparison, effects, the heat map and scaling.

Drawn on Figure objects, without pyplot: no display, no global state. Cells differ in colour (Okabe and Ito's palette,
safe for colour-blind readers) and in line style or marker, so the pictures read in grey.
"""

from __future__ import annotations

import io
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lab.reporting import drawing
from lab.reporting.cells import Cell
from lab.reporting.drawing import REFERENCE, Drawn, Line, label, limits, title, unit, window
from lab.reporting.numbers import decimal, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
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
    "svg.hashsalt": "report",  # the same picture is the same file
}
Draw = Callable[["Figure"], None]


@dataclass(frozen=True)
class Look:
    """How one cell is drawn in all pictures."""

    colour: str
    dash: Any
    marker: str


PLAIN, BASELINE = Look(REST, "solid", ""), Look("#000000", (0, (6, 1.5, 1, 1.5)), "d")


def look(drawn: Drawn, cell: Cell) -> Look:
    """A cell's own look, or that of the grey rest."""
    i = drawn.looks.get(cell.name)
    if i is None:
        return PLAIN
    if i == REFERENCE:
        return BASELINE
    return Look(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], MARKERS[i % len(MARKERS)])


@dataclass(frozen=True)
class Picture:
    """One that has something to show: width and height in inches, and what draws it."""

    name: str
    width: float
    height: float
    draw: Draw


def pictures(drawn: Drawn) -> list[Picture]:
    """Every picture that has something to show; curves and the comparison always."""
    from lab.reporting import plots_more

    names = {"tokens": "loss_curves", "iters": "loss_curves", "flops": "loss_by_flops", "seconds": "loss_by_time"}
    height = 1.7 + 0.34 * max(3, min(len(drawn.board.cells), drawing.ROWS))
    made = [
        Picture(names[measure], 10, 5.6, partial(loss_curves, drawn=drawn, measure=measure))
        for measure in drawn.measures or ["tokens"]
    ]
    made.append(Picture("comparison", 10, height, partial(comparison, drawn=drawn)))
    return made + [Picture(name, *how) for name, how in plots_more.several(drawn).items()]


def files(picture: Picture) -> Iterator[tuple[str, bytes]]:
    """A picture as PNG and SVG: names and contents."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks: boxes will do.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        # Names that leave no room: the axes keep their usual size.
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure = Figure(figsize=(picture.width, picture.height), dpi=DPI, layout="constrained")
        picture.draw(figure)
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.execute(figure)
        figure.set_layout_engine(None)  # which would find the same places again for each file
        quick: Any = {"pil_kwargs": {"compress_level": 2}}
        for kind, how in (
            ("png", {"metadata": {"Software": None}, **quick}),
            ("svg", {"metadata": {"Creator": None, "Date": None}}),
        ):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=DPI, **how)
            yield f"{picture.name}.{kind}", out.getvalue()


def plain_axes(figure: Figure) -> Axes:
    axes: Axes = figure.add_subplot()
    bare(axes)
    return axes


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def heading(axes: Axes, text: str, below: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", pad=22)
    axes.annotate(below, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8.5, color=FAINT)


def _nothing(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=FAINT, fontsize=11, transform=axes.transAxes)


# Loss curves


def loss_curves(figure: Figure, drawn: Drawn, measure: str) -> None:
    """Validation loss against a measure of training, a line per cell."""
    axes, lines = plain_axes(figure), drawn.over(measure)
    if not lines:
        _nothing(axes, "No evaluation has been recorded yet.")
        return
    top = max(line.x[measure][-1] for line in lines)
    word, scale = unit(top) if measure == "tokens" else ("", 1.0)
    low, high = window(lines)
    axes.set_xlim(0, (top or scale) / scale * 1.01)
    axes.set_ylim(low, high)
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_xlabel(f"{title(measure)} ({word})" if word else title(measure))
    axes.set_ylabel(title("val_loss"))
    several = any(len(line.cell.values) > 1 for line in lines)
    below = "Mean of each cell's finished seeds; band: lowest to highest." if several else "One finished seed each."
    below += " Of cells without one: the runs so far." if any(line.ended for line in lines) else ""
    heading(axes, f"{short(drawn.board.name, 50)}: validation loss in training", below)
    for line in lines:
        _draw_line(axes, line, look(drawn, line.cell), measure, scale)
    _name_lines(axes, drawn, lines)


def _draw_line(axes: Axes, line: Line, seen: Look, measure: str, scale: float) -> None:
    x, told = [value / scale for value in line.x[measure]], seen is not PLAIN
    top = axes.get_ylim()[1]
    if told and line.low != line.high:
        axes.fill_between(x, line.low, line.high, color=seen.colour, alpha=0.13, linewidth=0)
    axes.plot(x, line.mean, color=seen.colour, linestyle=seen.dash, linewidth=1.7 if told else 0.5)
    if told:  # drawn whole at the frame, where the last point lies
        inside = line.mean[-1] <= top
        axes.plot(x[-1], line.mean[-1], seen.marker, color=seen.colour, markersize=4.5, clip_on=not inside)
    if line.ended == "diverged":
        style: Any = {"color": seen.colour, "markersize": 8, "markeredgewidth": 2}
        axes.plot(x[-1], min(line.mean[-1], top), "x", clip_on=False, **style)


def _name_lines(axes: Axes, drawn: Drawn, lines: Sequence[Line]) -> None:
    """Names right of the frame, near the height where the line ends; those of off-scale and broken lines on top."""
    low, high = axes.get_ylim()
    named = [line for line in lines if line.cell.name in drawn.looks]

    def height(line: Line) -> float:
        off = line.ended in ("diverged", "failed") or line.mean[-1] > high
        return 1.01 if off else (line.mean[-1] - low) / (high - low)

    named.sort(key=height)
    others, gap = len(lines) - len(named), 0.054
    places = spread([height(line) for line in named], gap, 0.09 if others else 0.02, 1.0)
    for line, place in zip(named, places, strict=True):
        seen, end = look(drawn, line.cell), height(line)
        if end <= 1:
            axes.plot((1.008, 1.03), (end, place), color=REST, linewidth=0.7, transform=axes.transAxes, clip_on=False)
        handle: Any = {"color": seen.colour, "linestyle": seen.dash, "linewidth": 1.7, "marker": seen.marker}
        key: Any = {"markersize": 4.5, "markevery": (1, 2), "transform": axes.transAxes, "clip_on": False}
        axes.plot((1.035, 1.06, 1.085), (place,) * 3, **handle, **key)
        value = line.ended or decimal(line.mean[-1]) + (" (off scale)" if line.mean[-1] > high else "")
        text = f"{value}  {label(line.cell, 48)}"
        axes.text(1.095, place, text, fontsize=8.5, va="center", transform=axes.transAxes)
    if others:
        shown = f", {drawn.undrawn:,} more not drawn" if drawn.undrawn else ""
        text = f"grey: {others:,} other cells{shown}"
        place = places[0] if places else 0.1
        axes.text(1.035, place - 1.3 * gap, text, fontsize=8.5, va="center", color=FAINT, transform=axes.transAxes)


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


def comparison(figure: Figure, drawn: Drawn) -> None:
    """The final metric, a row per cell, best on top: seeds, mean and 95% interval, the baseline as a dashed line."""
    axes, board = plain_axes(figure), drawn.board
    rows = drawing.rows(board)
    valued = [cell for cell in rows if cell.estimate]
    if not valued:
        _nothing(axes, "No run has finished yet." if board.runs else "The sweep lists no runs.")
        return
    axes.set_xlim(*limits(board, valued))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.7)
    axes.set_xlabel(f"{title(board.metric)}, {'lower' if board.mode == 'min' else 'higher'} is better")
    axes.set_yticks(range(len(rows)), [label(cell, 52) for cell in rows])
    axes.tick_params(axis="y", length=0)
    hidden = len(board.cells) - len(rows)
    several = any(len(cell.values) > 1 for cell in valued)
    keys = (
        "Small: seeds. Large: their mean and its 95% t interval." if several else "One seed each: no spread is known."
    )
    keys += " Hollow: not distinguishable from the best." if any(cell.mark == "same" for cell in rows) else ""
    keys += " Dashed: baseline." if board.reference else ""
    keys += f" {hidden:,} more cells are in leaderboard.csv." if hidden else ""
    heading(axes, f"{short(board.name, 50)}: {short(board.metric, 40)} by cell", keys)
    if board.reference and board.reference.estimate:
        axes.axvline(board.reference.estimate.mean, color="#000000", linestyle=(0, (5, 3)), linewidth=1, zorder=1)
    for at, cell in enumerate(rows):
        seen = look(drawn, cell)
        _draw_row(axes, at, cell, Look("#5a5a5a", "solid", "o") if seen is PLAIN else seen, board.mode)


def _draw_row(axes: Axes, at: int, cell: Cell, seen: Look, mode: str) -> None:
    low, high = axes.get_xlim()
    found, note, colour = cell.estimate, cell.status, seen.colour
    if found is not None:
        inside = [value for value in cell.values.values() if low <= value <= high]
        if found.n > 1:
            small: Any = {"markersize": 3.2, "alpha": 0.75, "markeredgewidth": 0}
            axes.plot(inside, [at + 0.26] * len(inside), "o", color=colour, **small)
        _draw_interval(axes, at, found.low, found.high, colour)
        if low <= found.mean <= high:
            face = "white" if cell.mark == "same" else colour
            rim: Any = {
                "markeredgecolor": colour if cell.mark == "same" else "white",
                "markeredgewidth": 1.2,
                "zorder": 4,
            }
            axes.plot(found.mean, at, seen.marker, color=face, markersize=7, **rim)
        else:
            end, arrow = (high, ">") if found.mean > high else (low, "<")
            axes.plot(end, at, arrow, color=colour, markersize=9, clip_on=False, zorder=4)
        half = f" ± {decimal(found.half)}" if found.half is not None else " (1 seed)"
        off = "" if low <= found.mean <= high else ", off scale"
        note = f"{decimal(found.mean)}{half}{off}" + (f", {cell.status}" if cell.status != "done" else "")
    elif cell.count("diverged"):
        edge = high if mode == "min" else low
        axes.plot(edge, at, "x", color=colour, markersize=7, markeredgewidth=2, clip_on=False)
    ink = INK if found else FAINT
    axes.text(1.02, at, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=ink)


def _draw_interval(axes: Axes, at: int, first: float | None, last: float | None, colour: str) -> None:
    """An interval cut at the frame, with an arrow where it goes on."""
    low, high = axes.get_xlim()
    if first is None or last is None or first >= high or last <= low:
        return
    axes.plot((max(first, low), min(last, high)), (at, at), color=colour, linewidth=1.8, solid_capstyle="butt")
    if first < low:
        axes.plot(low, at, "<", color=colour, markersize=5, clip_on=False)
    if last > high:
        axes.plot(high, at, ">", color=colour, markersize=5, clip_on=False)
