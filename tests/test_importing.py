"""Exploration files of ReaLLM-Forge: the combinations that they stand for, worked out by hand, and the files that they become."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Desk, dig

from core.yaml_files import ConfigError
from lab import importing
from lab.importing import dialect
from lab.importing.dialect import read_exploration
from lab.importing.grid import Part, Rows, components, conditions, named, plan
from lab.importing.missing import is_bookkeeping, is_off
from lab.listing import Listing, open_listing


@pytest.fixture
def combinations(desk: Desk) -> Callable[..., list[dict[str, Any]]]:
    def expand(text: str, name: str = "x.yaml", **choices: Any) -> list[dict[str, Any]]:
        return [dict(c) for c in read_exploration(desk.write(text, name), **choices).combinations]

    return expand


def imported(desk: Desk, text: str, *words: str, name: str = "x.yaml") -> tuple[int, str]:
    """The exit code and the text of the file that an exploration becomes."""
    parser = argparse.ArgumentParser()
    importing.arguments(parser)
    output = desk.folder / "out.yaml"
    code = importing.act(parser.parse_args([str(desk.write(text, name)), "--output", str(output), "--force", *words]))
    return code, output.read_text()


def runs_of(desk: Desk, text: str, *words: str) -> Listing:
    """What the file that an exploration becomes stands for."""
    code, _ = imported(desk, text, *words)
    assert code == 0
    return open_listing(desk.folder / "out.yaml", ())


def held(listing: Listing, *keys: str) -> set[tuple[Any, ...]]:
    return {tuple(dig(run.config, key) for key in keys) for run in listing.runs}


def refused(desk: Desk, text: str, *words: str, name: str = "x.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        imported(desk, text, *words, name=name)
    return "\n".join(caught.value.sentences)


# The dialect ----------------------------------------------------------------------------------------------------------------


def test_lists_multiply_and_single_values_hold(combinations: Callable[..., Any]) -> None:
    made = combinations("n_layer: [1, 2]\nbias: true\ndropout: ['0.1', 0.2]")
    assert made == [
        {"n_layer": 1, "bias": True, "dropout": "0.1"},
        {"n_layer": 1, "bias": True, "dropout": 0.2},
        {"n_layer": 2, "bias": True, "dropout": "0.1"},
        {"n_layer": 2, "bias": True, "dropout": 0.2},
    ]


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("{start: 2, end: 4}", [2, 3, 4]),
        ("{start: 2, end: 7, step: 2}", [2, 4, 6]),
        (
            "{start: 5, end: 1, step: -1}",
            [5, 4, 3],
        ),  # a countdown stops two before its end, as Python's range with end + 1
        ("{start: 0.1, end: 0.3}", [0.1, 0.2, 0.1 + 2 * 0.1]),
        ("{start: 0.5, end: 2, step: 0.5}", [0.5, 1.0, 1.5, 2.0]),
    ],
)
def test_ranges(combinations: Callable[..., Any], form: str, values: list[Any]) -> None:
    assert [c["x"] for c in combinations(f"x: {{range: {form}}}")] == values


def test_a_list_of_mappings_and_documents_are_unions(combinations: Callable[..., Any]) -> None:
    union = [{"n_layer": 1}, {"n_layer": 2}, {"n_head": 3}]
    assert combinations("- n_layer: [1, 2]\n- n_head: [3]") == union
    assert combinations("---\nn_layer: [1, 2]\n---\nn_head: [3]") == union
    assert combinations('[{"n_layer": [1, 2]},\t{"n_head": [3]}]', "x.json") == union


def test_numbers_are_texts_in_yaml_and_numbers_in_json(combinations: Callable[..., Any]) -> None:
    assert combinations("x: [1e-3]") == [{"x": "1e-3"}]
    assert combinations('[{"x": [1e-3]}]', "x.json") == [{"x": 0.001}]


def test_conditions_are_a_mapping_for_all_and_a_list_of_mappings_for_any(combinations: Callable[..., Any]) -> None:
    text = "a: [1, 2]\nb: [true, false]\nc: {conditions: %s, options: [7, 8]}"
    both = [
        {"a": 1, "b": True, "c": 7},
        {"a": 1, "b": True, "c": 8},
        {"a": 1, "b": False},
        {"a": 2, "b": True},
        {"a": 2, "b": False},
    ]
    assert combinations(text % "{a: 1, b: true}") == both
    either = [(c["a"], c["b"], c.get("c")) for c in combinations(text % "[{a: 2}, {a: 1, b: false}]")]
    assert either == [
        (1, True, None),
        (1, False, 7),
        (1, False, 8),
        (2, True, 7),
        (2, True, 8),
        (2, False, 7),
        (2, False, 8),
    ]
    assert all("c" in c for c in combinations(text % "{}"))


def test_conditions_are_taken_in_their_order_and_may_be_about_absent_keys(combinations: Callable[..., Any]) -> None:
    text = "a: [1, 2]\nb: {conditions: {a: 1}, options: 5}\nc: {conditions: {b: 5}, options: [6]}\n"
    text += "d: {conditions: {b: null}, options: [7]}"
    assert combinations(text) == [{"a": 1, "b": 5, "c": 6}, {"a": 2, "d": 7}]
    backwards = "a: [1]\nc: {conditions: {b: 5}, options: [6]}\nb: {conditions: {a: 1}, options: [5]}"
    assert combinations(backwards) == [{"a": 1, "b": 5}]


def test_several_conditions_multiply(combinations: Callable[..., Any]) -> None:
    text = "a: [1]\nb: {conditions: {a: 1}, options: [2, 3]}\nc: {conditions: {a: 1}, options: [4, 5]}"
    assert [(c["b"], c["c"]) for c in combinations(text)] == [(2, 4), (2, 5), (3, 4), (3, 5)]


def test_conditions_compare_what_is_written(combinations: Callable[..., Any]) -> None:
    assert combinations("a: ['6']\nb: {conditions: {a: 6}, options: [1]}") == [{"a": "6"}]
    assert combinations("common_group: {a: 6}\nb: [1]\nc: {conditions: {a: 6}, options: [1]}") == [{"a": 6, "b": 1}]


def test_conditions_as_pairs_hold_only_on_request(desk: Desk, combinations: Callable[..., Any]) -> None:
    text = "a: [1, 2]\nb: [3]\nc: {conditions: [[a, 1], [b, 3]], options: [7, 8]}"
    assert combinations(text) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    assert combinations(text, pairs_hold=True) == [{"a": 1, "b": 3, "c": 7}, {"a": 1, "b": 3, "c": 8}, {"a": 2, "b": 3}]
    (told,) = read_exploration(desk.folder / "x.yaml").remarks
    assert "'c'" in told and "x.yaml:3" in told and "--pairs-hold" in told


def test_branches_nest_and_share_what_stands_around_them(combinations: Callable[..., Any]) -> None:
    text = """
    n_layer: [1, 2]
    parameter_groups:
      - n_head: [3]
      - n_head: [4]
        parameter_groups: [{dropout: [0.1]}, {bias: [true]}]
    """
    assert combinations(text) == [
        {"n_layer": 1, "n_head": 3},
        {"n_layer": 2, "n_head": 3},
        {"n_layer": 1, "n_head": 4, "dropout": 0.1},
        {"n_layer": 2, "n_head": 4, "dropout": 0.1},
        {"n_layer": 1, "n_head": 4, "bias": True},
        {"n_layer": 2, "n_head": 4, "bias": True},
    ]
    assert combinations("a: [1]\nparameter_groups: []") == [{"a": 1}]
    assert combinations("a: [1]\nparameter_groups: {b: [2]}") == [{"a": 1, "b": 2}]


def test_the_common_group_comes_first_and_the_word_default_leaves_out(combinations: Callable[..., Any]) -> None:
    assert combinations("common_group: {seed: [7], compile: default}\nn_layer: [1, default]") == [
        {"seed": 7, "n_layer": 1},
        {"seed": 7},
    ]


GROUPS = """
named_static_groups:
  - {named_group: rope, use_rotary_embeddings: [true], use_abs_pos_embeddings: [false]}
  - named_group: absolute
    named_group_settings: {use_rotary_embeddings: [false], use_abs_pos_embeddings: [true]}
  - {named_group: wide, named_group_static: rope, n_embd: [64]}
