"""The `sweep:` section of a file as axes, cases and matches, and what the command line does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.options import Mistake, Path, nearest
from core.trees import COMMAND_LINE, Composed, Setting, drop_nulls, get, leaves, names_variant, put
from lab.axes import MAX_VALUES, Axis, Choice, Key, SweepError, read_values
from lab.searching import Search, Stop, read_search, read_stop, read_tune

CHOOSING = ("search", "stop", "tune")
WORDS = ("grid", "zip", "groups", "cases", "exclude", "baseline", "seeds", "objective", "max_runs", *CHOOSING)
CASE_WORDS = ("use", "set", "grid", "zip", "groups")
MAX_RUNS = 1000
MAX_SEEDS = 100_000
NO_SWEEP_KEYS = ("name", "plugins", "run", "runner", "sweep", "defaults")  # they belong to the whole sweep
SEED = "train.seed"
METRICS = ("val_loss", "best_val_loss", "train_loss", "tokens_per_second", "seconds", "peak_memory_bytes", "parameters")
Match = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep as read. `exclude` and `baseline` are lists of partial matches of which any may hold."""

    axes: tuple[Axis, ...] = ()
    cases: Mapping[str, Case] = field(default_factory=dict)
    exclude: tuple[Match, ...] = ()
    baseline: tuple[Match, ...] = ()
    seeds: int | tuple[int, ...] = 1
    objective: Mapping[str, Any] = field(default_factory=lambda: {"metric": "val_loss", "mode": "min"})
    max_runs: int = MAX_RUNS
    tune: tuple[Key, ...] = ()
    search: Search | None = None
    stop: Stop | None = None


@dataclass(frozen=True)
class Case:
    """A branch of the union: presets to compose, keys to set, axes of its own. `places`: where each key of both was written."""

    use: tuple[Mapping[str, Any], ...] = ()
    sets: Mapping[Key, Any] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()
    places: Mapping[Key, Path] = field(default_factory=dict)


