"""Combinations of ReaLLM-Forge's options as settings of ours, with an account of everything that was not taken over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.yaml_files import ConfigError
from lab.importing.dialect import Combination, Exploration
from lab.importing.keys import MAPPED, UNITS, Settings, Unit, Unmapped, Values, read
from lab.importing.missing import is_bookkeeping, is_off

NOT_GIVEN = object()
SITE = "model.sites.final_norm"


@dataclass(frozen=True)
class Dropped:
    """An option that is not taken over: its values, where it stands, why, and how many combinations differ without it."""

    key: str
    values: tuple[Any, ...]
    place: str
    why: str
    different: int


@dataclass
class Translation:
    """`settings`: what the combinations say in our words; `kept`: the number of the settings of each combination, by its own;
    `left_out`: why others have none. `dropped` options have no counterpart, `bookkeeping` changes nothing that is learned,
    `always` holds here anyway. `sources`: which options made a setting; `given`: every option that the file names."""

    total: int
    given: set[str]
    settings: list[Settings] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    bookkeeping: list[str] = field(default_factory=list)
    always: list[str] = field(default_factory=list)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def refuse(self, why: Mapping[int, str]) -> None:
        """Leaves out the combinations of some settings, by number, for reasons."""
        self.left_out |= {number: why[i] for number, i in self.kept.items() if i in why}
        self.kept = {number: i for number, i in self.kept.items() if i not in why}

    def of(self, numbers: Iterable[int]) -> list[Settings]:
        """The different settings of some combinations."""
        return [self.settings[i] for i in dict.fromkeys(self.kept[n] for n in numbers if n in self.kept)]

    def made_of(self, key: str) -> tuple[str, ...]:
        """The options that a setting, or all inside a node, was made of."""
        inside = [some for some in self.sources if f"{some}.".startswith(f"{key}.")]
        return tuple(dict.fromkeys(option for some in inside for option in self.sources[some]))

    def settle(self) -> None:
        """Gives all that is kept the same keys: a node whose variant varies is one value, the last norm has a site only where it
        differs from the others."""
        used = list(dict.fromkeys(self.kept.values()))
        rows = [self.settings[i] for i in used]
        if all(row["model.norm"] == row[f"{SITE}.norm"] for row in rows):
            rows = [{key: value for key, value in row.items() if not key.startswith(f"{SITE}.")} for row in rows]
        self.settings, new = _nodes(rows), {old: i for i, old in enumerate(used)}
        self.kept = {number: new[i] for number, i in self.kept.items()}


@dataclass
class _Work:
    """Translates the values of one unit, each different set of them once. `wrong` gathers values that its train.py refuses."""

    unit: Unit
    corpora: Callable[[str], str]
    places: Mapping[str, str]
    wrong: dict[str, None]
    made: dict[str, Settings | Unmapped] = field(default_factory=dict)
    said: dict[str, None] = field(default_factory=dict)

    def __call__(self, combination: Combination) -> Settings | Unmapped:
        given = {key: combination[key] for key in self.unit.options if key in combination}
        text = json.dumps(given)
        if text not in self.made:
            self.made[text] = self._make(given, self.said)
        return self.made[text]

    def _make(self, given: Mapping[str, Any], said: dict[str, None]) -> Settings | Unmapped:
        values, before = {}, len(self.wrong)
        for key, (kind, usual) in self.unit.options.items():
            try:
                values[key] = usual if given.get(key) is None else read(kind, given[key])
            except ValueError as error:
                self.wrong[f"{key}: {error} ({self.places.get(key, '')})."] = None
        if len(self.wrong) > before:
            return {}
        asked = Values(values, [key for key in given if given[key] is not None], self.corpora)
        try:
            made = self.unit.make(asked)
        except Unmapped as error:
            return error
        said.update(dict.fromkeys(asked.said))
        return made

    def without(self, combination: Combination) -> Settings:
        """The settings with what has no counterpart at ReaLLM-Forge's defaults."""
        given = {key: combination[key] for key in self.unit.options if key in combination}
        while isinstance(made := self._make(given, {}), Unmapped):
            assert set(made.keys) & set(given), "defaults have counterparts"
            given = {key: value for key, value in given.items() if key not in made.keys}
        return made