named_variation_groups:
  - named_group: positions
    named_group_alternates: [rope, absolute]
  - named_group: sizes
    parameter_groups: [{n_embd: 32, n_head: [2, 4]}, {n_embd: 48, n_head: 3}]
"""


def test_named_groups_multiply_and_alternates_are_taken_in_turn(combinations: Callable[..., Any]) -> None:
    rope = {"use_rotary_embeddings": True, "use_abs_pos_embeddings": False}
    absolute = {"use_rotary_embeddings": False, "use_abs_pos_embeddings": True}
    assert combinations(f"{GROUPS}\nnamed_group_static: [wide]") == [{**rope, "n_embd": 64}]
    assert combinations(f"{GROUPS}\nn_layer: [1]\nnamed_group_alternates: [wide, absolute]") == [
        {"n_layer": 1, **rope, "n_embd": 64},
        {"n_layer": 1, **absolute},
    ]
    sizes = [{"n_embd": 32, "n_head": 2}, {"n_embd": 32, "n_head": 4}, {"n_embd": 48, "n_head": 3}]
    made = combinations(f"{GROUPS}\nnamed_group_variations: [positions, sizes]")
    assert made == [{**position, **size} for position in (rope, absolute) for size in sizes]
    inside = combinations(
        f"{GROUPS}\nparameter_groups: [{{named_group_variations: sizes}}, {{named_group_static: [rope]}}]"
    )
    assert inside == [*sizes, rope]
    assert combinations(f"{GROUPS}\nnamed_group_alternates: [positions, positions]") == [rope, absolute, rope, absolute]


def test_the_later_of_two_equal_keys_counts_and_that_is_told(desk: Desk) -> None:
    made = read_exploration(desk.write("n_layer: [1, 2]\nn_head: [1]\nn_layer: [3]"))
    assert made.combinations == [{"n_head": 1, "n_layer": 3}]
    assert made.remarks == ("'n_layer' is given twice; the later one counts (x.yaml:1, x.yaml:3).",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("---\n---\nn_layer: [1]", "not None (x.yaml:"),
        ("just a text", "not 'just a text' (x.yaml:1)"),
        ("[1, 2]", "not 1 (x.yaml:1)"),
        ("n_layer: [1\nn_head: 2", "x.yaml:2"),
        ("n_layer: []", "a list in it is empty"),
        ("n_layer: !!python/object:os.system {}", "x.yaml:1"),
        ("n_layer: {start: 1}", "n_layer: {'start': 1} is no value (x.yaml:1)"),
        ("n_layer: [{range: {start: 1, end: 2}}]", "is no value (x.yaml:1)"),
        ("x: {range: [1, 2, 3]}", "a mapping of keys is needed here, not [1, 2, 3] (x.yaml:1)"),
        ("x: {range: {start: 1}}", "'end' of the range must be an integer, as start is, not None (x.yaml:1)"),
        ("x: {range: {start: 1, end: 2, step: 0}}", "'step' of the range must be"),
        ("x: {range: {start: 1, end: 2, step: 0.5}}", "'step' of the range must be an integer"),
        ("x: {range: {start: 1, end: 2, stop: 3}}", "'stop' is no part of a range"),
        ("x: {range: {start: 1, end: 900000}}", "more than 100,000 values"),
        ("x: {range: {start: .nan, end: 1.0}}", "a finite number, not nan"),
        ("a: [1]\nx: {conditions: {a: 1}}", "the condition has no 'options'"),
        ("a: [1]\nx: {conditions: {a: 1}, option: [2]}", "Did you mean 'options'?"),
        ("a: [1]\nx: {conditions: yes, options: [2]}", "a mapping or a list of mappings, not True (x.yaml:2)"),
        ("a: [1]\nx: {conditions: [a, 1], options: [2]}", "are no conditions (x.yaml:2)"),
        ("a: [1]\nx: {conditions: {a: 1}, options: {range: {start: 1, end: 2}}}", "options are a list of values"),
        ("common_group: {seed: [1, 2]}", "seed: what 'common_group' says is one value for every run, not 2 (x.yaml:1)"),
        ("common_group: {seed: 1}\nseed: [2]", "seed: 2, but 'common_group' says 1 for every run (x.yaml:2)"),
        ("parameter_groups:\n- common_group: {seed: 1}", "'common_group' belongs to the top of a file"),
        ("n_layer: [1]\nparameter_groups:\n- n_layer: [2]", "n_layer: [2] here and [1] at x.yaml:1 meet in one"),
        ("parameter_groups: [1]", "not 1 (x.yaml:1)"),
        ("named_static_groups: [{x: 1}]", "the group has no name"),
        ("named_static_groups: [{named_group: a}, {named_group: a}]", "a group 'a' has been defined before"),
        (f"{GROUPS}\nnamed_group_static: [ropes]", "'named_group_static' could name (x.yaml:12). Did you mean 'rope'?"),
        (f"{GROUPS}\nnamed_group_static: [positions]", "no group 'positions'"),
        (f"{GROUPS}\nnamed_group_static: [[rope]]", "no group ['rope']"),
        ("named_static_groups:\n- {named_group: a, named_group_alternates: [b, c]}\n- {named_group: b, x: 1}\n"
         "- {named_group: c, x: 2}\nnamed_group_static: a", "the static group 'a' stands for 2 alternatives, not for one"),
        ("named_variation_groups:\n- {named_group: a, named_group_variations: b}\n- {named_group: b, named_group_alternates: [a]}\n"
         "named_group_variations: a", "the group 'a' contains itself: a > b > a (x.yaml:3)"),
        ("a: &a [*a]", "contains it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(desk: Desk, text: str, told: str) -> None:
    assert told in refused(desk, text)


def test_files_that_would_never_end_are_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = "\n".join(f"x{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]" for i in range(20))
    monkeypatch.setattr(dialect, "MAX_COMBINATIONS", 1000)
    assert "more than 1,000 combinations" in refused(desk, lists)
    bomb = "a0: &a0 [1, 1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))
    assert "aliases expand" in refused(desk, bomb)
    doubling = "named_variation_groups:\n- {named_group: g0, x: 1}\n"
    doubling += "\n".join(
        f"- {{named_group: g{i}, named_group_alternates: [g{i - 1}, g{i - 1}]}}" for i in range(1, 40)
    )
    monkeypatch.setattr(dialect, "MAX_BRANCHES", 100)
    assert "join in more than 1,000 ways" in refused(desk, f"{doubling}\nnamed_group_variations: g39")
    chain = "named_variation_groups:\n- {named_group: g0, x: 1}\n"
    chain += "\n".join(f"- {{named_group: g{i}, named_group_variations: g{i - 1}}}" for i in range(1, 150))
    assert "more than 100 groups lie inside one another" in refused(desk, f"{chain}\nnamed_group_variations: g149")
    nested = "a: " + "[" * 80 + "]" * 80
    assert "nested deeper" in refused(desk, nested)


def test_files_that_are_not_there_or_no_text(desk: Desk) -> None:
    parser = argparse.ArgumentParser()
    importing.arguments(parser)
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read: No such file"):
        importing.act(parser.parse_args(["nothing.yaml"]))
    (desk.folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        importing.act(parser.parse_args(["bytes.yaml"]))


# What it becomes ------------------------------------------------------------------------------------------------------------

SMALL = "n_embd: [24]\nblock_size: [8]\nbatch_size: [4]\n"  # fits the tests' corpus


def test_options_have_our_names(desk: Desk) -> None:
    text = """
    n_layer: ["2"]
    n_head: [4]
    n_kv_group: 2
    n_embd: [32]
    block_size: ["16"]
    dropout: ["0.25"]
    bias: [true]
    wte_weight_tying: [false]
    norm_variant_attn: layernorm
    norm_variant_output: [layernorm]
    activation_variant: squared_relu
    mlp_variant: swiglu
    mlp_size: [40]
    use_rotary_embeddings: [true]
    use_abs_pos_embeddings: [false]
    use_qk_norm: [true]
    disable_flash_attention: [true]
    batch_size: [3]
    gradient_accumulation_steps: [2]
    max_iters: [50]
    eval_interval: [5]
    eval_iters: [7]
    log_interval: [2]
    grad_clip: [0.0]
    seed: [4]
    dtype: [bfloat16]
    compile: [true]
    dataset: [./data/stdlib]
    learning_rate: [1e-2]
    adamw_weight_decay: [0.2]
    beta1: [0.8]
    beta2: ["0.9"]
    decay_lr: [true]
    warmup_iters: [5]
    min_lr: ["2e-3"]
    """
    (run,) = runs_of(desk, text).runs
    c = run.config
    assert (c.model.n_layer, c.model.n_head, c.model.n_kv_head, c.model.n_embd, c.model.block_size) == (2, 4, 2, 32, 16)
    assert (c.model.dropout, c.model.bias, c.model.tie_weights, c.model.sites) == (0.25, True, False, {})
    kinds = [getattr(c.model, kind).name for kind in ("norm", "activation", "mlp", "position", "attention")]
    assert kinds == ["layernorm", "relu2", "gated", "rope", "causal"]
    assert (c.model.mlp.options.width, c.model.attention.options.qk_norm, c.model.attention.options.kernel) == (
        40,
        True,
        "plain",
    )
    assert (c.train.batch_size, c.train.gradient_accumulation_steps, c.train.max_iters, c.train.seed) == (3, 2, 50, 4)
    assert (c.train.eval_interval, c.train.eval_iters, c.train.log_interval, c.train.grad_clip) == (5, 7, 2, None)
    assert (c.train.dtype, c.train.compile, c.data.dataset) == ("bfloat16", True, "stdlib")
    assert (c.optimizer.name, c.optimizer.options.learning_rate, c.optimizer.options.weight_decay) == (
        "adamw",
        0.01,
        0.2,
    )
    assert c.optimizer.options.betas == (0.8, 0.9)
    o = c.schedule.options
    assert (c.schedule.name, o.warmup_iters, o.decay_iters, o.min_lr_ratio) == ("cosine", 5, 1.0, 0.2)


def test_what_a_file_does_not_say_is_as_it_would_be_there(desk: Desk) -> None:
    (run,) = runs_of(desk, "block_size: [64]").runs
    c = run.config
    assert (c.model.n_layer, c.model.n_head, c.model.n_embd, c.model.bias, c.model.norm.name) == (
        6,
        6,
        384,
        False,
        "rmsnorm",
    )
    assert (c.train.batch_size, c.train.max_iters, c.train.eval_iters, c.schedule.name) == (64, 3500, 200, "constant")
    assert c.optimizer.options.weight_decay == 0.01
    assert "n_layer: 6  # ReaLLM-Forge's default" in imported(desk, "block_size: [64]")[1]


def test_lists_become_axes_and_seeds(desk: Desk) -> None:
    text = f"{SMALL}n_layer: [1, 2]\nn_head: [2, 4]\nlearning_rate: ['1e-3', '1e-2']\nseed: {{range: {{start: 3, end: 4}}}}"
    listing = runs_of(desk, text)
    assert listing.tree["sweep"] == {
        "grid": {"model.n_layer": [1, 2], "model.n_head": [2, 4], "optimizer.learning_rate": [0.001, 0.01]},
        "seeds": [3, 4],
    }
    wanted = set(itertools.product((1, 2), (2, 4), (0.001, 0.01), (3, 4)))
    assert held(listing, "model.n_layer", "model.n_head", "optimizer.learning_rate", "train.seed") == wanted
    assert len(listing.runs) == 16


def test_conditions_become_conditions(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nmlp_variant: [mlp, swiglu]\nactivation_variant: [gelu, relu]\nn_layer: [1, 2, 3]\n"
    text += "dropout: {conditions: {n_layer: 2}, options: [0.1, 0.2]}"
    listing = runs_of(desk, text)
    assert listing.tree["sweep"]["grid"]["model.dropout"] == {"values": [0.1, 0.2], "when": {"model.n_layer": 2}}
    rows = [(n, d) for n in (1, 2, 3) for d in ((0.1, 0.2) if n == 2 else (0.0,))]
    wanted = {(m, a, n, d) for m in ("standard", "gated") for a in ("gelu", "relu") for n, d in rows}
    assert held(listing, "model.mlp", "model.activation", "model.n_layer", "model.dropout") == wanted
    assert len(listing.runs) == len(wanted) == 16


def test_zipped_branches_become_a_zip(desk: Desk) -> None:
    text = "block_size: [8]\nn_layer: [1, 2]\n"
    text += "parameter_groups: [{n_embd: 32, n_head: 4}, {n_embd: 48, n_head: 6}, {n_embd: 64, n_head: 4}]"
    listing = runs_of(desk, text)
    assert listing.tree["sweep"] == {
        "grid": {"model.n_layer": [1, 2]},
        "zip": {"model.n_head": [4, 6, 4], "model.n_embd": [32, 48, 64]},
    }
    assert held(listing, "model.n_layer", "model.n_embd", "model.n_head") == {
        (n, *size) for n in (1, 2) for size in ((32, 4), (48, 6), (64, 4))
    }


def test_named_groups_become_groups_with_their_names(desk: Desk) -> None:
    text = """
