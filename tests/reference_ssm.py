"""Slow reference implementations of mixers that keep a state, one position after another, from every part as a weight of its own.

Shapes: B batch, T positions, C width, H heads, P width of a head's values, N or D width of its keys, G groups, k kernel size.
Matrices are stored [out, in], the parts of a convolution [channels, k]. No argument is changed, and dtypes are kept.
"""

import math

import torch
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def silu(x: Tensor) -> Tensor:
    """x times its logistic function. [...] -> [...]."""
    return x / (1 + torch.exp(-x))


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square over the last dimension, times a gain."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every channel by itself over its last k inputs, the present one last. x [B, T, c], weight [c, k], bias [c] -> like x."""
    size, rows = weight.shape[1], []
    for t in range(x.shape[1]):
        row = torch.zeros_like(x[:, 0])
        for j in range(size):
            if t - size + 1 + j >= 0:
                row = row + weight[:, j] * x[:, t - size + 1 + j]
        rows.append(row if bias is None else row + bias)
    return torch.stack(rows, 1)


def ssm(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, H, P]; decay [B, T, H] logarithms; b, c [B, T, G, N]; state [B, H, P, N] -> y like x, the last state.

    Formula: S = exp(decay) S + x b^T; y = S c, each head with its group's b and c
    Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, equation 2 with a scalar times the identity as A
    """
    heads, per_group, rows = x.shape[2], x.shape[2] // b.shape[2], []
    for t in range(x.shape[1]):
        outs, states = [], []
        for h in range(heads):
            g = h // per_group
            s = torch.exp(decay[:, t, h])[:, None, None] * state[:, h]
            s = s + x[:, t, h][:, :, None] * b[:, t, g][:, None, :]
            outs.append((s * c[:, t, g][:, None, :]).sum(-1))
            states.append(s)
        state = torch.stack(states, 1)
        rows.append(torch.stack(outs, 1))
    return torch.stack(rows, 1), state


def mamba2(u: Tensor, p: dict[str, Tensor], groups: int, eps: float) -> Tensor:
    """The mixer from its slices, by the names they have below the mixer: `in_proj.weight[z]`, `A_log`. u [B, T, C] -> the same.

    Source: Dao and Gu, arXiv 2405.21060, and the Mamba2 module that its authors published
    """
    batch, t, _ = u.shape
    heads = len(p["A_log"])
    mixed = {}
    for name in ("x", "B", "C"):
        inner = u @ p[f"in_proj.weight[{name}]"].T
        mixed[name] = silu(causal_conv(inner, p[f"conv1d.weight[{name}]"], p[f"conv1d.bias[{name}]"]))
    x = mixed["x"].view(batch, t, heads, -1)
    b, c = (mixed[name].view(batch, t, groups, -1) for name in ("B", "C"))
    dt = softplus(u @ p["in_proj.weight[dt]"].T + p["dt_bias"])
    state = u.new_zeros(batch, heads, x.shape[-1], b.shape[-1])
    y, _ = ssm(x * dt[..., None], dt * -torch.exp(p["A_log"]), b, c, state)
    y = (y + p["D"][:, None] * x).reshape(batch, t, -1)
    y = rmsnorm(y * silu(u @ p["in_proj.weight[z]"].T), p["norm.weight"], eps)
    return y @ p["out_proj.weight"].T


def delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, D]; v [B, T, H, P]; decay (logarithms) and beta [B, T, H]; state [B, H, P, D] -> o like v, the last state.

    Formula: S = a S (1 - beta k k^T) + beta v k^T; o = S q
    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464, equation 10
    """
    one, rows = torch.eye(k.shape[-1], dtype=k.dtype), []
    for t in range(q.shape[1]):
        outs, states = [], []
        for h in range(q.shape[2]):
            key, value, rate = k[:, t, h][:, None, :], v[:, t, h][:, :, None], beta[:, t, h][:, None, None]
            s = (
                torch.exp(decay[:, t, h])[:, None, None] * state[:, h] @ (one - rate * key.mT @ key)
                + rate * value @ key
            )
            outs.append((s @ q[:, t, h][:, :, None])[..., 0])
            states.append(s)
        state = torch.stack(states, 1)
        rows.append(torch.stack(outs, 1))
    return torch.stack(rows, 1), state


def gated_delta(u: Tensor, p: dict[str, Tensor], eps: float, length_eps: float = 1e-6) -> Tensor:
    """The mixer from its slices, by the names they have below the mixer. u [B, T, C] -> the same.

    Source: Yang et al., arXiv 2412.06464, figure 1 and equation 10; `length_eps` is added to squared lengths
    """
    batch, t, _ = u.shape
    heads, mixed = len(p["A_log"]), {}
    for name in ("q", "k", "v"):
        inner = silu(causal_conv(u @ p[f"in_proj.weight[{name}]"].T, p[f"conv1d.weight[{name}]"], None))
        mixed[name] = inner.view(batch, t, heads, -1)
    for name in ("q", "k"):
        mixed[name] = mixed[name] / torch.sqrt((mixed[name] ** 2).sum(-1, keepdim=True) + length_eps)
    gate, beta, alpha = (u @ p[f"in_proj.weight[{name}]"].T for name in ("gate", "beta", "alpha"))
    decay = -torch.exp(p["A_log"]) * softplus(alpha + p["dt_bias"])
    width = mixed["q"].shape[-1]
    state = u.new_zeros(batch, heads, mixed["v"].shape[-1], width)
    o, _ = delta(mixed["q"] / math.sqrt(width), mixed["k"], mixed["v"], decay, 1 / (1 + torch.exp(-beta)), state)
    y = rmsnorm(o, p["norm.weight"], eps) * silu(gate).view(o.shape)
    return y.reshape(batch, t, -1) @ p["out_proj.weight"].T


def memory_attention(x: Tensor, p: dict[str, Tensor], heads: int, kv_heads: int) -> Tensor:
    """Attention to the past and to a memory, from slices by the names they have below the mixer; no positions, no biases.

    Source: Sukhbaatar et al., Augmenting Self-attention with Persistent Memory, arXiv 1907.01470, equations 9 and 10
    """
    batch, t, _ = x.shape
    q, k, v = (x @ p[f"qkv.weight[{name}]"].T for name in ("q", "k", "v"))
    k_m, v_m = (p["memory"] @ p[f"kv.weight[{name}]"].T for name in ("k", "v"))
    width, outs = q.shape[-1] // heads, []
    for h in range(heads):
        of_q = slice(h * width, (h + 1) * width)
        g = h // (heads // kv_heads)
        of_kv = slice(g * width, (g + 1) * width)
        rows = []
        for i in range(t):
            keys = torch.cat((k_m[:, of_kv].expand(batch, -1, -1), k[:, : i + 1, of_kv]), 1)
            values = torch.cat((v_m[:, of_kv].expand(batch, -1, -1), v[:, : i + 1, of_kv]), 1)
            scores = (keys @ q[:, i, of_q][:, :, None])[..., 0] / math.sqrt(width)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            rows.append((weights[:, :, None] * values).sum(1) / weights.sum(-1, keepdim=True))
        outs.append(torch.stack(rows, 1))
    return torch.cat(outs, -1) @ p["proj.weight"].T
