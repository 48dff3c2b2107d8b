"""Adapters: what rules ask for, planned from the table, attached to linear maps from outside, and merged back into them.

An adapter belongs to one linear map and to some rows of its output. It is a module of the catalogue's kind `lora`, made as
`Class(options, path, rows, columns, experts)`; `adapter(x, y, linear)` is what it adds to its rows of the output y,
`adapter.merged(weight)` those rows of the weight with it, `adapter.begin(weight)` is told them when training begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.addresses import ADAPTER, Labels, is_adapter, spelled
from core.layout import Range
from core.options import Catalogue, Mistake, Variant
from core.rules import Row
from core.weights import compare


@dataclass(frozen=True)
class Adapter:
    """An adapter to be made: at which linear map, under which name, for which rows of its output, of which experts."""

    linear: str
    name: str
    ranges: tuple[Range, ...]
    columns: int
    node: Variant
    experts: Labels = ()

    @property
    def rows(self) -> int:
        return sum(b - a for a, b in self.ranges)


def plan(model: nn.Module, rows: Sequence[Row]) -> tuple[list[Adapter], list[Mistake]]:
    """The adapters that a table asks for: one for each part that a bracket named, else one for all parts of a weight together.

    And every mistake: weights that cannot have one, ranks that exceed what they adapt.
    """
    asked: dict[str, list[Row]] = {}
    wrong: dict[Any, Mistake] = {}
    modules = dict(model.named_modules())
    for row in rows:
        if row.settings.lora is None or row.slice.declaration.role == "vector" or is_adapter(row.slice.parameter):
            continue
        why = _unfit(row, modules)
        if why:
            wrong.setdefault(_rule(row), Mistake(("slices", _rule(row), "lora"), why))
        else:
            asked.setdefault(row.slice.parameter, []).append(row)
    made = [adapter for parameter, some in asked.items() for adapter in _of_weight(parameter, some, wrong)]
    for name in {_rule(row) for row in rows if row.settings.lora is not None} - {
        _rule(row) for some in asked.values() for row in some
    }:
        wrong.setdefault(name, Mistake(("slices", name, "lora"), "none of what the rule matches is a linear map"))
    return made, list(wrong.values())


def _rule(row: Row) -> str:
    return row.settings.origins["lora"][-1]


def _unfit(row: Row, modules: dict[str, nn.Module]) -> str:
    """Why a weight can have no adapter, in a sentence; empty where it can."""
    part = row.slice
    owners = [modules[name.rpartition(".")[0]] for name in (part.parameter, *part.aliases)]
    if any(not hasattr(owner, "op") for owner in owners):
        tied = f", which is also {' and '.join(part.aliases)}," if part.aliases else ""
        return (
            f"{part.address}{tied} is looked up by an embedding, and an adapter needs the weight of linear maps alone"
        )
    return ""


def _of_weight(parameter: str, some: list[Row], wrong: dict[Any, Mistake]) -> Iterator[Adapter]:
    """The adapters of one weight. Slices that are numbers of one part (PKL) must all be asked for, alike."""
    what = some[0].slice.declaration
    numbers = max(1, len(what.summed))
    places: dict[Labels, list[Row]] = {}
    for row in some:
        places.setdefault(tuple(x for x in row.slice.labels if x not in what.summed), []).append(row)
    # By rule and part (all parts together where no bracket named one), by expert: the rows of the output.
    asked: dict[tuple[str, str, Variant], dict[Labels, list[Row]]] = {}
    for labels, alike in places.items():
        row = alike[0]
        if len(alike) != numbers or any(other.settings.lora != row.settings.lora for other in alike):
            text = (
                f"{row.slice.address} is one number of a weight that has {numbers}; an adapter is for all of them alike"
            )
            wrong.setdefault(_rule(row), Mistake(("slices", _rule(row), "lora"), text))
            continue
        assert row.settings.lora is not None
        experts, name = (labels[:-1], labels[-1]) if what.layout.parts else (labels, "")
        key = (_rule(row), "" if row.settings.lora_whole else name, row.settings.lora)
        asked.setdefault(key, {}).setdefault(experts, []).append(row)
    used: dict[str, int] = {}
    for (rule, part, node), by_expert in asked.items():
        alike_experts: dict[tuple[Range, ...], list[Labels]] = {}
        for experts, rows in by_expert.items():
            names = [row.slice.labels[-1] for row in rows] if what.layout.parts else []
            ranges = what.layout.ranges(*names) if names else [(0, rows[0].slice.shape[-2])]
            alike_experts.setdefault(tuple(ranges), []).append(experts)
        for found, covered in alike_experts.items():
            count = used[part] = used.get(part, 0) + 1
            module = f"{ADAPTER}{count if count > 1 else ''}{f'[{part}]' if part else ''}"
            stack = tuple(x for labels in covered for x in labels)
            made = Adapter(parameter.rpartition(".")[0], module, found, some[0].slice.shape[-1], node, stack)
            if node.options.rank > (smaller := min(made.rows, made.columns)):
                place = spelled(parameter, (part,) if part else ())[2]
                text = f"{node.options.rank} is more than {smaller}, the smaller side of {place}"
                wrong.setdefault(rule, Mistake(("slices", rule, "lora", "rank"), text))
            yield made


# Attached ------------------------------------------------------------------------------------------------------------------


class _Add(torch.autograd.Function):
    """y[..., rows] += change for each change, in place: nothing is done over the full width, in neither direction."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Sequence[Sequence[Range]], *changes: Tensor) -> Tensor:
        # y is not marked dirty: it is the linear map's own output, which nobody has saved, and autograd would copy all of a view.
        ctx.places = places
        for ranges, change in zip(places, changes, strict=True):
            start = 0
            for a, b in ranges:
                y[..., a:b].add_(change[..., start : start + b - a])
                start += b - a
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return (grad, None, *(take(grad, ranges, -1) for ranges in ctx.places))


