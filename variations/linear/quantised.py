"""A linear map whose weight is rounded to few bits wherever it multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.options import Invalid, nearest, opt
from core.slices import Declaration
from variations.linear.standard import Linear

LARGEST = {"int8": 127.0, "float8": 448.0}  # of 8-bit integers, symmetric, and of e4m3
UNFIT = {
    "mxfp8": "its scales belong to blocks of 32 along one dimension, so the backward product, along the other, has other"
    " rounded weights than the forward one; one rounded copy would train what no such kernel computes",
    "nvfp4": "with 4 bits training holds only with stochastically rounded gradients and rotated blocks (arXiv 2509.25149);"
    " rounded weights alone would not be it",
}


@dataclass(frozen=True)
class QuantisedOptions:
    """Options of quantised weights."""

    format: str = opt("int8", "What weights are rounded to: int8, or float8 (e4m3).")
    granularity: Literal["row", "tensor"] = opt(
        "row", "Whether each output, or each named part of each weight, has a scale of its own."
    )

    def __post_init__(self) -> None:
        if self.format in UNFIT:
            raise Invalid(("format", f"'{self.format}' is not offered: {UNFIT[self.format]}"))
        if self.format not in LARGEST:
            raise Invalid(("format", f"'{self.format}' is not allowed. {nearest(self.format, LARGEST)}"))


class QuantisedLinear(Linear):
    """Formula: y = x Q(W)^T + b, Q(w) = scale round(w / scale), scale = max |w| / largest; dQ/dW is taken to be 1
    Source: Jacob et al., arXiv 1712.05877; straight through: Bengio et al., arXiv 1308.3432; e4m3: Micikevicius et al.,
    arXiv 2209.05433.
    Shapes: [..., in] -> [..., out]; weight [out, in] in full precision, scales [out, 1]; of experts [E, ...] each.
    Raises: Invalid for formats that cannot be trained so.
    """

    Options = QuantisedOptions

    def declare_weight(self, options: QuantisedOptions, shape: tuple[int, ...], what: Declaration) -> None:
        super().declare_weight(options, shape, what)
        self.format, self.by_row = options.format, options.granularity == "row"
        self.sizes = [size for _, size in what.layout.parts] or [shape[-2]]

    def effective(self) -> Tensor:
        # The difference is zero; its gradient is not. w + (Q - w) would round once more.
        return self.rounded(self.weight.detach()) + (self.weight - self.weight.detach())

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest weights that the format has."""
        scale = self.largest(weight) / LARGEST[self.format]
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
        if self.format == "int8":
            return (weight / scale).round() * scale
        return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale

    def largest(self, weight: Tensor) -> Tensor:
        """The largest size in each row, or in the part that the row belongs to: [..., out, 1]."""
        rows = weight.abs().amax(-1, keepdim=True)
        if self.by_row:
            return rows
        parts = rows.split(self.sizes, -2)
        return torch.cat([part.amax(-2, keepdim=True).expand_as(part) for part in parts], -2)
