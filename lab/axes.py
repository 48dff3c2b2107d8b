"""Axes of a sweep: what a list or a form such as `{log: [1e-4, 1e-2], num: 5}` stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from core.options import LARGEST, Path, is_off, nearest

FORMS = ("range", "log", "linear", "named", "values")
MAX_VALUES = 100_000  # of all axes together
Key = str  # a dotted key of the configuration


@dataclass(frozen=True)
class Choice:
    """One alternative of an axis: the keys it sets, and what names and tables call it."""

    sets: Mapping[Key, Any]
    labels: Mapping[str, Any]
    places: Mapping[Key, Path]  # where each key was written


@dataclass(frozen=True)
class Axis:
    """Alternatives of which each run takes one. `when`: only where these keys have these values; elsewhere nothing is set."""

    name: str
    choices: tuple[Choice, ...]
    when: Mapping[Key, Any] = field(default_factory=dict)
    path: Path = ()

    @property
    def keys(self) -> set[Key]:
        return {key for choice in self.choices for key in choice.sets}

    @property
    def labels(self) -> set[str]:
        """What names and tables call its columns: the keys, or the group's name."""
        return {label for choice in self.choices for label in choice.labels}


class SweepError(ValueError):
    """A part of a sweep cannot be read."""

    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.advice = advice


@dataclass(frozen=True)
class Values:
    """What an axis lists: (label, value) pairs, and its condition."""

    pairs: tuple[tuple[Any, Any], ...]
    when: Mapping[Key, Any] = field(default_factory=dict)


def read_values(given: Any) -> Values:
    """The values of an axis: a list of literal values, or one form. Raises SweepError for anything else."""
    if isinstance(given, list):
        values = Values(tuple((item, item) for item in given))
    elif isinstance(given, Mapping):
        values = _form(given)
    else:
        raise SweepError(f"{given!r} is no axis", f"Write a list, or one of the forms {', '.join(FORMS)}.")
    if not values.pairs:
        raise SweepError("the axis has no values")
    return values


def is_form(item: Any) -> bool:
    """Whether a value looks like a form. Inside a list it is a literal mapping, which is rarely what was meant."""
    return isinstance(item, Mapping) and any(set(item) - {"when"} == set(_words(kind)) for kind in FORMS)


def _words(kind: str) -> tuple[str, ...]:
    return (kind, "num") if kind in ("log", "linear") else (kind,)


def _form(form: Mapping[str, Any]) -> Values:
    kind = next((k for k in FORMS if k in form), None)
    if kind is None:
        raise SweepError("a mapping as an axis is one of the forms", nearest(next(iter(form), ""), FORMS))
    known = (*_words(kind), *(("when",) if kind == "values" else ()))
    for key in form:
        if key not in known:
            raise SweepError(f"'{kind}' does not go with '{key}'", nearest(key, known))
    if kind == "named":
        if not isinstance(form["named"], Mapping):
            raise SweepError("'named' takes a mapping of label: value")
        return Values(tuple(form["named"].items()))
    if kind == "values":
        when = form.get("when", {})
        if not isinstance(form["values"], list) or not isinstance(when, Mapping) or ("when" in form and not when):
            raise SweepError("'values' takes a list and 'when' a mapping of key: value")
        return Values(tuple((item, item) for item in form["values"]), when)
    numbers = _range(form["range"]) if kind == "range" else _spaced(kind, form)
    return Values(tuple((v, v) for v in numbers))


def _numbers(given: Any, count: int, kind: str) -> list[int | float]:
    ok = isinstance(given, list) and len(given) == count
    if not ok or not all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < LARGEST for x in given):
        raise SweepError(f"'{kind}' takes {count} finite numbers, not {given!r:.200}")
    return list(given)


def _range(given: Any) -> list[int | float]:
    numbers = _numbers(given, 3, "range")
    start, stop, step = (Decimal(str(x)) for x in numbers)
    if step == 0 or (stop - start) * step < 0:
        raise SweepError(f"a step of {numbers[2]} never leads from {numbers[0]} to {numbers[1]}")
    count = int((stop - start) / step) + 1
    if count > MAX_VALUES:
        raise SweepError(f"the range has {float(count):.3g} values; at most {MAX_VALUES:,} are allowed")
    whole = all(isinstance(x, int) for x in numbers)
    return [int(start + i * step) if whole else float(start + i * step) for i in range(count)]


def _spaced(kind: str, form: Mapping[str, Any]) -> list[int | float]:
    a, b = _numbers(form[kind], 2, kind)
    num = form.get("num")
    if not isinstance(num, int) or isinstance(num, bool) or not 1 <= num <= MAX_VALUES:
        raise SweepError(f"'{kind}' needs 'num', how many values: an integer from 1 to {MAX_VALUES:,}, not {num!r}")
    if kind == "log" and (a <= 0 or b <= 0):
        raise SweepError("'log' needs ends above 0")
    made: list[int | float] = []
    for i in range(num):
        r = i / (num - 1) if num > 1 else 0.0
        value = math.exp(math.log(a) + (math.log(b) - math.log(a)) * r) if kind == "log" else a + (b - a) * r
        value = a if i == 0 else b if i == num - 1 else float(f"{value:.6g}")
        whole = isinstance(a, int) and isinstance(b, int) and value == int(value)
        made.append(int(value) if whole else float(value))
    return made


def same(given: Any, wanted: Any) -> bool:
    """Whether a value meets a condition: numbers by value, true is not 1, a variant's mapping equals its name, off is off by any
    of its names (but null is not false), and of a mapping only the keys that are wanted count."""
    if (is_off(given) or is_off(wanted)) and isinstance(given, str) + isinstance(wanted, str) > 0:
        return (is_off(given) or given == "none") and (is_off(wanted) or wanted == "none")
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, Mapping) and isinstance(wanted, str):
        return given.get("variant") == wanted
    if isinstance(given, str) and isinstance(wanted, Mapping):
        given = {"variant": given}
    if isinstance(given, Mapping) and isinstance(wanted, Mapping):
        return all(key in given and same(given[key], value) for key, value in wanted.items())
    return bool(given == wanted)
