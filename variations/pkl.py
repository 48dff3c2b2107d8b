"""PKL numbers: a weight is a + scale * b, with a and b both trained. What linear, embedding and head share.

Like for like: with the default init the effective weight has the init's deviation whatever the scale, because a and b are drawn
independently and each multiplied by 1/sqrt(1 + scale^2).

The effective step: b's gradient is scale times a's. An optimizer whose step does not depend on the size of the gradient
(Adam and its kin) moves a and b by about one learning rate each, in directions that agree for a positive scale, so the
effective weight moves by about (1 + |scale|) learning rates. `compensate_step` divides both learning rates by that, and
with them decoupled decay. SGD's factor would be 1 + scale^2; rules on `[a]` and `[b]` can set it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from core.options import opt
from core.slices import Declaration, declare

STACK = (("a", "b"),)


@dataclass(frozen=True)
class PKLOptions:
    """Options of every PKL weight."""

    scale: float = opt(1.0, "The number that multiplies b; configuration, never state.", knob=True)
    naive_init: bool = opt(False, "Draw a and b each with the full deviation instead of like for like.")
    compensate_step: bool = opt(
        False, "Divide the learning rates of a and b by 1 + |scale|, so that Adam's effective step is a plain weight's."
    )


def declare_pkl(
    module: nn.Module,
    options: PKLOptions,
    shape: tuple[int, ...],
    what: Declaration,
) -> None:
    """Declares `weight` [2, *shape], a and b, of which the effective weight `what` is made, and the buffer `scale` (0-dim, in no
    checkpoint)."""
    square = 1 + options.scale * options.scale
    made = replace(what, layout=replace(what.layout, stack=(*STACK, *what.layout.stack)), summed=STACK[0])
    if not options.naive_init:
        # Independent draws add up in variance. What is exact is drawn once: of all a and b with a + scale b = w the smallest.
        shares = {"a": 1 / square, "b": options.scale / square}
        made = replace(made, gain=what.gain / math.sqrt(square), shares=shares)
    if options.compensate_step:
        made = replace(made, step=1 / (1 + abs(options.scale)))
    declare(module, "weight", (2, *shape), made)
    module.register_buffer("scale", torch.tensor(options.scale), persistent=False)


def effective(weight: Tensor, scale: Tensor) -> Tensor:
    """a + scale * b of a stacked [2, ...] tensor, in one pass."""
    a, b = weight.unbind(0)
    return torch.addcmul(a, b, scale.to(b.dtype))
