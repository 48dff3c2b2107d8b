"""The weights that multiply, whatever they are made of: what other tools take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name as a plain tensor of its own: of a PKL weight a + scale * b, [out, in] instead of [2, out, in].

    A tied weight stands under each of its names.
    """
    made: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        whole: Any = getattr(module, "effective", None)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = whole() if whole is not None and name == "weight" else parameter
                made[f"{path}.{name}" if path else name] = value.detach().clone()
    return made
