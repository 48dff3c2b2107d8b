"""GRAMMAR, section 3: the command line, what is listed in a dry run, and limits."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from conftest import Desk, dig

from core.compose import parse_overrides

Front = Callable[..., tuple[int, str, str]]
LR = "optimizer.learning_rate"

# Limits and listing ----------------------------------------------------------------------------------------------------


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
    two = f"grid: {{{LR}: [0.1, 0.2, 0.3]}}, cases: {{a: {{}}, b: {{set: {{model.norm: rmsnorm}}}}}}"
    file = str(desk.write(f"sweep: {{{two}, exclude: {{case: b, {LR}: 0.3}}, seeds: 2}}"))
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
    assert len(desk.listed(SWEPT).runs) == 24
    runs = desk.listed(SWEPT, f"{key}=1").runs
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
        assert {dig(run.config, key) for run in desk.listed(SWEPT, f"{key}=1,8").runs} >= {8}
    assert sorted(set(desk.values(SWEPT, "train.batch_size", "train.batch_size=5,6"))) == [5, 6]
    listing = desk.listed(SWEPT, "model.n_layer=5,6")
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
