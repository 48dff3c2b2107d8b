"""The plain token embedding."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import NoOptions
from core.slices import Declaration, Layout, declare
from variations.cache import Cache
from variations.site import Site


class Embedding(nn.Module):
    """Formula: y_t = W[token_t]
    Source: nn.Embedding.
    Shapes: [B, T] -> [B, T, C]; weight [V, C].
    """

    Options: type = NoOptions
    weight: nn.Parameter

    def __init__(self, options: Any, site: Site, *, rows: int, width: int) -> None:
        super().__init__()
        declare(self, "weight", (rows, width), Declaration(Layout(dim=-2), "embedding", site.initialiser()))

    def effective(self) -> Tensor:
        """The table that is looked up, [V, C]."""
        return self.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return F.embedding(tokens, self.weight)
