"""Whether folded runs leave the bits of plain steps on a CPU, and sooner: tried on the step that is next, which moves nothing.

How a kernel rounds depends on shapes and on where tensors begin, not on their values, so what holds for one step holds for those
that follow it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.weights import weights
from engine.loop import Run
from train_args import Config

if TYPE_CHECKING:
    from engine.together import Together

SMALL = 2e7  # parameters times tokens of a step up to which more time goes into calling kernels than into these
TURNS = 3  # of which the fastest counts
WORTH = 0.95  # of the time of plain steps


def small(config: Config, parameters: int) -> bool:
    """Whether it is worth trying to fold runs like one of so many parameters on a CPU. A compiled model is another one."""
    tokens = config.train.batch_size * config.model.block_size
    return parameters * tokens <= SMALL and not config.train.compile


class Rehearsal:
    """The next step of runs that are not folded yet, and whose tensors lie as those of a run alone: seconds, losses, gradients."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.seconds = float("inf")
        for _ in range(TURNS):
            started = time.perf_counter()
            self.seen = [_plain(run) for run in runs]
            self.seconds = min(self.seconds, time.perf_counter() - started)

    def agrees(self, pack: Together) -> bool:
        """Whether these runs, folded, make the same step to the last bit in less time."""
        seconds = float("inf")
        for _ in range(TURNS):
            taken, seen = pack.rehearse()
            seconds = min(seconds, taken)
            if not all(_same(a, b) for a, b in zip(self.seen, seen, strict=True)):
                return False
        return seconds < WORTH * self.seconds


def _plain(run: Run) -> list[Tensor | None]:
    """The loss and the gradients of a run's next micro-batch."""
    moving = {name: t.clone() for name, t in weights(run.plain).items() if not t.requires_grad}
    run.model.train()
    run.optimizers.zero_grad()
    try:
        told = run.gradient(run.state.iter * run.config.train.gradient_accumulation_steps)
        return [told, *(None if p.grad is None else p.grad.clone() for p in run.plain.parameters())]
    finally:
        run.optimizers.zero_grad()
        for name, t in weights(run.plain).items():
            if name in moving:
                t.copy_(moving[name])


def _same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether these are the same to the last bit, the sign of a zero too."""
    return len(one) == len(other) and all(
        a is b if a is None or b is None else torch.equal(_bits(a), _bits(b)) for a, b in zip(one, other, strict=True)
    )


def _bits(t: Tensor) -> Tensor:
    return t.reshape(-1).contiguous().view(torch.uint8)
