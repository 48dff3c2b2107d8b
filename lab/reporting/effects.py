"""What each swept key does to the objective on average over everything else, and how much of the differences it explains.

Computed on the means of cells, each counting once. On a full grid the mean at a value and the first-order share of variance
of functional ANOVA need no model: the share is the variance of those means over the variance of all cell means. Source:
Hooker 2007, "Generalized functional ANOVA diagnostics for high-dimensional functions of dependent variables"; for the use
on sweeps Hutter, Hoos and Leyton-Brown 2014, "An efficient approach for assessing hyperparameter importance".

Where combinations are missing (a search, runs that diverged), plain means would mix up the keys. Then a sum of one effect
for each key is fitted to the cell means by least squares, means are those of its predictions with every other key as often
at each value as in all cells, and a key's share is what the fit loses of the variance when that key is left out.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from lab.reporting.cells import Board, Cell
from lab.reporting.numbers import brief, clean, told
from lab.stats import Estimate, estimate, finite

Vector = NDArray[numpy.float64]
MOST_LEVELS = 12  # of a numeric key; more values become BINS groups of equal count
BINS = 6
TIGHT = 1e-12  # relative differences below this are rounding


@dataclass(frozen=True)
class Level:
    """One value of a key, or a group of values: the mean over everything else, and its interval between seeds.

    `estimate` has n = 1 and no interval with one seed, or where cells lack common seeds; `lost` counts cells at this value
    without a finished run.
    """

    label: str
    value: float | None
    estimate: Estimate
    cells: int
    lost: int


@dataclass(frozen=True)
class Effect:
    """A key, or keys that always change together. `share`: of the variance of the cell means, None where the sweep cannot
    tell this key from others. `full`: computed on a full grid; `within`: the cells that set the key."""

    keys: tuple[str, ...]
    levels: tuple[Level, ...]
    share: float | None
    full: bool
    within: int

    @property
    def name(self) -> str:
        return " with ".join(self.keys)


@dataclass(frozen=True)
class Effects:
    """All keys, the most important first. `noise`: the share of the variance of cell means that seeds alone would make,
    None with one seed; `cells`: how many have a mean."""

    several: tuple[Effect, ...]
    noise: float | None
    cells: int


@dataclass(frozen=True)
class Factor:
    """A key over some cells: the level of each, and the levels' labels and numbers in order."""

    keys: tuple[str, ...]
    at: tuple[int, ...]
    labels: tuple[str, ...]
    numbers: tuple[float | None, ...]


def effects(board: Board) -> Effects:
    """The effects of every key that has at least two values among the cells with a mean."""
    cells = board.finished
    made = []
    for keys in _together(cells, board.keys):
        some = [cell for cell in cells if keys[0] in cell.changed]
        if len(some) < 2:
            continue
        own = factor(some, keys)
        others = [
            factor(some, other)
            for other in _together(some, board.keys)
            if other[0] not in keys and all(other[0] in cell.changed for cell in some)
        ]
        others = [other for other in others if not _determines(own, other)]
        if len(own.labels) > 1:
            lost = [cell for cell in board.cells if cell.rank is None and not cell.open and keys[0] in cell.changed]
            made.append(_effect(own, [other for other in others if len(other.labels) > 1], some, lost))
    made.sort(key=lambda effect: -(effect.share or 0.0))
    return Effects(tuple(made), _noise(cells), len(cells))


