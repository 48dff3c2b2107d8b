"""Bases: what `train.init_from` names, whether it fits the model, and what has to be trained before others start from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from torch import Tensor

from core.compose import BASE, Setting
from core.options import Mistake, Path, key_of, nearest
from core.weights import weights
from core.yaml_files import SUFFIXES, ConfigError, shown
from engine.base import damage, digest, newest, shapes, unfit
from gpt_conf import ModelConfig
from lab.store import read_result
from model import GPT, assemble
from train_args import Config, with_vocabulary

if TYPE_CHECKING:
    from lab.listing import Listing

PLACES = "A path is looked for beside the file, then in the current folder, then in explorations/."


class Unusable(ValueError):
    """Nothing can start from what `train.init_from` names. `mistakes` says why: one there, and those of the base's own file."""

    def __init__(self, text: str, advice: str = "", others: Sequence[str] = ()) -> None:
        super().__init__(text)
        # Sentences of others are whole: they have no path, and so no second place.
        self.mistakes = [Mistake(BASE, text, advice), *(Mistake((), told.removesuffix(".")) for told in others)]


@dataclass(frozen=True)
class Base:
    """What `train.init_from` names: a run folder, or a file that stands for one run.

    `path` is what was named and `folder` the run folder that holds the weights, or will, both absolute. `content` goes into the
    identity of runs that start from it; `tensors` has its names and shapes, without memory. A file has its `listing`.
    """

    path: File
    folder: File
    content: str
    tensors: Mapping[str, Tensor]
    listing: Listing | None = None

    @property
    def status(self) -> str | None:
        """What its result.json says, or None."""
        return _status(self.folder)

    @property
    def ready(self) -> bool:
        """Whether a run can start from it now."""
        return newest(self.folder) is not None and (self.listing is None or self.status == "done")


class Bases:
    """Finds bases, each once.

    `folders` are those that paths are relative to, the first that has one wins. `listed(file)` opens a file; `trail` holds the
    files that start from one another and led to this one.
    """

    def __init__(
        self, folders: Sequence[File], listed: Callable[[File], Listing], trail: tuple[File, ...] = ()
    ) -> None:
        self.folders, self.listed, self.trail = folders, listed, trail
        self._found: dict[File, Base | Unusable] = {}
        self._unfit: dict[Any, str] = {}

    def find(self, named: str) -> Base:
        """The base that a configuration names. Raises Unusable."""
        path = self._path(named)
        if path not in self._found:
            try:
                self._found[path] = self._open(path)
            except Unusable as error:
                self._found[path] = error
        found = self._found[path]
        if isinstance(found, Unusable):
            raise found
        return found

    def mistakes(self, named: str, model: ModelConfig | None) -> list[Mistake]:
        """Why a run of `model` cannot start from what is named; without a model, whether anything can."""
        try:
            base = self.find(named)
        except Unusable as error:
            return error.mistakes
        if model is None:
            return []
        key = (base.path, key_of(model))
        if key not in self._unfit:
            self._unfit[key] = unfit(weights(GPT(model)), base.tensors)
        why = self._unfit[key]
        return [Mistake(BASE, f"the run cannot start from '{shown(base.path)}': {why}")] if why else []

    def _path(self, named: str) -> File:
        for folder in self.folders:
            if os.path.exists(folder / named):
                return (folder / named).resolve()
        known = {name for folder in self.folders for name in _names_like(folder, File(named))}
        raise Unusable(f"there is no '{shown(self.folders[0] / named)}'", f"{nearest(named, known)} {PLACES}")

    def _open(self, path: File) -> Base:
        if path.is_dir():
            return _of_folder(path)
        if path.suffix not in SUFFIXES:
            raise Unusable(f"'{shown(path)}' is neither a run folder nor a YAML file")
        if path in self.trail:
            way = " from ".join(shown(file) for file in (*self.trail[self.trail.index(path) :], path))
            raise Unusable(f"no run can start from itself, and here {way}", "Leave it out in one of these files.")
        try:
            listing = self.listed(path)
        except ConfigError as error:
            raise Unusable(f"'{shown(path)}' has mistakes of its own", "They follow.", error.sentences) from None
        if len(listing.runs) != 1:
            advice = "Name a file that stands for one run, or the folder of one of these runs."
            raise Unusable(f"'{shown(path)}' stands for {len(listing.runs)} runs", advice)
        (run,) = listing.runs
        config = with_vocabulary(run.config, listing.reader.corpus(run.config.data).meta.vocab_size)
        model, _ = assemble(config.model, config.slices, config.optimizer)
        return Base(path, listing.path(run).resolve(), run.hash, weights(model), listing)


