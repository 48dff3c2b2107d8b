"""Causal attention that also attends to a learned memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.options import opt
from core.slices import Declaration, Layout, declare
from variations.attention.causal import CausalAttention
from variations.init.distributions import Normal, Spread
from variations.site import Site


class MemoryAttention(CausalAttention):
    """Formula: softmax(q [k_m; k]^T / sqrt(D), masked to the memory and the past) [v_m; v], where k_m, v_m = W_kv M
    Source: persistent memory, Sukhbaatar et al., arXiv 1907.01470; here keys and values come of one learned vector a slot.
    Shapes: [B, T, C] -> the same; memory [M, C]; qkv as in causal attention, kv fused as rows [k; v] of K*D each.

    The memory has no position, and its keys are normalised where the past's are. Cached are the past's keys and values alone.
    """

    @dataclass(frozen=True)
    class Options(CausalAttention.Options):
        """Options of attention with a memory."""

        slots: int = opt(16, "Learned vectors that every position attends to beside its past.", ge=1)

    memory: nn.Parameter

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__(options, site)
        width, rows = site.config.n_embd, self.kv_heads * self.width
        self.unmasked, self.kv_rows = options.slots, 2 * rows
        unit = Normal(Spread(std=1.0))  # of the size of what qkv reads, which was normalised
        declare(self, "memory", (self.unmasked, width), Declaration(Layout(dim=-2), "embedding", unit))
        parts = (("k", rows), ("v", rows))
        self.kv = site.make(
            "linear", "kv", in_features=width, out_features=self.kv_rows, parts=parts, blocks=(-2, self.width)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As causal attention with the memory before the past: the last T of M + S positions are q's."""
        k_m, v_m = self.kv(self.memory).unflatten(-1, (2, self.kv_heads, self.width)).permute(1, 2, 0, 3)
        if self.k_norm is not None:
            k_m = self.k_norm(k_m)
        k, v = (torch.cat((m.to(y.dtype).expand(len(y), -1, -1, -1), y), -2) for m, y in ((k_m, k), (v_m, v)))
        return super().attend(q, k, v)

    def flops_per_token(self, t: int) -> int:
        """As causal attention, of the M slots too, less `kv`: it counts as a linear, but reads them for all tokens together."""
        slots = 4 * self.heads * self.width * self.unmasked
        return super().flops_per_token(t) + slots - 2 * self.memory.shape[1] * self.kv_rows
