"""What a file and the command line stand for: composed, expanded, validated, with each run's folder. Writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path as File
from typing import Any

from core.options import Mistake, Path, nearest, plain
from core.trees import TOKENIZER, Composed, path_in
from core.yaml_files import SUFFIXES, ConfigError, load_file, shown
from engine.corpus import DATA
from engine.data import Corpus, settle, stage_corpus
from lab.axes import SweepError
from lab.base import Bases, Unusable, content_now, located, relative_to
from lab.campaign import Campaign
from lab.expand import Expansion, Run, expand
from lab.naming import told
from lab.reading import ConfigReader, default_value, sentences
from lab.rungs import in_vain
from lab.store import read_result, suggested
from lab.sweep import SEED, Sweep, SweepReader, apply_settings
from model import GPT, assemble
from train_args import Config, DataConfig, RunInfo, load_plugins, with_vocabulary
from variations import CATALOGUE

LIBRARY = File(__file__).resolve().parent.parent / "explorations"
ENDED = ("done", "diverged", "pruned")  # a failed run is tried again
LABEL = 60
MOST_MISTAKES = 100


def corpus_of(data: DataConfig, folders: Sequence[File] = (File(),)) -> Corpus:
    """The corpus of a data section, staged where it is not there yet. Raises ValueError where it cannot be.

    folders: where a tokenizer's folder is looked for.
    """
    tokenizer = data.tokenizer
    if held := path_in(TOKENIZER, tokenizer):
        try:
            tokenizer = f"{held[0]}{located(held[1], folders)}"
        except Unusable as error:
            raise ValueError(f"data.tokenizer: {error}. {error.advice}") from None
    return stage_corpus(data.dataset, tokenizer, File(data.root) if data.root else DATA)


def new_reader(
    plugins: dict[str, str], bases: Bases | None = None, folders: Sequence[File] = (File(),)
) -> ConfigReader:
    return ConfigReader(CATALOGUE, partial(corpus_of, folders=folders), GPT, plugins, bases)


@dataclass
class Listing:
    """The runs of a file, of a search those that are known now. `ids` gives each run's folder name by hash: the one on disk
    where there is one. `place` says where a part of the tree was written."""

    name: str
    folder: File
    tree: dict[str, Any]
    expansion: Expansion
    reader: ConfigReader
    has_sweep: bool
    place: Callable[[Path], str | None] = lambda path: None
    ids: dict[str, str] = field(default_factory=dict)
    campaign: Campaign | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.expansion.runs

    @property
    def more_to_come(self) -> int:
        """How many runs the searches may still choose, at most."""
        return self.campaign.more_to_come if self.campaign else 0

    def show(self, hashes: Iterable[str], repeated: int) -> None:
        """Lists these runs of the searches' expansion, in this order. repeated: how many suggestions were listed before."""
        made = self.expansion.searches[0].work.expansion(hashes)
        self.expansion = replace(made, duplicates=made.duplicates + repeated)
        self.call(made.runs)

    @cached_property
    def on_disk(self) -> dict[str, str]:
        """The names of the run folders that were there before this process made any, by hash."""
        return {p.name.rpartition("-")[2]: p.name for p in self.folder.glob("*-*") if p.is_dir()}

    def call(self, runs: Iterable[Run]) -> None:
        """Gives runs their folders' names."""
        search = self.expansion.sweep.search
        seeds = {run.seed for run in self.runs} | {s for searched in self.expansion.searches for s in searched.seeds}
        seeded = len(seeds) > 1 or bool(search and search.confirm)
        for run in runs:
            if run.hash not in self.ids:
                label = _label(run, self.expansion.short, seeded)
                self.ids[run.hash] = self.on_disk.get(run.hash) or f"{label}{run.hash}"

    def result(self, run: Run) -> dict[str, Any] | None:
        """A run's result.json, or None where there is none."""
        return read_result(self.path(run))

    def sentence(self, mistake: Mistake) -> str:
        """A mistake with its place."""
        return sentences([mistake], self.place)[0]

    def path(self, run: Run) -> File:
        return self.folder / self.ids[run.hash]

    def status(self, run: Run) -> str | None:
        """What result.json says, or None."""
        result = self.result(run)
        return None if result is None else str(result.get("status"))

    def pending(self) -> list[Run]:
        return [run for run in self.runs if self.status(run) not in ENDED]

    @cached_property
    def swept(self) -> tuple[str, ...]:
        """Every key that differs somewhere in the sweep."""
        return tuple(dict.fromkeys(key for run in self.runs for key in run.changed))

    def content(self, run: Run) -> dict[str, str]:
        """Hashes of the data, plugins and base that a run is made with."""
        made = {"data": self.reader.corpus(run.config.data).meta.content_hash, **self.reader.plugins}
        base = self.reader.base(run.config)
        return made | ({"init_from": base.content} if base else {})

    def info(self, run: Run, wandb: str) -> RunInfo:
        """What a run's config.yaml says of its place in the sweep."""
        base = self.reader.base(run.config)
        changed = {k: plain(v) for k, v in run.changed.items()}
        folder = f"{base.prefix}{base.folder}" if base else ""
        sweep = self.expansion.sweep
        stopping = sweep.stop if run.phase != "confirm" else None
        stop = {**asdict(stopping), "mode": sweep.objective["mode"]} if stopping else {}
        return RunInfo(self.ids[run.hash], run.cell, changed, self.swept, self.content(run), wandb, folder, stop)

    def parameters(self, run: Run) -> int:
        """How many parameters a run's model has, adapters included."""
        config = with_vocabulary(run.config, self.reader.corpus(run.config.data).meta.vocab_size)
        _, rows = assemble(config.model, config.slices, config.optimizer)
        return sum(row.slice.numel for row in rows)

    def settle(self) -> None:
        """Moves corpora that were prepared on the way to their place."""
        for data in {run.config.data for run in self.runs}:
            settle(self.reader.corpus(data))


