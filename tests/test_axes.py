"""GRAMMAR, section 3: what an axis lists, and where it counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from conftest import Desk, dig
from hypothesis import given
from hypothesis import strategies as st

from lab.axes import SweepError, read_values

LR = "optimizer.learning_rate"


def grid(axis: str, key: str = LR) -> str:
    return f"sweep: {{grid: {{{key}: {axis}}}}}"


def pairs(desk: Desk, text: str, *keys: str) -> list[tuple[Any, ...]]:
    """What the keys hold in every run."""
    return [tuple(dig(run.config, key) for key in keys) for run in desk.listed(text).runs]


# Axes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("[1e-3, 2, 0.5]", [1e-3, 2.0, 0.5]),
        ("{range: [0.1, 0.3, 0.1]}", [0.1, 0.2, 0.3]),
        ("{range: [0.3, 0.1, -0.1]}", [0.3, 0.2, 0.1]),
        ("{range: [0, 1, 0.3]}", [0.0, 0.3, 0.6, 0.9]),
        ("{range: [1e-5, 3e-5, 1e-5]}", [1e-5, 2e-5, 3e-5]),
        ("{log: [1e-4, 1e-2], num: 5}", [1e-4, 3.16228e-4, 1e-3, 3.16228e-3, 1e-2]),
        ("{log: [1e-2, 1e-4], num: 3}", [1e-2, 1e-3, 1e-4]),
        ("{linear: [0.1, 0.2], num: 4}", [0.1, 0.133333, 0.166667, 0.2]),
        ("{linear: [1, 2], num: 1}", [1.0]),
        ("{named: {low: 1e-4, high: 1e-2}}", [1e-4, 1e-2]),
        ("{values: [1e-4, 1e-2]}", [1e-4, 1e-2]),
    ],
)
def test_the_forms_of_an_axis(desk: Desk, axis: str, values: list[float]) -> None:
    assert desk.values(grid(axis), LR) == values


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("{range: [16, 64, 16]}", [16, 32, 48, 64]),
        ("{log: [16, 256], num: 5}", [16, 32, 64, 128, 256]),
        ("{linear: [16, 64], num: 4}", [16, 32, 48, 64]),
    ],
)
def test_whole_ends_give_whole_values(desk: Desk, axis: str, values: list[int]) -> None:
    made = desk.values(grid(axis, "model.n_embd"), "model.n_embd")
    assert made == values and all(type(v) is int for v in made)


@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 30), st.integers(0, 6))
def test_a_range_has_exact_decimals_and_includes_its_end(first: int, step: int, count: int, digits: int) -> None:
    def number(n: int) -> float:
        return float(f"{n}e-{digits}")

    axis = {"range": [number(first), number(first + step * (count - 1)), number(step)]}
    assert [v for _, v in read_values(axis).pairs] == [number(first + step * i) for i in range(count)]


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9), st.sampled_from(["log", "linear"]))
def test_spaced_values_are_even_to_six_digits_with_their_ends_as_given(a: float, b: float, num: int, form: str) -> None:
    made = [v for _, v in read_values({form: [a, b], "num": num}).pairs]
    assert (made[0], made[-1], len(made)) == (a, b, num)
    for i, value in enumerate(made):
        r = i / (num - 1)
        exact = a ** (1 - r) * b**r if form == "log" else a * (1 - r) + b * r
        assert math.isclose(value, exact, rel_tol=6e-6), "half a unit of the sixth digit"
        assert i in (0, num - 1) or value == float(f"{value:.6g}")


def test_labels_appear_in_names_and_tables(desk: Desk) -> None:
    listing = desk.listed(grid("{named: {low: 1e-4, high: 1e-2}}"))
    assert [run.cell for run in listing.runs] == ["learning_rate=low", "learning_rate=high"]
    assert [dict(run.changed) for run in listing.runs] == [{LR: "low"}, {LR: "high"}]
    assert listing.ids[listing.runs[0].hash] == f"learning_rate=low-{listing.runs[0].hash}"


def test_lists_and_mappings_inside_an_axis_are_literal(desk: Desk) -> None:
    assert desk.values(grid("[[0.8, 0.9], [0.9, 0.99]]", "optimizer.betas"), "optimizer.betas") == [
        (0.8, 0.9),
        (0.9, 0.99),
    ]
    text = grid("[standard, {variant: pkl, scale: 0.5}]", "model.linear")
    assert desk.cells(text) == ["linear=standard", "linear=pkl(scale=0.5)"]
    (told,) = desk.wrong(grid("[{range: [1, 2, 1]}]"))
    assert "is not a number (x.yaml:1). A form stands for a whole axis; inside a list it is a plain value." in told


def test_only_axes_expand(desk: Desk) -> None:
    (run,) = desk.listed("optimizer: {betas: [0.8, 0.9]}\ntracking: {wandb: {tags: [a, b]}}").runs
    assert run.config.tracking.wandb.tags == ("a", "b")
    assert len(desk.listed("sweep: {cases: {a: {set: {optimizer.betas: [0.8, 0.9]}}}}").runs) == 1


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("3", "3 is no axis"),
        ("[]", "the axis has no values"),
        ("{}", "a mapping as an axis is one of the forms"),
        ("{logs: [1, 2], num: 3}", "Did you mean 'log'?"),
        ("{log: [1, 2]}", "'log' needs 'num'"),
        ("{log: [0, 2], num: 2}", "'log' needs ends above 0"),
        ("{range: [1, 2]}", "'range' takes 3 finite numbers"),
        ("{range: [1, 2, 0]}", "a step of 0 never leads from 1 to 2"),
        ("{range: [2, 1, 1]}", "a step of 1 never leads from 2 to 1"),
        ("{range: [0, 1e200, 1]}", "at most 100,000 are allowed"),
        ("{range: [1, 2, 1], num: 2}", "'range' does not go with 'num'"),
        ("{range: [1, .inf, 1]}", "'range' takes 3 finite numbers"),
        ("{named: [1, 2]}", "'named' takes a mapping"),
        ("{values: 3}", "'values' takes a list"),
        ("{values: [3], when: 4}", "'when' a mapping"),
        ("{log: [1, 2], num: 2, when: {train.seed: 1}}", "'log' does not go with 'when'"),
    ],
)
def test_an_axis_that_cannot_be_is_a_sentence(desk: Desk, axis: str, words: str) -> None:
    (told,) = desk.wrong(f"train: {{seed: 1}}\n{grid(axis)}")
    assert told.startswith(f"sweep.grid.{LR}: ") and words in told and "(x.yaml:2)" in told


# when -----------------------------------------------------------------------------------------------------------------------

SCALES = """
    model: {head: {variant: pkl, scale: 3}, tie_weights: false}
    sweep:
      grid:
        model.linear.scale: {values: [0.5, 1.5], when: {model.linear: pkl}}
        model.linear: [standard, pkl]
