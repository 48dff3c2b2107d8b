"""Layout: how named parts lie in one tensor. Index algebra alone; what the parts mean is declared elsewhere."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from core.addresses import Labels

Range = tuple[int, int]  # half-open


@dataclass(frozen=True)
class Layout:
    """Named parts along dimension `dim` (counted from the right), repeated `groups` times, under labelled leading stack axes.

    parts: (name, rows per group) in their order; empty means one nameless part. stack: the labels of each leading axis.
    Raises ValueError for sizes below 1, names that repeat or that an address could not spell, a dimension that is not negative.
    """

    parts: tuple[tuple[str, int], ...] = ()
    dim: int = -1
    groups: int = 1
    stack: tuple[Labels, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        labels = [*names, *itertools.chain(*self.stack)]
        for label in {x for x in labels if labels.count(x) > 1}:
            raise ValueError(f"the name '{label}' stands twice in one layout")
        for label in labels:
            if not re.fullmatch(r"\w+", label):
                raise ValueError(f"the name {label!r} in a layout is not made of letters, digits and '_'")
        if not all(self.stack):
            raise ValueError(f"a stack axis of a layout has no labels: {self.stack}")
        for name, size in self.parts:
            if size < 1:
                raise ValueError(f"part '{name}' has {size} rows; it needs at least 1")
        if self.dim >= 0 or self.groups < 1:
            raise ValueError(f"a layout counts dimensions from the right and has at least one group: {self}")

    @property
    def span(self) -> int:
        """Rows of one group: the sum of its parts."""
        return sum(size for _, size in self.parts)

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError, naming the part, where the layout does not cover `shape` exactly."""
        if any(size < 1 for size in shape):
            raise ValueError(f"a weight of shape {tuple(shape)} has no elements")
        axes = tuple(len(labels) for labels in self.stack)
        if tuple(shape[: len(axes)]) != axes or len(shape) - len(axes) < -self.dim:
            raise ValueError(f"stack axes {axes} and dimension {self.dim} do not fit the shape {tuple(shape)}")
        if self.parts and shape[self.dim] != self.groups * self.span:
            sizes = " + ".join(f"{name} {size}" for name, size in self.parts)
            told = f"the parts ({sizes}) x {self.groups} do not add up to {shape[self.dim]}"
            raise ValueError(f"{told}: {self._culprit(shape[self.dim])}")

    def _culprit(self, size: int) -> str:
        """Which part is where the rows do not suffice, or what is left over."""
        row = 0
        for group in range(self.groups):
            for name, rows in self.parts:
                if row + rows > size:
                    where = f" of group {group}" if self.groups > 1 else ""
                    return f"part '{name}'{where} would end at row {row + rows}"
                row += rows
        return f"rows {row} to {size} after part '{self.parts[-1][0]}' belong to none"

    def labels(self) -> list[Labels]:
        """The labels of every slice, stack axes first, in the order in which they lie."""
        names: list[Labels] = [(name,) for name, _ in self.parts] or [()]
        return [(*outer, *inner) for outer in itertools.product(*self.stack) for inner in names]

    def view(self, tensor: Tensor, labels: Labels) -> Tensor:
        """The slice as a view. With several groups the dimension becomes two: [groups, rows per group]."""
        for axis, label in zip(self.stack, labels, strict=False):
            tensor = tensor[axis.index(label)]
        if not self.parts:
            return tensor
        start, size = self._place(labels[-1])
        if self.groups == 1:
            return tensor.narrow(self.dim, start, size)
        dim = tensor.dim() + self.dim
        return tensor.unflatten(dim, (self.groups, self.span)).narrow(dim + 1, start, size)

    def _place(self, name: str) -> tuple[int, int]:
        """Where a part begins in its group, and its rows."""
        start = 0
        for part, size in self.parts:
            if part == name:
                return start, size
            start += size
        raise KeyError(name)

    def shape(self, shape: Sequence[int], labels: Labels) -> tuple[int, ...]:
        """The logical shape of a slice: the stack axes gone, all groups of its part together."""
        inner = list(shape[len(self.stack) :])
        if self.parts:
            inner[self.dim] = self.groups * self._place(labels[-1])[1]
        return tuple(inner)

    def split(self, tensor: Tensor) -> dict[Labels, Tensor]:
        """Every slice in its logical shape: views where one group makes that possible, copies elsewhere."""
        self.check(tensor.shape)
        return {x: self.view(tensor, x).reshape(self.shape(tensor.shape, x)) for x in self.labels()}

    def join(self, slices: dict[Labels, Tensor]) -> Tensor:
        """The inverse of `split`. Raises ValueError for slices that are missing, left over or of another shape."""
        if set(slices) != set(self.labels()):
            raise ValueError(f"{sorted(slices)} are not the slices of this layout, which are {sorted(self.labels())}")
        first = next(iter(slices.values()))
        inner = list(first.shape)
        if self.parts:
            inner[self.dim] = self.groups * self.span
        whole = first.new_empty((*(len(axis) for axis in self.stack), *inner))
        for x, values in slices.items():
            if values.shape != self.shape(whole.shape, x):
                told = f"slice '{'.'.join(x)}' is {list(values.shape)}, not {list(self.shape(whole.shape, x))}"
                raise ValueError(f"{told}: it does not fit beside the others")
            view = self.view(whole, x)
            view.copy_(values.reshape(view.shape))
        return whole

    def ranges(self, *names: str) -> list[Range]:
        """The rows of some parts along `dim`, neighbours merged. Raises KeyError for a name that is no part."""
        places = [self._place(name) for name in names]
        rows = [(g * self.span + a, g * self.span + a + n) for g in range(self.groups) for a, n in places]
        return merged(rows)

    def runs(self, shape: Sequence[int], labels: Labels) -> list[Range] | None:
        """The elements of a slice in a contiguous tensor of `shape`, as ranges in its memory.

        None where the slice is not made of whole rows: its dimension is not the first after the stack axes.
        """
        depth = len(self.stack)
        if self.parts and len(shape) + self.dim != depth:
            return None
        inner, index = math.prod(shape[depth:]), 0
        for axis, label in zip(self.stack, labels, strict=False):
            index = index * len(axis) + axis.index(label)
        start = index * inner
        if not self.parts:
            return [(start, start + inner)]
        row = inner // shape[self.dim]
        return [(start + a * row, start + b * row) for a, b in self.ranges(labels[-1])]


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that touch as one."""
    made: list[Range] = []
    for a, b in sorted(ranges):
        if made and made[-1][1] == a:
            made[-1] = (made[-1][0], b)
        else:
            made.append((a, b))
    return made


def relayout(tensor: Tensor, old: Layout, new: Layout) -> Tensor:
    """The same slices lying as another layout says: other groups, another order of parts or of labels.

    Raises ValueError where the two are not layouts of the same parts, or `old` does not fit the tensor.
    """
    names = [{name for name, _ in layout.parts} for layout in (old, new)]
    if old.dim != new.dim or names[0] != names[1] or {*old.labels()} != {*new.labels()}:
        ours, theirs = (sorted(".".join(x) for x in layout.labels()) for layout in (old, new))
        raise ValueError(
            f"two layouts of other parts: {ours} along dimension {old.dim}, {theirs} along dimension {new.dim}"
        )
    sizes = dict(new.parts)
    for name, size in old.parts:
        if size * old.groups != sizes[name] * new.groups:
            raise ValueError(f"part '{name}' has {size * old.groups} rows in one layout and {sizes[name] * new.groups}"
                             " in the other")  # fmt: skip
    return new.join(old.split(tensor))
