"""What the prepare scripts share: their command line, reading text, splitting it, and telling how it went."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from engine.corpus import (
    DATA,
    SPLITS,
    ByteTokenizer,
    CharTokenizer,
    Chunks,
    FileTokenizer,
    Meta,
    Tokenizer,
    is_name,
    write_corpus,
)
from engine.hf_tokenizer import OFFERED, is_checkpoint, read_checkpoint

Texts = str | Sequence[str]

PIECE = 1 << 22  # characters encoded at a time: bounds memory, and is long enough to be fast


def arguments(doc: str | None, tokenizers: Sequence[str], *, others: bool = False) -> argparse.ArgumentParser:
    """A parser with what every script takes. The first of `tokenizers` is the default; `others` allows any name.

    'hf:FOLDER' among them allows 'hf:' with any folder of a checkpoint.
    """

    def known(text: str) -> str:
        if others or text in tokenizers or (OFFERED in tokenizers and is_checkpoint(text)):
            return text
        raise argparse.ArgumentTypeError(f"invalid choice: '{text}' (choose from {', '.join(tokenizers)})")

    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    what = f"how text becomes tokens: {', '.join(tokenizers)} (default {tokenizers[0]})"
    parser.add_argument("--tokenizer", type=known, default=tokenizers[0], metavar="NAME", help=what)
    where = "root folder; the corpus lands in ROOT/<dataset>/<tokenizer> (default: the repository's data folder)"
    parser.add_argument("--out", type=Path, default=DATA, metavar="ROOT", help=where)
    return parser


def fraction(text: str) -> float:
    """The type of an option that is a share of the corpus, strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number between 0 and 1, both excluded")
    return value


def check_name(option: str, name: str) -> None:
    """Raises ValueError for a name that cannot be a folder of a corpus."""
    if not is_name(name):
        raise ValueError(
            f"{option} {name}: a name is made of letters, digits, '_', '-' and '.', and begins with a letter."
        )


def run(main: Callable[[], None]) -> None:
    """Runs a script: the user's mistakes end it with a sentence; when terminated it still clears up what it began."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")


def announce(folder: Path, meta: Meta) -> None:
    """The line a script ends with."""
    counts = f"{meta.splits['train']:,} training and {meta.splits['val']:,} validation tokens"
    place = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else folder
    print(f"{place}: {counts}, vocabulary {meta.vocab_size:,}, sha256 {meta.content_hash[:12]}")


def read_text(path: Path) -> str:
    """A file's text with '\\n' for every line end. Raises ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}). Leave it out, or convert it first.") from None


def checkpoint_tokenizer(word: str) -> FileTokenizer:
    """The tokenizer that 'hf:' and a folder name. Raises ValueError where it cannot be used."""
    try:
        return read_checkpoint(word).load()
    except ValueError as error:
        raise ValueError(f"--tokenizer {word}: {error}") from None


def tokenizer_for(word: str, text: Iterable[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, or the char or the byte tokenizer; char knows the characters of `text`."""
    if is_checkpoint(word):
        return checkpoint_tokenizer(word)
    return ByteTokenizer() if word == ByteTokenizer.name else CharTokenizer.of(text)


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """`text` in parts of at most `size` characters, cut after the end of a line where there is one."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def encoded(tokenizer: Tokenizer, text: str) -> Iterator[np.ndarray]:
    """The ids of a text, piece by piece."""
    for piece in pieces(text):
        yield tokenizer.encode_documents([piece])[0]


def write_texts(root: Path, dataset: str, tokenizer: Tokenizer, train: Texts, val: Texts, source: str) -> None:
    """Writes a corpus of two texts, each whole or as its documents, and announces it.

    A document ends with the tokenizer's token for that, where it has one.
    """
    chunks: Chunks = ((s, ids) for s, texts in zip(SPLITS, (train, val), strict=True) for ids in _ids(tokenizer, texts))
    folder = root / dataset / tokenizer.name
    announce(folder, write_corpus(folder, chunks, dataset=dataset, tokenizer=tokenizer, source=source))


def _ids(tokenizer: Tokenizer, texts: Texts) -> Iterator[np.ndarray]:
    if isinstance(texts, str):
        yield from encoded(tokenizer, texts)
        return
    for document in texts:
        yield from encoded(tokenizer, document)
        if tokenizer.end is not None:
            yield np.array([tokenizer.end])


class Progress:
    """A line on standard error every few seconds, so that a long preparation is seen to move."""

    EVERY = 10.0  # seconds

    def __init__(self, unit: str) -> None:
        self.unit, self.units, self.tokens, self._said = unit, 0, 0, time.monotonic()

    def add(self, units: int, tokens: int) -> None:
        self.units += units
        self.tokens += tokens
        if time.monotonic() - self._said >= self.EVERY:
            self._said = time.monotonic()
            print(f"{self.units:,} {self.unit}, {self.tokens:,} tokens", file=sys.stderr, flush=True)
