"""GRAMMAR, section 3: exclude and baseline, what is merged and counted, seeds, names."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Desk, dig

from lab.axes import same
from lab.naming import in_words, short_names

LR = "optimizer.learning_rate"


def grid(axis: str, key: str = LR) -> str:
    return f"sweep: {{grid: {{{key}: {axis}}}}}"


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
    listing = desk.listed(f"model: {{position: off}}\nsweep: {{{TWO}, exclude: {match}}}")
    assert [f"{run.changed['case']} {dig(run.config, LR)}" for run in listing.runs] == left
    assert (listing.expansion.excluded, listing.expansion.cells) == (6 - len(left), len(left))


def test_a_match_may_be_by_label(desk: Desk) -> None:
    text = "grid: {optimizer.learning_rate: {named: {low: 0.1, high: 0.2}}}, groups: {size: {s: {model.n_layer: 1}, m: {}}}"
    listing = desk.listed(
        f"sweep: {{{text}, exclude: {{optimizer.learning_rate: low, size: m}}, baseline: {{size: s}}}}"
    )
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
    listing = desk.listed(text)
    assert [run.cell for run in listing.runs] == ["a, n_layer=4"] * 2 + ["a, n_layer=2"] * 2
    assert (listing.expansion.cells, listing.expansion.duplicates, listing.expansion.excluded) == (2, 4, 0)
    merged = desk.listed(text.replace("seeds: 2", "baseline: {case: b}"))
    assert all(run.baseline for run in merged.runs), "also where the baseline is what was merged"


def test_partly_new_cells_are_no_duplicates(desk: Desk) -> None:
    text = "sweep: {cases: {a: {set: {train.seed: 1}}, b: {set: {train.seed: 2}}}, seeds: 2}"
    listing = desk.listed(text)
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
    by_seeds = desk.listed("sweep: {grid: {model.n_layer: [1, 2]}, seeds: [1, 2]}")
    by_axis = desk.listed("sweep: {grid: {model.n_layer: [1, 2], train.seed: [1, 2]}}")
    for listing in (by_seeds, by_axis):
        assert [run.cell for run in listing.runs] == ["n_layer=1", "n_layer=1", "n_layer=2", "n_layer=2"]
        assert len({run.cell_hash for run in listing.runs}) == listing.expansion.cells == 2
        assert [run.seed for run in listing.runs] == [1, 2, 1, 2]
    assert [run.hash for run in by_seeds.runs] == [run.hash for run in by_axis.runs]
    assert by_seeds.ids == by_axis.ids
    zipped = desk.listed("sweep: {zip: {train.seed: [1, 2], model.n_layer: [1, 2]}}")
    assert [run.cell for run in zipped.runs] == ["n_layer=1", "n_layer=2"]
    excluded = desk.listed("sweep: {grid: {model.n_layer: [1, 2], train.seed: [1, 2]}, exclude: {model.n_layer: 1}}")
    assert (excluded.expansion.excluded, excluded.expansion.cells) == (1, 1)


def test_a_case_that_sets_the_seed_pins_it_against_a_list(desk: Desk) -> None:
    text = "sweep: {seeds: [1, 2], cases: {a: {}, b: {set: {train.seed: 9, model.n_layer: 1}}}}"
    assert [(run.cell, run.seed) for run in desk.listed(text).runs] == [("a", 1), ("a", 2), ("b", 9)]


def test_an_excluded_seed_excludes_no_cell(desk: Desk) -> None:
    listing = desk.listed("sweep: {seeds: 3, exclude: {train.seed: 1338}}")
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
    twice = "model: {sites: {x: {norm: none, optional: true}}}\n" + grid(
        '[["ln_f", "h"], ["ln_f, h"]]', "model.sites.x.match"
    )
    one, two = desk.listed(twice).runs
    assert one.cell == "match=[ln_f, h]" and two.cell == f"match=[ln_f, h] ({two.cell_hash[:4]})"
    listing = desk.listed(grid("[off, none, rmsnorm]", "model.norm"))
    assert [run.cell for run in listing.runs] == ["norm=false", "norm=rmsnorm"] and listing.expansion.duplicates == 1
    twins = desk.listed("sweep: {grid: {tracking.wandb.project: [a, b]}}")
    assert len(twins.runs) == 1 and twins.expansion.duplicates == 1, "where metrics go makes no other run"


def test_a_long_number_is_short_in_a_name_and_whole_in_the_run(desk: Desk) -> None:
    scales = [1.4142135623730951, 1.41421356, 0.1]
    listing = desk.listed("model: {linear: pkl}\n" + grid(str(scales), "model.linear.scale"))
    assert [run.config.model.linear.options.scale for run in listing.runs] == scales
    names = [run.cell for run in listing.runs]
    assert names[0] == "scale=1.41421" and names[1].startswith("scale=1.41421 (") and names[2] == "scale=0.1"
