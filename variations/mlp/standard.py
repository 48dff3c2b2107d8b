"""Two linears with a nonlinearity between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from core.options import opt
from variations.dropout import Dropout
from variations.site import Site


class MLP(nn.Module):
    """Formula: y = W_down act(W_up x)
    Source: Vaswani et al., arXiv 1706.03762.
    Shapes: [B, T, C] -> the same, F = expansion * C between.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of the plain MLP."""

        expansion: float = opt(4.0, "Width as a multiple of n_embd.", gt=0.0)
        width: int | None = opt(None, "Width; null means expansion * n_embd, rounded.", ge=1)

    readers = ("up",)

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        c = site.config
        width = options.width or max(1, round(options.expansion * c.n_embd))
        self.up = site.make("linear", "up", in_features=c.n_embd, out_features=width)
        self.act = site.make("activation", "act")
        self.down = site.make("linear", "down", in_features=width, out_features=c.n_embd, residual=True)
        self.drop = Dropout(c.dropout, site.path)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.act(self.up(x))))
