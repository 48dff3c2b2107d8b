"""The plain linear map, and the interface that every linear has."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import NoOptions
from core.slices import Declaration, Layout, declare
from variations.init.distributions import ZEROS
from variations.site import Site


class Linear(nn.Module):
    """Formula: y = x W^T + b
    Source: nn.Linear's convention, weight [out, in].
    Shapes: [..., in] -> [..., out].
    Raises: ValueError where the parts do not add up to `out_features`.

    parts: names and sizes of what is fused along the output. residual: whether it writes to the residual stream. bias None is the
    model's choice. role, blocks: see core.slices.Declaration.
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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None = None
        self.weight: nn.Parameter
        gain = site.residual_gain() if residual else 1.0
        what = Declaration(Layout(parts, dim=-2), role, site.initialiser(), residual=gain, blocks=blocks)
        self.declare_weight(options, (out_features, in_features), what)
        if site.config.bias if bias is None else bias:
            declare(self, "bias", (out_features,), Declaration(Layout(parts, dim=-1), "vector", ZEROS))

    def declare_weight(self, options: Any, shape: tuple[int, int], what: Declaration) -> None:
        """Declares what the effective weight, described by `what`, is made of; other parameterisations override this, `effective`
        and `absorb`."""
        declare(self, "weight", shape, what)

    def effective(self) -> Tensor:
        """The weight that multiplies, [out, in]."""
        return self.weight

    def absorb(self, weight: Tensor) -> None:
        """Makes `weight` [out, in] the effective one."""
        self.weight.copy_(weight)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The map with a given weight [out, in]; adapters call it with theirs."""
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.effective(), self.bias)
