"""Checkpoints: weights and optimizer state as safetensors, the rest as JSON, written whole or not at all.

checkpoint/<iteration>/ holds model.safetensors, optimizer.safetensors and state.json (`core.saved` reads them); the newest two are
kept. Nothing in them is code or a class path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from core.saved import PARTS, STATE, Checkpoint, file_name, find, latest, saved_folders, tell, written_state

__all__ = ["PARTS", "Checkpoint", "latest", "resumed", "save"]
KEPT = 2
WRITING = ".writing-"
DAMAGED = "damaged-"


def save(
    root: Path, iteration: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Writes root/<iteration>/ beside the others, then renames it into place; drops older ones, what a killed process left
    half written, what was found damaged, and later iterations, which belong to a past that was left."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)
    part = root / f"{WRITING}{iteration}"
    part.mkdir()
    try:
        for name, tensors in zip(PARTS, (model, optimizer), strict=True):
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part / file_name(name))
        (part / STATE).write_text(written_state(state, part))
        for written in (*part.iterdir(), part):
            _sync(written)
    except (OSError, SafetensorError):
        shutil.rmtree(part, ignore_errors=True)  # a full disk gets its room back
        raise
    final = root / f"{iteration:08d}"
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    _sync(root)
    valid = [folder for folder in saved_folders(root) if int(folder.name) <= iteration]
    for old in {*saved_folders(root), *root.glob(f"{DAMAGED}*")} - {*valid[-KEPT:]}:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def resumed(root: Path) -> Checkpoint | None:
    """The checkpoint that a run continues from: the newest that is, down to each bit, what was written; None if it starts anew.

    Damaged ones are told of on stderr and take another name until the next is saved, so that nobody takes them for whole ones.
    """
    found, wrong = find(root, PARTS)
    if wrong:
        tell(found, wrong)
    for folder in wrong:
        with contextlib.suppress(OSError):  # where nothing can be renamed, each process finds it out for itself
            folder.rename(root / f"{DAMAGED}{folder.name}")
    return found
