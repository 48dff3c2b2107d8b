"""DoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.addresses import Labels
from core.lora import take
from core.slices import Declaration, Layout, declare
from variations.init.distributions import ONES
from variations.lora.lora import LoRA


class DoRA(LoRA):
    """Formula: y = x W'^T, W' = m (W + scale B A) / |W + scale B A|, norms of rows, through which no gradient flows
    Source: Liu et al., arXiv 2402.09353, section 4.3; a magnitude for each output, as its authors' code and PEFT have it.
    Shapes: [..., in] -> [..., rows]; lora_a [rank, in], lora_b [rows, rank], lora_magnitude [rows], at first the norms of W.
    """

    lora_magnitude: nn.Parameter

    def __init__(self, options: Any, *, path: str, rows: int, columns: int, experts: Labels = ()) -> None:
        super().__init__(options, path=path, rows=rows, columns=columns, experts=experts)
        layout, outer = Layout(dim=-1, stack=(experts,) if experts else ()), (len(experts),) if experts else ()
        declare(self, "lora_magnitude", (*outer, rows), Declaration(layout, "vector", ONES))

    def gain(self, weight: Tensor) -> Tensor:
        """m / |W + scale B A| for each row; 1 for experts that are not its own."""
        with torch.no_grad():
            norms = torch.linalg.vector_norm(super().merged(weight), dim=-1)
            norms.clamp_(min=torch.finfo(norms.dtype).tiny)  # a row of zeros stays one
        if self.places is None:
            return self.lora_magnitude / norms
        index = torch.tensor(self.places, device=weight.device)
        return torch.ones_like(norms).index_copy(0, index, self.lora_magnitude / norms[index])

    def forward(self, x: Tensor, y: Tensor, linear: Any, *counts: Tensor) -> Tensor:
        def rows(t: Tensor) -> Tensor:  # of a stack [E, rows], each token's
            return t.repeat_interleave(counts[0], 0, output_size=len(y)) if counts else t

        gain = rows(self.gain(take(linear.effective(), self.ranges, -2))).to(y.dtype)
        product = take(y, self.ranges, -1)
        product = (
            product.clone() if linear.bias is None else product - rows(take(linear.bias, self.ranges, -1)).to(y.dtype)
        )
        return (gain - 1) * product + gain * self.added(x, linear, *counts)

    def begin(self, weight: Tensor) -> None:
        norms = torch.linalg.vector_norm(weight, dim=-1)
        self.lora_magnitude.copy_(norms if self.places is None else norms[self.places])

    def merged(self, weight: Tensor) -> Tensor:
        return self.gain(weight)[..., None] * super().merged(weight)
