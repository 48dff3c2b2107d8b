"""ReaLLM-Forge's exploration files: what they say, and every combination of values that they stand for.

The dialect: a file is one mapping, several YAML documents, or a list of mappings; a JSON file is read alike. In a mapping a key
is an option of its train.py, and its value one value or a list of alternatives, which multiply. `{range: {start, end, step}}`
counts, ends included. `{conditions: ..., options: [...]}` adds a key where the conditions hold (a mapping: all of it; a list of
mappings: any of them). `parameter_groups` is a list of branches, nested at will, each with what stands around it. `common_group`
holds in every combination. `named_static_groups` and `named_variation_groups` are mappings with a name, `named_group`;
`named_group_static` and `named_group_variations` multiply with the groups that they name, and `named_group_alternates` takes one
of its groups after another. The value `default` leaves a key out. Source: ReaLLM-Forge's run_experiments.py of August 2026.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

from core.options import Path, nearest
from core.yaml_files import ConfigError, shown
from lab.importing.documents import read_documents

MAX_COMBINATIONS = 100_000
MAX_BRANCHES = 20_000
MAX_DEPTH = 100  # of groups in groups, and of lists of branches that multiply
LEFT_OUT = "default"  # a value that stands for not naming the key
GROUPS, COMMON, NAME, SETTINGS = "parameter_groups", "common_group", "named_group", "named_group_settings"
DEFINITIONS = ("named_static_groups", "named_variation_groups")
REFERENCES = ("named_group_alternates", "named_group_static", "named_group_variations")
AT_THE_TOP = (COMMON, *DEFINITIONS)

Combination = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What a file says of a key, and where."""

    value: Any
    path: Path


@dataclass(frozen=True)
class Branch:
    """A branch of the union that a file is: the named groups it is made of (and each key's), and its combinations."""

    groups: tuple[str, ...]
    group_of: Mapping[str, str]
    combinations: tuple[Combination, ...]


@dataclass(frozen=True)
class Exploration:
    """A file as read. `places` gives 'file:line' of a key's first mention; `remarks` are sentences on what it leaves unclear."""

    branches: tuple[Branch, ...]
    places: Mapping[str, str]
    remarks: tuple[str, ...]
    conditional: frozenset[str]  # the keys that are given with conditions

    @property
    def combinations(self) -> list[Combination]:
        return [combination for branch in self.branches for combination in branch.combinations]


# Reading --------------------------------------------------------------------------------------------------------------------


def read_exploration(path: File, *, pairs_hold: bool = False) -> Exploration:
    """Reads a file and expands it.

    pairs_hold: whether conditions written as lists of pairs hold where all of the pairs do. ReaLLM-Forge took them so until the
    autumn of 2025 and has taken them as never met since. Raises ConfigError, with file and line, for what it would not run either.
    """
    documents, places, remarks = read_documents(path)
    paths: list[Path] = [(str(i),) for i in range(len(documents))]
    if len(documents) == 1 and isinstance(documents[0], list):
        documents, paths = documents[0], [("0", str(i)) for i in range(len(documents[0]))]
    if not documents:
        raise ConfigError(f"{shown(path)} is empty: it says no exploration.")
    work = _Expander(places, pairs_hold)
    branches = [b for document, at in zip(documents, paths, strict=True) for b in work.document(document, at)]
    if not work.count:
        raise ConfigError(f"{shown(path)} stands for no combination: a list in it is empty.")
    return Exploration(tuple(branches), work.first, (*remarks, *work.remarks), frozenset(work.conditional))


# Expanding ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Keys that hold together, and lists of branches of which one each is still to be taken."""

    keys: Mapping[str, Entry] = field(default_factory=dict)
    waiting: tuple[Entry, ...] = ()
    groups: tuple[str, ...] = ()
    group_of: Mapping[str, str] = field(default_factory=dict)


