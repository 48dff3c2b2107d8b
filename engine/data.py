"""Reading corpora: finding and opening one, training batches, evaluation windows.

Nothing here keeps a position: a batch is a function of the seed and its index, so a resumed run sees what it would have
seen, a run in a pack sees what it would alone, and no state needs to be saved.
"""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from core.options import nearest
from core.yaml_files import HUGGING_FACE
from engine.corpus import DATA, DTYPES, META, SPLITS, Meta, is_name, place, sibling
from engine.hf_tokenizer import OFFERED, PREFIX, is_checkpoint, read_checkpoint

TRAIN_STREAM, WINDOW_STREAM = (
    1,
    2,
)  # second word of the generator's key: draws for training and for evaluation never meet
WORD = (1 << 64) - 1
SAID = {"TOKENIZERS": "tokenizers", "SELF_PREPARING": "self_preparing", "ARGUMENTS": "arguments"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A prepared corpus, its splits mapped into memory `[n]`. `destination` is where a staged one belongs."""

    folder: Path
    meta: Meta
    train: np.ndarray
    val: np.ndarray
    destination: Path | None = None


@dataclass(frozen=True)
class Script:
    """What the constants of a `prepare.py` say.

    TOKENIZERS: those it offers, the default first, 'hf:FOLDER' for those of checkpoints. SELF_PREPARING: it needs no
    network and no input. ARGUMENTS: what it has to be given on its command line.
    """

    path: Path
    tokenizers: tuple[str, ...] = ()
    self_preparing: bool = False
    arguments: str = ""


def open_corpus(dataset: str, tokenizer: str | None = None, root: Path = DATA) -> Corpus:
    """The corpus `<root>/<dataset>/<tokenizer>`; one that prepares itself is prepared first.

    With no tokenizer named it is the only one prepared, else the default of the corpus. 'hf:' and a folder name the
    tokenizer of a checkpoint, whose name follows from its content. Raises ValueError, with what to do, for an unknown
    corpus or tokenizer, for one not prepared, and for files that do not fit their description.
    """
    return settle(stage_corpus(dataset, tokenizer, root))


def stage_corpus(dataset: str, tokenizer: str | None = None, root: Path = DATA) -> Corpus:
    """As `open_corpus`, but writes nothing under `root`: a corpus that prepares itself does so in a temporary folder.

    That folder goes with the returned object, or when the process ends.
    """
    home, script = Path(root) / dataset, None
    if not is_name(dataset) or not ((script := _script(dataset, Path(root))) or _prepared(home)):
        advice = nearest(dataset, _known(Path(root)))
        own = f"Texts of your own: python {_shown(DATA / 'text' / 'prepare.py')} --name NAME --input FILE"
        raise ValueError(f"data.dataset: no corpus '{dataset}' in {root}. {advice} {own}")
    if tokenizer and is_checkpoint(tokenizer):
        return _of_checkpoint(tokenizer, home, script)
    chosen = _choose(dataset, tokenizer, _prepared(home), script)
    folder = home / chosen
    if (folder / META).is_file():
        return _open(folder)
    assert script is not None
    return _stage(script, chosen, folder)


def settle(corpus: Corpus) -> Corpus:
    """Moves a staged corpus to where it belongs, whole or not at all; any other is returned as it is.

    Safe when several processes do it at once: the first in place stays. Raises ValueError if that has other content.
    """
    place_at = corpus.destination
    if place_at is None:
        return corpus
    if not (place_at / META).is_file():
        with sibling(place_at) as beside:
            shutil.copytree(corpus.folder, beside, dirs_exist_ok=True)  # the temporary folder may be on another disk
            place(beside, place_at, replace=False)
    settled = _open(place_at)
    if settled.meta.content_hash != corpus.meta.content_hash:
        raise ValueError(
            f"{place_at} was prepared with another content meanwhile, by another Python perhaps. Start again."
        )
    return settled


class Batches:
    """Training batches: `batch_size` windows of `block_size` tokens, each at a random position of the split.

    All starts that leave room for a window and its target are equally likely, as in nanoGPT. The positions come from
    Philox, a counter-based generator: its key is the seed and its counter the batch's index, so any batch is drawn
    directly, without replaying those before it, and other seeds are independent streams. Only its raw output is used:
    NumPy promises that it never changes, on any platform, and does not promise this of `Generator.integers`.
    """

    def __init__(self, tokens: np.ndarray, *, batch_size: int, block_size: int, seed: int) -> None:
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self._windows = _windows(tokens, block_size)

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs x and targets y, int64 `[B, T]`, of micro-batch `index`, counted from 0; y is x one token later."""
        return self.at(self.starts(index))

    def at(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the windows that begin at `starts` `[n]`."""
        return _split(self._windows[starts])

    def starts(self, index: int) -> np.ndarray:
        """Where the windows of a micro-batch begin, int64 `[B]`."""
        return _uniform(self.seed, TRAIN_STREAM, index, self.batch_size, len(self._windows))


def windows(tokens: np.ndarray, *, block_size: int, count: int | None, seed: int) -> np.ndarray:
    """Starts of evaluation windows, int64 `[n]`.

    `count` None: consecutive windows over the whole split, each target once; a last one that is not full is left out.
    Otherwise `count` random ones, of which fewer are the first of more. Raises ValueError where not one window fits.
    """
    room = len(_windows(tokens, block_size))
    if count is None:
        return np.arange((len(tokens) - 1) // block_size, dtype=np.int64) * block_size
    if count < 1:
        raise ValueError(f"at least one evaluation window is needed, not {count}.")
    return _uniform(seed, WINDOW_STREAM, 0, count, room)


def gather(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs x and targets y, int64 `[n, T]`, of the windows at `starts` `[n]`."""
    return _split(_windows(tokens, block_size)[starts])


def _windows(tokens: np.ndarray, block_size: int) -> np.ndarray:
    """All windows with their targets, `[len - T, T + 1]`: a view, so picking rows is one copy of contiguous runs."""
    if block_size < 1 or len(tokens) < block_size + 1:
        raise ValueError(
            f"model.block_size: windows of {block_size} tokens need {block_size + 1} tokens in each split, but one "
            f"holds {len(tokens)}. Choose a block_size of 1 or more that fits, or a larger corpus."
        )
    return sliding_window_view(np.asarray(tokens), block_size + 1)


def _split(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    x, y = rows[:, :-1].astype(np.int64, order="C"), rows[:, 1:].astype(np.int64, order="C")
    return torch.from_numpy(x), torch.from_numpy(y)


def _uniform(seed: int, stream: int, index: int, count: int, below: int) -> np.ndarray:
    """`count` integers in [0, below), int64. Remainders of 64 random bits are uneven by below / 2^64: nothing."""
    # Key and counter are words of 64 bits, lowest first; each index has the lowest word of the counter to itself.
    raw = np.random.Philox(key=(seed & WORD) | stream << 64, counter=index << 64).random_raw(count)
    return (raw % np.uint64(below)).astype(np.int64)


def _open(folder: Path, destination: Path | None = None) -> Corpus:
    meta = Meta.read(folder)
    dtype, splits = DTYPES[meta.dtype], {}
    for split in SPLITS:
        path, tokens = folder / f"{split}.bin", meta.splits[split]
        size = path.stat().st_size if path.is_file() else 0
        if size != tokens * dtype.itemsize:
            raise ValueError(
                f"{path} holds {size} bytes where {META} promises {tokens} tokens of {dtype.itemsize} bytes: it is "
                f"truncated or belongs to another corpus. Remove {folder} and prepare it again."
            )
        # A plain array over the map: every slice of a memmap object costs microseconds of bookkeeping.
        splits[split] = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    return Corpus(folder, meta, splits["train"], splits["val"], destination)


def _of_checkpoint(tokenizer: str, home: Path, script: Script | None) -> Corpus:
    """The corpus cut by the tokenizer of a checkpoint, staged where it is not there yet."""
    try:
        found = read_checkpoint(tokenizer)
        folder = home / found.name
        if (folder / META).is_file():
            return _open(folder)
        found.load()  # what keeps it from being used is told before any text is read
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}") from None
    if script is None and (texts := _script("text", home.parent)):  # a corpus without a script is made from texts
        script = replace(texts, arguments=f"--name {home.name} {texts.arguments}")
    assert script is not None
    if OFFERED not in script.tokenizers:
        raise ValueError(
            f"data.tokenizer: '{home.name}' takes no tokenizer of a checkpoint. {_shown(script.path)} would have to, and "
            f"to say so with '{OFFERED}' among its TOKENIZERS: {', '.join(script.tokenizers)}."
        )
    return _stage(script, tokenizer, folder)


def _stage(script: Script, tokenizer: str, destination: Path) -> Corpus:
    """Prepares a corpus in a temporary folder. Raises ValueError, with what to run, where it does not prepare itself."""
    dataset = destination.parent.name
    if not script.self_preparing:
        told = _shown_tokenizer(tokenizer)
        how = _command(script, told, destination.parent.parent)
        raise ValueError(f"data.dataset: '{dataset}' is not prepared for {told}. Run: {how}")
    temporary = Path(tempfile.mkdtemp(prefix="slicewise-"))
    try:
        command = [sys.executable, str(script.path), "--tokenizer", tokenizer, "--out", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            raise ValueError(f"data.dataset: '{dataset}' could not be prepared: {said}")
        corpus = _open(temporary / dataset / destination.name, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    weakref.finalize(corpus, _discard, temporary, os.getpid())
    return corpus


def _discard(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits the finalizer, not the folder
        shutil.rmtree(folder, ignore_errors=True)


def _choose(dataset: str, tokenizer: str | None, prepared: list[str], script: Script | None) -> str:
    """The tokenizer to use: the one asked for, else the only one prepared, else the default of the corpus."""
    offered = script.tokenizers if script else ()
    if tokenizer is None:
        if script and script.self_preparing:  # those of checkpoints are there because somebody named them, once
            prepared = [name for name in prepared if not name.startswith(PREFIX)]
        if len(prepared) == 1:
            return prepared[0]
        if offered:
            return offered[0]
        raise ValueError(f"data.tokenizer: '{dataset}' has no default; choose one of: {', '.join(prepared)}.")
    if tokenizer not in {*prepared, *offered}:
        advice = nearest(tokenizer, {*prepared, *offered})
        if tokenizer.startswith(PREFIX):
            advice += f" One that begins with '{PREFIX}' is made where its checkpoint is named, as {OFFERED}."
        raise ValueError(f"data.tokenizer: '{dataset}' has no '{tokenizer}'. {advice}")
    return tokenizer


def _prepared(home: Path) -> list[str]:
    """The tokenizers for which a corpus is prepared, sorted."""
    return sorted(path.parent.name for path in home.glob(f"*/{META}") if is_name(path.parent.name))


def _known(root: Path) -> set[str]:
    homes = [home for folder in {root, DATA} if folder.is_dir() for home in folder.iterdir() if is_name(home.name)]
    return {home.name for home in homes if (home / "prepare.py").is_file() or (home.parent == root and _prepared(home))}


def _script(dataset: str, root: Path) -> Script | None:
    """The corpus's prepare.py, under `root` or ours. Its constants are read without running it."""
    path = next((p for p in (root / dataset / "prepare.py", DATA / dataset / "prepare.py") if p.is_file()), None)
    if path is None:
        return None
    said: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign) and isinstance(target, ast.Name) and target.id in SAID:
            said[SAID[target.id]] = ast.literal_eval(node.value)
    return Script(path, **said)


def _command(script: Script, tokenizer: str, root: Path) -> str:
    """The command line that prepares a corpus."""
    words = ["python", _shown(script.path)]
    if script.tokenizers[:1] != (tokenizer,):
        words += ["--tokenizer", tokenizer]
    if Path(root).resolve() != DATA:
        words += ["--out", str(root)]
    return " ".join([shlex.join(words), *script.arguments.split()])


def _shown_tokenizer(tokenizer: str) -> str:
    if not is_checkpoint(tokenizer):
        return tokenizer
    return HUGGING_FACE + _shown(Path(tokenizer.removeprefix(HUGGING_FACE)).resolve())


def _shown(path: Path) -> str:
    """A path as somebody in the present folder would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
