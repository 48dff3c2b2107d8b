"""A gated MLP: SwiGLU with silu, GeGLU with gelu."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from core.options import opt
from variations.dropout import Dropout
from variations.site import Site


class GatedMLP(nn.Module):
    """Formula: y = W_down (act(W_gate x) * W_up x)
    Source: Shazeer, arXiv 2002.05202.
    Shapes: [B, T, C] -> the same; gate_up fused as rows [gate; up] of F each.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the gated MLP."""

        expansion: float = opt(
            8 / 3, "Width as a multiple of n_embd; 8/3 has the parameters of a plain MLP of 4.", gt=0.0
        )
        width: int | None = opt(None, "Width; null means expansion * n_embd, rounded to a multiple of 8.", ge=1)

    readers = ("gate_up",)

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        c = site.config
        width = options.width or max(8, round(options.expansion * c.n_embd / 8) * 8)
        parts = (("gate", width), ("up", width))
        self.gate_up = site.make("linear", "gate_up", in_features=c.n_embd, out_features=2 * width, parts=parts)
        self.act = site.make("activation", "act")
        self.down = site.make("linear", "down", in_features=width, out_features=c.n_embd, residual=True)
        self.drop = Dropout(c.dropout, site.path)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.drop(self.down(self.act(gate) * up))
