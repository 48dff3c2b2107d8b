"""Schedules. Times are iterations (int) or fractions of the run (float up to 1.0); iterations count from 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.options import Invalid, opt


def iterations(time: int | float, total: int) -> float:
    """A time in iterations: an int as it is, a float as that fraction of `total`."""
    return time * total if isinstance(time, float) else float(time)


def check_times(*times: tuple[str, int | float]) -> None:
    """Raises Invalid for a fraction above 1: it was meant as a number of iterations."""
    wrong = [(name, f"{t} is a fraction of the run and cannot exceed 1.0; write {int(t)} for iterations") for name, t in times
             if isinstance(t, float) and t > 1.0]  # fmt: skip
    if wrong:
        raise Invalid(*wrong)


@dataclass(frozen=True)
class Warmup:
    """Every schedule begins with a linear warmup."""

    warmup_iters: int | float = opt(0, "Length of the linear warmup, in iterations or as a fraction of the run.", ge=0)

    def __post_init__(self) -> None:
        check_times(("warmup_iters", self.warmup_iters))


@dataclass(frozen=True)
class Decay(Warmup):
    """A decay down to a floor."""

    decay_iters: int | float = opt(1.0, "When the decay ends, in iterations or as a fraction of the run.", ge=0)
    min_lr_ratio: float = opt(0.1, "The floor, as a fraction of the peak.", ge=0.0, le=1.0)

    def __post_init__(self) -> None:
        check_times(("warmup_iters", self.warmup_iters), ("decay_iters", self.decay_iters))


class Schedule:
    """Warmup, then `after`. `multiplier(i)` is what the peak learning rate is multiplied by at iteration i of `total`."""

    def __init__(self, options: Warmup, total: int) -> None:
        self.options, self.total = options, total
        self.warmup = iterations(options.warmup_iters, total)

    def multiplier(self, i: int) -> float:
        if i < self.warmup:
            return (i + 1) / (self.warmup + 1)
        return self.after(i)

    def after(self, i: int) -> float:
        raise NotImplementedError


class Constant(Schedule):
    """Formula: 1 after warmup
    Source: the plain baseline; warmup as in nanoGPT, (i + 1) / (warmup + 1).
    Shapes: none.
    """

    Options = Warmup

    def after(self, i: int) -> float:
        return 1.0


class Cosine(Schedule):
    """Formula: floor + (1 - floor) (1 + cos(pi r)) / 2, r from 0 after warmup to 1 at decay_iters, then floor
    Source: Loshchilov and Hutter, arXiv 1608.03983; nanoGPT's form.
    Shapes: none.
    """

    Options = Decay
    options: Decay

    def after(self, i: int) -> float:
        end = iterations(self.options.decay_iters, self.total)
        if i >= end:
            return self.options.min_lr_ratio
        ratio = (i - self.warmup) / (end - self.warmup)
        return self.options.min_lr_ratio + (1 - self.options.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * ratio))


@dataclass(frozen=True)
class WSDOptions(Decay):
    """Options of warmup, stable, decay."""

    decay_start: int | float = opt(0.8, "When the decay begins, in iterations or as a fraction of the run.", ge=0)

    def __post_init__(self) -> None:
        check_times(
            ("warmup_iters", self.warmup_iters), ("decay_iters", self.decay_iters), ("decay_start", self.decay_start)
        )


class WSD(Schedule):
    """Formula: 1 until decay_start, then linear to the floor at decay_iters
    Source: Hu et al., MiniCPM, arXiv 2404.06395.
    Shapes: none.
    """

    Options: type[Decay] = WSDOptions
    options: Decay

    def start(self) -> float:
        assert isinstance(self.options, WSDOptions)
        return max(self.warmup, iterations(self.options.decay_start, self.total))

    def after(self, i: int) -> float:
        start, end = self.start(), iterations(self.options.decay_iters, self.total)
        if i <= start and i < end:
            return 1.0
        if i >= end:
            return self.options.min_lr_ratio
        return 1 - (1 - self.options.min_lr_ratio) * (i - start) / (end - start)


class Linear(WSD):
    """Formula: linear from 1 after warmup to the floor at decay_iters
    Source: Defazio et al., arXiv 2310.07831.
    Shapes: none.
    """

    Options = Decay

    def start(self) -> float:
        return self.warmup
