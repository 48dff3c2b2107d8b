"""Small corpora under the names that shipped files use."""

from __future__ import annotations

from pathlib import Path

from engine.corpus import CharTokenizer, write_corpus


def small_corpora(root: Path) -> Path:
    """A repeated sentence as `stdlib` and `shakespeare_char` below `root`."""
    text = "the quick brown fox jumps over the lazy dog. " * 60
    tokenizer = CharTokenizer.of([text])
    ids = tokenizer.encode(text)
    for name in ("stdlib", "shakespeare_char", "pydoc"):
        chunks = [("train", ids), ("val", ids[:600])]
        write_corpus(root / name / "char", chunks, dataset=name, tokenizer=tokenizer, source="a sentence, repeated")
    return root
