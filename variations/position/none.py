"""No positions, and the interface that every kind of position has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from core.options import NoOptions
from variations.site import Site


class NoPosition(nn.Module):
    """Formula: nothing is added, nothing turned; the causal mask alone tells order
    Source: Haviv et al., arXiv 2203.16634.
    Shapes: embed [B, T, C] -> the same; rotate [B, H, T, D] -> the same.

    `embeds`: whether one instance at the place `wpe` changes the embeddings. Otherwise every attention has one and rotates with it.
    `switch`: the longest text before every position, also of the tokens before, is turned otherwise; None where none is.
    """

    Options: type = NoOptions
    embeds = False
    switch: int | None = None

    def __init__(self, options: Any, site: Site, *, width: int) -> None:
        super().__init__()

    def embed(self, x: Tensor, offset: int) -> Tensor:
        """Token embeddings with positions from `offset` on."""
        return x

    def rotate(self, x: Tensor, offset: int) -> Tensor:
        """Queries or keys turned by their positions."""
        return x