"""


def test_elsewhere_the_key_keeps_its_base_value(desk: Desk) -> None:
    listing = desk.listed(SCALES)
    assert [run.cell for run in listing.runs] == [
        "linear=standard",
        "linear=pkl, scale=0.5",
        "linear=pkl, scale=1.5",
    ]
    assert dict(listing.runs[0].changed) == {"model.linear": "standard"}
    when = "{values: [7, 8], when: {optimizer.learning_rate: 0.1}}"
    text = (
        f"train: {{batch_size: 5}}\nsweep: {{grid: {{train.batch_size: {when}, optimizer.learning_rate: [0.1, 0.2]}}}}"
    )
    assert pairs(desk, text, LR, "train.batch_size") == [(0.1, 7), (0.1, 8), (0.2, 5)]


def test_a_condition_may_be_about_a_default_a_case_a_label_a_pin_or_another_condition(desk: Desk) -> None:
    def seeds(when: str, rest: str = "", *words: str) -> list[int]:
        text = f"sweep: {{grid: {{train.data_seed: {{values: [7, 8], when: {when}}}}}{rest}}}"
        return desk.values(text, "train.data_seed", *words)

    assert seeds("{model.norm: layernorm, model.bias: true}") == [7, 8]
    assert seeds("{case: b}", ", cases: {a: {}, b: {}}") == [None, 7, 8]
    assert seeds("{size: small}", ", groups: {size: {small: {model.n_layer: 1}, big: {}}}") == [7, 8, None]
    assert seeds("{model.norm: rmsnorm}", ", cases: {a: {set: {model.norm: none}}}", "model.norm=rmsnorm") == [7, 8]
    text = """
    sweep:
      grid:
        train.init_seed: {values: [5], when: {train.data_seed: 8}}
        train.data_seed: {values: [7, 8], when: {model.bias: false}}
        model.bias: [true, false]
    """
    assert pairs(desk, text, "train.data_seed", "train.init_seed") == [(None, None), (7, None), (8, 5)]


def test_a_condition_that_never_holds_is_an_error(desk: Desk) -> None:
    (told,) = desk.wrong(grid("{values: [1], when: {model.nrom: rmsnorm}}"))
    assert "its condition, 'model.nrom: rmsnorm', holds in no run (x.yaml:1)." in told
    text = """
    sweep:
      grid:
        train.init_seed: {values: [5], when: {train.data_seed: 8}}
        train.data_seed: {values: [8], when: {train.init_seed: 5}}
    """
    assert "its 'when' is about an axis whose own 'when' is about this one (x.yaml:3)" in desk.wrong(text)[0]


def test_a_list_is_an_axis_of_its_elements() -> None:
    assert read_values([1, [2], {"range": [1, 2, 1]}]).pairs == ((1, 1), ([2], [2]), ({"range": [1, 2, 1]},) * 2)
    with pytest.raises(SweepError):
        read_values("abc")
