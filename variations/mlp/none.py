"""No MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.options import NoOptions
from variations.site import Site


class NoMLP(nn.Module):
    """Formula: y = 0: the block is its mixer alone, and has one norm
    Source: Mamba, Gu and Dao, arXiv 2312.00752, section 3.4.
    Shapes: [B, T, C] -> the same.

    `absent`: whether a block has no norm for this, as nothing reads it.
    """

    Options = NoOptions
    absent = True
    readers: tuple[str, ...] = ()

    def __init__(self, options: NoOptions, site: Site) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
