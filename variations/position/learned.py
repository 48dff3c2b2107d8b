"""Learned absolute positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from core.slices import Declaration, Layout, declare
from variations.position.none import NoPosition
from variations.site import Site


class LearnedPosition(NoPosition):
    """Formula: y_t = x_t + P[t]
    Source: GPT-2 (Radford et al., 2019).
    Shapes: [B, T, C] -> the same; weight [block_size, C].
    """

    embeds = True
    weight: nn.Parameter

    def __init__(self, options: Any, site: Site, *, width: int) -> None:
        super().__init__(options, site, width=width)
        shape = (site.config.block_size, width)
        declare(self, "weight", shape, Declaration(Layout(dim=-2), "embedding", site.initialiser()))

    def embed(self, x: Tensor, offset: int) -> Tensor:
        return x + self.weight[offset : offset + x.shape[-2]]
