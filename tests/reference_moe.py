"""A mixture of experts by hand: token by token, expert by expert. Imports nothing of the repository."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Told:
    """What the layer did: the experts of each token, best first, with their weights; and how many choices were dropped."""

    chosen: list[list[int]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)  # token and expert
    balance_loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    z_loss: Tensor = field(default_factory=lambda: torch.zeros(()))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mlp(
    x: Tensor, first: Tensor, first_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, gated: bool
) -> Tensor:
    """One MLP at one token x [C]: first [2F, C], gate above up, or [F, C]; down [C, F]. silu where gated, else gelu."""
    hidden = first @ x if first_bias is None else first @ x + first_bias
    if gated:
        half = len(hidden) // 2
        hidden = silu(hidden[:half]) * hidden[half:]
    else:
        hidden = gelu(hidden)
    return down @ hidden if down_bias is None else down @ hidden + down_bias


def scores_of(logits: Tensor, score: str) -> Tensor:
    if score == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    raised = torch.exp(logits - logits.detach().max())
    return raised / raised.sum()


def weights_of(logits: Tensor, chosen: list[int], score: str, normalise: str, renormalise: bool) -> list[Tensor]:
    if normalise == "after":
        raised = [torch.exp(logits[e]) for e in chosen]
        return [r / sum(raised[1:], raised[0]) for r in raised]
    made = [scores_of(logits, score)[e] for e in chosen]
    return [m / sum(made[1:], made[0]) for m in made] if renormalise else made


def moe(
    x: Tensor,
    p: Mapping[str, Tensor],
    *,
    top_k: int,
    gated: bool = True,
    score: str = "softmax",
    normalise: str = "before",
    renormalise: bool = True,
    capacity_factor: float | None = None,
) -> tuple[Tensor, Told]:
    """x [N, C] -> the same. p: router.weight [E, C]; first and down, each .weight and .bias, of the experts; the same under
    'shared.'; balance [E], which is added to scores for the choice."""
    router, told = p["router.weight"], Told()
    experts, rows = len(router), []
    logits = [router @ token for token in x]
    taken = [0] * experts
    most = None if capacity_factor is None else math.ceil(capacity_factor * len(x) * top_k / experts)
    for n, token in enumerate(x):
        scores = scores_of(logits[n], score).detach()
        ranked = (scores + p["balance"].detach() if "balance" in p else scores).tolist()
        chosen = sorted(range(experts), key=ranked.__getitem__, reverse=True)[:top_k]
        weights = weights_of(logits[n], chosen, score, normalise, renormalise)
        told.chosen.append(chosen)
        told.weights.append(weights)
        y = torch.zeros_like(token)
        for e, weight in zip(chosen, weights, strict=True):
            taken[e] += 1
            if most is not None and taken[e] > most:
                told.dropped.append((n, e))
                continue
            bias = [p[f"{name}.bias"][e] if f"{name}.bias" in p else None for name in ("first", "down")]
            y = y + weight * mlp(token, p["first.weight"][e], bias[0], p["down.weight"][e], bias[1], gated)
        if "shared.first.weight" in p:
            bias = [p.get(f"shared.{name}.bias") for name in ("first", "down")]
            y = y + mlp(token, p["shared.first.weight"], bias[0], p["shared.down.weight"], bias[1], gated)
        rows.append(y)
    told.balance_loss, told.z_loss = losses(logits, told.chosen, score)
    return torch.stack(rows), told


def losses(logits: list[Tensor], chosen: list[list[int]], score: str) -> tuple[Tensor, Tensor]:
    """E sum_e f_e P_e, f_e the share of all choices that e has and P_e the mean of its share of the scores; and the mean
    squared log of the sum of exponentials."""
    experts, tokens = len(logits[0]), len(logits)
    balance = torch.zeros_like(logits[0][0])
    for e in range(experts):
        f = sum(some.count(e) for some in chosen) / (tokens * len(chosen[0]))
        shares = [scores_of(row, score)[e] / scores_of(row, score).sum() for row in logits]
        balance = balance + experts * f * sum(shares[1:], shares[0]) / tokens
    squares = [torch.log(torch.exp(row).sum()) ** 2 for row in logits]
    return balance, sum(squares[1:], squares[0]) / tokens
