"""LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.addresses import Labels
from core.layout import Range
from core.options import opt
from core.slices import Declaration, Layout, declare
from variations.dropout import Dropout
from variations.init.distributions import ZEROS, Kaiming, Scaled


class NoAdapter:
    """Formula: y = x W^T."""


class LoRA(nn.Module):
    """Formula: y = x W^T + scale (x A^T) B^T, scale = alpha / rank, or alpha / sqrt(rank) with rslora
    Source: Hu et al., arXiv 2106.09685; rsLoRA: Kalajdzievski, arXiv 2312.03732.
    Shapes: [..., in] -> [..., rows]; lora_a [rank, in], lora_b [rows, rank], which starts at zero; of experts [E, ...] each.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of LoRA."""

        # The one knob that changes a shape: in a pack, A and B are padded with zeros to the largest rank.
        rank: int = opt(8, "Rank of what is added.", ge=1, knob=True)
        alpha: float = opt(16.0, "What is added is multiplied by alpha / rank.", gt=0.0, knob=True)
        dropout: float = opt(0.0, "Probability of dropping an input of A.", ge=0.0, lt=1.0, knob=True)
        rslora: bool = opt(False, "Divide alpha by the root of the rank instead.")

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: Tensor
    ranges: tuple[Range, ...]
    places: list[int] | None  # its experts among those of the map; None: all

    def __init__(self, options: Any, *, path: str, rows: int, columns: int, experts: Labels = ()) -> None:
        super().__init__()
        rank, outer = options.rank, (len(experts),) if experts else ()
        layout = Layout(dim=-2, stack=(experts,) if experts else ())
        # The deviation that PEFT's draw has, 1 / sqrt(3 in).
        draw = Kaiming(Scaled(scale=1 / math.sqrt(3)))
        declare(self, "lora_a", (*outer, rank, columns), Declaration(layout, "matrix", draw))
        declare(self, "lora_b", (*outer, rows, rank), Declaration(layout, "matrix", ZEROS))
        scale = options.alpha / (math.sqrt(rank) if options.rslora else rank)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.drop = Dropout(options.dropout, path)

    def whole(self, stacked: Tensor, count: int) -> Tensor:
        """A and B for all experts of a map; zero for those that are not its own."""
        if self.places is None:
            return stacked
        index = torch.tensor(self.places, device=stacked.device)
        return stacked.new_zeros(count, *stacked.shape[1:]).index_copy(0, index, stacked)

    def added(self, x: Tensor, linear: Any, *counts: Tensor) -> Tensor:
        """scale (x A^T) B^T, by the linear map's own operation."""
        a, b = (self.whole(t, linear.experts) for t in (self.lora_a, self.lora_b))
        hidden = linear.op(self.drop(x), a, None, *counts)
        added: Tensor = linear.op(hidden, b * self.scale, None, *counts)
        return added

    def forward(self, x: Tensor, y: Tensor, linear: Any, *counts: Tensor) -> Tensor:
        """What is added to its rows of y, the output of `linear` at x."""
        return self.added(x, linear, *counts)

    def begin(self, weight: Tensor) -> None:
        """Called with its rows of the weight [rows, in] before training."""

    def merged(self, weight: Tensor) -> Tensor:
        """Its rows of the weight with what is added."""
        added = self.scale * (self.lora_b @ self.lora_a)
        return weight + self.whole(added, len(weight))

    def flops_per_token(self, t: int) -> int:
        """Multiply-adds times two, forward."""
        return 2 * (self.lora_a.numel() + self.lora_b.numel())
