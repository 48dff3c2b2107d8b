"""How a weight lies on the processes that hold a model together: kinds of weights, as steps from the full one to everybody's shard.

A kind is a function, `(weight, count) -> Step`, from the full tensor to those of `count` tensor-parallel ranks. `shards` adds what
all kinds share: experts that are divided among ranks of their own, and ranks that hold the same. Shards are the same whether they
go to files or to processes. Which weight is of which kind is chosen in convert/choice.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from convert.base import Step, Tensors, Unfit
from convert.steps import (
    Batched,
    Chain,
    Copies,
    Join,
    Pad,
    Parts,
    Permute,
    Split,
    Transposed,
    Unstack,
)
from core.layout import Layout

# Ranks ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A rank's number among those of each way to divide a model."""

    pipeline: int
    tensor: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Sizes:
    """How many ranks share a model, in each way to divide it. Raises ValueError for sizes below 1.

    tensor: weights outside of experts; pipeline: layers; expert: a layer's experts; expert_tensor: an expert's weights, None as
    many as `tensor`. layers: how many each stage has, () evenly.

    Ranks are numbered as Megatron numbers them: the stage changes last, and inside a stage the tensor rank first; for experts the
    expert-tensor rank first, then the expert rank. A stage has as many ranks as both divisions need at least.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "expert", "expert_tensor"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} is {size}; as a number of ranks it is at least 1")
        if self.layers and (len(self.layers) != self.pipeline or min(self.layers) < 0):
            raise ValueError(
                f"layers {list(self.layers)} does not say for each of {self.pipeline} stages how many it has"
            )

    @property
    def within(self) -> int:
        """Ranks that share one expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def inner(self) -> int:
        """Ranks of one stage."""
        return math.lcm(self.tensor, self.expert * self.within)

    @property
    def count(self) -> int:
        return self.pipeline * self.inner

    def place(self, rank: int) -> Place:
        stage, i = divmod(rank, self.inner)
        return Place(stage, i % self.tensor, i // self.within % self.expert, i % self.within)


# What is known of a weight -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A full weight, as far as its kind needs to know it. Plain data.

    kind: a name in KINDS. layout: the dimension that is divided, and what is fused along it; every part is divided by itself. None
    is one part along the rows (of vectors, and for the kind `row`, the last dimension). units: of a part ('' is the only one), the
    rows that stay together, such as a head's. shared: parts of which several ranks may hold the same unit where there are more
    ranks than units, such as keys and values. experts: the axis from the right along which experts are stacked; expert: the number
    of the one whose weight it is, and of how many. multiple: rows of a vocabulary are filled up to a multiple of it on each rank.
    """

    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype = torch.float32
    layout: Layout | None = None
    units: Mapping[str, int] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    experts: int | None = None
    expert: tuple[int, int] | None = None
    multiple: int = 1

    @property
    def meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def along(self) -> Layout:
        """The layout that is divided."""
        if self.layout is not None:
            return self.layout
        return Layout(dim=-1 if self.kind == "row" or len(self.shape) < 2 else -2)


@dataclass(frozen=True)
class Beside:
    """Steps side by side: each takes its number of the tensors, and makes its number of others."""

    steps: tuple[Step, ...]
    takes: tuple[int, ...]
    makes: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[torch.Tensor]:
        if len(tensors) != sum(self.takes):
            raise Unfit(f"{sum(self.takes)} tensors are divided, and there are {len(tensors)}")
        made: list[torch.Tensor] = []
        start = 0
        for step, size in zip(self.steps, self.takes, strict=True):
            made += step(tensors[start : start + size])
            start += size
        return made

    @property
    def inverse(self) -> Step:
        return Beside(tuple(step.inverse for step in self.steps), self.makes, self.takes)


# Kinds ---------------------------------------------------------------------------------------------------------------------

Kind = Callable[[Weight, int], Step]


def replicated(weight: Weight, count: int) -> Step:
    """Every rank holds all of it."""
    return Copies(count)


def divided(weight: Weight, count: int) -> Step:
    """Every rank holds its share of each part, and in these the order is that of the whole.

    A layout of several groups is divided into whole groups. Raises Unfit where shares would not be equal, or not of whole units.
    """
    layout = weight.along()
    layout.check(weight.shape)
    rows, units = weight.shape[layout.dim], weight.units
    if count == 1:
        return Split(layout.dim, (rows,))
    if not layout.parts:
        return _shares(weight, "", rows, layout.dim, count)
    if layout.groups > 1 and layout.groups % count == 0:
        return Split(layout.dim, (rows // count,) * count)
    if layout.groups > 1 and (count % layout.groups or any(name not in units for name, _ in layout.parts)):
        raise Unfit(f"its {layout.groups} groups cannot be divided among {count} ranks as whole groups")
    names = [name for name, _ in layout.parts]
    steps = tuple(_shares(weight, name, size * layout.groups, layout.dim, count) for name, size in layout.parts)
    own = [(name, max(size * layout.groups // count, units.get(name, 1))) for name, size in layout.parts]
    shard = replace(layout, parts=tuple(own), groups=1)
    return Chain(
        (
            Parts(layout),
            Beside(steps, (1,) * len(names), (count,) * len(names)),
            Transposed(len(names), count),
            Batched(len(names), Join(shard)),
        )
    )


def _shares(weight: Weight, part: str, rows: int, dim: int, count: int) -> Step:
    """One part, [.., rows, ..], into everybody's share of it."""
    unit = weight.units.get(part, 1)
    units, rest = divmod(rows, unit)
    what = f"part '{part}'" if part else "it"
    if rest:
        raise Unfit(f"{what} has {rows} rows, which are not blocks of {unit}")
    if units % count == 0:
        return Split(dim, (rows // count,) * count)
    if part in weight.shared and count % units == 0:
        copies = count // units
        return Chain((Split(dim, (unit,) * units), Batched(1, Copies(copies), copies)))
    told = f"{units} blocks of {unit} rows" if unit > 1 else f"{rows} rows"
    either = ", nor share them evenly" if part in weight.shared else ""
    raise Unfit(f"{what} is {told}, of which {count} ranks cannot have equally many{either}")


def vocabulary(weight: Weight, count: int) -> Step:
    """Every rank holds equally many rows, those of the last filled up with zeros."""
    dim, each = weight.along().dim, weight.multiple * count
    rows = weight.shape[dim]
    padded = -(-rows // each) * each
    split = Split(dim, (padded // count,) * count)
    return split if padded == rows else Chain((Pad(dim, rows, padded), split))


KINDS: dict[str, Kind] = {
    "column": divided,  # of a linear map, the outputs
    "row": divided,  # the inputs
    "replicated": replicated,
    "vocabulary": vocabulary,
}


# A stage -------------------------------------------------------------------------------------------------------------------


def shards(weight: Weight, sizes: Sizes) -> Step:
    """The full tensor into that of each of the stage's ranks in order; of one expert's weight, of the ranks that own it.

    Raises Unfit where it cannot be divided.
    """
    if weight.kind not in KINDS:
        raise Unfit(f"there is no kind '{weight.kind}'; known are {', '.join(sorted(KINDS))}")
    kind, ranks = KINDS[weight.kind], len(owners(weight, sizes))
    if weight.experts is None:
        distinct = sizes.tensor if weight.expert is None else sizes.within
        return Chain((kind(weight, distinct), *_repeated(distinct, ranks // distinct)))
    experts = _even(weight.shape[weight.experts], sizes.expert)
    shape = list(weight.shape)
    shape[weight.experts] = experts
    own = kind(replace(weight, shape=tuple(shape), experts=None), sizes.within)
    distinct = sizes.expert * sizes.within
    among = Split(weight.experts, (experts,) * sizes.expert)
    return Chain((among, Batched(1, own, sizes.within), *_repeated(distinct, ranks // distinct)))


def owners(weight: Weight, sizes: Sizes) -> list[int]:
    """The ranks of a stage that hold something of a weight."""
    if weight.expert is None:
        return list(range(sizes.inner))
    number, count = weight.expert
    mine = number // _even(count, sizes.expert)
    return [i for i in range(sizes.inner) if sizes.place(i).expert == mine]


def _even(experts: int, ranks: int) -> int:
    if experts % ranks:
        raise Unfit(f"{experts} experts cannot be divided evenly among {ranks} expert-parallel ranks")
    return experts // ranks


def _repeated(count: int, times: int) -> list[Step]:
    """A list of tensors as often as ranks begin again from the first."""
    return [] if times == 1 else [Batched(1, Copies(times), times), Transposed(count, times)]


def unstacked(weight: Weight, sizes: Sizes) -> list[Step]:
    """What comes after `shards` where each rank's stack of experts becomes one tensor for each of its experts."""
    assert weight.experts is not None
    axis, depth = len(weight.shape) + weight.experts, len(weight.shape)
    own = weight.shape[weight.experts] // sizes.expert
    first = Permute((axis, *(i for i in range(depth) if i != axis)))
    return [Batched(1, Chain((first, Unstack(own)) if axis else (Unstack(own),)), own)]
