"""A set of combinations as a sweep: what is constant, and the rest as few axes, conditions, zips, groups and cases as can be found.

It works on the set alone, so whatever a file's author wrote in it (lists, conditions, groups) comes back in its simplest form, and
what is found stands for exactly the set that was given.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEED = "train.seed"
Row = tuple[str, ...]  # a value's text for each key


@dataclass
class Rows:
    """Different combinations of the same keys. `values` gives back the value of a text."""

    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    values: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, settings: Iterable[Mapping[str, Any]]) -> Rows:
        values: dict[str, Any] = {}
        rows: dict[Row, None] = {}
        keys: tuple[str, ...] = ()
        for some in settings:
            keys = keys or tuple(some)
            texts = tuple(json.dumps(some[key], sort_keys=True) for key in keys)
            values.update(zip(texts, some.values() if tuple(some) == keys else (some[k] for k in keys), strict=True))
            rows[texts] = None
        return cls(keys, tuple(rows), values)

    def on(self, keys: Sequence[str]) -> Rows:
        """The combinations as far as these keys go."""
        at = [self.keys.index(key) for key in keys]
        return Rows(tuple(keys), tuple(dict.fromkeys(tuple(row[i] for i in at) for row in self.rows)), self.values)

    def column(self, key: str) -> list[Any]:
        """The different values of a key, in order."""
        at = self.keys.index(key)
        return [self.values[text] for text in dict.fromkeys(row[at] for row in self.rows)]

    def constant(self) -> dict[str, Any]:
        """The keys with one value."""
        return {key: found[0] for key in self.keys if len(found := self.column(key)) == 1}

    def mappings(self) -> list[dict[str, Any]]:
        return [{key: self.values[text] for key, text in zip(self.keys, row, strict=True)} for row in self.rows]

    def has_nodes(self) -> bool:
        return any(isinstance(self.values[text], dict) for row in self.rows for text in row)

    @property
    def size(self) -> int:
        return len(self.keys) * len(self.rows)


@dataclass
class Plan:
    """What stands for the combinations: `base` is set, the rest are the parts of a sweep's section (or of a case)."""

    base: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    zips: list[dict[str, list[Any]]] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    cases: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    size: int = 0  # how many values it writes down

    def section(self) -> dict[str, Any]:
        """The words of a sweep."""
        zips = self.zips[0] if len(self.zips) == 1 else self.zips
        made = {"grid": self.grid, "zip": zips, "groups": self.groups, "cases": self.cases, "seeds": self.seeds}
        return {word: value for word, value in made.items() if value}


@dataclass(frozen=True)
class Part:
    """The combinations of one branch of the file, its name, and what each key's values are called in it, if anything."""

    name: str
    rows: Rows
    words: Mapping[str, str]


def components(rows: Rows) -> list[Rows]:
    """The varying keys in sets that are independent of one another: their product is the set itself."""
    keys = [key for key in rows.keys if key not in rows.constant()]
    of = {key: i for i, key in enumerate(keys)}
    counts = {key: len(rows.column(key)) for key in keys}
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            if of[a] != of[b] and len(rows.on((a, b)).rows) != counts[a] * counts[b]:
                of = {key: of[a] if group == of[b] else group for key, group in of.items()}
    made = [rows.on([key for key in keys if of[key] == group]) for group in dict.fromkeys(of.values())]
    product = 1
    for some in made:
        product *= len(some.rows)
    return made if product == len(rows.rows) else [rows.on(keys)]


def plan(rows: Rows, parts: Sequence[Part], conditional: Collection[str] = ()) -> Plan:
    """A plan of the combinations. `parts`: the branches that they came from, together all of them; `conditional`: keys to which the
    file itself gave conditions."""
    made = Plan(base=rows.constant())
    found = components(rows)
    alone = [flat(some, parts, conditional) for some in found]
    branches = [cases(some, parts) if len(some.keys) > 1 else None for some in found]
    saved = [a.size - b.size if b else 0 for a, b in zip(alone, branches, strict=True)]
    best = saved.index(max(saved)) if any(s > 0 for s in saved) else None
    for i, some in enumerate(found):
        if some.keys == (SEED,) and all(isinstance(seed, int) and seed >= 0 for seed in some.column(SEED)):
            made.seeds = some.column(SEED)
        else:
            add(made, (branches[i] if i == best else None) or alone[i])
    made.base = {key: made.base[key] for key in rows.keys if key in made.base}
    return made


def add(made: Plan, more: Plan) -> None:
    made.base.update(more.base)
    made.grid.update(more.grid)
    made.zips += more.zips
    made.groups.update(more.groups)
    made.cases.update(more.cases)
    made.size += more.size


