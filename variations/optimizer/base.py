"""What every optimizer is given and gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from core.options import opt
from core.slices import Layout


@dataclass(frozen=True)
class OptimizerOptions:
    """Shared by all optimizers."""

    learning_rate: float = opt(1e-3, "Peak learning rate.", ge=0.0)
    weight_decay: float = opt(0.1, "Decoupled weight decay of matrices and embeddings (vectors have none).", ge=0.0)


@dataclass
class Group:
    """Tensors that share settings. `learning_rate` is the peak, slice multipliers included. `params` hold their gradients.

    `layouts` says where in each tensor its logical matrices lie; without it, each tensor is one (or a stack of them).
    """

    names: list[str]
    params: list[Tensor]
    learning_rate: float
    weight_decay: float
    state: dict[str, list[Tensor]] = field(default_factory=dict)  # a list like `params` for each kind of state
    layouts: list[Layout] = field(default_factory=list)

    def live(self) -> Group:
        """The part of the group that has gradients."""
        kept = [i for i, p in enumerate(self.params) if p.grad is not None]
        state = {kind: [tensors[i] for i in kept] for kind, tensors in self.state.items()}
        names, layouts = [self.names[i] for i in kept], [self.layouts[i] for i in kept]
        return replace(self, names=names, params=[self.params[i] for i in kept], state=state, layouts=layouts)


class Optimizer:
    """Steps groups. Subclasses give `kinds`, the names of their per-tensor state, and `update`."""

    kinds: tuple[str, ...] = ()
    roles: tuple[str, ...] | None = (
        None  # None: takes every role; else the rest goes to the optimizer in `options.rest`
    )

    def __init__(self, options: Any, groups: list[Group]) -> None:
        self.options, self.groups = options, groups
        self.steps = 0
        for group in groups:
            group.layouts = group.layouts or [Layout()] * len(group.params)
            assert all(p.is_contiguous() for p in group.params), "fused updates write wrong elements of strided views"
            for kind in self.kinds:
                group.state[kind] = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in group.params]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with every learning rate multiplied by `factor`."""
        self.steps += 1
        for group in self.groups:
            live = group.live()
            if live.params:
                self.update(live, group.learning_rate * factor)

    def update(self, group: Group, lr: float) -> None:
        """Moves `group.params` by their gradients, all of which are there."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Every state tensor as 'kind/name'."""
        return {
            f"{kind}/{name}": tensor
            for group in self.groups
            for kind in self.kinds
            for name, tensor in zip(group.names, group.state[kind], strict=True)
        }

    def load(self, saved: dict[str, Tensor], steps: int) -> None:
        """Restores what `state` gave, and the number of steps. Raises KeyError for a tensor that is missing."""
        self.steps = steps
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