named_static_groups:
  - {named_group: small, n_embd: [32], n_head: [4], dropout: [0.1]}
  - {named_group: large, n_embd: [48], n_head: [6], dropout: [0.2]}
  - {named_group: turning, use_rotary_embeddings: [true], use_abs_pos_embeddings: [false]}
  - {named_group: table, use_rotary_embeddings: [false], use_abs_pos_embeddings: [true]}
named_variation_groups:
  - {named_group: sizes, named_group_alternates: [small, large]}
block_size: [8]
n_layer: [1]
named_group_variations: [sizes]
named_group_alternates: [turning, table]
"""
    listing = runs_of(desk, text)
    assert listing.tree["sweep"]["grid"] == {"model.position": ["rope", "learned"]}
    (group,) = listing.tree["sweep"]["groups"].values()
    assert group == {
        "small": {"model.n_head": 4, "model.n_embd": 32, "model.dropout": 0.1},
        "large": {"model.n_head": 6, "model.n_embd": 48, "model.dropout": 0.2},
    }
    assert held(listing, "model.position", "model.n_embd", "model.dropout") == {
        (p, *s) for p in ("rope", "learned") for s in ((32, 0.1), (48, 0.2))
    }


def test_branches_with_lists_of_their_own_become_cases(desk: Desk) -> None:
    text = f"""
{SMALL}n_head: [4]
n_layer: [1, 2]
parameter_groups:
  - mlp_variant: [mlp]
    mlp_size: [32, 48, 64, 80]
  - mlp_variant: [swiglu]
    mlp_size: [16, 24, 40]