def flat(rows: Rows, parts: Sequence[Part] = (), conditional: Collection[str] | None = None) -> Plan:
    """One component without cases: an axis, an axis with a condition, a group or zipped axes. `conditional`: the keys that are best
    written with one; None inside a case, where there are none, for a key's value elsewhere is constant in the whole file."""
    if len(rows.keys) == 1:
        (key,) = rows.keys
        values = rows.column(key)
        return Plan(grid={key: axis_of(values)}, size=len(values))
    for key, usual, axis, rest in conditions(rows) if conditional is not None else ():
        made = Plan(base={key: usual}, grid={key: axis}, size=2 + len(axis["values"]))
        for some in components(rest):
            add(made, flat(some, parts, conditional))
        if key in (conditional or ()) or made.size < rows.size:
            return made
    labels = named(rows, parts) or (called(rows) if rows.has_nodes() else [])
    if labels:
        name = "+".join(key.rpartition(".")[2] for key in rows.keys[:3])
        return Plan(groups={name: dict(zip(labels, rows.mappings(), strict=True))}, size=rows.size)
    columns = {key: [row[key] for row in rows.mappings()] for key in rows.keys}
    return Plan(zips=[columns], size=rows.size)


def conditions(rows: Rows) -> Iterator[tuple[str, Any, dict[str, Any], Rows]]:
    """Keys that take several values where another has certain values, and one elsewhere; the last first, as conditions are written
    after what they are about.

    Yields the key, its value elsewhere, its axis and the combinations of the other keys.
    """
    for key in reversed(rows.keys):
        at = rows.keys.index(key)
        others = rows.on([k for k in rows.keys if k != key])
        taken: dict[Row, dict[str, None]] = {}
        for row in rows.rows:
            taken.setdefault(row[:at] + row[at + 1 :], {})[row[at]] = None
        for i, other in enumerate(others.keys):
            by_value: dict[str, set[frozenset[str]]] = {}
            for rest, texts in taken.items():
                by_value.setdefault(rest[i], set()).add(frozenset(texts))
            sets = {text: next(iter(found)) for text, found in by_value.items() if len(found) == 1}
            few, many = ({s for s in sets.values() if (len(s) > 1) is more} for more in (False, True))
            if len(sets) < len(by_value) or len(few) != 1 or len(many) != 1:
                continue
            where = [text for text in sets if sets[text] in many]
            values = [rows.values[text] for text in where]
            if not all(isinstance(value, (str, int, float)) for value in values):
                continue  # null and nodes are compared by rules of their own
            listed = next(texts for rest, texts in taken.items() if rest[i] == where[0])
            when = {other: values[0] if len(values) == 1 else values}
            ((usual,),) = few
            yield key, rows.values[usual], {"values": [rows.values[text] for text in listed], "when": when}, others


def named(rows: Rows, parts: Sequence[Part]) -> list[str]:
    """What the file's own groups call each combination; nothing where they do not tell all of them apart."""
    called: dict[Row, set[str]] = {row: set() for row in rows.rows}
    for part in parts:
        words = "+".join(dict.fromkeys(part.words[key] for key in rows.keys if key in part.words))
        for row in part.rows.on(rows.keys).rows:
            called[row].add(words)
    found = [next(iter(words)) for words in called.values() if len(words) == 1]
    return found if len(set(found)) == len(rows.rows) and "" not in found else []


def called(rows: Rows) -> list[str]:
    """What tells the combinations apart in few words; nothing where that is not possible."""
    columns = {key: [word(row[key]) for row in rows.mappings()] for key in rows.keys}
    for n in (1, 2, 3):
        for keys in itertools.combinations(columns, n):
            words = ["+".join(row) for row in zip(*(columns[key] for key in keys), strict=True)]
            if len(set(words)) == len(words) and all(0 < len(text) <= 40 for text in words):
                return words
    return []


def word(value: Any) -> str:
    """A value in a word: of a node its variant."""
    if isinstance(value, Mapping):
        return str(value.get("variant", ""))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def axis_of(values: list[Any]) -> Any:
    """An axis over values; nodes get their variants as labels where these differ."""
    labels = [word(value) for value in values]
    if any(isinstance(value, dict) for value in values) and len(set(labels)) == len(labels):
        return {"named": dict(zip(labels, values, strict=True))}
    return values


def cases(rows: Rows, parts: Sequence[Part]) -> Plan | None:
    """One component as a case for each branch that differs in it; None where there is one such branch."""
    different: dict[frozenset[Row], tuple[str, Rows]] = {}
    for part in parts:
        some = part.rows.on(rows.keys)
        different.setdefault(frozenset(some.rows), (part.name, some))
    if len(different) < 2:
        return None
    made, names = Plan(), _names([name for name, _ in different.values()], [some for _, some in different.values()])
    for name, (_, some) in zip(names, different.values(), strict=True):
        case = Plan(base=some.constant())
        for piece in components(some):
            add(case, flat(piece))
        made.cases[name] = ({"set": case.base} if case.base else {}) | case.section()
        made.size += case.size + len(case.base)
    return made


def _names(given: Sequence[str], branches: Sequence[Rows]) -> list[str]:
    """The branches' names; where two are equal or one is missing, what is constant and different in them, or numbers."""
    if len(set(given)) == len(given) and all(given):
        return list(given)
    constants = [some.constant() for some in branches]
    shared = Rows.of(
        {key: found[key] for key in branches[0].keys if all(key in c for c in constants)} for found in constants
    )
    words = called(shared) if len(shared.rows) == len(branches) else []
    return words or [f"{name or 'branch'}_{i}" for i, name in enumerate(given, 1)]
