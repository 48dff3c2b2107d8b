"""Root-mean-square norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import opt
from core.slices import Declaration, Layout, declare
from variations.init.distributions import ONES
from variations.site import Site


class RMSNorm(nn.Module):
    """Formula: y = x / sqrt(mean(x^2) + eps) * g
    Source: Zhang and Sennrich, arXiv 1910.07467.
    Shapes: [..., width] -> the same.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of RMSNorm."""

        eps: float = opt(1e-6, "Added to the mean square.", gt=0.0)
        gain: bool = opt(True, "Whether there is a gain.")

    def __init__(self, options: Options, site: Site, *, width: int) -> None:
        super().__init__()
        self.width, self.eps = width, options.eps
        self.weight: nn.Parameter | None = None
        if options.gain:
            declare(self, "weight", (width,), Declaration(Layout(), "vector", ONES))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            # Under autocast: the fused kernel wants one dtype, and layer_norm computes in float32 there too.
            x = x.to(self.weight.dtype)
        return F.rms_norm(x, (self.width,), self.weight, self.eps)