"""
    listing = runs_of(desk, text)
    sweep = listing.tree["sweep"]
    assert sweep["grid"] == {"model.n_layer": [1, 2]}
    assert {name: case["grid"] for name, case in sweep["cases"].items()} == {
        "standard": {"model.mlp.width": [32, 48, 64, 80]},
        "gated": {"model.mlp.width": [16, 24, 40]},
    }
    widths = [("standard", w) for w in (32, 48, 64, 80)] + [("gated", w) for w in (16, 24, 40)]
    assert held(listing, "model.n_layer", "model.mlp", "model.mlp.width") == {(n, *w) for n in (1, 2) for w in widths}


def test_optimizers_with_options_of_their_own(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nlearning_rate: [0.01, 0.02]\nparameter_groups:\n- optimizer: adamw\n"
    text += "- {optimizer: muon, muon_momentum: 0.9}\n"
    text += "- {optimizer: sgd, sgd_nesterov: true}\n- {optimizer: lion, weight_decay: 0.3}"
    listing = runs_of(desk, text)
    assert held(listing, "optimizer", "optimizer.learning_rate", "optimizer.weight_decay") == {
        (kind, rate, decay)
        for rate in (0.01, 0.02)
        for kind, decay in (("adamw", 0.01), ("muon", 0.1), ("sgd", 0.1), ("lion", 0.3))
    }
    muon = [run.config.optimizer.options for run in listing.runs if run.config.optimizer.name == "muon"]
    assert {(o.momentum, o.rest.options.learning_rate) for o in muon} == {(0.9, 0.01), (0.9, 0.02)}


def test_a_last_norm_of_its_own_becomes_a_site(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nnorm_variant_attn: [rmsnorm, layernorm]\nnorm_variant_output: [layernorm]"
    listing = runs_of(desk, text)
    assert {(r.config.model.norm.name, dig(r.config, "model.sites.final_norm.norm")) for r in listing.runs} == {
        ("rmsnorm", "layernorm"),
        ("layernorm", "layernorm"),
    }


def test_heads_of_their_own_width(desk: Desk) -> None:
    text = f"{SMALL}n_head: [5]\nattention_variant: [infinite]\nuse_concat_heads: [true]\n"
    text += "n_qk_head_dim: [6, 8]\nn_v_head_dim: [6, 8]"
    listing = runs_of(desk, text)
    assert held(listing, "model.attention", "model.head_dim") == {
        ("causal", 6),
        ("causal", 8),
    }  # 2 of 4 have two widths


def test_schedules(desk: Desk) -> None:
    def schedule(text: str) -> tuple[Any, ...]:
        (run,) = runs_of(desk, f"{SMALL}n_head: [4]\nn_layer: [1]\nmax_iters: [100]\n{text}").runs
        s = run.config.schedule
        return (
            s.name,
            s.options.warmup_iters,
            getattr(s.options, "decay_iters", None),
            getattr(s.options, "min_lr_ratio", None),
        )

    assert schedule("decay_lr: [true]") == ("cosine", 100, 1.0, 0.1)
    assert schedule("decay_lr: [true]\nlr_decay_iters: [80]\nwarmup_iters: [5]") == ("cosine", 5, 80, 0.1)
    assert schedule("decay_lr: [true]\nlr_decay_iters: [80]\nlr_decay_match_max_iters: [true]") == (
        "cosine",
        100,
        1.0,
        0.1,
    )
    assert schedule("decay_lr: [false]\nwarmup_iters: [5]") == ("constant", 0, None, None)
    assert schedule("warmup_iters: [5]\nmin_lr: [5e-5]\nlearning_rate: [1e-3]") == ("cosine", 5, 1.0, 0.05)
    assert "given without decay_lr" in " ".join(imported(desk, f"{SMALL}n_head: [4]\nwarmup_iters: [5]")[1].split())


def test_precision_on_a_processor_is_what_it_is_there(desk: Desk) -> None:
    listing = runs_of(desk, f"{SMALL}n_head: [4]\ndevice: [cpu]\ndtype: [float16]")
    assert held(listing, "train.device", "train.dtype") == {("cpu", "float32")}


def test_tokens_may_limit_a_run(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nmax_tokens: [640]\nmax_iters: [7]"
    assert held(runs_of(desk, text), "train.max_iters", "train.max_tokens") == {(7, None)}
    limited = f"{text}\ntraining_limiters: [[max_tokens]]"
    assert held(runs_of(desk, limited), "train.max_iters", "train.max_tokens") == {(None, 640)}


# What it cannot become ------------------------------------------------------------------------------------------------------


def comments(text: str) -> str:
    """The comments at the top, on one line."""
    return " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))


def test_an_axis_without_counterpart_is_told_with_what_dropping_it_means(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nn_layer: [1, 2]\nshared_mlp_size: [1, 2, 3]\nuse_peri_ln: [true]"
    code, made = imported(desk, text)
    told = comments(made)
    assert code == 0 and "6 combinations there, 2 runs here, 4 equal to others without what was dropped" in told
    assert (
        "shared_mlp_size (x.yaml:6): 1, 2, 3. There is nothing of the kind here. Without it 6 combinations become 2."
        in told
    )
    assert "use_peri_ln (x.yaml:7): true. There is nothing of the kind here. -" not in told
    assert held(open_listing(desk.folder / "out.yaml", ()), "model.n_layer") == {(1,), (2,)}


def test_values_without_counterpart_leave_their_combinations_out(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nn_layer: [1, 2]\nactivation_variant: [gelu, celu, relu]\nuse_rotary_embeddings: [true, false]"
    _code, made = imported(desk, text)
    told = comments(made)
    assert "4 of 12: 'celu' has no counterpart (activation_variant, x.yaml:6)" in told
    assert "4 of 12: positions are rotary or absolute here, not both (use_rotary_embeddings, x.yaml:7)" in told
    listing = open_listing(desk.folder / "out.yaml", ())
    wanted = {(n, a, "learned") for n in (1, 2) for a in ("gelu", "relu")}
    assert held(listing, "model.n_layer", "model.activation", "model.position") == wanted


def test_a_value_without_counterpart_in_all_combinations_is_dropped(desk: Desk) -> None:
    _, made = imported(desk, f"{SMALL}n_head: [4]\nactivation_variant: [celu]\nn_layer: [1, 2]\ndataset: [minipile]")
    told = comments(made)
    assert (
        "activation_variant (x.yaml:5): celu. 'celu' has no counterpart; what runs has ReaLLM-Forge's default." in told
    )
    assert (
        "dataset (x.yaml:7): minipile. There is no corpus of that name here" in told and "What runs is 'stdlib'" in told
    )
    assert held(open_listing(desk.folder / "out.yaml", ()), "model.activation", "data.dataset") == {("gelu", "stdlib")}


def test_where_every_combination_lacks_something_else_options_are_dropped(desk: Desk) -> None:
    branches = (
        "parameter_groups:\n- {activation_variant: celu, n_layer: 1}\n- {norm_variant_attn: krmsnorm, n_layer: 2}"
    )
    listing = runs_of(desk, f"{SMALL}n_head: [4]\n{branches}")
    assert held(listing, "model.n_layer", "model.activation", "model.norm") == {
        (1, "gelu", "rmsnorm"),
        (2, "gelu", "rmsnorm"),
    }


def test_what_is_no_configuration_here_is_left_out(desk: Desk) -> None:
    code, made = imported(desk, f"{SMALL}n_head: [4, 5]\nn_kv_group: [2, 3]")
    assert code == 0 and "is not divisible by n_head 5" in comments(made) and "3 left out" in comments(made)
    assert held(open_listing(desk.folder / "out.yaml", ()), "model.n_head", "model.n_kv_head") == {(4, 2)}
    told = refused(desk, f"{SMALL}n_head: [5]")
    assert told.startswith("Not one combination can be run here.") and "not divisible" in told


def test_what_changes_nothing_is_told_apart(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nuse_pre_ln: true\nsoftmax_variant_attn: softmax\n"
    text += "shared_mlp_size: '1'\ntensorboard_run_name: [a, b]\nuse_lsv: true"
    told = comments(imported(desk, text)[1])
    assert "hold here anyway: - use_pre_ln, softmax_variant_attn, shared_mlp_size" in told
    assert "left out: - tensorboard_run_name" in told and "use_lsv (x.yaml:9): true" in told
    assert is_bookkeeping("log_all_metrics") and not is_bookkeeping("learning_rate")
    assert is_off("use_lsv", None) and not is_off("use_lsv", "false") and not is_off("mlp_x_offset", [1])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("n_layer: [64.0]", "n_layer: 64.0 is no integer (x.yaml:1)."),
        ("n_layer: [true]", "n_layer: True is no number (x.yaml:1)."),
        ("learning_rate: [fast]", "learning_rate: 'fast' is no number (x.yaml:1)."),
        ("bias: ['true']", "bias: 'true' is neither true nor false (x.yaml:1)."),
        ("dataset: [[a, b]]", "dataset: ['a', 'b'] is no text (x.yaml:1)."),
        (f"seed: ['{'9' * 6000}']", "is no integer (x.yaml:1)."),
    ],
)
def test_values_that_its_command_line_would_refuse(desk: Desk, text: str, told: str) -> None:
    assert told in refused(desk, text)
    both = refused(desk, "n_layer: [a]\nn_head: [b]")
    assert "n_layer: 'a'" in both and "n_head: 'b'" in both


def test_comments_hold_whatever_a_file_says(desk: Desk) -> None:
    odd = {
        "n_head": [4],
        "n_embd": [24],
        "block_size": [8],
        "a\nname: x\u2028seed: 1\a": ["b\nname: y\x85 {z}", "#"],
        "é\U0001f600": [[1]],
    }
    twice = '"k\\u2028seed: 5\\a": 1\n"k\\u2028seed: 5\\a": 2\n'
    code, made = imported(desk, yaml.safe_dump(odd) + twice)
    assert "is given twice" in made
    assert code == 0 and len(open_listing(desk.folder / "out.yaml", ()).runs) == 1
    assert "\nname: x\n" in made  # the file's own name, once


# The command ----------------------------------------------------------------------------------------------------------------


def test_the_command(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    from lab.__main__ import main

    desk.write(f"{SMALL}n_head: [4]\nn_layer: [1, 2]\nuse_lsv: true", "my sweep.yaml")
    assert main(["import", "my sweep.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "use_lsv (my sweep.yaml:6): true" in printed and "Wrote my_sweep_imported.yaml: 2 runs." in printed
    assert open_listing(Path("my_sweep_imported.yaml"), ()).name == "my_sweep"
    assert main(["import", "my sweep.yaml"]) == 2
    assert "my_sweep_imported.yaml exists" in capsys.readouterr().err
    assert main(["import", "my sweep.yaml", "--force"]) == 0
    assert main(["import", "my sweep.yaml", "--output", "my sweep.yaml", "--force"]) == 2  # never over what is read
    assert main(["import", "my sweep.yaml", "--output", "a.txt"]) == 2


def test_pairs_hold_by_an_option(desk: Desk) -> None:
    text = f"{SMALL}n_head: [4]\nn_layer: [1, 2]\ndropout: {{conditions: [[n_layer, 2]], options: [0.1, 0.2]}}"
    assert held(runs_of(desk, text), "model.n_layer", "model.dropout") == {(1, 0.0), (2, 0.0)}
    assert held(runs_of(desk, text, "--pairs-hold"), "model.n_layer", "model.dropout") == {(1, 0.0), (2, 0.1), (2, 0.2)}


# Properties -----------------------------------------------------------------------------------------------------------------

OURS = {
    "n_layer": "model.n_layer",
    "n_head": "model.n_head",
    "dropout": "model.dropout",
    "activation_variant": "model.activation",
    "learning_rate": "optimizer.learning_rate",
    "max_iters": "train.max_iters",
    "grad_clip": "train.grad_clip",
    "seed": "train.seed",
}
POOL: dict[str, list[Any]] = {
    "n_layer": [1, 2, 3],
    "n_head": [2, 3, 4],
    "dropout": [0.0, 0.1, 0.2],
    "activation_variant": ["gelu", "relu", "silu"],
    "learning_rate": [0.001, 0.002, 0.003],
    "max_iters": [10, 20, 3500],
    "grad_clip": [0.5, 1.0],
    "seed": [1, 2, 1337],
}
USUAL = {
    "n_layer": 6,
    "n_head": 6,
    "dropout": 0.0,
    "activation_variant": "gelu",
    "learning_rate": 0.001,
    "max_iters": 3500,
    "grad_clip": 1.0,
    "seed": 1337,
}


def a_file(chance: random.Random) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A file in the dialect and its combinations, made side by side: lists, branches of branches, a condition, static groups."""
    keys = chance.sample(sorted(POOL), len(POOL))
    file: dict[str, Any] = {"n_embd": [24], "block_size": [8]}
    rows: list[dict[str, Any]] = [{}]

    def pick(key: str) -> list[Any]:
        return chance.sample(POOL[key], chance.randint(1, 2))

    def times(rows: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**a, **b} for a in rows for b in more]

    for key in (keys.pop() for _ in range(2)):
        file[key] = pick(key)
        rows = times(rows, [{key: value} for value in file[key]])
    asked, taken = list(file)[-1], keys.pop()
    held_at, options = chance.choice(file[asked]), pick(taken)
    file[taken] = {"conditions": {asked: held_at}, "options": options}
    rows = [
        new for row in rows for new in (times([row], [{taken: o} for o in options]) if row[asked] == held_at else [row])
    ]
    branches, union = [], []
    inner = keys.pop()
    for _ in range(chance.randint(1, 3)):
        some = chance.sample(keys, 2)
        branch: dict[str, Any] = {key: pick(key) for key in some}
        made = times([{some[0]: v} for v in branch[some[0]]], [{some[1]: v} for v in branch[some[1]]])
        if chance.random() < 0.5:
            values = pick(inner)
            branch["parameter_groups"] = [{inner: value} for value in values]
            made = times(made, [{inner: value} for value in values])
        branches.append(branch)
        union += made
    if chance.random() < 0.5:
        file["named_static_groups"] = [{"named_group": f"g{i}", **branch} for i, branch in enumerate(branches)]
        file["named_group_alternates"] = [f"g{i}" for i in range(len(branches))]
    else:
        file["parameter_groups"] = branches
    return file, times(rows, union)


