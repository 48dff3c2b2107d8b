"""A linear map over PKL numbers."""

from __future__ import annotations

from torch import Tensor

from variations.linear.standard import Linear
from variations.pkl import PKLOptions, declare_pkl, effective
from variations.site import Site


class PKLLinear(Linear):
    """Formula: y = x (A + scale B)^T + b
    Source: PKL numbers, a + b * scale, per weight.
    Shapes: [..., in] -> [..., out]; weight [2, out, in], one materialised [out, in] and one GEMM a use.
    """

    Options = PKLOptions
    scale: Tensor

    def declare_weight(
        self, options: PKLOptions, site: Site, parts: tuple[tuple[str, int], ...], role: str, gain: float
    ) -> None:
        declare_pkl(self, options, (self.out_features, self.in_features), parts, role, site.initialiser(), gain)

    def effective(self) -> Tensor:
        return effective(self.weight, self.scale)