def _together(cells: Sequence[Cell], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Keys that always change together (a zip) as one; keys that no cell sets are left out."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        seen: dict[str, int] = {}
        at = tuple(seen.setdefault(told(cell.changed[key]), len(seen)) if key in cell.changed else -1 for cell in cells)
        if seen:
            groups.setdefault(at if len(seen) > 1 else (*at, len(groups)), []).append(key)
    return [tuple(group) for group in groups.values()]


def _determines(one: Factor, other: Factor) -> bool:
    """Whether a value of one key leaves the other no choice."""
    return len(set(zip(one.at, other.at, strict=True))) == len(set(one.at))


def factor(cells: Sequence[Cell], keys: Sequence[str]) -> Factor:
    """The levels of keys that change together: the values in order, many different numbers in groups of equal count."""
    values = [cell.changed[keys[0]] for cell in cells]
    words = [", ".join(clean(brief(cell.changed[key])) for key in keys) for cell in cells]
    numbers = [finite(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) == len(values) and len(set(known)) > MOST_LEVELS:
        return _binned(tuple(keys), known)
    by_value: dict[str, tuple[str, float | None]] = {}
    for value, word, number in zip(values, words, numbers, strict=True):
        by_value.setdefault(told(value), (word, number))
    order = list(by_value)
    if len(known) == len(values):
        order.sort(key=lambda told_: by_value[told_][1] or 0.0)
    at = tuple(order.index(told(value)) for value in values)
    return Factor(tuple(keys), at, tuple(by_value[o][0] for o in order), tuple(by_value[o][1] for o in order))


def _binned(keys: tuple[str, ...], numbers: list[float]) -> Factor:
    ordered = sorted(numbers)
    cuts = sorted({ordered[len(ordered) * i // BINS] for i in range(1, BINS)})
    raw = [bisect.bisect_right(cuts, number) for number in numbers]
    used = sorted(set(raw))
    at = tuple(used.index(i) for i in raw)
    members = [[n for n, i in zip(numbers, at, strict=True) if i == level] for level in range(len(used))]
    labels = tuple(f"{brief(float(f'{min(m):.3g}'))} to {brief(float(f'{max(m):.3g}'))}" for m in members)
    return Factor(keys, at, labels, tuple(float(numpy.median(m)) for m in members))


def _effect(own: Factor, others: Sequence[Factor], cells: Sequence[Cell], lost: Sequence[Cell]) -> Effect:
    means = numpy.array([cell.estimate.mean for cell in cells if cell.estimate])
    full = _is_full([own, *others], len(cells))
    design = None if full else _Additive([own, *others])
    at = design.marginal(means) if design else _marginal(own, means)
    by_seed = _by_seed(own, others, cells)
    spread = float(((means - means.mean()) ** 2).mean())
    share: float | None
    if spread <= (TIGHT * float(abs(means).max())) ** 2:
        share = 0.0
    elif design is None:
        weights = numpy.bincount(own.at) / len(cells)
        share = float((weights * (at - means.mean()) ** 2).sum()) / spread
    else:
        share = design.unique_share(means, spread)
    level_of = {told(cell.changed[own.keys[0]]): i for i, cell in zip(own.at, cells, strict=True)}
    gone = Counter(level_of.get(told(cell.changed[own.keys[0]])) for cell in lost)
    levels = []
    for i, (label, number) in enumerate(zip(own.labels, own.numbers, strict=True)):
        found, mean = estimate([float(row[i]) for row in by_seed]), float(at[i])
        if found is None or found.half is None:
            found = Estimate(1, mean)
        else:  # where cells lack a seed, the spread is of the others and the mean of all
            found = Estimate(found.n, mean, found.sd, mean - found.half, mean + found.half)
        levels.append(Level(label, number, found, own.at.count(i), gone[i]))
    return Effect(own.keys, tuple(levels), share, full, len(cells))


def _is_full(factors: Sequence[Factor], count: int) -> bool:
    """Whether every combination of values is there exactly once."""
    combinations = set(zip(*(f.at for f in factors), strict=True))
    size = 1
    for one in factors:
        size *= len(one.labels)
    return len(combinations) == count == size


def _marginal(own: Factor, means: Vector) -> Vector:
    at = numpy.array(own.at)
    return numpy.bincount(at, weights=means) / numpy.bincount(at)


def _by_seed(own: Factor, others: Sequence[Factor], cells: Sequence[Cell]) -> list[Vector]:
    """The means at every value for each seed alone, over the cells that have finished every seed that most cells have.

    What a seed moves everywhere alike says nothing about a key and is taken out. Source: Cousineau 2005, "Confidence
    intervals in within-subject designs", widened as Morey 2008 corrects it.
    Empty where these are fewer than half of the cells, or lack a value, or there is one seed.
    """
    counts = Counter(seed for cell in cells for seed in cell.values)
    seeds = sorted(seed for seed, count in counts.items() if 2 * count > len(cells))
    kept = [i for i, cell in enumerate(cells) if all(seed in cell.values for seed in seeds)]
    if len(seeds) < 2 or 2 * len(kept) < len(cells) or len({own.at[i] for i in kept}) < len(own.labels):
        return []
    factors = [_of(one, kept) for one in (own, *others)]
    design = None if _is_full(factors, len(kept)) else _Additive(factors)
    rows = [numpy.array([cells[i].values[seed] for i in kept]) for seed in seeds]
    widen = (len(own.labels) / (len(own.labels) - 1)) ** 0.5
    rows = [(row - row.mean()) * widen for row in rows]
    return [design.marginal(row) if design else _marginal(factors[0], row) for row in rows]


def _of(one: Factor, kept: Sequence[int]) -> Factor:
    """A factor over some of its cells, without levels that none of them has; the first factor keeps all."""
    used = sorted({one.at[i] for i in kept})
    at = tuple(used.index(one.at[i]) for i in kept)
    return Factor(one.keys, at, tuple(one.labels[i] for i in used), tuple(one.numbers[i] for i in used))


class _Additive:
    """One effect for each key, summed: a least-squares fit. The first factor is the one that is asked about."""

    def __init__(self, factors: Sequence[Factor]) -> None:
        blocks = [numpy.eye(len(f.labels))[list(f.at)][:, 1:] for f in factors]  # the first value is in the constant
        ones = numpy.ones((len(factors[0].at), 1))
        self.rest = numpy.hstack([ones, *blocks[1:]])
        self.whole = numpy.hstack([self.rest, blocks[0]])
        self.own = blocks[0].shape[1]
        self.inverse = numpy.linalg.pinv(self.whole)
        self.told_apart = numpy.linalg.matrix_rank(self.whole) == numpy.linalg.matrix_rank(self.rest) + self.own

    def marginal(self, means: Vector) -> Vector:
        """The prediction at each value of the factor, the other keys as in all cells."""
        fitted = self.inverse @ means
        steps = numpy.concatenate([[0.0], fitted[-self.own :]])
        result: Vector = float(self.rest.mean(axis=0) @ fitted[: -self.own]) + steps
        return result

    def unique_share(self, means: Vector, spread: float) -> float | None:
        """What the fit loses of the variance without the factor; None where other keys determine it."""
        if not self.told_apart:
            return None
        without = means - self.rest @ (numpy.linalg.pinv(self.rest) @ means)
        remaining = means - self.whole @ (self.inverse @ means)
        return max(0.0, float((without**2).mean() - (remaining**2).mean()) / spread)


def _noise(cells: Sequence[Cell]) -> float | None:
    """The mean squared standard error of the cell means over their variance; None unless all have two seeds."""
    found = [cell.estimate for cell in cells if cell.estimate]
    errors = [e.sd**2 / e.n for e in found if e.sd is not None]
    if len(errors) < len(found) or len(found) < 2:
        return None
    means = numpy.array([e.mean for e in found])
    spread = float(means.var(ddof=1))
    return min(1.0, float(numpy.mean(errors)) / spread) if spread > 0 else None


@dataclass(frozen=True)
class Grid:
    """Two keys against one another. `means[row][column]`: the mean of the cells there (over everything else), None without."""

    rows: Factor
    columns: Factor
    means: tuple[tuple[float | None, ...], ...]
    cells: int


def heat(board: Board, found: Effects) -> Grid | None:
    """The two most important keys that some cells set together; None where there are no two."""
    names = [effect.keys for effect in found.several]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            cells = [cell for cell in board.finished if first[0] in cell.changed and second[0] in cell.changed]
            if len(cells) > 2:
                rows, columns = factor(cells, second), factor(cells, first)
                if len(rows.labels) > 1 and len(columns.labels) > 1:
                    return _grid(rows, columns, cells)
    return None


def _grid(rows: Factor, columns: Factor, cells: Sequence[Cell]) -> Grid:
    places: dict[tuple[int, int], list[float]] = {}
    for row, column, cell in zip(rows.at, columns.at, cells, strict=True):
        assert cell.estimate
        places.setdefault((row, column), []).append(cell.estimate.mean)
    means = tuple(
        tuple(
            sum(some) / len(some) if (some := places.get((row, column))) else None
            for column in range(len(columns.labels))
        )
        for row in range(len(rows.labels))
    )
    return Grid(rows, columns, means, len(cells))


def caveats(found: Effects) -> list[str]:
    """How the effects were computed and what they cannot say, in sentences."""
    said = []
    if any(not effect.full for effect in found.several):
        said.append(
            "Not every combination of values has a finished run, so these means come from a least-squares fit of one effect "
            "for each key, and a share is what the fit loses of the variance without that key."
        )
    if any(effect.full for effect in found.several):
        said.append(
            "On a full grid a key's share is the variance of its means over the variance of all cell means (first order of "
            "functional ANOVA)."
        )
    unknown = [effect.name for effect in found.several if effect.share is None]
    if unknown:
        said.append(f"Other keys determine {clean(', '.join(unknown))}, so its effect cannot be told from theirs.")
    return said
