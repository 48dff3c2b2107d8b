"""Runs trained together in one process: on a CPU one after another between evaluations, on a GPU as one folded model.

Whoever starts a pack makes each run as it would alone. Folders, records, results and checkpoints are those of solo runs.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.runs import Fold, fits, sizes
from engine.device import autocast, move
from engine.loop import Ask, Run, State, Tracker
from model import cross_entropy
from variations.dropout import set_step


@dataclass
class Member:
    """A run of a pack, with what it reports to. Compared by identity."""

    run: Run
    tracker: Tracker
    say: Callable[[State, bool], None]
    stop: Callable[[], bool]

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


Ended = Callable[[Member, str | Exception], None]  # told once of every member: 'done', 'diverged', or what it raised


def train(members: Sequence[Member], ended: Ended, fold: bool | None = None) -> None:
    """Trains every member to its end. What one raises ends that one alone. Raises what `ended` raises.

    fold: whether they are computed as one model; None: on a GPU. One that is alone is the plain model.
    """
    courses = [Course(member, ended) for member in members]
    folding = fold if fold is not None else any(member.run.device.type == "cuda" for member in members)
    while folding and (some := together([course for course in courses if course.ask is not None])):
        try:
            Together(some).go_on()
        except Exception:  # of all of them; whose it was is seen when they go on by themselves
            print(f"these runs go on one after another, because together they failed:\n{traceback.format_exc()}")
            break
    take_turns(courses)


def together(courses: Sequence[Course]) -> list[Course]:
    """The largest number of these courses that can be folded, from the first on; none where it would be one."""
    if not courses:
        return []
    first, known = courses[0].run.config, sizes([course.run.plain for course in courses])
    for count in range(len(courses), 1, -1):
        if fits(known, count * first.train.batch_size, first.model.block_size):
            return list(courses[:count])
    return []


class Course:
    """What a member asks for next; None once it has ended."""

    def __init__(self, member: Member, ended: Ended) -> None:
        self.run, self.member, self.ended = member.run, member, ended
        self.steps: Generator[Ask, Any, str] = member.run.course(member.tracker, member.say, member.stop)
        self.ask: Ask | None = None
        self.go(None)

    def go(self, answer: Any) -> None:
        """Answers what was asked, and goes on to what is asked next."""
        try:
            self.ask = self.steps.send(answer)
        except StopIteration as end:
            self.end(str(end.value))
        except Exception as error:
            self.end(error)

    def alone(self) -> None:
        """Does what is asked for this run alone."""
        assert self.ask is not None
        try:
            answer = self.run.answer(self.ask)
        except Exception as error:
            self.end(error)
        else:
            self.go(answer)

    def end(self, how: str | Exception) -> None:
        self.ask = None
        self.steps.close()
        self.ended(self.member, how)


# On a CPU --------------------------------------------------------------------------------------------------------------------


def take_turns(courses: Sequence[Course]) -> None:
    """Plain steps of one run after another: each until it was evaluated, so that none is far ahead of the others."""
    while live := [course for course in courses if course.ask is not None]:
        for course in live:
            _turn(course)


def _turn(course: Course) -> None:
    threads = course.run.state.threads
    if course.run.device.type == "cpu" and threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # a run keeps the number that it began with
    while course.ask is not None:
        last = course.ask[0]
        course.alone()
        if last == "evaluate":
            return


# Folded ----------------------------------------------------------------------------------------------------------------------


class Together:
    """Courses whose updates and evaluations are computed by one folded model.

    Every run has its own batches, dropout, schedule, clipping and count of micro-batches; an update is made when a run has had
    all of its own. What a run computes after its end is not looked at.
    """

    def __init__(self, courses: Sequence[Course], exact: bool | None = None) -> None:
        self.courses = list(courses)
        self.runs = [course.run for course in courses]
        first = self.runs[0]
        self.device, self.dtype = first.device, first.config.train.dtype
        self.exact = self.device.type == "cpu" if exact is None else exact
        self.fold = Fold([run.plain for run in self.runs], self.exact)
        self.model: Any = self.fold.model
        for run in self.runs:
            run.optimizers.settle()
        self.micro = [0] * len(self.runs)  # micro-batches of the update on its way
        self.totals: list[Tensor | None] = [None] * len(self.runs)
        self.batches: list[tuple[Tensor, Tensor]] = [run.batches(0) for run in self.runs]

    def live(self) -> list[int]:
        return [r for r, course in enumerate(self.courses) if course.ask is not None]

    def go_on(self) -> None:
        """Until half of the runs have ended: those that are left make a smaller pack."""
        while len(self.live()) * 2 > len(self.runs):
            waiting = [r for r in self.live() if self.courses[r].ask[0] != "update"]  # type: ignore[index]
            if waiting:
                self.serve(waiting)
            elif live := self.live():
                self.update(live)

    def serve(self, waiting: Sequence[int]) -> None:
        """Saves, and evaluates together what asks for the same."""
        asked: dict[Any, list[int]] = {}
        for r in waiting:
            asked.setdefault(self.courses[r].ask, []).append(r)
        for ask, same in asked.items():
            losses = self.evaluate(ask[1]) if ask[0] == "evaluate" and self.joint(len(same)) else None
            for r in same:
                if losses is None:
                    self.courses[r].alone()
                else:
                    self.courses[r].go(losses[r])

    def joint(self, asking: int) -> bool:
        """Whether it is better to evaluate all runs than those that ask one by one, and possible."""
        first, runs = self.runs[0], len(self.runs)
        batches = {len(x) for x, _ in first.evaluated(1)}
        return 2 * asking > runs and all(
            fits(self.fold.sizes, runs * n, first.config.model.block_size) for n in batches
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross entropy of each run [R], tokens and targets [R * B, T]."""
        with autocast(self.device, self.dtype):
            logits, _ = self.fold(x)
        split = (t.unflatten(0, (len(self.runs), -1)) for t in (logits, y))
        if self.exact:
            return torch.stack([cross_entropy(*each) for each in zip(*split, strict=True)])
        logits, y = split
        each = F.cross_entropy(logits.flatten(0, 2).float(), y.flatten(), reduction="none")
        return each.view(len(self.runs), -1).mean(1)

    # One update -------------------------------------------------------------------------------------------------------------

    def update(self, live: Sequence[int]) -> None:
        """A micro-batch of every run, and the update of those that have had all of theirs."""
        started = time.perf_counter()
        due = self.accumulate(live)
        for r in due:
            total, self.totals[r], self.micro[r] = self.totals[r], None, 0
            assert total is not None
            self.runs[r].finish(total)
        self.forget(due)
        elapsed = time.perf_counter() - started
        for r in live:
            self.runs[r].count("update", elapsed / len(live))
        for r in due:
            self.courses[r].go(None)

    def accumulate(self, live: Sequence[int]) -> list[int]:
        """Gradients and losses of a micro-batch of every run. Returns the runs whose update is due."""
        due = []
        for r in live:
            run, steps = self.runs[r], self.runs[r].config.train.gradient_accumulation_steps
            micro = run.state.iter * steps + self.micro[r]
            self.batches[r] = run.batches(micro)
            if run.dropping:
                set_step(run.plain, run.config.train.seed, micro)
            self.micro[r] += 1
            due += [r] if self.micro[r] == steps else []
        self.model.train()
        x, y = (move(torch.cat(each), self.device) for each in zip(*self.batches, strict=True))
        losses = self.forward(x, y)
        told = losses.detach()
        if (extra := self.model.added()) is not None:
            losses = losses + extra
        shares = [run.config.train.gradient_accumulation_steps for run in self.runs]
        parts = torch.tensor(shares, dtype=losses.dtype, device=self.device)
        alive = torch.zeros(len(shares), dtype=torch.bool)
        alive[list(live)] = True
        torch.where(alive.to(self.device), losses / parts, 0).sum().backward()
        self.fold.gradients()
        for r, loss in zip(live, (told / parts)[list(live)], strict=True):
            before = self.totals[r]
            self.totals[r] = loss if before is None else before + loss
        return due

    def forget(self, due: Sequence[int]) -> None:
        """Lets the gradients of runs that were updated begin anew."""
        left = [r for r in self.live() if r not in due and self.micro[r]]
        for stack in self.fold.stacks.values():
            if not left:
                stack.grad = None
            elif stack.grad is not None:
                stack.grad[list(due)] = 0.0

    # Evaluation -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, iters: int | str) -> list[float]:
        """As `Run.evaluate`, of every run at once."""
        started, runs = time.perf_counter(), len(self.runs)
        self.model.eval()
        first = self.runs[0]
        total = torch.zeros(runs, dtype=torch.float64, device=self.device)
        count = 0
        for x, y in first.evaluated(iters):
            x, y = (move(t, self.device) for t in (x, y))
            total += self.forward(x.repeat(runs, 1), y.repeat(runs, 1)).double() * len(x)
            count += len(x)
        self.model.train()
        for run in self.runs:
            run.count("evaluate", (time.perf_counter() - started) / runs)
        return (total / count).tolist()
