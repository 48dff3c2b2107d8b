"""GRAMMAR, section 3: what `search`, `tune` and `stop` may say; and suggestions as pure functions of what is known."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Desk
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.search import Told, suggest
from lab.searching import Confirm, Dimension, Search, Stop, dimension
from lab.sweep import Sweep

LR, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"
OVER = f"{{{LR}: {{log: [1e-4, 1e-2]}}}}"


def read(desk: Desk, words: str, *more: str) -> Sweep:
    return desk.listed(f"sweep: {{{words}}}", *more).expansion.sweep


# Reading --------------------------------------------------------------------------------------------------------------------


def test_the_example_of_the_grammar(desk: Desk) -> None:
    text = """
    slices: {calm_keys: {match: "h.*.attn.qkv[k]", lr_scale: 1.0}}
    sweep:
      grid: {optimizer.learning_rate: {log: [1e-4, 1e-2], num: 5}}
      tune: [optimizer.learning_rate]
      search: {method: tpe, trials: 40, over: {slices.calm_keys.lr_scale: {log: [0.03, 3]}}, confirm: {top: 4, seeds: 5}}
      stop: {method: halving, eta: 3, min_iters: 100}
    """
    listing = desk.listed(text)
    sweep = listing.expansion.sweep
    assert (sweep.tune, sweep.stop) == ((LR,), Stop("halving", 100, 3))
    key = "slices.calm_keys.lr_scale"
    over = (Dimension(key, ("sweep", "search", "over", key), (), 0.03, 3, True),)
    assert sweep.search == Search("tpe", 40, over, Confirm(4, 5))
    assert len(listing.runs) == 5 * (10 + 4) and len(listing.runs) + listing.more_to_come == 5 * (40 + 4 * 5)
    assert {run.phase for run in listing.runs} == {"search"} and len({run.hash for run in listing.runs}) == 5 * 14


def test_without_their_words_there_are_none(desk: Desk) -> None:
    sweep = read(desk, "seeds: 2, search: null, stop: null, tune: null")
    assert (sweep.search, sweep.stop, sweep.tune) == (None, None, ())
    listing = desk.listed("sweep: {seeds: 2}")
    assert listing.more_to_come == 0 and {run.phase for run in listing.runs} == {"grid"}


@pytest.mark.parametrize(
    ("axis", "whole", "ordered", "tried"),
    [
        ({"log": [0.01, 1]}, False, None, (0.01, 1)),
        ({"linear": [4, 1]}, True, None, (1, 4)),
        ({"log": [1, 64]}, True, None, (1, 64)),
        ({"log": [1, 64], "num": 3}, None, True, (1, 8, 64)),
        ({"range": [0.3, 0.1, -0.1]}, None, True, (0.3, 0.2, 0.1)),
        ([3, 1, 2], None, False, (3, 1, 2)),
        ([True, False], None, False, (True, False)),
        (["rmsnorm", "none"], None, False, ("rmsnorm", "none")),
        ({"named": {"low": 0.1, "high": 0.3}}, None, True, ("low", "high")),
    ],
)
def test_stretches_and_choices(axis: Any, whole: bool | None, ordered: bool | None, tried: tuple[Any, ...]) -> None:
    made = dimension("k", axis, ("here",))
    assert made.tried == tried and made.choice(tried[0]).labels == {"k": tried[0]}
    if whole is None:
        assert made.pairs and made.ordered is ordered
    else:
        assert not made.pairs and made.whole is whole
    assert all(made.allows(label) for label in tried) and not made.allows("elsewhere") and not made.allows(None)


def test_a_named_choice_sets_its_value_and_true_is_not_1() -> None:
    assert dimension("k", {"named": {"low": 0.1}}, ()).choice("low").sets == {"k": 0.1}
    both = dimension("k", [1, True, 1.5], ())
    assert (both.index(1), both.index(True)) == (0, 1)


SEARCH = f"method: tpe, trials: 20, over: {OVER}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("search: tpe", "sweep.search: 'tpe' is not a mapping (x.yaml:1)."),
        (f"search: {{{SEARCH}, trails: 3}}", "sweep.search.trails: unknown key (x.yaml:1). Did you mean 'trials'?"),
        (
            f"search: {{method: tpa, trials: 20, over: {OVER}}}",
            "sweep.search.method: no method 'tpa' (x.yaml:1). Did you mean 'tpe'? Known: random, tpe.",
        ),
        (
            f"search: {{method: gp, trials: 20, over: {OVER}}}",
            "sweep.search.method: no method 'gp' (x.yaml:1). Known: random, tpe.",
        ),
        (
            f"search: {{method: tpe, over: {OVER}}}",
            "sweep.search.trials: it has to be said, an integer from 1 to 10,000 (x.yaml:1).",
        ),
        (
            f"search: {{method: tpe, trials: yes, over: {OVER}}}",
            "sweep.search.trials: True is not an integer from 1 to 10,000",
        ),
        ("search: {method: tpe, trials: 20}", "sweep.search.over: None is no mapping of a key to an axis (x.yaml:1)."),
        ("search: {method: tpe, trials: 20, over: {}}", "sweep.search.over: {} is no mapping of a key to an axis"),
        (
            "search: {method: tpe, trials: 20, over: {train.seed: [1, 2]}}",
            "sweep.search.over.train.seed: a seed is not searched, as the best seed is chance (x.yaml:1). Give 'seeds'",
        ),
        (
            "search: {method: tpe, trials: 20, over: {runner.per_device: [1, 2]}}",
            "sweep.search.over.runner.per_device: 'runner.per_device' belongs to the whole sweep",
        ),
        (
            f"search: {{method: tpe, trials: 20, over: {{{LR}: {{log: [0, 1]}}}}}}",
            f"sweep.search.over.{LR}: 'log' needs ends above 0 (x.yaml:1).",
        ),
        (
            f"search: {{method: tpe, trials: 20, over: {{{LR}: {{linear: [1, 1]}}}}}}",
            f"sweep.search.over.{LR}: 'linear' from 1 to 1 leaves nothing to search (x.yaml:1).",
        ),
        (
            "search: {method: tpe, trials: 20, over: {train.batch_size: {linear: [1, 90000000000000000]}}}",
            "sweep.search.over.train.batch_size: whole numbers are searched up to 9,007,199,254,740,992 (x.yaml:1). Write",
        ),
        (
            f"search: {{method: tpe, trials: 20, over: {{{LR}: {{log: [1e-3, 1], nmu: 3}}}}}}",
            f"sweep.search.over.{LR}: 'log' does not go with 'nmu' (x.yaml:1). Did you mean 'num'?",
        ),
        (
            f"search: {{method: tpe, trials: 20, over: {{{LR}: [0.1, 0.1]}}}}",
            f"sweep.search.over.{LR}: the choice 0.1 stands there twice (x.yaml:1).",
        ),
        (
            f"search: {{method: tpe, trials: 20, over: {{{LR}: {{range: [1, 5000, 1]}}}}}}",
            f"sweep.search.over.{LR}: 5,000 choices are more than the 1,000 that are allowed (x.yaml:1). A stretch",
        ),
        (
            f"search: {{method: tpe, trials: 20, over: {{{LR}: {{values: [0.1], when: {{model.bias: true}}}}}}}}",
            f"sweep.search.over.{LR}: 'when' is not possible in a search (x.yaml:1).",
        ),
        (f"search: {{{SEARCH}, confirm: 3}}", "sweep.search.confirm: 3 is not a mapping (x.yaml:1)."),
        (f"search: {{{SEARCH}, confirm: {{top: 30, seeds: 2}}}}", "sweep.search.confirm.top: 30 is not an integer from 1 to 20"),
        (f"search: {{{SEARCH}, confirm: {{top: 2}}}}", "sweep.search.confirm.seeds: it has to be said"),
        (f"search: {{{SEARCH}, confirm: {{top: 2, seed: 2, seeds: 1}}}}", "sweep.search.confirm.seed: unknown key"),
        (f"grid: {{{LR}: [0.1]}}, search: {{{SEARCH}}}", f"sweep.search.over.{LR}: '{LR}' stands in two axes, also in sweep.grid"),
        (
            f"cases: {{a: {{grid: {{{LR}: [0.1]}}}}}}, search: {{{SEARCH}}}",
            f"sweep.cases.a.grid.{LR}: '{LR}' stands in two axes, also in sweep.search.over.{LR} (x.yaml:1).",
        ),
        (
            f"grid: {{train.batch_size: {{values: [1], when: {{{LR}: 0.1}}}}}}, search: {{{SEARCH}}}",
            f"sweep.grid.train.batch_size: its 'when' is about '{LR}', which the search chooses (x.yaml:1).",
        ),
        ("seeds: 2, tune: train.seed", "sweep.tune: 'train.seed' is not a list of keys (x.yaml:1)."),
        (
            f"grid: {{{LR}: [0.1]}}, tune: [optimizer.learning_rat]",
            f"sweep.tune.0: 'optimizer.learning_rat' is not swept (x.yaml:1). Did you mean '{LR}'? Known: {LR}.",
        ),
        ("stop: halving", "sweep.stop: 'halving' is not a mapping (x.yaml:1)."),
        ("stop: {method: halve, min_iters: 9}", "sweep.stop.method: no method 'halve' (x.yaml:1). Did you mean 'halving'?"),
        ("stop: {method: halving}", "sweep.stop.min_iters: it has to be said, an integer of 1 or more (x.yaml:1)."),
        ("stop: {method: halving, min_iters: 9, eta: 1}", "sweep.stop.eta: 1 is not an integer of 2 or more (x.yaml:1)."),
        ("stop: {method: median, min_iters: 9, eta: 2}", "sweep.stop.eta: does not go with the method 'median' (x.yaml:1)."),
        ("stop: {method: median, min_iter: 9, min_iters: 9}", "sweep.stop.min_iter: unknown key (x.yaml:1). Did you mean"),
        (
            "stop: {method: median, min_iters: 9}, objective: {metric: seconds}",
            "sweep.stop: runs are stopped by their validation loss, and the objective is 'seconds' (x.yaml:1). It goes with",
        ),
        (
            "stop: {method: median, min_iters: 10000000}",
            "sweep.stop.min_iters: 10,000,000 iterations are no fewer than the longest run has",
        ),
        ("serach: {}", "sweep.serach: unknown key (x.yaml:1). Did you mean 'search'?"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_with_their_place(desk: Desk, words: str, said: str) -> None:
    told = desk.wrong(f"sweep: {{{words}}}")
    assert any(sentence.startswith(said) for sentence in told), told


def test_every_end_and_every_choice_is_tried_before_anything_starts(desk: Desk) -> None:
    (told,) = desk.wrong(
        "sweep:\n  search:\n    {method: tpe, trials: 20, over: {\n    train.batch_size: {linear: [-3, 4]}}}"
    )
    assert told.startswith("train.batch_size: -3 ") and "(x.yaml:4)" in told
    told, *others = desk.wrong(
        "sweep:\n  search: {method: random, trials: 2, over: {model.norm: [rmsnorm, layernom],\n    model.dropout: [0.1, 1.5]}}"
    )
    assert told.startswith("model.norm: no variant 'layernom' (x.yaml:2). Did you mean 'layernorm'?")
    assert len(others) == 1 and others[0].startswith("model.dropout: 1.5 ") and "(x.yaml:3)" in others[0]


# The command line -----------------------------------------------------------------------------------------------------------

TWO = f"search: {{method: random, trials: 6, over: {{{LR}: {{log: [1e-4, 1e-2]}}, {DECAY}: [0.0, 0.1]}}}}"


def test_a_key_that_is_pinned_leaves_the_search(desk: Desk) -> None:
    sweep = read(desk, f"{TWO}, tune: [{LR}, {DECAY}]", f"{LR}=1e-3")
    assert sweep.search and [d.key for d in sweep.search.over] == [DECAY] and sweep.tune == (DECAY,)
    listing = desk.listed(f"sweep: {{{TWO}}}", f"{LR}=1e-3", f"{DECAY}=0.1")
    assert listing.expansion.sweep.search is None and len(listing.runs) == 1


def test_an_axis_of_the_command_line_takes_the_place_of_what_is_searched(desk: Desk) -> None:
    listing = desk.listed(f"sweep: {{{TWO}, tune: [{LR}]}}", f"{LR}=1e-3,2e-3")
    sweep = listing.expansion.sweep
    assert sweep.search and [d.key for d in sweep.search.over] == [DECAY] and sweep.tune == (LR,)
    assert {run.changed[LR] for run in listing.runs} == {1e-3, 2e-3}


def test_the_command_line_can_change_a_search(desk: Desk) -> None:
    sweep = read(
        desk,
        TWO,
        "sweep.search.trials=9",
        "sweep.search.method=tpe",
        "+sweep.search.confirm.top=1",
        "sweep.search.confirm.seeds=2",
    )
    assert sweep.search and (sweep.search.trials, sweep.search.method) == (9, "tpe")
    assert sweep.search.confirm == Confirm(1, 2)
    assert read(desk, TWO, "sweep.search=null").search is None


# Suggestions ----------------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(1e-5, 1e5).map(lambda x: float(f"{x:.8g}"))
AXES = st.one_of(
    st.tuples(st.sampled_from(["log", "linear"]), st.lists(NUMBERS, min_size=2, max_size=2, unique=True)),
    st.tuples(st.sampled_from(["log", "linear"]), st.lists(st.integers(1, 500), min_size=2, max_size=2, unique=True)),
).map(lambda made: {made[0]: made[1]}) | st.lists(
    st.one_of(st.integers(-5, 5), st.booleans(), st.text(max_size=3), st.floats(0, 1)), min_size=1, max_size=5, unique_by=json.dumps
)  # fmt: skip
SPACES = st.dictionaries(st.sampled_from(["a", "b.c", "b.d", "e"]), AXES, min_size=1)


LATER: dict[str, Any] = {"state": "running", "value": None}
NEVER: dict[str, Any] = {"state": "done", "value": 1e9}


def searches(space: dict[str, Any], method: str, trials: int = 16) -> Search:
    return Search(method, trials, tuple(dimension(key, axis, ()) for key, axis in space.items()))


def carried_out(
    search: Search, words: str, loss: Callable[[dict[str, Any]], float | None], mode: str = "min"
) -> list[Told]:
    """A whole search, one suggestion after another. A loss of None is a failure."""
    known: list[Told] = []
    for number in range(search.trials):
        values = suggest(search, words, number, known, mode)
        value = loss(values)
        known.append(Told(number, values, "failed" if value is None else "done", value))
    return known


@settings(max_examples=25, deadline=None)
@given(SPACES, st.sampled_from(["random", "tpe"]), st.randoms(use_true_random=False))
def test_suggestions_are_in_the_space_and_follow_from_the_results_alone(
    space: dict[str, Any], method: str, chance: random.Random
) -> None:
    search = searches(space, method)
    losses = [chance.choice([chance.random(), None]) for _ in range(search.trials)]
    given_ = iter(losses)
    known = carried_out(search, "cell", lambda values: next(given_))
    for told in known:
        assert set(told.values) == set(space)
        for over in search.over:
            value = told.values[over.key]
            assert over.allows(value)
            if not over.pairs and not over.whole:
                assert value in (over.low, over.high) or value == float(f"{value:.6g}")
    for number in range(search.trials):
        needed = search.needs(number)
        others = [replace(told, **chance.choice([LATER, NEVER])) for told in known[needed:number]]
        blurred = [*known[:needed], *others]
        chance.shuffle(blurred)
        assert suggest(search, "cell", number, blurred) == known[number].values
    other = Search(search.method, search.trials, tuple(reversed(search.over)))
    assert suggest(other, "cell", 3, known[:3]) == known[3].values, "the order of keys in the file says nothing"


def test_what_a_suggestion_waits_for() -> None:
    tpe, chance = searches({"a": {"log": [0.1, 1]}}, "tpe", 100), searches({"a": {"log": [0.1, 1]}}, "random", 100)
    assert [tpe.needs(n) for n in (0, 19, 20, 21, 99)] == [0, 0, 10, 11, 89], "ten random ones, ten on their way"
    assert {chance.needs(n) for n in range(100)} == {0}
    assert [searches({"a": [1]}, "tpe", n).lag for n in (1, 40, 50)] == [4, 4, 5]


def test_cells_and_numbers_have_random_numbers_of_their_own() -> None:
    search = searches({"a": {"linear": [0.0, 1.0]}}, "random", 50)
    made = [t.values["a"] for words in ("one", "two") for t in carried_out(search, words, lambda values: 0.0)]
    assert len(set(made)) == 100 and 0.4 < sum(made) / 100 < 0.6


def quadratic(values: dict[str, Any]) -> float:
    return float(math.log10(values["a"] / 0.02) ** 2 + 3 * (values["b"] - 0.3) ** 2)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_tpe_finds_better_values_than_chance(mode: str) -> None:
    """In forty trials of a bowl in two dimensions, over eight cells; with the wrong sign it would flee from the optimum."""
    sign = 1 if mode == "min" else -1
    space = {"a": {"log": [1e-4, 1.0]}, "b": {"linear": [0.0, 1.0]}}
    best: dict[str, list[float]] = {}
    for method in ("random", "tpe"):
        for cell in range(8):
            known = carried_out(searches(space, method, 40), f"cell {cell}", lambda v: sign * quadratic(v), mode)
            best.setdefault(method, []).append(min(quadratic(dict(told.values)) for told in known))
    wins = sum(ours < chance for ours, chance in zip(best["tpe"], best["random"], strict=True))
    assert wins >= 6, best


def test_tpe_turns_away_from_what_fails() -> None:
    """Where half of the space fails, nearly all later suggestions lie in the other half, though its losses are large."""
    search = searches({"a": {"linear": [0.0, 1.0]}}, "tpe", 40)
    known = carried_out(search, "cell", lambda v: None if v["a"] > 0.5 else 1e6 + v["a"])
    later = [told.state for told in known[20:]]
    assert later.count("failed") <= 3


def test_a_pruned_one_ranks_by_how_far_it_came_then_by_its_loss() -> None:
    """The same as finished ones in that order, as TPE looks at the order alone, as long as some are finished."""
    search = searches({"a": {"linear": [0.0, 1.0]}}, "tpe", 40)
    values = [{"a": i / 20} for i in range(20)]
    order = random.Random(1).sample(range(20), 20)

    def told(i: int) -> tuple[Told, Told]:
        rank = order[i]
        if rank < 10:
            return Told(i, values[i], "done", float(rank)), Told(i, values[i], "done", float(rank))
        if rank < 19:
            state = Told(i, values[i], "pruned", float(rank % 5), 300 - 100 * (rank // 5))
        else:
            state = Told(i, values[i], "failed")
        return state, Told(i, values[i], "done", float(rank))

    pairs = [told(i) for i in range(20)]
    assert suggest(search, "cell", 20, [a for a, _ in pairs]) == suggest(search, "cell", 20, [b for _, b in pairs])


def test_the_same_suggestions_in_another_process_that_prints_nothing(tmp_path: Path) -> None:
    """Also with another seed of Python's hashes."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from lab.search import Told, suggest; from lab.searching import Search, dimension\n"
        "space = {'a': {'log': [0.1, 10]}, 'b': ['x', 'y', 'z'], 'c': {'linear': [1, 9]}}\n"
        "over = tuple(dimension(key, axis, ()) for key, axis in space.items())\n"
        "search, known = Search('tpe', 12, over), []\n"
        "for n in range(12): known.append(Told(n, suggest(search, 'cell', n, known), 'done', n * 7 % 5))\n"
        "import json; print(json.dumps([dict(t.values) for t in known]))\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    made = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code, root],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert [(run.returncode, run.stderr) for run in made] == [(0, "")] * 2
    assert made[0].stdout == made[1].stdout
    space = {"a": {"log": [0.1, 10]}, "b": ["x", "y", "z"], "c": {"linear": [1, 9]}}
    losses = iter(float(n * 7 % 5) for n in range(12))
    here = carried_out(searches(space, "tpe", 12), "cell", lambda values: next(losses))
    assert json.loads(made[0].stdout) == [dict(told.values) for told in here]


def test_chance_is_even_over_what_is_searched() -> None:
    """Whole numbers from 1 to 3 each a third of the time, a logarithmic stretch half of the time below its geometric mean."""
    space = {"n": {"linear": [1, 3]}, "c": ["x", "y"], "l": {"log": [0.01, 1.0]}, "w": {"log": [1, 100]}}
    made = [told.values for told in carried_out(searches(space, "random", 600), "cell", lambda values: 0.0)]
    assert all(160 < sum(v["n"] == n for v in made) < 240 for n in (1, 2, 3))
    assert 250 < sum(v["c"] == "x" for v in made) < 350 and 250 < sum(v["l"] < 0.1 for v in made) < 350
    assert 250 < sum(v["w"] < 10 for v in made) < 350 and min(v["w"] for v in made) == 1
    far = dimension("k", {"linear": [-9e299, 9e299]}, ())
    assert all(far.allows(suggest(Search("random", 9, (far,)), "cell", n, _random(n, far))["k"]) for n in range(3))


def _random(count: int, over: Dimension) -> list[Told]:
    return [Told(i, {over.key: over.low}, "running") for i in range(count)]
