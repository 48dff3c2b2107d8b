"""One update of all runs of a fold: optimizers as formulas over [R, ...], with a table of settings by run and slice on the device.

Everything that trains lies in one tensor, so that an update is a few operations however many parameters there are; those that take
slices as matrices go through these. Nothing is read by the host: a step can be captured as a CUDA graph. Elements move as
under the solo optimizers up to rounding.
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
from variations.optimizer import OPTIMIZERS
from variations.optimizer.base import Entry, Settings


@dataclass
class Share:
    """Elements of one parameter that have one row of settings in every run."""

    rows: list[Row]  # of every run
    entry: Entry  # of the first run: what is taken of a parameter
    first: int  # the table's column of the first run; those of the others follow

    @property
    def optimizer(self) -> str:
        return self.rows[0].settings.optimizer.name


@dataclass
class Kind:
    """An optimizer that some slices have, in all runs. Options that are no numbers are those of the first."""

    optimizer: Any
    options: Any
    state: dict[str, Tensor]  # of every element
    columns: dict[str, Tensor] = field(default_factory=dict)  # settings by name, a number for each column of the table


class Table:
    """The optimizers of all runs. Raises ValueError with a sentence where these cannot be updated together."""

    def __init__(self, fold: Fold, runs: Sequence[Run]) -> None:
        self.fold, self.runs, self.count = fold, list(runs), len(runs)
        self.device = runs[0].device
        rows = self._rows()
        self.values, self.gradients, self.places = fold.gather()
        for run in runs:
            run.optimizers.settle()
        self.shares = self._shares(rows)
        self.kinds = self._kinds()
        self.column = torch.zeros(
            len(self.values), dtype=torch.int32, device=self.device
        )  # of each element; 0: it is at rest
        for share in self.shares:
            mine = share.first + torch.arange(self.count, dtype=torch.int32, device=self.device)
            taken = self._of(self.column, share)
            taken.copy_(_shown(mine, taken).expand_as(taken))
        self.steps = torch.zeros(1 + len(self.shares) * self.count, device=self.device)
        limits = [run.config.train.grad_clip or float("inf") for run in runs]
        self.limit = torch.tensor(limits, device=self.device)
        # One pass over memory instead of one for each operation.
        self.elements: Any = torch.compile(self._elements) if self.device.type == "cuda" else self._elements
        self.load()

    # Settings ---------------------------------------------------------------------------------------------------------------

    def _rows(self) -> dict[str, list[Row]]:
        """By address, the trained slice's settings in every run."""
        every = [{row.slice.address: row for row in run.optimizers.trained} for run in self.runs]
        if any(some.keys() != every[0].keys() for some in every):
            raise ValueError("the runs train other slices")
        made = {address: [some[address] for some in every] for address in every[0]}
        for address, rows in made.items():
            names = {row.settings.optimizer.name for row in rows}
            why = [getattr(OPTIMIZERS[name], "solo", None) for name in names]
            if len(names) > 1 or any(why):
                raise ValueError(f"{address}: " + (why[0] or "the runs have other optimizers there"))
        return made

    def _shares(self, rows: dict[str, list[Row]]) -> list[Share]:
        """The first run's entries, cut so finely that each has one row of settings in every run."""
        made = []
        keys = {address: [_numbers(row) for row in some] for address, some in rows.items()}
        for entry in self.runs[0].optimizers.entries(
            lambda row: (row.settings.optimizer.name, keys[row.slice.address])
        ):
            name = entry.covers[0].parameter
            shapes = {run.optimizers.parameters[name].shape for run in self.runs}
            # Where some run's is filled up, rows and elements are counted otherwise there; names are not.
            each = [entry] if len(shapes) == 1 else [replace(entry, take=s.view, covers=(s,)) for s in entry.covers]
            made += [(rows[one.covers[0].address], one) for one in each]
        return [Share(some, one, 1 + i * self.count) for i, (some, one) in enumerate(made)]

    def _kinds(self) -> dict[str, Kind]:
        made: dict[str, Kind] = {}
        for share in self.shares:
            optimizer: Any = OPTIMIZERS[share.optimizer]
            if share.optimizer not in made:
                state = {kind: torch.zeros_like(self.values) for kind in optimizer.kinds}
                made[share.optimizer] = Kind(optimizer, share.rows[0].settings.optimizer.options, state)
            columns = made[share.optimizer].columns
            for r, row in enumerate(share.rows):
                for name, value in _numbers(row).items():
                    if name not in columns:
                        columns[name] = torch.zeros(1 + len(self.shares) * self.count)
                    columns[name][share.first + r] = value
        for kind in made.values():
            kind.columns = {name: t.to(self.device) for name, t in kind.columns.items()}
        return made

    def _of(self, whole: Tensor, share: Share) -> Tensor:
        """What a share has of a tensor of all elements, [R, ...]."""
        name = share.entry.covers[0].parameter
        stack = whole[self.places[name]].view(self.fold.stacks[name].shape)
        return torch.vmap(share.entry.take)(stack)

    # State ------------------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Takes the state that each run's own optimizers have."""
        for r, run in enumerate(self.runs):
            whole: dict[tuple[str, str, str], Tensor] = {}
            steps: dict[str, int] = {}
            for optimizer, entry in run.optimizers.held():
                for kind, tensor in entry.state.items():
                    key = (optimizer, kind, entry.covers[0].parameter)
                    entry.take(whole.setdefault(key, torch.zeros_like(entry.parameter.detach()))).copy_(tensor)
                steps |= {one.address: entry.steps for one in entry.covers}
            for (optimizer, kind, name), tensor in whole.items():
                part(self._stack(self.kinds[optimizer].state[kind], name)[r], tensor.shape).copy_(tensor)
            for share in self.shares:
                self.steps[share.first + r] = steps[share.entry.covers[0].address]

    def save(self, r: int) -> None:
        """Gives a run's own optimizers its state."""
        counts = self.steps.tolist()
        steps = {one.address: int(counts[share.first + r]) for share in self.shares for one in share.entry.covers}
        for optimizer, entry in self.runs[r].optimizers.held():
            name = entry.covers[0].parameter
            for kind, tensor in entry.state.items():
                whole = self._stack(self.kinds[optimizer].state[kind], name)[r]
                tensor.copy_(entry.take(part(whole, entry.parameter.shape).contiguous()))
            entry.steps = steps[entry.covers[0].address]

    def _stack(self, whole: Tensor, name: str) -> Tensor:
        return whole[self.places[name]].view(self.fold.stacks[name].shape)

    # Steps ------------------------------------------------------------------------------------------------------------------

    def step(self, factors: Tensor, due: Tensor) -> Tensor:
        """One update, learning rates times `factors` [R], of the runs that are `due` [R, bool]. Returns the gradient's norms."""
        trained = torch.where(self.column > 0, self.gradients, 0)
        squares = [self._stack(trained, name).flatten(1).square().sum(1) for name in self.places]
        norms = torch.stack(squares).sum(0).sqrt()
        clip = (self.limit / (norms + 1e-6)).clamp(max=1.0)
        self.steps[1:] += due.repeat(len(self.shares))
        for name, kind in self.kinds.items():
            if kind.optimizer.apart:
                for share in self.shares:
                    if share.optimizer == name:
                        self._matrices(kind, share, factors, clip, due)
            else:
                self.elements(name, kind, factors, clip, due)
        return norms

    def _elements(self, name: str, kind: Kind, factors: Tensor, clip: Tensor, due: Tensor) -> None:
        """The update of an optimizer that treats every element by itself."""
        columns = self.column.long()
        run = (columns - 1).clamp(min=0) % self.count
        mine = torch.zeros_like(self.steps, dtype=torch.bool)
        for share in self.shares if len(self.kinds) > 1 else ():
            if share.optimizer == name:
                mine[share.first : share.first + self.count] = True
        moving = due[run] & (mine[columns] if len(self.kinds) > 1 else columns > 0)
        numbers = {key: values[columns] for key, values in kind.columns.items()}
        numbers["learning_rate"] = numbers["learning_rate"] * factors[run]
        settings = Settings(self.steps[columns], numbers, kind.options, None)
        new, state = kind.optimizer.formula(settings, self.values, self.gradients * clip[run], **kind.state)
        self.values.copy_(torch.where(moving, new, self.values))
        for key, tensor in state.items():
            kind.state[key].copy_(torch.where(moving, tensor, kind.state[key]))

    def _matrices(self, kind: Kind, share: Share, factors: Tensor, clip: Tensor, due: Tensor) -> None:
        """The update of slices as matrices."""
        weight, grad = self._of(self.values, share), self._of(self.gradients, share)
        state = {key: self._of(tensor, share) for key, tensor in kind.state.items()}
        place = slice(share.first, share.first + self.count)
        numbers = {key: _shown(values[place], weight) for key, values in kind.columns.items()}
        numbers["learning_rate"] = numbers["learning_rate"] * _shown(factors, weight)
        settings = Settings(_shown(self.steps[place], weight), numbers, kind.options, share.entry)
        new, made = kind.optimizer.formula(settings, weight, grad * _shown(clip, grad), **state)
        moving = _shown(due, weight)
        weight.copy_(torch.where(moving, new, weight))
        for key, tensor in made.items():
            state[key].copy_(torch.where(moving, tensor, state[key]))

    def forget(self, due: Tensor) -> None:
        """Lets the gradients of runs that were updated begin anew."""
        done = due[(self.column.long() - 1).clamp(min=0) % self.count] | (self.column == 0)
        self.gradients.copy_(torch.where(done, 0.0, self.gradients))


def _shown(values: Tensor, beside: Tensor) -> Tensor:
    """A number of every run, as [R, 1, ...]."""
    return values.view(-1, *(1,) * (beside.dim() - 1))


def _numbers(row: Row) -> dict[str, float]:
    """Every number by which the update of a slice may differ between runs; tuples one by one. In aspect, padding does not count."""
    node: Variant = row.settings.optimizer
    made: dict[str, float] = {}
    for name, value in vars(node.options).items():
        if isinstance(value, tuple):
            made |= {f"{name}{i}": float(x) for i, x in enumerate(value)}
        elif isinstance(value, float):
            made[name] = value
    shape = row.slice.shape
    made["aspect"] = shape[-2] / shape[-1] if len(shape) > 1 else 1.0
    return made | {"learning_rate": row.learning_rate, "weight_decay": row.settings.weight_decay}
