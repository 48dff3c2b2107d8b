"""Activations without parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import NoOptions
from variations.site import Site


class Elementwise(nn.Module):
    """A function of each element. Subclasses give `forward`."""

    Options: type = NoOptions

    def __init__(self, options: Any, site: Site) -> None:
        super().__init__()


class GELU(Elementwise):
    """Formula: y = x Phi(x), Phi the normal distribution function
    Source: Hendrycks and Gimpel, arXiv 1606.08415.
    Shapes: any -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class GELUTanh(Elementwise):
    """Formula: y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    Source: Hendrycks and Gimpel, arXiv 1606.08415; GPT-2's form.
    Shapes: any -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class ReLU(Elementwise):
    """Formula: y = max(x, 0)
    Source: Nair and Hinton, ICML 2010.
    Shapes: any -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SquaredReLU(Elementwise):
    """Formula: y = max(x, 0)^2
    Source: So et al., Primer, arXiv 2109.08668.
    Shapes: any -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SiLU(Elementwise):
    """Formula: y = x sigmoid(x)
    Source: Elfwing et al., arXiv 1702.03118; the gate of SwiGLU (arXiv 2002.05202).
    Shapes: any -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Identity(Elementwise):
    """Formula: y = x
    Source: the bilinear gate of arXiv 2002.05202 when the MLP is gated.
    Shapes: any -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x
