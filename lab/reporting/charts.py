"""The page's charts, drawn by us as SVG without a library: they follow the page's colours and tell their numbers on hover.

A mark has its words in `data-tip`, shown by the page's script for pointers, touch and arrow keys, and the number of its
cell in `data-c`, by which the filters dim it. No attribute here is a style: the page's policy would refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from lab.reporting import drawing
from lab.reporting.cells import Board, Cell
from lab.reporting.drawing import REFERENCE, Drawn, Line, label, near, ratio, title, window
from lab.reporting.numbers import chance, clean, decimal, duration, magnitude, short

WIDE = 760
POINTS = 60  # of a line
HOVER = 24  # points of a line that tell their numbers
DASHES = ("", "6 3", "2 3")
ALTS = {
    "comparison": "Final metric by cell, best on top: seeds, mean and 95% interval; the baseline is a dashed line.",
    "curves": "Validation loss in training, one line per cell with a band over its seeds.",
}


def text(value: object) -> str:
    """Any value as HTML text or attribute: cleaned and escaped."""
    return escape(clean(str(value)), quote=True)


def tip(*lines: str) -> str:
    """A `data-tip` attribute of several lines; empty ones are left out."""
    return f'data-tip="{"&#10;".join(text(line) for line in lines if line)}"'


def colour(drawn: Drawn, cell: Cell) -> str:
    """The class of a cell's colour."""
    i = drawn.looks.get(cell.name)
    return "kx" if i is None else "kr" if i == REFERENCE else f"k{i % 6}"


def told(cell: Cell, board: Board) -> list[str]:
    """What is known of a cell, in lines."""
    mean = cell.estimate
    if mean is None:
        return [short(cell.name, 120), cell.status]
    half = f" ± {decimal(mean.half)}" if mean.half is not None else ", no spread is known"
    lines = [short(cell.name, 120), f"{short(board.metric, 40)} {decimal(mean.mean)}{half}, n = {mean.n}"]
    if cell.paired:
        p = f", p {chance(cell.paired.p)}" if cell.paired.p is not None else ""
        lines.append(f"{decimal(cell.paired.mean, True)} to the baseline{p}")
    marks = {"best": "the best", "same": "not distinguishable from the best", "worse": "worse than the best"}
    marks["likely"] = "likely worse than the best, but not after Holm's correction"
    lines.append(marks.get(cell.mark, "cannot be compared with the best: fewer than 2 common seeds"))
    return [*lines, *([] if cell.status == "done" else [cell.status]), *cell.remarks]


