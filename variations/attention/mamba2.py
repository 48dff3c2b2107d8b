"""Mamba-2: a state space mixer whose state decays at a rate that the input chooses, and what mixers like it are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.options import Invalid, opt
from core.slices import Declaration, Initialiser, Layout, declare
from variations.cache import Cache
from variations.dropout import Dropout
from variations.init.distributions import ONES, ZEROS, Spread, Uniform
from variations.norm.rmsnorm import RMSNorm
from variations.site import Site


@dataclass(frozen=True)
class LogOfUniform:
    """The logarithm of what is uniform between two rates; of A_log in arXiv 2405.21060."""

    low: float
    high: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.empty(shape).uniform_(self.low, self.high, generator=generator).log()

    def __str__(self) -> str:
        return f"log(uniform({self.low:g}, {self.high:g}))"


@dataclass(frozen=True)
class StepBias:
    """A bias whose softplus is log-uniform between two steps; of dt_bias in arXiv 2312.00752, section 3.6."""

    low: float
    high: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        bounds = math.log(self.low), math.log(self.high)
        dt = torch.empty(shape).uniform_(*bounds, generator=generator).exp()
        return dt + (-torch.expm1(-dt)).log()  # the inverse of softplus, also where dt is small

    def __str__(self) -> str:
        return f"inverse_softplus(log_uniform({self.low:g}, {self.high:g}))"


@dataclass(frozen=True)
class StepOptions:
    """Shared by mixers whose state decays by exp(-dt A)."""

    dt_min: float = opt(
        0.001, "Smallest step size at the start, where the linear map's share of it is none.", gt=0.0, knob=True
    )
    dt_max: float = opt(0.1, "Largest step size at the start.", gt=0.0, knob=True)
    d_conv: int = opt(4, "Positions that the short convolution sees, the present one included.", ge=1)
    chunk: int = opt(64, "Positions that are computed at once; changes speed and roundings alone.", ge=1)
    norm_eps: float = opt(1e-5, "Added to the mean square in the output's norm.", gt=0.0)

    def __post_init__(self) -> None:
        if self.dt_min > self.dt_max:
            raise Invalid(("dt_min", f"{self.dt_min:g} is above dt_max, which is {self.dt_max:g}"))


def declare_steps(module: nn.Module, heads: int, options: StepOptions) -> None:
    """Gives a mixer A_log and dt_bias [H], of which the decay of its state is made."""
    inits: dict[str, Initialiser] = {
        "A_log": LogOfUniform(1.0, 16.0),
        "dt_bias": StepBias(options.dt_min, options.dt_max),
    }
    for name, init in inits.items():
        declare(module, name, (heads,), Declaration(Layout(), "vector", init))


class ShortConv(nn.Module):
    """Formula: y_tc = b_c + sum over j < k of w_cj x_{t-k+1+j,c}
    Source: causal depthwise convolution, Gu and Dao, arXiv 2312.00752; F.conv1d with one group a channel.
    Shapes: [B, T, channels] -> the same; weight [channels, k], before the first position stand zeros.
    """

    weight: nn.Parameter

    def __init__(self, parts: Sequence[tuple[str, int]], size: int, bias: bool) -> None:
        super().__init__()
        channels, self.size = sum(rows for _, rows in parts), size
        self.bias: nn.Parameter | None = None
        uniform = Uniform(Spread(std=1 / math.sqrt(3 * size)))  # within 1/sqrt(k), as nn.Conv1d begins
        declare(self, "weight", (channels, size), Declaration(Layout(tuple(parts), -2), "conv", uniform))
        if bias:
            declare(self, "bias", (channels,), Declaration(Layout(tuple(parts), -1), "vector", ZEROS))

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`past`: the k - 1 inputs before x. Returns the outputs and the last k - 1 inputs."""
        t, before = x.shape[1], self.size - 1
        known = F.pad(x, (0, 0, before, 0)) if past is None else torch.cat((past, x), 1)
        terms = [known[:, j : j + t] * self.weight[:, j] for j in range(self.size)]  # torch's conv1d is slower on a CPU
        y = sum(terms[1:], terms[0])
        return y if self.bias is None else y + self.bias, known[:, t:]


