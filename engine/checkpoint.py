"""Checkpoints: weights and optimizer state as safetensors, the rest as JSON, written whole or not at all.

checkpoint/<iteration>/ holds model.safetensors, optimizer.safetensors and state.json; the newest two are kept. Nothing in them is
code or a class path.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the state dict once: a tied weight under its first name."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.numel() == 0 or seen.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name) == name
    }


def compare(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError that lists what is missing, left over, or of another shape."""
    wrong = [f"missing {n}" for n in own if n not in saved] + [f"left over {n}" for n in saved if n not in own]
    wrong += [
        f"{n} is {list(saved[n].shape)}, not {list(t.shape)}"
        for n, t in own.items()
        if n in saved and saved[n].shape != t.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"the saved {what} of another model: {'; '.join(wrong[:8])}{more}")


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Fills the model. Raises ValueError that lists what is missing, left over, or of another shape."""
    own = weights(model)
    compare(own, saved, "weights are")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


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
    for name, tensors in zip(PARTS, (model, optimizer), strict=True):
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part / f"{name}.safetensors")
    (part / "state.json").write_text(json.dumps(state, allow_nan=False))
    for written in (*part.iterdir(), part):
        _sync(written)
    final = root / f"{iteration:08d}"
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    _sync(root)
    valid = [folder for folder in _saved(root) if int(folder.name) <= iteration]
    for old in {*_saved(root)} - {*valid[-KEPT:]}:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _saved(root: Path) -> list[Path]:
    found = [p for p in root.glob("[0-9]*") if p.name.isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name))


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Its tensors are read when they are asked for."""
    for folder in reversed(_saved(root)):
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
