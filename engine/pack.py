"""Runs trained together in one process: on a CPU one after another between evaluations, on a GPU as one folded model.

Whoever starts a pack makes each run as it would alone. Folders, records, results and checkpoints are those of solo runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.loop import Ask, Run, State, Tracker


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


def train(members: Sequence[Member], ended: Ended) -> None:
    """Trains every member to its end. What one raises ends that one alone. Raises what `ended` raises."""
    taking_turns(members, ended)


class Course:
    """What a member asks for next; None once it has ended."""

    def __init__(self, member: Member, ended: Ended) -> None:
        self.member, self.ended = member, ended
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
            answer = self.member.run.answer(self.ask)
        except Exception as error:
            self.end(error)
        else:
            self.go(answer)

    def end(self, how: str | Exception) -> None:
        self.ask = None
        self.steps.close()
        self.ended(self.member, how)


def taking_turns(members: Sequence[Member], ended: Ended) -> None:
    """Plain steps of one run after another: each until it was evaluated, so that none is far ahead of the others."""
    courses = [Course(member, ended) for member in members]
    while live := [course for course in courses if course.ask is not None]:
        for course in live:
            _turn(course)


def _turn(course: Course) -> None:
    threads = course.member.run.state.threads
    if course.member.run.device.type == "cpu" and threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # a run keeps the number that it began with
    while course.ask is not None:
        last = course.ask[0]
        course.alone()
        if last == "evaluate":
            return
