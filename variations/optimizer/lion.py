"""Lion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.options import Invalid, opt
from variations.optimizer.base import Group, Optimizer, OptimizerOptions, Settings


@dataclass(frozen=True)
class LionOptions(OptimizerOptions):
    """Options of Lion."""

    learning_rate: float = opt(1e-4, "Peak learning rate; a third to a tenth of AdamW's.", ge=0.0, knob=True)
    betas: tuple[float, ...] = opt(
        (0.9, 0.99), "Share of the past in the step, and decay of the momentum.", ge=0.0, lt=1.0, knob=True
    )

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise Invalid(("betas", f"{list(self.betas)} is not two numbers"))


class Lion(Optimizer):
    """Formula: w <- (1 - lr decay) w - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g
    Source: Chen et al., arXiv 2302.06675.
    Shapes: any; state of the weight's shape.
    """

    Options = LionOptions
    kinds = ("exp_avg",)

    @staticmethod
    def formula(  # type: ignore[override]
        s: Settings, w: Tensor, g: Tensor, exp_avg: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = s.betas
        direction = (b1 * exp_avg + (1 - b1) * g).sign()
        w = w * (1 - s.learning_rate * s.weight_decay) - s.learning_rate * direction
        return w, {"exp_avg": b2 * exp_avg + (1 - b2) * g}

    def update(self, group: Group, lr: float) -> None:
        b1, b2 = self.options.betas
        params, grads, momentum = group.params, group.grads, group.states["exp_avg"]
        directions = torch._foreach_mul(momentum, b1)
        torch._foreach_add_(directions, grads, alpha=1 - b1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(params, 1 - lr * group.weight_decay)
        torch._foreach_add_(params, directions, alpha=-lr)
        torch._foreach_mul_(momentum, b2)
        torch._foreach_add_(momentum, grads, alpha=1 - b2)
