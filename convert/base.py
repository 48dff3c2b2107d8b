"""What a step over tensors is, and what it says of tensors that it cannot take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


class Unfit(ValueError):
    """Tensors that a step cannot take. The message has both shapes; who knows the weights' names puts them before it."""


class Step(Protocol):
    """Raises Unfit for tensors of another number or shape than it is for."""

    def __call__(self, tensors: Tensors) -> list[Tensor]: ...

    @property
    def inverse(self) -> Step: ...


class Paired:
    """A step whose inverse is another one with the same fields. The pairs are made where both are known."""

    partner: ClassVar[Callable[..., Step]]

    @property
    def inverse(self) -> Step:
        own: Any = self
        return type(self).partner(*(getattr(own, each.name) for each in fields(own)))


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def one(tensors: Tensors, what: str) -> Tensor:
    """The only tensor. Raises Unfit where there are more or none."""
    if len(tensors) != 1:
        raise Unfit(f"{what} takes one tensor, and there are {len(tensors)}")
    return tensors[0]


def alike(tensors: Tensors, count: int, what: str, shaped: bool = True) -> list[Tensor]:
    """So many tensors of one shape and one dtype: of several, some would be rounded. Raises Unfit where they are not."""
    if len(tensors) != count:
        raise Unfit(f"{count} {what}, and there are {len(tensors)}")
    for i, t in enumerate(tensors if shaped else ()):
        if t.shape != tensors[0].shape:
            raise Unfit(f"{count} {what}, and of these number {i} is {shape(t)}, not {shape(tensors[0])} as the first")
    if len({t.dtype for t in tensors}) > 1:
        raise Unfit(f"{count} {what}, and they are {', '.join(str(t.dtype).removeprefix('torch.') for t in tensors)}")
    return list(tensors)


def joined(tensors: Tensors, dim: int) -> Tensor:
    """Tensors one after another along a dimension. Those without memory need no kernel of torch, whose first costs a second."""
    first = tensors[0]
    if not first.is_meta:
        return torch.cat(list(tensors), dim)
    made = shape(first)
    made[dim] = sum(t.shape[dim] for t in tensors)
    return first.new_empty(made)


def stacked(tensors: Tensors) -> Tensor:
    """Tensors of one shape along a new first axis."""
    return joined([t.unsqueeze(0) for t in tensors], 0)


def sized(tensor: Tensor, dim: int, size: int, told: str) -> Tensor:
    """The tensor, which has this size along a dimension. Raises Unfit where it has another or no such dimension."""
    if not -tensor.dim() <= dim < 0 or tensor.shape[dim] != size:
        raise Unfit(f"it is {shape(tensor)}, and dimension {dim} should {told}")
    return tensor
