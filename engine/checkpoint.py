"""Checkpoints: weights and optimizer state as safetensors, the rest as JSON, written whole or not at all.

checkpoint/<iteration>/ holds model.safetensors, optimizer.safetensors and state.json; the newest two are kept. Nothing in them is
code or a class path.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.weights import saved_folders

KEPT = 2
PARTS = ("model", "optimizer")
WRITING = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """One saved state. `state` is plain data."""

    folder: Path
    state: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.folder / "optimizer.safetensors")


def save(
    root: Path, iteration: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Writes root/<iteration>/ beside the others, then renames it into place; drops older ones, what a killed process left
    half written, and later iterations, which belong to a past that was left."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)
    part = root / f"{WRITING}{iteration}"
    part.mkdir()
    try:
        for name, tensors in zip(PARTS, (model, optimizer), strict=True):
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps(state, allow_nan=False))
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
    for old in {*saved_folders(root)} - {*valid[-KEPT:]}:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Its tensors are read when they are asked for."""
    for folder in reversed(saved_folders(root)):
        try:
            state = json.loads((folder / "state.json").read_text())
            for name in PARTS:
                with safe_open(folder / f"{name}.safetensors", "pt"):  # checks the header against the file's length
                    pass
        except (OSError, ValueError, SafetensorError):
            continue
        if isinstance(state, dict) and isinstance(state.get("iter"), int):
            return Checkpoint(folder, state)
    return None
