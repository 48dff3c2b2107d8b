"""One update of all runs of a fold: optimizers as formulas over [R, ...], with a table of settings by run and slice on the device.

Nothing is read by the host, so that a step can be captured as a CUDA graph or compiled. Elements move as under the solo
optimizers up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from core.options import Variant
from core.rules import Row
from core.runs import Fold, part
from engine.loop import Run
from engine.optim import Optimizers
from variations.optimizer import OPTIMIZERS
from variations.optimizer.base import Entry, Settings


@dataclass
class Share:
    """Elements [R, ...] of one parameter that have one row of settings in every run."""

    optimizer: str
    entry: Entry  # of the first run: what is taken of a parameter, and which slices these are
    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    fixed: Any  # the first run's options: what is no number is the same in all
    numbers: dict[str, int] = field(default_factory=dict)  # the table's column of each setting


class Table:
    """The optimizers of all runs. Raises ValueError with a sentence where these cannot be updated together."""

    def __init__(self, fold: Fold, runs: Sequence[Run]) -> None:
        self.fold, self.runs = fold, list(runs)
        self.device = runs[0].device
        for stack in fold.stacks.values():
            stack.grad = torch.zeros_like(stack)
        self.wholes: dict[tuple[str, str, str], Tensor] = {}  # state of every run by optimizer, kind and parameter
        columns: list[list[float]] = []
        self.shares = [self._share(entry, columns) for entry in self._entries()]
        self.table = torch.tensor(columns, device=self.device).view(-1, len(runs))  # [settings, R]
        self.steps = torch.zeros(len(self.shares), len(runs), device=self.device)
        self.limit = torch.tensor([run.config.train.grad_clip or float("inf") for run in runs], device=self.device)
        self.load()

    # Settings ---------------------------------------------------------------------------------------------------------------

    def _entries(self) -> list[Entry]:
        """The first run's entries, cut so finely that each has one setting in every run."""
        rows = [[row for row in run.optimizers.rows if not row.settings.frozen] for run in self.runs]
        alike = {tuple(row.slice.address for row in some) for some in rows}
        if len(alike) > 1:
            raise ValueError("the runs train other slices")
        keys: dict[str, Any] = {}
        for same in zip(*rows, strict=True):
            names = {row.settings.optimizer.name for row in same}
            for name in names:
                if why := getattr(OPTIMIZERS[name], "solo", "" if len(names) == 1 else "optimizers differ"):
                    raise ValueError(why)
            keys[same[0].slice.address] = [_numbers(row) for row in same]
        made = []
        for entry in self.runs[0].optimizers.entries(lambda row: keys[row.slice.address]):
            name = entry.covers[0].parameter
            if all(run.optimizers.parameters[name].shape == entry.parameter.shape for run in self.runs):
                made.append(entry)
            else:  # filled up in some run: rows and elements are counted otherwise there, names are not
                made += [replace(entry, take=one.view, covers=(one,)) for one in entry.covers]
        return made

    def _share(self, entry: Entry, columns: list[list[float]]) -> Share:
        name = entry.covers[0].parameter
        stack = self.fold.stacks[name]
        rows = [_row(run.optimizers, entry.covers[0].address) for run in self.runs]
        optimizer = rows[0].settings.optimizer.name
        take = torch.vmap(entry.take)
        assert stack.grad is not None
        share = Share(optimizer, entry, take(stack.data), take(stack.grad), {}, rows[0].settings.optimizer.options)
        for kind in OPTIMIZERS[optimizer].kinds:  # type: ignore[attr-defined]
            key = (optimizer, kind, name)
            if key not in self.wholes:
                self.wholes[key] = torch.zeros_like(stack.data)
            share.state[kind] = take(self.wholes[key])
        every = [_numbers(row) | {"aspect": _aspect(run, entry)} for run, row in zip(self.runs, rows, strict=True)]
        for setting in every[0]:
            share.numbers[setting] = len(columns)
            columns.append([each[setting] for each in every])
        return share

    # State ------------------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Takes the state that each run's own optimizers have."""
        for r, run in enumerate(self.runs):
            steps: dict[str, int] = {}
            whole: dict[tuple[str, str, str], Tensor] = {}
            for optimizer, entry in run.optimizers.held():
                for kind, tensor in entry.state.items():
                    key = (optimizer, kind, entry.covers[0].parameter)
                    entry.take(whole.setdefault(key, torch.zeros_like(entry.parameter.detach()))).copy_(tensor)
                steps |= {slice_.address: entry.steps for slice_ in entry.covers}
            for key, tensor in whole.items():
                part(self.wholes[key][r], tensor.shape).copy_(tensor)
            for i, share in enumerate(self.shares):
                self.steps[i, r] = steps[share.entry.covers[0].address]

    def save(self, r: int) -> None:
        """Gives a run's own optimizers its state."""
        counts = self.steps[:, r].tolist()
        steps = {s.address: int(n) for share, n in zip(self.shares, counts, strict=True) for s in share.entry.covers}
        for optimizer, entry in self.runs[r].optimizers.held():
            for kind, tensor in entry.state.items():
                whole = self.wholes[optimizer, kind, entry.covers[0].parameter][r]
                tensor.copy_(entry.take(part(whole, entry.parameter.shape).contiguous()))
            entry.steps = steps[entry.covers[0].address]

    # Steps ------------------------------------------------------------------------------------------------------------------

    def step(self, factors: Tensor, due: Tensor) -> Tensor:
        """One update, learning rates times `factors` [R], of the runs that are `due` [R, bool]. Returns the gradient's norms."""
        runs = len(self.runs)
        squares = [share.grad.reshape(runs, -1).square().sum(1) for share in self.shares]
        norms = torch.stack(squares).sum(0).sqrt()
        clip = (self.limit / (norms + 1e-6)).clamp(max=1.0)
        self.steps += due
        for i, share in enumerate(self.shares):
            self._update(share, self.steps[i], factors, clip, due)
        return norms

    def _update(self, share: Share, steps: Tensor, factors: Tensor, clip: Tensor, due: Tensor) -> None:
        w = share.weight

        def shown(value: Tensor) -> Tensor:
            return value.view(-1, *(1,) * (w.dim() - 1))

        numbers = {name: shown(self.table[column]) for name, column in share.numbers.items()}
        numbers["learning_rate"] = numbers["learning_rate"] * shown(factors)
        settings = Settings(shown(steps), numbers, share.fixed, share.entry)
        new, state = OPTIMIZERS[share.optimizer].formula(settings, w, share.grad * shown(clip), **share.state)  # type: ignore[attr-defined]
        moving = shown(due)
        w.copy_(torch.where(moving, new, w))
        for kind, tensor in state.items():
            share.state[kind].copy_(torch.where(moving, tensor, share.state[kind]))

    def forget(self, due: Tensor) -> None:
        """Lets the gradients of runs that were updated begin anew."""
        for stack in self.fold.stacks.values():
            assert stack.grad is not None
            stack.grad.copy_(torch.where(due.view(-1, *(1,) * (stack.dim() - 1)), 0.0, stack.grad))


def _row(optimizers: Optimizers, address: str) -> Row:
    return next(row for row in optimizers.rows if row.slice.address == address)


def _numbers(row: Row) -> dict[str, float]:
    """Every number by which the update of a slice may differ between runs; tuples one by one."""
    node: Variant = row.settings.optimizer
    made: dict[str, float] = {}
    for name, value in vars(node.options).items():
        if isinstance(value, tuple):
            made |= {f"{name}{i}": float(x) for i, x in enumerate(value)}
        elif isinstance(value, float):
            made[name] = value
    return made | {"learning_rate": row.learning_rate, "weight_decay": row.settings.weight_decay}


def _aspect(run: Run, entry: Entry) -> float:
    """Rows to columns of a slice in this run, in which padded ranks do not count."""
    part = next(row.slice for row in run.optimizers.rows if row.slice.address == entry.covers[0].address)
    return part.shape[-2] / part.shape[-1] if len(part.shape) > 1 else 1.0
