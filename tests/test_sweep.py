"""GRAMMAR, section 3: what a sweep expands to, sentence by sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Desk, dig
from hypothesis import given
from hypothesis import strategies as st

from core.compose import Composed, parse_overrides
from lab.axes import SweepError, read_values, same
from lab.expand import expand, in_words, short_names
from lab.reading import ConfigReader, default_value
from lab.sweep import SweepReader
from train_args import Config
from variations import CATALOGUE

Front = Callable[..., tuple[int, str, str]]
LR = "optimizer.learning_rate"


def grid(axis: str, key: str = LR) -> str:
    return f"sweep: {{grid: {{{key}: {axis}}}}}"


def pairs(desk: Desk, text: str, *keys: str) -> list[tuple[Any, ...]]:
    """What the keys hold in every run."""
    return [tuple(dig(run.config, key) for key in keys) for run in desk.list(text).runs]


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
    listing = desk.list(grid("{named: {low: 1e-4, high: 1e-2}}"))
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
    (run,) = desk.list("optimizer: {betas: [0.8, 0.9]}\ntracking: {wandb: {tags: [a, b]}}").runs
    assert run.config.tracking.wandb.tags == ("a", "b")
    assert len(desk.list("sweep: {cases: {a: {set: {optimizer.betas: [0.8, 0.9]}}}}").runs) == 1


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
        ("{range: [0, 1e200, 1]}", "at most 1,000,000 are allowed"),
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
    listing = desk.list(SCALES)
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


# Multiplying ----------------------------------------------------------------------------------------------------------------


def test_grid_zip_groups_and_cases_multiply(desk: Desk) -> None:
    text = """
    sweep:
      grid: {train.batch_size: [1, 2]}
      zip: {model.n_embd: [16, 32], model.n_head: [2, 4]}
      groups: {init: {plain: {}, small: {model.init: {variant: normal, std: 0.01}, train.init_seed: 3}}}
      cases: {a: {}, b: {set: {model.norm: rmsnorm}}, c: {grid: {model.dropout: [0.1, 0.2]}}}
    """
    listing = desk.list(text)
    assert len(listing.runs) == 2 * 2 * 2 * (1 + 1 + 2) and listing.expansion.cells == 32
    assert listing.runs[0].cell == "a, batch_size=1, n_embd=16, n_head=2, init=plain"
    assert listing.runs[-1].cell == "c, batch_size=2, n_embd=32, n_head=4, init=small, dropout=0.2"
    assert dict(listing.runs[-1].changed) == {
        "case": "c",
        "train.batch_size": 2,
        "model.n_embd": 32,
        "model.n_head": 4,
        "init": "small",
        "model.dropout": 0.2,
    }
    last = listing.runs[-1].config
    assert (last.model.init.options.std, last.train.init_seed, last.model.n_head) == (0.01, 3, 4)


def test_zip_may_be_a_list_of_blocks_and_needs_equal_lengths(desk: Desk) -> None:
    text = "sweep: {zip: [{model.n_embd: [16, 32], model.n_head: [2, 4]}, {train.batch_size: {range: [1, 3, 1]}}]}"
    assert pairs(desk, text, "model.n_embd", "model.n_head", "train.batch_size") == [
        (16, 2, 1), (16, 2, 2), (16, 2, 3), (32, 4, 1), (32, 4, 2), (32, 4, 3)
    ]  # fmt: skip
    (told,) = desk.wrong("sweep: {zip: {model.n_embd: [16, 32], model.n_head: [2]}}")
    assert told == "sweep.zip: zipped axes need equal lengths: model.n_embd has 2, model.n_head has 1 (x.yaml:1)."
    (told,) = desk.wrong("sweep: {zip: {model.n_embd: {values: [16], when: {model.bias: true}}}}")
    assert "'when' is not possible inside zip" in told


def test_inside_a_case_the_same_words_multiply_within_it(desk: Desk) -> None:
    text = """
    sweep:
      grid: {train.batch_size: [1, 2]}
      cases:
        a: {}
        b:
          grid: {model.bias: [true, false]}
          zip: {model.n_embd: [16, 32], model.n_head: [2, 4]}
          groups: {g: {x: {}, y: {model.norm: none}}}
    """
    cells = desk.cells(text)
    assert len(cells) == 2 * (1 + 2 * 2 * 2) and cells[:2] == ["a, batch_size=1", "a, batch_size=2"]


def test_a_case_that_sets_a_swept_key_pins_it_there(desk: Desk) -> None:
    text = f"sweep: {{grid: {{{LR}: [0.1, 0.2]}}, cases: {{a: {{}}, b: {{set: {{{LR}: 0.5}}}}}}}}"
    listing = desk.list(text)
    assert [(run.cell, dig(run.config, LR)) for run in listing.runs] == [
        ("a, learning_rate=0.1", 0.1), ("a, learning_rate=0.2", 0.2), ("b", 0.5)
    ]  # fmt: skip
    assert listing.expansion.duplicates == 0
    nested = text.replace(f"{LR}: 0.5", "optimizer: {learning_rate: 0.5}")
    assert desk.values(nested, LR) == [0.1, 0.2, 0.5], "also when it is set inside a mapping"
    zipped = "sweep: {zip: {model.n_embd: [16, 32], model.n_head: [2, 4]}, cases: {a: {set: {model.n_head: 1}}}}"
    assert pairs(desk, zipped, "model.n_embd", "model.n_head") == [(16, 1), (32, 1)]


@pytest.mark.parametrize(
    "sweep",
    [
        "{grid: {train.seed: [1]}, zip: {train.seed: [2]}}",
        "{zip: [{train.seed: [1]}, {train.seed: [2]}]}",
        "{grid: {train.seed: [1]}, groups: {g: {a: {train.seed: 3}}}}",
        "{grid: {train.seed: [1]}, cases: {c: {grid: {train.seed: [1]}}}}",
        "{groups: {g: {a: {train: {seed: 1}}}, h: {b: {train.seed: 2}}}}",
        "{grid: {train.seed: [1]}, groups: {train.seed: {a: {}}}}",
    ],
)
def test_one_key_in_two_axes_is_an_error(desk: Desk, sweep: str) -> None:
    (told,) = desk.wrong(f"sweep: {sweep}")
    assert "'train.seed' stands in two axes, also in sweep." in told and "(x.yaml:1)" in told


def test_a_case_cannot_set_its_own_axis(desk: Desk) -> None:
    (told,) = desk.wrong("sweep: {cases: {c: {set: {train.seed: 1}, grid: {train.seed: [1]}}}}")
    assert told.startswith("sweep.cases.c.set.train.seed: 'train.seed' is set here and also an axis of this case")


def test_use_composes_a_preset_for_that_case_only(desk: Desk) -> None:
    desk.preset("base", "model: {norm: rmsnorm}")
    desk.preset("pkl", "defaults: [base, _self_]\nmodel: {linear: {variant: pkl, scale: 0.25}, n_layer: 1}")
    desk.write("train: {batch_size: 3}", "beside.yaml")
    text = """
    model: {n_layer: 2}
    sweep:
      cases:
        baseline: {}
        pkl: {use: presets/pkl, set: {model.linear: {naive_init: true}}, grid: {model.linear.scale: [1.0, 1.25]}}
        both: {use: [presets/pkl, beside]}
    """
    runs = [run.config for run in desk.list(text).runs]
    assert [(c.model.n_layer, c.model.linear.name, c.model.norm.name, c.train.batch_size) for c in runs] == [
        (2, "standard", "layernorm", 12), (1, "pkl", "rmsnorm", 12), (1, "pkl", "rmsnorm", 12), (1, "pkl", "rmsnorm", 3)
    ]  # fmt: skip
    options = [c.model.linear.options for c in runs[1:]]
    assert [(o.scale, o.naive_init) for o in options] == [(1.0, True), (1.25, True), (0.25, False)]


def test_a_preset_in_a_case_is_refused_where_it_says_too_much(desk: Desk) -> None:
    desk.preset("swept", "sweep: {seeds: 2}")
    desk.preset("named", "name: other\ntrain: {seed: 1}")
    desk.preset("wrong", "train:\n  sead: 1")
    text = "sweep:\n  cases:\n    a:\n      use: {0}"
    assert "a preset may not carry a sweep" in desk.wrong(text.replace("{0}", "presets/swept"))[0]
    assert (
        "'presets/named' says 'name', which belongs to the whole sweep"
        in desk.wrong(text.replace("{0}", "presets/named"))[0]
    )
    assert desk.wrong(text.replace("{0}", "presets/worng"))[0].startswith(
        "sweep.cases.a.use: no file 'presets/worng' beside x.yaml or in explorations/ (x.yaml:4). Did you mean 'presets/wrong'?"
    )
    (told,) = desk.wrong(text.replace("{0}", "presets/wrong"))
    assert told.startswith("train.sead: unknown key") and "wrong.yaml:3)" in told


def test_the_order_of_words_does_not_decide_what_a_node_keeps(desk: Desk) -> None:
    """A value inside a node survives an axis over the node, wherever either is written."""
    text = """
    sweep:
      grid: {model.norm.eps: [0.1, 0.2], model.norm: [rmsnorm, layernorm]}
    """
    assert pairs(desk, text, "model.norm", "model.norm.eps") == [
        ("rmsnorm", 0.1), ("layernorm", 0.1), ("rmsnorm", 0.2), ("layernorm", 0.2)
    ]  # fmt: skip
    fixed = "sweep: {grid: {model.norm: [rmsnorm, layernorm]}, cases: {a: {set: {model.norm.eps: 0.3}}}}"
    assert pairs(desk, fixed, "model.norm", "model.norm.eps") == [("rmsnorm", 0.3), ("layernorm", 0.3)]
    assert desk.values(grid("[rmsnorm, layernorm]", "model.norm"), "model.norm.eps", "model.norm.eps=0.4") == [0.4, 0.4]


# exclude, baseline, counts --------------------------------------------------------------------------------------------------

TWO = "grid: {optimizer.learning_rate: [0.1, 0.2, 0.3]}, cases: {a: {}, b: {set: {model.norm: rmsnorm}}}"


@pytest.mark.parametrize(
    ("match", "left"),
    [
        ("{case: b}", ["a 0.1", "a 0.2", "a 0.3"]),
        ("{case: b, optimizer.learning_rate: [0.1, 0.2]}", ["a 0.1", "a 0.2", "a 0.3", "b 0.3"]),
        ("[{case: a}, {model.norm: rmsnorm, optimizer.learning_rate: 2e-1}]", ["b 0.1", "b 0.3"]),
        ("{model.norm: layernorm}", ["b 0.1", "b 0.2", "b 0.3"]),
        ("{model.norm.variant: [layernorm], model.n_layer: 4}", ["b 0.1", "b 0.2", "b 0.3"]),
        ("{optimizer.betas: [0.9, 0.99], case: a}", ["b 0.1", "b 0.2", "b 0.3"]),
        ("{train.init_seed: null, case: [a, c]}", ["b 0.1", "b 0.2", "b 0.3"]),
        ("{model.position: off, case: a}", ["b 0.1", "b 0.2", "b 0.3"]),
        ("{model.position.variant: none, case: a}", ["b 0.1", "b 0.2", "b 0.3"]),
    ],
)
def test_exclude_is_a_partial_match_by_key_or_case_and_a_list_means_any(
    desk: Desk, match: str, left: list[str]
) -> None:
    listing = desk.list(f"model: {{position: off}}\nsweep: {{{TWO}, exclude: {match}}}")
    assert [f"{run.changed['case']} {dig(run.config, LR)}" for run in listing.runs] == left
    assert (listing.expansion.excluded, listing.expansion.cells) == (6 - len(left), len(left))


def test_a_match_may_be_by_label(desk: Desk) -> None:
    text = "grid: {optimizer.learning_rate: {named: {low: 0.1, high: 0.2}}}, groups: {size: {s: {model.n_layer: 1}, m: {}}}"
    listing = desk.list(f"sweep: {{{text}, exclude: {{optimizer.learning_rate: low, size: m}}, baseline: {{size: s}}}}")
    assert [(run.cell, run.baseline) for run in listing.runs] == [
        ("learning_rate=low, size=s", True), ("learning_rate=high, size=s", True), ("learning_rate=high, size=m", False)
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["exclude", "baseline"])
@pytest.mark.parametrize("match", ["{case: d}", "{optimizer.learning_rate: 0.4}", "{model.nrom: rmsnorm}"])
def test_a_match_that_matches_no_run_is_an_error(desk: Desk, word: str, match: str) -> None:
    (told,) = desk.wrong(f"sweep: {{{TWO},\n  {word}: [{{case: b}}, {match}]}}")
    assert told.startswith(f"sweep.{word}.1: '{match[1:-1]}' matches no run (x.yaml:2).")
    assert "case name or label; the sweep has case, optimizer.learning_rate." in told


def test_a_match_that_means_everything_or_is_none_is_an_error(desk: Desk) -> None:
    assert "an empty match would mean every run" in desk.wrong("sweep: {exclude: {}}")[0]
    assert "nothing is left: every run is excluded" in desk.wrong("sweep: {exclude: {model.norm: layernorm}}")[0]
    assert desk.wrong("sweep: {baseline: a}") == [
        "sweep.baseline: 'a' is not a mapping (x.yaml:1). Write key: value, such as {case: a}."
    ]


def test_references_are_compared_by_what_they_resolve_to(desk: Desk) -> None:
    text = 'model: {n_head: "${model.n_layer}"}\nsweep: {grid: {model.n_layer: [1, 2]}, exclude: {model.n_head: 2}}'
    assert desk.values(text, "model.n_layer") == [1]


@pytest.mark.parametrize(
    ("value", "wanted", "holds"),
    [
        (1, 1.0, True), (True, 1, False), (0, False, False), ("pkl", {"variant": "pkl"}, True), (None, None, True),
        ({"variant": "pkl", "scale": 1}, "pkl", True), ({"variant": "pkl", "scale": 1}, {"scale": 1.0}, True),
        ({"variant": "pkl"}, {"scale": 1}, False), ("none", False, True), (False, "off", True), ("off", None, True),
        (None, False, False), ("x", None, False), ([1, 2], [1, 2], True),
    ],
)  # fmt: skip
def test_how_values_compare(value: Any, wanted: Any, holds: bool) -> None:
    assert same(value, wanted) is holds


def test_runs_that_resolve_to_the_same_are_merged_and_counted(desk: Desk) -> None:
    text = "sweep: {grid: {model.n_layer: [4, 4, 2]}, cases: {a: {}, b: {set: {model.norm: layernorm}}}, seeds: 2}"
    listing = desk.list(text)
    assert [run.cell for run in listing.runs] == ["a, n_layer=4"] * 2 + ["a, n_layer=2"] * 2
    assert (listing.expansion.cells, listing.expansion.duplicates, listing.expansion.excluded) == (2, 4, 0)
    merged = desk.list(text.replace("seeds: 2", "baseline: {case: b}"))
    assert all(run.baseline for run in merged.runs), "also where the baseline is what was merged"


def test_partly_new_cells_are_no_duplicates(desk: Desk) -> None:
    text = "sweep: {cases: {a: {set: {train.seed: 1}}, b: {set: {train.seed: 2}}}, seeds: 2}"
    listing = desk.list(text)
    assert [run.seed for run in listing.runs] == [1, 2, 3]
    assert (listing.expansion.cells, listing.expansion.duplicates) == (1, 0)
    assert {run.cell for run in listing.runs} == {"a"}, "one cell has one name"


# seeds ----------------------------------------------------------------------------------------------------------------------


def test_seeds_count_from_the_configured_one_or_are_a_list(desk: Desk) -> None:
    assert desk.values("sweep: {seeds: 3}", "train.seed") == [1337, 1338, 1339]
    assert desk.values("train: {seed: 5}\nsweep: {seeds: 2}", "train.seed") == [5, 6]
    assert desk.values('train: {seed: "${train.batch_size}"}\nsweep: {seeds: 2}', "train.seed") == [12, 13]
    assert desk.values("train: {seed: 5}\nsweep: {seeds: [9, 3]}", "train.seed") == [9, 3]


def test_a_cell_is_a_run_without_its_seed(desk: Desk) -> None:
    by_seeds = desk.list("sweep: {grid: {model.n_layer: [1, 2]}, seeds: [1, 2]}")
    by_axis = desk.list("sweep: {grid: {model.n_layer: [1, 2], train.seed: [1, 2]}}")
    for listing in (by_seeds, by_axis):
        assert [run.cell for run in listing.runs] == ["n_layer=1", "n_layer=1", "n_layer=2", "n_layer=2"]
        assert len({run.cell_hash for run in listing.runs}) == listing.expansion.cells == 2
        assert [run.seed for run in listing.runs] == [1, 2, 1, 2]
    assert [run.hash for run in by_seeds.runs] == [run.hash for run in by_axis.runs]
    assert by_seeds.ids == by_axis.ids
    zipped = desk.list("sweep: {zip: {train.seed: [1, 2], model.n_layer: [1, 2]}}")
    assert [run.cell for run in zipped.runs] == ["n_layer=1", "n_layer=2"]
    excluded = desk.list("sweep: {grid: {model.n_layer: [1, 2], train.seed: [1, 2]}, exclude: {model.n_layer: 1}}")
    assert (excluded.expansion.excluded, excluded.expansion.cells) == (1, 1)


def test_an_excluded_seed_excludes_no_cell(desk: Desk) -> None:
    listing = desk.list("sweep: {seeds: 3, exclude: {train.seed: 1338}}")
    assert [run.seed for run in listing.runs] == [1337, 1339] and listing.expansion.excluded == 0


@pytest.mark.parametrize("seeds", ["0", "-1", "1.5", "true", "x", "[]", "[1, 1]", "[-1]", "[true]", "{a: 1}", "null"])
def test_seeds_that_cannot_be(desk: Desk, seeds: str) -> None:
    (told,) = desk.wrong(f"sweep: {{seeds: {seeds}}}")
    assert told.startswith("sweep.seeds: ") and "(x.yaml:1)" in told


def test_seeds_and_an_axis_over_them_do_not_go_together(desk: Desk) -> None:
    assert "'train.seed' is an axis too" in desk.wrong("sweep: {grid: {train.seed: [1]}, seeds: 2}")[0]
    assert "'train.seed' is an axis too" in desk.wrong("sweep: {cases: {a: {grid: {train.seed: [1]}}}, seeds: 2}")[0]
    assert "train.seed: 'abc' is not an integer" in desk.wrong("train: {seed: abc}\nsweep: {seeds: 2}")[0]


# Names ----------------------------------------------------------------------------------------------------------------------


def test_names_are_shortest_suffixes_that_differ_in_the_whole_sweep(desk: Desk) -> None:
    assert short_names(["a.b.c", "a.d.c", "x.y", "y"]) == {"a.b.c": "b.c", "a.d.c": "d.c", "x.y": "x.y", "y": "y"}
    text = "sweep: {cases: {a: {grid: {model.norm.eps: [0.1]}}, b: {grid: {optimizer.eps: [0.1]}}}}"
    assert desk.cells(text) == ["a, norm.eps=0.1", "b, optimizer.eps=0.1"]
    labels = {"train.seed": 1, "x.l": [None, True, {"a": 1}], "case": "c", "x.m": {"variant": "v"}}
    assert in_words(labels, {"x.l": "l", "x.m": "m"}) == "c, l=[null, true, (a=1)], m=v()"
    assert in_words({}, {}) == "default"


def test_different_cells_have_different_names(desk: Desk) -> None:
    cells = desk.cells(
        "sweep: {grid: {model.sites.x.match: [[ln_f], '[ln_f]']}}".replace("'[ln_f]'", "'ln_f'"),
        "model.sites.x.norm=none",
    )
    assert len(set(cells)) == 2
    listing = desk.list(grid("[off, none, rmsnorm]", "model.norm"))
    assert [run.cell for run in listing.runs] == ["norm=false", "norm=rmsnorm"] and listing.expansion.duplicates == 1
    twins = desk.list("sweep: {grid: {tracking.wandb.project: [a, b]}}")
    assert len(twins.runs) == 1 and twins.expansion.duplicates == 1, "where metrics go makes no other run"


# Later words, limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["search: {method: tpe}", "stop: {method: halving}", "tune: [train.seed]"])
def test_later_words_are_refused(desk: Desk, word: str) -> None:
    assert desk.wrong(f"sweep: {{{word}}}") == [
        f"sweep.{word.partition(':')[0]}: not available yet (x.yaml:1). Leave it out."
    ]


def test_objective_and_max_runs(desk: Desk) -> None:
    sweep = desk.list("sweep: {objective: {metric: best_val_loss}, max_runs: 5}").expansion.sweep
    assert (dict(sweep.objective), sweep.max_runs) == ({"metric": "best_val_loss", "mode": "min"}, 5)
    told = desk.wrong("sweep: {objective: {metric: val_los, mode: least, aim: 1}, max_runs: 0}")
    assert [sentence.partition(" (")[0] for sentence in told] == [
        "sweep.objective.aim: unknown key",
        "sweep.objective.mode: 'least' is not allowed",
        "sweep.objective.metric: no metric 'val_los'",
        "sweep.max_runs: 0 is not an integer of 1 or more",
    ]


@pytest.mark.parametrize("key", ["name", "plugins", "runner.per_device", "run.cell", "sweep.seeds", "defaults"])
def test_what_belongs_to_the_whole_sweep_is_not_swept(desk: Desk, key: str) -> None:
    assert f"'{key}' belongs to the whole sweep" in desk.wrong(f"sweep: {{grid: {{{key}: [1, 2]}}}}")[0]
    assert f"'{key}' belongs to the whole sweep" in desk.wrong(f"sweep: {{cases: {{a: {{set: {{{key}: 1}}}}}}}}")[0]


def test_more_runs_than_max_runs_need_yes_and_a_dry_run_lists_any_number(desk: Desk, front: Front) -> None:
    file = str(desk.write("sweep: {grid: {optimizer.learning_rate: {linear: [0, 1], num: 1001}}}"))
    code, _, told = front("--config", file)
    assert (code, told) == (2, "sweep.max_runs: 1,001 runs are more than 1,000. Start them with --yes.\n")
    assert desk.nothing_made()
    code, listed, _ = front("--config", file, "--dry-run", "--json")
    assert code == 0 and len(json.loads(listed)["runs"]) == 1001
    code, _, told = front(
        "--config", file, "sweep.max_runs=1000000", "optimizer.learning_rate=0.1,0.2", "sweep.max_runs=1"
    )
    assert (code, told) == (2, "sweep.max_runs: 2 runs are more than 1. Start them with --yes.\n")
    assert desk.nothing_made()


def test_the_dry_run_in_json_has_exactly_these_keys(desk: Desk, front: Front) -> None:
    file = str(desk.write(f"sweep: {{{TWO}, exclude: {{case: b, {LR}: 0.3}}, seeds: 2}}"))
    code, listed, told = front("--config", file, "--dry-run", "--json")
    made = json.loads(listed)
    assert (code, told, list(made)) == (0, "", ["cells", "excluded", "duplicates", "done", "runs"])
    assert (made["cells"], made["excluded"], made["duplicates"], made["done"], len(made["runs"])) == (5, 1, 0, 0, 10)
    assert all(list(run) == ["run_id", "cell", "seed", "changed", "config"] for run in made["runs"])
    first = made["runs"][0]
    assert (first["cell"], first["seed"], first["changed"]) == ("a, learning_rate=0.1", 1337, {"case": "a", LR: 0.1})
    assert first["run_id"].startswith("a+learning_rate=0.1+seed=1337-")
    assert (
        first["config"]["optimizer"]["learning_rate"] == 0.1
        and first["config"]["model"]["norm"]["variant"] == "layernorm"
    )
    assert len({run["run_id"] for run in made["runs"]}) == 10 and desk.nothing_made()
    code, listed, _ = front("--config", file, "--dry-run")
    assert code == 0 and all(run["run_id"] in listed for run in made["runs"]) and "5 cells" in listed


# The command line -----------------------------------------------------------------------------------------------------------


def test_key_value_sets(desk: Desk) -> None:
    text = "train: {batch_size: 2}\nmodel: {norm: {variant: rmsnorm, eps: 0.5}}"
    config = desk.config(text, "train.batch_size=3", "model.norm.gain=false", "+model.n_layer=1", "++train.seed=4")
    assert (config.train.batch_size, config.model.n_layer, config.train.seed) == (3, 1, 4), (
        "no + is needed, none is wrong"
    )
    assert (config.model.norm.options.eps, config.model.norm.options.gain) == (0.5, False)
    assert desk.config(text, "model.norm=layernorm").model.norm.options.eps == 1e-5
    assert desk.config(text, "model={n_layer: 2, norm: {variant: layernorm}}").model.n_layer == 2
    assert desk.config(text, "optimizer.learning_rate=1e-2", "train.grad_clip=null").train.grad_clip is None
    assert desk.config(text, "train.seed=1", "train.seed=2").train.seed == 2, "the last one wins"
    assert desk.config(text, "tracking.wandb.tags=[a,b]").tracking.wandb.tags == ("a", "b"), (
        "a list in brackets is a value"
    )
    assert desk.config(text, "model.mlp.width='${model.n_embd}'").model.mlp.options.width == 128


SWEPT = """
    sweep:
      grid: {train.batch_size: [1, 2]}
      zip: {model.n_embd: [16, 32], model.n_head: [2, 4]}
      groups: {g: {a: {train.eval_iters: 1}, b: {train.eval_iters: 2, model.bias: false}}}
      cases: {x: {set: {model.n_layer: 1}}, y: {grid: {model.n_layer: [2, 3]}}}
