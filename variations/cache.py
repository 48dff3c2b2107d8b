"""What a model remembers between calls while it generates: for every mixer a state of its own, and how many tokens were seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Cache:
    """`offset` tokens have been seen; `states` maps a mixer's path to whatever it keeps."""

    def __init__(self) -> None:
        self.offset = 0
        self.states: dict[str, Any] = {}

    def extend(self, path: str, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, K, T, D] and returns all so far. window: how many of the last positions a query sees, its
        own included; what no later query sees is forgotten."""
        if path in self.states:
            past_k, past_v = self.states[path]
            k, v = torch.cat((past_k, k), dim=-2), torch.cat((past_v, v), dim=-2)
        first = 0 if window is None else max(0, k.shape[-2] - window + 1)
        self.states[path] = (k[..., first:, :], v[..., first:, :])
        return k, v
