"""No normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from core.options import NoOptions
from variations.site import Site


class NoNorm(nn.Module):
    """Formula: y = x
    Source: the ablation of a norm.
    Shapes: any -> the same.
    """

    Options = NoOptions

    def __init__(self, options: NoOptions, site: Site, *, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
