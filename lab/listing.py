"""What a file and the command line stand for: composed, expanded, validated, with each run's folder. Writes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

from core.compose import Composed, compose, parse_overrides
from core.options import Mistake, plain
from core.yaml_files import ConfigError, load_text
from engine.corpus import DATA
from engine.data import Corpus, settle, stage_corpus
from lab.expand import Expansion, Run, expand, short_names
from lab.sweep import Sweep, SweepReader, apply_settings
from model import GPT
from train_args import Config, ConfigReader, DataConfig, RunInfo, default_value, load_plugins, sentences
from variations import CATALOGUE

LIBRARY = File(__file__).resolve().parent.parent / "explorations"
ENDED = ("done", "diverged", "pruned")  # a failed run is tried again
LABEL = 60


def corpus_of(data: DataConfig) -> Corpus:
    """The corpus of a data section, staged where it is not there yet. Raises ValueError where it cannot be."""
    return stage_corpus(data.dataset, data.tokenizer, File(data.root) if data.root else DATA)


def new_reader(plugins: dict[str, str]) -> ConfigReader:
    return ConfigReader(CATALOGUE, corpus_of, GPT, plugins)


@dataclass
class Listing:
    """The runs of a file. `ids` gives each run's folder name by hash: the one on disk where there is one."""

    name: str
    folder: File
    tree: dict[str, Any]
    expansion: Expansion
    reader: ConfigReader
    has_sweep: bool
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.expansion.runs

    def path(self, run: Run) -> File:
        return self.folder / self.ids[run.hash]

    def status(self, run: Run) -> str | None:
        """What result.json says, or None."""
        result = read_result(self.path(run))
        return None if result is None else str(result.get("status"))

    def pending(self) -> list[Run]:
        return [run for run in self.runs if self.status(run) not in ENDED]

    def info(self, run: Run, wandb: str) -> RunInfo:
        """What a run's config.yaml says of its place in the sweep."""
        content = {"data": self.reader.corpus(run.config.data).meta.content_hash, **self.reader.plugins}
        changed = {k: plain(v) for k, v in run.changed.items()}
        return RunInfo(self.ids[run.hash], run.cell, changed, content, wandb)

    def settle(self) -> None:
        """Moves corpora that were prepared on the way to their place."""
        for data in {run.config.data for run in self.runs}:
            settle(self.reader.corpus(data))


def read_result(folder: File) -> dict[str, Any] | None:
    """A run folder's result.json, or None where there is none that can be read."""
    try:
        made = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return made if isinstance(made, dict) else None


def open_listing(file: File | None, words: Sequence[str]) -> Listing:
    """Composes, expands and validates. Raises ConfigError with every mistake."""
    settings = parse_overrides(words)
    composed = compose(file, LIBRARY) if file is not None else Composed({}, {}, File.cwd())
    tree, pins, places = apply_settings(composed.tree, settings)
    composed.places.update(places)
    tree.setdefault("name", file.stem if file is not None else "default")
    plugins = load_plugins(tuple(_strings(tree.get("plugins"))), composed.folder)
    if plugins:
        tree["plugins"] = list(plugins)
    base = {k: v for k, v in tree.items() if k not in ("sweep", "run")}
    reader = new_reader(plugins)
    sweep, mistakes = _read_sweep(tree, composed, file)
    expansion, found = expand(base, sweep, pins, reader, lambda t, path: default_value(CATALOGUE, t, path))
    mistakes += [_hinted(m, composed) for m in found]
    if mistakes:
        raise ConfigError(*sentences(mistakes, composed.place))
    first = expansion.runs[0].config
    listing = Listing(first.name, File(first.runner.root) / first.name, tree, expansion, reader, "sweep" in tree)
    listing.ids = _ids(listing, expansion)
    return listing


def _strings(given: Any) -> list[str]:
    if given is None or (isinstance(given, list) and all(isinstance(x, str) for x in given)):
        return given or []
    raise ConfigError(f"plugins: {given!r} is not a list of Python files.")


def _read_sweep(tree: dict[str, Any], composed: Composed, file: File | None) -> tuple[Sweep, list[Mistake]]:
    def preset(name: str) -> dict[str, Any]:
        for folder in (composed.folder, LIBRARY):
            for suffix in ("", ".yaml", ".yml", ".json"):
                if (candidate := folder / f"{name}{suffix}").is_file():
                    made = compose(candidate, LIBRARY)
                    if "sweep" in made.tree:
                        raise ConfigError(f"'{name}' carries a sweep; only the file you run may")
                    return made.tree
        raise ConfigError(f"no file '{name}' beside {file.name if file else 'this folder'} or in {LIBRARY.name}/")

    reader = SweepReader(preset)
    sweep = reader.read(tree["sweep"] or {}) if "sweep" in tree else Sweep()
    return sweep, reader.mistakes


def _hinted(mistake: Mistake, composed: Composed) -> Mistake:
    """An unknown top-level key that a preset without a package header made gets the mend as advice."""
    if len(mistake.path) == 1 and mistake.path[0] in composed.packages and mistake.text == "unknown key":
        return replace(mistake, advice="A preset begins with the line '# @package _global_'; this one lacks it.")
    return mistake


def _ids(listing: Listing, expansion: Expansion) -> dict[str, str]:
    on_disk = {p.name.rpartition("-")[2]: p.name for p in listing.folder.glob("*-*") if p.is_dir()}
    seeded = len({run.seed for run in expansion.runs}) > 1
    return {run.hash: on_disk.get(run.hash) or f"{_label(run, seeded)}{run.hash}" for run in expansion.runs}


def _label(run: Run, seeded: bool) -> str:
    """The readable part of a run's folder name, ending in a hyphen."""
    short = short_names([k for k in run.changed if k != "case"])
    words = [str(run.changed["case"])] if "case" in run.changed else []
    for key, value in run.changed.items():
        if key != "case":
            value = value.get("variant", "set") if isinstance(value, dict) else value
            words.append(f"{short[key]}={value}")
    words += [f"seed={run.seed}"] if seeded and "train.seed" not in run.changed else []
    text = re.sub(r"[^A-Za-z0-9._=+]+", "_", ",".join(words).replace(",", "+")).strip("._")[:LABEL]
    return f"{text}-" if text else "run-"


def load_run(folder: File, *, plugins: bool) -> tuple[Config, Corpus]:
    """The configuration and the corpus of a run folder.

    plugins: whether the run's own Python files may be executed. Raises ConfigError where they are needed and may not, where they or
    the data are no longer those of the run, and for a configuration that cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no config.yaml.")
    loaded = load_text(path.read_text(), str(path))
    wanted = _strings(loaded.tree.get("plugins"))
    if wanted and not plugins:
        raise ConfigError(
            f"{path}: the run uses Python files of its own ({', '.join(wanted)}). Allow them with --plugins."
        )
    reader = new_reader(load_plugins(wanted, folder))
    config, mistakes = reader.read(loaded.tree)
    if config is None:
        raise ConfigError(*sentences(mistakes, lambda p: loaded.places.get(p, str(path))))
    corpus = reader.corpus(config.data)
    now = {"data": corpus.meta.content_hash, **reader.plugins}
    for name, content in config.run.content.items():
        if now.get(name, content) != content:
            raise ConfigError(
                f"{path}: '{name}' has another content than when the run was listed. Run the sweep's file again."
            )
    return config, settle(corpus)
