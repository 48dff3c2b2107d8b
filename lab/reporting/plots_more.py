"""The pictures of what there is not in every sweep: effects of swept keys, the heat map of two, and scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lab.reporting.charts import Scale, amount
from lab.reporting.drawing import Drawn, near, ratio, shares, title
from lab.reporting.effects import Effect
from lab.reporting.numbers import decimal, percent, short
from lab.reporting.plots import COLOURS, FAINT, INK, REST, bare, heading, look, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 9  # effects drawn, the most important first
TOLD = 150  # cells of a heat map up to which each shows its number


def several(drawn: Drawn) -> dict[str, tuple[float, float, Callable[[Figure], None]]]:
    """Name, and width, height (inches) and drawing of each picture that has something to show."""
    made: dict[str, tuple[float, float, Callable[[Figure], None]]] = {}
    panels = min(PANELS, len(drawn.effects.several))
    if panels:
        rows = math.ceil(panels / 3)
        made["effects"] = (3.6 * min(3, panels) + 0.4, 3.0 * rows + 0.9, lambda figure: _effects(figure, drawn))
    if drawn.grid:
        wide, tall = len(drawn.grid.columns.labels), len(drawn.grid.rows.labels)
        made["heat_map"] = (3.6 + 0.75 * wide, 2.2 + 0.45 * tall, lambda figure: _heat_map(figure, drawn))
    if drawn.dots:
        made["scaling"] = (4.4 * len(drawn.dots) + 0.4, 4.4, lambda figure: _scaling(figure, drawn))
    return made


def _effects(figure: Figure, drawn: Drawn) -> None:
    found = drawn.effects.several[:PANELS]
    across = min(3, len(found))
    grid = figure.subplots(math.ceil(len(found) / across), across, sharey=True, squeeze=False)
    ends = [e for effect in found for level in effect.levels for e in (level.estimate.low, level.estimate.high) if e]
    low, high = near([level.estimate.mean for effect in found for level in effect.levels], drawn.board.mode)
    inside = [end for end in ends if abs(end - (low + high) / 2) < 1.5 * (high - low)]
    low, high = min([low, *inside]), max([high, *inside])
    for axes, effect in zip(grid.flat, found, strict=False):
        bare(axes)
        axes.set_ylim(low, high)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.7)
        _effect(axes, effect)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    name = title(drawn.board.metric)
    figure.suptitle(
        f"{short(drawn.board.name, 30)}: {name}\nby swept key, averaged over everything else",
        x=0.01,
        ha="left",
        fontsize=10.5,
        fontweight="bold",
    )


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with numbers in plain words; the library's own are formulas."""
    low, high = min(values) / 1.2, max(values) * 1.2
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = Scale(low, high, 0, 1, log=True).ticks(6)
    axes.set_xticks(ticks, [amount(tick) for tick in ticks])
    axes.minorticks_off()


def _effect(axes: Axes, effect: Effect) -> None:
    numbers = [level.value for level in effect.levels]
    known = [number for number in numbers if number is not None]
    numeric = len(known) == len(numbers)
    at: list[float] = known if numeric else [float(i) for i in range(len(numbers))]
    if numeric and ratio(known):
        _logarithmic(axes, known)
    if not numeric or len(at) <= 8:
        axes.set_xticks(at, [short(level.label, 16) for level in effect.levels], rotation=35 if len(at) > 4 else 0)
        axes.minorticks_off()
    low, high = axes.get_ylim()
    means = [level.estimate.mean for level in effect.levels]
    if numeric:
        axes.plot(at, means, color=COLOURS[0], linewidth=1.4)
    for x, level in zip(at, effect.levels, strict=True):
        found = level.estimate
        if found.low is not None and found.high is not None:
            axes.plot((x, x), (max(found.low, low), min(found.high, high)), color=COLOURS[0], linewidth=1.2)
        if low <= found.mean <= high:
            axes.plot(x, found.mean, "o", color=COLOURS[0], markersize=5)
        else:
            edge, arrow = (high, "^") if found.mean > high else (low, "v")
            axes.plot(x, edge, arrow, color=COLOURS[0], markersize=7, clip_on=False)
    axes.set_title(short(effect.name, 44), loc="left", fontsize=9)
    share = "importance unknown" if effect.share is None else f"explains {percent(effect.share)}"
    axes.text(0.98, 0.97, share, ha="right", va="top", fontsize=8.5, color=FAINT, transform=axes.transAxes)


def _heat_map(figure: Figure, drawn: Drawn) -> None:
    from matplotlib.colors import Normalize

    assert drawn.grid
    grid, axes = drawn.grid, plain_axes(figure)
    best, worst = shares(grid, drawn.board.mode)
    low, high = min(best, worst), max(best, worst)
    norm = Normalize(low, high if high > low else low + 1)
    values = [[math.nan if mean is None else mean for mean in row] for row in grid.means]
    colours = "viridis_r" if drawn.board.mode == "min" else "viridis"
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    axes.set_facecolor("#ffffff")
    axes.set_xticks(range(len(grid.columns.labels)), [short(name, 14) for name in grid.columns.labels])
    axes.set_yticks(range(len(grid.rows.labels)), [short(name, 20) for name in grid.rows.labels])
    axes.tick_params(axis="x", rotation=30 if len(grid.columns.labels) > 5 else 0)
    axes.set_xlabel(short(" with ".join(grid.columns.keys), 60))
    axes.set_ylabel(short(" with ".join(grid.rows.keys), 60))
    if len(grid.rows.labels) * len(grid.columns.labels) <= TOLD:
        for row, means in enumerate(grid.means):
            for column, mean in enumerate(means):
                bright = mean is not None and (norm(mean) > 0.55) != (drawn.board.mode == "min")
                text = "–" if mean is None else decimal(mean)
                ink: Any = FAINT if mean is None else INK if bright else "white"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
    figure.colorbar(
        image, ax=axes, label=title(drawn.board.metric), extend="max" if drawn.board.mode == "min" else "min"
    )
    heading(axes, f"{short(drawn.board.name, 30)}: two keys", "Mean over everything else; –: no finished run.")


def _scaling(figure: Figure, drawn: Drawn) -> None:
    panels = figure.subplots(1, len(drawn.dots), sharey=True, squeeze=False)[0]
    ys = [dot.y for dots in drawn.dots.values() for dot in dots]
    low, high = near(ys, drawn.board.mode)
    off = len({dot.cell.name for dots in drawn.dots.values() for dot in dots if not low <= dot.y <= high})
    for axes, (field, dots) in zip(panels, drawn.dots.items(), strict=True):
        bare(axes)
        axes.set_ylim(low, high)
        axes.grid(color="#e8e8e8", linewidth=0.7)
        axes.set_xlabel(title(field))
        if ratio([dot.x for dot in dots]):
            _logarithmic(axes, [dot.x for dot in dots])
        for dot in sorted(dots, key=lambda dot: dot.cell.name in drawn.looks):
            seen = look(drawn, dot.cell)
            told = dot.cell.name in drawn.looks
            axes.plot(
                dot.x, dot.y, seen.marker or "o", color=seen.colour if told else REST, markersize=6 if told else 4
            )
        front = sorted((dot for dot in dots if dot.front), key=lambda dot: dot.x)
        axes.step([d.x for d in front], [d.y for d in front], where="post", color=INK, linewidth=1, linestyle="--")
    panels[0].set_ylabel(title(drawn.board.metric))
    more = f" {off:,} cells are off the scale." if off else ""
    heading(
        panels[0],
        f"{short(drawn.board.name, 40)}: what the result costs",
        f"A dot per cell. Dashed: best for the cost.{more}",
    )
