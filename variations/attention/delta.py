"""Linear attention by the gated delta rule: a state that forgets, and that replaces what it holds under a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.options import opt
from variations.attention.mamba2 import ShortConv, StepOptions, chunked, declare_steps, segment_sums
from variations.cache import Cache
from variations.dropout import Dropout
from variations.norm.rmsnorm import RMSNorm
from variations.site import Site

EPS = 1e-6  # added to the square of a key's or query's length


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Formula: S_t = a_t S_{t-1} + u_t k_t^T, u_t = beta_t (v_t - a_t S_{t-1} k_t), a_t = exp(decay_t); o_t = S_t q_t, per head
    Source: Yang et al., arXiv 2412.06464, section 3.3: the u of a chunk solve one triangular system, the WY form.
    Shapes: q and k [B, T, H, D]; v [B, T, H, P]; decay and beta [B, T, H]; state [B, H, P, D] -> o like v, and the last state.
    """
    t = q.shape[1]
    q, k, v, decay, beta = (x.movedim(3, 1) for x in chunked((q, k, v, decay, beta), min(chunk, t)))
    sums = segment_sums(decay)  # [B, H, chunks, L, L]
    kept, since, left = sums.exp(), decay.cumsum(-1).exp().unsqueeze(-1), sums[..., -1, :].exp().unsqueeze(-1)
    # (1 + L) u = beta (v - since k S^T), where L_ij = beta_i kept_ij k_i.k_j for j < i: both terms of u, but for S, at once. Of
    # the system, the solver reads what lies below the diagonal.
    beta = beta.unsqueeze(-1)
    system = beta * kept * (k @ k.mT)
    both = torch.linalg.solve_triangular(system, beta * torch.cat((v, since * k), -1), upper=False, unitriangular=True)
    fresh, stale = both.split((v.shape[-1], k.shape[-1]), dim=-1)
    within, q = kept * (q @ k.mT), since * q
    made = []
    for i in range(q.shape[2]):
        u = fresh[:, :, i] - stale[:, :, i] @ state.mT
        made.append(q[:, :, i] @ state.mT + within[:, :, i] @ u)
        state = since[:, :, i, -1:] * state + (left[:, :, i] * u).mT @ k[:, :, i]
    return torch.stack(made, 2).flatten(2, 3).transpose(1, 2)[:, :t], state


def delta_step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`delta_scan` of one position by its formula, with the same shapes, T being 1."""
    q, k, v, decay, beta = (x.squeeze(1).unsqueeze(-1) for x in (q, k, v, decay, beta))
    state = decay.unsqueeze(-1).exp() * state
    state = state + beta.unsqueeze(-1) * (v - state @ k) @ k.mT
    return (state @ q).squeeze(-1).unsqueeze(1), state


class DeltaRule(nn.Module):
    """Formula: W_out (rmsnorm(o) * silu(gate)), o_t = S_t q_t / sqrt(D), S_t = a_t S_{t-1} (1 - b_t k_t k_t^T) + b_t v_t k_t^T
        per head, where q, k, v, gate, beta, alpha = W_in u, and then q, k, v = silu(conv(q, k, v)), q and k brought to length 1,
        a = exp(-e^A_log softplus(alpha + dt_bias)) and b = sigmoid(beta)
    Source: Gated DeltaNet, Yang, Kautz and Hatamizadeh, arXiv 2412.06464.
    Shapes: [B, T, C] -> the same; in_proj fused as rows [q; k; v; gate; beta; alpha] of H*D, H*D, H*P, H*P, H, H, where
        P = expand * D; state [B, H, P, D].

    The state is float32 under autocast. Generation keeps it and the convolution's last inputs, however many tokens were seen.
    """

    @dataclass(frozen=True)
    class Options(StepOptions):
        """Options of the gated delta rule. Heads are the model's."""

        expand: int = opt(1, "Width of a head's values as a multiple of its keys', the model's head width.", ge=1)

    A_log: nn.Parameter
    dt_bias: nn.Parameter
    readers = ("in_proj",)  # the linears that read this module's input

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        c, self.path, self.chunk = site.config, site.path, options.chunk
        self.heads, self.width = c.n_head, c.head_width
        self.keys, self.values = self.heads * self.width, self.heads * self.width * options.expand
        mixed = (("q", self.keys), ("k", self.keys), ("v", self.values))
        parts = (*mixed, ("gate", self.values), ("beta", self.heads), ("alpha", self.heads))
        rows = sum(n for _, n in parts)
        self.in_proj = site.make("linear", "in_proj", in_features=c.n_embd, out_features=rows, parts=parts, bias=False)
        self.conv1d = ShortConv(mixed, options.d_conv, bias=False)
        declare_steps(self, self.heads, options)
        norm = RMSNorm.Options(eps=options.norm_eps)
        self.norm = RMSNorm(norm, site.at("norm"), width=self.values // self.heads)
        self.out_proj = site.make(
            "linear", "out_proj", in_features=self.values, out_features=c.n_embd, bias=False, residual=True
        )
        self.drop = Dropout(c.dropout, site.path)

    def forward(self, u: Tensor, cache: Cache | None = None) -> Tensor:
        past, state = cache.states.get(self.path, (None, None)) if cache is not None else (None, None)
        sizes = (2 * self.keys + self.values, self.values, self.heads, self.heads)
        x, gate, beta, alpha = self.in_proj(u).split(sizes, dim=-1)
        x, past = self.conv1d(x, past)
        o, state = self.mix(F.silu(x), beta, alpha, state)
        if cache is not None:
            cache.states[self.path] = (past, state)
        y = self.norm(o).flatten(2) * F.silu(gate)
        return self.drop(self.out_proj(y))

    def mix(self, x: Tensor, beta: Tensor, alpha: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """q, k, v after the convolution [B, T, 2HD + HP], beta, alpha [B, T, H], the state before -> o [B, T, H, P], and after."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            split = x.to(wide).split((self.keys, self.keys, self.values), dim=-1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in split)
            q, k = (y * (y.square().sum(-1, keepdim=True) + EPS).rsqrt() for y in (q, k))
            decay = -F.softplus(alpha.to(wide) + self.dt_bias.to(wide)) * self.A_log.to(wide).exp()
            inputs = q / self.width**0.5, k, v, decay, beta.to(wide).sigmoid()
            if state is None:
                state = v.new_zeros(len(v), self.heads, v.shape[-1], self.width)
            return delta_step(*inputs, state) if x.shape[1] == 1 else delta_scan(*inputs, state, self.chunk)

    def flops_per_token(self, t: int) -> int:
        """Multiply-adds times two of convolution and scan, forward, for a context of `t` (without the linears)."""
        seen, conv = min(self.chunk, t), self.conv1d.size * (2 * self.keys + self.values)
        within = seen * (2 * self.keys + self.values)  # keys with keys and queries; what is read
        solved = seen * (self.keys + self.values) // 2
        return 2 * (conv + within + solved + 3 * self.values * self.width)
