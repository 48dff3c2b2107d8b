"""Suggestions of a search: pure functions of the results known.

The first ones, and all of a random search, are plain random numbers. Those of TPE (Bergstra et al., NeurIPS 2011; multivariate as
in Falkner et al., arXiv 1807.01774) are Optuna's, on a study that is made anew from the results for each.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.axes import Key
from lab.searching import Dimension, Search

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

DIGITS = 6  # of numbers: they are part of the identity of runs, and are read by people
STATES = ("done", "pruned", "failed", "running")


@dataclass(frozen=True)
class Told:
    """What is known of suggestion `number`. `state`: done and pruned have the objective as `value`, pruned also the `iteration`
    at which it was measured; failed is worse than all others, also a run that diverged; running has no result yet."""

    number: int
    values: Mapping[Key, Any]
    state: str
    value: float | None = None
    iteration: int = 0

    def __post_init__(self) -> None:
        assert self.state in STATES
        assert self.state not in ("done", "pruned") or (self.value is not None and math.isfinite(self.value))


def suggest(search: Search, seed_words: str, number: int, known: Sequence[Told], mode: str = "min") -> dict[Key, Any]:
    """Suggestion `number`, from 0, of a search: a label or a number for each key.

    known: what is known of suggestions 0 to number - 1, in any order. Of the last `search.lag` of them only the values are
    used, as if they were running, so that results that happen to be there sooner change nothing. The sampler's seed comes from
    `seed_words` and the number. mode: whether the objective is to be 'min' or 'max'. The same arguments give the same
    suggestion, bit for bit.
    """
    before = sorted(known, key=lambda told: told.number)
    assert [told.number for told in before] == list(range(number)), "every suggestion before has to be known"
    needed = search.needs(number)
    assert all(told.state != "running" for told in before[:needed]), "the first ones have to have ended"
    over = sorted(search.over, key=lambda dimension: dimension.key)  # their order in the file says nothing
    seed = _seed(seed_words, number)
    if not needed:
        params = _drawn(over, random.Random(seed))
    else:
        usable = [told if told.number < needed else Told(told.number, told.values, "running") for told in before]
        params = _asked(over, seed, usable, mode)
    return {dimension.key: _outside(dimension, params[dimension.key]) for dimension in search.over}


def _seed(words: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{words} suggestion {number}".encode()).digest()[:4], "big")


def _drawn(over: Sequence[Dimension], chance: random.Random) -> dict[str, Any]:
    """Random values, even over choices, whole numbers and stretches, or over the logarithms of these."""
    made: dict[str, Any] = {}
    for dimension in over:
        share = chance.random()
        if dimension.pairs:
            made[dimension.key] = int(share * len(dimension.pairs))
            continue
        margin = 0.5 if dimension.whole else 0.0  # every whole number is the middle of a stretch
        low, high = dimension.low - margin, dimension.high + margin
        value = low * (high / low) ** share if dimension.log else low + (high - low) * share
        made[dimension.key] = min(max(round(value), dimension.low), dimension.high) if dimension.whole else value
    return made


def _asked(over: Sequence[Dimension], seed: int, known: Sequence[Told], mode: str) -> dict[str, Any]:
    """What TPE suggests."""
    import optuna  # a third of a second, for those who search

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {dimension.key: _distribution(dimension) for dimension in over}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if mode == "min" else "maximize")
    study.add_trials([_trial(told, over, space) for told in known])
    return study.ask(fixed_distributions=space).params


def _distribution(dimension: Dimension) -> BaseDistribution:
    """What the library searches: numbers as they are, choices by their place."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    count = len(dimension.pairs)
    if count:
        return IntDistribution(0, count - 1) if dimension.ordered else CategoricalDistribution(tuple(range(count)))
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)


def _trial(told: Told, over: Sequence[Dimension], space: dict[str, BaseDistribution]) -> FrozenTrial:
    """What is known, for the library: it ranks finished trials before pruned ones, those by how far they came, and pruned ones
    that never said anything last."""
    from optuna.trial import TrialState, create_trial

    params = {dimension.key: _inside(dimension, told.values[dimension.key]) for dimension in over}
    if told.state == "done":
        return create_trial(state=TrialState.COMPLETE, value=told.value, params=params, distributions=space)
    if told.state == "running":
        return create_trial(state=TrialState.RUNNING, params=params, distributions=space)
    said = {told.iteration: told.value} if told.state == "pruned" and told.value is not None else {}
    return create_trial(state=TrialState.PRUNED, params=params, distributions=space, intermediate_values=said)


def _inside(dimension: Dimension, value: Any) -> Any:
    return dimension.index(value) if dimension.pairs else value if dimension.whole else float(value)


def _outside(dimension: Dimension, value: Any) -> Any:
    """The library's value as a label, or as a number of six significant digits within its bounds."""
    if dimension.pairs:
        return dimension.labels[int(value)]
    if dimension.whole:
        return int(value)
    return min(max(float(f"{value:.{DIGITS}g}"), float(dimension.low)), float(dimension.high))
