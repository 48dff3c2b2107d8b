"""The runs of a pack: what each asks for next, those that wait for a slot, and plain steps of one run after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.device import out_of_memory
from engine.loop import Ask, Run
from engine.state import Anew, State, Tracker

VERDICTS = ("go", "pause", "prune")


class Judge(Protocol):
    """Decides at rungs whether a run goes on."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """The iterations at which the run is looked at, ascending, all below its length."""

    def record(self, iteration: int, loss: float) -> None:
        """Takes the validation loss at a rung, which metrics.jsonl has by then. The same may come again: a run that was stopped or
        killed before it went on from there comes to the rung once more."""

    def verdict(self, iteration: int) -> str:
        """'go', 'pause' (it ends here and is started again when it is to go on) or 'prune'."""


@dataclass(eq=False)
class Member:
    """A run of a pack, with what it reports to."""

    run: Run
    tracker: Tracker
    say: Callable[[State, bool], None]
    stop: Callable[[], bool]
    judge: Judge | None = None

    @property
    def rungs(self) -> tuple[int, ...]:
        return self.judge.rungs if self.judge is not None else ()


# Told once of every member: 'done', 'diverged', 'pruned', or what it raised. After Anew its maker is asked again.
Ended = Callable[[Member, str | Exception], None]
# Makes a run when there is a slot for it, from where it is; None where that is not possible, or it is not to run any more. It may
# raise that memory is out while others of the pack are there, and is asked again later.
Maker = Callable[[], Member | None]


class Course:
    """What a member asks for next; None once it has ended.

    crowded: whether others of the pack take memory. When it is out then, that is raised, and this run has not ended.
    """

    def __init__(self, member: Member, ended: Ended) -> None:
        self.run, self.member, self.ended = member.run, member, ended
        self.crowded: Callable[[], bool] = lambda: False
        self.cohort: tuple[int, int] | None = None  # those who wait for each other at rungs
        self.steps: Generator[Ask, Any, str] = member.run.course(member.tracker, member.say, member.stop, member.rungs)
        self.ask: Ask | None = None
        self.go(None)

    def go(self, answer: Any) -> None:
        """Answers what was asked, and goes on to what is asked next."""
        try:
            self.ask = self.steps.send(answer)
            if self.resting:
                assert self.member.judge is not None and self.run.state.val_loss is not None
                self.member.judge.record(self.run.state.iter, self.run.state.val_loss)
        except StopIteration as end:
            self.end(str(end.value))
        except Exception as error:
            self.fail(error)

    def alone(self) -> None:
        """Does what is asked for this run alone."""
        assert self.ask is not None
        try:
            answer = self.run.answer(self.ask)
        except Exception as error:
            self.fail(error)
        else:
            self.go(answer)

    def fail(self, error: Exception) -> None:
        if out_of_memory(error) and self.crowded():
            raise error
        self.end(error)

    def end(self, how: str | Exception) -> None:
        self.ask = None
        self.steps.close()
        self.ended(self.member, how)

    # Rungs ------------------------------------------------------------------------------------------------------------------

    @property
    def resting(self) -> bool:
        """Whether it waits at a rung."""
        return self.ask is not None and self.ask[0] == "rung"

    def next_rung(self) -> int:
        """The first rung that is still before it; -1: none is."""
        state = self.run.state
        return next((k for k in self.member.rungs if k > state.iter or (k == state.iter and state.judged < k)), -1)

    def behind(self, other: Course) -> bool:
        """Whether the other, which waits at a rung, is to wait for this one."""
        if self.ask is None or self.cohort != other.cohort:
            return False
        return self.run.state.iter < other.run.state.iter and other.run.state.iter in self.member.rungs

    def stopping(self) -> bool:
        """Whether it is asked to stop where it waits; it ends where that raises."""
        try:
            return self.member.stop()
        except Exception as error:
            self.fail(error)
            return False

    def decide(self) -> None:
        """Has the verdict at the rung where it waits, and goes on with that. One that is asked to stop goes without."""
        assert self.member.judge is not None
        told = "stop"
        try:
            if not self.member.stop():
                told = self.member.judge.verdict(self.run.state.iter)
                assert told in VERDICTS, f"a judge said {told!r}"
        except Exception as error:
            self.fail(error)
        else:
            self.go(told)


def released(courses: Sequence[Course]) -> list[Course]:
    """Those that wait at a rung no longer: all of their cohort that will be there have come, or they are asked to stop.

    A cohort began at the same time before the same rung. Others would be waited for however far behind they are.
    """
    stopped = [course for course in courses if course.resting and course.stopping()]
    waiting = [course for course in courses if course.resting]
    return [one for one in waiting if one in stopped or not any(other.behind(one) for other in courses)]


# Slots ----------------------------------------------------------------------------------------------------------------------


class Queue:
    """The runs of a pack: those that have slots, and those that wait for one, which are made when they are looked at."""

    def __init__(self, makers: Iterable[Maker], ended: Ended) -> None:
        self.makers, self.ended = deque(makers), ended
        self.made: deque[tuple[Maker, Course]] = deque()  # those of them that are made
        self.slots: list[tuple[Maker, Course]] = []
        self.batch = 0

    def __len__(self) -> int:
        """How many wait; fewer, if some cannot be made."""
        return len(self.made) + len(self.makers)

    def __getitem__(self, some: slice) -> list[Course]:
        """Of those that wait, from the first on. There are fewer where no memory is left to make them."""
        assert not some.start and some.step is None
        self._make(some.stop)
        return [course for _, course in list(self.made)[: some.stop]]

    def live(self) -> list[Course]:
        """Those that have slots."""
        self.slots = [slot for slot in self.slots if slot[1].ask is not None]
        return [course for _, course in self.slots]

    def count(self) -> int:
        """How many take memory."""
        return len(self.live()) + len(self.made)

    def _make(self, count: int | None) -> None:
        while self.makers and (count is None or len(self.made) < count):
            try:
                member = self.makers[0]()
            except Exception as error:
                if out_of_memory(error) and self.count():
                    return
                raise
            maker = self.makers.popleft()
            if member is not None:
                course = Course(member, self.ended)
                course.crowded = lambda: self.count() > 1
                self.made += [(maker, course)] if course.ask is not None else []

    def take(self, count: int | None = None) -> list[Course]:
        """Gives slots to the next, as many as there are up to `count`; together they are a batch."""
        self._make(count)
        self.batch += 1
        taken = [self.made.popleft() for _ in range(len(self.made) if count is None else min(count, len(self.made)))]
        for _, course in taken:
            course.cohort = course.cohort or (self.batch, course.next_rung())
        self.slots += taken
        return [course for _, course in taken]

    def give_back(self, courses: Sequence[Course], anew: bool = False) -> None:
        """Lets some that have slots wait for others, before everybody else. anew: they have not begun."""
        some = [slot for slot in self.slots if slot[1] in courses and slot[1].ask is not None]
        for _, course in some:
            course.cohort = None if anew else course.cohort
        self.slots = [slot for slot in self.slots if slot not in some]
        self.made.extendleft(reversed(some))

    def put_down(self) -> None:
        """Gives up everything that is made. These runs are made anew, from their checkpoints, before those that were not."""
        self.live()
        every = [*self.slots, *self.made]
        self.slots, self.made = [], deque()
        self.makers.extendleft(maker for maker, _ in reversed(every))
        for _, course in every:
            course.end(Anew("memory was given up"))
            del course.run, course.member


def take_turns(queue: Queue, most: int | None = None) -> None:
    """Plain steps of one run after another, `most` of them (None: all) at a time: each until it was evaluated, so that none is far
    ahead of the others."""
    while live := queue.live() + queue.take(None if most is None else most - len(queue.live())):
        for course in live:
            _turn(course)
        for course in released(live):
            course.decide()


def _turn(course: Course) -> None:
    threads = course.run.state.threads
    if course.run.device.type == "cpu" and threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # a run keeps the number that it began with
    evaluated = False
    while course.ask is not None and not course.resting and not (evaluated and course.ask[0] == "update"):
        evaluated = evaluated or course.ask[0] == "evaluate"
        course.alone()  # what is saved after an evaluation, is saved before others have their turn
