"""Expansion of a sweep, pure: a composed tree goes in, the runs it stands for come out, with every mistake told.

Axes, groups and cases multiply; what a case or the command line sets is pinned there; runs that resolve to one are merged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.compose import drop_nulls, get, merge, put
from core.options import Mistake, Path
from lab.axes import Axis, Choice, Key, same
from lab.sweep import Case, Match, Sweep
from train_args import Config, ConfigReader


@dataclass(frozen=True)
class Run:
    """One run of a sweep. `changed` is what the sweep set, by key (labels where there are labels); `cell` is the run without its
    seed, in words."""

    hash: str
    cell_hash: str
    cell: str
    seed: int
    changed: Mapping[str, Any]
    config: Config
    baseline: bool


@dataclass(frozen=True)
class Expansion:
    """What a file stands for. `excluded` and `duplicates` count cells."""

    runs: tuple[Run, ...]
    cells: int
    excluded: int
    duplicates: int
    swept: tuple[str, ...]
    sweep: Sweep


@dataclass(frozen=True)
class _Point:
    tree: Mapping[str, Any]
    labels: dict[str, Any]
    places: dict[Key, Path]


def expand(
    tree: Mapping[str, Any],
    sweep: Sweep,
    pins: Mapping[Key, Any],
    reader: ConfigReader,
    default: Callable[[Any, Path], Any],
) -> tuple[Expansion, list[Mistake]]:
    """Every run of a sweep over `tree`. `default(tree, path)` is a key's value where no file sets it."""
    mistakes: dict[tuple[Path, str], Mistake] = {}
    runs: dict[str, Run] = {}
    seen_cells: dict[str, None] = {}
    excluded = duplicates = 0
    used: set[int] = set()
    for point in _points(tree, sweep, pins, default):
        hits = [i for i, match in enumerate(sweep.exclude) if _matched(point, match, default)]
        used.update(hits)
        if hits:
            excluded += 1
            continue
        baseline = sweep.baseline is not None and _matched(point, sweep.baseline, default)
        fresh = False
        for seeded in _seeded(point, sweep.seeds, default):
            config, wrong = reader.read(seeded)
            for mistake in wrong:
                mistakes.setdefault((mistake.path, mistake.text), _at_axis(mistake, point))
            if config is None:
                fresh = True
                break
            run_hash, cell_hash = reader.identity(config)
            fresh = fresh or run_hash not in runs
            seen_cells.setdefault(cell_hash)
            cell = _words(point.labels)
            runs.setdefault(run_hash, Run(run_hash, cell_hash, cell, config.train.seed, point.labels, config, baseline))
        duplicates += not fresh
    found = list(mistakes.values())
    for i in range(len(sweep.exclude)):
        if i not in used:
            found.append(Mistake(("sweep", "exclude", str(i)), "matches no run", _match_advice(sweep)))
    if sweep.baseline is not None and not found and not any(run.baseline for run in runs.values()):
        found.append(Mistake(("sweep", "baseline"), "matches no run", _match_advice(sweep)))
    swept = dict.fromkeys(label for run in runs.values() for label in run.changed)
    return Expansion(tuple(runs.values()), len(seen_cells), excluded, duplicates, tuple(swept), sweep), found


def _points(
    tree: Mapping[str, Any], sweep: Sweep, pins: Mapping[Key, Any], default: Callable[[Any, Path], Any]
) -> Iterator[_Point]:
    for name, case in (sweep.cases or {"": Case()}).items():
        base = dict(tree)
        for preset in case.use:
            base = merge(base, preset)
        for key, value in case.sets.items():
            base = put(base, tuple(key.split(".")), value)
        start = _Point(base, {"case": name} if name else {}, {k: ("sweep", "cases", name, "set", k) for k in case.sets})
        axes = [axis for outer in sweep.axes if (axis := _pinned(outer, set(case.sets)))] + list(case.axes)
        plain_axes, conditional = [a for a in axes if not a.when], [a for a in axes if a.when]
        for row in itertools.product(*(axis.choices for axis in plain_axes)):
            points = [_take(start, row)]
            for axis in conditional:
                points = [p for point in points for p in _conditional(point, axis, default)]
            for point in points:
                made = dict(point.tree)
                for key, value in pins.items():
                    made = put(made, tuple(key.split(".")), value)
                yield _Point(drop_nulls(made), point.labels, point.places)


