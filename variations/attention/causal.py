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
from variations.scale import SoftCap
from variations.site import Site


class CausalAttention(nn.Module):
    """Formula: softmax(cap(q k^T / sqrt(D)), masked to the past or its window) v, times sigmoid(z) with a gate
    Source: Vaswani et al., arXiv 1706.03762; grouped heads: arXiv 2305.13245; normalised q and k: arXiv 2302.05442;
    window: Mistral, arXiv 2310.06825; cap: Gemma 2, arXiv 2408.00118; gate: Qiu et al., arXiv 2505.06708.
    Shapes: [B, T, C] -> the same; qkv fused as rows [q; k; v] of H*D, K*D, K*D, and with a gate [q; k; v; z], z of H*D.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of causal attention."""

        qk_norm: bool = opt(False, "Whether queries and keys are normalised per head, before they are rotated.")
        kernel: Literal["fused", "plain"] = opt("fused", "torch's fused kernel, or matrix products and a softmax.")
        window: int | None = opt(None, "Positions that a query sees, its own included; null means all.", ge=1)
        gate: bool = opt(False, "Whether what a head reads is multiplied by a sigmoid of the input.")
        scale: float | None = opt(None, "What q k^T is multiplied by; null means 1/sqrt(head_dim).", gt=0.0)
        softcap: float | None = opt(
            None, "Scores s become cap * tanh(s / cap), by the plain kernel; null means no cap.", gt=0.0, knob=True
        )
        qkv_bias: bool | None = opt(None, "Whether qkv has a bias; null means the model's choice.")
        proj_bias: bool | None = opt(None, "Whether proj has a bias; null means the model's choice.")

    position: Any
    readers = ("qkv",)  # the linears that read this module's input
    unmasked = 0  # keys before the past that every query sees, whatever the window

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        c = site.config
        self.path, self.heads, self.kv_heads, self.width = site.path, c.n_head, c.kv_heads, c.head_width
        q, kv = self.heads * self.width, self.kv_heads * self.width
        gate = (("z", q),) if options.gate else ()
        parts = (("q", q), ("k", kv), ("v", kv), *gate)
        shape: dict[str, Any] = {"in_features": c.n_embd, "out_features": sum(n for _, n in parts), "parts": parts}
        self.qkv = site.make("linear", "qkv", bias=options.qkv_bias, blocks=(-2, self.width), **shape)
        shape = {"in_features": q, "out_features": c.n_embd, "residual": True}
        self.proj = site.make("linear", "proj", bias=options.proj_bias, blocks=(-1, self.width), **shape)
        self.q_norm = site.make("norm", "q_norm", width=self.width) if options.qk_norm else None
        self.k_norm = site.make("norm", "k_norm", width=self.width) if options.qk_norm else None
        cls, _ = site.at("position").find("position")
        self.position = None if cls.embeds else site.make("position", "position", width=self.width)
        self.heads_of_parts = [n // self.width for _, n in parts]
        self.window, self.score_scale = options.window, options.scale
        self.softcap = SoftCap(options.softcap)
        self.fused = options.kernel == "fused" and options.softcap is None
        self.drop = Dropout(c.dropout, site.path)
        self.attn_drop = Dropout(c.dropout, f"{site.path}.weights")

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        b, t, _ = x.shape
        offset = cache.offset if cache is not None else 0
        split = self.qkv(x).split([n * self.width for n in self.heads_of_parts], dim=-1)
        split = (y.view(b, t, n, self.width).transpose(1, 2) for y, n in zip(split, self.heads_of_parts, strict=True))
        q, k, v, *gate = split
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            q, k = self.position.rotate(q, offset), self.position.rotate(k, offset)
        if cache is not None:
            k, v = cache.extend(self.path, k, v, self.window)
        y = self.attend(q, k, v)
        y = y * gate[0].sigmoid() if gate else y
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, t, self.heads * self.width)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, T, D], k and v [B, K, S, D], the last T of S positions being q's -> [B, H, T, D]."""
        t, s = q.shape[-2], k.shape[-2]
        dropping = self.attn_drop.on and self.training
        if self.fused and not dropping:
            plain = (t == s or t == 1) and not self.windowed(s)
            mask = None if plain else self.visible(t, s, q.device)
            shared = self.heads != self.kv_heads
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=plain and t > 1, scale=self.score_scale, enable_gqa=shared
            )
        # The fused kernel draws its own dropout mask, which cannot be a function of seed, step and site.
        if self.heads != self.kv_heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        weights = self.attn_drop(self.scores(q.flatten(0, 1), k.flatten(0, 1)).softmax(-1))
        return torch.bmm(weights.to(v.dtype), v.flatten(0, 1)).view(q.shape)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q [N, T, D] and k [N, S, D] -> [N, T, S], -inf where a query does not see a key."""
        t, s = q.shape[-2], k.shape[-2]
        scale = self.score_scale or 1 / math.sqrt(self.width)
        hidden = torch.full((t, s), float("-inf"), dtype=q.dtype, device=q.device)
        hidden = hidden.masked_fill(self.visible(t, s, q.device), 0) if self.windowed(s) else hidden.triu(s - t + 1)
        if self.softcap.number is None:
            return torch.baddbmm(hidden, q, k.mT, alpha=scale)
        return self.softcap(torch.bmm(q, k.mT) * scale) + hidden

    def windowed(self, s: int) -> bool:
        """Whether some of `s` keys may be too far back to be seen."""
        return self.window is not None and s - self.unmasked > self.window

    def visible(self, t: int, s: int, device: torch.device) -> Tensor:
        """Which keys each of the last `t` of `s` positions sees, bool [T, S]."""
        own = s - self.unmasked
        mask = torch.ones(t, own, dtype=torch.bool, device=device).tril(own - t)
        if self.window is not None:
            mask = mask.triu(own - t - self.window + 1)
        return F.pad(mask, (self.unmasked, 0), value=True) if self.unmasked else mask

    def flops_per_token(self, t: int) -> int:
        """Multiply-adds times two of scores and weighted sum, forward, for a context of `t` (without the linears)."""
        return 4 * self.heads * self.width * min(t, self.window or t)
