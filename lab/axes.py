"""Axes of a sweep: what a list or a form such as `{log: [1e-4, 1e-2], num: 5}` stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from core.options import Path, nearest

FORMS = ("range", "log", "linear", "named", "values")
MAX_VALUES = 1_000_000
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


class AxisError(ValueError):
    """An axis cannot be read; `path` is where below the sweep."""

    def __init__(self, text: str, path: Path = ()) -> None:
        super().__init__(text)
        self.path = path


@dataclass(frozen=True)
class Values:
    """What an axis lists: (label, value) pairs, and its condition."""

    pairs: tuple[tuple[Any, Any], ...]
    when: Mapping[Key, Any] = field(default_factory=dict)


def read_values(given: Any) -> Values:
    """The values of an axis: a list, or one form. Raises AxisError for anything else."""
    if isinstance(given, Mapping):
        if "values" in given:
            _only(given, ("values", "when"))
            when = given.get("when", {})
            if not isinstance(when, Mapping) or not isinstance(given["values"], list):
                raise AxisError("'values' takes a list and 'when' a mapping of key: value")
            return Values(read_values(given["values"]).pairs, when)
        pairs = _form(given)
    elif isinstance(given, list):
        pairs = [pair for item in given for pair in (_form(item) if is_form(item) else [(item, item)])]
    else:
        raise AxisError(f"{given!r} is no axis: write a list, or one of the forms {', '.join(FORMS)}")
    if not pairs:
        raise AxisError("the axis has no values")
    return Values(tuple(pairs))


def is_form(item: Any) -> bool:
    """Whether a list's element is a form and not a literal mapping."""
    if not isinstance(item, Mapping):
        return False
    keys = set(item)
    return keys in ({"range"}, {"log", "num"}, {"linear", "num"}, {"named"})


def _only(form: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in form:
        if key not in known:
            raise AxisError(f"unknown word '{key}'. {nearest(str(key), known)}".rstrip("."))


def _form(form: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    kind = next((k for k in FORMS if k in form), None)
    if kind is None:
        given = str(next(iter(form), ""))
        raise AxisError(
            f"a mapping as an axis is one of the forms {', '.join(FORMS)}. {nearest(given, FORMS)}".rstrip(".")
        )
    _only(form, (kind, "num") if kind in ("log", "linear") else (kind,))
    if kind == "named":
        if not isinstance(form["named"], Mapping):
            raise AxisError("'named' takes a mapping of label: value")
        return list(form["named"].items())
    values = _range(form["range"]) if kind == "range" else _spaced(kind, form)
    return [(v, v) for v in values]


def _numbers(given: Any, count: int, kind: str) -> list[int | float]:
    ok = isinstance(given, list) and len(given) == count
    if not ok or not all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in given):
        raise AxisError(f"'{kind}' takes {count} finite numbers, not {given!r}")
    return list(given)


def _range(given: Any) -> list[int | float]:
    numbers = _numbers(given, 3, "range")
    start, stop, step = (Decimal(str(x)) for x in numbers)
    if step == 0 or (stop - start) * step < 0:
        raise AxisError(f"a step of {numbers[2]} never leads from {numbers[0]} to {numbers[1]}")
    count = int((stop - start) / step) + 1
    if count > MAX_VALUES:
        raise AxisError(f"the range has {count:,} values; at most {MAX_VALUES:,} are allowed")
    whole = all(isinstance(x, int) for x in numbers)
    return [int(start + i * step) if whole else float(start + i * step) for i in range(count)]


def _spaced(kind: str, form: Mapping[str, Any]) -> list[int | float]:
    a, b = _numbers(form[kind], 2, kind)
    num = form.get("num")
    if not isinstance(num, int) or isinstance(num, bool) or not 1 <= num <= MAX_VALUES:
        raise AxisError(f"'{kind}' needs 'num', how many values: an integer from 1 to {MAX_VALUES:,}, not {num!r}")
    if kind == "log" and (a <= 0 or b <= 0):
        raise AxisError("'log' needs ends above 0")
    made: list[int | float] = []
    for i in range(num):
        r = i / (num - 1) if num > 1 else 0.0
        value = math.exp(math.log(a) + (math.log(b) - math.log(a)) * r) if kind == "log" else a + (b - a) * r
        value = a if i == 0 else b if i == num - 1 else float(f"{value:.6g}")
        whole = isinstance(a, int) and isinstance(b, int) and value == int(value)
        made.append(int(value) if whole else float(value))
    return made


def same(a: Any, b: Any) -> bool:
    """Equality of values in conditions: numbers by value, true is not 1, a variant's mapping equals its name."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, str):
        return a.get("variant") == b
    if isinstance(a, str) and isinstance(b, Mapping):
        return set(b) == {"variant"} and b["variant"] == a
    return bool(a == b)
