"""What can be done to weights on their way from one model's tensors to another's: small steps, each of which knows its inverse.

A step takes a list of tensors and gives another; `Chain` does one after another. Tensors without memory (meta) go through as
well, so shapes are known, and refused, before anything is read. Nothing changes its input; outputs may be views of it.
Dimensions that are numbers of one axis count from the right, so that they mean the same for one expert and for a stack of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.base import Paired, Step, Tensors, Unfit, alike, joined, one, shape, sized, stacked
from core.layout import Layout, relayout
from variations.pkl import effective

__all__ = ["Step", "Tensors", "Unfit", "one", "shape"]  # of the base, for those who use steps
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


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
class Split(Paired):
    """One tensor into parts of these sizes along a dimension, counted from the right."""

    dim: int
    sizes: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        total = sum(self.sizes)
        told = f"be {' + '.join(map(str, self.sizes))} = {total}"
        return list(sized(one(tensors, "a split"), self.dim, total, told).split(self.sizes, self.dim))


@dataclass(frozen=True)
class Concatenate(Paired):
    """Tensors of these sizes along a dimension, counted from the right, into one."""

    dim: int
    sizes: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        parts = alike(tensors, len(self.sizes), "tensors are put together", shaped=False)
        for t, size in zip(parts, self.sizes, strict=True):
            wanted = shape(sized(parts[0], self.dim, self.sizes[0], f"be {self.sizes[0]}"))
            wanted[self.dim] = size
            if shape(t) != wanted:
                raise Unfit(f"it is {shape(t)}, not {wanted}")
        return [joined(parts, self.dim)]


@dataclass(frozen=True)
class Parts(Paired):
    """A weight of several parts into these, in the order of its layout, the groups of each part together."""

    layout: Layout

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        whole = one(tensors, "a layout")
        try:
            return list(self.layout.split(whole).values())
        except ValueError as error:
            raise Unfit(f"it is {shape(whole)}: {error}") from None


@dataclass(frozen=True)
class Join(Paired):
    """The parts of a weight, in the order of its layout, into one."""

    layout: Layout

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        labels = self.layout.labels()
        parts = alike(tensors, len(labels), "parts are put together", shaped=False)
        if self.layout.parts and parts[0].dim() < -self.layout.dim:
            raise Unfit(f"a part is {shape(parts[0])}, which has no dimension {self.layout.dim}")
        try:
            return [self.layout.join(dict(zip(labels, parts, strict=True)))]
        except ValueError as error:
            raise Unfit(str(error)) from None


@dataclass(frozen=True)
class Stack(Paired):
    """So many tensors of one shape into one with a new first axis."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return [stacked(alike(tensors, self.count, "tensors are stacked"))]


@dataclass(frozen=True)
class Unstack(Paired):
    """One tensor into those along its first axis."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        whole = one(tensors, "a stack")
        if whole.dim() == 0 or len(whole) != self.count:
            raise Unfit(f"it is {shape(whole)}, not a stack of {self.count}")
        return list(whole.unbind(0))


@dataclass(frozen=True)
class Copies(Paired):
    """One tensor for so many places that hold it alike."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return [one(tensors, "a copy")] * self.count


@dataclass(frozen=True)
class Agree(Paired):
    """The one tensor that so many places hold, compared bit for bit. Raises Unfit where they do not hold the same."""

    count: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        first = alike(tensors, self.count, "copies are compared")[0]
        for i, t in enumerate(tensors):
            # As integers: what is not a number agrees with itself, and there are dtypes that cannot be compared.
            ours, theirs = (x.contiguous().view(BITS[x.element_size()]) for x in (first, t))
            if not t.is_meta and not torch.equal(ours, theirs):
                raise Unfit(f"copy {i} differs from the first in {int((ours != theirs).sum())} of {t.numel()} values")
        return [first]


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
        if any(len(some) != self.out for some in made):
            raise Unfit(f"{self.out} tensors should be made of each list, and there are {[len(some) for some in made]}")
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
        whole = one(tensors, "a layout")
        try:
            return [relayout(whole, self.source, self.target)]
        except ValueError as error:
            raise Unfit(f"it is {shape(whole)}: {error}") from None

    @property
    def inverse(self) -> Step:
        return Relayout(self.target, self.source)