class SweepReader:
    """Reads the `sweep:` section. Mistakes gather in `mistakes`. `preset(name)` composes a preset; `places` says where the keys of
    presets were written, under the path of the `use` that names them."""

    def __init__(self, preset: Callable[[str], Composed]) -> None:
        self.preset = preset
        self.mistakes: list[Mistake] = []
        self.places: dict[Path, str] = {}
        self.packages: set[str] = set()
        self.values = 0  # of all axes

    def wrong(self, path: Path, text: str, advice: str = "") -> None:
        self.mistakes.append(Mistake(path, text, advice))

    def read(self, given: Any) -> Sweep:
        if not isinstance(given, Mapping):
            self.wrong(("sweep",), f"{given!r} is not a mapping")
            return Sweep()
        for word in given:
            if word not in WORDS:
                self.wrong(("sweep", word), "unknown key", nearest(word, WORDS))
        search = read_search(given.get("search"), self.key, self.wrong)
        searched = [dimension.axis for dimension in search.over] if search else []
        axes = self.axes(given, ("sweep",))
        self.once([*axes, *searched])
        cases = self.cases(given.get("cases"), [*axes, *searched])
        every = [*axes, *(axis for case in cases.values() for axis in case.axes)]
        objective = self.objective(given.get("objective", {}))
        return Sweep(
            axes,
            cases,
            tuple(self.matches(given.get("exclude"), ("sweep", "exclude"))),
            tuple(self.matches(given.get("baseline"), ("sweep", "baseline"))),
            self.seeds(given.get("seeds", 1), every),
            objective,
            self.max_runs(given.get("max_runs", MAX_RUNS)),
            read_tune(given.get("tune"), {label for axis in [*every, *searched] for label in axis.labels}, self.wrong),
            search,
            read_stop(given.get("stop"), objective["metric"], self.wrong),
        )

    def axes(self, given: Mapping[str, Any], path: Path) -> tuple[Axis, ...]:
        """The axes of `grid`, `zip` and `groups` at one level."""
        made = [*self.grid(given.get("grid"), (*path, "grid"))]
        blocks = given.get("zip")
        if isinstance(blocks, list):
            for i, block in enumerate(blocks):
                made += self.zip(block, (*path, "zip", str(i)))
        else:
            made += self.zip(blocks, (*path, "zip"))
        made += self.groups(given.get("groups"), (*path, "groups"))
        self.once(made)
        return tuple(made)

    def once(self, axes: Sequence[Axis]) -> None:
        """One key, or one label, in two axes is a mistake."""
        seen: dict[Key, Axis] = {}
        for axis in axes:
            for key in sorted(axis.keys | axis.labels):
                if key in seen:
                    self.wrong(axis.path, f"'{key}' stands in two axes, also in {'.'.join(seen[key].path)}")
                seen[key] = axis

    def mapping(self, given: Any, path: Path) -> Mapping[str, Any]:
        """A mapping; null is an empty one."""
        if given is None or isinstance(given, Mapping):
            return given or {}
        self.wrong(path, f"{given!r} is not a mapping")
        return {}

    def sets(self, given: Any, path: Path) -> tuple[dict[Key, Any], dict[Key, Path]]:
        """What a case or an alternative sets, one entry for each single option, and where each was written."""
        made, places = {}, {}
        for key, value in self.mapping(given, path).items():
            if not self.key(key, (*path, key)):
                continue
            for below, leaf in _flat(value):
                made[".".join((key, *below))] = leaf
                places[".".join((key, *below))] = (*path, key, *below)
        return made, places

    def key(self, key: str, path: Path) -> bool:
        """Whether a key can be swept; a mistake is noted where it cannot."""
        head, *rest = key.split(".")
        if head in NO_SWEEP_KEYS:
            self.wrong(path, f"'{key}' belongs to the whole sweep and cannot differ between its runs")
        elif not all((head, *rest)):
            self.wrong(path, f"'{key}' is no key of the configuration")
        return head not in NO_SWEEP_KEYS and all((head, *rest))

    def grid(self, given: Any, path: Path) -> Iterator[Axis]:
        for key, axis in self.mapping(given, path).items():
            below = (*path, key)
            if axis is None or not self.key(key, below) or self.values > MAX_VALUES:
                continue
            try:
                values = read_values(axis)
                self.values += len(values.pairs)
                if self.values > MAX_VALUES:
                    raise SweepError(f"with this axis there are more than {MAX_VALUES:,} values", "Shorten some axes.")
            except SweepError as error:
                self.wrong(below, str(error), error.advice)
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
            if alternatives is None:
                continue
            if name == "case":
                self.wrong(below, "'case' is what cases are called by; give the group another name")
            for label, given_sets in self.mapping(alternatives, below).items():
                if given_sets is None:
                    self.wrong((*below, label), "null says nothing", "Write {} for an alternative that sets nothing.")
                sets, places = self.sets(given_sets, (*below, label))
                choices.append(Choice(sets, {name: label}, places))
            if choices:
                yield Axis(name, tuple(choices), {}, below)
            else:
                self.wrong(below, "the group has no alternatives")

    def cases(self, given: Any, outer: Sequence[Axis]) -> dict[str, Case]:
        made = {}
        for name, case in self.mapping(given, ("sweep", "cases")).items():
            path: Path = ("sweep", "cases", name)
            case = self.mapping(case, path)
            for word in case:
                if word not in CASE_WORDS:
                    self.wrong((*path, word), "unknown key", nearest(word, CASE_WORDS))
            sets, set_places = self.sets(case.get("set"), (*path, "set"))
            axes = self.axes(case, path)
            self.once([*outer, *axes])
            for axis in axes:
                for key in sorted(axis.keys & set(sets)):
                    self.wrong(set_places[key], f"'{key}' is set here and also an axis of this case")
            trees, places = self.uses(case.get("use"), (*path, "use"))
            made[name] = Case(trees, sets, axes, {**places, **set_places})
        return made

    def uses(self, given: Any, path: Path) -> tuple[tuple[Mapping[str, Any], ...], dict[Key, Path]]:
        """The trees of the presets that a case uses, and where their keys were written."""
        names = given if isinstance(given, list) else [] if given is None else [given]
        trees, places = [], {}
        for name in names:
            try:
                made = self.preset(name) if isinstance(name, str) else None
            except (ValueError, OSError) as error:
                self.wrong(path, str(error).rstrip("."), getattr(error, "advice", ""))
                continue
            if made is None:
                self.wrong(path, f"{name!r} is no preset's name")
                continue
            for key in made.tree:
                if key in NO_SWEEP_KEYS:
                    self.wrong(path, f"'{name}' says '{key}', which belongs to the whole sweep and not to a case")
            trees.append(made.tree)
            self.packages |= made.packages
            self.places.update({(*path, *below): place for below, place in made.places.items()})
            places.update({".".join(below): (*path, *below) for below, _ in leaves(made.tree)})
        return tuple(trees), places

    def matches(self, given: Any, path: Path) -> Iterator[Match]:
        for i, match in enumerate(given if isinstance(given, list) else [] if given is None else [given]):
            below = (*path, str(i)) if isinstance(given, list) else path
            if not isinstance(match, Mapping):
                self.wrong(below, f"{match!r} is not a mapping", f"Write key: value, such as {{case: {match}}}.")
            elif match:
                yield match
            else:
                self.wrong(below, "an empty match would mean every run")

    def seeds(self, given: Any, axes: Sequence[Axis]) -> int | tuple[int, ...]:
        path = ("sweep", "seeds")
        if SEED in {key for axis in axes for key in axis.keys} and given != 1:
            self.wrong(path, f"'{SEED}' is an axis too; use one of them")
        if isinstance(given, list):
            whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in given)
            if given and whole and len(set(given)) == len(given):
                return tuple(given)
            self.wrong(path, f"{given!r} is not a list of different integers, 0 or above")
        elif not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MAX_SEEDS:
            self.wrong(path, f"{given!r} is not a number of seeds, 1 to {MAX_SEEDS:,}, or a list of seeds")
        else:
            return given
        return 1

    def objective(self, given: Any) -> Mapping[str, Any]:
        path = ("sweep", "objective")
        if given is None:
            self.wrong(path, "null (off) is not possible here")
        made = {"metric": "val_loss", "mode": "min", **self.mapping(given, path)}
        for key in made:
            if key not in ("metric", "mode"):
                self.wrong((*path, key), "unknown key", nearest(key, ("metric", "mode")))
        if made["mode"] not in ("min", "max"):
            self.wrong((*path, "mode"), f"{made['mode']!r} is not allowed", nearest(str(made["mode"]), ("min", "max")))
        if made["metric"] not in METRICS:
            self.wrong((*path, "metric"), f"no metric {made['metric']!r}", nearest(str(made["metric"]), METRICS))
        return made

    def max_runs(self, given: Any) -> int:
        if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
            return given
        self.wrong(("sweep", "max_runs"), f"{given!r} is not an integer of 1 or more")
        return MAX_RUNS