def translate(exploration: Exploration, corpora: Callable[[str], str]) -> Translation:
    """The settings of every combination. `corpora(name)` says why a corpus cannot be used, '' where it can.

    Raises ConfigError, with file and line, for values that ReaLLM-Forge's train.py refuses.
    """
    combinations = exploration.combinations
    wrong: dict[str, None] = {}
    works = [_Work(unit, corpora, exploration.places, wrong) for unit in UNITS]
    alike: dict[str, list[int]] = {}  # combinations by what is translated of them
    for i, combination in enumerate(combinations):
        alike.setdefault(json.dumps({k: v for k, v in combination.items() if k in MAPPED}), []).append(i)
    made = {numbers[0]: [work(combinations[numbers[0]]) for work in works] for numbers in alike.values()}
    if wrong:
        raise ConfigError(*wrong)
    found = Translation(len(combinations), {key for combination in combinations for key in combination})
    dropping = [all(isinstance(row[u], Unmapped) for row in made.values()) for u in range(len(works))]
    if all(_fault(row, dropping) for row in made.values()):
        dropping = [True] * len(works)  # each lacks something: options are dropped in place of all combinations
    for numbers in alike.values():
        combination, row = combinations[numbers[0]], made[numbers[0]]
        if fault := _fault(row, dropping):
            why = f"{fault}{_at(fault.keys, exploration.places, combination)}"
            found.left_out |= dict.fromkeys(numbers, why)
            continue
        settings: Settings = {}
        for work, some in zip(works, row, strict=True):
            whole = work.without(combination) if isinstance(some, Unmapped) else some
            settings |= whole
            found.sources.update(dict.fromkeys(whole, tuple(work.unit.options)))
        found.kept |= dict.fromkeys(numbers, len(found.settings))
        found.settings.append(settings)
    found.remarks = [*exploration.remarks, *dict.fromkeys(text for work in works for text in work.said)]
    at_fault: dict[str, str] = {}
    for row in made.values():
        for some in (some for some, drop in zip(row, dropping, strict=True) if drop and isinstance(some, Unmapped)):
            at_fault |= {
                key: f"{some}; what runs has ReaLLM-Forge's default" for key in some.keys if key not in at_fault
            }
    _account(found, exploration, at_fault)
    return found


def _fault(row: Sequence[Settings | Unmapped], dropping: Sequence[bool]) -> Unmapped | None:
    """The first thing for which a combination is left out; none where the options at fault are dropped."""
    faults = [some for some, drop in zip(row, dropping, strict=True) if isinstance(some, Unmapped) and not drop]
    return faults[0] if faults else None


def _at(keys: Sequence[str], places: Mapping[str, str], combination: Combination) -> str:
    return next((f" ({key}, {places[key]})" for key in keys if key in combination and key in places), "")


def _account(found: Translation, exploration: Exploration, at_fault: Mapping[str, str]) -> None:
    """Says what became of every option that no setting was made of. `at_fault`: why an otherwise known one was dropped."""
    values: dict[str, dict[str, Any]] = {}
    marks: list[dict[str, int]] = []  # of each combination, a number for each key and its value
    for combination in exploration.combinations:
        texts = {key: json.dumps(value) for key, value in combination.items()}
        marks.append({key: hash((key, text)) for key, text in texts.items()})
        for key, text in texts.items():
            values.setdefault(key, {})[text] = combination[key]
    sums = [sum(mark.values()) for mark in marks]
    for key in exploration.places:
        if key not in values or (key in MAPPED and key not in at_fault):
            continue
        if is_bookkeeping(key):
            found.bookkeeping.append(key)
        elif key not in at_fault and all(is_off(key, value) for value in values[key].values()):
            found.always.append(key)
        else:
            why = at_fault.get(key, "there is nothing of the kind here")
            left = {whole - mark.get(key, 0) for whole, mark in zip(sums, marks, strict=True)}
            found.dropped.append(Dropped(key, tuple(values[key].values()), exploration.places[key], why, len(left)))


def _nodes(rows: list[Settings]) -> list[Settings]:
    """The settings with each node whose variant varies as one value, which holds what does not vary on its own in all of them."""
    for key in [key for key in rows[0] if key.endswith(".variant")]:
        if len({row[key] for row in rows}) == 1:
            continue
        node = key.removesuffix(".variant")
        inside = [k for k in dict.fromkeys(k for row in rows for k in row) if k.startswith(f"{node}.")]
        apart = [
            k for k in inside if all(k in r for r in rows) and len({json.dumps(r[k]) for r in rows}) > 1 and k != key
        ]
        rows = [_folded(row, node, [k for k in inside if k in row and k not in apart]) for row in rows]
    return rows


def _folded(row: Settings, node: str, inside: Sequence[str]) -> Settings:
    value = {key.removeprefix(f"{node}."): row[key] for key in inside}
    made: Settings = {}
    for key, some in row.items():
        if key in inside:
            made.setdefault(node, value["variant"] if len(value) == 1 else value)
        else:
            made[key] = some
    return made


def tree_of(settings: Settings) -> dict[str, Any]:
    """Settings by dotted key as a nested mapping; a node that is one value with those inside it that vary."""
    tree: dict[str, Any] = {}
    for key in sorted(settings, key=lambda k: k.count(".")):
        *above, last = key.split(".")
        at = tree
        for word in above:
            below = at.setdefault(word, {})
            if isinstance(below, str):
                below = at[word] = {"variant": below}
            at[word] = below = dict(below)
            at = below
        at[last] = settings[key]
    return tree
