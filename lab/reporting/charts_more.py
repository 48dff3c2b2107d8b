"""The page's charts of swept keys: a panel for each key, and the heat map of two."""

from __future__ import annotations

from lab.reporting.charts import Scale, amount, clipped, figure, frame, svg, text, tip
from lab.reporting.drawing import Drawn, near, ratio, shares, title
from lab.reporting.effects import Effect, Grid
from lab.reporting.numbers import decimal, many, percent, short

PANELS = 12
SQUARES = 1200  # of a heat map
COLOURS = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))  # viridis, best to worst


def effects(drawn: Drawn) -> str:
    """A panel for each of the most important keys: the mean at each value with its interval; empty without any."""
    found = drawn.effects.several[:PANELS]
    if not found:
        return ""
    means = [level.estimate.mean for effect in found for level in effect.levels]
    low, high = near(means, drawn.board.mode)
    ends = [e for effect in found for level in effect.levels for e in (level.estimate.low, level.estimate.high)]
    inside = [e for e in ends if e is not None and low - (high - low) < e < high + (high - low)]
    y = (min([low, *inside]), max([high, *inside]))
    return "".join(_effect(drawn, effect, y) for effect in found)


def _effect(drawn: Drawn, effect: Effect, limits: tuple[float, float]) -> str:
    known = [level.value for level in effect.levels if level.value is not None]
    numeric = len(known) == len(effect.levels)
    at = known if numeric else [float(i) for i in range(len(effect.levels))]
    log = numeric and ratio(at)
    room = 0.06 * (max(at) - min(at)) or 1.0
    x = Scale(*((min(at) / 1.25, max(at) * 1.25) if log else (min(at) - room, max(at) + room)), 52, 350, log)
    y = Scale(*limits, 200, 34)
    marks = []
    if numeric:
        places = " ".join(
            f"{x(a):.1f},{y(level.estimate.mean):.1f}" for a, level in zip(at, effect.levels, strict=True)
        )
        marks.append(f'<polyline class="l" stroke-width="1.6" points="{places}"/>')
    for a, level in zip(at, effect.levels, strict=True):
        found = level.estimate
        half = f" ± {decimal(found.half)}" if found.half is not None else ""
        lost = f"{many(level.lost, 'cell')} here had no result" if level.lost else ""
        said = tip(
            f"{short(effect.name, 80)} = {level.label}", f"{decimal(found.mean)}{half}", many(level.cells, "cell"), lost
        )
        bar = ""
        if found.low is not None and found.high is not None:
            ends = f'y1="{y(found.low):.1f}" y2="{y(found.high):.1f}"'
            bar = f'<line class="l" stroke-width="2" x1="{x(a):.1f}" x2="{x(a):.1f}" {ends}/>'
        dot = f'<circle class="f" cx="{x(a):.1f}" cy="{y(found.mean):.1f}" r="4.5"/>'
        marks.append(f'<g class="m" {said}>{bar}{dot}</g>')
    share = "importance unknown" if effect.share is None else f"explains {percent(effect.share)}"
    below = frame(x, y, "", "", 5 if numeric else 0, 4)
    if not numeric:
        step = max(1, len(at) // 6)
        names = [(x(a), level.label) for a, level in zip(at, effect.levels, strict=True)][::step]
        below += "".join(
            f'<text class="s c" x="{a:.0f}" y="216">{text(short(name, 52 // len(names)))}</text>' for a, name in names
        )
    head = f'<text x="0" y="14">{text(short(effect.name, 36))}</text><text class="s e" x="350" y="14">{share}</text>'
    inside = f'<g class="k0">{head}{below}{clipped(x, y, "".join(marks))}</g>'
    return figure(svg(360, 224, f"{title(drawn.board.metric)} by {effect.name}, {share}", inside))


def heat_map(drawn: Drawn) -> str:
    """The mean for every pair of values of the two most important keys; empty where there are no two."""
    grid = drawn.grid
    if grid is None or len(grid.rows.labels) * len(grid.columns.labels) > SQUARES:
        return ""
    best, worst = shares(grid, drawn.board.mode)
    width = max(26.0, min(80.0, 560 / len(grid.columns.labels)))
    parts = []
    for row, means in enumerate(grid.means):
        for column, mean in enumerate(means):
            parts.append(_square(drawn, grid, (row, column), mean, (best, worst), width))
    left, tall = 150, 34 + 28 * len(grid.rows.labels)
    for row, name in enumerate(grid.rows.labels):
        parts.append(f'<text class="s e" x="{left - 8}" y="{34 + 28 * row + 18}">{text(short(name, 20))}</text>')
    step = max(1, round(40 / width))
    for column, name in list(enumerate(grid.columns.labels))[::step]:
        at = left + width * (column + 0.5)
        parts.append(
            f'<text class="s c" x="{at:.0f}" y="{tall + 16}">{text(short(name, max(6, int(width * step / 7))))}</text>'
        )
    middle = left + width * len(grid.columns.labels) / 2
    parts.append(f'<text x="0" y="18">{text(short(" with ".join(grid.rows.keys), 60))}</text>')
    parts.append(
        f'<text class="c" x="{middle:.0f}" y="{tall + 36}">{text(short(" with ".join(grid.columns.keys), 60))}</text>'
    )
    name = f"{title(drawn.board.metric)} by {' with '.join(grid.rows.keys)} and {' with '.join(grid.columns.keys)}."
    wide = max(
        720.0, left + width * len(grid.columns.labels) + 12
    )  # a small map is not blown up to the width of the page
    return figure(svg(wide, tall + 44, name, "".join(parts)), wide=True)


def _square(
    drawn: Drawn, grid: Grid, place: tuple[int, int], mean: float | None, ends: tuple[float, float], width: float
) -> str:
    row, column = place
    x, y = 150 + width * column, 34 + 28 * row
    box = f'x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="26" rx="3"'
    where = f"{grid.rows.labels[row]}, {grid.columns.labels[column]}"
    if mean is None:
        return f'<g class="m" {tip(where, "no finished run")}><rect class="g" fill="none" {box}/></g>'
    red, green, blue = shade((mean - ends[0]) / ((ends[1] - ends[0]) or 1))
    ink = "#101418" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "#ffffff"
    shown = amount(mean, abs(ends[1] - ends[0]) / 10) if width >= 40 else ""
    label = f'<text class="c" x="{x + width / 2 - 1:.1f}" y="{y + 17}"><tspan fill="{ink}">{shown}</tspan></text>'
    words = tip(where, f"{drawn.board.metric} {decimal(mean)}")
    return f'<g class="m" {words}><rect fill="rgb({red},{green},{blue})" {box}/>{label if shown else ""}</g>'


def shade(at: float) -> tuple[int, int, int]:
    """A colour between best (0) and worst (1)."""
    at = min(1.0, max(0.0, at)) * (len(COLOURS) - 1)
    i = min(int(at), len(COLOURS) - 2)
    red, green, blue = (round(a + (b - a) * (at - i)) for a, b in zip(COLOURS[i], COLOURS[i + 1], strict=True))
    return red, green, blue
