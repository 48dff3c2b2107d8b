"""`python -m lab compare`: the cells of several sweeps in one table, and what must be known before comparing them.

Runs with one identity are one run, wherever they lie; cells with one configuration are one cell. Where sweeps differ in
something that neither of them swept, in data, versions or machines, it is said before any number is.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from core.yaml_files import ConfigError
from lab.reporting import tables
from lab.reporting.cells import SEED_KEY, Board, Listed, Run, board
from lab.reporting.numbers import clean, decimal, many, short, told
from lab.reporting.reading import read
from lab.reporting.sentences import flat, sentences
from lab.store import Row, open_sweep
from train_args import Config

ABOUT = "the cells of several sweeps in one table"
SHOWN = 40  # cells in print
DIFFERENCES = 30  # told, of each kind
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="the folders of two or more sweeps")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write all cells, in full precision, to this file"
    )


def act(given: argparse.Namespace) -> int:
    """Prints the table and what differs. Raises ConfigError for fewer than two sweeps and for folders of no sweep."""
    found = compare(given.folders)
    rest = str(given.csv) if given.csv else "--csv FILE"
    if given.csv:
        text = tables.leaderboard_csv(found.board, found.sweeps)
        given.csv.write_text(text, encoding="utf-8", errors="backslashreplace")
    if given.markdown:
        lines = [
            *(f"* {tables.plain(said)}" for said in found.said),
            "",
            *tables.cells_md(found.board, rest, found.sweeps),
        ]
    else:
        table = tables.terminal(found.board, rest, found.sweeps, SHOWN)
        lines = [table, *(said.replace("\N{MINUS SIGN}", "-").replace("…", "...") for said in found.said)]
    print("\n".join(lines).replace("\N{MINUS SIGN}", "-"), flush=True)
    return 0


@dataclass(frozen=True)
class Compared:
    """All sweeps as one board; `sweeps` says of each cell, by name, which sweeps it is in; `said` what to know about it."""

    board: Board
    sweeps: Mapping[str, str]
    said: tuple[str, ...]


@dataclass
class Sweep:
    """A sweep that is compared. `configs`: of its cells, what is part of their identity, by dotted key; `runs` by hash."""

    label: str
    folder: Path
    objective: tuple[str, str]
    rows: Sequence[Row]
    configs: dict[str, dict[str, str]] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    @cached_property
    def keys(self) -> set[str]:
        """What it sweeps."""
        return {key for row in self.rows for key in row.changed}


def compare(folders: Sequence[Path]) -> Compared:
    """Reads the sweeps and matches their cells. The objective is the first one's."""
    places = list(dict.fromkeys(folder.resolve() for folder in folders))
    if len(places) < 2:
        raise ConfigError("A comparison needs the folders of at least two sweeps: python -m lab compare DIR DIR ...")
    opened = [_open(folder, [place.name for place in places]) for folder in places]
    metric, mode = opened[0].objective
    if mode not in ("min", "max"):
        raise ConfigError(f"{opened[0].folder / 'sweep.yaml'}: sweep.objective.mode is {mode!r}, not 'min' or 'max'.")
    for sweep in opened:
        sweep.configs = {row.cell: _config(sweep.folder / row.run_id) for row in reversed(sweep.rows)}
    names = _names(opened)
    chosen: dict[str, Run] = {}
    among: dict[str, dict[str, None]] = {}
    for sweep in opened:
        for row in sweep.rows:
            name, place = names[sweep.label, row.cell], sweep.folder / row.run_id
            run = read(Listed(row.run_id, name, row.seed, row.changed, place, row.baseline, row.phase), metric)
            sweep.runs[row.hash] = run
            among.setdefault(name, {})[sweep.label] = None
            before = chosen.get(row.hash)
            kept = run if before is None or (before.value is None and run.value is not None) else before
            baseline = row.baseline or (before is not None and before.listed.baseline)
            chosen[row.hash] = replace(kept, listed=replace(kept.listed, baseline=baseline))
    made = board(" and ".join(s.label for s in opened), chosen.values(), metric, mode)
    said = (*_shares(opened, names), *_differences(opened), *sentences(made))
    return Compared(made, {name: ", ".join(labels) for name, labels in among.items()}, said)


def _open(folder: Path, names: Sequence[str]) -> Sweep:
    tree, rows = open_sweep(folder)
    objective = (tree.get("sweep") or {}).get("objective") or {}
    label = folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}"
    kind = str(objective.get("metric", "val_loss")), str(objective.get("mode", "min"))
    return Sweep(clean(label), folder, kind, rows)


def _config(folder: Path) -> dict[str, str]:
    """What of a run's configuration is part of its cell's identity; empty where it was never written or cannot be read."""
    try:
        tree = yaml.load((folder / "config.yaml").read_bytes(), Loader=LOADER)  # one of the safe loaders
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(tree, dict):
        return {}
    info = tree.get("run")
    content = info.get("content") if isinstance(info, dict) else None
    values = {key: told(value) for key, value in flat(tree) if key != SEED_KEY and not _aside(key)}
    return {**values, **{f"content of {key}": told(value) for key, value in flat(content)}}


def _aside(key: str) -> bool:
    """Whether a dotted key is no part of a run's identity: where results go, the runner, tracking, devices."""
    cls: Any = Config
    for word in key.split("."):
        known = {one.name: one for one in fields(cls)} if is_dataclass(cls) else {}
        if word not in known:
            return False
        if not known[word].metadata.get("identity", True):
            return True
        cls = _SECTIONS.get(word)
    return False


