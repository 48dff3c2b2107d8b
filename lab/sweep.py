"""The `sweep:` section of a file as axes, cases and matches, and what the command line does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.compose import COMMAND_LINE, Setting, drop_nulls, put
from core.options import Mistake, Path, nearest
from lab.axes import Axis, AxisError, Choice, Key, read_values

WORDS = ("grid", "zip", "groups", "cases", "exclude", "baseline", "seeds", "objective", "max_runs")
LATER = ("search", "stop", "tune")
CASE_WORDS = ("use", "set", "grid", "zip", "groups")
MAX_RUNS = 1000
NO_SWEEP_KEYS = ("name", "plugins", "run", "sweep", "defaults")
Match = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep as read. `cases` maps a name to the tree it composes on and the axes it multiplies with."""

    axes: tuple[Axis, ...] = ()
    cases: Mapping[str, Case] = field(default_factory=dict)
    exclude: tuple[Match, ...] = ()
    baseline: Match | None = None
    seeds: int | tuple[int, ...] = 1
    objective: Mapping[str, Any] = field(default_factory=lambda: {"metric": "val_loss", "mode": "min"})
    max_runs: int = MAX_RUNS


@dataclass(frozen=True)
class Case:
    """A branch of the union: presets to compose, keys to set, axes of its own."""

    use: tuple[Mapping[str, Any], ...] = ()
    sets: Mapping[Key, Any] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()


class SweepReader:
    """Reads the `sweep:` section. Mistakes gather in `mistakes`. `preset(name)` composes a preset's tree."""

    def __init__(self, preset: Callable[[str], Mapping[str, Any]]) -> None:
        self.preset = preset
        self.mistakes: list[Mistake] = []

    def wrong(self, path: Path, text: str, advice: str = "") -> None:
        self.mistakes.append(Mistake(path, text, advice))

    def read(self, given: Any) -> Sweep:
        if not isinstance(given, Mapping):
            self.wrong(("sweep",), f"{given!r} is not a mapping")
            return Sweep()
        for word in given:
            if word in LATER:
                self.wrong(("sweep", word), "not available yet")
            elif word not in WORDS:
                self.wrong(("sweep", word), "unknown key", nearest(word, WORDS))
        axes = self.axes(given, ("sweep",))
        cases = self.cases(given.get("cases", {}), axes)
        return Sweep(
            axes,
            cases,
            tuple(self.matches(given.get("exclude", []), ("sweep", "exclude"))),
            next(iter(self.matches([given["baseline"]], ("sweep", "baseline"))), None)
            if given.get("baseline")
            else None,
            self.seeds(given.get("seeds", 1), axes),
            self.objective(given.get("objective", {})),
            self.max_runs(given.get("max_runs", MAX_RUNS)),
        )

    def axes(self, given: Mapping[str, Any], path: Path) -> tuple[Axis, ...]:
        """The axes of `grid`, `zip` and `groups` at one level."""
        made = [*self.grid(given.get("grid") or {}, (*path, "grid"))]
        blocks = given.get("zip") or []
        for i, block in enumerate([blocks] if isinstance(blocks, Mapping) else blocks):
            made += self.zip(block, (*path, "zip") if isinstance(blocks, Mapping) else (*path, "zip", str(i)))
        made += self.groups(given.get("groups") or {}, (*path, "groups"))
        self.once(made)
        return tuple(made)

    def once(self, axes: Sequence[Axis]) -> None:
        """One key in two axes is a mistake."""
        seen: dict[Key, Axis] = {}
        for axis in axes:
            for key in sorted(axis.keys):
                if key in seen:
                    self.wrong(axis.path, f"'{key}' stands in two axes, also in {'.'.join(seen[key].path)}")
                seen[key] = axis

    def mapping(self, given: Any, path: Path) -> Mapping[str, Any]:
        if isinstance(given, Mapping):
            return given
        self.wrong(path, f"{given!r} is not a mapping")
        return {}

    def key(self, key: str, path: Path) -> None:
        if key.split(".")[0] in NO_SWEEP_KEYS or not all(key.split(".")):
            self.wrong(path, f"'{key}' cannot be swept")

    def grid(self, given: Any, path: Path) -> Iterator[Axis]:
        for key, axis in self.mapping(given, path).items():
            below = (*path, key)
            self.key(key, below)
            try:
                values = read_values(axis)
            except AxisError as error:
                self.wrong(below, str(error))
                continue
            choices = tuple(Choice({key: value}, {key: label}, {key: below}) for label, value in values.pairs)
            yield Axis(key, choices, values.when, below)

    def zip(self, given: Any, path: Path) -> Iterator[Axis]:
        columns = list(self.grid(given, path))
        if len({len(axis.choices) for axis in columns}) > 1:
            lengths = ", ".join(f"{axis.name} has {len(axis.choices)}" for axis in columns)
            self.wrong(path, f"zipped axes need equal lengths: {lengths}")
        elif columns:
            if any(axis.when for axis in columns):
                self.wrong(path, "'when' is not possible inside zip")
            rows = zip(*(axis.choices for axis in columns), strict=True)
            choices = tuple(_joined(row) for row in rows)
            yield Axis("+".join(axis.name for axis in columns), choices, {}, path)

    def groups(self, given: Any, path: Path) -> Iterator[Axis]:
        for name, alternatives in self.mapping(given, path).items():
            below, choices = (*path, name), []
            for label, sets in self.mapping(alternatives, below).items():
                sets = self.mapping(sets if sets is not None else {}, (*below, label))
                for key in sets:
                    self.key(key, (*below, label, key))
                choices.append(Choice(dict(sets), {name: label}, {key: (*below, label, key) for key in sets}))
            if choices:
                yield Axis(name, tuple(choices), {}, below)
            else:
                self.wrong(below, "the group has no alternatives")

    def cases(self, given: Any, outer: tuple[Axis, ...]) -> dict[str, Case]:
        made = {}
        for name, case in self.mapping(given, ("sweep", "cases")).items():
            path: Path = ("sweep", "cases", name)
            case = self.mapping(case, path)
            for word in case:
                if word not in CASE_WORDS:
                    self.wrong((*path, word), "unknown key", nearest(word, CASE_WORDS))
            sets = dict(self.mapping(case.get("set") or {}, (*path, "set")))
            for key in sets:
                self.key(key, (*path, "set", key))
            axes = self.axes(case, path)
            self.once([*outer, *axes])
            for axis in axes:
                for key in sorted(axis.keys & set(sets)):
                    self.wrong((*path, "set", key), f"'{key}' is set here and also an axis of this case")
            made[name] = Case(tuple(self.uses(case.get("use"), (*path, "use"))), sets, axes)
        return made

    def uses(self, given: Any, path: Path) -> Iterator[Mapping[str, Any]]:
        for name in [given] if isinstance(given, str) else given or []:
            try:
                yield self.preset(str(name))
            except ValueError as error:
                self.wrong(path, str(error).rstrip("."))

    def matches(self, given: Any, path: Path) -> Iterator[Match]:
        for i, match in enumerate(given if isinstance(given, list) else [given]):
            if self.mapping(match, (*path, str(i))):
                yield match
            elif isinstance(match, Mapping):
                self.wrong((*path, str(i)), "an empty match would mean every run")

    def seeds(self, given: Any, axes: Sequence[Axis]) -> int | tuple[int, ...]:
        path = ("sweep", "seeds")
        if "train.seed" in {key for axis in axes for key in axis.keys} and given != 1:
            self.wrong(path, "'train.seed' is an axis too; use one of them")
        if isinstance(given, list):
            if (
                given
                and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in given)
                and len(set(given)) == len(given)
            ):
                return tuple(given)
            self.wrong(path, f"{given!r} is not a list of different integers, 0 or above")
        elif not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= 100_000:
            self.wrong(path, f"{given!r} is not a number of seeds (1 or more) or a list of seeds")
        else:
            return given
        return 1

    def objective(self, given: Any) -> Mapping[str, Any]:
        path = ("sweep", "objective")
        made = {"metric": "val_loss", "mode": "min", **self.mapping(given, path)}
        for key in made:
            if key not in ("metric", "mode"):
                self.wrong((*path, key), "unknown key", nearest(key, ("metric", "mode")))
        if made["mode"] not in ("min", "max") or not isinstance(made["metric"], str):
            self.wrong(path, f"{dict(made)!r} is not a metric's name and a mode", "The mode is min or max.")
        return made

    def max_runs(self, given: Any) -> int:
        if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
            return given
        self.wrong(("sweep", "max_runs"), f"{given!r} is not an integer of 1 or more")
        return MAX_RUNS


