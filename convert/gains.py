"""Gain fusion: a norm's gain folded into the linears that read its output, which then computes the same with one product less.

Source: FlashNorm, Graef et al., arXiv 2407.09577.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from core.lora import adapted
from model import GPT
from variations.linear.quantised import QuantisedLinear
from variations.linear.standard import Linear


def readers(model: GPT) -> Iterator[tuple[str, nn.Module, list[Linear]]]:
    """Every norm of the residual stream with its path and the linears that read it."""
    blocks: list[Any] = list(model.h)
    for i, block in enumerate(blocks):
        for name, mixer in (("ln_1", block.attn), ("ln_2", block.mlp)):
            yield f"h.{i}.{name}", getattr(block, name), [mixer.get_submodule(reader) for reader in mixer.readers]
    yield "ln_f", model.ln_f, [model.head]  # type: ignore[list-item]


@torch.no_grad()
def fold_gains(model: GPT) -> list[str]:
    """Multiplies each norm's gain into the columns of the weights behind it and sets the gain to one; outputs stay equal.

    Weights are [..., out, in]: of a PKL weight both a and b take the gain. A norm's bias moves into the linears' biases.
    Returns the paths of the norms that were folded. A tied head is left out: its weight is also the embedding.
    Raises ValueError where a norm has a bias and a linear behind it has none to take it.
    """
    if any(isinstance(module, QuantisedLinear) for module in model.modules()):
        raise ValueError("The model has quantised weights, whose rounding a gain would change.")
    if adapted(model):
        raise ValueError("The model has adapters, which read the norms too: merge them first.")
    folded = []
    for path, norm, linears in readers(model):
        weight: Tensor | None = getattr(norm, "weight", None)
        shift: Tensor | None = getattr(norm, "bias", None)
        if weight is None or any(linear.weight is model.wte.weight for linear in linears):
            continue
        offset: float = getattr(norm, "offset", 0.0)  # a gain may be 1 + weight
        gain = weight + offset
        for linear in linears:
            if shift is not None and shift.any():
                if linear.bias is None:
                    raise ValueError(f"{path} has a bias, and the linear behind it has none that could take it.")
                linear.bias.add_(linear.effective() @ shift)
            linear.weight.mul_(gain)
        weight.fill_(1.0 - offset)
        if shift is not None:
            shift.zero_()
        folded.append(path)
    return folded