@dataclass(frozen=True)
class Permute:
    """The axes of a tensor in another order; dims[i] is the axis that becomes axis i."""

    dims: tuple[int, ...]

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = one(tensors, "a permutation")
        if sorted(self.dims) != list(range(t.dim())):
            raise Unfit(f"it is {shape(t)}, and {self.dims} is not an order of its axes")
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
        if tuple(t.shape) != self.source or t.numel() != math.prod(self.target) or min(self.target, default=0) < 0:
            raise Unfit(f"it is {shape(t)}, and {list(self.source)} should become {list(self.target)}")
        return [t.reshape(self.target)]

    @property
    def inverse(self) -> Step:
        return Reshape(self.target, self.source)


@dataclass(frozen=True)
class Add:
    """A constant added: 1 for gains that are stored as their difference from it. The sum is rounded to the tensor's dtype."""

    value: float

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = one(tensors, "a constant")
        return [t.new_empty(t.shape) if t.is_meta else t + self.value]

    @property
    def inverse(self) -> Step:
        return Add(-self.value)


@dataclass(frozen=True)
class Pad(Paired):
    """A dimension, counted from the right, filled up with zeros from one size to a larger one."""

    dim: int
    size: int
    padded: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = sized(one(tensors, "padding"), self.dim, self.size, f"grow from {self.size} to {self.padded}")
        if self.padded < self.size:
            raise Unfit(f"it is {shape(t)}, and {self.size} cannot grow to {self.padded}")
        return [F.pad(t, (0, 0) * (-self.dim - 1) + (0, self.padded - self.size))]


@dataclass(frozen=True)
class Cut(Paired):
    """A dimension cut back to what it was before it was filled up. What is cut off is lost: nothing refers to such rows."""

    dim: int
    size: int
    padded: int

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        t = sized(one(tensors, "a cut"), self.dim, self.padded, f"be {self.padded}, of which {self.size} stay")
        if self.padded < self.size:
            raise Unfit(f"it is {shape(t)}, and {self.size} of {self.padded} cannot stay")
        return [t.narrow(self.dim, 0, self.size)]


@dataclass(frozen=True)
class Numbers(Paired):
    """The weight that multiplies into the numbers it is a sum of: [a, b] of a + scale * b. All of it is a's, or each has a share.

    share: b's part of the sum. What is lost on the way back is how the sum was divided.
    """

    scale: float
    share: float = 0.0

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        whole = one(tensors, "a sum")
        if self.share and not self.scale:
            raise Unfit(f"b is multiplied by 0, so its share of the sum cannot be {self.share}")
        b = whole * (self.share / self.scale) if self.share else torch.zeros_like(whole)
        a = effective(stacked((whole, b)), _number(-self.scale, whole)) if self.share else whole
        return [stacked((a, b))]


@dataclass(frozen=True)
class Sum(Paired):
    """a + scale * b of [a, b], rounded as the model does it."""

    scale: float
    share: float = 0.0

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        numbers = one(tensors, "a sum")
        if numbers.dim() == 0 or len(numbers) != 2:
            raise Unfit(f"it is {shape(numbers)}, not two numbers [2, ...]")
        return [effective(numbers, _number(self.scale, numbers))]


def _number(scale: float, beside: Tensor) -> Tensor:
    """A scale as a model has it: of torch's usual dtype, whatever the weights' is."""
    return torch.tensor(scale, device=beside.device)


Split.partner, Concatenate.partner = Concatenate, Split
Parts.partner, Join.partner = Join, Parts
Stack.partner, Unstack.partner = Unstack, Stack
Copies.partner, Agree.partner = Agree, Copies
Pad.partner, Cut.partner = Cut, Pad
Numbers.partner, Sum.partner = Sum, Numbers