def segment_sums(a: Tensor) -> Tensor:
    """[..., L] -> [..., L, L]: at i, j the sum of a over j < k <= i, and -inf where j > i.

    Each is summed by itself: as a difference of two long sums it would lose the digits that these share.
    """
    size = a.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=a.device)
    terms = a.unsqueeze(-1).expand(*a.shape, size).masked_fill(~ones.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~ones.tril(), float("-inf"))


def chunked(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """[B, T, ...] -> [B, chunks, size, ...], zeros after the end."""
    pad = -tensors[0].shape[1] % size
    return [F.pad(x, (*(0, 0) * (x.dim() - 2), 0, pad)).unflatten(1, (-1, size)) for x in tensors]


def scan(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Formula: S_t = exp(decay_t) S_{t-1} + x_t b_t^T; y_t = S_t c_t, per head
    Source: the state space dual form, Dao and Gu, arXiv 2405.21060, section 6: as attention within a chunk, by states between them.
    Shapes: x [B, T, H, P]; decay [B, T, H]; b and c [B, T, G, N], each for H/G heads; state [B, H, P, N] -> y like x, last state.
    """
    batch, t, heads, width = x.shape
    groups = b.shape[2]
    x, decay = x.unflatten(2, (groups, -1)), decay.unflatten(2, (groups, -1))
    x, decay, b, c = chunked((x, decay, b, c), min(chunk, t))
    decay = decay.movedim(2, -1)  # [B, chunks, G, H/G, L]; below, i and j are positions in a chunk
    sums = segment_sums(decay)
    alike = torch.einsum("bkign,bkjgn->bkgij", c, b).unsqueeze(3)
    y = torch.einsum("bkgrij,bkjgrp->bkigrp", sums.exp() * alike, x)

    made = torch.einsum("bkjgrp,bkjgn->bkgrpn", x * sums[..., -1, :].exp().movedim(-1, 2).unsqueeze(-1), b)
    made = torch.cat((state.view(batch, 1, groups, -1, *state.shape[2:]), made), 1)
    between = segment_sums(F.pad(decay.sum(-1).movedim(1, -1), (1, 0))).exp()
    states = torch.einsum("bgrkm,bmgrpn->bkgrpn", between, made)

    since = decay.cumsum(-1).exp().movedim(-1, 2).unsqueeze(-1)
    y = y + torch.einsum("bkign,bkgrpn->bkigrp", c, states[:, :-1]) * since
    return y.reshape(batch, -1, heads, width)[:, :t], states[:, -1].flatten(1, 2)


def step(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`scan` of one position by its formula, with the same shapes, T being 1."""
    repeats = x.shape[2] // b.shape[2]
    b, c = (y[:, 0].repeat_interleave(repeats, 1) for y in (b, c))
    state = decay[:, 0, :, None, None].exp() * state + x[:, 0].unsqueeze(-1) * b.unsqueeze(-2)
    return (state @ c.unsqueeze(-1)).squeeze(-1).unsqueeze(1), state


class Mamba2(nn.Module):
    """Formula: W_out rmsnorm(y * silu(z)), y_t = S_t C_t + D x_t, S_t = exp(-dt_t e^A_log) S_{t-1} + dt_t x_t B_t^T per head,
        where z, x, B, C, dt = W_in u, and then x, B, C = silu(conv(x, B, C)) and dt = softplus(dt + dt_bias)
    Source: Dao and Gu, arXiv 2405.21060; names and order of the parts as in Hugging Face's Mamba2.
    Shapes: [B, T, C] -> the same; in_proj fused as rows [z; x; B; C; dt] of I, I, G*N, G*N, H, where I = expand * C;
        state [B, H, I/H, N].
    Raises: ValueError where head_dim or norm_groups do not divide I, or the groups not the heads.

    The state is float32 under autocast. Generation keeps it and the convolution's last inputs, however many tokens were seen.
    """

    @dataclass(frozen=True)
    class Options(StepOptions):
        """Options of Mamba-2."""

        expand: int = opt(2, "Inner width as a multiple of n_embd.", ge=1)
        head_dim: int | None = opt(None, "Width of a head; null means the largest of 64, 32, 16 ... that fits.", ge=1)
        d_state: int = opt(64, "Numbers of state for each inner channel.", ge=1)
        groups: int = opt(1, "Groups of heads that share B and C.", ge=1)
        norm_groups: int = opt(1, "Groups of inner channels whose mean square the output's norm takes apart.", ge=1)
        proj_bias: bool = opt(False, "Whether in_proj and out_proj have a bias.")
        conv_bias: bool = opt(True, "Whether the convolution has a bias.")

    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter
    readers = ("in_proj",)  # the linears that read this module's input

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        c, self.path, self.chunk = site.config, site.path, options.chunk
        self.inner, self.state, self.groups = options.expand * c.n_embd, options.d_state, options.groups
        self.width = options.head_dim or math.gcd(self.inner, 64)
        self.heads, rest = divmod(self.inner, self.width)
        if rest:
            raise ValueError(f"head_dim {self.width} does not divide the inner width {self.inner}, expand * n_embd")
        if self.heads % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.heads} heads of width {self.width}")
        self.norm_groups = options.norm_groups
        if self.inner % self.norm_groups:
            raise ValueError(
                f"norm_groups {self.norm_groups} do not divide the inner width {self.inner}, expand * n_embd"
            )
        shared = self.groups * self.state
        mixed = (("x", self.inner), ("B", shared), ("C", shared))
        parts = (("z", self.inner), *mixed, ("dt", self.heads))
        rows = sum(n for _, n in parts)
        shape: dict[str, Any] = {"in_features": c.n_embd, "out_features": rows, "parts": parts}
        self.in_proj = site.make("linear", "in_proj", bias=options.proj_bias, **shape)
        self.conv1d = ShortConv(mixed, options.d_conv, options.conv_bias)
        declare_steps(self, self.heads, options)
        declare(self, "D", (self.heads,), Declaration(Layout(), "vector", ONES))
        self.norm = RMSNorm(RMSNorm.Options(eps=options.norm_eps), site.at("norm"), width=self.inner)
        shape = {"in_features": self.inner, "out_features": c.n_embd, "residual": True}
        self.out_proj = site.make("linear", "out_proj", bias=options.proj_bias, **shape)
        self.drop = Dropout(c.dropout, site.path)

    def forward(self, u: Tensor, cache: Cache | None = None) -> Tensor:
        past, state = cache.states.get(self.path, (None, None)) if cache is not None else (None, None)
        z, x, dt = self.in_proj(u).split((self.inner, self.inner + 2 * self.groups * self.state, self.heads), dim=-1)
        x, past = self.conv1d(x, past)
        y, state = self.mix(F.silu(x), dt, state)
        if cache is not None:
            cache.states[self.path] = (past, state)
        return self.drop(self.out_proj(self.normed(y * F.silu(z))))

    def normed(self, y: Tensor) -> Tensor:
        """The output's norm [B, T, I]; each group of channels by its own mean square, with one gain over all of them."""
        if self.norm_groups == 1:
            made: Tensor = self.norm(y)
            return made
        gain: Any = self.norm.weight
        apart = y.to(gain.dtype).unflatten(-1, (self.norm_groups, -1))
        return F.rms_norm(apart, apart.shape[-1:], None, self.norm.eps).flatten(-2) * gain

    def mix(self, x: Tensor, dt: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, B and C after the convolution [B, T, I + 2 G N], dt [B, T, H], the state before -> y [B, T, I], the state after."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            shared = self.groups * self.state
            x, b, c = x.to(wide).split((self.inner, shared, shared), dim=-1)
            x, b, c = (y.unflatten(-1, (n, -1)) for y, n in ((x, self.heads), (b, self.groups), (c, self.groups)))
            dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
            inputs = x * dt.unsqueeze(-1), -dt * self.A_log.to(wide).exp(), b, c
            if state is None:
                state = x.new_zeros(len(x), self.heads, self.width, self.state)
            y, state = step(*inputs, state) if x.shape[1] == 1 else scan(*inputs, state, self.chunk)
            return (y + self.D.to(wide).unsqueeze(-1) * x).flatten(2), state

    def flops_per_token(self, t: int) -> int:
        """Multiply-adds times two of convolution and scan, forward, for a context of `t` (without the linears)."""
        seen, shared = min(self.chunk, t), self.groups * self.state
        conv = self.conv1d.size * (self.inner + 2 * shared)
        return 2 * (conv + seen * (shared + self.inner) + 2 * self.inner * self.state)