def _flat(value: Any) -> list[tuple[Path, Any]]:
    """A mapping as its single values with their paths; anything else, and one with names that hold dots, as it is."""
    if not isinstance(value, Mapping) or not value or names_variant(value):
        return [((), value)]
    found = list(leaves(value))
    return [((), value)] if any("." in word for below, _ in found for word in below) else found


def _joined(row: Sequence[Choice]) -> Choice:
    """Several choices made together."""
    sets, labels, places = ({k: v for c in row for k, v in part(c).items()} for part in (
        lambda c: c.sets, lambda c: c.labels, lambda c: c.places))  # fmt: skip
    return Choice(sets, labels, places)


# The command line -----------------------------------------------------------------------------------------------------------


def apply_settings(
    tree: dict[str, Any], settings: Sequence[Setting]
) -> tuple[dict[str, Any], dict[Key, Any], dict[Path, str]]:
    """The tree after the command line: `key=value` sets, also over axes and in cases; `key=a,b` adds or replaces an axis.

    Returns the tree, what is pinned in every run, and the places of what was set.
    """
    pins: dict[Key, Any] = {}
    places: dict[Path, str] = {}
    for setting in settings:
        places[setting.path] = COMMAND_LINE
        if setting.path[0] == "sweep" and not setting.axis:
            tree = put(tree, setting.path, setting.values[0])
            continue
        for below, value in [((), None)] if setting.axis else _flat(setting.values[0]):
            path = (*setting.path, *below)
            key = ".".join(path)
            pins.pop(key, None)
            if "sweep" in tree:
                tree = {**tree, "sweep": _without(tree["sweep"], key, setting.axis)}
            if setting.axis:
                tree = _with_axis(tree, key, list(setting.values))
                places[("sweep", "grid", key)] = COMMAND_LINE
            else:
                tree, pins[key] = put(tree, path, value), value
    return dict(drop_nulls(tree)), pins, places


def _with_axis(tree: dict[str, Any], key: Key, values: list[Any]) -> dict[str, Any]:
    sweep = tree.get("sweep") or {}
    grid = get(sweep, ("grid",)) or {}
    if not isinstance(sweep, Mapping) or not isinstance(grid, Mapping):
        return tree  # it is refused when it is read
    return {**tree, "sweep": {**sweep, "grid": {**grid, key: values}}}


def _without(sweep: Any, key: Key, axis: bool) -> Any:
    """A sweep's section, and its cases, without the axis over `key`: no alternative of a group sets it, no search chooses it."""
    if not isinstance(sweep, Mapping):
        return sweep
    made = dict(sweep)
    if isinstance(made.get("grid"), Mapping):
        made["grid"] = _less(made["grid"], key)
    if isinstance(made.get("zip"), list):
        made["zip"] = [_less(block, key) for block in made["zip"]]
    elif "zip" in made:
        made["zip"] = _less(made["zip"], key)
    if isinstance(made.get("groups"), Mapping):
        made["groups"] = {
            name: {label: _less(sets, key) for label, sets in group.items()} if isinstance(group, Mapping) else group
            for name, group in made["groups"].items()
        }
    if isinstance(made.get("cases"), Mapping):
        made["cases"] = {name: _without(case, key, axis) for name, case in made["cases"].items()}
    if key == SEED and (axis or isinstance(made.get("seeds"), list)):
        made.pop("seeds", None)  # they are an axis over it
    over = get(made, ("search", "over"))
    if isinstance(over, Mapping) and key in over:
        made["search"] = {**made["search"], "over": _less(over, key)}
        if len(over) == 1:
            made.pop("search")  # nothing is left to choose
    if not axis and isinstance(made.get("tune"), list):
        made["tune"] = [k for k in made["tune"] if k != key]
    return made


def _less(table: Any, key: Key) -> Any:
    return {k: v for k, v in table.items() if k != key} if isinstance(table, Mapping) else table