def _of_folder(folder: File) -> Base:
    if not (folder / "config.yaml").is_file():
        inner = sorted(folder.glob("*/config.yaml"))
        advice = f"It is a sweep; name one of its runs, for example {shown(inner[0].parent)}." if inner else ""
        raise Unusable(f"'{shown(folder)}' is no run folder: it holds no config.yaml", advice)
    if why := damage(folder):
        raise Unusable(f"the checkpoint of the run '{shown(folder)}' is damaged", why.removesuffix("."))
    saved = newest(folder)
    if saved is None:
        raise Unusable(f"the run '{shown(folder)}' has no checkpoint", "Train it first.")
    return Base(folder, folder, digest(saved), shapes(saved))


def _names_like(folder: File, wanted: File) -> list[str]:
    """Names in `folder` that may have been meant by one that is not there: of files for a file, else of folders."""
    file = wanted.suffix in SUFFIXES
    while not (folder / wanted).parent.is_dir():
        wanted, file = wanted.parent, False
    beside = [p for p in (folder / wanted).parent.glob("*") if not p.name.startswith(".")]
    return [str(wanted.parent / p.name) for p in beside if (p.suffix in SUFFIXES if file else p.is_dir())]


def _status(folder: File) -> str | None:
    result = read_result(folder)
    return None if result is None else str(result.get("status"))


def relative_to(folder: File, settings: Sequence[Setting]) -> list[Setting]:
    """The command line's settings, whose paths of bases are relative to the current folder, with paths relative to `folder`."""

    def said(path: Path, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: said((*path, k), v) for k, v in value.items()}
        moves = path == BASE and isinstance(value, str) and value and "${" not in value
        return os.path.relpath(value, folder) if moves and not value.startswith(("hf:", "/")) else value

    return [replace(s, values=tuple(said(s.path, value) for value in s.values)) for s in settings]


def untrained(listing: Listing) -> list[Base]:
    """The files that have to be trained before the runs of a listing can start, each after those that it starts from itself.

    A run with a checkpoint of its own needs its base no more.
    """
    made: dict[File, Base] = {}
    for run in listing.pending():
        base = listing.reader.base(run.config)
        if base is None or base.listing is None or base.ready or newest(listing.path(run)):
            continue
        for one in (*untrained(base.listing), base):
            made.setdefault(one.folder, one)
    return list(made.values())


def ended_as(base: Base, needed: File) -> str:
    """Why no run of the listing in `needed` can start from a base that was carried out, as a sentence."""
    state = "is done but has no checkpoint" if base.status == "done" else f"ended as {base.status or 'unfinished'}"
    mend = f"Mend {shown(base.path)}, or remove that folder to train it anew"
    return (
        f"{needed}: its runs start from {shown(base.folder)}, which {state}. {mend}, and give the same command again."
    )


def content_now(config: Config, folder: File) -> dict[str, str]:
    """What the base of the run in `folder` holds now, for comparing with `config.run.content`; nothing where it needs none.

    Raises ConfigError where the base is gone.
    """
    base = config.run.base
    if not base or newest(folder) is not None:
        return {}
    saved, of_file = newest(File(base)), config.train.init_from != base
    if saved is None or (of_file and _status(File(base)) != "done"):
        raise ConfigError(f"{folder}: it starts from {base}, which holds no finished run. Run the sweep's file again.")
    return {"init_from": File(base).name.rpartition("-")[2] if of_file else digest(saved)}
