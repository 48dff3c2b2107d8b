"""Cells in which a search chooses what a sweep leaves open: entered when the sweep is expanded, filled as results come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.options import Mistake
from lab.axes import Choice, Key
from lab.searching import Search

if TYPE_CHECKING:
    from lab.expand import Expander, Point
    from train_args import Config


@dataclass
class Searched:
    """A cell of the rest of a sweep, in which `search` chooses the other keys.

    `key` names the cell and its space: it is the same whenever the same file is expanded. `points` differ in their seeds alone;
    `seeds` are those that each suggestion runs with. `config` is the configuration at the first values of all keys.
    """

    key: str
    search: Search
    points: list[Point]
    seeds: list[int]
    config: Config
    work: Expander

    def add(
        self, values: Mapping[Key, Any], seeds: Sequence[int] | None = None
    ) -> tuple[tuple[str, ...], list[Mistake]]:
        """Lists the runs of a suggestion, on fresh seeds where some are given. Returns the hashes of its runs, none where it is
        excluded or cannot be run, and what is wrong with it, at the places of what was searched over."""
        row = [dimension.choice(values[dimension.key]) for dimension in self.search.over]
        points = [point.take(row) for point in (self.points if seeds is None else self.points[:1])]
        before, self.work.mistakes = self.work.mistakes, {}
        phase = "search" if seeds is None else "confirm"
        hashes = [made for point in points for made in self.work.read(point, phase, seeds)]
        found, self.work.mistakes = list(self.work.mistakes.values()), before
        for point in points:  # whether it is new or excluded is no word about the file
            self.work.kept.pop(point.ident, None)
            self.work.fresh.pop(point.ident, None)
        return (() if found else tuple(dict.fromkeys(hashes))), found


def enter(work: Expander, point: Point, search: Search) -> None:
    """Enters a cell into `work.searches`, unless it is excluded or known. Every end and every choice of the searched keys, each
    with the first ones of the others, is tried on the configuration, so that what cannot be is told before anything starts."""
    whole = _matches(work, point, search)
    found = [] if whole else _tried(work, point, search)
    if not found:
        work.kept.setdefault(point.ident, not (whole or not work.mistakes))
        work.fresh.setdefault(point.ident, True)
        return
    cell = work.reader.identity(found[0])[1]
    key = hashlib.sha256(f"{cell} {search.digest}".encode()).hexdigest()[:10]
    seeds = [config.train.seed for config in found]
    known = work.searches.get(key)
    if known is None:
        work.searches[key] = Searched(key, search, [point], seeds, found[0], work)
    elif known.points[0].ident == point.ident:  # a seed that an axis gives
        known.points.append(point)
        known.seeds += seeds
    else:
        work.kept[point.ident], work.fresh[point.ident] = True, False


def _matches(work: Expander, point: Point, search: Search) -> bool:
    """Notes the matches that hold in the cell for some values of what is searched. Returns whether the whole cell is excluded."""
    over = {dimension.key: dimension for dimension in search.over}
    corner = point.take([dimension.choice(dimension.tried[0]) for dimension in search.over])
    values = work.values(corner.tree()) if work.matches else {}
    whole = False
    for name, match in work.matches.items():
        rest = {key: wanted for key, wanted in match.items() if key not in over}
        searched = {key: wanted for key, wanted in match.items() if key in over}
        if work.holds(rest, values, corner.labels) and all(over[k].meets(w) for k, w in searched.items()):
            work.used.add(name)
            whole = whole or (name[0] == "exclude" and not searched)
    return whole


def _tried(work: Expander, point: Point, search: Search) -> list[Config]:
    """Tries every row on the configuration. Returns what the first that can be run makes, one for each seed."""
    made: list[Config] = []
    for row in _rows(search):
        at = point.take(row)
        first, *others = work.seeded(at)
        if any(word == "exclude" for word, _ in work.hits(first, at)):
            continue
        config = work.config(at, first)
        if config is not None and not made:
            made = [config, *(one for tree in others if (one := work.config(at, tree)) is not None)]
    return made


def _rows(search: Search) -> Iterator[list[Choice]]:
    """The first values of all keys, then each other value of each key."""
    first = [dimension.choice(dimension.tried[0]) for dimension in search.over]
    yield first
    for i, dimension in enumerate(search.over):
        for label in dimension.tried[1:]:
            yield [*first[:i], dimension.choice(label), *first[i + 1 :]]