@pytest.mark.parametrize("seed", range(12))
def test_a_written_file_stands_for_exactly_the_combinations(desk: Desk, seed: int) -> None:
    file, rows = a_file(random.Random(seed))
    text = yaml.safe_dump(file, sort_keys=False)
    read = read_exploration(desk.write(text)).combinations
    fixed = {"n_embd": 24, "block_size": 8}
    assert sorted(json.dumps({**fixed, **row}, sort_keys=True) for row in rows) == sorted(
        json.dumps(c, sort_keys=True) for c in read
    )
    whole = [{**USUAL, **row} for row in rows]
    wanted = {tuple(row[key] for key in OURS) for row in whole if 24 % row["n_head"] == 0}
    listing = runs_of(desk, text)
    assert held(listing, *OURS.values()) == wanted
    assert len(listing.runs) == len(wanted)


def rows_of(listed: list[dict[str, Any]]) -> Rows:
    return Rows.of(listed)


def test_independent_keys_come_apart_and_others_stay_together() -> None:
    pairs = [{"a": a, "b": b, "c": c, "d": 0} for a, b in ((1, 1), (2, 2), (3, 1)) for c in (True, False)]
    assert [some.keys for some in components(rows_of(pairs))] == [("a", "b"), ("c",)]
    odd = [
        {"a": a, "b": b, "c": a ^ b} for a in (0, 1) for b in (0, 1)
    ]  # any two of them are independent, all three are not
    assert [some.keys for some in components(rows_of(odd))] == [("a", "b", "c")]


