"""Runs folded into one model: parameters [R, ...], activations [R * B, ...] of R runs one after another.

A module's code stays what it is for one run: its parameters and knobs are replaced by `Folded` tensors. Modules whose computation
mixes the rows of a batch say so (`separately`) and compute one run after another.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.folded import Batch, Folded
from core.stack import Stack

ALIGNED = 64  # elements: where parameters begin in one tensor of all of them


class Fold:
    """Models of one kind, folded: `self.model(x)` computes all of them for activations of their rows one after another.

    Each model keeps its own parameters and buffers as views of the folded ones; of what is frozen and the same in all of them
    there is one. Where shapes differ (adapters of several ranks) the smaller are filled up with zeros.
    """

    def __init__(self, models: Sequence[nn.Module], exact: bool = True) -> None:
        self.batch = Batch(len(models), exact)
        self.models = list(models)
        self.model: Any = None
        self.stacks: dict[str, nn.Parameter] = {}  # by the first name of what trains
        self.members: dict[str, list[Any]] = {}  # and each model's own
        self.knobs: dict[str, Tensor] = {}  # by name: buffers of every run
        self.moving: list[str] = []  # those of them that are in checkpoints
        self.shared: dict[str, nn.Parameter] = {}  # by name: frozen and the same in every run
        self.fixed: dict[str, Tensor] = {}  # by name: buffers that are the same in every run
        self.owners: list[tuple[str, str]] = []  # every name of a knob, and its first
        self.sizes = sizes(models)
        with torch.no_grad():
            self.model = copy.deepcopy(models[0])
            self._parameters()
            self._buffers()
        self._show(range(len(models)))
        self.apart: dict[
            str, list[Any]
        ] = {}  # by path: every run's own module, of those that compute one run after another
        for path, module in self.model.named_modules():
            if getattr(module, "separately", None):
                self.apart[path] = own = [model.get_submodule(path) for model in models]
                module.forward = partial(_separately, module, own, self.batch)

    def _parameters(self) -> None:
        known: dict[int, Any] = {}
        for path, module in self.model.named_modules():
            for name, first in [(n, p) for n, p in module._parameters.items() if p is not None]:
                owners = [m.get_submodule(path) for m in self.models]
                if id(first) not in known:
                    every = [owner._parameters[name] for owner in owners]
                    known[id(first)] = self._fold(f"{path}.{name}", every)
                made = known[id(first)]
                if isinstance(made, Folded):
                    del module._parameters[name]
                    module.__dict__[name] = made
                else:
                    module._parameters[name] = made

    def _fold(self, name: str, every: Sequence[Any]) -> Any:
        """One folded parameter, or the one that all runs share."""
        alike = not any(p.requires_grad for p in every) and all(torch.equal(p, every[0]) for p in every)
        if alike:
            for p in every:
                p.data = every[0].data
            self.shared[name] = every[0]
            return every[0]
        stack = nn.Parameter(_stacked(every), requires_grad=any(p.requires_grad for p in every))
        self.stacks[name] = stack
        self.members[name] = list(every)
        return Folded(stack, self.batch)

    def _show(self, runs: Collection[int]) -> None:
        """Lets models see their parameters as they are now."""
        for name, stack in self.stacks.items():
            for r in runs:
                p = self.members[name][r]
                p.data = part(stack.data[r], p.shape)
        self._look(runs)

    def _look(self, runs: Collection[int]) -> None:
        for module in (m for r in runs for m in self.models[r].modules()):
            if isinstance(module, Stack):
                module.show()

    def let_go(self, runs: Collection[int]) -> None:
        """Gives models tensors of their own again, as those of a model alone."""
        for every in self.members.values():
            for r in runs:
                every[r].data = every[r].data.clone(memory_format=torch.contiguous_format)
        self._look(runs)

    def gather(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """Puts everything that trains, and its gradients, each into one tensor; and where each parameter lies in these."""
        places, end = {}, 0
        for name, stack in self.stacks.items():
            if stack.requires_grad:
                places[name] = slice(end, end + stack.numel())
                end = -(-places[name].stop // ALIGNED) * ALIGNED
        device = next(iter(self.stacks.values())).device
        values, gradients = torch.zeros(end, device=device), torch.zeros(end, device=device)
        for name, place in places.items():
            stack = self.stacks[name]
            values[place].view(stack.shape).copy_(stack.data)
            stack.data, stack.grad = values[place].view(stack.shape), gradients[place].view(stack.shape)
        self._show(range(len(self.models)))
        return values, gradients, places

    def misfit(self, model: nn.Module) -> str | None:
        """Why a model cannot take the place of one of these, or None where it can."""
        odd = _names(model) ^ _names(self.models[0])
        if odd:
            return f"not all have {min(odd)}"
        for name, stack in self.stacks.items():
            p = _tensor(model, name)
            if any(map(int.__gt__, p.shape, stack.shape[1:])) or (p.requires_grad and not stack.requires_grad):
                return f"{name} is larger than in any other, or trains where theirs does not"
        same = {**self.shared, **self.fixed}
        other = next((name for name, t in same.items() if not torch.equal(_tensor(model, name), t)), None)
        return None if other is None else f"{other} is the same in all others"

    @torch.no_grad()
    def put(self, r: int, model: nn.Module) -> None:
        """Lets a model that fits take the place of another, of which nothing is left. The folded tensors stay where they are."""
        for name, stack in self.stacks.items():
            p = _tensor(model, name)
            stack.data[r].zero_()
            part(stack.data[r], p.shape).copy_(p)
            self.members[name][r] = p
        for name, p in self.shared.items():
            _tensor(model, name).data = p.data
        for name, key in self.owners:
            owner, leaf = _place(model, name)
            if name == key:
                self.knobs[key][r].copy_(_tensor(model, name))
            owner._buffers[leaf] = self.knobs[key][r]
        for path, own in self.apart.items():
            new: Any = model.get_submodule(path)
            new.statistics = getattr(
                own[r], "statistics", {}
            )  # of a step that was captured these tensors are all there will be
            own[r] = new
        self.models[r] = model
        self.sizes |= sizes([model])
        self.forget(r)
        self._show([r])

    def forget(self, r: int) -> None:
        """Lets a run's gradient begin anew."""
        for stack in self.stacks.values():
            if stack.grad is not None:
                stack.grad[r].zero_()

    def _buffers(self) -> None:
        known: dict[int, str] = {}
        for path, module in self.model.named_modules():
            for name, first in [(n, b) for n, b in module._buffers.items() if b is not None]:
                owners = [m.get_submodule(path) for m in self.models]
                every = [owner._buffers[name] for owner in owners]
                fixed = first.dim() > 0 and name in module._non_persistent_buffers_set
                if fixed and all(torch.equal(b, first) for b in every):  # type: ignore[arg-type]
                    self.fixed[f"{path}.{name}"] = first
                    continue
                if id(first) not in known:
                    known[id(first)] = f"{path}.{name}"
                    self.knobs[f"{path}.{name}"] = torch.stack(every)  # type: ignore[arg-type]
                self.owners.append((f"{path}.{name}", known[id(first)]))
                stack = self.knobs[known[id(first)]]
                for owner, mine in zip(owners, stack, strict=True):
                    owner._buffers[name] = mine
                if name not in module._non_persistent_buffers_set:
                    self.moving.append(f"{path}.{name}")
                del module._buffers[name]
                module.__dict__[name] = Folded(stack, self.batch)

    def __call__(self, tokens: Tensor) -> Any:
        """What the model gives for tokens [R * B, T]."""
        self.batch.rows = len(tokens)
        assert fits(self.sizes, *tokens.shape), "the batch's size is also that of something else"
        return self.model(tokens)

    def gradients(self) -> None:
        """Lets each model's parameters have their part of the gradients."""
        for name, stack in self.stacks.items():
            parts = stack.grad.unbind(0) if stack.grad is not None else [None] * len(self.models)
            for p, own in zip(self.members[name], parts, strict=True):
                p.grad = None if own is None or not p.requires_grad else part(own, p.shape)


