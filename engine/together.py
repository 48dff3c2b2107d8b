"""Courses whose updates and evaluations are computed by one folded model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.runs import Fold, fits, sizes
from engine.course import Course, Queue, released
from engine.device import Replay, autocast, calls_per_second, move, out_of_memory
from engine.table import Table
from model import cross_entropy
from variations.dropout import set_step

RESIDENT = 2**28  # tokens of a split that are copied to a GPU as a whole


class HalfMoved(Exception):
    """An update broke off when some weights had moved. What is whole of these runs is in their checkpoints."""


class Together:
    """Every run has its own iteration, batches, dropout, schedule, clipping and count of micro-batches; an update is made when a
    run has had all of its own. What a run computes after its end, or while it waits at a rung, is not looked at.

    exact: the folded model rounds as the plain one, and each run's own optimizers update it; else one table updates all runs, and
    on a GPU a step is captured once and replayed. queue: whose runs take the places of those that end, in the same tensors.
    evaluates: whether runs are evaluated together too, where that is possible.
    """

    evaluates = True

    def __init__(self, courses: Sequence[Course], exact: bool | None = None, queue: Queue | None = None) -> None:
        self.courses, self.queue = list(courses), queue
        self.runs = [course.run for course in courses]
        first, self.count = self.runs[0], len(self.runs)
        self.device, self.dtype, self.corpus = first.device, first.config.train.dtype, first.corpus
        self.exact = (self.device.type == "cpu" or first.config.train.deterministic) if exact is None else exact
        self.fold = Fold([run.plain for run in self.runs], self.exact)
        for run in self.runs:
            run.optimizers.settle()  # also where what follows fails, and the runs go on alone
        self.table = None if self.exact else Table(self.fold, self.runs)
        self.before: list[dict[str, Tensor]] = [
            {} for _ in self.runs
        ]  # buffers that training moves, at the start of an update
        self.model: Any = self.fold.model
        if first.config.train.compile:
            self.fold.model = self.model.compiled()
        self.moving = False  # while weights change
        self.resting: dict[int, dict[str, Tensor]] = {}  # of a run that waits at a rung, what training would move
        self.micro = [0] * self.count  # micro-batches of the update on its way
        self.steps = [run.config.train.gradient_accumulation_steps for run in self.runs]
        self.history: list[tuple[Tensor, list[int], list[int]]] = []  # losses [R], whose they are, whose update was due
        self.partial = np.zeros(self.count, np.float32)  # the loss of the update on its way
        self._static()
        self._check()
        for run in self.runs:
            run.fetch = self.tell

    def _static(self) -> None:
        """What a step reads and writes, in memory that stays where it is."""
        train, block = self.runs[0].config.train, self.runs[0].config.model.block_size
        rows, on = self.count * train.batch_size, self.device
        self.x, self.y = (torch.zeros(rows, block, dtype=torch.int64, device=on) for _ in range(2))
        self.starts = torch.zeros(rows, dtype=torch.int64, device=on)
        self.parts = torch.tensor(self.steps, dtype=torch.float32, device=on)
        self.factors = torch.zeros(self.count, device=on)
        self.alive, self.due = (torch.zeros(self.count, dtype=torch.bool, device=on) for _ in range(2))
        self.told, self.norms = torch.zeros(self.count, device=on), torch.zeros(self.count, device=on)
        tokens = self.corpus.train
        resident = on.type == "cuda" and len(tokens) <= RESIDENT
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(on) if resident else None
        # Gradients that come and go cannot be captured.
        self.compute = Replay(self._compute, on if self.table is not None else torch.device("cpu"))

    @torch.no_grad()
    def _check(self) -> None:
        """Raises ValueError where the model draws from torch's generator, which each run alone seeds for itself."""
        cuda = self.device.type == "cuda"
        before = torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state()
        self.model.train()
        self.forward(self.x, self.y)
        if not torch.equal(before, torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state()):
            raise ValueError("the model draws from torch's generator, of which runs that are folded have one")

    def live(self) -> list[int]:
        return [r for r, course in enumerate(self.courses) if course.ask is not None]

    def go_on(self) -> None:
        """Until half of the runs have ended and no others take their places: those that are left make a smaller pack. They can go
        on without this one then. Raises HalfMoved, or that memory is out, where they cannot."""
        try:
            while self.fill() or len(self.live()) * 2 > self.count:
                asking = [r for r in self.live() if self.courses[r].ask[0] not in ("update", "rung")]  # type: ignore[index]
                if asking:
                    self.serve(asking)
                elif not self.decide():
                    self.update([r for r in self.live() if not self.courses[r].resting])
        except Exception as error:
            if not (isinstance(error, HalfMoved) or out_of_memory(error)):
                self.leave()
            raise
        self.leave()

    def leave(self) -> None:
        """Gives each run what its own optimizers need to go on."""
        self.tell()
        for r in list(self.resting):
            self.wake(r)
        for r, run in enumerate(self.runs):
            run.fetch = None
            for name, value in self.before[r].items() if self.micro[r] else ():
                self.fold.knobs[name][r].copy_(value)  # an update on its way begins anew
            if self.table is not None and self.courses[r].ask is not None:
                self.table.save(r, run)
        if self.device.type == "cpu":  # where a run alone has other bits if its tensors begin elsewhere
            self.fold.let_go(self.live())
            for r in self.live():
                self.runs[r].optimizers.settle()
        del self.compute  # what was captured holds memory

    def rehearse(self) -> tuple[float, list[list[Tensor | None]]]:
        """The next step, which moves nothing: seconds, and the loss and gradients of each run."""
        kept = {name: knob.clone() for name, knob in self.fold.knobs.items()}
        started = time.perf_counter()
        self.prepare(range(self.count))
        self.model.train()
        try:
            self.compute()
            self.fold.gradients()
            seconds = time.perf_counter() - started
            parameters = [[*run.plain.parameters()] for run in self.runs]
            return seconds, [[told, *(p.grad for p in own)] for told, own in zip(self.told, parameters, strict=True)]
        finally:
            for name, knob in kept.items():
                self.fold.knobs[name].copy_(knob)
            for stack in self.fold.stacks.values():
                stack.grad = None
            self.micro, self.before = [0] * self.count, [{} for _ in self.runs]

    def speed(self, seconds: float) -> float:
        """Training tokens a second of all runs together, by steps that move nothing."""
        kept = {name: knob.clone() for name, knob in self.fold.knobs.items()}
        self.place(np.zeros((self.count, self.runs[0].config.train.batch_size), np.int64), range(self.count), [])
        self.model.train()
        try:
            for _ in range(Replay.WARM + 2):
                self.compute()
            steps = calls_per_second(self.compute, self.device, seconds)
        finally:
            for name, knob in kept.items():
                self.fold.knobs[name].copy_(knob)
            if self.table is not None:
                self.table.gradients.zero_()
        return steps * self.x.numel()

    # Places and rungs -------------------------------------------------------------------------------------------------------

    def fill(self) -> bool:
        """Gives the places of runs that have ended to those that wait, if they are enough to go on. Returns whether any came."""
        free = [r for r, course in enumerate(self.courses) if course.ask is None]
        if (
            self.queue is None
            or not free
            or 2 * (self.count - len(free) + min(len(free), len(self.queue))) <= self.count
        ):
            return False
        taken = self.queue.take(len(free))
        fitting = list(itertools.takewhile(lambda course: self.misfit(course) is None, taken))
        for r, course in zip(free, fitting, strict=False):
            self.put(r, course)
        if len(fitting) < len(free):  # none is left, or the next has to wait for another model or for memory
            self.queue.give_back(taken[len(fitting) :], anew=True)
            self.queue = None
        return bool(fitting)

    def misfit(self, course: Course) -> str | None:
        """Why a run cannot take a place among these, or None where it can."""
        config, plain = course.run.config, course.run.plain
        if not fits(sizes([plain]), self.count * config.train.batch_size, config.model.block_size):
            return "the batch's size is also that of something else"
        return self.fold.misfit(plain) or (self.table.misfit(course.run) if self.table is not None else None)

    def put(self, r: int, course: Course) -> None:
        """Lets a run that fits take the place of one that has ended."""
        self.tell()
        self.runs[r].fetch = None
        run = course.run
        self.courses[r], self.runs[r] = course, run
        self.fold.put(r, run.plain)
        run.optimizers.settle()
        if self.table is not None:
            self.table.put(r, run)
        self.steps[r] = run.config.train.gradient_accumulation_steps
        self.parts[r] = self.steps[r]
        self.micro[r], self.partial[r], self.before[r] = 0, 0.0, {}
        self.resting.pop(r, None)
        run.fetch = self.tell

    def decide(self) -> bool:
        """Tells runs at rungs how they go on, where those have come for whom they wait. Returns whether any was told."""
        for r in self.live():
            if self.courses[r].resting and r not in self.resting:
                self.resting[r] = self.moved(r)
        told = released([self.courses[r] for r in self.live()])
        for r in [r for r in self.resting if self.courses[r] in told]:
            self.wake(r)
            self.courses[r].decide()
        return bool(told)

    def wake(self, r: int) -> None:
        """Takes back what was computed while a run waited."""
        for name, value in self.resting.pop(r).items():
            self.fold.knobs[name][r].copy_(value)
        self.fold.forget(r)

    def moved(self, r: int) -> dict[str, Tensor]:
        """What of a run moves in training and is no parameter, as it is now."""
        return {name: self.fold.knobs[name][r].clone() for name in self.fold.moving}

    # Evaluations and checkpoints --------------------------------------------------------------------------------------------

    def serve(self, waiting: Sequence[int]) -> None:
        """Saves, and evaluates together what asks for the same."""
        asked: dict[Any, list[int]] = {}
        for r in waiting:
            asked.setdefault(self.courses[r].ask, []).append(r)
        for ask, same in asked.items():
            losses = self.evaluate(ask[1]) if ask[0] == "evaluate" and self.joint(len(same)) else None
            for r in same:
                if losses is not None:
                    self.courses[r].go(losses[r])
                    continue
                if self.table is not None and ask[0] == "save":
                    self.table.save(r, self.runs[r])
                self.courses[r].alone()

    def joint(self, asking: int) -> bool:
        """Whether it is better to evaluate all runs than those that ask one by one, and possible."""
        block = self.runs[0].config.model.block_size
        batches = {len(x) for x, _ in self.runs[0].evaluated(1)}
        return (
            self.evaluates
            and 2 * asking > self.count
            and all(fits(self.fold.sizes, self.count * n, block) for n in batches)
        )

    @torch.no_grad()
    def evaluate(self, iters: int | str) -> list[float]:
        """As `Run.evaluate`, of every run at once."""
        started = time.perf_counter()
        self.model.eval()
        total, count = torch.zeros(self.count, dtype=torch.float64, device=self.device), 0
        for batch in self.runs[0].evaluated(iters):
            x, y = (move(t, self.device).repeat(self.count, 1) for t in batch)
            total += self.forward(x, y).double() * len(batch[0])
            count += len(batch[0])
        self.model.train()
        losses: list[float] = (total / count).tolist()
        for run in self.runs:
            run.count("evaluate", (time.perf_counter() - started) / self.count)
        return losses

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross entropy of each run [R], tokens and targets [R * B, T]."""
        with autocast(self.device, self.dtype):
            logits, _ = self.fold(x)
        logits, y = (t.unflatten(0, (self.count, -1)) for t in (logits, y))
        if self.exact:
            return torch.stack([cross_entropy(*each) for each in zip(logits, y, strict=True)])
        each = F.cross_entropy(logits.flatten(0, 2).float(), y.flatten(), reduction="none")
        return each.view(self.count, -1).mean(1)

    # Updates ----------------------------------------------------------------------------------------------------------------

    def update(self, live: Sequence[int]) -> None:
        """A micro-batch of every run, and the update of those that have had all of theirs."""
        started = time.perf_counter()
        due = self.prepare(live)
        self.model.train()
        try:
            self.compute()
            self.finish(due)
        except Exception as error:
            if self.moving:
                raise HalfMoved("an update broke off") from error
            raise
        self.history.append((self.told.clone(), list(live), due))
        for r in due:
            self.micro[r] = 0
            self.runs[r].state.steps += self.table is not None
            self.runs[r].state.iter += 1
        elapsed = time.perf_counter() - started
        for r in live:
            self.runs[r].count("update", elapsed / len(live))
        for r in due:
            self.courses[r].go(None)

    def prepare(self, live: Sequence[int]) -> list[int]:
        """Puts the next micro-batches and settings where a step reads them. Returns the runs whose update is due."""
        due, starts = [], np.zeros((self.count, self.runs[0].config.train.batch_size), np.int64)
        for r in live:
            run = self.runs[r]
            micro = run.state.iter * self.steps[r] + self.micro[r]
            starts[r] = run.batches.starts(micro)
            if self.micro[r] == 0:
                self.before[r] = self.moved(r)
            if run.dropping:
                set_step(run.plain, run.config.train.seed, micro)
            self.micro[r] += 1
            due += [r] if self.micro[r] == self.steps[r] else []
        self.place(starts, live, due)
        return due

    def place(self, starts: np.ndarray, live: Sequence[int], due: Sequence[int]) -> None:
        """Copies to the device what a step needs: which windows, who is trained, and by how much."""
        if self.tokens is None:
            for there, here in zip((self.x, self.y), self.runs[0].batches.at(starts.reshape(-1)), strict=True):
                there.copy_(here, non_blocking=True)
        else:
            self.starts.copy_(torch.from_numpy(starts.reshape(-1)), non_blocking=True)
        multipliers = [run.schedule.multiplier(run.state.iter) if r in due else 0.0 for r, run in enumerate(self.runs)]
        self.factors.copy_(torch.tensor(multipliers), non_blocking=True)
        for there, some in ((self.alive, live), (self.due, due)):
            here = torch.zeros(self.count, dtype=torch.bool)
            here[list(some)] = True
            there.copy_(here, non_blocking=True)

    def _compute(self) -> None:
        """Forward and backward of every run, and with a table the update of those that are due. Reads nothing on the host."""
        x, y = self.x, self.y
        if self.tokens is not None:
            block = x.shape[1]
            found = self.tokens[self.starts[:, None] + torch.arange(block + 1, device=self.device)].long()
            x, y = found[:, :-1], found[:, 1:]
        losses = self.forward(x, y)
        extra = self.model.added()
        losses = (losses if extra is None else losses + extra) / self.parts
        self.told.copy_(losses.detach() if extra is None else losses.detach() - extra.detach() / self.parts)
        torch.where(self.alive, losses, 0).sum().backward()
        if self.table is not None:
            self.moving = True
            self.norms.copy_(self.table.step(self.factors, self.due))
            self.table.forget(self.due)
            self.moving = False

    def finish(self, due: Sequence[int]) -> None:
        """The updates by each run's own optimizers, where there is no table."""
        if self.table is not None:
            return
        self.moving = True
        self.fold.gradients()
        for r in due:
            self.runs[r].step()
        left = [r for r in self.live() if self.micro[r] and r not in due]
        for stack in self.fold.stacks.values():
            if not left:
                stack.grad = None
            elif stack.grad is not None:
                stack.grad[list(due)] = 0.0
        self.moving = False

    # Losses -----------------------------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Moves losses from the device to the runs, when one of them looks."""
        if not self.history:
            return
        rows = torch.stack([losses for losses, _, _ in self.history]).cpu().numpy()
        for row, (_, live, due) in zip(rows, self.history, strict=True):
            self.partial[live] += row[live]
            for r in due:
                self.runs[r].losses.append(float(self.partial[r]))
                self.partial[r] = 0.0
        self.history = []
        if self.table is not None:
            for r, norm in enumerate(self.norms.tolist()):
                self.runs[r].grad_norm = norm