"""


@pytest.mark.parametrize(
    ("key", "left"), [("train.batch_size", 12), ("model.n_head", 24), ("train.eval_iters", 24), ("model.n_layer", 16)]
)
def test_key_value_pins_also_over_axes_and_in_cases(desk: Desk, key: str, left: int) -> None:
    assert len(desk.list(SWEPT).runs) == 24
    runs = desk.list(SWEPT, f"{key}=1").runs
    assert {dig(run.config, key) for run in runs} == {1}
    assert not any(key in run.changed for run in runs)
    # n_layer: case y's own axis goes, and both cases become the same runs.
    assert len(runs) == (8 if key == "model.n_layer" else left)


def test_a_pin_inside_a_mapping_pins_too(desk: Desk) -> None:
    assert set(desk.values(SWEPT, "train.batch_size", "train={batch_size: 7}")) == {7}


def test_key_with_commas_adds_or_replaces_an_axis(desk: Desk) -> None:
    assert desk.values("{}", "train.batch_size", "train.batch_size=1,2,3") == [1, 2, 3]
    assert desk.cells("{}", "model.norm=rmsnorm,none") == ["norm=rmsnorm", "norm=none"]
    for key in ("train.batch_size", "model.n_head", "model.n_layer"):
        assert {dig(run.config, key) for run in desk.list(SWEPT, f"{key}=1,8").runs} >= {8}
    assert sorted(set(desk.values(SWEPT, "train.batch_size", "train.batch_size=5,6"))) == [5, 6]
    listing = desk.list(SWEPT, "model.n_layer=5,6")
    assert {(run.changed["case"], run.config.model.n_layer) for run in listing.runs} == {("x", 1), ("y", 5), ("y", 6)}
    assert desk.values("sweep: {seeds: 2}", "train.seed", "train.seed=7,9") == [7, 9]
    assert desk.values("sweep: {seeds: [1, 2]}", "train.seed", "train.seed=7") == [7]
    assert desk.values("sweep: {seeds: 2}", "train.seed", "train.seed=7") == [7, 8]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("train.batch_size=range(1,4)", [1, 2, 3]),
        ("train.batch_size=range(3)", [0, 1, 2][1:]),
        ("train.batch_size=range(1,10,4)", [1, 5, 9]),
        ("train.batch_size=choice(4,2)", [4, 2]),
        ("train.batch_size=sort(4,2)", [2, 4]),
    ],
)
def test_hydras_grammar_with_hydras_meaning(desk: Desk, word: str, values: list[int]) -> None:
    if word.endswith("range(3)"):
        assert "0 is not >= 1 (command line)" in desk.wrong("{}", word)[0], (
            "Hydra's range starts at 0 and excludes its end"
        )
    else:
        assert desk.values("{}", "train.batch_size", word) == values


def test_brackets_are_quoted_as_hydra_wants(desk: Desk) -> None:
    (setting,) = parse_overrides(['slices.mine.match="h.*.attn.qkv[k]"'])
    assert (setting.path, setting.values) == (("slices", "mine", "match"), ("h.*.attn.qkv[k]",))
    site = desk.config("{}", 'model.sites.mine.match="h.{0..1}.attn.qkv"', "model.sites.mine.linear=pkl").model.sites[
        "mine"
    ]
    assert (site.match, site.linear.name) == ("h.{0..1}.attn.qkv", "pkl"), "a new site needs no +"
    (told,) = desk.wrong("{}", 'model.sites.mine.match="g.{0..1}.attn.qkv"', "model.sites.mine.linear=pkl")
    assert told.startswith("model.sites.mine: ") and "(command line)" in told


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("train.batch_size", "cannot be read (command line)"),
        ("train.batch_size=[1", "cannot be read (command line)"),
        ("a.b[c]=1", "cannot be read (command line)"),
        ("train.batch_size=glob(*)", "only lists, choice() and range() make an axis (command line)."),
        ("train.batch_size=interval(1,2)", "only lists, choice() and range() make an axis (command line)."),
        ("presets@train=x", "the command line sets keys of the configuration, not files (command line)."),
        ("train.batchsize=1", "train.batchsize: unknown key (command line). Did you mean 'batch_size'?"),
        ("train.batch_size=x", "train.batch_size: 'x' is not an integer (command line)."),
        ("train.batch_size=0,1", "train.batch_size: 0 is not >= 1 (command line)."),
        ("name=a,b", "'name' belongs to the whole sweep"),
        ("sweep.grid=3", "sweep.grid: 3 is not a mapping (command line)."),
    ],
)
def test_a_word_that_cannot_be_is_told(desk: Desk, word: str, words: str) -> None:
    (told,) = desk.wrong("train: {seed: 1}", word)
    assert words in told


def test_every_wrong_word_is_told_at_once(desk: Desk) -> None:
    assert len(desk.wrong("{}", "a[", "b", "c=d=[")) == 3


def test_no_file_is_one_run_of_the_defaults(desk: Desk, front: Front) -> None:
    code, listed, _ = front("model.n_layer=2", "--dry-run", "--json")
    (run,) = json.loads(listed)["runs"]
    assert (code, run["config"]["model"]["n_layer"], run["config"]["name"], run["cell"]) == (0, 2, "default", "default")


# The whole example ----------------------------------------------------------------------------------------------------------

EXAMPLE = """
    sweep:
      grid: {optimizer.learning_rate: {log: [1e-4, 1e-2], num: 5}, optimizer.weight_decay: [0.1, 0.3, 1.0]}
      zip: {model.n_embd: [128, 256], model.n_head: [4, 8]}
      groups:
        init: {plain: {}, small_v: {model.sites.v: {match: "h.*.attn.qkv", init: {variant: normal, std: 0.01}}}}
      cases:
        baseline: {}
        pkl: {use: presets/pkl, set: {model.linear: {variant: pkl}}, grid: {model.linear.scale: [1.0, 1.25, 1.4142]}}
      exclude: [{case: pkl, optimizer.learning_rate: [1e-4, 3.16228e-4]}]
      baseline: {case: baseline}
      seeds: 3
      objective: {metric: val_loss, mode: min}