def test_a_condition_is_found_only_where_it_is_exact() -> None:
    rows = [{"a": "x", "b": 0}, {"a": "y", "b": 1}, {"a": "y", "b": 2}, {"a": "z", "b": 1}, {"a": "z", "b": 2}]
    key, usual, axis, rest = next(conditions(rows_of(rows)))
    assert (key, usual, axis) == ("b", 0, {"values": [1, 2], "when": {"a": ["y", "z"]}})
    assert rest.mappings() == [{"a": "x"}, {"a": "y"}, {"a": "z"}]
    assert not list(conditions(rows_of(rows[:-1])))
    assert not list(conditions(rows_of([{"a": None if r["a"] == "y" else "x", "b": str(r["b"])} for r in rows[:3]])))[
        1:
    ]


def test_groups_that_do_not_tell_combinations_apart_give_no_names() -> None:
    rows = rows_of([{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 3, "b": 1}])
    first, second = rows_of(rows.mappings()[:2]), rows_of(rows.mappings()[2:])
    assert named(rows, [Part("", first, {"a": "small"}), Part("", second, {"a": "large"})]) == []
    each = [Part("", rows_of([row]), {"a": name}) for row, name in zip(rows.mappings(), "xyz", strict=True)]
    assert named(rows, each) == ["x", "y", "z"]
    assert named(rows, [*each[:2], Part("", second, {})]) == []


def test_the_plan_takes_cases_only_where_they_are_shorter() -> None:
    short = [{"a": 1, "b": 1}, {"a": 2, "b": 2}]
    parts = [Part("", rows_of([row]), {}) for row in short]
    assert plan(rows_of(short), parts).section() == {"zip": {"a": [1, 2], "b": [1, 2]}}
    one = [{"a": 1, "b": b, "c": c} for b in range(4) for c in range(3)]
    two = [{"a": 2, "b": b, "c": c} for b in range(5, 9) for c in range(4)]
    made = plan(rows_of(one + two), [Part("one", rows_of(one), {}), Part("two", rows_of(two), {})])
    assert made.section() == {
        "cases": {
            "one": {"set": {"a": 1}, "grid": {"b": [0, 1, 2, 3], "c": [0, 1, 2]}},
            "two": {"set": {"a": 2}, "grid": {"b": [5, 6, 7, 8], "c": [0, 1, 2, 3]}},
        }
    }
