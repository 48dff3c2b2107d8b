"""A mixture of experts: many MLPs, of which a router chooses a few for each token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.options import Invalid, opt
from variations.dropout import Dropout
from variations.grouped import Rows, join
from variations.mlp.gated import GatedMLP
from variations.mlp.standard import MLP
from variations.site import Site


@dataclass(frozen=True)
class MoEOptions:
    """Options of the mixture of experts."""

    experts: int = opt(8, "Number of experts.", ge=1, le=10_000)
    top_k: int = opt(2, "Experts that each token is sent to.", ge=1)
    gated: bool = opt(True, "Whether an expert is a gated MLP.")
    expansion: float = opt(8 / 3, "Width of one expert as a multiple of n_embd.", gt=0.0)
    width: int | None = opt(
        None, "Width of one expert; null means expansion * n_embd, rounded to a multiple of 8.", ge=1
    )
    score: Literal["softmax", "sigmoid"] = opt("softmax", "What makes scores of the router's logits.")
    normalise: Literal["before", "after"] = opt("before", "Whether the softmax is taken before or after the choice.")
    renormalise: bool = opt(True, "Whether the weights of a token's experts are divided by their sum.")
    load_balance: float | None = opt(0.01, "Coefficient of the loss that evens the load; null means none.", gt=0.0)
    z_loss: float | None = opt(None, "Coefficient of the loss that keeps logits small; null means none.", gt=0.0)
    bias_rate: float | None = opt(
        None,
        "How far the bias of the choice moves in a training pass, in each accumulated one too; null means no bias.",
        gt=0.0,
    )
    capacity_factor: float | None = opt(
        None, "An expert's most tokens in training, as a multiple of an even load; null drops none.", gt=0.0
    )
    shared_experts: int = opt(0, "Experts that every token is sent to, as one MLP of their width together.", ge=0)

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise Invalid(("top_k", f"{self.top_k} is more than the {self.experts} experts that there are"))
        if self.score == "sigmoid" and self.normalise == "after":
            raise Invalid(("normalise", "'after' is about a softmax; a sigmoid's scores are divided by renormalise"))
        if self.top_k == 1 < self.experts and (self.renormalise or self.normalise == "after"):
            text = "the one weight of a token is then always 1, and the router learns nothing from the loss"
            advice = "set renormalise: false and normalise: before, or a larger top_k"
            raise Invalid(("top_k", f"{text}; {advice}"))


class MoE(nn.Module):
    """Formula: y = shared(x) + sum over the chosen e of g_e expert_e(x), expert(x) = W_down (act(W_gate x) * W_up x);
    s = softmax(W_router x) or sigmoid, chosen: the top_k of s + b, g = s / (sum of the chosen s)
    Source: Shazeer et al., arXiv 1701.06538; load_balance: Fedus et al., arXiv 2101.03961, eq. 4, over all top_k choices;
    z_loss: Zoph et al., arXiv 2202.08906, eq. 5; b: Wang et al., arXiv 2408.15664; sigmoid, shared: arXiv 2412.19437.
    Shapes: [B, T, C] -> the same; router [E, C]; gate_up [E, 2F, C], rows [gate; up] (or up [E, F, C]); down [E, C, F].
    Raises: Invalid where top_k exceeds the experts, or the router could not learn.

    The router computes in the precision of its weights, whatever autocast says. It is declared as an embedding: its rows belong to
    experts as a head's do to tokens, and each is to move as its own load says. Muon evens out the singular values of maps
    between features, and so leaves it to AdamW.
    Tokens over the capacity are dropped in order, in training alone: what a text becomes must not depend on its batch.
    """

    Options = MoEOptions
    separately = "tokens are sorted by expert, and the losses are means over a batch"  # in a fold of runs
    router: Any
    down: Any
    balance: Tensor
    auxiliary_loss: Tensor | None  # of the last training pass, coefficients included
    ranks: Any = None  # where processes share the rows of a batch: `gather(x)` is what each of them has

    def __init__(self, options: MoEOptions, site: Site) -> None:
        super().__init__()
        c, o = site.config, options
        self.options = o
        width = o.width or max(8, round(o.expansion * c.n_embd / 8) * 8)
        shape: dict[str, Any] = {"in_features": c.n_embd, "out_features": o.experts, "bias": False}
        self.router = site.make("linear", "router", role="embedding", **shape)
        parts = (("gate", width), ("up", width)) if o.gated else ()
        shape = {"in_features": c.n_embd, "out_features": 2 * width if o.gated else width, "experts": o.experts}
        self.first = "gate_up" if o.gated else "up"
        first = site.make("linear", self.first, parts=parts, **shape)
        self.add_module(self.first, first)
        self.act = site.make("activation", "act")
        shape = {"in_features": width, "out_features": c.n_embd, "experts": o.experts}
        self.down = site.make("linear", "down", residual=True, **shape)
        for linear in (first, self.down):
            linear.register_load_state_dict_pre_hook(join)
        self.shared: nn.Module | None = None
        self.readers: tuple[str, ...] = ("router", self.first)
        if o.shared_experts:
            cls: Any = GatedMLP if o.gated else MLP
            self.shared = cls(cls.Options(width=o.shared_experts * width), site.at("shared"))
            self.readers += (f"shared.{self.first}",)
        if o.bias_rate is not None:
            self.register_buffer("balance", torch.zeros(o.experts))  # in checkpoints: the choice depends on it
        self.moving = "" if o.bias_rate is None else f"the bias of {site.path} moves in every forward pass"
        self.drop = Dropout(c.dropout, site.path)
        self.auxiliary_loss = None
        self.statistics: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        o, tokens = self.options, x.flatten(0, -2)
        logits = self.logits(tokens)
        scores = logits.softmax(-1) if o.score == "softmax" else logits.sigmoid()
        chosen = self.choose(scores)
        gains = self.gains(logits if o.normalise == "after" else scores, chosen)
        # Sorted by expert, and within an expert by token: the same order whatever the threads.
        expert, order = chosen.flatten().sort(stable=True)
        place = torch.arange(len(order), device=x.device)
        inverse = torch.empty_like(order).scatter_(0, order, place)
        starts = torch.searchsorted(expert, torch.arange(o.experts + 1, device=x.device))
        counts, kept = starts.diff(), None
        load, size = counts, len(order)  # of the whole batch
        if self.training and self.ranks is not None:
            every = self.ranks.gather(counts)
            load, size = every.sum(0), len(order) * len(every)
            starts = starts[:-1] - every[: self.ranks.rank].sum(0)  # its rows stand after those of processes before
        if self.training and o.capacity_factor is not None:
            most = math.ceil(o.capacity_factor * size / o.experts)
            kept = (place - starts[expert] < most)[inverse].view_as(chosen)
            gains = gains * kept
        shared = self.shared(x) if self.shared is not None else None
        y = self.experts(Rows.apply(tokens, order, inverse, o.top_k), counts)
        y = Rows.apply(y, inverse, order, 1).unflatten(0, chosen.shape)
        y = self.drop((y * gains.to(y.dtype)[..., None]).sum(1).view_as(x))
        self.auxiliary_loss = self.observe(logits, scores, load, kept) if self.training else None
        return y if shared is None else y + shared

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            made: Tensor = self.router(tokens.to(self.router.weight.dtype))
        return made

    def choose(self, scores: Tensor) -> Tensor:
        """The experts of each token, [N, top_k], best first."""
        scores = scores.detach()
        if self.options.bias_rate is not None:
            scores = scores + self.balance
        return scores.topk(self.options.top_k, dim=-1).indices

    def gains(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """What the outputs of the chosen experts are multiplied by, [N, top_k]."""
        made = scores.gather(-1, chosen)
        if self.options.normalise == "after":
            return made.softmax(-1)
        return made / made.sum(-1, keepdim=True) if self.options.renormalise else made

    def experts(self, x: Tensor, counts: Tensor) -> Tensor:
        """Every expert over its own rows."""
        hidden = getattr(self, self.first)(x, counts)
        if self.options.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * up
        else:
            hidden = self.act(hidden)
        made: Tensor = self.down(hidden, counts)
        return made

    def observe(self, logits: Tensor, scores: Tensor, counts: Tensor, kept: Tensor | None) -> Tensor | None:
        """The auxiliary loss of a training pass. Notes statistics, and moves the bias where gradients are wanted."""
        o = self.options
        shares = counts.to(logits.dtype) / counts.sum()
        shown = scores / scores.sum(-1, keepdim=True)
        z = logits.logsumexp(-1).square().mean()
        losses = []
        if o.load_balance is not None:
            losses.append(o.load_balance * o.experts * (shares * shown.mean(0)).sum())
        if o.z_loss is not None:
            losses.append(o.z_loss * z)
        self.statistics = {
            "load_max": shares.max(),
            "load_min": shares.min(),
            "dropped": shares.new_zeros(()) if kept is None else 1 - kept.to(shares.dtype).mean(),
            "entropy": torch.special.entr(shown.detach()).sum(-1).mean(),
            "z": z.detach(),
        }
        if o.bias_rate is not None and torch.is_grad_enabled():
            self.balance += o.bias_rate * (counts.sum() - o.experts * counts).sign()
        return sum(losses[1:], losses[0]) if losses else None

    def flops_per_token(self, t: int) -> int:
        """Multiply-adds times two, forward, of the chosen experts but the first: the linears count as one expert."""
        linears: list[Any] = [self.get_submodule(self.first), self.down]
        return 2 * (self.options.top_k - 1) * sum(m.in_features * m.out_features for m in linears)

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss, whose graph has no copy."""
        return {**self.__dict__, "auxiliary_loss": None}
