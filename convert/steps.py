"""What can be done to weights on their way from one model's tensors to another's: small steps, each of which knows its inverse.

A step takes a list of tensors and gives another; `Chain` does one after another. Tensors without memory (meta) go through as
well, so shapes are known, and refused, before anything is read. Nothing changes its input; outputs may be views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from core.layout import Layout

Tensors = Sequence[Tensor]


class Unfit(ValueError):
    """Tensors that a step cannot take. The message has both shapes; who knows the weights' names puts them before it."""


class Step(Protocol):
    """Raises Unfit for tensors of another number or shape than it is for."""

    def __call__(self, tensors: Tensors) -> list[Tensor]: ...

    @property
    def inverse(self) -> Step: ...


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def one(tensors: Tensors, what: str) -> Tensor:
    """The only tensor. Raises Unfit where there are more or none."""
    if len(tensors) != 1:
        raise Unfit(f"{what} takes one tensor, and there are {len(tensors)}")
    return tensors[0]


@dataclass(frozen=True)
class Chain:
    """Steps one after another; without any, every tensor as it is."""

    steps: tuple[Step, ...] = ()

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        made = list(tensors)
        for step in self.steps:
            made = step(made)
        return made

    @property
    def inverse(self) -> Step:
        return Chain(tuple(step.inverse for step in reversed(self.steps)))


@dataclass(frozen=True)
class Each:
    """A step for every tensor by itself."""

    step: Step

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return [one(self.step([t]), "each tensor") for t in tensors]

    @property
    def inverse(self) -> Step:
        return Each(self.step.inverse)


# One tensor and several ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One tensor into parts of these sizes along a dimension, counted from the right."""

    dim: int
    sizes: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        whole = one(tensors, "a split")
        if whole.dim() < -self.dim or whole.shape[self.dim] != sum(self.sizes):
            told = " + ".join(map(str, self.sizes))
            raise Unfit(f"it is {shape(whole)}, and dimension {self.dim} should be {told} = {sum(self.sizes)}")
        return list(whole.split(self.sizes, self.dim))

    @property
    def inverse(self) -> Step:
        return Concatenate(self.dim, self.sizes)


@dataclass(frozen=True)
class Concatenate:
    """Tensors of these sizes along a dimension, counted from the right, into one."""

    dim: int
    sizes: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        if len(tensors) != len(self.sizes):
            raise Unfit(f"{len(self.sizes)} tensors are put together, and there are {len(tensors)}")
        rest = [s[: len(s) + self.dim] + s[len(s) + self.dim + 1 :] for s in map(shape, tensors)]
        for t, size, other in zip(tensors, self.sizes, rest, strict=True):
            if t.dim() < -self.dim or t.shape[self.dim] != size or other != rest[0]:
                wanted = [*rest[0][: len(rest[0]) + self.dim + 1], size, *rest[0][len(rest[0]) + self.dim + 1 :]]
                raise Unfit(f"it is {shape(t)}, not {wanted}")
        return [torch.cat(list(tensors), self.dim)]

    @property
    def inverse(self) -> Step:
        return Split(self.dim, self.sizes)


@dataclass(frozen=True)
class Parts:
    """A weight of several parts into these, in the order of its layout, the groups of each part together."""

    layout: Layout

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return list(_fits(lambda whole: self.layout.split(whole), one(tensors, "a layout")).values())

    @property
    def inverse(self) -> Step:
        return Join(self.layout)


@dataclass(frozen=True)
class Join:
    """The parts of a weight, in the order of its layout, into one."""

    layout: Layout

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        labels = self.layout.labels()
        if len(tensors) != len(labels):
            raise Unfit(f"{len(labels)} parts are put together, and there are {len(tensors)}")
        try:
            return [self.layout.join(dict(zip(labels, tensors, strict=True)))]
        except ValueError as error:
            raise Unfit(str(error)) from None

    @property
    def inverse(self) -> Step:
        return Parts(self.layout)


@dataclass(frozen=True)
class Stack:
    """So many tensors of one shape into one with a new first axis."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        if len(tensors) != self.count:
            raise Unfit(f"{self.count} tensors are stacked, and there are {len(tensors)}")
        for t in tensors:
            if t.shape != tensors[0].shape:
                raise Unfit(f"it is {shape(t)}, not {shape(tensors[0])} as the first of those it is stacked with")
        return [torch.stack(list(tensors))]

    @property
    def inverse(self) -> Step:
        return Unstack(self.count)


@dataclass(frozen=True)
class Unstack:
    """One tensor into those along its first axis."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        whole = one(tensors, "a stack")
        if whole.dim() == 0 or len(whole) != self.count:
            raise Unfit(f"it is {shape(whole)}, not a stack of {self.count}")
        return list(whole.unbind(0))

    @property
    def inverse(self) -> Step:
        return Stack(self.count)


@dataclass(frozen=True)
class Copies:
    """One tensor for so many places that hold it alike."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return [one(tensors, "a copy")] * self.count

    @property
    def inverse(self) -> Step:
        return Agree(self.count)


@dataclass(frozen=True)
class Agree:
    """The one tensor that so many places hold. Raises Unfit where they do not hold the same."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        if len(tensors) != self.count:
            raise Unfit(f"{self.count} copies are compared, and there are {len(tensors)}")
        first = tensors[0]
        for i, t in enumerate(tensors):
            if t.shape != first.shape:
                raise Unfit(f"copy {i} is {shape(t)}, not {shape(first)}")
            if not t.is_meta and not torch.equal(t, first):
                raise Unfit(f"copy {i} differs from the first in {int((t != first).sum())} of {t.numel()} values")
        return [first]

    @property
    def inverse(self) -> Step:
        return Copies(self.count)