def open_listing(file: File | None, words: Sequence[str], trail: tuple[File, ...] = ()) -> Listing:
    """Composes, expands and validates. `trail`: the files that start from one another and led here, this one included.

    Raises ConfigError with every mistake.
    """
    from core.compose import compose, parse_overrides  # Hydra, which those that train do without

    settings = parse_overrides(words)
    composed = compose(file, LIBRARY) if file is not None else Composed({}, {}, File.cwd())
    tree, pins, places = apply_settings(composed.tree, relative_to(composed.folder, settings))
    composed.places.update(places)
    if file is not None and "name" not in tree:
        tree["name"] = file.stem
        composed.places["name",] = f"{shown(file)}, the file's own name"
    plugins = load_plugins(_strings(tree, composed.place), File.cwd(), lambda i: composed.place(("plugins", str(i))))
    if plugins:
        tree["plugins"] = list(plugins)
    swept = tree.get("sweep") is not None
    base = {k: v for k, v in tree.items() if k not in ("sweep", "run")}
    here = [setting.word for setting in settings if not setting.axis and _is_of_the_machine(setting.path)]
    folders = (composed.folder, File.cwd(), LIBRARY)
    bases = Bases(folders, lambda other: open_listing(other, here, (*trail, other)), trail)
    reader = new_reader(plugins, bases, folders)
    sweep, mistakes = _read_sweep(tree, composed, file) if swept else (Sweep(), [])
    expansion, found = expand(base, sweep, pins, reader, lambda t, path: default_value(CATALOGUE, t, path))
    # What a sweep says in vain follows from what is wrong in it, and is told once that is mended.
    mistakes += [_hinted(m, composed) for m in found if not mistakes or m.path[:1] != ("sweep",)]
    configs = [*(run.config for run in expansion.runs), *(searched.config for searched in expansion.searches)]
    mistakes += _names(configs)
    mistakes += [] if mistakes else in_vain(sweep.stop, configs)
    if mistakes:
        raise ConfigError(*_shortened(sentences(mistakes, composed.place)))
    first = configs[0]
    folder = File(first.runner.root) / first.name
    listing = Listing(first.name, folder, tree, expansion, reader, swept, composed.place)
    listing.call(listing.runs)
    if expansion.searches:
        _begin(listing, Campaign(listing, suggested(listing.folder)))
    return listing


def _begin(listing: Listing, campaign: Campaign) -> None:
    """Lists what a search chooses from the results that are there. Raises ConfigError where none of it can be run."""
    listing.campaign = campaign
    campaign.more(listing.result)
    wrong = [m.sentence(listing.place(m.path)) for m in _names([run.config for run in listing.runs])]
    if not wrong and not listing.runs:
        wrong = ["sweep.search: none of the first suggestions can be run.", *campaign.refused]
    if wrong:
        raise ConfigError(*_shortened(wrong))