def sizes(models: Sequence[nn.Module]) -> set[int]:
    """Every dimension of every parameter and buffer."""
    return {n for model in models for t in (*model.parameters(), *model.buffers()) for n in t.shape}


def fits(known: Collection[int], rows: int, time: int) -> bool:
    """Whether activations of all runs, of tokens [rows, time], can be told from everything else by their first size."""
    return all(size % rows for size in (*known, time) if size)


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and the tensor's name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _tensor(model: nn.Module, name: str) -> Any:
    owner, leaf = _place(model, name)
    return owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]


def _stacked(every: Sequence[Tensor]) -> Tensor:
    """[R, ...] of tensors, zeros where one is smaller than the largest."""
    shape = [max(sizes) for sizes in zip(*(p.shape for p in every), strict=True)]
    made = every[0].new_zeros(len(every), *shape)
    for mine, p in zip(made, every, strict=True):
        part(mine, p.shape).copy_(p)
    return made


def part(whole: Tensor, shape: torch.Size) -> Tensor:
    """The first rows, columns, ... of a tensor."""
    return whole if whole.shape == shape else whole[tuple(slice(0, n) for n in shape)]


def _separately(module: Any, own: Sequence[Any], batch: Batch, *args: Any) -> Any:
    """A module's forward, one run after another, with each run's own tensors in place. What it measured goes to `own`, theirs."""
    places = [(m, n, v) for m in module.modules() for n, v in vars(m).items() if isinstance(v, Folded)]
    parts = [v.t.unbind(0) for _, _, v in places]
    given = [x.unflatten(0, (batch.runs, -1)).unbind(0) if batch.of(x) else (x,) * batch.runs for x in args]
    made: list[Tensor] = []
    noted: list[Any] = []
    try:
        for r in range(batch.runs):
            for (owner, name, _), part in zip(places, parts, strict=True):
                owner.__dict__[name] = part[r]
            made.append(type(module).forward(module, *(x[r] for x in given)))
            noted.append(getattr(module, "auxiliary_loss", None))
            own[r].statistics = getattr(module, "statistics", {})
    finally:
        for owner, name, value in places:
            owner.__dict__[name] = value
    if noted[0] is not None:
        module.auxiliary_loss = torch.stack(noted)
    return torch.cat(made)
