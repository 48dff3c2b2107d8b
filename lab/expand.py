"""Expansion of a sweep, pure: a composed tree goes in, the runs it stands for come out, with every mistake told.

Axes, groups and cases multiply; what a case or the command line sets is pinned there; runs that resolve to one are merged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from core.options import MISSING, Mistake, Path
from core.references import resolve
from core.trees import drop_nulls, get, merge, names_variant, put
from lab.axes import Axis, Choice, Key, is_form, same
from lab.naming import condition, in_words, short_names
from lab.reading import ConfigReader
from lab.searched import Searched, enter
from lab.sweep import SEED, Case, Match, Sweep
from train_args import Config

LISTED = 20_000  # combinations that take seconds to read; who wants more says so in sweep.max_runs
MOST = 1_000_000
Default = Callable[[Any, Path], Any]  # what a key holds where a tree does not set it, or MISSING


@dataclass(frozen=True)
class Run:
    """One run of a sweep. `changed` is what the sweep set, by key (labels where there are labels); `cell` is the run without
    its seed, in words; runs have one cell exactly where they have one `cell_hash`. `phase` is 'grid' for what the file lists,
    'search' for what a search chose, 'confirm' for what repeats it on fresh seeds."""

    hash: str
    cell_hash: str
    cell: str
    seed: int
    changed: Mapping[str, Any]
    config: Config
    baseline: bool
    phase: str = "grid"


@dataclass(frozen=True)
class Expansion:
    """What a file stands for. `excluded` counts cells of which no run is left, `duplicates` those that resolve to runs listed
    before. `short` gives the short name of each swept key. In `searches` more runs may come."""

    runs: tuple[Run, ...]
    cells: int
    excluded: int
    duplicates: int
    short: Mapping[str, str]
    sweep: Sweep
    searches: tuple[Searched, ...] = ()


def expand(
    tree: Mapping[str, Any], sweep: Sweep, pins: Mapping[Key, Any], reader: ConfigReader, default: Default
) -> tuple[Expansion, list[Mistake]]:
    """Every run of a sweep over `tree` that the file lists, the cells in which a search chooses more, and every mistake.

    `default(tree, path)` is a key's value where no file sets it.
    """
    work = Expander(sweep, reader, default)
    work.refuse_searched_conditions()
    try:
        for name, case in (sweep.cases or {"": Case()}).items():
            search = sweep.search.without(case.sets) if sweep.search else None
            for point in work.points(name, case, tree, pins):
                if search is None:
                    work.read(point)
                else:
                    enter(work, point, search)
    except TooMany as error:
        advice = "Shorten some axes" + (f", or set sweep.max_runs to {MOST:,} or less." if work.limit < MOST else ".")
        return work.expansion(), [*work.mistakes.values(), Mistake(("sweep",), str(error), advice)]
    return work.expansion(), [*work.mistakes.values(), *work.unused()]


# Trees ----------------------------------------------------------------------------------------------------------------------


class _Trees:
    """Makes trees that share every section in which the same values are set, so that each is read once.

    `fixed`: what holds in all of them, also inside a node that an axis replaces.
    """

    def __init__(self, base: Mapping[str, Any], fixed: Mapping[Key, Any]) -> None:
        self.fixed, self.base = fixed, drop_nulls(_set(base, fixed))
        self.sections: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def of(self, sets: Mapping[Key, Any]) -> Mapping[str, Any]:
        by_head: dict[str, dict[Key, Any]] = {}
        for key, value in sets.items():
            by_head.setdefault(key.partition(".")[0], {})[key] = value
        made = dict(self.base)
        for head, some in by_head.items():
            ident = (head, *((key, id(value)) for key, value in some.items()))
            if ident not in self.sections:
                self.sections[ident] = (self._section(head, some), list(some.values()))  # kept, so ids stay their own
            made[head] = self.sections[ident][0]
        return made

    def _section(self, head: str, some: Mapping[Key, Any]) -> Any:
        again = {k: v for k, v in self.fixed.items() if any(k.startswith(f"{key}.") for key in some)}
        base = {head: self.base[head]} if head in self.base else {}
        return drop_nulls(_set(base, {**some, **again}))[head]


def _set(tree: Mapping[str, Any], sets: Mapping[Key, Any]) -> Mapping[str, Any]:
    """The tree with values set, a node before what is inside it."""
    for key in sorted(sets, key=lambda k: k.count(".")):
        tree = put(tree, tuple(key.split(".")), sets[key])
    return tree


@cache
def _following(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


@dataclass(frozen=True)
class Point:
    """One combination of choices: what they set, what names call it, where each key was written. `ident` is the same for points
    that differ in their seed alone."""

    trees: _Trees
    sets: Mapping[Key, Any]
    labels: Mapping[str, Any]
    places: Mapping[Key, Path]
    ident: tuple[Any, ...]

    def take(self, row: Sequence[Choice]) -> Point:
        sets, labels, places = dict(self.sets), dict(self.labels), dict(self.places)
        for choice in row:
            sets.update(choice.sets)
            labels.update(choice.labels)
            places.update(choice.places)
        ident = (*self.ident, *(id(choice) for choice in row if set(choice.sets) != {SEED}))
        return Point(self.trees, sets, labels, places, ident)

    def tree(self, seed: int | None = None) -> Mapping[str, Any]:
        return self.trees.of(self.sets if seed is None else {**self.sets, SEED: seed})


# Expansion ------------------------------------------------------------------------------------------------------------------


class TooMany(ValueError):
    """The sweep has more combinations than are listed."""


class Expander:
    """Reads points one after another. `kept` and `fresh` say of each cell whether a run is left, and whether one was new."""

    def __init__(self, sweep: Sweep, reader: ConfigReader, default: Default) -> None:
        self.sweep, self.reader, self.default = sweep, reader, default
        every = [*sweep.axes, *(axis for case in sweep.cases.values() for axis in case.axes)]
        every += [dimension.axis for dimension in sweep.search.over] if sweep.search else []
        self.short = short_names(list(dict.fromkeys(x for a in every for c in a.choices for x in c.labels)))
        self.conditions = {axis.path: axis for axis in every if axis.when}
        self.matches = {("exclude", i): match for i, match in enumerate(sweep.exclude)}
        self.matches |= {("baseline", i): match for i, match in enumerate(sweep.baseline)}
        self.used: set[Any] = set()  # matches that held, paths of conditional axes that were taken
        self.mistakes: dict[tuple[Path, str], Mistake] = {}
        self.runs: dict[str, Run] = {}
        self.names: dict[str, str] = {}  # of cells, by their hash
        self.taken: set[str] = set()
        self.baselines: dict[tuple[Any, ...], Point] = {}  # what the sweep compares with, of what the file lists
        self.kept: dict[tuple[Any, ...], bool] = {}
        self.fresh: dict[tuple[Any, ...], bool] = {}
        self.searches: dict[str, Searched] = {}
        self.limit, self.met = min(max(LISTED, sweep.max_runs), MOST), 0  # how many combinations there may be, and are

    def expansion(self, order: Iterable[str] | None = None) -> Expansion:
        """What is listed so far; in another order of the runs' hashes where one is given."""
        runs = tuple(self.runs.values() if order is None else map(self.runs.__getitem__, order))
        return Expansion(
            runs,
            len({run.cell_hash for run in runs}),
            sum(not kept for kept in self.kept.values()),
            sum(kept and not self.fresh[ident] for ident, kept in self.kept.items()),
            self.short,
            self.sweep,
            tuple(self.searches.values()),
        )

    def refuse_searched_conditions(self) -> None:
        """Notes axes whose condition is about what a search chooses, as a search is made in each choice of an axis."""
        for path, axis in self.conditions.items():
            for dimension in self.sweep.search.over if self.sweep.search else ():
                if _meet({dimension.key}, axis.when):
                    text = f"its 'when' is about '{dimension.key}', which the search chooses"
                    self.mistakes[path, text] = Mistake(path, text)
                    self.used.add(path)

    def points(self, name: str, case: Case, tree: Mapping[str, Any], pins: Mapping[Key, Any]) -> Iterator[Point]:
        """Every combination of a case's choices. Axes with a condition come last, each after those that its condition is about."""
        for preset in case.use:
            tree = merge(tree, preset)
        trees = _Trees(tree, {**case.sets, **pins})
        places = {key: place for key, place in case.places.items() if key not in pins}
        start = Point(trees, {}, {"case": name} if name else {}, places, (name,))
        axes = [axis for outer in self.sweep.axes if (axis := _pinned(outer, set(case.sets)))] + list(case.axes)
        last = self._ordered([axis for axis in axes if axis.when])
        free = [axis.choices for axis in axes if not axis.when]
        self._count(math.prod(map(len, free)), met=False)
        for row in itertools.product(*free):
            points = [start.take(row)]
            for axis in last:
                points = [p for point in points for p in self._conditional(point, axis)]
                self._count(len(points), met=False)
            self._count(len(points))
            yield from points

    def _count(self, points: int, met: bool = True) -> None:
        """Raises TooMany where so many more points, each with its seeds and what a search chooses, exceed the limit."""
        seeds = self.sweep.seeds if isinstance(self.sweep.seeds, int) else len(self.sweep.seeds)
        total = self.met + points * seeds * (self.sweep.search.trials if self.sweep.search else 1)
        if total > self.limit:
            shown = f"{total:,}" if total < 10**15 else "more than 10^15"
            raise TooMany(f"it has {shown} combinations or more, and at most {self.limit:,} are listed")
        self.met = total if met else self.met

    def _ordered(self, axes: list[Axis]) -> list[Axis]:
        made: list[Axis] = []
        while axes:
            free = [a for a in axes if not any(b is not a and _meet(b.keys, a.when) for b in axes)]
            if not free:
                text = "its 'when' is about an axis whose own 'when' is about this one"
                self.mistakes.setdefault((axes[0].path, text), Mistake(axes[0].path, text))
                return made
            made += free
            axes = [a for a in axes if a not in free]
        return made

    def _conditional(self, point: Point, axis: Axis) -> list[Point]:
        if not self.holds(axis.when, self.values(point.tree()), point.labels):
            return [point]
        self.used.add(axis.path)
        return [point.take((choice,)) for choice in axis.choices]

    def values(self, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """A tree with its references replaced, for comparing."""
        return resolve(tree, lambda path: self.default(tree, path))[0] if self.reader.refers(tree) else tree

    def holds(self, match: Match, tree: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
        """Whether a partial match holds: by key, case name or label; a list means any of these."""
        for key, wanted in match.items():
            path = tuple(key.split("."))
            value, usual = get(tree, path, MISSING), self.default(tree, path)
            if isinstance(value, Mapping) and not names_variant(value) and isinstance(usual, str):
                value = {"variant": usual, **value}
            candidates = [usual if value is MISSING else value, *([labels[key]] if key in labels else [])]
            options = [*wanted, wanted] if isinstance(wanted, list) else [wanted]
            if not any(c is not MISSING and same(c, w) for c in candidates for w in options):
                return False
        return True

    def read(self, point: Point, phase: str = "grid", seeds: Sequence[int] | None = None) -> list[str]:
        """Lists the runs of a point, one for each seed, and notes its mistakes. Returns the hashes of those that can be run."""
        self.kept.setdefault(point.ident, False)
        self.fresh.setdefault(point.ident, False)
        hashes = []
        for tree in self.seeded(point, seeds):
            hits = self.hits(tree, point)
            self.used |= hits
            if any(word == "exclude" for word, _ in hits):
                continue
            self.kept[point.ident] = True
            if hits and phase == "grid":
                self.baselines.setdefault(point.ident, point)
            config = self.config(point, tree)
            if config is None:
                self.fresh[point.ident] = True
            else:
                hashes.append(self._add(point, config, bool(hits), phase))
        return hashes

    def hits(self, tree: Mapping[str, Any], point: Point) -> set[tuple[str, int]]:
        """Which of the matches hold."""
        values = self.values(tree) if self.matches else tree
        return {name for name, match in self.matches.items() if self.holds(match, values, point.labels)}

    def config(self, point: Point, tree: Mapping[str, Any]) -> Config | None:
        """The configuration of a point's tree. Mistakes in it are noted, with the places of what set the values."""
        config, wrong = self.reader.read(tree)
        for mistake in wrong:
            placed = _placed(mistake, point, tree)
            if mistake.path[:1] == ("slices",) and placed.at is None and point.labels:
                # It stands in the file, and whether it holds depends on the model of the cell.
                cell = in_words(point.labels, self.short)
                placed = replace(placed, text=f"{mistake.text}, for example in the cell '{cell}'")
            self.mistakes.setdefault((mistake.path, mistake.text), placed)
        return config

    def seeded(self, point: Point, given: Sequence[int] | None = None) -> Iterator[Mapping[str, Any]]:
        """The tree of a point for each of the sweep's seeds, or for those that are given."""
        if given is not None:
            yield from map(point.tree, given)
            return
        seeds, tree = self.sweep.seeds, point.tree()
        if isinstance(seeds, int):
            path = tuple(SEED.split("."))
            first = get(self.values(tree), path, MISSING) if seeds > 1 else None
            first = self.default(tree, path) if first is MISSING else first
            usable = isinstance(first, int) and not isinstance(first, bool)
            seeds = _following(first, seeds) if seeds > 1 and usable else ()
        elif SEED in point.sets or SEED in point.trees.fixed:
            seeds = ()
        yield from (point.tree(seed) for seed in seeds) if seeds else [tree]

    def _add(self, point: Point, config: Config, baseline: bool, phase: str) -> str:
        run_hash, cell_hash = self.reader.identity(config)
        known = self.runs.get(run_hash)
        if known is not None:
            self.runs[run_hash] = replace(known, baseline=True) if baseline and not known.baseline else known
            return run_hash
        self.fresh[point.ident] = True
        if cell_hash not in self.names:
            words = in_words(point.labels, self.short)
            self.names[cell_hash] = f"{words} ({cell_hash[:4]})" if words in self.taken else words
            self.taken.add(words)
        cell = self.names[cell_hash]
        self.runs[run_hash] = Run(run_hash, cell_hash, cell, config.train.seed, point.labels, config, baseline, phase)
        return run_hash

    def unused(self) -> Iterator[Mistake]:
        """What the sweep says in vain."""
        names = ", ".join([*(["case"] if self.sweep.cases else []), *self.short]) or "no axes"
        advice = f"It is compared by key, case name or label; the sweep has {names}."
        for (word, i), match in self.matches.items():
            if (word, i) not in self.used:
                yield Mistake(("sweep", word, str(i)), f"'{condition(match)}' matches no run", advice)
        for path, axis in self.conditions.items():
            if path not in self.used:
                yield Mistake(path, f"its condition, '{condition(axis.when)}', holds in no run", advice)
        if not any(self.kept.values()) and not self.searches and not self.mistakes:
            yield Mistake(("sweep", "exclude"), "nothing is left: every run is excluded")


def _meet(keys: set[Key], when: Mapping[Key, Any]) -> bool:
    """Whether any of `keys` is one that a condition is about, or lies around or inside it."""
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in keys for b in when)


def _pinned(axis: Axis, keys: set[Key]) -> Axis | None:
    """An axis without the keys that a case pins; None where nothing is left of it."""
    if not axis.keys & keys:
        return axis
    left = {}
    for choice in axis.choices:
        sets = {k: v for k, v in choice.sets.items() if k not in keys}
        labels = {k: v for k, v in choice.labels.items() if k not in keys}
        left[repr((sets, labels))] = Choice(sets, labels, {k: choice.places[k] for k in sets})
    kept = tuple(choice for choice in left.values() if choice.sets or choice.labels)
    return Axis(axis.name, kept, axis.when, axis.path) if kept else None


def _placed(mistake: Mistake, point: Point, tree: Mapping[str, Any]) -> Mistake:
    """The mistake with the place of the axis or case that set the value; where nobody set it, of one that set its neighbour."""
    if is_form(get(tree, mistake.path)):
        mistake = replace(mistake, advice="A form stands for a whole axis; inside a list it is a plain value.")
    paths = {tuple(key.split(".")): place for key, place in point.places.items()}
    around = [path for path in paths if mistake.path[: len(path)] == path]
    if not around:  # a section that is there only because an axis sets something in it
        around = [path for path in paths if path[: len(mistake.path)] == mistake.path]
    if not around and get(tree, mistake.path, MISSING) is MISSING:
        around = [path for path in paths if path[:-1] == mistake.path[:-1]]
        around = around or [
            path for path in paths if mistake.path[1:] and path[: len(mistake.path) - 1] == mistake.path[:-1]
        ]
    named = [path for path in around if path[-1] in mistake.text]
    return replace(mistake, at=paths[max(named or around, key=len)]) if around else mistake
