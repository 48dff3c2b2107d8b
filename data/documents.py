"""Corpora of documents, from the Hugging Face hub or from files of the same form, streamed through a BPE.

Each document ends with the end-of-text token. It is held out for validation if a hash of its text says so: the choice
needs no second pass, does not depend on the order, and puts copies of a document on the same side.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.preparing import Progress, announce, arguments, check_name, checkpoint_tokenizer, fraction
from engine.corpus import FileTokenizer, write_corpus
from engine.hf_tokenizer import is_checkpoint

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
PACKED = (".gz", ".zst", ".xz", ".bz2")
FETCHED = {"gpt2": "openai-community/gpt2"}  # tokenizers on the hub
BATCH = 512  # documents encoded at a time, in parallel


@dataclass(frozen=True)
class Hub:
    """Where a corpus lies on the hub. `subset` is what the hub calls a configuration; None where there is but one."""

    dataset: str
    repository: str
    subset: str | None
    val_fraction: float


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            "this corpus is read with the package 'datasets', which is not installed: pip install datasets"
        ) from None


def local_files(inputs: list[Path]) -> tuple[str, list[str]]:
    """The reader and the files for `--input`. Raises ValueError unless they are all of one kind."""
    files: list[Path] = []
    for given in inputs:
        if not given.exists():
            raise ValueError(f"--input {given}: there is no such file or folder.")
        files += [given] if given.is_file() else sorted(p for p in given.rglob("*") if p.is_file() and _reader(p))
    kinds = {_reader(path) for path in files}
    if len(kinds) != 1 or None in kinds:
        odd = next((path for path in files if _reader(path) is None), None)
        what = f"{odd} is of another kind" if odd else f"the files are of {len(kinds)} kinds"
        raise ValueError(f"--input takes files of one kind, {', '.join(READERS)}, possibly packed; {what}.")
    return str(kinds.pop()), [str(path) for path in files]


def _reader(path: Path) -> str | None:
    name = path.name
    for ending in PACKED:
        name = name.removesuffix(ending)
    return READERS.get(Path(name).suffix)


def stream(hub: Hub, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The rows of the corpus, one by one; nothing is downloaded ahead. Raises ValueError where it cannot be opened."""
    datasets = _datasets()
    try:
        if args.input:
            reader, files = local_files(args.input)
            whole = {"sample_by": "document"} if reader == "text" else {}
            return datasets.load_dataset(reader, data_files=files, split="train", streaming=True, **whole)
        return datasets.load_dataset(hub.repository, args.subset, revision=args.revision, split="train", streaming=True)
    except ValueError:
        raise
    except Exception as error:  # the library and its network layers raise many kinds
        said = _said(error)
        hint = " Try --revision refs/convert/parquet." if "script" in said else ""
        raise ValueError(
            f"'{hub.repository}' could not be opened: {said}.{hint} With no network, pass --input FILE or FOLDER."
        ) from None


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def texts(rows: Iterable[dict[str, Any]], column: str) -> Iterator[str]:
    """The texts of the rows that have one. Raises ValueError where there is no such column."""
    for row in rows:
        if column not in row:
            raise ValueError(f"--column: there is no column '{column}'. Known: {', '.join(sorted(row))}.")
        if row[column]:
            yield row[column]


def load_bpe(args: argparse.Namespace) -> FileTokenizer:
    """The tokenizer of a checkpoint, of `--tokenizer-file`, or one of `FETCHED`.

    Raises ValueError if it has no end-of-text token.
    """
    if is_checkpoint(args.tokenizer):
        if args.tokenizer_file:
            raise ValueError(
                f"--tokenizer-file: --tokenizer {args.tokenizer} names a file already. Leave one of them out."
            )
        tokenizer = checkpoint_tokenizer(args.tokenizer)
    elif args.tokenizer_file:
        tokenizer = FileTokenizer(args.tokenizer_file.read_text(encoding="utf-8"), args.tokenizer)
    elif args.tokenizer not in FETCHED:
        known = ", ".join(FETCHED)
        raise ValueError(f"--tokenizer {args.tokenizer}: give its --tokenizer-file too. Fetched by name: {known}.")
    else:
        try:
            found = importlib.import_module("tokenizers").Tokenizer.from_pretrained(FETCHED[args.tokenizer])
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"the tokenizer '{args.tokenizer}' could not be fetched: {_said(error)}. "
                "With no network, pass --tokenizer-file FILE, a tokenizer.json."
            ) from None
        tokenizer = FileTokenizer(found.to_str(), args.tokenizer)
    if tokenizer.end is None:
        raise ValueError(f"the tokenizer has no token that ends a document; known are {', '.join(FileTokenizer.ENDS)}.")
    return tokenizer


def is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2**64


def chunks(
    documents: Iterator[str], tokenizer: FileTokenizer, share: float, progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    end = np.array([tokenizer.end])
    while batch := list(islice(documents, BATCH)):
        for text, ids in zip(batch, tokenizer.encode_documents(batch), strict=True):
            yield "val" if is_held_out(text, share) else "train", np.concatenate([ids, end])
            progress.add(1, len(ids) + 1)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 on")
    return int(text)


def options(hub: Hub, doc: str | None, tokenizers: tuple[str, ...]) -> argparse.Namespace:
    parser = arguments(doc, tokenizers, others=True)
    several = "a .jsonl, .parquet or .txt file, or a folder of them, instead of the hub; may be repeated"
    parser.add_argument("--input", action="append", type=Path, metavar="PATH", help=several)
    parser.add_argument("--column", default="text", help="the column with the text (default %(default)s)")
    parser.add_argument("--subset", default=hub.subset, help="the configuration on the hub (default %(default)s)")
    parser.add_argument("--revision", help="the revision on the hub")
    parser.add_argument("--tokenizer-file", type=Path, metavar="FILE", help="a tokenizer.json, instead of fetching it")
    parser.add_argument("--max-documents", type=count, metavar="N", help="stop after so many")
    share = "share of the documents held out (default %(default)s)"
    parser.add_argument("--val-fraction", type=fraction, default=hub.val_fraction, metavar="SHARE", help=share)
    return parser.parse_args()


def prepare(hub: Hub, doc: str | None, tokenizers: tuple[str, ...]) -> None:
    """The whole of a prepare script."""
    args = options(hub, doc, tokenizers)
    if not is_checkpoint(args.tokenizer):
        check_name("--tokenizer", args.tokenizer)
    rows, tokenizer, progress = stream(hub, args), load_bpe(args), Progress("documents")
    documents = islice(texts(rows, args.column), args.max_documents)

    def source() -> str:
        where = ", ".join(path.name for path in args.input) if args.input else hub.repository
        part = f", {args.subset}" if args.subset and not args.input else ""
        return f"{progress.units} documents of {where}{part}."

    folder = args.out / hub.dataset / tokenizer.name
    done = chunks(documents, tokenizer, args.val_fraction, progress)
    announce(folder, write_corpus(folder, done, dataset=hub.dataset, tokenizer=tokenizer, source=source))