@dataclass(frozen=True)
class Scale:
    """From numbers to places: `low`..`high` onto `start`..`end`, by logarithm where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1)

    def ticks(self, most: int) -> list[float]:
        """Round numbers inside the range."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**k for k in range(first, last + 1) for s in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most:
                    return found
            return found[:: math.ceil(len(found) / most)]
        span = self.high - self.low
        raw = span / most
        size = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
        step = next(size * s for s in (1, 2, 2.5, 5, 10) if size * s >= raw * 0.999)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def amount(value: float, span: float = 0.0) -> str:
    """A tick's number."""
    if abs(value) >= 1e4:
        return magnitude(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    places = max(0, min(6, 2 - math.floor(math.log10(span)))) if span else 6
    return f"{round(value, places):g}"


def frame(x: Scale, y: Scale, x_title: str, y_title: str, across: int, y_ticks: int) -> str:
    """Grid, axes and their numbers."""
    parts = []
    for value in x.ticks(across) if across else ():
        at = x(value)
        parts.append(f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:.0f}" y2="{y.start:.0f}"/>')
        shown = amount(value, 0 if x.log else x.high - x.low)
        parts.append(f'<text class="s c" x="{at:.1f}" y="{y.start + 16:.0f}">{shown}</text>')
    for value in y.ticks(y_ticks) if y_ticks else ():
        at = y(value)
        parts.append(f'<line class="g" x1="{x.start:.0f}" x2="{x.end:.0f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        shown = amount(value, y.high - y.low)
        parts.append(f'<text class="s e" x="{x.start - 6:.0f}" y="{at + 4:.1f}">{shown}</text>')
    parts.append(f'<line class="a" x1="{x.start:.0f}" x2="{x.end:.0f}" y1="{y.start:.0f}" y2="{y.start:.0f}"/>')
    middle = (x.start + x.end) / 2
    if x_title:
        parts.append(f'<text class="c" x="{middle:.0f}" y="{y.start + 34:.0f}">{text(x_title)}</text>')
    if y_title:
        parts.append(f'<text x="0" y="12">{text(y_title)}</text>')
    return "".join(parts)


def svg(width: float, height: float, name: str, inside: str) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} tabindex="0" role="img" aria-label="{text(name)}">{inside}</svg>'


def clipped(x: Scale, y: Scale, inside: str) -> str:
    """What is drawn in the frame; a nested svg cuts off what lies outside."""
    left, top, width, height = x.start, y.end, x.end - x.start, y.start - y.end
    box = f'x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg {box} viewBox="{left:.0f} {top:.0f} {width:.0f} {height:.0f}">{inside}</svg>'


# Comparison


def comparison(drawn: Drawn, numbers: Mapping[str, int]) -> str:
    """A row per cell: its seeds, its mean and interval. `numbers`: of the cells, by name. Empty while none has finished."""
    board = drawn.board
    cells = [cell for cell in drawing.rows(board) if cell.estimate]
    if not cells:
        return ""
    x = Scale(*drawing.limits(board, cells), 268, WIDE - 16)
    y = Scale(0, len(cells), 24 * len(cells) + 20, 20)
    better = "lower" if board.mode == "min" else "higher"
    parts = [frame(x, y, f"{title(board.metric)}, {better} is better", "", 6, 0)]
    if board.reference and board.reference.estimate:
        at = x(board.reference.estimate.mean)
        parts.append(f'<line class="a" stroke-dasharray="5 3" x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{y.start:.0f}"/>')
    for row, cell in enumerate(cells):
        parts.append(_row(drawn, cell, numbers[cell.name], 20 + 24 * row + 12, x))
    return figure(svg(WIDE, y.start + 42, ALTS["comparison"], "".join(parts)), wide=True)


def _row(drawn: Drawn, cell: Cell, number: int, at: float, x: Scale) -> str:
    mean, kind = cell.estimate, colour(drawn, cell)
    assert mean
    kind = "k0" if kind == "kx" and len(drawn.board.cells) > drawing.MANY else kind
    name = f'<text class="e" x="258" y="{at + 4:.0f}">{text(label(cell, 25 if cell.baseline else 36))}</text>'
    hit = f'<rect class="hit" x="0" y="{at - 12:.0f}" width="{WIDE}" height="24"/>'
    parts = [hit, name]
    for value in cell.values.values() if mean.n > 1 else ():
        if x.low <= value <= x.high:
            parts.append(f'<circle class="f" opacity=".55" cx="{x(value):.1f}" cy="{at + 7:.0f}" r="2"/>')
    if mean.low is not None and mean.high is not None and mean.low < x.high and mean.high > x.low:
        ends = x(max(mean.low, x.low)), x(min(mean.high, x.high))
        parts.append(f'<line class="l" stroke-width="2" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{at}" y2="{at}"/>')
    if x.low <= mean.mean <= x.high:
        shape = "h" if cell.mark == "same" else "f"
        parts.append(f'<circle class="{shape}" cx="{x(mean.mean):.1f}" cy="{at}" r="5"/>')
    else:
        end, turn = (x.end, 7) if mean.mean > x.high else (x.start, -7)
        parts.append(f'<path class="f" d="M{end - turn:.0f} {at - 5}l{turn} 5l{-turn} 5z"/>')
    return f'<g class="m {kind}" data-c="{number}" {tip(*told(cell, drawn.board))}>{"".join(parts)}</g>'


def figure(inside: str, tab: str = "", wide: bool = False) -> str:
    named = f' data-tab="{text(tab)}"' if tab else ""
    return f"<figure{' class=wide' if wide else ''}{named}>{inside}</figure>"


# Learning curves


def curves(drawn: Drawn, numbers: Mapping[str, int]) -> str:
    """A chart for each measure of training, and their legend; empty without any evaluation."""
    if not drawn.lines:
        return ""
    parts = [_curves(drawn, measure, numbers) for measure in drawn.measures]
    return f"<div data-tabs>{''.join(parts)}</div>{_legend(drawn)}"


def _curves(drawn: Drawn, measure: str, numbers: Mapping[str, int]) -> str:
    lines = drawn.over(measure)
    top = max(line.x[measure][-1] for line in lines)
    x, y = Scale(0, top * 1.01 or 1, 56, WIDE - 16), Scale(*window(lines), 330, 24)
    inside = "".join(_line(drawn, line, measure, x, y, numbers[line.cell.name]) for line in lines)
    below = frame(x, y, title(measure), title("val_loss"), 6, 6)
    return figure(
        svg(WIDE, 372, f"{ALTS['curves']} {title(measure)}.", below + clipped(x, y, inside)), title(measure), True
    )


def _thin(count: int, most: int) -> list[int]:
    """At most so many of `count` places, the last among them."""
    step = max(1, math.ceil(count / most))
    return sorted({*range(count - 1, -1, -step)})


def _line(drawn: Drawn, line: Line, measure: str, x: Scale, y: Scale, number: int) -> str:
    kind, at, apart = colour(drawn, line.cell), line.x[measure], line.cell.name in drawn.looks
    kept = _thin(len(at), POINTS)
    places = " ".join(f"{x(at[i]):.1f},{y(line.mean[i]):.1f}" for i in kept)
    dash = DASHES[(drawn.looks.get(line.cell.name, 0) // 6) % 3] if apart and kind != "kr" else ""
    dash = ' stroke-dasharray="7 3 2 3"' if kind == "kr" else f' stroke-dasharray="{dash}"' if dash else ""
    parts = []
    if apart and line.low != line.high:
        edge = [f"{x(at[i]):.1f},{y(line.high[i]):.1f}" for i in kept]
        edge += [f"{x(at[i]):.1f},{y(line.low[i]):.1f}" for i in reversed(kept)]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    name, ended = short(line.cell.name, 120), f" ({line.ended})" if line.ended else ""
    end = tip(f"{name}{ended}", f"{decimal(line.mean[-1])} at the end")
    parts.append(f'<polyline class="m l" {end} stroke-width="{1.8 if apart else 0.8}"{dash} points="{places}"/>')
    for i in _thin(len(at), HOVER) if apart else ():
        spread = f"lowest {decimal(line.low[i])}, highest {decimal(line.high[i])}" if line.low[i] < line.high[i] else ""
        words = tip(name, f"{decimal(line.mean[i])} at {_measured(measure, at[i])}", spread)
        parts.append(f'<circle class="m hit" {words} cx="{x(at[i]):.1f}" cy="{y(line.mean[i]):.1f}" r="7"/>')
    return f'<g class="{kind}" data-c="{number}">{"".join(parts)}</g>'


def _measured(measure: str, value: float) -> str:
    words = {"tokens": "tokens", "iters": "updates", "flops": "FLOPs"}
    return duration(value) if measure == "seconds" else f"{magnitude(value)} {words.get(measure, '')}".strip()


def _legend(drawn: Drawn) -> str:
    items = []
    for line in drawn.lines:
        if line.cell.name in drawn.looks:
            kind, i = colour(drawn, line.cell), drawn.looks[line.cell.name]
            dash = "7 3 2 3" if kind == "kr" else DASHES[i // 6 % 3]
            key = f'<line class="l" stroke-width="3" stroke-dasharray="{dash}" x1="0" x2="36" y1="6" y2="6"/>'
            value = line.ended or decimal(line.mean[-1])
            words = f"{text(label(line.cell, 60))} <b>{text(value)}</b>"
            items.append(f'<li class="{kind}"><svg viewBox="0 0 36 12" aria-hidden="true">{key}</svg>{words}</li>')
    grey = len(drawn.lines) - len(items)
    more = f", {drawn.undrawn:,} more are not drawn" if drawn.undrawn else ""
    if grey:
        items.append(f'<li class="soft">grey: {grey:,} other cells{more}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


# Scatter


def scatters(drawn: Drawn, numbers: Mapping[str, int]) -> str:
    """The result against what it costs; empty where cells do not differ in any."""
    return "".join(_scatter(drawn, field, numbers) for field in drawn.dots)


def _scatter(drawn: Drawn, field: str, numbers: Mapping[str, int]) -> str:
    dots, board = drawn.dots[field], drawn.board
    xs = [dot.x for dot in dots]
    log = ratio(xs)
    low, high = min(xs), max(xs)
    room = (0.05 * (high - low)) if not log else 0.0
    x = Scale(*((low / 1.1, high * 1.1) if log else (low - room, high + room)), 52, 350, log)
    y = Scale(*near([dot.y for dot in dots], board.mode), 230, 24)
    front = sorted((dot for dot in dots if dot.front), key=lambda dot: dot.x)
    steps = [(x(a.x), y(b.y)) for i, a in enumerate(front) for b in front[max(0, i - 1) : i + 1]]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in steps)
    marks = [f'<polyline class="a" stroke-dasharray="4 3" points="{path}"/>']
    for dot in sorted(dots, key=lambda dot: (dot.front, dot.cell.name in drawn.looks)):
        cost = duration(dot.x) if field == "seconds" else magnitude(dot.x)
        said = [*told(dot.cell, board), f"{title(field)}: {cost}", "best for the cost" if dot.front else ""]
        place = f'cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}" r="{5 if dot.cell.name in drawn.looks else 4}"'
        kind = f"m {'h' if dot.front else 'f'} {colour(drawn, dot.cell)}"
        marks.append(f'<circle class="{kind}" data-c="{numbers[dot.cell.name]}" {tip(*said)} {place}/>')
    inside = frame(x, y, title(field), title(board.metric), 4, 5) + clipped(x, y, "".join(marks))
    return figure(svg(360, 272, f"{title(board.metric)} against {title(field)}.", inside))
