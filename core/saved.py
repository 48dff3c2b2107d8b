"""Checkpoints as they lie on a disk: found, read, and compared with what was written.

<iteration>/ holds model.safetensors, optimizer.safetensors and state.json, which has checksums of all three. They are CRC-32: it
finds every changed bit, and as nobody is kept from writing a file and its checksum, a cryptographic one would protect no better.
"""

from __future__ import annotations

import contextlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

PARTS = ("model", "optimizer")
STATE = "state.json"
CHUNK = 1 << 20  # bytes read at once
CHANGED = "it is not what was written, its checksum differs. Where that was done on purpose, take 'checksums' out of"


class Damaged(ValueError):
    """A checkpoint, or a file of it, cannot be used. The text names the file and says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved state. `state` is plain data; `checksums` of the parts by file name, empty where none were written."""

    folder: Path
    state: dict[str, Any]
    checksums: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> dict[str, Tensor]:
        return load_file(self.folder / file_name("model"))

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.folder / file_name("optimizer"))

    def check(self, parts: Sequence[str] = PARTS) -> None:
        """Reads these parts and compares their checksums. Raises Damaged for the first that was changed."""
        for name in map(file_name, parts):
            path = self.folder / name
            with _reading(path):
                changed = name in self.checksums and checksum(path) != self.checksums[name]
            if changed:
                raise Damaged(f"{path}: {CHANGED} {self.folder / STATE}.")


def file_name(part: str) -> str:
    return f"{part}.safetensors"


def checksum(path: Path) -> str:
    """Of a file's bytes, in eight hexadecimal digits. Raises OSError."""
    made = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            made = zlib.crc32(chunk, made)
    return f"{made:08x}"


def written_state(state: Mapping[str, Any], folder: Path) -> str:
    """The text of state.json for a folder that holds the parts. Raises ValueError for what is not JSON, numbers included."""
    sums = {name: checksum(folder / name) for name in map(file_name, PARTS)}
    return json.dumps({"state": state, "checksums": {**sums, STATE: _of_state(state, sums)}}, allow_nan=False)


def _of_state(state: Any, sums: Mapping[str, str]) -> str:
    """The checksum of what state.json says, those of the other files included."""
    return f"{zlib.crc32(json.dumps([state, sums]).encode()):08x}"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever keeps a file from being read is raised as Damaged."""
    try:
        yield
    except OSError as error:
        raise Damaged(f"{path}: it cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise Damaged(f"{path}: it cannot be read: {error}.") from error


def read(folder: Path, parts: Sequence[str] = PARTS) -> Checkpoint:
    """The checkpoint in a folder: its state, checked, and of these parts the header, not yet the content. Raises Damaged."""
    path = folder / STATE
    with _reading(path):
        given = json.loads(path.read_bytes())
    if isinstance(given, dict) and "iter" in given:  # written before there were checksums
        given = {"state": given}
    if not isinstance(given, dict) or not {"state"} <= set(given) <= {"state", "checksums"}:
        raise Damaged(f"{path}: it is not the state of a run.")
    state, sums = given["state"], given.get("checksums", {})
    if "checksums" in given:
        if not isinstance(sums, dict) or set(sums) != {STATE, *map(file_name, PARTS)}:
            raise Damaged(f"{path}: its checksums are not those of a checkpoint.")
        if sums.pop(STATE) != _of_state(state, sums):
            raise Damaged(f"{path}: {CHANGED} it.")
    if not isinstance(state, dict) or not isinstance(state.get("iter"), int):
        raise Damaged(f"{path}: it is not the state of a run.")
    for name in map(file_name, parts):
        with _reading(folder / name), safe_open(folder / name, "pt"):  # compares the header with the file's length
            pass
    return Checkpoint(folder, state, sums)


def saved_folders(root: Path) -> list[Path]:
    """The folders of a run's checkpoints below `root`, oldest first; each is named after its iteration."""
    found = [p for p in root.glob("[0-9]*") if p.name.isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name))


def find(root: Path, parts: Sequence[str] = ()) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint that can be used, or None, and why each newer one cannot, by folder and newest first.

    `parts` are those whose content will be used: they are read once for it, and the others not looked at. Without `parts` every
    file is looked at and none read.
    """
    wrong: dict[Path, str] = {}
    for folder in reversed(saved_folders(root)):
        try:
            found = read(folder, parts or PARTS)
            found.check(parts)
        except Damaged as error:
            wrong[folder] = str(error)
        else:
            return found, wrong
    return None, wrong


def latest(root: Path, parts: Sequence[str] = ()) -> Checkpoint | None:
    """The newest checkpoint that can be used, or None; see `find`. With `parts`, tells on stderr what it passed over."""
    found, wrong = find(root, parts)
    if parts and wrong:
        tell(found, wrong)
    return found


def tell(found: Checkpoint | None, wrong: Mapping[Path, str]) -> None:
    """Says on stderr which checkpoints are damaged and which one is used instead."""
    instead = (
        "No earlier one can be used" if found is None else f"That of iteration {found.state['iter']} is used instead"
    )
    print("\n".join([*wrong.values(), f"{instead}."]), file=sys.stderr, flush=True)
