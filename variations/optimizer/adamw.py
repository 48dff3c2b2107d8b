"""AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.options import Invalid, opt
from variations.optimizer.base import Group, Optimizer, OptimizerOptions, Settings


@dataclass(frozen=True)
class AdamWOptions(OptimizerOptions):
    """Options of AdamW."""

    betas: tuple[float, ...] = opt((0.9, 0.99), "Decay of the first and the second moment.", ge=0.0, lt=1.0, knob=True)
    eps: float = opt(1e-8, "Added to the root of the second moment.", gt=0.0, knob=True)

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise Invalid(("betas", f"{list(self.betas)} is not two numbers"))


class AdamW(Optimizer):
    """Formula: w <- (1 - lr decay) w - lr m / (sqrt(v) + eps), moments corrected for their start at zero
    Source: Loshchilov and Hutter, arXiv 1711.05101.
    Shapes: any; state of the weight's shape.
    """

    Options = AdamWOptions
    kinds = ("exp_avg", "exp_avg_sq")

    @staticmethod
    def formula(  # type: ignore[override]
        s: Settings, w: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = s.betas
        m, v = exp_avg.lerp(g, 1 - b1), exp_avg_sq * b2 + g.square() * (1 - b2)
        size = (v / (1 - b2**s.steps)).sqrt() + s.eps
        w = w * (1 - s.learning_rate * s.weight_decay) - s.learning_rate / (1 - b1**s.steps) * m / size
        return w, {"exp_avg": m, "exp_avg_sq": v}

    def update_all(self, live: Sequence[tuple[Group, float]]) -> None:
        self.counts: dict[int, Tensor] = {}
        super().update_all(live)

    def update(self, group: Group, lr: float) -> None:
        # The kernel under torch.optim.AdamW(fused=True), called without that class, whose first use imports the compiler (seconds).
        params = group.params
        for entry in group.entries:
            if entry.steps not in self.counts:  # one for all groups, until the next update
                self.counts[entry.steps] = torch.full((), float(entry.steps), device=params[0].device)
        torch._fused_adamw_(
            params,
            group.grads,
            group.states["exp_avg"],
            group.states["exp_avg_sq"],
            [],
            [self.counts[entry.steps] for entry in group.entries],
            lr=lr,
            beta1=self.options.betas[0],
            beta2=self.options.betas[1],
            weight_decay=group.weight_decay,
            eps=self.options.eps,
            amsgrad=False,
            maximize=False,
        )
