"""The tensors of a model by name: each once, compared and filled strictly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the state dict once: a tied weight under its first name. Models without memory have them too."""
    seen: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)  # the parameters themselves: a tied one is one object
    return {name: t.detach() for name, t in tensors.items() if seen.setdefault(id(t), name) == name}


def mismatch(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str:
    """What is missing, left over, or of another shape, in words; empty where all is as it should be."""
    wrong = [f"missing {n}" for n in own if n not in saved] + [f"left over {n}" for n in saved if n not in own]
    wrong += [
        f"{n} is {list(saved[n].shape)}, not {list(t.shape)}"
        for n, t in own.items()
        if n in saved and saved[n].shape != t.shape
    ]
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    return f"{'; '.join(wrong[:8])}{more}"


def compare(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError that lists what is missing, left over, or of another shape."""
    if wrong := mismatch(own, saved):
        raise ValueError(f"the saved {what} of another model: {wrong}")


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Fills the model. Raises ValueError that lists what is missing, left over, or of another shape."""
    own = weights(model)
    compare(own, saved, "weights are")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
