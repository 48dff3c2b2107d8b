"""Like for like, pure: in what cells differ beyond what the sweep asked for, as sentences.

A sweep over `model.norm` asks for other norms. If the cells then have other numbers of parameters too, a difference in loss may be
due to that. What each cell's profile says (lab/measure.py) is compared with the baseline's, or the first cell's without one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.tracking import label
from lab.reporting.numbers import clean, percent, short
from lab.reporting.numbers import magnitude as size

SAME_SIZE = 0.01  # relative difference of counts that is not worth a sentence
SAME_STD = 0.05  # and of deviations, beside what chance explains
SHARE = 0.005  # difference of shares
ABOUT = 0.1  # relative difference of measured ratios that one sentence tells of
NAMED = 3  # places that a sentence names
Value = Any


@dataclass(frozen=True)
class Case:
    """A cell, what the sweep changed in it, and its profile."""

    cell: str
    changed: Mapping[str, Any]
    baseline: bool
    profile: Mapping[str, Any]


@dataclass(frozen=True)
class Aspect:
    """Something in which cells may differ.

    value: of a profile; None where it has no such thing, which is compared with nothing. same: whether two values are alike. asked:
    whether a swept key, with all the values that it takes, asks for such a difference. told: of a value and the reference's; begins
    with a verb. place: what it is about, in words, where several aspects share a sentence.
    """

    value: Callable[[Mapping[str, Any]], Value]
    same: Callable[[Value, Value], bool]
    asked: Callable[[str, Sequence[Any]], bool]
    told: Callable[[Value, Value, str], str]
    place: Callable[[Value, Value], str] | None = None


def differences(cases: Sequence[Case]) -> list[str]:
    """The sentences; none where the cells are alike, or differ as they were asked to."""
    if len(cases) < 2:
        return []
    reference = next((case for case in cases if case.baseline), cases[0])
    of = "the baseline" if reference.baseline else f"'{short(reference.cell, 60)}'"
    made: list[_Said] = []
    for aspect in aspects(cases):
        mine = aspect.value(reference.profile)
        for who, value in _who(cases, reference, aspect):
            said = _Said(who, aspect.told(value, mine, of), _ratio(value, mine) if aspect.told is _told_std else None)
            found = next((other for other in made if other.alike(said)), None)
            if found is None:
                made.append(said)
            (found or said).places += [aspect.place(value, mine)] if aspect.place else []
    return [f"{said.who} {said.verb}{said.named}." for said in made]


@dataclass
class _Said:
    """A sentence that is being made: who, what, and where."""

    who: str
    verb: str
    ratio: float | None
    places: list[str] = field(default_factory=list)

    def alike(self, other: _Said) -> bool:
        """Whether one sentence does for both: of measured ratios it says 'about'."""
        if self.who != other.who:
            return False
        if self.ratio and other.ratio:
            return math.isclose(self.ratio, other.ratio, rel_tol=ABOUT)
        return self.verb == other.verb

    @property
    def named(self) -> str:
        more = f" and {len(self.places) - NAMED} more" if len(self.places) > NAMED else ""
        return f": {', '.join(self.places[:NAMED])}{more}" if self.places else ""


# Who differs ----------------------------------------------------------------------------------------------------------------


def _who(cases: Sequence[Case], reference: Case, aspect: Aspect) -> Iterator[tuple[str, Value]]:
    """Those that differ from the reference without having been asked to, in words, and the value that they have.

    Where the value follows from one swept key alone, the key's values are named; else the cells are.
    """
    mine = aspect.value(reference.profile)
    if mine is None:
        return
    keys = list(dict.fromkeys(key for case in cases for key in case.changed))
    values = {key: [case.changed[key] for case in cases if key in case.changed] for key in keys}
    others = [case for case in cases if _differs(aspect, case, mine)]
    if not others:
        return
    explained = _explaining(cases, aspect, keys)
    if explained is not None:
        if not aspect.asked(explained, values[explained]):
            yield from _by_key(others, aspect, explained)
        return
    if any(aspect.asked(key, values[key]) for key in keys):
        return  # no one can say which part was not
    for group in _alike(others, aspect):
        words = f"Cells such as '{short(group[0].cell, 60)}' ({len(group):,} of {len(cases):,})"
        yield words, aspect.value(group[0].profile)


def _differs(aspect: Aspect, case: Case, mine: Value) -> bool:
    value = aspect.value(case.profile)
    return value is not None and not aspect.same(value, mine)


def _explaining(cases: Sequence[Case], aspect: Aspect, keys: Sequence[str]) -> str | None:
    """A swept key that decides the value: cells that have it alike have the value alike.

    Of several, one that is about the model, and one with few values: a key with another value in each cell decides everything.
    """

    def last(key: str) -> tuple[bool, int]:
        return _words(key)[0] not in ("model", "case", "slices"), len({_shown(case.changed.get(key)) for case in cases})

    for key in sorted(keys, key=last):
        groups: dict[str, list[Value]] = {}
        for case in cases:
            if (value := aspect.value(case.profile)) is not None:
                groups.setdefault(_shown(case.changed.get(key)), []).append(value)
        if all(aspect.same(value, some[0]) for some in groups.values() for value in some):
            return key
    return None


def _by_key(others: Sequence[Case], aspect: Aspect, key: str) -> Iterator[tuple[str, Value]]:
    """Cells by their value of a key; those whose differences are alike together."""
    for group in _alike(others, aspect):
        every = (f"{key}={label(case.changed[key])}" if key in case.changed else f"no {key}" for case in group)
        names = list(dict.fromkeys(short(name, 60) for name in every))
        more = f" and {len(names) - NAMED} more values" if len(names) > NAMED else ""
        yield f"Cells with {', '.join(names[:NAMED])}{more}", aspect.value(group[0].profile)


def _alike(cases: Sequence[Case], aspect: Aspect) -> list[list[Case]]:
    groups: list[list[Case]] = []
    for case in cases:
        value = aspect.value(case.profile)
        found = next((group for group in groups if aspect.same(aspect.value(group[0].profile), value)), None)
        if found is None:
            groups.append([case])
        else:
            found.append(case)
    return groups


def _shown(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# In what --------------------------------------------------------------------------------------------------------------------


def aspects(cases: Sequence[Case]) -> Iterator[Aspect]:
    """All that is compared."""
    yield Aspect(_field("parameters"), _same_size, _asks_size, _times("parameters"))
    yield Aspect(_trained, _same_share, _asks_training, _told_trained)
    yield Aspect(_field("flops_per_token"), _same_size, _asks_size, _times("FLOPs per token"))
    yield Aspect(_field("optimizers"), lambda a, b: a == b, _asks_optimizer, _told_optimizers)
    yield Aspect(_field("decayed"), _same_share, _asks_decay, _told_decay)
    for place in dict.fromkeys(place for case in cases for place in case.profile["residual"]):
        yield Aspect(_within("residual", place), _close, _asks_residual, _told_residual, _place(place))
    for place in dict.fromkeys(place for case in cases for place in case.profile["std"]):
        yield Aspect(_within("std", place), _same_std, _asks_init, _told_std, _place_std(place))


def _field(name: str) -> Callable[[Mapping[str, Any]], Value]:
    return lambda profile: profile[name]


def _within(name: str, place: str) -> Callable[[Mapping[str, Any]], Value]:
    return lambda profile: profile[name].get(place)


def _trained(profile: Mapping[str, Any]) -> float:
    """The share of the parameters that is trained."""
    share: float = profile["trainable_parameters"] / max(1, profile["parameters"])
    return share


def _same_size(a: float, b: float) -> bool:
    return abs(a - b) <= SAME_SIZE * max(a, b)


def _same_share(a: float, b: float) -> bool:
    return abs(a - b) <= SHARE


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _same_std(a: Sequence[float], b: Sequence[float]) -> bool:
    """Deviations with their counts; one of n values is known to within 1/sqrt(2 n), and four of these are chance."""
    chance = 4 * math.hypot(*(1 / math.sqrt(2 * max(1, n)) for _, n in (a, b)))
    return abs(a[0] - b[0]) <= max(SAME_STD, chance) * max(a[0], b[0])


# What was asked -------------------------------------------------------------------------------------------------------------


def _words(key: str) -> list[str]:
    return key.split(".")


def _counts(values: Sequence[Any]) -> bool:
    return any(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _asks_size(key: str, values: Sequence[Any]) -> bool:
    """A number of something in the model, the rank of an adapter, or other data."""
    words = _words(key)
    return (
        words[0] == "data" or "lora" in words or (words[0] == "model" and _counts(values)) or words[-1] == "expansion"
    )


def _asks_training(key: str, values: Sequence[Any]) -> bool:
    return bool({"frozen", "lora"} & set(_words(key)))


def _asks_optimizer(key: str, values: Sequence[Any]) -> bool:
    """More layers have more slices."""
    words = _words(key)
    return "optimizer" in words or _asks_training(key, values) or _asks_size(key, values)


def _asks_decay(key: str, values: Sequence[Any]) -> bool:
    return "weight_decay" in _words(key) or _asks_optimizer(key, values)


def _asks_init(key: str, values: Sequence[Any]) -> bool:
    """Widths count: some distributions follow the fans, and layers scale the residual projections."""
    words = _words(key)
    return bool({"init", "naive_init"} & set(words)) or (words[0] == "model" and _counts(values))


def _asks_residual(key: str, values: Sequence[Any]) -> bool:
    return "init" in _words(key) or (_words(key)[-1] == "n_layer")


# In words -------------------------------------------------------------------------------------------------------------------


def _times(noun: str) -> Callable[[Value, Value, str], str]:
    def told(value: Value, mine: Value, of: str) -> str:
        return f"have {value / max(1, mine):.2f} times the {noun} of {of} ({size(value)} against {size(mine)})"

    return told


def _told_trained(value: float, mine: float, of: str) -> str:
    return f"train {percent(value)} of their parameters, and {of} {percent(mine)}"


def _told_optimizers(value: Mapping[str, int], mine: Mapping[str, int], of: str) -> str:
    def listed(some: Mapping[str, int]) -> str:
        return ", ".join(f"{count} by {clean(name)}" for name, count in sorted(some.items())) or "none"

    return f"have other slices by optimizer ({listed(value)}) than {of} ({listed(mine)})"


def _told_decay(value: float, mine: float, of: str) -> str:
    return f"have weight decay on {percent(value)} of what is trained, and {of} on {percent(mine)}"


def _told_residual(value: float, mine: float, of: str) -> str:
    return f"scale what writes to the residual stream by {value:.3g}, and {of} by {mine:.3g}"


def _told_std(value: Sequence[float], mine: Sequence[float], of: str) -> str:
    ratio = _ratio(value, mine)
    if ratio is None:
        return f"begin with weights that vary, and {of} with equal ones"
    return f"begin with effective weights of about {ratio:.2g} times the deviation of {of}"


def _ratio(value: Sequence[float], mine: Sequence[float]) -> float | None:
    return value[0] / mine[0] if mine[0] else None


def _place(place: str) -> Callable[[Value, Value], str]:
    return lambda value, mine: place


def _place_std(place: str) -> Callable[[Value, Value], str]:
    return lambda value, mine: f"{place} ({value[0]:.2g} against {mine[0]:.2g})"
