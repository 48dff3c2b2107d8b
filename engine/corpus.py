"""Making corpora: tokenizers, what is known about a corpus, and writing one so that it is whole or not there.

A prepared corpus is a folder `<root>/<dataset>/<tokenizer>/` with `train.bin` and `val.bin` (token ids, little endian)
and `meta.json`. It is identified by its content: the same tokens and vocabulary have the same hash, whoever made them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "data"  # the default root of prepared corpora, and the home of their prepare.py
SPLITS = ("train", "val")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
META, TOKENIZER_FILE = "meta.json", "tokenizer.json"

Chunks = Iterable[tuple[str, np.ndarray]]  # a split's name and its next ids [n]
Source = str | Callable[[], str]


@dataclass(frozen=True)
class Meta:
    """What `meta.json` says. `splits` counts tokens; `chars` is the vocabulary of char, `tokenizer_file` of others.

    `end` is the id that ends a document, for a tokenizer of a file; without it, the file's own vocabulary is searched.
    """

    dataset: str
    tokenizer: str
    vocab_size: int
    dtype: str
    splits: dict[str, int]
    source: str
    content_hash: str
    chars: tuple[str, ...] | None = None
    tokenizer_file: str | None = None
    end: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Meta:
        """The meta data of a prepared corpus. Raises ValueError where there is none or it makes no sense."""
        path = Path(folder) / META
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} is not a prepared corpus: it holds no {META}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON ({error}). Prepare the corpus again.") from None
        wrong = _wrong_in(tree)
        if wrong:
            raise ValueError(f"{path}: {wrong}. Prepare the corpus again.")
        chars = tree.get("chars")
        return cls(**{**tree, "chars": None if chars is None else tuple(chars)})


def _wrong_in(tree: Any) -> str:
    """What is wrong with the content of a meta.json, or ''."""
    if not isinstance(tree, dict):
        return "a mapping is expected"
    required: dict[str, type] = dict.fromkeys(("dataset", "tokenizer", "dtype", "source", "content_hash"), str)
    required |= {"vocab_size": int, "splits": dict}
    for key, kind in required.items():
        if not isinstance(tree.get(key), kind):
            return f"'{key}' is missing or not of the type {kind.__name__}"
    for key in set(tree) - set(required) - {"chars", "tokenizer_file", "end"}:
        return f"unknown key '{key}'"
    if tree["dtype"] not in DTYPES:
        return f"dtype '{tree['dtype']}' is none of {', '.join(DTYPES)}"
    if set(tree["splits"]) != set(SPLITS) or not all(isinstance(n, int) and n > 0 for n in tree["splits"].values()):
        return f"'splits' must count the tokens of {' and '.join(SPLITS)}"
    chars, file, end = (tree.get(key) for key in ("chars", "tokenizer_file", "end"))
    if chars is not None and not (isinstance(chars, list) and all(isinstance(c, str) for c in chars)):
        return "'chars' must be a list of characters"
    if file is not None and (not isinstance(file, str) or Path(file).name != file):
        return "'tokenizer_file' must be the name of a file in this folder"
    if end is not None and not (type(end) is int and 0 <= end < tree["vocab_size"]):
        return "'end' must be an id of the vocabulary"
    return ""


class Tokenizer(ABC):
    """Text to ids and back. `end` is the id that closes a document, None where the vocabulary has none."""

    name: str
    vocab_size: int
    end: int | None = None

    @property
    def dtype(self) -> str:
        """The smallest of the stored types that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids `[n]` in the stored type. Raises ValueError for a character outside the vocabulary."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ids. Raises ValueError for an id outside the vocabulary."""

    def unknown(self, text: str) -> list[str]:
        """The characters of `text` that cannot be encoded: distinct and sorted. Lone surrogates are no Unicode text."""
        return [] if text.isascii() else sorted({c for c in text if "\ud800" <= c <= "\udfff"})

    @abstractmethod
    def vocabulary(self) -> bytes:
        """What the ids mean, in a form that is the same wherever it is computed; part of the content hash."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, taken as ordinary text: a special token that is spelled out in it stays spelled out."""
        return [self.encode(text) for text in texts]

    def _refuse(self, text: str) -> ValueError:
        strange = self.unknown(text)
        shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in strange[:5]) + (", ..." if len(strange) > 5 else "")
        what = "this character" if len(strange) == 1 else f"these {len(strange)} characters"
        return ValueError(f"the {self.name} tokenizer (vocabulary {self.vocab_size}) cannot encode {what}: {shown}.")

    def _ids(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            bad = int(array[(array < 0) | (array >= self.vocab_size)][0])
            raise ValueError(f"id {bad} is outside the {self.name} tokenizer's vocabulary of {self.vocab_size}.")
        return array


class CharTokenizer(Tokenizer):
    """One id per character, numbered in the order of `chars`."""

    def __init__(self, chars: Iterable[str], name: str = "char") -> None:
        self.name, self.chars = name, tuple(chars)
        if not self.chars or any(len(c) != 1 for c in self.chars) or len(set(self.chars)) != len(self.chars):
            raise ValueError(f"the {name} tokenizer needs distinct single characters, and at least one.")
        self.vocab_size = len(self.chars)
        self._codes = np.array([ord(c) for c in self.chars], dtype="<u4")
        # From code point to id, -1 for none; the last entry stands for all higher code points.
        self._table = np.full(int(self._codes.max()) + 2, -1, dtype=np.int64)
        self._table[self._codes] = np.arange(self.vocab_size)

    @classmethod
    def of(cls, text: Iterable[str]) -> CharTokenizer:
        """The tokenizer of the characters that occur in pieces of text, sorted, as nanoGPT numbers them."""
        chars: set[str] = set()
        for piece in text:
            chars.update(piece)
        return cls(sorted(chars))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        if ids.size and ids.min() < 0:
            raise self._refuse(text)
        return ids.astype(DTYPES[self.dtype])

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self._codes[self._ids(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def unknown(self, text: str) -> list[str]:
        return sorted(set(text) - set(self.chars))

    def vocabulary(self) -> bytes:
        return json.dumps(self.chars).encode()


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8. Bytes that are not UTF-8 decode to U+FFFD, as a sample may stop inside a character."""

    name, vocab_size = "byte", 256

    def encode(self, text: str) -> np.ndarray:
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            raise self._refuse(text) from None
        return np.frombuffer(raw, dtype=np.uint8).astype(DTYPES[self.dtype])

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return self._ids(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def vocabulary(self) -> bytes:
        return b"bytes"


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from the content of its JSON file.

    `end` is the id that ends a document; without it, that of the first of `ENDS` in the vocabulary. Text is never cut or
    filled up to a length, whatever the file says.
    """

    ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # how the field spells the end of a document

    def __init__(self, content: str, name: str = "bpe", end: int | None = None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"the {name} tokenizer needs the package 'tokenizers': pip install tokenizers") from None
        self.name, self.content = name, content
        try:
            # Two of them: one reads special tokens in prompts, the other takes the text of documents as it stands.
            self._special, self._plain = tokenizers.Tokenizer.from_str(content), tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the {name} tokenizer's file is not one of the 'tokenizers' library: {error}") from None
        self._plain.encode_special_tokens = True
        for made in (self._special, self._plain):
            made.no_truncation()
            made.no_padding()
        self._tokens: dict[str, int] = self._special.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._tokens.values()) + 1 if self._tokens else 0  # ids may have gaps
        self.end = next((self._tokens[t] for t in self.ENDS if t in self._tokens), None) if end is None else end
        unknown = getattr(self._special.model, "unk_token", None)
        self._lost = self._tokens.get(unknown) if isinstance(unknown, str) else None

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = self._special.encode(text, add_special_tokens=False).ids
        except TypeError:  # how the library takes lone surrogates
            raise self._refuse(text) from None
        return np.array(ids, dtype=DTYPES[self.dtype])

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encoded = self._plain.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:
            raise self._refuse("".join(texts)) from None
        return [np.array(e.ids, dtype=DTYPES[self.dtype]) for e in encoded]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return str(self._special.decode(self._ids(ids).tolist(), skip_special_tokens=False))

    def unknown(self, text: str) -> list[str]:
        return sorted(c for c in set(text) if not self._can(c))

    def _can(self, char: str) -> bool:
        if super().unknown(char):
            return False
        ids = self._plain.encode(char, add_special_tokens=False).ids
        # Word-level pre-tokenizers swallow a lone space, which is no loss; anything else that gives nothing is one.
        return (bool(ids) or char.isspace()) and self._lost not in ids

    def vocabulary(self) -> bytes:
        return json.dumps(sorted(self._tokens.items(), key=lambda item: (item[1], item[0]))).encode()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a prepared corpus. Raises ValueError where its vocabulary is missing or another one."""
    meta = Meta.read(folder)
    tokenizer: Tokenizer
    if meta.chars is not None:
        tokenizer = CharTokenizer(meta.chars, meta.tokenizer)
    elif meta.tokenizer_file is not None:
        path = Path(folder) / meta.tokenizer_file
        if not path.is_file():
            raise ValueError(f"{path} is missing. Prepare the corpus again.")
        tokenizer = FileTokenizer(path.read_text(encoding="utf-8"), meta.tokenizer, meta.end)
    elif meta.tokenizer == ByteTokenizer.name:
        tokenizer = ByteTokenizer()
    else:
        raise ValueError(f"{folder}: {META} names neither 'chars' nor a 'tokenizer_file' for '{meta.tokenizer}'.")
    if tokenizer.vocab_size != meta.vocab_size:
        raise ValueError(f"{folder}: the vocabulary has {tokenizer.vocab_size} ids, but {META} says {meta.vocab_size}.")
    return tokenizer


def write_corpus(folder: Path, chunks: Chunks, *, dataset: str, tokenizer: Tokenizer, source: Source) -> Meta:
    """Writes a corpus from pairs of a split's name and its next ids `[n]`, in any order of splits; returns what it is.

    The chunks may be a generator of any length: memory holds one at a time. `source` is one sentence about the origin,
    or gives it once all chunks are through. The folder appears whole or not at all, and replaces one already there.
    Raises ValueError for a split of fewer than two tokens, and where `folder` holds something that is not a corpus.
    """
    folder = Path(os.path.realpath(folder))  # a linked folder is replaced where it lies
    with sibling(folder) as beside:
        meta = _fill(beside, chunks, dataset, tokenizer, source)
        place(beside, folder, replace=True)
    return meta


def _fill(folder: Path, chunks: Chunks, dataset: str, tokenizer: Tokenizer, source: Source) -> Meta:
    counts, hashes = dict.fromkeys(SPLITS, 0), {split: hashlib.sha256() for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in SPLITS}
        for split, ids in chunks:
            assert ids.ndim == 1 and (not ids.size or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)), ids
            raw = ids.astype(DTYPES[tokenizer.dtype]).tobytes()
            files[split].write(raw)
            hashes[split].update(raw)
            counts[split] += len(ids)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if min(counts.values()) < 2:
        got = " and ".join(f"{counts[split]} tokens in {split}" for split in SPLITS)
        raise ValueError(
            f"the input of the corpus '{dataset}' is too small: {got}, and each needs 2 at the least. Give it more "
            "text, or hold out another share of it."
        )
    meta = Meta(
        dataset=dataset,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        dtype=tokenizer.dtype,
        splits=counts,
        source=source if isinstance(source, str) else source(),
        content_hash=_content_hash(tokenizer, hashes),
        chars=tokenizer.chars if isinstance(tokenizer, CharTokenizer) else None,
        tokenizer_file=TOKENIZER_FILE if isinstance(tokenizer, FileTokenizer) else None,
        end=tokenizer.end,
    )
    if isinstance(tokenizer, FileTokenizer):
        (folder / TOKENIZER_FILE).write_text(tokenizer.content, encoding="utf-8")
    said = {key: value for key, value in asdict(meta).items() if value is not None}
    (folder / META).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return meta


def _content_hash(tokenizer: Tokenizer, hashes: dict[str, Any]) -> str:
    """A hash of hashes, so that the splits may be written side by side and still count in a fixed order."""
    total = hashlib.sha256(hashlib.sha256(tokenizer.vocabulary()).digest())
    for split in SPLITS:
        total.update(hashes[split].digest())
    return total.hexdigest()


def is_name(text: str) -> bool:
    """Whether `text` can name a dataset or a tokenizer, each a folder."""
    return re.fullmatch(r"[^\W_][\w.-]*", text) is not None


@contextmanager
def sibling(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, on its file system, where a rename is atomic; removed at the end if still there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}"
    beside.mkdir()
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def place(beside: Path, folder: Path, *, replace: bool) -> None:
    """Renames the complete corpus `beside` to `folder`.

    One that is already there stays where it is the same, or `replace` is off. Raises ValueError where `folder` holds
    something else: that is somebody's data and not ours to remove.
    """
    old = beside.with_name(beside.name + ".old")
    try:
        while not _rename(beside, folder):
            if folder.is_dir() and not (folder / META).is_file():
                raise ValueError(f"{folder} exists and is not a prepared corpus. Move it away or choose another.")
            if not replace or _same(beside, folder):
                return
            shutil.rmtree(old, ignore_errors=True)
            try:
                os.rename(folder, old)  # readers keep what they have mapped
            except FileNotFoundError:  # another process is replacing it as well: the last one to rename wins
                continue
    except BaseException:
        if old.is_dir() and not folder.exists():
            os.rename(old, folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _rename(beside: Path, folder: Path) -> bool:
    """False where `folder` is already there and not empty."""
    try:
        os.rename(beside, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _same(one: Path, other: Path) -> bool:
    try:
        sizes = [[(folder / f"{split}.bin").stat().st_size for split in SPLITS] for folder in (one, other)]
        return Meta.read(one) == Meta.read(other) and sizes[0] == sizes[1]
    except (ValueError, OSError):  # a damaged one is replaced
        return False
