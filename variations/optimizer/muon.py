"""Muon for matrices, another optimizer for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.options import Invalid, Variant, opt, variant
from variations.optimizer.base import Entry, Group, Optimizer, OptimizerOptions, Settings

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # a quintic that is steep at 0 and keeps singular values near 1 (K. Jordan, 2024)


def orthogonalise(g: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrices to a batch [n, rows, cols], by Newton-Schulz iterations.

    Source: K. Jordan et al., Muon, 2024; Higham, Functions of Matrices. bfloat16 on CUDA, float32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


@dataclass(frozen=True)
class MuonOptions(OptimizerOptions):
    """Options of Muon."""

    learning_rate: float = opt(0.02, "Peak learning rate of matrices.", ge=0.0, knob=True)
    momentum: float = opt(0.95, "Decay of the averaged gradient.", ge=0.0, lt=1.0, knob=True)
    nesterov: bool = opt(True, "Whether the step looks ahead along the averaged gradient.")
    ns_steps: int = opt(5, "Newton-Schulz iterations.", ge=1, le=20)
    heads_apart: bool = opt(False, "Whether the heads of attention's matrices are matrices of their own.")
    rest: Variant = variant("optimizer", "adamw", "The optimizer of embeddings, the head and vectors.")

    def __post_init__(self) -> None:
        if self.rest.name == "muon":
            raise Invalid(("rest", "embeddings, the head and vectors need another optimizer than muon"))


class Muon(Optimizer):
    """Formula: m <- mu m + (1 - mu) g; w <- (1 - lr decay) w - lr sqrt(max(1, rows/cols)) orth(g + mu (m - g))
    Source: K. Jordan et al., Muon, 2024; Bernstein and Newhouse, arXiv 2409.20325.
    Shapes: [rows, cols]; each slice is a matrix of its own, with heads_apart each head of it.
    """

    Options = MuonOptions
    kinds = ("momentum",)
    roles = ("matrix",)
    takes = ("matrix", "embedding")
    apart = True

    @staticmethod
    def formula(  # type: ignore[override]
        s: Settings, w: Tensor, g: Tensor, momentum: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert s.entry is not None
        m = momentum.lerp(g, 1 - s.momentum)
        direction = g.lerp(m, s.momentum) if s.nesterov else m
        shape = (
            s.entry.shape if w[0].numel() == math.prod(s.entry.shape) else w.shape[1:]
        )  # of several ranks, the largest
        whole = direction.reshape(-1, *shape[-2:])  # every run's
        blocks = s.entry.covers[0].declaration.blocks if s.heads_apart and len(shape) == 2 else None
        parts = whole.split(blocks[1], blocks[0]) if blocks else (whole,)
        update = torch.cat([orthogonalise(x, s.ns_steps) for x in parts], blocks[0] if blocks else 0).view_as(w)
        rows, cols = parts[0].shape[-2:]
        update = update * (max(1.0, rows / cols) ** 0.5 if blocks else s.aspect.clamp(min=1.0).sqrt())
        return w * (1 - s.learning_rate * s.weight_decay) - s.learning_rate * update, {"momentum": m}

    def update_all(self, live: Sequence[tuple[Group, float]]) -> None:
        o: MuonOptions = self.options
        # By shape, every logical matrix of all groups: its place in its weight, its direction, its step.
        alike: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = {}
        for group, lr in live:
            params, momentum, grads = group.params, group.states["momentum"], group.grads
            torch._foreach_lerp_(momentum, grads, 1 - o.momentum)
            directions = torch._foreach_lerp(grads, momentum, o.momentum) if o.nesterov else momentum
            if group.weight_decay:
                torch._foreach_mul_(params, 1 - lr * group.weight_decay)
            for entry, weight, direction in zip(group.entries, params, directions, strict=True):
                pairs = zip(*(self.matrices(entry, t) for t in (weight, direction)), strict=True)
                for place, matrix in pairs:
                    alike.setdefault(matrix.shape, []).append((place, matrix, lr))
        for (rows, cols), same in alike.items():
            updates = orthogonalise(torch.stack([matrix for _, matrix, _ in same]), o.ns_steps).unbind(0)
            for (place, _, rate), update in zip(same, updates, strict=True):
                place.add_(update, alpha=-rate * max(1.0, rows / cols) ** 0.5)

    def matrices(self, entry: Entry, tensor: Tensor) -> tuple[Tensor, ...]:
        """The logical matrices of an entry's tensor, as views."""
        whole, blocks = tensor.view(entry.shape), entry.covers[0].declaration.blocks
        if whole.dim() > 2:  # leading axes without labels
            return whole.flatten(0, -3).unbind(0)
        return whole.split(blocks[1], blocks[0]) if self.options.heads_apart and blocks else (whole,)
