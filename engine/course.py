"""What the runs of a pack ask for, and plain steps of one run after another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.loop import Ask, Run, State, Tracker


@dataclass(eq=False)
class Member:
    """A run of a pack, with what it reports to."""

    run: Run
    tracker: Tracker
    say: Callable[[State, bool], None]
    stop: Callable[[], bool]


Ended = Callable[[Member, str | Exception], None]  # told once of every member: 'done', 'diverged', or what it raised


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


def take_turns(courses: Sequence[Course]) -> None:
    """Plain steps of one run after another: each until it was evaluated, so that none is far ahead of the others."""
    while live := [course for course in courses if course.ask is not None]:
        for course in live:
            _turn(course)


def _turn(course: Course) -> None:
    threads = course.run.state.threads
    if course.run.device.type == "cpu" and threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # a run keeps the number that it began with
    evaluated = False
    while course.ask is not None and not (evaluated and course.ask[0] == "update"):
        evaluated = evaluated or course.ask[0] == "evaluate"
        course.alone()  # what is saved after an evaluation, is saved before others have their turn