class _Expander:
    """Expands documents one after another; `first` is the place of each key, `count` how many combinations there are."""

    def __init__(self, places: Mapping[Path, str], pairs_hold: bool) -> None:
        self.places, self.pairs_hold = places, pairs_hold
        self.named: dict[str, dict[str, Entry]] = {}
        self.first: dict[str, str] = {}
        self.remarks: dict[str, None] = {}
        self.conditional: set[str] = set()
        self.count = self.work = 0

    def wrong(self, path: Path, text: str, advice: str = "") -> ConfigError:
        place = next(self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places)
        name = path[-1] if not path[-1].isdigit() else ".".join(path[-2:])
        return ConfigError(f"{name}: {text} ({place}). {advice}".rstrip())

    def mapping(self, value: Any, path: Path) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.wrong(path, f"a mapping of keys is needed here, not {_told(value)}")
        return value

    def document(self, document: Any, path: Path) -> list[Branch]:
        """The branches of one mapping of the file."""
        given = dict(self.mapping(document, path))
        self.named = {kind: self.definitions(given.pop(kind, None), (*path, kind)) for kind in DEFINITIONS}
        common = self.common(given.pop(COMMON, None), (*path, COMMON))
        made = []
        for part in self.leaves(self.resolve(given, path, ())):
            made.append(Branch(part.groups, part.group_of, tuple(self.combinations(part, common))))
            if len(made) > MAX_BRANCHES:
                raise self.wrong(path, f"it has more than {MAX_BRANCHES:,} branches of groups")
        return made

    def definitions(self, given: Any, path: Path) -> dict[str, Entry]:
        made: dict[str, Entry] = {}
        for i, group in enumerate(_listed(given)):
            below = (*path, str(i)) if isinstance(given, list) else path
            name = self.mapping(group, below).get(NAME)
            if not isinstance(name, str) or not name:
                raise self.wrong(below, f"the group has no name; give it '{NAME}: NAME'")
            if name in made:
                raise self.wrong(below, f"a group '{name}' has been defined before")
            made[name] = Entry({key: value for key, value in group.items() if key != NAME}, below)
        return made

    def common(self, given: Any, path: Path) -> dict[str, Entry]:
        """What holds in every combination: each key's only value."""
        made = {}
        for key, value in (self.mapping(given, path) if given is not None else {}).items():
            below = (*path, key)
            values = self.values(Entry(value, below))
            if len(values) != 1:
                text = f"what '{COMMON}' says is one value for every run, not {len(values)}"
                raise self.wrong(below, text, "Move it out of the group, where lists multiply.")
            self.note(key, below)
            if values[0] != LEFT_OUT:
                made[key] = Entry(values[0], below)
        return made

    def note(self, key: str, path: Path) -> None:
        self.first.setdefault(key, self.places.get(path, ""))

    def spend(self, path: Path) -> None:
        """Counts a step of joining groups, of which nested alternatives can mean exponentially many."""
        self.work += 1
        if self.work > 10 * MAX_BRANCHES:
            raise self.wrong(path, f"its groups join in more than {10 * MAX_BRANCHES:,} ways")

    def join(self, a: _Part, b: _Part, path: Path) -> _Part:
        """Both together. Raises ConfigError where they say different things of one key, which ReaLLM-Forge refuses too."""
        self.spend(path)
        for key, entry in b.keys.items():
            if key in a.keys and a.keys[key].value != entry.value:
                other = self.places.get(a.keys[key].path, "")
                text = f"{_told(entry.value)} here and {_told(a.keys[key].value)} at {other} meet in one combination"
                raise self.wrong(entry.path, text, "ReaLLM-Forge refuses it too; leave one out.")
        keys, group_of = {**a.keys, **b.keys}, {**b.group_of, **a.group_of}
        return _Part(keys, a.waiting + b.waiting, a.groups + b.groups, group_of)

    def resolve(self, given: Mapping[str, Any], path: Path, trail: tuple[str, ...]) -> list[_Part]:
        """A mapping with the groups that it names, which may be several alternatives. `trail`: the groups that led here."""
        own = self.plain(given, path)
        parts = [own[0]]
        for word in REFERENCES:
            names, found = own[1].get(word), []
            for i, name in enumerate(_listed(names.value) if names else []):
                at = (*names.path, str(i)) if names and isinstance(names.value, list) else (*path, word)
                found.append((self.group(word, name, at, trail), at))
            if word == REFERENCES[0] and found:  # one of them after another; the others all hold
                found = [([part for parts_of, _ in found for part in parts_of], found[0][1])]
            for alternatives, at in found:
                parts = [self.join(a, b, at) for a in parts for b in alternatives]
        return parts

    def plain(self, given: Mapping[str, Any], path: Path) -> tuple[_Part, dict[str, Entry]]:
        """What a mapping says itself: its keys and branches, and the groups that it names."""
        entries = {key: Entry(value, (*path, key)) for key, value in given.items() if key != SETTINGS}
        if given.get(SETTINGS) is not None:
            below = (*path, SETTINGS)
            for key, value in self.mapping(given[SETTINGS], below).items():
                if key in entries and entries[key].value != value:
                    raise self.wrong((*below, key), f"'{key}' stands beside '{SETTINGS}' too, with another value")
                entries.setdefault(key, Entry(value, (*below, key)))
        for key, entry in entries.items():
            if key in AT_THE_TOP:
                raise self.wrong(entry.path, f"'{key}' belongs to the top of a file, not into a group")
        refers = {word: entries.pop(word) for word in REFERENCES if word in entries}
        branches = entries.pop(GROUPS, None)
        for key, entry in entries.items():
            self.note(key, entry.path)
        return _Part(entries, (branches,) if branches and branches.value else ()), refers

    def group(self, word: str, name: Any, path: Path, trail: tuple[str, ...]) -> list[_Part]:
        """What a named group stands for. A static one is exactly one alternative, and names what it says in tables."""
        static, varied = (self.named[kind] for kind in DEFINITIONS)
        known = {REFERENCES[1]: static, REFERENCES[2]: varied}.get(word, {**varied, **static})
        if not isinstance(name, str) or name not in known:
            raise self.wrong(path, f"no group {name!r} that '{word}' could name", nearest(str(name), known))
        if name in trail:
            raise self.wrong(path, f"the group '{name}' contains itself: {' > '.join((*trail, name))}")
        if len(trail) == MAX_DEPTH:
            raise self.wrong(path, f"more than {MAX_DEPTH} groups lie inside one another")
        body, fixed = known[name], known is not varied and name in static
        parts = self.resolve(body.value, body.path, (*trail, name))
        if fixed and len(parts) != 1:
            raise self.wrong(body.path, f"the static group '{name}' stands for {len(parts)} alternatives, not for one")
        if fixed:
            of = {**dict.fromkeys(parts[0].keys, name), **parts[0].group_of}
            return [replace(parts[0], groups=(*parts[0].groups, name), group_of=of)]
        return parts

    def leaves(self, parts: Iterable[_Part]) -> Iterator[_Part]:
        """Each part with one branch of every list that is waiting taken, and of those inside it."""
        for part in parts:
            if not part.waiting:
                yield part
                continue
            if len(part.waiting) > MAX_DEPTH:
                raise self.wrong(part.waiting[0].path, f"more than {MAX_DEPTH} lists of branches multiply")
            branches, rest = part.waiting[0], replace(part, waiting=())
            for i, branch in enumerate(_listed(branches.value)):
                at = (*branches.path, str(i)) if isinstance(branches.value, list) else branches.path
                found = self.resolve(self.mapping(branch, at), at, ())
                joined = [self.join(rest, sub, at) for sub in found]
                yield from self.leaves(replace(sub, waiting=sub.waiting + part.waiting[1:]) for sub in joined)

    # Values -----------------------------------------------------------------------------------------------------------------

    def values(self, entry: Entry) -> list[Any]:
        """The alternatives of a key."""
        value = entry.value
        if isinstance(value, Mapping) and "range" in value:
            return self.range(value, entry.path)
        values = value if isinstance(value, list) else [value]
        for i, item in enumerate(values):
            if isinstance(item, Mapping):
                below = (*entry.path, str(i)) if isinstance(value, list) else entry.path
                text = f"{_told(item)} is no value"
                raise self.wrong(
                    below, text, "In place of a list: {range: {...}} or {conditions: ..., options: [...]}."
                )
        return list(values)

    def range(self, given: Mapping[str, Any], path: Path) -> list[Any]:
        """Whole numbers from start to end; floats as start + i step, not rounded, as ReaLLM-Forge makes them."""
        form = self.mapping(given["range"], (*path, "range"))
        for key in (*(k for k in given if k != "range"), *(k for k in form if k not in ("start", "end", "step"))):
            raise self.wrong(path, f"'{key}' is no part of a range", "It is {range: {start: A, end: B, step: S}}.")
        start, end = form.get("start"), form.get("end")
        step = form.get("step", 1 if isinstance(start, int) else 0.1)
        whole = isinstance(start, int)
        for word, number in (("start", start), ("end", end), ("step", step)):
            good = isinstance(number, int if whole else (int, float)) and not isinstance(number, bool)
            if (
                not good
                or not isinstance(number, (int, float))
                or not abs(number) < 2**53
                or (word == "step" and not number)
            ):
                kind = "an integer, as start is" if whole else "a finite number"
                raise self.wrong(path, f"'{word}' of the range must be {kind}, not {_told(number)}")
        assert isinstance(start, (int, float)) and isinstance(end, (int, float))
        count = len(range(int(start), int(end) + 1, int(step))) if whole else round((end - start) / step) + 1
        if count > MAX_COMBINATIONS:
            raise self.wrong(path, f"the range has more than {MAX_COMBINATIONS:,} values")
        return [start + i * step for i in range(count)]

    def combinations(self, part: _Part, common: Mapping[str, Entry]) -> Iterator[Combination]:
        """Every combination of a branch: the product of its lists, then the conditions in their order, then what all share."""
        conditional = {k: e for k, e in part.keys.items() if isinstance(e.value, Mapping) and "conditions" in e.value}
        self.conditional |= conditional.keys()
        lists = {key: self.values(entry) for key, entry in part.keys.items() if key not in conditional}
        options = {key: self.options(entry) for key, entry in conditional.items()}
        for row in itertools.product(*lists.values()):
            rows: list[dict[str, Any]] = [dict(zip(lists, row, strict=True))]
            for key, entry in conditional.items():
                rows = [new for old in rows for new in self.added(old, key, entry, options[key])]
            for made in rows:
                yield self.whole(made, common, part)

    def options(self, entry: Entry) -> list[Any]:
        for key in entry.value:
            if key not in ("conditions", "options"):
                raise self.wrong(
                    entry.path, f"'{key}' is no part of a condition", nearest(key, ("conditions", "options"))
                )
        if "options" not in entry.value:
            raise self.wrong(entry.path, "the condition has no 'options': values to take where it holds")
        given, path = entry.value["options"], (*entry.path, "options")
        if isinstance(given, Mapping):
            raise self.wrong(path, f"options are a list of values, not {_told(given)}")
        return self.values(Entry(given, path))

    def added(self, row: dict[str, Any], key: str, entry: Entry, options: Sequence[Any]) -> list[dict[str, Any]]:
        return [{**row, key: option} for option in options] if self.holds(row, entry) else [row]

    def holds(self, row: Combination, entry: Entry) -> bool:
        """Whether the conditions of a key hold in what the branch has chosen so far; what `common_group` says is not asked."""
        conditions = entry.value["conditions"]
        if isinstance(conditions, Mapping):
            return all(row.get(key) == value for key, value in conditions.items())
        if not isinstance(conditions, list):
            raise self.wrong(entry.path, f"conditions are a mapping or a list of mappings, not {_told(conditions)}")
        clauses = [clause for clause in conditions if isinstance(clause, Mapping)]
        pairs = [clause for clause in conditions if not isinstance(clause, Mapping)]
        if any(not isinstance(p, list) or len(p) != 2 or not isinstance(p[0], str) for p in pairs) or not conditions:
            raise self.wrong(entry.path, f"{_told(conditions)} are no conditions", "Write {key: value, ...}.")
        if pairs:
            key, place = entry.path[-1], self.places.get(entry.path, "")
            now = (
                "taken as held where all of them do"
                if self.pairs_hold
                else "never held, as ReaLLM-Forge has them today"
            )
            advice = "" if self.pairs_hold else " Older ones took them as meant; import with --pairs-hold for that."
            self.remarks[f"'{key}' has its conditions as pairs, which are {now} ({place}).{advice}"] = None
        if self.pairs_hold and pairs:
            return not clauses and all(row.get(key) == value for key, value in pairs)
        return any(all(row.get(key) == value for key, value in clause.items()) for clause in clauses)

    def whole(self, row: Combination, common: Mapping[str, Entry], part: _Part) -> Combination:
        self.count += 1
        if self.count > MAX_COMBINATIONS:
            raise ConfigError(f"The file stands for more than {MAX_COMBINATIONS:,} combinations. Shorten its lists.")
        made = {key: entry.value for key, entry in common.items()}
        for key, value in row.items():
            if value == LEFT_OUT:
                continue
            if key in made and made[key] != value:
                text = f"{_told(value)}, but '{COMMON}' says {_told(made[key])} for every run"
                raise self.wrong(part.keys[key].path, text, "ReaLLM-Forge refuses it too; leave one out.")
            made[key] = value
        return made


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _told(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
