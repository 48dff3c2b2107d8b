"""Estimates from few seeds: means, t intervals and p-values, exact for whole degrees of freedom; standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of n values; sd (n - 1) and the t interval `low`..`high` are None for n = 1, where no spread is known."""

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.high is None else self.high - self.mean

    @property
    def p(self) -> float | None:
        """Two-sided p-value of a mean of zero (of differences by seed: the paired t test's); None for n = 1."""
        if self.sd is None:
            return None
        if self.sd == 0:
            return 1.0 if self.mean == 0 else 0.0
        return t_tail(abs(self.mean) / (self.sd / math.sqrt(self.n)), self.n - 1)

    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def finite(value: Any) -> float | None:
    """`value` where it is a finite number, else None (booleans are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """The two-sided quantile of Student's t: |t| stays below it with `probability`.

    Source: for whole degrees of freedom the distribution is a finite sum in the angle atan(t / sqrt(degrees))
    (Abramowitz and Stegun, 26.7.3 and 26.7.4); inverted by bisection.
    Raises: ValueError where the probability is not inside (0, 1) or the degrees are below 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"t_quantile needs 0 < probability < 1 and degrees >= 1, not {probability} and {degrees}.")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < probability else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_inside(angle: float, degrees: int) -> float:
    """P(|t| < tan(angle) sqrt(degrees))."""
    odd, cosine = degrees % 2, math.cos(angle)
    total, term = 0.0, cosine if odd else 1.0
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def t_tail(t: float, degrees: int) -> float:
    """P(|T| > t) of Student's t with whole degrees of freedom, t >= 0: to full precision also where it is tiny.

    Source: near the middle one minus the finite sum of `t_quantile`; further out, where that would cancel, the regularised
    incomplete beta function I_x(degrees / 2, 1 / 2) at x = degrees / (degrees + t^2) (Abramowitz and Stegun, 26.7.1), by
    the hypergeometric series of positive terms (26.5.4 with 15.3.3).
    Raises: ValueError where t is negative or no number, or the degrees are below 1.
    """
    if not t >= 0 or degrees < 1:
        raise ValueError(f"t_tail needs t >= 0 and degrees >= 1, not {t} and {degrees}.")
    if t * t < degrees:
        return 1 - _t_inside(math.atan2(t, math.sqrt(degrees)), degrees)
    if math.isinf(t * t):
        return 0.0
    a, x, away = degrees / 2, degrees / (degrees + t * t), t * t / (degrees + t * t)
    term = total = 1.0
    k = 0
    while term > total * 1e-17:  # each is at most x (1 + 1/(2a)) times the last, and x is a half at most
        term *= x * (a + 0.5 + k) / (a + 1 + k)
        total += term
        k += 1
    beta = math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    return min(1.0, math.exp(a * math.log(x) + 0.5 * math.log(away) - beta) / a * total)


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate | None:
    """Mean, sd and t interval at `level`; None without values."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(1, mean)
    sd = statistics.stdev(values)
    half = t_quantile(level, len(values) - 1) * sd / math.sqrt(len(values))
    return Estimate(len(values), mean, sd, mean - half, mean + half)


def holm(values: Sequence[float | None], comparisons: int) -> list[float | None]:
    """p-values that allow for all of `comparisons`: below 0.05 is then said wrongly of any with at most that chance.

    None (no test was possible) stays None; where such count among the comparisons, the values only become larger.
    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    made: list[float | None] = [None] * len(values)
    reached = 0.0
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    for place, (p, i) in enumerate(known):
        reached = max(reached, min(1.0, p * max(1, comparisons - place)))
        made[i] = reached
    return made
