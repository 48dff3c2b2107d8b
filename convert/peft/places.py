"""Which row of our weights each row of another model's weights is, found by asking the mapping: no layout is known here.

Every number of a weight is replaced by that of its row, and once more by that of its column; these go through the mapping, and what
comes out says where it is from. Rows have numbers of their own, all rows of all weights and experts one after another; adapters on
both sides are told apart by them alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.huggingface.family import Family
from convert.mapping import Mapped
from core.addresses import is_adapter
from core.slices import declared
from core.stack import Stack
from core.weights import weights
from model import GPT

WEIGHT = ".weight"
EXACT = 2**24  # whole numbers up to which float32 has


STACKED = (
    "layers.0.mlp.experts.gate_up_proj"  # a name that only models have whose experts are stacked, as they are in memory
)
# Last names of modules that PEFT takes for maps of single experts, or for routers, in models whose experts are stacked.
HIDDEN = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Place:
    """Where a matrix of theirs, or each of a stack, is from. Theirs[o, i] = ours[rows[o], columns[i]].

    rows: int64 [out], or [E, out] of a stack, numbers of our rows, -1 for one that was filled up. transposed: it is stored as
    [in, out]. columns: int64 [in].
    """

    rows: Tensor
    columns: Tensor
    transposed: bool


class Numbered:
    """Our weights as a source of numbers, which begin with 1: of rows, over all weights of one move, or of columns. 0 is left for
    what is filled up. Each weight is as large as in float32, which is exact up to 2^24 rows."""

    def __init__(self, model: GPT) -> None:
        if isinstance(model.h, Stack):
            raise ValueError("The layers of the model are stacked. Load it with model.stack_layers: false.")
        self.shapes = {name: tuple(t.shape) for name, t in weights(model).items() if not is_adapter(name)}
        for name, parameter, what in declared(model):
            if what.summed and name in self.shapes:  # the numbers that add up to one weight are one
                axis = what.layout.stack.index(what.summed)
                self.shapes[name] = (*parameter.shape[:axis], *parameter.shape[axis + 1 :])
        self.order = list(self.shapes)
        self.index = {name: i for i, name in enumerate(self.order)}
        rows = [math.prod(shape[:-1]) for shape in self.shapes.values()]
        self.first = torch.tensor([0, *itertools.accumulate(rows)])
        self.asked: dict[object, list[Place | None]] = {}  # with rows counted within their move
        self.starts: dict[str, int] | None = None  # of rows, where these are asked for

    def names(self) -> list[str]:
        return self.order

    def meta(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=torch.float32, device="meta")

    def get(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if self.starts is None:
            return torch.arange(1, shape[-1] + 1, dtype=torch.float32).expand(shape)
        start, rows = self.starts[name], math.prod(shape[:-1])
        return torch.arange(start + 1, start + rows + 1, dtype=torch.float32).view(*shape[:-1], 1).expand(shape)

    def weight_rows(self, name: str, expert: int | None = None) -> range:
        """The numbers of a weight's rows, or of one expert's."""
        at = self.index[name]
        every = range(int(self.first[at]), int(self.first[at + 1]))
        if expert is None:
            return every
        size = self.shapes[name][-2]
        return every[expert * size : (expert + 1) * size]

    def owners(self, rows: Tensor) -> list[str]:
        """The weights that rows are of, in our order."""
        found = torch.bucketize(rows[rows >= 0], self.first, right=True) - 1
        return [self.order[int(i)] for i in found.unique()]

    def places(self, mapped: Mapped, name: str) -> dict[str, Place | None]:
        """Where everything is from that a mapping makes together with a weight. Layers that one rule makes alike are asked once."""
        move = mapped.moves[name]
        spans = [self.weight_rows(own) for own in move.source]
        known = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        assert len(known) < EXACT, move
        alike = (id(move.step), *(self.shapes[own] for own in move.source))
        if alike not in self.asked:
            self.starts = dict(zip(move.source, itertools.accumulate(map(len, spans), initial=0), strict=False))
            rows = [mapped.get(other) for other in move.target]
            self.starts = None
            width = self.shapes[move.source[0]][-1]
            self.asked[alike] = [
                _place(r, mapped.get(other), width) for r, other in zip(rows, move.target, strict=True)
            ]
        return {
            other: None if at is None else replace(at, rows=torch.where(at.rows < 0, -1, known[at.rows]))
            for other, at in zip(move.target, self.asked[alike], strict=True)
        }


def _place(rows: Tensor, columns: Tensor, width: int) -> Place | None:
    """What numbers [..., a, b] of rows and of columns say; None where they are not whole rows with their columns in one order."""
    if rows.dim() not in (2, 3):
        return None
    for transposed in (False, True):
        r, c = (rows.mT, columns.mT) if transposed else (rows, columns)
        live = r[..., 0] > 0
        if r.shape[-1] != width or not live.any():
            continue
        order = c[live][0]
        one_row, one_order = (r == r[..., :1]).all(), ((c == order) | (r == 0)).all()
        if one_row and one_order and order.sort().values.equal(torch.arange(1, width + 1, dtype=order.dtype)):
            return Place(r[..., 0].long() - 1, order.long() - 1, transposed)
    return None


class Places:
    """The places of a family's weights, each found when it is asked for: of its files, and of the model in memory, where experts
    that are one by one in files may be stacked."""

    def __init__(self, model: GPT, family: Family) -> None:
        self.family, self.numbered = family.name, Numbered(model)
        self.files = Mapped(self.numbered, family.rules(model.config).inverse)
        self.rules = family.rules(model.config, [family.prefix + STACKED]).inverse  # of the model in memory
        self.memory = Mapped(self.numbered, self.rules)
        self.stacked = any(self.memory.meta(name).dim() == 3 for name in self.memory.names())
        self.found: dict[str, Place | None] = {}

    def names(self) -> list[str]:
        """All weights of the model in memory."""
        return self.memory.names()

    def known(self, name: str) -> bool:
        return name in self.memory.moves or name in self.files.moves

    def of(self, name: str) -> Place | None:
        """Where a weight of theirs is from; None where that is not a matter of rows."""
        if name not in self.found:
            mapped = self.memory if name in self.memory.moves else self.files
            self.found |= self.numbered.places(mapped, name)
        return self.found[name]

    def touching(self, own: Iterable[str]) -> Iterator[str]:
        """The weights in memory that are made of these weights of ours."""
        wanted = set(own)
        for name, move in self.memory.moves.items():
            if wanted & set(move.source):
                yield name

    def is_parameter(self, name: str) -> bool:
        """Whether PEFT has to be told a parameter, and not a module: of stacks, and where it would take the module for another."""
        path = name.removesuffix(WEIGHT)
        return path == name or (self.stacked and path.rpartition(".")[2] in HIDDEN)
