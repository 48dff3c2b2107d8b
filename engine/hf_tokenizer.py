"""The tokenizer of a checkpoint: a folder in Hugging Face's format, of which data is read and no code run.

It is known by a name that follows from what it does, so that where the folder lies and what it is called do not matter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.yaml_files import HUGGING_FACE, shown
from engine.corpus import TOKENIZER_FILE, FileTokenizer

OFFERED = f"{HUGGING_FACE}FOLDER"  # how a prepare.py says among its TOKENIZERS that it takes those of checkpoints
PREFIX = "hf-"  # of the names of these tokenizers
# Parts of the file that change no id here: documents are neither cut nor filled up, and get no special tokens around them.
IDLE = ("truncation", "padding", "post_processor")
SAYING_END = ("generation_config.json", "config.json")  # what ends a document, by id


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A tokenizer as its folder has it: the content of tokenizer.json, the id that ends a document, and its name."""

    content: str
    end: int | None
    name: str

    def load(self) -> FileTokenizer:
        """Ready for use. Raises ValueError where the package is missing or does not take the file."""
        return FileTokenizer(self.content, self.name, self.end)


def is_checkpoint(tokenizer: str | None) -> bool:
    """Whether a tokenizer is named by a folder: 'hf:' and its path."""
    return tokenizer is not None and tokenizer.startswith(HUGGING_FACE)


def read_checkpoint(tokenizer: str) -> CheckpointTokenizer:
    """The tokenizer that 'hf:' and a folder name; the package `tokenizers` is not needed for it.

    A document ends with what tokenizer_config.json says, else the checkpoint's configuration, else the usual spellings.
    Raises ValueError for a folder without a tokenizer.json, and for files that are damaged.
    """
    folder = Path(tokenizer.removeprefix(HUGGING_FACE))
    path = folder / TOKENIZER_FILE
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{shown(folder)}'")
    if not path.is_file():
        raise ValueError(
            f"'{shown(folder)}' holds no {TOKENIZER_FILE}, and tokenizers are read from no other file. Where it holds "
            "vocab.txt, vocab.json with merges.txt, or tokenizer.model, the package transformers converts them: "
            f"AutoTokenizer.from_pretrained('{shown(folder)}', use_fast=True).save_pretrained('{shown(folder)}')."
        )
    tree = _tree(path)
    try:
        ids = dict(_ids(tree))
        kind = re.sub(r"[^a-z]", "", str(tree["model"].get("type", "")).lower()) or "tokens"
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"{shown(path)} is not a file of the 'tokenizers' library. Download it again.") from None
    end = _end(folder, ids)
    acts = {key: value for key, value in tree.items() if key not in IDLE}
    told = hashlib.sha256(json.dumps([acts, end], sort_keys=True).encode()).hexdigest()[:8]
    return CheckpointTokenizer(path.read_text(encoding="utf-8"), end, f"{PREFIX}{kind}-{told}")


def _ids(tree: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every token with its id. In a list of tokens with scores, the place is the id."""
    vocabulary = tree["model"]["vocab"]
    if isinstance(vocabulary, list):
        yield from ((token[0], number) for number, token in enumerate(vocabulary))
    else:
        yield from ((token, int(number)) for token, number in vocabulary.items())
    yield from ((token["content"], int(token["id"])) for token in tree.get("added_tokens") or ())


def _end(folder: Path, ids: Mapping[str, int]) -> int | None:
    """The id that ends a document, None where the vocabulary has none."""
    said = _tree(folder / "tokenizer_config.json").get("eos_token")
    said = said.get("content") if isinstance(said, dict) else said
    if isinstance(said, str) and said in ids:
        return ids[said]
    known = set(ids.values())
    for name in SAYING_END:
        given = _tree(folder / name).get("eos_token_id")
        for number in given if isinstance(given, list) else [given]:  # of several, the first
            if type(number) is int and number in known:
                return number
    return next((ids[token] for token in FileTokenizer.ENDS if token in ids), None)


def _tree(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one where there is no file. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # wrong JSON and wrong UTF-8 are such
        raise ValueError(f"{shown(path)} is damaged: {error}. Download it again.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{shown(path)} is damaged: it holds no mapping. Download it again.")
    return tree
