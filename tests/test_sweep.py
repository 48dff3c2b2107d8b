"""GRAMMAR, section 3: what a sweep expands to, sentence by sentence."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Desk, dig
from hypothesis import given
from hypothesis import strategies as st

from core.trees import Composed
from lab.expand import expand
from lab.reading import ConfigReader, default_value
from lab.sweep import SweepReader
from train_args import Config
from variations import CATALOGUE

LR = "optimizer.learning_rate"


def grid(axis: str, key: str = LR) -> str:
    return f"sweep: {{grid: {{{key}: {axis}}}}}"


def pairs(desk: Desk, text: str, *keys: str) -> list[tuple[Any, ...]]:
    """What the keys hold in every run."""
    return [tuple(dig(run.config, key) for key in keys) for run in desk.listed(text).runs]


# Multiplying ----------------------------------------------------------------------------------------------------------------


def test_grid_zip_groups_and_cases_multiply(desk: Desk) -> None:
    text = """
    sweep:
      grid: {train.batch_size: [1, 2]}
      zip: {model.n_embd: [16, 32], model.n_head: [2, 4]}
      groups: {init: {plain: {}, small: {model.init: {variant: normal, std: 0.01}, train.init_seed: 3}}}
      cases: {a: {}, b: {set: {model.norm: rmsnorm}}, c: {grid: {model.dropout: [0.1, 0.2]}}}
    """
    listing = desk.listed(text)
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
    listing = desk.listed(text)
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
    runs = [run.config for run in desk.listed(text).runs]
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


# The rest ------------------------------------------------------------------------------------------------------------------


def test_objective_and_max_runs(desk: Desk) -> None:
    sweep = desk.listed("sweep: {objective: {metric: best_val_loss}, max_runs: 5}").expansion.sweep
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
    listing = desk.listed(EXAMPLE)
    outer = 3 * 2 * 2
    assert listing.expansion.cells == outer * (5 + 3 * 3) and listing.expansion.excluded == outer * 2 * 3
    assert len(listing.runs) == 3 * listing.expansion.cells and listing.expansion.duplicates == 0
    assert sum(run.baseline for run in listing.runs) == 3 * outer * 5
    last = listing.runs[-1]
    assert last.cell == "pkl, learning_rate=0.01, weight_decay=1.0, n_embd=256, n_head=8, init=small_v, scale=1.4142"
    assert (last.config.model.linear.options.scale, last.config.model.tie_weights) == (1.4142, False)


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
