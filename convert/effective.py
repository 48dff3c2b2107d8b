"""The weights that multiply, whatever they are made of: what other tools take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convert.mapping import Mapped, Rule, Rules, Source
from convert.steps import Chain, Numbers
from core.slices import declared
from gpt_conf import ModelConfig
from model import GPT


def numbered(source: Source, config: ModelConfig, share: float = 0.0) -> Source:
    """A source of weights that multiply as those of a model, of which some are sums of two numbers, a + scale * b.

    share: b's part of these sums; else all of a weight becomes a, and b is zero. Names are those of separate layers.
    """
    model = GPT(replace(config, stack_layers=False))
    scales = {name: float(_owner(model, name).scale) for name, _, what in declared(model) if what.summed}
    if not scales:
        return source
    steps = {name: Numbers(scales[name], share) if name in scales else Chain() for name in source.names()}
    return Mapped(source, Rules(tuple(Rule((name,), (name,), step) for name, step in steps.items())))


def _owner(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0])


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
