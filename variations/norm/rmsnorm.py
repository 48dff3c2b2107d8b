"""Root-mean-square norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import Invalid, opt
from core.slices import Declaration, Layout, declare
from variations.init.distributions import ONES, ZEROS
from variations.site import Site


class RMSNorm(nn.Module):
    """Formula: y = x / sqrt(mean(x^2) + eps) * g, where g is the weight, or 1 + weight if it is centred around zero
    Source: Zhang and Sennrich, arXiv 1910.07467; around zero: Gemma, arXiv 2403.08295.
    Shapes: [..., width] -> the same.
    Raises: Invalid for a centred gain where there is none.

    `offset`: what is added to the weight.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of RMSNorm."""

        eps: float = opt(1e-6, "Added to the mean square.", gt=0.0)
        gain: bool = opt(True, "Whether there is a gain.")
        zero_centred: bool = opt(False, "Whether the gain is 1 + weight, so that decay of the weight pulls it to 1.")

        def __post_init__(self) -> None:
            if self.zero_centred and not self.gain:
                raise Invalid(("zero_centred", "it is about the gain, and there is none (gain: false)"))

    def __init__(self, options: Options, site: Site, *, width: int) -> None:
        super().__init__()
        self.width, self.eps, self.offset = width, options.eps, float(options.zero_centred)
        self.weight: nn.Parameter | None = None
        if options.gain:
            init = ZEROS if options.zero_centred else ONES
            declare(self, "weight", (width,), Declaration(Layout(), "vector", init))

    def forward(self, x: Tensor) -> Tensor:
        gain: Tensor | None = self.weight
        if gain is not None:
            # Under autocast: the fused kernel wants one dtype, and layer_norm computes in float32 there too.
            x = x.to(gain.dtype)
            gain = gain + self.offset if self.offset else gain
        return F.rms_norm(x, (self.width,), gain, self.eps)