"""


def test_the_example_of_the_grammar(desk: Desk) -> None:
    desk.preset("pkl", "model: {linear: {variant: pkl, scale: 0.25}, tie_weights: false}")
    listing = desk.list(EXAMPLE)
    outer = 3 * 2 * 2
    assert listing.expansion.cells == outer * (5 + 3 * 3) and listing.expansion.excluded == outer * 2 * 3
    assert len(listing.runs) == 3 * listing.expansion.cells and listing.expansion.duplicates == 0
    assert sum(run.baseline for run in listing.runs) == 3 * outer * 5
    last = listing.runs[-1]
    assert last.cell == "pkl, learning_rate=0.01, weight_decay=1.0, n_embd=256, n_head=8, init=small_v, scale=1.4142"
    assert (last.config.model.linear.options.scale, last.config.model.tie_weights) == (1.4142, False)


def test_a_list_is_an_axis_of_its_elements() -> None:
    assert read_values([1, [2], {"range": [1, 2, 1]}]).pairs == ((1, 1), ([2], [2]), ({"range": [1, 2, 1]},) * 2)
    with pytest.raises(SweepError):
        read_values("abc")


# Against a slow enumeration -------------------------------------------------------------------------------------------------

KEYS = (
    "train.batch_size",
    "train.eval_iters",
    "train.eval_interval",
    "train.eval_batch_size",
    "train.seed",
    "train.init_seed",
)
VALUES = st.lists(st.integers(1, 3), min_size=1, max_size=3)
Rows = list[dict[str, int]]


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[dict[str, Any], Rows]:
    """A sweep and, enumerated in the plainest way, what each of its points sets."""
    keys = draw(st.permutations(KEYS))
    one, two, three, four, five = keys[:5]
    grid_, zipped, inner = (
        draw(VALUES),
        draw(st.lists(st.tuples(*[st.integers(1, 3)] * 2), min_size=1, max_size=3)),
        draw(VALUES),
    )
    group: list[dict[str, int]] = [{}, {four: draw(st.integers(1, 3))}]
    pinned = draw(st.booleans())
    sets = {one: draw(st.integers(1, 3))} if pinned else {}
    sweep = {
        "grid": {one: grid_},
        "zip": {two: [a for a, _ in zipped], three: [b for _, b in zipped]},
        "groups": {"g": {"x": group[0], "y": group[1]}},
        "cases": {"plain": {}, "more": {"set": sets, "grid": {five: inner}}},
    }
    rows = [
        {one: a, two: b, three: c, **g, **case}
        for case, firsts in [({}, grid_), *(({five: v}, [sets[one]] if pinned else grid_) for v in inner)]
        for a in firsts
        for b, c in zipped
        for g in group
    ]
    return sweep, rows


@given(sweeps())
def test_the_runs_are_those_of_a_plain_enumeration(made: tuple[dict[str, Any], Rows]) -> None:
    given_, rows = made
    meta = SimpleNamespace(content_hash="c", vocab_size=9)
    corpus = SimpleNamespace(meta=meta, train=range(999), val=range(999))
    reader = ConfigReader(CATALOGUE, lambda data: corpus, lambda model: None)
    sweep_reader = SweepReader(lambda name: Composed({}, {}, Path()))
    expansion, wrong = expand({}, sweep_reader.read(given_), {}, reader, partial(default_value, CATALOGUE))
    assert not sweep_reader.mistakes and not wrong
    default = {key: dig(Config(), key) for key in KEYS}
    wanted = {tuple({**default, **row}[key] for key in KEYS) for row in rows}
    listed = [tuple(dig(run.config, key) for key in KEYS) for run in expansion.runs]
    assert set(listed) == wanted and len(listed) == len(wanted)
    seed = KEYS.index("train.seed")
    assert expansion.cells == len({row[:seed] + row[seed + 1 :] for row in wanted})
    assert len({(run.cell, run.cell_hash) for run in expansion.runs}) == expansion.cells
    assert len({run.cell for run in expansion.runs}) == expansion.cells
