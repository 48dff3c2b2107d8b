"""Causal softmax attention with any number of key and value heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.options import opt
from variations.cache import Cache
from variations.dropout import Dropout
from variations.site import Site


class CausalAttention(nn.Module):
    """Formula: softmax(q k^T / sqrt(D), masked to the past) v
    Source: Vaswani et al., arXiv 1706.03762; grouped heads: arXiv 2305.13245; normalised q and k: arXiv 2302.05442.
    Shapes: [B, T, C] -> the same; qkv fused as rows [q; k; v] of H*D, K*D, K*D.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of causal attention."""

        qk_norm: bool = opt(False, "Whether queries and keys are normalised per head, before they are rotated.")
        kernel: Literal["fused", "plain"] = opt("fused", "torch's fused kernel, or matrix products and a softmax.")

    position: Any
    readers = ("qkv",)  # the linears that read this module's input

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        c = site.config
        self.path, self.heads, self.kv_heads, self.width = site.path, c.n_head, c.kv_heads, c.head_width
        q, kv = self.heads * self.width, self.kv_heads * self.width
        parts = (("q", q), ("k", kv), ("v", kv))
        self.qkv = site.make(
            "linear", "qkv", in_features=c.n_embd, out_features=q + 2 * kv, parts=parts, blocks=(-2, self.width)
        )
        heads = (-1, self.width)
        self.proj = site.make("linear", "proj", in_features=q, out_features=c.n_embd, residual=True, blocks=heads)
        self.q_norm = site.make("norm", "q_norm", width=self.width) if options.qk_norm else None
        self.k_norm = site.make("norm", "k_norm", width=self.width) if options.qk_norm else None
        cls, _ = site.at("position").find("position")
        self.position = None if cls.embeds else site.make("position", "position", width=self.width)
        self.fused = options.kernel == "fused"
        self.drop = Dropout(c.dropout, site.path)
        self.attn_drop = Dropout(c.dropout, f"{site.path}.weights")

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        b, t, _ = x.shape
        offset = cache.offset if cache is not None else 0
        heads = (self.heads, self.kv_heads, self.kv_heads)
        split = self.qkv(x).split([n * self.width for n in heads], dim=-1)
        q, k, v = (y.view(b, t, n, self.width).transpose(1, 2) for y, n in zip(split, heads, strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            q, k = self.position.rotate(q, offset), self.position.rotate(k, offset)
        if cache is not None:
            k, v = cache.extend(self.path, k, v)
        y = self.attend(q, k, v)
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, t, self.heads * self.width)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, T, D], k and v [B, K, S, D], the last T of S positions being q's -> [B, H, T, D]."""
        t, s = q.shape[-2], k.shape[-2]
        dropping = self.attn_drop.on and self.training
        fused = self.fused and not dropping
        if fused and (t == s or t == 1):
            return F.scaled_dot_product_attention(q, k, v, is_causal=t > 1, enable_gqa=self.heads != self.kv_heads)
        if fused:
            mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        # The fused kernel draws its own dropout mask, which cannot be a function of seed, step and site.
        if self.heads != self.kv_heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        hidden = torch.full((t, s), float("-inf"), dtype=q.dtype, device=q.device).triu(s - t + 1)
        scores = torch.baddbmm(hidden, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=1 / math.sqrt(self.width))
        weights = self.attn_drop(scores.softmax(-1))
        return torch.bmm(weights.to(v.dtype), v.flatten(0, 1)).view(q.shape)

    def flops_per_token(self, t: int) -> int:
        """Multiply-adds times two of scores and weighted sum, forward, for a context of `t` (without the linears)."""
        return 4 * self.heads * self.width * t
