"""Each prepare script from end to end, on small files; what has a network is stood in for."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.corpus import DTYPES, REPOSITORY, FileTokenizer, Meta, load_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\nIl était une fois, \N{FOX FACE}.\n" * 12
END = "<|endoftext|>"


def ids(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", dtype=DTYPES[Meta.read(folder).dtype])


def decoded(folder: Path) -> tuple[str, str]:
    tokenizer = load_tokenizer(folder)
    return tokenizer.decode(ids(folder, "train")), tokenizer.decode(ids(folder, "val"))


def prepare(corpus: str, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a prepare script as a user does, from the root of the repository."""
    command = [sys.executable, f"data/{corpus}/prepare.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **(env or {})})


def load(path: str) -> ModuleType:
    """A module of the data folder, as it stands in its file."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), REPOSITORY / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


# shakespeare_char


def test_shakespeare_splits_by_characters(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text(TEXT, encoding="utf-8")
    for tokenizer, size in (("char", len(set(TEXT))), ("byte", 256)):
        done = prepare(
            "shakespeare_char", "--input", tmp_path / "play.txt", "--tokenizer", tokenizer, "--out", tmp_path / "root"
        )
        assert done.returncode == 0, done.stderr
        folder, cut = tmp_path / "root" / "shakespeare_char" / tokenizer, int(len(TEXT) * 0.9)
        assert decoded(folder) == (TEXT[:cut], TEXT[cut:])
        assert Meta.read(folder).vocab_size == size and Meta.read(folder).dataset == "shakespeare_char"
        assert done.stdout.count("\n") == 1 and str(folder) in done.stdout and f"vocabulary {size}," in done.stdout


def test_shakespeare_mistakes_are_sentences(tmp_path: Path) -> None:
    for name, raw, said in (
        ("empty.txt", b"", "empty.txt is empty."),
        ("tiny.txt", b"abc", "is too small: 2 tokens in train and 1 tokens in val"),
        ("latin.txt", "é".encode("latin-1") * 9, "latin.txt is not UTF-8 text (byte 0)"),
    ):
        (tmp_path / name).write_bytes(raw)
        done = prepare("shakespeare_char", "--input", tmp_path / name, "--out", tmp_path / "root")
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    done = prepare("shakespeare_char", "--input", tmp_path / "none.txt", "--out", tmp_path / "root")
    assert done.returncode == 1 and "none.txt" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "root").rglob("*.bin"))


def test_shakespeare_without_a_network_asks_for_a_file(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound but not listening: connections are refused at once
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = prepare("shakespeare_char", "--out", tmp_path, env={"https_proxy": proxy, "no_proxy": ""})
    assert done.returncode == 1 and "pass --input FILE" in done.stderr and "Traceback" not in done.stderr


def test_shakespeare_trusts_no_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("data/shakespeare_char/prepare.py")
    page = b"<html>Please log in</html>"
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(page))
    with pytest.raises(ValueError, match=r"\(26 bytes\) is not tiny Shakespeare"):
        module.download()
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(page).hexdigest())
    assert module.download() == page.decode()


# stdlib (its bytes are tested where it prepares itself, in test_data.py)


def test_stdlib_as_characters_is_plain(tmp_path: Path) -> None:
    done = prepare("stdlib", "--tokenizer", "char", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    meta = Meta.read(tmp_path / "stdlib" / "char")
    assert meta.chars and set(meta.chars) <= {chr(c) for c in range(32, 127)} | {"\n", "\t"}
    assert 90 < meta.vocab_size <= 97 and meta.splits["train"] > 3_000_000
    assert "plain ASCII of the standard library of Python" in meta.source


def test_stdlib_selects_files_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("data/stdlib/prepare.py")
    kept = {"abc.py": "1\n", "json/decoder.py": "2\n", "json/tool.py": "é = 3\n"}
    others = ["test/test_abc.py", "unittest/test/dummy.py", "idlelib/idle_test/mock.py", "site-packages/torch.py"]
    others += ["_sysconfigdata_here.py", "sitecustomize.py", "encodings/cp437.py", "config-3.11/python-config.py"]
    for name, text in {**kept, **dict.fromkeys(others, "0\n")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "ast.py").write_bytes("é".encode("latin-1"))
    assert dict(module.sources(tmp_path)) == kept
    assert [name for name, _ in module.sources(tmp_path)] == sorted(kept)


def test_stdlib_without_sources_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("data/stdlib/prepare.py")
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="comes without the source of its standard library"):
        module.main()


# text


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("bbb\n" * 100)
    (folder / "a.txt").write_text("aaa\r\n" * 100, newline="")
    (folder / "deep" / "c.md").write_text("ccc\n" * 100)
    (folder / ".hidden").write_bytes(b"\xff")
    return folder


def test_texts_are_joined_in_order(tmp_path: Path, books: Path) -> None:
    whole = "aaa\n" * 100 + "\n" + "bbb\n" * 100 + "\n" + "ccc\n" * 100
    done = prepare("text", "--input", books, "--name", "mine", "--out", tmp_path / "root")
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "root" / "mine" / "char") == (
        whole[: int(len(whole) * 0.9)],
        whole[int(len(whole) * 0.9) :],
    )
    assert Meta.read(tmp_path / "root" / "mine" / "char").source == "The text of 3 files: a.txt, b.txt, c.md."
    inputs = ["--input", str(books / "**" / "*.md"), "--input", str(books / "a.txt"), "--input", str(books / "*.txt")]
    done = prepare("text", *inputs, "--tokenizer", "byte", "--val-fraction", "0.5", "--out", tmp_path / "root")
    assert done.returncode == 0, done.stderr
    whole = "ccc\n" * 100 + "\n" + "aaa\n" * 100 + "\n" + "bbb\n" * 100  # as given, none twice
    assert decoded(tmp_path / "root" / "text" / "byte") == (whole[: len(whole) // 2], whole[len(whole) // 2 :])


def test_texts_as_byte_pairs(tmp_path: Path, books: Path) -> None:
    pytest.importorskip("tokenizers", reason="BPE corpora need the optional package 'tokenizers'")
    (books / "z.txt").write_text(f"zebra zebra zebra {END}\n" * 5)
    arguments: list[str | Path] = [
        "--input",
        books,
        "--tokenizer",
        "bpe",
        "--vocab-size",
        "280",
        "--val-fraction",
        "0.15",
    ]
    metas = []
    for root in ("one", "two"):
        done = prepare("text", *arguments, "--out", tmp_path / root)
        assert done.returncode == 0, done.stderr
        metas.append(Meta.read(tmp_path / root / "text" / "bpe"))
    assert metas[0] == metas[1]  # learning gives the same vocabulary every time
    folder = tmp_path / "one" / "text" / "bpe"
    train, val = decoded(folder)
    parts = ["aaa\n" * 100, "bbb\n" * 100, "ccc\n" * 100, f"zebra zebra zebra {END}\n" * 5]
    assert train + val == "".join(part + END for part in parts)
    tokenizer = load_tokenizer(folder)
    assert np.concatenate([ids(folder, "train"), ids(folder, "val")]).tolist().count(tokenizer.end) == 4
    assert isinstance(tokenizer, FileTokenizer) and metas[0].tokenizer_file == "tokenizer.json"
    assert not any("zebr" in token for token in tokenizer._tokens)  # learned from the training part alone
    assert any("aaa" in token for token in tokenizer._tokens)
    assert metas[0].vocab_size <= 280


def test_text_mistakes_are_sentences(tmp_path: Path, books: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"PNG\xff\xfe")
    cases: list[tuple[list[str | Path], str]] = [
        (["--input", tmp_path / "nowhere*"], "nowhere*: no such file"),
        (["--input", tmp_path / "empty.txt"], "the 1 files hold no text"),
        (["--input", tmp_path / "binary"], "binary is not UTF-8 text (byte 3)"),
        (["--input", books, "--name", "../x"], "--name ../x: a name is made of letters"),
        (["--input", books, "--name", "stdlib"], "--name stdlib is taken"),
        (["--input", books, "--tokenizer", "bpe", "--vocab-size", "99"], "--vocab-size 99 is too small"),
        (["--input", books, "--val-fraction", "1"], "'1' is not a number between 0 and 1"),
        (["--input", books, "--tokenizer", "bytes"], "invalid choice: 'bytes'"),
        ([], "the following arguments are required: --input"),
    ]
    for arguments, said in cases:
        done = prepare("text", *arguments, "--out", tmp_path / "root")
        assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "root").exists()


def test_pieces_lose_nothing() -> None:
    pieces = load("data/preparing.py").pieces

    @given(st.text(alphabet="ab\n"), st.integers(1, 9))
    def holds(text: str, size: int) -> None:
        parts = list(pieces(text, size))
        assert "".join(parts) == text and all(0 < len(part) <= size for part in parts)
        assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])

    holds()


# openwebtext and fineweb

DOCUMENTS = [f"Document {i}: {'word ' * (i % 7)}{END} é" for i in range(1300)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A stand-in for the package `datasets` that serves DOCUMENTS and remembers what it was asked for."""
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        asked.append((args, kwargs))
        return ({"text": text, "url": "x"} for text in ["", *DOCUMENTS])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (tmp_path / "bpe.json").write_text(bpe(*DOCUMENTS[:50]))
    return asked


def run_in_process(monkeypatch: pytest.MonkeyPatch, corpus: str, *arguments: str | Path) -> None:
    module = load(f"data/{corpus}/prepare.py")
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    module.prepare(module.HUB, module.__doc__, module.TOKENIZERS)


def held_out(text: str, share: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < share * 2**64


def test_documents_stream_through_the_tokenizer(
    tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--tokenizer-file", tmp_path / "bpe.json", "--val-fraction", "0.1", "--out", tmp_path / "root")
    run_in_process(monkeypatch, "openwebtext", *arguments)
    folder = tmp_path / "root" / "openwebtext" / "gpt2"
    assert decoded(folder) == (
        "".join(text + END for text in DOCUMENTS if not held_out(text, 0.1)),
        "".join(text + END for text in DOCUMENTS if held_out(text, 0.1)),
    )
    tokenizer = load_tokenizer(folder)
    assert (ids(folder, "train") == tokenizer.end).sum() == sum(not held_out(text, 0.1) for text in DOCUMENTS)
    assert Meta.read(folder).source == "1300 documents of Skylion007/openwebtext."
    assert str(folder) in capsys.readouterr().out
    run_in_process(monkeypatch, "fineweb", *arguments, "--tokenizer", "tiny", "--max-documents", "600")
    assert (
        Meta.read(tmp_path / "root" / "fineweb" / "tiny").source
        == "600 documents of HuggingFaceFW/fineweb, sample-10BT."
    )
    common = {"split": "train", "streaming": True, "revision": None}
    assert hub == [
        (("Skylion007/openwebtext", None), common),
        (("HuggingFaceFW/fineweb", "sample-10BT"), common),
    ]


def test_document_mistakes_are_sentences(
    tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.png").write_text("c")
    given_file = ["--tokenizer-file", tmp_path / "bpe.json"]
    for arguments, said in (
        ([*given_file, "--column", "body"], "no column 'body'. Known: text, url."),
        ([*given_file, "--max-documents", "1"], "'fineweb' is too small"),
        ([*given_file, "--tokenizer", "a/b"], "--tokenizer a/b: a name is made of"),
        (["--tokenizer", "llama"], "give its --tokenizer-file too. Fetched by name: gpt2."),
        ([*given_file, "--input", tmp_path / "none"], "there is no such file or folder"),
        ([*given_file, "--input", tmp_path / "a.jsonl", "--input", tmp_path / "b.txt"], "the files are of 2 kinds"),
        ([*given_file, "--input", tmp_path / "c.png"], "c.png is of another kind"),
    ):
        with pytest.raises(ValueError) as caught:
            run_in_process(monkeypatch, "fineweb", *arguments, "--out", tmp_path / "root")
        assert said in str(caught.value)
    with pytest.raises(SystemExit):
        run_in_process(monkeypatch, "fineweb", "--max-documents", "0")
    assert "'0' is not a number from 1 on" in capsys.readouterr().err
    assert not list((tmp_path / "root").rglob("*.bin"))


def test_the_hub_out_of_reach_is_a_sentence(tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub.\nlong story")

    def scripted(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"could not be opened: Couldn't reach the Hub\. With no network, pass --input"
    ):
        run_in_process(monkeypatch, "openwebtext", "--out", tmp_path)
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", scripted)
    with pytest.raises(ValueError, match=r"openwebtext\.py\. Try --revision refs/convert/parquet\."):
        run_in_process(monkeypatch, "openwebtext", "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        run_in_process(monkeypatch, "openwebtext", "--out", tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    (tmp_path / "plain.json").write_text(Library(models.BPE(vocab={"a": 0}, merges=[])).to_str())
    with pytest.raises(ValueError, match="no token that ends a document"):
        run_in_process(monkeypatch, "openwebtext", "--tokenizer-file", tmp_path / "plain.json", "--out", tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder of text"])
def test_documents_from_local_files_with_the_real_library(tmp_path: Path, kind: str) -> None:
    pytest.importorskip(
        "datasets", reason="NOT TESTED: openwebtext and fineweb with the real 'datasets' (pip install datasets)"
    )
    documents, path = DOCUMENTS[:60], tmp_path / f"in.{kind}"
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents))
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        parquet = importlib.import_module("pyarrow.parquet")
        parquet.write_table(importlib.import_module("pyarrow").table({"text": documents}), path)
    else:
        path.mkdir()
        for i, text in enumerate(documents):
            (path / f"{i:03}.txt").write_text(text + "\n\nSecond paragraph.", encoding="utf-8")
        documents = [text + "\n\nSecond paragraph." for text in documents]
    (tmp_path / "bpe.json").write_text(bpe(*documents))
    done = prepare(
        *("fineweb", "--input", path, "--tokenizer-file", tmp_path / "bpe.json", "--tokenizer", "tiny"),
        *("--val-fraction", "0.2", "--max-documents", "50", "--out", tmp_path / "root"),
        env={"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "root" / "fineweb" / "tiny") == (
        "".join(text + END for text in documents[:50] if not held_out(text, 0.2)),
        "".join(text + END for text in documents[:50] if held_out(text, 0.2)),
    )
