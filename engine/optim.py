"""From declarations to updates: the table of every slice's settings, the groups that share them, and their optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.options import Variant
from core.slices import Slice, slices
from variations.optimizer import OPTIMIZERS
from variations.optimizer.base import Group, Optimizer


@dataclass(frozen=True)
class Row:
    """One slice and its resolved settings. `rules` names what set them; `node` is the optimizer that takes it."""

    slice: Slice
    node: Variant
    lr_scale: float
    weight_decay: float
    rules: tuple[str, ...]

    @property
    def learning_rate(self) -> float:
        rate: float = self.node.options.learning_rate
        return rate * self.lr_scale

    def shown(self) -> dict[str, Any]:
        """The row as `--slices --json` prints it."""
        part = self.slice
        return {
            "address": part.address,
            "shape": list(part.shape),
            "parameters": part.numel,
            "lr_scale": self.lr_scale,
            "weight_decay": self.weight_decay,
            "optimizer": self.node.name,
            "init": str(part.declaration.init),
            "lora": None,
            "frozen": False,
            "rules": list(self.rules),
        }


def table(model: nn.Module, optimizer: Variant) -> list[Row]:
    """A row per slice: the default treatment, with the name of each default that made a difference."""
    return [_row(part, optimizer) for part in slices(model)]


def _row(part: Slice, optimizer: Variant) -> Row:
    rules, what = [], part.declaration
    while what.role not in (OPTIMIZERS[optimizer.name].roles or (what.role,)):  # type: ignore[attr-defined]
        optimizer = optimizer.options.rest
        rules.append("default.rest")
    decay: float = optimizer.options.weight_decay
    if what.role == "vector" and decay:
        decay = 0.0
        rules.append("default.no_decay_on_vectors")
    if what.step != 1.0:
        rules.append("default.pkl_step")
    return Row(part, optimizer, what.step, decay, tuple(rules))


class Optimizers:
    """All optimizers of a run, one for each node of the table, over groups of whole parameters."""

    def __init__(self, model: nn.Module, optimizer: Variant) -> None:
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        settings: dict[str, Row] = {}
        for row in table(model, optimizer):
            first = settings.setdefault(row.slice.parameter, row)
            assert (
                first.node == row.node
                and first.learning_rate == row.learning_rate
                and first.weight_decay == row.weight_decay
            )
        assert set(settings) == set(parameters), "every parameter is in exactly one group"
        nodes: dict[Variant, dict[tuple[float, float], Group]] = {}
        for name, row in settings.items():
            groups = nodes.setdefault(row.node, {})
            key = (row.learning_rate, row.weight_decay)
            group = groups.setdefault(key, Group([], [], *key))
            group.layouts.append(row.slice.declaration.layout)
            group.names.append(name)
            group.params.append(parameters[name])
        self.members: list[Optimizer] = [OPTIMIZERS[n.name](n.options, list(g.values())) for n, g in nodes.items()]
        self.parameters = list(parameters.values())

    def step(self, factor: float) -> None:
        """One update of everything, learning rates times `factor`."""
        for member in self.members:
            member.step(factor)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """State tensors of all optimizers by kind and parameter name: names are unique, a parameter has one optimizer."""
        return {name: tensor for member in self.members for name, tensor in member.state().items()}

    def load(self, saved: dict[str, Tensor], steps: int) -> None:
        for member in self.members:
            member.load(saved, steps)
