"""What adapters add to rows of weights, put together for matrices that have other rows, and taken apart again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """What a product of A and B is multiplied by: alpha / rank, or alpha / sqrt(rank) with rslora."""

    alpha: float
    rank: int
    rslora: bool

    @property
    def value(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def of(self, rank: int, rslora: bool) -> Scale:
        """The same factor for another rank or another way to divide."""
        if rank == self.rank and rslora == self.rslora:
            return self
        if rslora or self.rslora:
            alpha = self.value * (rank**0.5 if rslora else rank)
            short = float(f"{alpha:.12g}")  # what was written by hand, before it went through a root
            return Scale(short if math.isclose(short, alpha, rel_tol=1e-15) else alpha, rank, rslora)
        return Scale(float(Fraction(str(self.alpha)) * rank / self.rank), rank, False)


@dataclass(frozen=True)
class Piece:
    """scale * B A, added to some rows.

    a [rank, in], b [rows, rank], rows: their numbers, int64 [rows]. magnitudes: of DoRA, [rows], None of LoRA.
    """

    a: Tensor
    b: Tensor
    rows: Tensor
    scale: Scale
    magnitudes: Tensor | None = None

    def of_rows(self, chosen: Tensor) -> Piece:
        """For the rows at these positions alone."""
        kept = None if self.magnitudes is None else self.magnitudes[chosen]
        return replace(self, b=self.b[chosen], rows=self.rows[chosen], magnitudes=kept)

    def of_ranks(self, chosen: Sequence[int]) -> Piece:
        """Of these rows of A and columns of B alone; the factor stays."""
        index = list(chosen)
        return replace(self, a=self.a[index], b=self.b[:, index], scale=self.scale.of(len(index), self.scale.rslora))


def shares(piece: Piece, rows: Tensor) -> list[int]:
    """Which of several matrices, whose rows are `rows` [E, out], have some rows of a piece."""
    known, order = rows.flatten().sort()
    at = torch.searchsorted(known, piece.rows).clamp(max=len(known) - 1)
    found: list[int] = (order[at[known[at] == piece.rows]] // rows.shape[1]).unique().tolist()
    return found


def joined(pieces: Sequence[Piece], rows: Tensor, rslora: bool) -> Piece:
    """All pieces as one for these rows, in their order: A one below another, B in blocks. Exact.

    Where factors differ, the first one's is that of all, and B is multiplied by the others' share of it. Pieces are taken in the
    order of the first row that they have here. Rows that none of them has stay as they are.
    """
    place = {int(row): at for at, row in enumerate(rows.tolist()) if row >= 0}
    at = [[place.get(row, -1) for row in piece.rows.tolist()] for piece in pieces]
    here = sorted((i for i in range(len(pieces)) if max(at[i]) >= 0), key=lambda i: min(x for x in at[i] if x >= 0))
    first, rank = pieces[here[0]], sum(len(pieces[i].a) for i in here)
    scale = first.scale.of(rank, rslora)
    b, column = first.b.new_zeros(len(rows), rank), 0
    for i in here:
        piece, index = pieces[i], torch.tensor(at[i])
        share = piece.scale.value / first.scale.value
        b[index[index >= 0], column : column + len(piece.a)] = piece.b[index >= 0] * share
        column += len(piece.a)
    return Piece(torch.cat([pieces[i].a for i in here]), b, rows, scale)


def blocks(piece: Piece, parts: Tensor) -> list[Piece]:
    """A piece taken apart where each rank serves one part alone, the parts given by a number for each row; else itself, without
    the parts that it adds nothing to. Of a piece that adds nothing, or whose rows are of one part, nothing is taken away.

    Ranks whose column in B is zero belong to the part of the rank before them, the first to that of the one behind.
    """
    served = [sorted(set(parts[column != 0].tolist())) for column in piece.b.unbind(1)]
    used = sorted({part for some in served for part in some})
    if not used or len(set(parts.tolist())) == 1:
        return [piece]
    if any(len(some) > 1 for some in served):
        return [piece.of_rows(_among(parts, used))]
    of_rank: list[int] = []
    for some in served:
        of_rank.append(some[0] if some else (of_rank[-1] if of_rank else -1))
    following = next(part for part in of_rank if part >= 0)
    of_rank = [following if part < 0 else part for part in of_rank]
    return [
        piece.of_ranks([r for r, other in enumerate(of_rank) if other == part]).of_rows(_among(parts, [part]))
        for part in used
    ]


def _among(parts: Tensor, some: Sequence[int]) -> Tensor:
    return torch.isin(parts, torch.tensor(some)).nonzero()[:, 0]
