"""Stacked layers: the blocks of a model with every weight stored once for all of them, as one parameter [L, ...].

The blocks stay the modules they are, with their paths, buffers and hooks. Their parameters are views of the stack's, made once.
Addresses, files and values are those of the unstacked model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.addresses import LAYER, SLASH
from core.slices import Declaration, declare


class Stack(nn.ModuleList):
    """Blocks whose parameters were taken out of them. Layers of two kinds make two stacks, in one of these."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__(blocks)
        self.members: dict[
            str, list[tuple[nn.Module, str]]
        ] = {}  # by a stack's parameter: each layer's module and name
        kinds: dict[Any, list[int]] = {}
        for i, block in enumerate(blocks):
            kinds.setdefault(_kind(block), []).append(i)
        for layers in kinds.values():
            every = [dict(_declared(self[i])) for i in layers]
            for path, (_, _, what) in every[0].items():
                name = SLASH.join((_span(layers), *path.split(".")))
                self.members[name] = [(found[path][0], found[path][1]) for found in every]
                shape = _parameter(*self.members[name][0]).shape
                labels = tuple(f"{LAYER}{i}" for i in layers)
                stacked = replace(what, layout=replace(what.layout, stack=(labels, *what.layout.stack)))
                declare(self, name, (len(layers), *shape), stacked)
        for owners in self.members.values():
            for module, name in owners:
                del module._parameters[name]
                module.__dict__[name] = None  # until it is shown
        self._register_state_dict_hook(_split)
        self._register_load_state_dict_pre_hook(_Join(self))
        self.show()

    def show(self) -> None:
        """Lets every block see its layer of each weight, as views of the parameters as they are now."""
        self.gathered = {name: _Gradients(self._parameters[name]) for name in self.members}  # type: ignore[arg-type]
        for name, gathered in self.gathered.items():
            self._set(name, gathered.layers)

    def layers(self) -> Iterator[nn.Module]:
        """The blocks, whose gradients are the stacked parameters' where these are to have one."""
        for name, gathered in self.gathered.items():
            if name in vars(self):  # of several runs at once
                self._set(name, vars(self)[name].unbind(0))
            else:
                gathered.follow()
        return iter(self)

    def _set(self, name: str, views: Iterable[Any]) -> None:
        for (module, leaf), view in zip(self.members[name], views, strict=True):
            module.__dict__[leaf] = view

    def _apply(self, fn: Any, recurse: bool = True) -> Stack:
        super()._apply(fn, recurse)  # to another device or dtype
        self.show()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.show()  # a copy's blocks see the copy's weights


def _declared(block: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, Declaration]]]:
    for path, module in block.named_modules():
        for name, what in module.__dict__.get("declarations", {}).items():
            if module._parameters.get(name) is not None:
                yield (f"{path}.{name}" if path else name), (module, name, what)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    made = module._parameters[name]
    assert made is not None
    return made


def _kind(block: nn.Module) -> Any:
    """What blocks that can be stacked agree in: their modules, and what each parameter is."""
    modules = tuple((path, type(module)) for path, module in block.named_modules())
    weights = tuple(
        (path, tuple(_parameter(module, name).shape), str(what.init), repr(replace(what, init=None)))  # type: ignore[arg-type]
        for path, (module, name, what) in _declared(block)
    )
    return modules, weights


def _span(layers: list[int]) -> str:
    """Layers in words that a parameter's name can have: 0-3, or 0,2,4."""
    whole = list(range(layers[0], layers[-1] + 1)) == layers
    return f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ",".join(map(str, layers))


class _Gradients:
    """The layers of a stacked parameter as leaves of their own, and the parameter's gradient, made of theirs.

    Autograd's own gradient of `unbind` is made when that of the last layer has come: it holds all of them twice, and reads from
    memory what has long left the caches. Here each is put in its place as it comes, into memory that is kept from step to step. A
    gradient is added to as autograd would, and is to be read before the next step begins.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.layers = [view.detach() for view in parameter.detach().unbind(0)]
        self.kept: Tensor | None = None
        self.unfilled: set[int] = set()

    def follow(self) -> None:
        """Trains the layers where the parameter trains."""
        if self.layers[0].requires_grad == self.parameter.requires_grad:
            return
        for i, layer in enumerate(self.layers):
            layer.requires_grad_(self.parameter.requires_grad)
            if not layer._post_accumulate_grad_hooks:
                layer.register_post_accumulate_grad_hook(partial(self._take, i))

    def _take(self, i: int, layer: Tensor) -> None:
        grad, layer.grad = layer.grad, None
        assert grad is not None
        if self.parameter.grad is None:
            if self.kept is None:
                self.kept = torch.empty_like(self.parameter)
            self.parameter.grad = self.kept
            self.unfilled = set(range(len(self.layers)))
            torch.autograd.Variable._execution_engine.queue_callback(self._fill)
        place = self.parameter.grad[i]
        if i in self.unfilled:
            self.unfilled.remove(i)
            place.copy_(grad)
        else:
            place.add_(grad)

    def _fill(self) -> None:
        """At the end of a backward pass: nothing was said of these layers."""
        for i in self.unfilled:
            self.parameter.grad[i].zero_()  # type: ignore[index]
        self.unfilled = set()


# Files ---------------------------------------------------------------------------------------------------------------------


def spread(name: str, labels: tuple[str, ...]) -> list[str]:
    """The names that the layers of a stacked parameter have in the unstacked model; `labels` are those of its first axis."""
    before, _, rest = name.partition(SLASH)
    owner = before.rpartition(".")[0]
    dotted = rest.replace(SLASH, ".")
    return [f"{owner}.{label.removeprefix(LAYER)}.{dotted}" for label in labels]


def _labels(module: Stack, name: str) -> tuple[str, ...]:
    what: Declaration = module.__dict__["declarations"][name]
    return what.layout.stack[0]


def _split(module: Stack, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Writes each layer's tensors under its own name, as views of the stack."""
    for name in module.members:
        whole = state.pop(prefix + name)
        state.update(zip(spread(prefix + name, _labels(module, name)), whole.unbind(0), strict=True))


class _Join:
    """Reads tensors that have each layer's own names."""

    def __init__(self, module: Stack) -> None:
        self.module = module

    def __call__(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in self.module.members:
            names = spread(prefix + name, _labels(self.module, name))
            if all(n in state for n in names):  # what is missing is told by its own name
                state[prefix + name] = torch.stack([state.pop(n) for n in names])
