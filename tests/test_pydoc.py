"""The corpus `pydoc`: it prepares itself, chooses topics by rule, and reads them without running what it reads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import decoded, load, prepare

from engine.corpus import REPOSITORY, ByteTokenizer, Meta, load_tokenizer
from engine.data import settle, stage_corpus

PLAIN = {chr(code) for code in range(32, 127)} | {"\n", "\t"}


def stand_in(root: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library that holds `text` as its topics, in the place of the real one."""
    path = root / "lib" / "pydoc_data" / "topics.py"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    module = load("data/pydoc/prepare.py")
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(root / "lib")})
    return path


def test_the_reference_prepares_itself(tmp_path: Path) -> None:
    staged = stage_corpus("pydoc", None, tmp_path)
    assert not list(tmp_path.iterdir())
    settled = settle(staged)
    assert settled.folder == tmp_path / "pydoc" / "byte" and settled.meta.dataset == "pydoc"
    tokenizer = load_tokenizer(settled.folder)
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.vocab_size == 256  # as stdlib's: weights carry over
    assert len(settled.train) > 300_000
    assert 0.03 < len(settled.val) / (len(settled.train) + len(settled.val)) < 0.2
    train, val = tokenizer.decode(settled.train), tokenizer.decode(settled.val)
    assert '# del\nThe "del" statement\n****' in train + val
    for name in ("assert", "binary", "calls", "debugger", "lambda", "subscriptions", "yield"):
        held_out = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 10 == 0  # by name, whatever the version
        assert (f"# {name}\n" in val, f"# {name}\n" in train) == (held_out, not held_out)


def test_the_reference_as_characters_is_plain(tmp_path: Path) -> None:
    done = prepare("pydoc", "--tokenizer", "char", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    meta = Meta.read(tmp_path / "pydoc" / "char")
    assert meta.chars and set(meta.chars) <= PLAIN and meta.vocab_size > 60
    assert meta.splits["train"] > 15_000 and meta.splits["val"] > 200
    assert "plain ASCII of the language reference of Python" in meta.source
    assert done.stdout.count("\n") == 1 and str(tmp_path / "pydoc" / "char") in done.stdout


def test_topics_are_chosen_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("data/pydoc/prepare.py")
    texts = {"yield": "Yields.\n", "else": "\tElse.\n", "calls": "It’s a call.\n", "binary": "Ünary.\n"}
    stand_in(tmp_path, f"# -*- coding: utf-8 -*-\nother = 1\ntopics = {texts!r}\n", monkeypatch)
    for tokenizer, train, val in (
        ("byte", "# calls\nIt’s a call.\n\n# yield\nYields.\n\n", "# binary\nÜnary.\n\n# else\n\tElse.\n\n"),
        ("char", "# yield\nYields.\n\n", "# else\n\tElse.\n\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--tokenizer", tokenizer, "--out", str(tmp_path / "root")])
        module.main()
        assert decoded(tmp_path / "root" / "pydoc" / tokenizer) == (train, val)


def test_what_is_read_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, mark = load("data/pydoc/prepare.py"), tmp_path / "mark"
    trap = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    path = stand_in(tmp_path, f"{trap}\ntopics = {{'if': 'If.'}}\n", monkeypatch)
    assert module.topics(path) == {"if": "If."}
    others = ["topics = [", "topics = ['if']", "topics = {'if': 1}", "other = {}", "\0"]
    for text in (f"topics = {{'if': {trap}}}", *others):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"topics\.py does not assign texts to 'topics'\. Use another Python"):
            module.topics(path)
    assert not mark.exists()


def test_the_reference_without_its_source_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("data/pydoc/prepare.py")
    path = stand_in(tmp_path, "topics = {}\n", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path)])
    for _ in range(2):
        with pytest.raises(ValueError, match="comes without the source of its language reference: no topics are in"):
            module.main()
        path.unlink(missing_ok=True)
    assert not (tmp_path / "pydoc").exists()


def test_a_dry_run_from_an_empty_folder_needs_no_preparation(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), "data.dataset=pydoc", "--dry-run", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) and "pydoc" in done.stdout
    assert not list(tmp_path.iterdir())