def take(tensor: Tensor, ranges: Sequence[Range], dim: int) -> Tensor:
    """The rows of some ranges along `dim`: a view where there is one range."""
    some = [tensor.narrow(dim, a, b - a) for a, b in ranges]
    return some[0] if len(some) == 1 else torch.cat(some, dim)


def attach(model: nn.Module, adapters: Iterable[Adapter], catalogue: Catalogue) -> None:
    """Makes the planned adapters, empty as the model's own parameters are, below the linear maps they belong to."""
    for planned in adapters:
        linear = model.get_submodule(planned.linear)
        cls: Any = catalogue["lora"][planned.node.name]
        path = f"{planned.linear}.{planned.name}"
        adapter = cls(
            planned.node.options, path=path, rows=planned.rows, columns=planned.columns, experts=planned.experts
        )
        adapter.places = _places(linear, planned.experts)
        adapter.ranges = planned.ranges
        if not adapters_of(linear):
            linear.register_forward_hook(_adapt)
        linear.add_module(planned.name, adapter)


def _places(linear: Any, experts: Labels) -> list[int] | None:
    """Where the experts of an adapter stand among those of the map; None where it has all of them, or there are none."""
    every = [str(e) for e in range(getattr(linear, "experts", 0))]
    return None if list(experts) == every else [every.index(e) for e in experts]


def adapters_of(linear: nn.Module) -> list[Any]:
    """The adapters of a linear map, in the order in which they were attached."""
    return [module for name, module in linear.named_children() if _is_name(name)]


def _is_name(module: str) -> bool:
    return module.partition("[")[0].rstrip("0123456789") == ADAPTER


def adapted(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """Every linear map that has adapters, and these."""
    return [(module, found) for module in model.modules() if (found := adapters_of(module))]


def _adapt(linear: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    some = adapters_of(linear)
    changes = [adapter(args[0], y, linear, *args[1:]) for adapter in some]
    out: Tensor = _Add.apply(y, [adapter.ranges for adapter in some], *changes)
    return out


@torch.no_grad()
def begin(model: nn.Module) -> None:
    """Tells every adapter the weight that it begins with."""
    for linear, some in adapted(model):
        weight = linear.effective()
        for adapter in some:
            adapter.begin(take(weight, adapter.ranges, -2))


@torch.no_grad()
def effective(linear: Any) -> Tensor:
    """The weight that a linear map multiplies with, its adapters included."""
    weight: Tensor = linear.effective()
    some = adapters_of(linear)
    if not some:
        return weight
    made = weight.clone()
    for adapter in some:
        # What is made so far, not the weight: another adapter may have other experts of the same rows.
        new, start = adapter.merged(take(made, adapter.ranges, -2)), 0
        for a, b in adapter.ranges:
            made.narrow(-2, a, b - a).copy_(new.narrow(-2, start, b - a))
            start += b - a
    return made


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters by their addresses. Of several on one part, as for some experts each, all but the first keep
    their names in the model, which have a number."""
    made: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            address = spelled(name, ())[2]
            made[name if address in made else address] = parameter
    return made


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters by their addresses, such as `h.0.attn.qkv[q].lora_a`: what is saved alone."""
    return {address: p.detach().clone() for address, p in _adapters(model).items()}


@torch.no_grad()
def load_adapters(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Fills the adapters of a model. Raises ValueError that lists what is missing, left over, or of another shape."""
    own = _adapters(model)
    compare(own, saved, "adapters are")
    for address, parameter in own.items():
        parameter.copy_(saved[address])


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Puts every adapter into the weight it adapts and takes it away; outputs stay those of evaluation. Returns their addresses."""
    gone = []
    for path, linear in list(model.named_modules()):
        if not adapters_of(linear):
            continue
        whole: Any = linear
        whole.absorb(effective(linear))
        for name in [n for n, _ in linear.named_children() if _is_name(n)]:
            gone.append(f"{path}{name.removeprefix(ADAPTER)}")
            delattr(linear, name)
        hooks = linear._forward_hooks
        for key in [k for k, hook in hooks.items() if hook is _adapt]:
            del hooks[key]
    return gone
