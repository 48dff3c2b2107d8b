"""The weights that a run starts from: those of another run's newest checkpoint. Adapters are never among them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from core.addresses import is_adapter
from core.saved import Checkpoint, find, latest
from core.weights import mismatch, weights
from core.yaml_files import HUGGING_FACE, ConfigError

FILE = "model.safetensors"


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run folder, or None."""
    return latest(folder / "checkpoint")


def damage(folder: Path) -> str:
    """Why nothing can start from the newest weights of a run folder, as a sentence; empty where they are whole, or there are none.

    Earlier ones are no substitute: other weights would be used under the same name.
    """
    _, wrong = find(folder / "checkpoint", ["model"])
    advice = f"No run starts from damaged weights. Remove {folder} and train it anew, or start from another run."
    return next((f"{why} {advice}" for why in wrong.values()), "")


def shapes(saved: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a saved model by name, without memory: only the file's header is read."""
    with safe_open(saved.folder / FILE, "pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


def digest(saved: Checkpoint) -> str:
    """The hash of a saved model's content: sixteen hexadecimal digits."""
    with (saved.folder / FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def unfit(own: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> str:
    """Why a model with the tensors `own` cannot start from those of `base`, in words; empty where it can.

    Names and shapes are compared. Adapters are new in the model and need no tensor in the base.
    """
    if any(is_adapter(name) for name in base):
        return "it has adapters; merge them first"
    wrong = mismatch(_bare(own), base)
    return f"its weights are of another model: {wrong}" if wrong else ""


def load_base(model: nn.Module, named: str) -> None:
    """Fills the model's own tensors, adapters left out, from the newest checkpoint of a run folder, or from 'hf:' and a folder.

    Raises ConfigError where there is none, it is damaged, or it is not exactly of this model.
    """
    if named.startswith(HUGGING_FACE):
        _load_hugging_face(model, Path(named.removeprefix(HUGGING_FACE)))
        return
    folder = Path(named)
    if why := damage(folder):
        raise ConfigError(why)
    saved = newest(folder)
    if saved is None:
        raise ConfigError(f"{folder}: there is no checkpoint to start from. Run the sweep's file again.")
    own, base = weights(model), saved.model()
    if why := unfit(own, base):
        raise ConfigError(f"{saved.folder}: the run cannot start from it: {why}.")
    with torch.no_grad():
        for name, tensor in _bare(own).items():
            tensor.copy_(base[name])


def _load_hugging_face(model: Any, folder: Path) -> None:
    from convert import huggingface
    from convert.effective import numbered
    from convert.mapping import fill

    try:
        source = numbered(huggingface.mapped(folder, model.config), model.config)
        told = fill(_bare(weights(model)), source)
    except ValueError as error:
        raise ConfigError(f"{folder}: the run cannot start from it: {error}") from None
    for difference in huggingface.unlike(folder, model.config):
        print(f"not as in {folder}: {difference}")
    print(f"weights of {folder}" + "".join(f", {count} tensors {words}" for words, count in told.items()))


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
