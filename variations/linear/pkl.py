"""A linear map over PKL numbers."""

from __future__ import annotations

from torch import Tensor

from core.slices import Declaration
from variations.linear.standard import Linear
from variations.pkl import PKLOptions, declare_pkl, effective


class PKLLinear(Linear):
    """Formula: y = x (A + scale B)^T + b
    Source: PKL numbers, a + b * scale, per weight.
    Shapes: [..., in] -> [..., out]; weight [2, out, in], one materialised [out, in] and one GEMM a use.
    """

    Options = PKLOptions
    scale: Tensor

    def declare_weight(self, options: PKLOptions, shape: tuple[int, ...], what: Declaration) -> None:
        declare_pkl(self, options, shape, what)

    def effective(self) -> Tensor:
        return effective(self.weight, self.scale)

    def absorb(self, weight: Tensor) -> None:
        self.weight[0].add_(weight - self.effective())