def _pinned(axis: Axis, keys: set[Key]) -> Axis | None:
    """An axis without the keys that a case pins; None where nothing is left of it."""
    if not axis.keys & keys:
        return axis
    left = {}
    for choice in axis.choices:
        sets = {k: v for k, v in choice.sets.items() if k not in keys}
        labels = {k: v for k, v in choice.labels.items() if k not in keys}
        left[repr((sets, labels))] = Choice(sets, labels, choice.places)
    kept = tuple(choice for choice in left.values() if choice.sets or choice.labels)
    return Axis(axis.name, kept, axis.when, axis.path) if kept else None


def _take(point: _Point, row: Sequence[Choice]) -> _Point:
    tree, labels, places = dict(point.tree), dict(point.labels), dict(point.places)
    for choice in row:
        for key, value in choice.sets.items():
            tree = put(tree, tuple(key.split(".")), value)
        labels.update(choice.labels)
        places.update(choice.places)
    return _Point(tree, labels, places)


def _conditional(point: _Point, axis: Axis, default: Callable[[Any, Path], Any]) -> list[_Point]:
    if _matched(point, axis.when, default):
        return [_take(point, (choice,)) for choice in axis.choices]
    return [point]


def _matched(point: _Point, match: Match, default: Callable[[Any, Path], Any]) -> bool:
    """Whether a partial match holds: by key, case name or label; a list means any of these."""
    for key, wanted in match.items():
        path = tuple(key.split("."))
        value = get(point.tree, path)
        candidates = [default(point.tree, path) if value is None else value]
        if isinstance(value, Mapping) and "variant" not in value:
            candidates.append(default(point.tree, path))
        if key in point.labels:
            candidates.append(point.labels[key])
        options = wanted if isinstance(wanted, list) else [wanted]
        if not any(same(c, w) for c in candidates for w in options):
            return False
    return True


def _seeded(
    point: _Point, seeds: int | tuple[int, ...], default: Callable[[Any, Path], Any]
) -> Iterator[Mapping[str, Any]]:
    path = ("train", "seed")
    if isinstance(seeds, int):
        if seeds == 1:
            yield point.tree
            return
        given = get(point.tree, path)
        first = given if given is not None else default(point.tree, path)
        seeds = tuple(range(first, first + seeds)) if isinstance(first, int) else (0,)
    for seed in seeds:
        yield put(point.tree, path, seed)


def _at_axis(mistake: Mistake, point: _Point) -> Mistake:
    """The mistake with the place of the axis or case that set the value, if one did."""
    for key, place in point.places.items():
        path = tuple(key.split("."))
        if mistake.path[: len(path)] == path:
            return replace(mistake, at=place)
    return mistake


def _match_advice(sweep: Sweep) -> str:
    names = [axis.name for axis in sweep.axes] + (["case"] if sweep.cases else [])
    return f"It is compared by key, case name or label; the sweep has {', '.join(names) or 'no axes'}."


def _words(labels: Mapping[str, Any]) -> str:
    """A cell in words: the case's name first, then each key by its shortest suffix that tells it from the others."""
    short = short_names([k for k in labels if k != "case"])
    words = [str(labels["case"])] if "case" in labels else []
    words += [f"{short[k]}={_word(v)}" for k, v in labels.items() if k != "case"]
    return ", ".join(words) or "default"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}={_word(v)}" for k, v in value.items() if k != "variant")
        return f"{value['variant']}({inner})" if "variant" in value else f"({inner})"
    return f"[{', '.join(_word(v) for v in value)}]" if isinstance(value, list) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest suffix of whole segments that no other key ends in."""
    made = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            suffix = ".".join(parts[-n:])
            if sum(k == suffix or k.endswith(f".{suffix}") for k in keys) == 1:
                break
        made[key] = suffix
    return made