@dataclass(frozen=True)
class Transposed:
    """Tensors for places counted one way round for another: `rows` lists of `columns` into `columns` lists of `rows`."""

    rows: int
    columns: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        if len(tensors) != self.rows * self.columns:
            raise Unfit(f"{self.rows} x {self.columns} tensors change places, and there are {len(tensors)}")
        return [tensors[r * self.columns + c] for c in range(self.columns) for r in range(self.rows)]

    @property
    def inverse(self) -> Step:
        return Transposed(self.columns, self.rows)


@dataclass(frozen=True)
class Batched:
    """The tensors in lists of `size`, each list through a step of its own."""

    size: int
    step: Step
    out: int = 1  # tensors that the step makes of a list

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        if len(tensors) % self.size:
            raise Unfit(f"lists of {self.size} are made, and there are {len(tensors)} tensors")
        made = [self.step(tensors[i : i + self.size]) for i in range(0, len(tensors), self.size)]
        return [t for some in made for t in some]

    @property
    def inverse(self) -> Step:
        return Batched(self.out, self.step.inverse, self.size)


# One tensor ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relayout:
    """The parts of a weight from one order to another: interleaved by group, or one after another."""

    source: Layout
    target: Layout

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        parts = _fits(lambda whole: self.source.split(whole), one(tensors, "a layout"))
        return [self.target.join(parts)]

    @property
    def inverse(self) -> Step:
        return Relayout(self.target, self.source)


@dataclass(frozen=True)
class Permute:
    """The axes of a tensor in another order; dims[i] is the axis that becomes axis i."""

    dims: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = one(tensors, "a permutation")
        if t.dim() != len(self.dims):
            raise Unfit(f"it is {shape(t)}, and {len(self.dims)} axes are permuted")
        return [t.permute(self.dims)]

    @property
    def inverse(self) -> Step:
        return Permute(tuple(self.dims.index(i) for i in range(len(self.dims))))


TRANSPOSE = Permute((1, 0))


@dataclass(frozen=True)
class Reshape:
    """The same values in the same order in another shape."""

    source: tuple[int, ...]
    target: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = one(tensors, "a shape")
        if tuple(t.shape) != self.source:
            raise Unfit(f"it is {shape(t)}, not {list(self.source)}")
        return [t.reshape(self.target)]

    @property
    def inverse(self) -> Step:
        return Reshape(self.target, self.source)


@dataclass(frozen=True)
class Add:
    """A constant added: 1 for gains that are stored as their difference from it. The sum is rounded to the tensor's dtype."""

    value: float

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return [one(tensors, "a constant") + self.value]

    @property
    def inverse(self) -> Step:
        return Add(-self.value)


@dataclass(frozen=True)
class Pad:
    """A dimension, counted from the right, filled up with zeros from one size to a larger one."""

    dim: int
    size: int
    padded: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = one(tensors, "padding")
        if t.dim() < -self.dim or t.shape[self.dim] != self.size or self.padded < self.size:
            raise Unfit(f"it is {shape(t)}, and dimension {self.dim} should grow from {self.size} to {self.padded}")
        return [F.pad(t, (0, 0) * (-self.dim - 1) + (0, self.padded - self.size))]

    @property
    def inverse(self) -> Step:
        return Cut(self.dim, self.size, self.padded)


@dataclass(frozen=True)
class Cut:
    """A dimension cut back to what it was before it was filled up. What is cut off is lost: nothing refers to such rows."""

    dim: int
    size: int
    padded: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = one(tensors, "a cut")
        if t.dim() < -self.dim or t.shape[self.dim] != self.padded:
            raise Unfit(f"it is {shape(t)}, and dimension {self.dim} should be {self.padded}")
        return [t.narrow(self.dim, 0, self.size)]

    @property
    def inverse(self) -> Step:
        return Pad(self.dim, self.size, self.padded)


@dataclass(frozen=True)
class Numbers:
    """The weight that multiplies into the numbers it is a sum of: [a, b] of a + scale * b. All of it is a's, or each has a share.

    share: b's part of the sum. What is lost on the way back is how the sum was divided.
    """

    scale: float
    share: float = 0.0

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        whole = one(tensors, "a sum")
        b = whole * (self.share / self.scale) if self.share else torch.zeros_like(whole)
        return [torch.stack((whole - self.scale * b if self.share else whole, b))]

    @property
    def inverse(self) -> Step:
        return Sum(self.scale, self.share)


@dataclass(frozen=True)
class Sum:
    """a + scale * b of [a, b]."""

    scale: float
    share: float = 0.0

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        numbers = one(tensors, "a sum")
        if numbers.dim() == 0 or len(numbers) != 2:
            raise Unfit(f"it is {shape(numbers)}, not two numbers [2, ...]")
        return [numbers[0] + self.scale * numbers[1]]

    @property
    def inverse(self) -> Step:
        return Numbers(self.scale, self.share)


def _fits(act: object, whole: Tensor) -> dict[tuple[str, ...], Tensor]:
    try:
        made: dict[tuple[str, ...], Tensor] = act(whole)  # type: ignore[operator]
    except ValueError as error:
        raise Unfit(f"it is {shape(whole)}: {error}") from None
    return made
