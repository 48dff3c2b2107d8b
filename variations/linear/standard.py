"""The plain linear map, and the interface that every linear has."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import NoOptions
from core.slices import Declaration, Layout, declare
from variations.grouped import grouped_linear
from variations.init.distributions import ZEROS
from variations.site import Site


class Linear(nn.Module):
    """Formula: y = x W^T + b; with experts y_n = x_n W_e^T + b_e for the rows n of each expert e
    Source: nn.Linear's convention, weight [out, in].
    Shapes: [..., in] -> [..., out]; with experts [N, in], sorted by expert, and their counts [E] -> [N, out], weight [E, out, in].
    Raises: ValueError where the parts do not add up to `out_features`.

    parts: names and sizes of what is fused along the output. residual: whether it writes to the residual stream. bias None is the
    model's choice. role, blocks: see core.slices.Declaration. experts: how many linear maps are stacked; 0 is one alone.
    """

    Options: type = NoOptions

    def __init__(
        self,
        options: Any,
        site: Site,
        *,
        in_features: int,
        out_features: int,
        parts: tuple[tuple[str, int], ...] = (),
        bias: bool | None = None,
        residual: bool = False,
        role: str = "matrix",
        blocks: tuple[int, int] | None = None,
        experts: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.experts = in_features, out_features, experts
        self.bias: nn.Parameter | None = None
        self.weight: nn.Parameter
        gain = site.residual_gain() if residual else 1.0
        stack = (tuple(str(e) for e in range(experts)),) if experts else ()
        outer = (experts,) if experts else ()
        what = Declaration(Layout(parts, -2, stack=stack), role, site.initialiser(), residual=gain, blocks=blocks)
        self.declare_weight(options, (*outer, out_features, in_features), what)
        if site.config.bias if bias is None else bias:
            declare(self, "bias", (*outer, out_features), Declaration(Layout(parts, -1, stack=stack), "vector", ZEROS))

    def declare_weight(self, options: Any, shape: tuple[int, ...], what: Declaration) -> None:
        """Declares what the effective weight, described by `what`, is made of; other parameterisations override this, `effective`
        and `absorb`."""
        declare(self, "weight", shape, what)

    def effective(self) -> Tensor:
        """The weight that multiplies, [out, in] or [E, out, in]."""
        return self.weight

    def absorb(self, weight: Tensor) -> None:
        """Makes `weight` the effective one."""
        self.weight.copy_(weight)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """The map with a given weight; adapters call it with theirs."""
        return F.linear(x, weight, bias) if counts is None else grouped_linear(x, weight, bias, counts)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        return self.op(x, self.effective(), self.bias, counts)