def _sections() -> dict[str, Any]:
    """The dataclasses of the configuration's sections, by name."""
    made = Config()
    return {one.name: type(value) for one in fields(Config) if is_dataclass(value := getattr(made, one.name))}


_SECTIONS = _sections()


def _names(opened: Sequence[Sweep]) -> dict[tuple[str, str], str]:
    """The name of each sweep's cells in the common table: one name for one configuration, and no name for two."""
    by_config: dict[Any, str] = {}
    owners: dict[str, Any] = {}
    made = {}
    for sweep in opened:
        for cell in dict.fromkeys(row.cell for row in sweep.rows):
            config = sweep.configs[cell]
            ident = frozenset(config.items()) if config else (sweep.label, cell)
            if ident not in by_config:
                name = cell if cell not in owners else f"{cell} [{sweep.label}]"
                by_config[ident] = owners[name] = name
            made[sweep.label, cell] = by_config[ident]
    return made


# Words ----------------------------------------------------------------------------------------------------------------------


def _shares(opened: Sequence[Sweep], names: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """How the sweeps overlap, and runs that are in several and have not the same result."""
    for sweep in opened:
        done = sum(run.status == "done" for run in sweep.runs.values())
        cells = len({row.cell for row in sweep.rows})
        yield f"{sweep.label}: {many(cells, 'cell')}, {many(len(sweep.rows), 'run')}, {done:,} done."
    owners: dict[str, set[str]] = {}
    for (label, _), name in names.items():
        owners.setdefault(name, set()).add(label)
    common = sum(len(labels) > 1 for labels in owners.values())
    counts = Counter(key for sweep in opened for key in sweep.runs)
    runs = [key for key, count in counts.items() if count > 1]
    shared = f"{many(common, 'cell')} and {many(len(runs), 'run')} are in more than one sweep"
    yield f"{shared}; such a run counts once." if runs else f"{shared}."
    unlike = []
    for key in runs:
        values = [run.value for sweep in opened if (run := sweep.runs.get(key)) and run.value is not None]
        if len(set(values)) > 1:
            unlike.append(values)
    if unlike:
        pair = " and ".join(decimal(value) for value in unlike[0])
        yield (
            f"Warning: {many(len(unlike), 'run')} of one identity ended differently in two sweeps (such as {pair}); the first "
            "sweep's result is used. Machines or versions differ, or training is not deterministic."
        )
    objectives = {sweep.objective for sweep in opened}
    if len(objectives) > 1:
        metric, mode = opened[0].objective
        yield f"The sweeps have different objectives; compared is {clean(metric)} ({mode}), {opened[0].label}'s."


def _differences(opened: Sequence[Sweep]) -> Iterator[str]:
    """What the sweeps differ in beyond what they sweep: values that one has and the other never does."""
    configs = [[config for config in sweep.configs.values() if config] for sweep in opened]
    unread = sum(not config for sweep in opened for config in sweep.configs.values())
    if unread:
        yield f"Of {many(unread, 'cell')} no config.yaml can be read, so these are matched with no other."
    found = list(_apart(opened, [_values(some) for some in configs], swept=True))
    data = [text for key, text in found if key.startswith("content of ")]
    options = [text for key, text in found if not key.startswith("content of ")]
    yield from (f"Warning: the sweeps were trained on different content: {text}." for text in data)
    if options:
        yield f"Warning: not swept, but different: {_several(options)}."
    elif not data:
        yield "In everything that is not swept the sweeps' configurations are equal."
    told_ = [[one for run in sweep.runs.values() if (one := dict(_origin(run)))] for sweep in opened]
    origins = [text for _, text in _apart(opened, [_values(some) for some in told_])]
    if origins:
        yield f"Where results come from differs: {_several(origins)}."


def _origin(run: Run) -> Iterator[tuple[str, str]]:
    for key, value in flat(run.result.get("provenance")):
        if key not in ("dirty", "data"):  # what data holds is part of the configuration
            yield key, told(value)


def _values(some: Sequence[Mapping[str, str]]) -> dict[str, set[str]]:
    """Every value of every key; a key that some lack has the value '(not set)' there."""
    keys = {key for one in some for key in one}
    return {key: {one.get(key, "(not set)") for one in some} for key in sorted(keys)}


def _apart(
    opened: Sequence[Sweep], seen: Sequence[Mapping[str, set[str]]], swept: bool = False
) -> Iterator[tuple[str, str]]:
    """Keys of which some two sweeps have no value in common, with the values of each. swept: not those that all sweep."""
    known = [(sweep, values) for sweep, values in zip(opened, seen, strict=True) if values]
    for key in dict.fromkeys(key for _, values in known for key in values):
        per = [(sweep, values.get(key, {"(not set)"})) for sweep, values in known]
        if swept and all(len(values) > 1 or key in sweep.keys for sweep, values in per):
            continue
        if any(not a & b for i, (_, a) in enumerate(per) for _, b in per[i + 1 :]):
            shown = "; ".join(f"{sweep.label}: {short(', '.join(sorted(values)), 60)}" for sweep, values in per)
            yield key, f"{clean(key.removeprefix('content of '))} ({shown})"


def _several(texts: Sequence[str]) -> str:
    more = f", and {len(texts) - DIFFERENCES} more" if len(texts) > DIFFERENCES else ""
    return ", ".join(texts[:DIFFERENCES]) + more
