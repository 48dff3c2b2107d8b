"""Schedules against their formulas, and what every schedule promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import read, sentence

from core.options import Variant, fields_of, options_of, variant
from variations.schedule import SCHEDULES

RANDOM = settings(derandomize=True, deadline=None, max_examples=50)


@dataclass(frozen=True)
class Chosen:
    """A node for a schedule, as the configuration has one."""

    schedule: Variant = variant("schedule", "cosine", "The schedule.")


def multipliers(name: str, total: int, **options: Any) -> list[float]:
    """The multiplier at every iteration and some after the end."""
    chosen = read(Chosen, {"schedule": {"variant": name, **options}}).schedule
    made = SCHEDULES[name](chosen.options, total)
    return [made.multiplier(i) for i in range(total + 3)]


def known(name: str, **options: Any) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in fields_of(options_of(SCHEDULES[name]))}


@pytest.mark.parametrize("name", SCHEDULES)
@RANDOM
@example(total=40, times=[10, 4, 30], floor=0.1)  # a decay that would begin within the warmup
@given(
    total=st.integers(1, 40),
    times=st.lists(st.integers(0, 45), min_size=3, max_size=3),
    floor=st.floats(0, 1),
)
def test_a_schedule_is_its_formula(name: str, total: int, times: list[int], floor: float) -> None:
    """Iterations as given, in any order of the times: python floats on both sides, a few roundings of 2^-53."""
    warmup, start, end = times
    options = known(name, warmup_iters=warmup, decay_start=start, decay_iters=end, min_lr_ratio=floor)
    given_ = {"warmup": warmup, "decay_start": max(start, warmup), "decay_end": end, "floor": floor}
    formula: Callable[..., float] | None = getattr(reference, name, None)
    assert formula, f"write the formula of '{name}' in tests/reference.py"
    arguments = [given_[k] for k in formula.__code__.co_varnames[1 : formula.__code__.co_argcount]]
    expected = [formula(i, *arguments) for i in range(total + 3)]
    assert multipliers(name, total, **options) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_never_exceeds_the_peak_and_ends_at_the_floor(name: str) -> None:
    got = multipliers(name, 50, **known(name, warmup_iters=10, min_lr_ratio=0.05))
    assert got[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert got[10] == 1.0 and max(got) == 1.0 and min(got) > 0
    assert all(a >= b for a, b in itertools.pairwise(got[10:])), "after warmup it never rises"
    assert got[50] == (0.05 if "min_lr_ratio" in fields_of(options_of(SCHEDULES[name])) else 1.0)
    assert got[-1] == got[50]


@pytest.mark.parametrize("name", SCHEDULES)
def test_fractions_are_of_the_run_and_integers_are_iterations(name: str) -> None:
    by_fraction = known(name, warmup_iters=0.1, decay_start=0.5, decay_iters=0.75)
    by_number = known(name, warmup_iters=4, decay_start=20, decay_iters=30)
    assert multipliers(name, 40, **by_fraction) == pytest.approx(multipliers(name, 40, **by_number))
    short, long = multipliers(name, 40, **by_fraction), multipliers(name, 80, **by_fraction)
    assert short != long[:43]
    one, whole = (multipliers(name, 8, **known(name, warmup_iters=w)) for w in (1, 1.0))
    assert one[0] == 0.5 and whole[7] == pytest.approx(8 / 9), "1 is an iteration, 1.0 the whole run"


def test_the_default_is_a_cosine_to_a_tenth_over_the_run() -> None:
    got = multipliers("cosine", 100)
    assert got[0] == 1.0 and got[50] == pytest.approx(0.55) and got[99] > 0.1 and got[100] == 0.1
    wsd = multipliers("wsd", 100)
    assert wsd[80] == 1.0 and wsd[81] < 1.0 and wsd[90] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"warmup_iters": 100.0},
            "warmup_iters: 100.0 is a fraction of the run and cannot exceed 1.0; write 100 for iterations",
        ),
        ({"decay_iters": 1.5}, "decay_iters: 1.5 is a fraction"),
        ({"decay_start": 2.0}, "decay_start: 2.0 is a fraction"),
        ({"warmup_iters": -1}, "warmup_iters: -1 is not >= 0"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio: 1.5 is not <= 1"),
        ({"min_lr_ratio": None}, "null (off) is not possible here"),
        ({"warmup_iters": True}, "warmup_iters: True is not"),
        ({"warmup": 3}, "Did you mean 'warmup_iters'?"),
    ],
)
def test_times_that_cannot_be_are_told(options: dict[str, Any], words: str) -> None:
    assert words in sentence(lambda: multipliers("wsd", 10, **options))
