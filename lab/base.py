"""Bases: what `train.init_from` names, whether it fits the model, and what has to be trained before others start from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from torch import Tensor

from core.options import Mistake, Path, key_of, nearest
from core.trees import BASE, Setting, path_in
from core.weights import weights
from core.yaml_files import HUGGING_FACE, SUFFIXES, ConfigError, shown
from engine.base import damage, digest, newest, shapes, unfit
from gpt_conf import ModelConfig
from lab.store import read_result
from model import GPT, assemble
from train_args import Config, with_vocabulary

if TYPE_CHECKING:
    from lab.listing import Listing

PLACES = "A path is looked for beside the file, then in the current folder, then in explorations/."

DOWNLOAD = "hf: is followed by a folder in Hugging Face's format, such as `hf download NAME --local-dir FOLDER` makes."


class Unusable(ValueError):
    """Nothing can start from what `train.init_from` names. `mistakes` says why: one there, and those of the base's own file."""

    def __init__(self, text: str, advice: str = "", others: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.advice = advice
        # Sentences of others are whole: they have no path, and so no second place.
        self.mistakes = [Mistake(BASE, text, advice), *(Mistake((), told.removesuffix(".")) for told in others)]


@dataclass(frozen=True)
class Base:
    """What `train.init_from` names: a run folder, or a file that stands for one run.

    `path` is what was named and `folder` the folder that holds the weights, or will, both absolute. `content` goes into the
    identity of runs that start from it; `misfit(model)` says in words why a model cannot, from names and shapes alone, or
    nothing. A file has its `listing`. prefix: 'hf:' before a folder in Hugging Face's format.
    """

    path: File
    folder: File
    content: str
    misfit: Callable[[ModelConfig], str]
    listing: Listing | None = None
    prefix: str = ""

    @property
    def status(self) -> str | None:
        """What its result.json says, or None."""
        return _status(self.folder)

    @property
    def ready(self) -> bool:
        """Whether a run can start from it now."""
        if self.prefix:
            return True
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
        self._found: dict[tuple[str, File], Base | Unusable] = {}
        self._unfit: dict[Any, str] = {}

    def find(self, named: str) -> Base:
        """The base that a configuration names. Raises Unusable."""
        prefix = HUGGING_FACE if named.startswith(HUGGING_FACE) else ""
        path = located(named.removeprefix(prefix), self.folders, DOWNLOAD if prefix else PLACES)
        if (prefix, path) not in self._found:
            try:
                self._found[prefix, path] = _of_hugging_face(path) if prefix else self._open(path)
            except Unusable as error:
                self._found[prefix, path] = error
        found = self._found[prefix, path]
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
        key = (base.prefix, base.path, key_of(model))
        if key not in self._unfit:
            self._unfit[key] = base.misfit(model)
        why = self._unfit[key]
        return [Mistake(BASE, f"the run cannot start from '{shown(base.path)}': {why}")] if why else []

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
        return Base(path, listing.path(run).resolve(), run.hash, _against(weights(model)), listing)


def located(named: str, folders: Sequence[File], advice: str = DOWNLOAD) -> File:
    """The absolute path of what is named, in the first of `folders` that has it. Raises Unusable."""
    for folder in folders:
        if os.path.exists(folder / named):
            return (folder / named).resolve()
    if advice == PLACES:
        known = {name for folder in folders for name in _names_like(folder, File(named))}
        advice = f"{nearest(named, known)} {PLACES}"
    raise Unusable(f"there is no '{shown(folders[0] / named)}'", advice)


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
    return Base(folder, folder, digest(saved), _against(shapes(saved)))


def _against(tensors: Mapping[str, Tensor]) -> Callable[[ModelConfig], str]:
    return lambda model: unfit(weights(GPT(model)), tensors)


def _of_hugging_face(folder: File) -> Base:
    from convert import huggingface

    def misfit(model: ModelConfig) -> str:
        try:
            huggingface.mapped(folder, model)
        except ValueError as error:
            first, *more = str(error).splitlines()
            count = f" (and {len(more)} more of this kind)" if more else ""
            return f"{first.removesuffix('.')}{count}; `python -m convert import` writes what its own model is"
        return ""

    try:
        huggingface.model_node(folder)
        return Base(folder, folder, huggingface.digest(folder), misfit, prefix=HUGGING_FACE)
    except ValueError as error:
        raise Unusable(f"'{shown(folder)}' cannot be used: {str(error).removesuffix('.')}") from None


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
    """The command line's settings, whose paths are relative to the current folder, with paths relative to `folder`."""

    def said(path: Path, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: said((*path, k), v) for k, v in value.items()}
        held = path_in(path, value)
        if held is None or "${" in value or held[1].startswith("/"):
            return value
        return f"{held[0]}{os.path.relpath(held[1], folder)}"

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
    if base.startswith(HUGGING_FACE):
        from convert import huggingface

        return {"init_from": huggingface.digest(File(base.removeprefix(HUGGING_FACE)))}
    saved, of_file = newest(File(base)), config.train.init_from != base
    if saved is None or (of_file and _status(File(base)) != "done"):
        raise ConfigError(f"{folder}: it starts from {base}, which holds no finished run. Run the sweep's file again.")
    return {"init_from": File(base).name.rpartition("-")[2] if of_file else digest(saved)}
