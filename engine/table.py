"""One update of all runs of a fold: optimizers as formulas over [R, ...], with a table of settings by run and slice on the device.

Everything that trains lies in one tensor, so that an update is a few operations however many parameters there are; those that take
slices as matrices go through these. Nothing is read by the host: a step can be captured as a CUDA graph. Elements move as
under the solo optimizers up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.options import Variant
from core.rules import Row
from core.runs import Fold, part
from engine.loop import Run
from variations.optimizer import OPTIMIZERS
from variations.optimizer.base import Entry, Settings


@dataclass(frozen=True)
class Share:
    """A slice: elements of one parameter that have one row of settings in every run, whatever these are."""

    address: str
    optimizer: str
    entry: Entry  # what is taken of a parameter
    place: slice  # the table's columns, one of each run


@dataclass
class Kind:
    """An optimizer that some slices have, in all runs. Options that are no numbers are those of the first."""

    optimizer: Any
    options: Any
    state: dict[str, Tensor]  # of every element
    mine: Tensor  # which columns of the table it has
    columns: dict[str, Tensor]  # settings by name, a number for each column of the table


class Table:
    """The optimizers of all runs. Raises ValueError with a sentence where these cannot be updated together."""

    def __init__(self, fold: Fold, runs: Sequence[Run]) -> None:
        self.fold, self.count, self.device = fold, len(runs), runs[0].device
        first = runs[0].optimizers
        self.shares: list[Share] = []
        for i, row in enumerate(first.trained):
            # By the slice's own view: where a run's parameter is filled up, rows and elements are counted otherwise.
            entry = Entry(first.parameters[row.slice.parameter], row.slice.view, (row.slice,))
            place = slice(1 + i * self.count, 1 + (i + 1) * self.count)
            self.shares.append(Share(row.slice.address, row.settings.optimizer.name, entry, place))
        for share in self.shares:
            if why := getattr(OPTIMIZERS[share.optimizer], "solo", None):
                raise ValueError(f"{share.address}: {why}")
        if why := next(filter(None, map(self.misfit, runs)), None):
            raise ValueError(why)
        self.values, self.gradients, self.places = fold.gather()
        self.column = torch.zeros(
            len(self.values), dtype=torch.int32, device=self.device
        )  # of each element; 0: it is at rest
        for share in self.shares:
            mine = torch.arange(share.place.start, share.place.stop, dtype=torch.int32, device=self.device)
            taken = self._of(self.column, share)
            taken.copy_(_shown(mine, taken).expand_as(taken))
        self.steps = torch.zeros(1 + len(self.shares) * self.count, device=self.device)
        self.kinds = self._kinds(runs[0])
        self.limit = torch.zeros(self.count, device=self.device)
        # One pass over memory instead of one for each operation.
        self.elements: Any = torch.compile(self._elements) if self.device.type == "cuda" else self._elements
        for r, run in enumerate(runs):
            run.optimizers.settle()
            self.put(r, run)

    # Settings ---------------------------------------------------------------------------------------------------------------

    def misfit(self, run: Run) -> str | None:
        """Why a run cannot be updated with these, or None where it can."""
        rows = _trained(run)
        if rows.keys() != {share.address for share in self.shares}:
            return "the runs train other slices"
        other = [s.address for s in self.shares if rows[s.address].settings.optimizer.name != s.optimizer]
        return f"{other[0]}: the runs have other optimizers there" if other else None

    def _kinds(self, run: Run) -> dict[str, Kind]:
        made: dict[str, Kind] = {}
        rows = _trained(run)
        for share in self.shares:
            optimizer: Any = OPTIMIZERS[share.optimizer]
            row = rows[share.address]
            if share.optimizer not in made:
                state = {kind: torch.zeros_like(self.values) for kind in optimizer.kinds}
                columns = {name: torch.zeros_like(self.steps) for name in _numbers(row)}
                mine = torch.zeros_like(self.steps, dtype=torch.bool)
                made[share.optimizer] = Kind(optimizer, row.settings.optimizer.options, state, mine, columns)
            made[share.optimizer].mine[share.place] = True
        return made

    def put(self, r: int, run: Run) -> None:
        """Gives place r to a run that fits: its settings, and the state that its own optimizers have. Nothing of what was there is
        left."""
        rows = _trained(run)
        self.limit[r] = run.config.train.grad_clip or float("inf")
        for name, kind in self.kinds.items():
            own = [share for share in self.shares if share.optimizer == name]
            columns = torch.tensor([share.place.start + r for share in own], device=self.device)
            numbers = [_numbers(rows[share.address]) for share in own]
            for key, values in kind.columns.items():
                values[columns] = torch.tensor([some[key] for some in numbers], device=self.device)
        self.load(r, run)

    def _of(self, whole: Tensor, share: Share) -> Tensor:
        """What a share has of a tensor of all elements, [R, ...]."""
        name = share.entry.covers[0].parameter
        stack = whole[self.places[name]].view(self.fold.stacks[name].shape)
        return torch.vmap(share.entry.take)(stack)

    # State ------------------------------------------------------------------------------------------------------------------

    def load(self, r: int, run: Run) -> None:
        """Takes the state that a run's own optimizers have."""
        for kind in self.kinds.values():
            for state in kind.state.values():
                for name in self.places:
                    self._stack(state, name)[r].zero_()
        whole: dict[tuple[str, str, str], Tensor] = {}
        steps: dict[str, int] = {}
        for optimizer, entry in run.optimizers.held():
            for name, tensor in entry.state.items():
                key = (optimizer, name, entry.covers[0].parameter)
                entry.take(whole.setdefault(key, torch.zeros_like(entry.parameter.detach()))).copy_(tensor)
            steps |= {one.address: entry.steps for one in entry.covers}
        for (optimizer, name, parameter), tensor in whole.items():
            part(self._stack(self.kinds[optimizer].state[name], parameter)[r], tensor.shape).copy_(tensor)
        columns = torch.tensor([share.place.start + r for share in self.shares], device=self.device)
        counts = [float(steps[share.address]) for share in self.shares]
        self.steps[columns] = torch.tensor(counts, device=self.device)

    def save(self, r: int, run: Run) -> None:
        """Gives the state to the own optimizers of the run at place r."""
        counts = self.steps.tolist()
        steps = {share.address: int(counts[share.place.start + r]) for share in self.shares}
        for optimizer, entry in run.optimizers.held():
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
                self.elements(kind, factors, clip, due)
        return norms

    def _elements(self, kind: Kind, factors: Tensor, clip: Tensor, due: Tensor) -> None:
        """The update of an optimizer that treats every element by itself."""
        columns = self.column.long()
        run = (columns - 1).clamp(min=0) % self.count
        moving = due[run] & (kind.mine[columns] if len(self.kinds) > 1 else columns > 0)
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
        numbers = {key: _shown(values[share.place], weight) for key, values in kind.columns.items()}
        numbers["learning_rate"] = numbers["learning_rate"] * _shown(factors, weight)
        settings = Settings(_shown(self.steps[share.place], weight), numbers, kind.options, share.entry)
        new, made = kind.optimizer.formula(settings, weight, grad * _shown(clip, grad), **state)
        moving = _shown(due, weight)
        weight.copy_(torch.where(moving, new, weight))
        for key, tensor in made.items():
            state[key].copy_(torch.where(moving, tensor, state[key]))

    def forget(self, due: Tensor) -> None:
        """Lets the gradients of runs that were updated begin anew."""
        done = due[(self.column.long() - 1).clamp(min=0) % self.count] | (self.column == 0)
        self.gradients.copy_(torch.where(done, 0.0, self.gradients))


def _trained(run: Run) -> dict[str, Row]:
    """By address, the settings of what a run trains."""
    return {row.slice.address: row for row in run.optimizers.trained}


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
