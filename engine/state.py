"""Where a run is, what takes its records, and how it is left before its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


class Stopped(Exception):
    """The run was asked to stop and has saved where it is."""


class Paused(Stopped):
    """The run was told at a rung to wait, and has saved where it is, which is `iteration`."""

    def __init__(self, iteration: int) -> None:
        super().__init__(f"paused at iteration {iteration}")
        self.iteration = iteration


class Anew(Stopped):
    """The memory of the run was given up, with what it did since its last checkpoint: it is to be made anew from there."""


class Tracker(Protocol):
    """What takes the records of a run."""

    def log(self, record: dict[str, Any]) -> None: ...


@dataclass
class State:
    """Where a run is: everything in a checkpoint beside tensors."""

    iter: int = 0
    steps: int = 0  # of the optimizer: float16 leaves some out
    threads: int = 0  # sums of several threads have other last bits, so a run keeps its number
    train_seconds: float = 0.0  # in updates
    seconds: float = 0.0  # evaluations included
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    grad_scale: float = 1.0
    fitting: int = 0  # steps in a row that did not overflow
    pending: list[float] = field(default_factory=list)  # losses since the last record
    evaluated: int = -1  # the iteration of the last evaluation
    judged: int = -1  # the last rung at which it was told to go on
