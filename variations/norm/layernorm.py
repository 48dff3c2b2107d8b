"""LayerNorm, with or without bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import opt
from core.slices import Declaration, Layout, declare
from variations.init.distributions import ONES, ZEROS
from variations.site import Site


class LayerNorm(nn.Module):
    """Formula: y = (x - mean) / sqrt(var + eps) * g + b
    Source: Ba et al., arXiv 1607.06450.
    Shapes: [..., width] -> the same.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of LayerNorm."""

        eps: float = opt(1e-5, "Added to the variance.", gt=0.0)
        gain: bool = opt(True, "Whether there is a gain.")
        bias: bool | None = opt(None, "Whether there is a bias; null means the model's choice.")

    def __init__(self, options: Options, site: Site, *, width: int) -> None:
        super().__init__()
        self.width, self.eps = width, options.eps
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if options.gain:
            declare(self, "weight", (width,), Declaration(Layout(), "vector", ONES))
        if site.config.bias if options.bias is None else options.bias:
            declare(self, "bias", (width,), Declaration(Layout(), "vector", ZEROS))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)