def _names(configs: Sequence[Config]) -> list[Mistake]:
    """A mistake where a sweep would have several names."""
    names = list(dict.fromkeys(config.name for config in configs))
    text = f"it must be one for all runs, not {', '.join(map(repr, names[:3]))}"
    return [Mistake(("name",), text)] if len(names) > 1 else []


def _is_of_the_machine(path: Path) -> bool:
    """Whether an option says where data and results lie or how runs are carried out: it holds of a base too."""
    return path[0] in ("runner", "tracking") or path in (("data", "root"), ("train", "device"))


def _shortened(told: list[str]) -> list[str]:
    more = len(told) - MOST_MISTAKES
    return told if more <= 1 else [*told[:MOST_MISTAKES], f"... and {more:,} more mistakes."]


def _strings(tree: Mapping[str, Any], place: Callable[[Path], str | None]) -> list[str]:
    given = tree.get("plugins")
    if given is None or (isinstance(given, list) and all(isinstance(x, str) for x in given)):
        return given or []
    raise ConfigError(Mistake(("plugins",), f"{given!r} is not a list of Python files").sentence(place(("plugins",))))


def _read_sweep(tree: dict[str, Any], composed: Composed, file: File | None) -> tuple[Sweep, list[Mistake]]:
    folders = (composed.folder, LIBRARY)

    def preset(name: str) -> Composed:
        for folder in folders:
            for suffix in ("", *SUFFIXES):
                candidate = folder / f"{name}{suffix}"
                if candidate.suffix in SUFFIXES and candidate.is_file():
                    from core.compose import compose

                    return compose(candidate, LIBRARY, preset=True)
        found = [
            p.relative_to(f).with_suffix("")
            for f in folders
            for p in (*f.glob("*"), *f.glob("*/*"))
            if p.suffix in SUFFIXES
        ]
        text = f"no file '{name}' beside {shown(file) if file else 'this folder'} or in {LIBRARY.name}/"
        raise SweepError(text, nearest(name, {str(p) for p in found}))

    reader = SweepReader(preset)
    sweep = reader.read(tree["sweep"])
    composed.places.update(reader.places)
    composed.packages |= reader.packages
    return sweep, reader.mistakes


def _hinted(mistake: Mistake, composed: Composed) -> Mistake:
    """An unknown top-level key that a preset without a package header made gets the mend as advice."""
    if len(mistake.path) == 1 and mistake.path[0] in composed.packages and mistake.text == "unknown key":
        return replace(mistake, advice="A preset begins with the line '# @package _global_'; this one lacks it.")
    return mistake


def _label(run: Run, short: Mapping[str, str], seeded: bool) -> str:
    """The readable part of a run's folder name, ending in a hyphen."""
    words = [str(run.changed["case"])] if "case" in run.changed else []
    for key, value in run.changed.items():
        if key not in ("case", SEED):
            words.append(f"{short[key]}={value.get('variant', 'set') if isinstance(value, dict) else told(value)}")
    words += [f"seed={run.seed}"] if seeded else []
    text = re.sub(r"[^A-Za-z0-9._=+]+", "_", ",".join(words).replace(",", "+")).strip("._")[:LABEL]
    return f"{text}-" if text else "run-"


def load_run(folder: File, *, plugins: bool) -> tuple[Config, Corpus]:
    """The configuration and the corpus of a run folder.

    plugins: whether the run's own Python files may be executed. Raises ConfigError where they are needed and may not, where they or
    the data, or what it has yet to start from, are no longer those of the run, and for a configuration that cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no config.yaml.")
    loaded = load_file(path)
    wanted = _strings(loaded.tree, loaded.places.get)
    if wanted and not plugins:
        raise ConfigError(
            f"{path}: the run uses Python files of its own ({', '.join(wanted)}). Allow them with --plugins."
        )
    reader = new_reader(load_plugins(wanted, folder))
    config, mistakes = reader.read(loaded.tree)
    if config is None:
        raise ConfigError(*sentences(mistakes, lambda p: loaded.places.get(p, str(path))))
    corpus = reader.corpus(config.data)
    now = {"data": corpus.meta.content_hash, **reader.plugins, **content_now(config, folder)}
    for name, content in config.run.content.items():
        if now.get(name, content) != content:
            raise ConfigError(
                f"{path}: '{name}' has another content than when the run was listed. Run the sweep's file again."
            )
    return config, settle(corpus)
