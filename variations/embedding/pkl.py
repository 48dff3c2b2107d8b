"""A token embedding over PKL numbers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from core.slices import Declaration, Layout
from variations.cache import Cache
from variations.pkl import PKLOptions, declare_pkl, effective
from variations.site import Site


class PKLEmbedding(nn.Module):
    """Formula: y_t = (A + scale B)[token_t]
    Source: PKL numbers, a + b * scale, per weight.
    Shapes: [B, T] -> [B, T, C]; weight [2, V, C], one materialised [V, C] a use.
    """

    Options = PKLOptions
    weight: nn.Parameter
    scale: Tensor

    def __init__(self, options: PKLOptions, site: Site, *, rows: int, width: int) -> None:
        super().__init__()
        declare_pkl(self, options, (rows, width), Declaration(Layout(dim=-2), "embedding", site.initialiser()))

    def effective(self) -> Tensor:
        return effective(self.weight, self.scale)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return F.embedding(tokens, self.effective())
