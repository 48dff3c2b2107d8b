"""Making corpora: tokenizers, and writing that is whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.corpus import (
    DTYPES,
    META,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    Meta,
    Tokenizer,
    load_tokenizer,
    place,
    write_corpus,
)

TEXT = "The quick brown fox jumps over the lazy dog.\nIl était une fois, \N{FOX FACE}.\n" * 12
END = "<|endoftext|>"


def write(folder: Path, text: str = TEXT, tokenizer: Tokenizer | None = None, source: str = "A test.") -> Meta:
    """A corpus whose validation split is the last 50 ids."""
    tokenizer = tokenizer or CharTokenizer.of([text])
    ids = tokenizer.encode(text)
    chunks = [("train", ids[:-50]), ("val", ids[-50:])]
    return write_corpus(folder, chunks, dataset="mine", tokenizer=tokenizer, source=source)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ids(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", dtype=DTYPES[Meta.read(folder).dtype])


def decoded(folder: Path) -> tuple[str, str]:
    tokenizer = load_tokenizer(folder)
    return tokenizer.decode(ids(folder, "train")), tokenizer.decode(ids(folder, "val"))


def bpe(*texts: str, vocab_size: int = 300) -> str:
    """The JSON of a small byte-level BPE with an end-of-text token, made by the library itself."""
    tokenizers = pytest.importorskip("tokenizers", reason="BPE corpora need the optional package 'tokenizers'")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts or [TEXT], trainer)
    return str(model.to_str())


# Tokenizers


@given(st.text(min_size=1))
def test_char_round_trip(text: str) -> None:
    tokenizer = CharTokenizer.of([text])
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded) == text and encoded.dtype == "<u2"
    assert encoded.tolist() == [sorted(set(text)).index(c) for c in text]  # as nanoGPT numbers them
    assert tokenizer.vocab_size == len(set(text)) and tokenizer.unknown(text) == []


@given(st.text())
def test_byte_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == list(text.encode())


def test_bpe_round_trip() -> None:
    tokenizer = FileTokenizer(bpe())

    @given(st.text())
    def holds(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.unknown(text) == []
        assert tokenizer.decode(tokenizer.encode_documents([text])[0]) == text

    holds()
    assert tokenizer.vocab_size == 300 and len(tokenizer.encode(TEXT)) < len(TEXT) / 1.5


@given(known=st.text(min_size=1), text=st.text())
def test_unknown_characters_are_named(known: str, text: str) -> None:
    tokenizer = CharTokenizer.of([known])
    strange = sorted(set(text) - set(known))
    assert tokenizer.unknown(text) == strange
    if strange:
        with pytest.raises(
            ValueError, match=rf"vocabulary {len(set(known))}\) cannot encode .*U\+{ord(strange[0]):04X}"
        ):
            tokenizer.encode(text)


def test_a_lone_surrogate_is_no_text() -> None:
    for tokenizer in (ByteTokenizer(), FileTokenizer(bpe())):
        assert tokenizer.unknown("a\ud800b") == ["\ud800"]
        with pytest.raises(ValueError, match=r"cannot encode this character: '\\ud800' \(U\+D800\)"):
            tokenizer.encode("a\ud800b")
        with pytest.raises(ValueError, match=r"cannot encode this character: '\\ud800'"):
            tokenizer.encode_documents(["fine", "a\ud800b"])


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer.of(["abc"]), FileTokenizer(bpe())):
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=f"id {bad} is outside"):
                tokenizer.decode([0, bad])
        assert tokenizer.decode([]) == ""
    assert ByteTokenizer().decode([0x61, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"  # a sample may stop inside a character


def test_end_of_text_is_special_in_prompts_and_plain_in_documents() -> None:
    tokenizer = FileTokenizer(bpe())
    assert tokenizer.end is not None
    assert tokenizer.encode(f"a{END}").tolist()[-1] == tokenizer.end
    plain = tokenizer.encode_documents([f"a{END}"])[0]
    assert tokenizer.end not in plain and tokenizer.decode(plain) == f"a{END}"
    assert tokenizer.decode([tokenizer.end]) == END


def test_a_tokenizer_that_loses_characters_says_so() -> None:
    pytest.importorskip("tokenizers", reason="BPE corpora need the optional package 'tokenizers'")
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    silent = FileTokenizer(Library(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).to_str())
    marked = FileTokenizer(Library(models.BPE(vocab={"a": 0, "b": 1, "?": 2}, merges=[], unk_token="?")).to_str())
    assert silent.unknown("abz") == marked.unknown("abz") == ["z"]
    assert silent.end is None


def test_wrong_tokenizers() -> None:
    for chars in ([], ["ab"], ["a", "a"]):
        with pytest.raises(ValueError, match="distinct single characters"):
            CharTokenizer(chars)
    with pytest.raises(ValueError, match="file is not one of the 'tokenizers' library"):
        FileTokenizer("{}")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        FileTokenizer("{}")


# Writing


def test_what_is_written(tmp_path: Path) -> None:
    meta = write(tmp_path / "mine" / "char")
    assert meta == Meta.read(tmp_path / "mine" / "char")
    assert meta.chars == tuple(sorted(set(TEXT))) and meta.tokenizer_file is None
    assert meta.splits == {"train": len(TEXT) - 50, "val": 50} and meta.dtype == "uint16"
    assert "".join(decoded(tmp_path / "mine" / "char")) == TEXT
    assert sorted(content(tmp_path / "mine" / "char")) == [META, "train.bin", "val.bin"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["char"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    tokenizer = CharTokenizer(chr(code) for code in range(0x10000, 0x10000 + 70_000))
    text = "".join(tokenizer.chars[-100:])
    assert write(tmp_path / "c", text, tokenizer).dtype == "uint32"
    assert "".join(decoded(tmp_path / "c")) == text
    assert (tmp_path / "c" / "val.bin").stat().st_size == 200


def test_the_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    assert write(tmp_path / "two", source="From elsewhere.").content_hash == one.content_hash
    tokenizer = CharTokenizer.of([TEXT])
    encoded = tokenizer.encode(TEXT)
    pieces = [("val", encoded[-50:-20]), ("train", encoded[:7]), ("val", encoded[-20:]), ("train", encoded[7:-50])]
    told = write_corpus(
        tmp_path / "three", iter(pieces), dataset="x", tokenizer=tokenizer, source=lambda: "Told later."
    )
    assert told.content_hash == one.content_hash and told.source == "Told later."
    vocabulary = hashlib.sha256(json.dumps(sorted(set(TEXT))).encode()).digest()
    splits = [hashlib.sha256((tmp_path / "one" / f"{split}.bin").read_bytes()).digest() for split in ("train", "val")]
    assert one.content_hash == hashlib.sha256(vocabulary + splits[0] + splits[1]).hexdigest()
    others = [
        write(tmp_path / "a", TEXT[1:] + TEXT[0]),  # other tokens
        write(tmp_path / "b", TEXT.replace("T", "Z").replace("z", "y"), CharTokenizer(sorted({*TEXT, "Z"}))),
        write(tmp_path / "c", TEXT, CharTokenizer(sorted(set(TEXT), reverse=True))),  # other ids
        write(tmp_path / "d", TEXT, ByteTokenizer()),
    ]
    assert len({one.content_hash, *(other.content_hash for other in others)}) == 5
    swapped = CharTokenizer([*tokenizer.chars[:-1], "\N{SNOWMAN}"])  # the same ids with another meaning
    parts = [("train", encoded[:-50]), ("val", encoded[-50:])]
    meaning = write_corpus(tmp_path / "e", parts, dataset="x", tokenizer=swapped, source="A test.")
    assert (tmp_path / "e" / "train.bin").read_bytes() == (tmp_path / "one" / "train.bin").read_bytes()
    assert meaning.content_hash != one.content_hash


@pytest.mark.parametrize("failure", [ValueError("half-way"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    tokenizer = ByteTokenizer()

    def chunks() -> Iterator[tuple[str, np.ndarray]]:
        yield "train", tokenizer.encode(TEXT)
        yield "val", tokenizer.encode(TEXT)
        raise failure

    with pytest.raises(type(failure)):
        write_corpus(tmp_path / "mine" / "byte", chunks(), dataset="mine", tokenizer=tokenizer, source="A test.")
    assert not list((tmp_path / "mine").iterdir())
    write(tmp_path / "mine" / "byte", "old " * 50, tokenizer)
    before = content(tmp_path / "mine" / "byte")
    with pytest.raises(type(failure)):
        write_corpus(tmp_path / "mine" / "byte", chunks(), dataset="mine", tokenizer=tokenizer, source="A test.")
    assert content(tmp_path / "mine" / "byte") == before
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["byte"]


def test_an_older_corpus_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "char"
    write(folder, "old " * 50)
    mapped = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
    old = mapped.tolist()
    write(folder)
    assert "".join(decoded(folder)) == TEXT
    assert mapped.tolist() == old  # a run that is reading it goes on undisturbed
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["char"]
    (folder / "val.bin").write_bytes(b"damaged")
    write(folder)
    assert "".join(decoded(folder)) == TEXT
    same = (folder / "train.bin").stat().st_ino
    write(folder)
    assert (folder / "train.bin").stat().st_ino == same  # nothing to do


def test_the_old_corpus_returns_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine" / "char"
    write(folder, "old " * 50)
    before, rename, calls = content(folder), os.rename, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 3:  # 1: the place is taken; 2: the old one steps aside; 3: the new one moves in
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="went away"):
        write(folder)
    assert content(folder) == before
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["char"]


def test_somebody_else_s_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "char"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not a prepared corpus"):
        write(folder)
    assert content(folder) == {"thesis.txt": b"precious"}
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["char"]


def test_a_corpus_already_in_place_stays(tmp_path: Path) -> None:
    write(tmp_path / "here", "old " * 50)
    write(tmp_path / "new")
    before = content(tmp_path / "here")
    place(tmp_path / "new", tmp_path / "here", replace=False)
    assert content(tmp_path / "here") == before


def test_a_linked_folder_is_written_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk" / "char").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "char").symlink_to(tmp_path / "disk" / "char")
    for text in ("old " * 50, TEXT):
        write(tmp_path / "mine" / "char", text)
        assert "".join(decoded(tmp_path / "disk" / "char")) == text
    assert (tmp_path / "mine" / "char").is_symlink()


def test_too_little_is_refused(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    for train, val in (("", ""), ("abc", "d"), ("a", "bcd")):
        chunks = [("train", tokenizer.encode(train)), ("val", tokenizer.encode(val))]
        with pytest.raises(
            ValueError, match=f"'mine' is too small: {len(train)} tokens in train and {len(val)} tokens"
        ):
            write_corpus(tmp_path / "mine" / "byte", chunks, dataset="mine", tokenizer=tokenizer, source="A test.")
    assert not list((tmp_path / "mine").iterdir())


def test_descriptions_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a prepared corpus: it holds no meta\.json"):
        Meta.read(tmp_path)
    write(tmp_path / "c")
    path, whole = tmp_path / "c" / META, json.loads((tmp_path / "c" / META).read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"vocab_size": "65"}, "'vocab_size' is missing or not of the type int"),
        ({"dtype": "float16"}, "dtype 'float16' is none of uint16, uint32"),
        ({"splits": {"train": 5}}, "must count the tokens of train and val"),
        ({"splits": {"train": 5, "val": 0}}, "must count the tokens"),
        ({"chars": "abc"}, "'chars' must be a list"),
        ({"tokenizer_file": "../../secret.json"}, "must be the name of a file in this folder"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ]
    for change, said in changes:
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match=said):
            Meta.read(tmp_path / "c")
    for text, said in (("[]", "a mapping is expected"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            Meta.read(tmp_path / "c")
    path.write_text(json.dumps({**whole, "chars": ["a"]}))
    with pytest.raises(ValueError, match=f"has 1 ids, but meta.json says {whole['vocab_size']}"):
        load_tokenizer(tmp_path / "c")
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "chars"}))
    with pytest.raises(ValueError, match="neither 'chars' nor a 'tokenizer_file' for 'char'"):
        load_tokenizer(tmp_path / "c")
    path.write_text(json.dumps({**whole, "chars": None, "tokenizer_file": "tokenizer.json"}))
    with pytest.raises(ValueError, match=r"tokenizer.json is missing"):
        load_tokenizer(tmp_path / "c")
