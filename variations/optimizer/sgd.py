"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.options import Invalid, opt
from variations.optimizer.base import Group, Optimizer, OptimizerOptions, Settings


@dataclass(frozen=True)
class SGDOptions(OptimizerOptions):
    """Options of SGD."""

    learning_rate: float = opt(0.1, "Peak learning rate.", ge=0.0, knob=True)
    weight_decay: float = opt(
        0.0, "L2 penalty of matrices and embeddings, part of the gradient as in torch.", ge=0.0, knob=True
    )
    momentum: float = opt(0.9, "Decay of the summed gradient.", ge=0.0, lt=1.0, knob=True)
    nesterov: bool = opt(False, "Whether the step looks ahead along the summed gradient.")

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise Invalid(("nesterov", "it looks ahead along the momentum, and there is none"))


class SGD(Optimizer):
    """Formula: g <- g + decay w; m <- mu m + g; w <- w - lr m, or w - lr (g + mu m) with nesterov
    Source: Sutskever et al., ICML 2013, in torch.optim.SGD's form.
    Shapes: any; state of the weight's shape.
    """

    Options = SGDOptions
    kinds = ("momentum_buffer",)

    @staticmethod
    def formula(  # type: ignore[override]
        s: Settings, w: Tensor, g: Tensor, momentum_buffer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g = g + s.weight_decay * w
        m = s.momentum * momentum_buffer + g
        return w - s.learning_rate * (g + s.momentum * m if s.nesterov else m), {"momentum_buffer": m}

    def update(self, group: Group, lr: float) -> None:
        torch._fused_sgd_(
            group.params,
            group.grads,
            group.states["momentum_buffer"],
            weight_decay=group.weight_decay,
            momentum=self.options.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self.options.nesterov,
            maximize=False,
            is_first_step=False,
        )
