"""What every optimizer is given and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from core.options import opt
from core.slices import Slice


@dataclass(frozen=True)
class OptimizerOptions:
    """Shared by all optimizers."""

    learning_rate: float = opt(1e-3, "Peak learning rate.", ge=0.0, knob=True)
    weight_decay: float = opt(0.1, "Weight decay of matrices and embeddings (vectors have none).", ge=0.0, knob=True)


@dataclass
class Entry:
    """Elements of one parameter that are updated together: rows of slices with equal settings, or one slice.

    take: the elements, as a view of the parameter or of any tensor shaped like it. covers: the slices, with the part of the taken
    elements that is theirs. steps: updates so far.
    """

    parameter: Tensor
    take: Callable[[Tensor], Tensor]
    covers: tuple[Slice, ...]
    steps: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.view = self.take(self.parameter.detach())
        self.dense = self.view.is_contiguous()
        self.place = self.view if self.dense else torch.empty_like(self.view, memory_format=torch.contiguous_format)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, of an entry that is one slice."""
        (part,) = self.covers
        return part.shape


@dataclass
class Group:
    """Entries that share settings. `learning_rate` is the peak, slice multipliers included. Entries are not changed later."""

    entries: list[Entry]
    learning_rate: float
    weight_decay: float
    grads: list[Tensor] = field(default_factory=list)  # of all entries, contiguous, during an update

    @cached_property
    def params(self) -> list[Tensor]:
        """What is updated, contiguous; fused kernels write wrong elements of strided views."""
        return [entry.place for entry in self.entries]

    @cached_property
    def states(self) -> dict[str, list[Tensor]]:
        """State by kind, in the order of the entries."""
        kinds = self.entries[0].state if self.entries else {}
        return {kind: [entry.state[kind] for entry in self.entries] for kind in kinds}


class Settings:
    """What `formula` is given beside tensors: numbers that broadcast with these, of which `betas` and the like are lists.

    steps: updates, this one included. entry: which slice this is, of an optimizer that takes each apart. Other options are those of
    the first run.
    """

    def __init__(self, steps: Tensor, numbers: Mapping[str, Tensor], options: Any, entry: Entry | None) -> None:
        self.steps, self.numbers, self.options, self.entry = steps, numbers, options, entry

    def __getattr__(self, name: str) -> Any:
        if name in self.numbers:
            return self.numbers[name]
        several = [value for key, value in self.numbers.items() if key.rstrip("0123456789") == name]
        return several or getattr(self.options, name)


class Optimizer:
    """Steps groups. Subclasses give `update` and `kinds`, the names of their state of the elements' shape, or else `fresh`.

    roles: those it takes by default (None: all); the rest goes to the optimizer in `options.rest`. takes: those it can take where
    a rule names it. apart: whether each slice is an entry of its own, in its logical shape, because the update of an element
    depends on the others. solo: why runs cannot be updated together on a GPU, where they cannot.
    """

    kinds: tuple[str, ...] = ()
    roles: tuple[str, ...] | None = None
    takes: tuple[str, ...] | None = None
    apart = False

    def __init__(self, options: Any, groups: Sequence[Group]) -> None:
        self.options, self.groups = options, list(groups)
        for group in self.groups:
            for entry in group.entries:
                entry.state = self.fresh(entry)

    def fresh(self, entry: Entry) -> dict[str, Tensor]:
        """The state of an entry before its first update."""
        return {kind: torch.zeros_like(entry.place) for kind in self.kinds}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with every learning rate multiplied by `factor`."""
        live: list[tuple[Group, float]] = []
        for group in self.groups:
            found = [entry.parameter.grad for entry in group.entries]
            if any(grad is None for grad in found):
                alive = [entry for entry, grad in zip(group.entries, found, strict=True) if grad is not None]
                group, found = replace(group, entries=alive), [grad for grad in found if grad is not None]
            taken = [entry.take(grad) for entry, grad in zip(group.entries, found, strict=True)]  # type: ignore[arg-type]
            group.grads = [grad if grad.is_contiguous() else grad.contiguous() for grad in taken]
            for entry in group.entries:
                entry.steps += 1
                if not entry.dense:
                    entry.place.copy_(entry.view)
            live += [(group, group.learning_rate * factor)] if group.entries else []
        self.update_all(live)
        for group, _ in live:
            group.grads = []  # not kept alive beside the next step's
            for entry in group.entries:
                if not entry.dense:
                    entry.view.copy_(entry.place)

    @staticmethod
    def formula(s: Settings, w: Tensor, g: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """New elements and state of many runs [R, ...], from the old ones and the gradients; state is given by its names."""
        raise NotImplementedError

    def update_all(self, live: Sequence[tuple[Group, float]]) -> None:
        """Moves the parameters of groups, all of which have gradients, each at its learning rate."""
        for group, lr in live:
            self.update(group, lr)

    def update(self, group: Group, lr: float) -> None:
        """Moves `group.params` by `group.grads`."""
        raise NotImplementedError