def _joined(row: Sequence[Choice]) -> Choice:
    """Several choices made together."""
    sets, labels, places = ({k: v for c in row for k, v in part(c).items()} for part in (
        lambda c: c.sets, lambda c: c.labels, lambda c: c.places))  # fmt: skip
    return Choice(sets, labels, places)


# The command line -----------------------------------------------------------------------------------------------------------


def apply_settings(
    tree: dict[str, Any], settings: Sequence[Setting]
) -> tuple[dict[str, Any], dict[Key, Any], dict[Path, str]]:
    """The tree after the command line: `key=value` pins (also inside every case), `key=a,b` adds or replaces an axis.

    Returns the tree, the pins, and the places of what was set.
    """
    pins: dict[Key, Any] = {}
    places: dict[Path, str] = {}
    for setting in settings:
        key = ".".join(setting.path)
        if setting.path[0] == "sweep" and not setting.axis:
            tree = put(tree, setting.path, setting.values[0])
            places[setting.path] = COMMAND_LINE
            continue
        tree = {**tree, "sweep": _without_axis(tree.get("sweep"), key)} if "sweep" in tree or setting.axis else tree
        if setting.axis:
            pins.pop(key, None)
            sweep = tree.get("sweep") or {}
            tree = {**tree, "sweep": {**sweep, "grid": {**(sweep.get("grid") or {}), key: list(setting.values)}}}
            places[("sweep", "grid", key)] = COMMAND_LINE
        else:
            tree = put(tree, setting.path, setting.values[0])
            pins[key] = setting.values[0]
        places[setting.path] = COMMAND_LINE
    return drop_nulls(tree), pins, places


def _without_axis(sweep: Any, key: Key) -> Any:
    """A sweep's section, and its cases, without the axis over `key`."""
    if not isinstance(sweep, Mapping):
        return {} if sweep is None else sweep
    made = dict(sweep)
    if isinstance(made.get("grid"), Mapping):
        made["grid"] = {k: v for k, v in made["grid"].items() if k != key}
    if isinstance(made.get("zip"), Mapping):
        made["zip"] = {k: v for k, v in made["zip"].items() if k != key}
    elif isinstance(made.get("zip"), list):
        made["zip"] = [{k: v for k, v in b.items() if k != key} if isinstance(b, Mapping) else b for b in made["zip"]]
    if isinstance(made.get("cases"), Mapping):
        made["cases"] = {name: _without_axis(case, key) for name, case in made["cases"].items()}
    return made
