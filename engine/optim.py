"""From the table to updates: slices with equal settings grouped into views of their parameters, and the optimizers of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.addresses import SLASH
from core.layout import Range
from core.options import Variant, key_of
from core.rules import Row
from core.slices import Slice
from core.stack import spread
from variations.optimizer import OPTIMIZERS
from variations.optimizer.base import Entry, Group, Optimizer

Key = tuple[Any, ...]
LINE = 16  # elements: a fused kernel takes so many at a time on a CPU, or a divisor of it, and rounds those left over otherwise
NOT_HELD = -1  # the number of steps of a slice that an optimizer has no state of


class Optimizers:
    """All optimizers of a run: every trained slice is in exactly one entry of one group of one of them.

    Frozen slices have no state, do not move, and do not count in the gradient's norm; a parameter all of whose slices are
    frozen has no gradient.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row]) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.rows = list(rows)
        self.trained = [row for row in rows if not row.settings.frozen]
        alive = {row.slice.parameter for row in self.trained}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in alive)
        self.live = [p for name, p in self.parameters.items() if name in alive]
        self.members: dict[Key, Optimizer] = {}
        self._group({})

    # Groups -----------------------------------------------------------------------------------------------------------------

    def _group(self, steps: Mapping[str, int]) -> None:
        """Makes entries and groups. `steps`: by address, updates that a slice has had; slices with other counts stay apart."""
        chosen: dict[Key, dict[tuple[float, float], Group]] = {}
        nodes: dict[Key, Variant] = {}

        def settings(row: Row) -> Key:
            count = steps.get(row.slice.address, 0)
            return (_node_key(row), row.learning_rate, row.settings.weight_decay, count)

        for key, entry in self._entries(settings):
            node, rate, decay, entry.steps = key
            group = chosen.setdefault(node, {}).setdefault((rate, decay), Group([], rate, decay))
            group.entries.append(entry)
        for row in self.trained:
            nodes.setdefault(_node_key(row), row.settings.optimizer)
        self.members = {}
        for name, groups in chosen.items():
            node_of = nodes[name]
            self.members[name] = OPTIMIZERS[node_of.name](node_of.options, list(groups.values()))
        covered = sum(entry.view.numel() for _, entry in self.held())
        assert covered == sum(row.slice.numel for row in self.trained), "every trained element is in exactly one entry"

    def _entries(self, key_of_row: Callable[[Row], Any]) -> Iterator[tuple[Any, Entry]]:
        """Every entry with its key: neighbouring rows of a parameter with equal keys are one, unless the optimizer takes each
        slice as a matrix."""
        by_parameter: dict[str, list[Row]] = {}
        for row in self.trained:
            by_parameter.setdefault(row.slice.parameter, []).append(row)
        for name, rows in by_parameter.items():
            parameter = self.parameters[name]
            runs: list[tuple[Range, Key, list[Slice]]] = []
            for row in rows:
                part, node = row.slice, row.settings.optimizer
                key = key_of_row(row)
                places = part.declaration.layout.runs(parameter.shape, part.labels)
                alone = places is None or any((b - a) % LINE for a, b in places[:-1])
                if OPTIMIZERS[node.name].apart or alone:  # type: ignore[attr-defined]
                    yield key, Entry(parameter, part.view, (part,))
                else:
                    runs += [(place, key, [part]) for place in places or ()]
            for (a, b), key, parts in _merged(sorted(runs, key=lambda run: run[0])):
                width = parameter.numel() // len(parameter)
                if b - a == parameter.numel():
                    yield key, Entry(parameter, _whole, tuple(parts))
                elif a % width or b % width:
                    yield key, Entry(parameter, partial(_flat, a, b), tuple(parts))
                else:
                    yield key, Entry(parameter, partial(_rows, a // width, (b - a) // width), tuple(parts))

    def held(self) -> Iterator[tuple[str, Entry]]:
        """Every entry with its optimizer's name."""
        for key, member in self.members.items():
            for group in member.groups:
                for entry in group.entries:
                    yield key[0], entry

    # Steps ------------------------------------------------------------------------------------------------------------------

    def step(self, factor: float) -> None:
        """One update of everything, learning rates times `factor`."""
        for member in self.members.values():
            member.step(factor)

    def zero_grad(self) -> None:
        for parameter in self.live:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of all parameters of which a slice trains."""
        return [p.grad for p in self.live if p.grad is not None]

    def graded(self) -> list[Row]:
        """The trained slices whose parameter has a gradient."""
        return [row for row in self.trained if self.parameters[row.slice.parameter].grad is not None]

    def norms(self, of: Callable[[nn.Parameter], Tensor | None]) -> list[Tensor]:
        """The 2-norm of each trained slice of a tensor per parameter, in the order in which slices are listed: the same
        numbers, to the bit, whatever the rules. A slice of a parameter without that tensor has none."""
        whole = {name: of(self.parameters[name]) for name in dict.fromkeys(row.slice.parameter for row in self.trained)}
        taken = [row.slice.view(t) for row in self.trained if (t := whole[row.slice.parameter]) is not None]
        return list(torch._foreach_norm([t.contiguous() for t in taken]))

    # State ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """State as tensors that do not depend on how slices are grouped.

        'optimizer.kind/parameter' has the parameter's shape, with zeros where the optimizer has no part of it;
        'optimizer.kind/address' is state of another shape, of one slice; 'optimizer.steps/parameter' the updates of each
        slice, in the layout's order, -1 where another optimizer or none takes it.
        """
        made: dict[str, Tensor] = {}
        orders = self._orders()
        for name in self.parameters:
            made[f"steps/{name}"] = torch.full((len(orders[name]),), NOT_HELD)
        for optimizer, entry in self.held():
            name = entry.covers[0].parameter
            counts = made.setdefault(f"{optimizer}.steps/{name}", torch.full((len(orders[name]),), NOT_HELD))
            for part in entry.covers:
                counts[orders[name][part.address]] = made[f"steps/{name}"][orders[name][part.address]] = entry.steps
            for kind, tensor in entry.state.items():
                if tensor.shape != entry.view.shape:
                    made[f"{optimizer}.{kind}/{entry.covers[0].address}"] = tensor
                elif tensor.shape == entry.parameter.shape or tensor.numel() == entry.parameter.numel():
                    made[f"{optimizer}.{kind}/{name}"] = tensor.view(entry.parameter.shape)
                else:
                    key = f"{optimizer}.{kind}/{name}"
                    whole = made.setdefault(key, torch.zeros_like(entry.parameter.detach()).contiguous())
                    entry.take(whole).copy_(tensor)
        return _apart(made, self._stacks())

    def _stacks(self) -> dict[str, list[str]]:
        """By stacked parameter, the names of its layers in an unstacked model, by which they are saved."""
        first = {row.slice.parameter: row.slice.declaration.layout for row in self.rows if SLASH in row.slice.parameter}
        return {name: spread(name, layout.stack[0]) for name, layout in first.items()}

    def _orders(self) -> dict[str, dict[str, int]]:
        """By parameter, the place of each slice's address in its layout's order."""
        made: dict[str, dict[str, int]] = {}
        for row in self.rows:
            known = made.setdefault(row.slice.parameter, {})
            known[row.slice.address] = len(known)
        return made

    def settle(self) -> None:
        """Follows parameters whose data has moved."""
        self.load(self.state())

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from what `state` gave, also where rules have changed since.

        A slice that was frozen starts anew; one that is frozen now loses its state. Raises ValueError with a sentence for a
        slice whose state is another optimizer's, and for the state of another model.
        """
        saved = _together(saved, self._stacks())
        orders = self._orders()
        wanted = {f"steps/{name}": len(places) for name, places in orders.items()}
        found = {key: t.numel() for key, t in saved.items() if key.startswith("steps/")}
        if wanted != found:
            odd = sorted(key.removeprefix("steps/") for key, n in {*wanted.items()} ^ {*found.items()})
            told = ", ".join(dict.fromkeys(odd[:4]))
            raise ValueError(f"the optimizer state is of another model: it differs in {told}")
        steps = {}
        for row in self.trained:
            name, address = row.slice.parameter, row.slice.address
            index, optimizer = orders[name][address], row.settings.optimizer.name
            held = saved.get(f"{optimizer}.steps/{name}")
            count = NOT_HELD if held is None else int(held[index])
            if count == NOT_HELD and int(saved[f"steps/{name}"][index]) != NOT_HELD:
                others = [k.partition(".")[0] for k, t in saved.items()
                          if k.endswith(f".steps/{name}") and int(t[index]) != NOT_HELD]  # fmt: skip
                raise ValueError(f"{address} was trained by {others[0]} and is now to be trained by {optimizer}, "
                                 "which cannot continue from the other's state")  # fmt: skip
            steps[address] = max(count, 0)
        self._group(steps)
        known: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in saved.items():
            head, _, name = key.partition("/")
            optimizer, _, kind = head.partition(".")
            known.setdefault((optimizer, name), {})[kind] = tensor
        for optimizer, entry in self.held():
            if entry.steps:
                part = entry.covers[0]
                own, whole = (known.get((optimizer, name), {}) for name in (part.address, part.parameter))
                _restore(entry, whole, own)


def _restore(entry: Entry, whole: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Fills an entry's state from tensors of its parameter's shape or, of one slice, of a shape of their own."""
    name, shape = entry.covers[0].parameter, entry.parameter.shape
    for kind, state in entry.state.items():
        given = [entry.take(t.contiguous()) for t in (whole.get(kind),) if t is not None and t.shape == shape]
        given += [own[kind]] if kind in own else []
        fitting = [t for t in given if t.shape == state.shape]
        if not fitting:
            found = [list(t.shape) for t in (whole.get(kind), own.get(kind)) if t is not None]
            told = f"is {found[0]}, not {list(shape)}" if found else "is missing"
            raise ValueError(f"the optimizer state {kind} of {name} {told}")
        state.copy_(fitting[0])


def _apart(made: Mapping[str, Tensor], stacks: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """State with each layer of a stack under its own name; of what an optimizer does not hold there is nothing."""
    layered: dict[str, Tensor] = {}
    for key, tensor in made.items():
        head, _, name = key.partition("/")
        if name in stacks:
            each = tensor.view(len(stacks[name]), -1) if head.endswith("steps") else tensor
            layered |= {f"{head}/{n}": t for n, t in zip(stacks[name], each.unbind(0), strict=True)}
        else:
            layered[key] = tensor
    idle = {k.replace(".steps/", "./") for k, t in layered.items() if ".steps/" in k and bool((t == NOT_HELD).all())}
    return {k: t for k, t in layered.items() if "." not in k.partition("/")[0] or _owner(k) not in idle}


def _owner(key: str) -> str:
    """'adamw./h.0.attn.qkv.weight' of any state of that parameter."""
    head, _, name = key.partition("/")
    return f"{head.partition('.')[0]}./{name}"


def _together(saved: Mapping[str, Tensor], stacks: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """The inverse of `_apart`, also for a state that was saved without stacks."""
    places = {n: (name, i) for name, names in stacks.items() for i, n in enumerate(names)}
    made: dict[str, Tensor] = {}
    layers: dict[str, dict[int, Tensor]] = {}
    for key, tensor in saved.items():
        head, _, name = key.partition("/")
        if name in places:
            stacked, i = places[name]
            layers.setdefault(f"{head}/{stacked}", {})[i] = tensor
        if name not in places or not head.endswith("steps"):
            made[key] = tensor  # also of a layer: it may be a slice's own state, of another shape
    for key, found in layers.items():
        head, _, name = key.partition("/")
        any_layer = next(iter(found.values()))
        empty = torch.full_like(any_layer, NOT_HELD) if head.endswith("steps") else torch.zeros_like(any_layer)
        each = [found.get(i, empty) for i in range(len(stacks[name]))]
        made[key] = torch.cat(each) if head.endswith("steps") else torch.stack(each)
    return made


def _node_key(row: Row) -> Key:
    """What slices of one optimizer agree in: all its options but those that rows have beside it."""
    node = row.settings.optimizer
    return (node.name, key_of(replace(node.options, learning_rate=0.0, weight_decay=0.0)))


def _flat(start: int, stop: int, tensor: Tensor) -> Tensor:
    """Elements of a tensor in the order of its memory."""
    return tensor.reshape(-1)[start:stop]


def _rows(first: int, count: int, tensor: Tensor) -> Tensor:
    """Whole rows of a tensor: one operation, of which a step takes hundreds."""
    return tensor.narrow(0, first, count)


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _merged(runs: Sequence[tuple[Range, Key, list[Slice]]]) -> list[tuple[Range, Key, list[Slice]]]:
    made: list[tuple[Range, Key, list[Slice]]] = []
    for (a, b), key, parts in runs:
        if made and made[-1][0][1] == a and made[-1][1] == key and (a - made[-1][0][0]) % LINE == 0:
            (first, _), _, before = made[-1]
            made[-1] = ((first, b), key, before + [part for part in parts if part not in before])
        else:
            made.append(((a, b), key, parts))
    return made
