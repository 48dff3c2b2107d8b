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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEPT = 2


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


def load_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Fills the model. Raises ValueError that lists what is missing, left over, or of another shape."""
    own = weights(model)
    wrong = [f"missing {n}" for n in own if n not in saved] + [f"left over {n}" for n in saved if n not in own]
    wrong += [
        f"{n} is {list(saved[n].shape)}, not {list(t.shape)}"
        for n, t in own.items()
        if n in saved and saved[n].shape != t.shape
    ]
    if wrong:
        raise ValueError(f"the saved weights are of another model: {'; '.join(wrong[:8])}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def save(
    root: Path, iteration: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Writes root/<iteration>/ beside the others, then renames it into place and drops the oldest."""
    root.mkdir(parents=True, exist_ok=True)
    part = root / f".writing-{iteration}-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, tensors in (("model", model), ("optimizer", optimizer)):
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part / f"{name}.safetensors")
    (part / "state.json").write_text(json.dumps(state))
    for file in part.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    final = root / f"{iteration:08d}"
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    for old in _saved(root)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _saved(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("[0-9]*") if p.is_dir())


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, or None."""
    for folder in reversed(_saved(root)):
        try:
            state = json.loads((folder / "state.json").read_text())
            checkpoint = Checkpoint(folder, state)
            checkpoint.model(), checkpoint.optimizer()
        except (OSError, ValueError, SafetensorError):
            continue
        return checkpoint
    return None
