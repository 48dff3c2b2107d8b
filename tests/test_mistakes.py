"""What is wrong with a configuration: every mistake in one message, each with its place, and nothing started."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Desk

from core.yaml_files import ConfigError, dump, load_text
from lab.listing import open_listing

Front = Callable[..., tuple[int, str, str]]


def test_the_sentence_of_the_design(desk: Desk) -> None:
    assert desk.wrong("name: x\ntrain:\n  seed: 1\n\n# norms\nmodel:\n  norm: rmsnrom") == [
        "model.norm: no variant 'rmsnrom' (x.yaml:7). Did you mean 'rmsnorm'? Known: layernorm, none, rmsnorm."
    ]


def test_every_mistake_in_one_message_each_with_its_line(desk: Desk, front: Front) -> None:
    file = desk.write(
        """
        modl: {n_layer: 2}
        model:
          n_layer: two
          norm: {variant: rmsnorm, epz: 1}
          dropout: 1.0
        data: {dataset: stdlb}
        train:
          batch_size: 0
          dtype: float8
          compile: maybe
          seed: "${train.sead}"
        optimizer: adam
        schedule: {variant: cosine, warmup_iters: 2.5}
        tracking: {wandb: {tags: x, project: 3}}
        sweep:
          seeds: none
          grid: {model.n_emb: [1]}
          cases: {a: {sett: {}}}
        """
    )
    code, out, told = front("--config", str(file), "train.eval_iters=many")
    heads = [re.match(r"(\S+): .*? \((x\.yaml:\d+|command line)\)\.", line) for line in told.splitlines()]
    assert (code, out) == (2, "") and all(heads)
    assert sorted((h.group(1), h.group(2)) for h in heads if h) == [
        ("data.dataset", "x.yaml:6"),
        ("model.dropout", "x.yaml:5"),
        ("model.n_emb", "x.yaml:17"),
        ("model.n_layer", "x.yaml:3"),
        ("model.norm.epz", "x.yaml:4"),
        ("modl", "x.yaml:1"),
        ("optimizer", "x.yaml:12"),
        ("schedule.warmup_iters", "x.yaml:13"),
        ("sweep.cases.a.sett", "x.yaml:18"),
        ("sweep.seeds", "x.yaml:16"),
        ("tracking.wandb.project", "x.yaml:14"),
        ("tracking.wandb.tags", "x.yaml:14"),
        ("train.batch_size", "x.yaml:8"),
        ("train.compile", "x.yaml:10"),
        ("train.dtype", "x.yaml:9"),
        ("train.eval_iters", "command line"),
        ("train.seed", "x.yaml:11"),
    ]
    assert "Did you mean 'model'?" in told and "Did you mean 'stdlib'?" in told and "Did you mean 'adamw'?" in told
    assert desk.nothing_made()


IMPOSSIBLE = {
    "model: {n_embd: 100, n_head: 3}": "model.n_embd: 100 is not divisible by n_head 3, and no head_dim is given",
    "model: {n_head: 4, n_kv_head: 3}": "model.n_kv_head: n_head 4 is not divisible by n_kv_head 3",
    "train: {batch_size: 0}": "train.batch_size: 0 is not >= 1",
    "model: {block_size: 5000}": "model.block_size: 5000 is longer than the data: 'stdlib' allows at most 299",
    "model: {vocab_size: 255}": "model.vocab_size: 255 is smaller than the data's vocabulary of 256",
    "model: {position: rope, n_embd: 12, n_head: 4}": "rope turns pairs, so the head's width must be even, not 3",
    "model: {head: pkl}": "model.tie_weights: one weight is shared, but the embedding is standard and the head is pkl",
    "train: {device: tpu}": "train.device: 'tpu' is not auto, cpu, cuda or cuda:N",
    "train: {device: cpu, dtype: float16}": "train.dtype: float16 needs a CUDA device",
    "optimizer: {betas: [0.9]}": "optimizer.betas: [0.9] is not two numbers",
    "train: {max_iters: true}": "train.max_iters: True is not an integer or null (off)",
    "optimizer: {learning_rate: .nan}": "optimizer.learning_rate: nan is not a finite number",
    "optimizer: {learning_rate: 1" + "0" * 400 + "}": "is not a finite number",
    "model: {n_embd: 100000000000, n_head: 1, head_dim: 10000000000}": "would be 3e+10 x 1e+11 numbers, more than",
    "train: {init_from: there}": "train.init_from: there is no 'there'",
    "train: {init_from: hf:there}": "train.init_from: there is no 'there'",
    "slices: {a: {match: x}}": "slices.a: the rule sets nothing; it may set lr_scale, learning_rate",
    "model.n_layer: 3": "model.n_layer: unknown key (x.yaml:1). Keys are nested, as in model: {n_layer: ...}.",
    "data: {dataset: ../stdlib}": "data.dataset: no corpus '../stdlib'",
    "data: {tokenizer: chars}": "data.tokenizer: 'stdlib' has no 'chars'",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_what_cannot_be_ends_with_2_and_nothing_on_disk(desk: Desk, front: Front, text: str) -> None:
    code, out, told = front("--config", str(desk.write(text)))
    assert (code, out) == (2, "") and IMPOSSIBLE[text] in told and "(x.yaml:1)" in told
    assert told.count("\n") == 1 and "Traceback" not in told and desk.nothing_made()


def test_a_value_of_an_axis_or_case_is_placed_at_its_line(desk: Desk) -> None:
    text = """
    model:
      norm: layernorm
      n_head: 4
    sweep:
      grid:
        model.norm: [layernorm, rmsnrom]
        model.n_head: [4, 3]
      cases:
        good: {}
        bad:
          set:
            train.batch_size: 0
            optimizer:
              betas: 3
      groups:
        g:
          small: {}
          large:
            model.dropout: 2
      zip:
        train.eval_iters: [1, 0]
        train.seed: [1, 2]
    """
    told = desk.wrong(text)
    places = {line.partition(":")[0]: re.search(r"x\.yaml:(\d+)", line) for line in told}
    assert {key: int(found.group(1)) for key, found in places.items() if found} == {
        "model.norm": 6,
        "model.n_embd": 7,
        "train.batch_size": 12,
        "optimizer.betas": 14,
        "model.dropout": 19,
        "train.eval_iters": 21,
    }


def test_a_mistake_of_a_preset_is_placed_in_the_preset(desk: Desk) -> None:
    desk.preset("quick", "train:\n  batch_size: 0")
    (told,) = desk.wrong("defaults: [presets/quick]\ntrain: {seed: 1}")
    assert "train.batch_size: 0 is not >= 1" in told and "quick.yaml:3)" in told
    assert "(x.yaml:2)" in desk.wrong("defaults: [presets/quick]\ntrain: {batch_size: -1}")[0], "the later one wins"


def test_many_mistakes_are_cut_off(desk: Desk) -> None:
    told = desk.wrong("sweep: {grid: {train.batch_size: {range: [-500, 0, 1]}}}")
    assert len(told) == 101 and told[-1] == "... and 401 more mistakes."


def test_a_mistake_in_the_sweep_is_not_told_again_as_what_follows_from_it(desk: Desk) -> None:
    (told,) = desk.wrong(
        "sweep: {grid: {optimizer.learning_rate: {logg: [1, 2]}}, exclude: {optimizer.learning_rate: 1}}"
    )
    assert "Did you mean 'log'?" in told


# Files ----------------------------------------------------------------------------------------------------------------------


def refused(desk: Desk, front: Front, file: str) -> str:
    code, out, told = front("--config", file)
    assert (code, out) == (2, "") and "Traceback" not in told and desk.nothing_made()
    return told


def test_a_missing_file_has_a_nearest_name(desk: Desk, front: Front) -> None:
    desk.write("{}", "quickstart.yaml")
    assert refused(desk, front, "quikstart.yaml") == (
        "quikstart.yaml: there is no such file. Did you mean 'quickstart.yaml'? Known: quickstart.yaml.\n"
    )
    assert refused(desk, front, "no/where.yaml") == "no/where.yaml: there is no such file.\n"


def test_a_directory_or_binary_or_endless_file_is_refused(desk: Desk, front: Front) -> None:
    (desk.folder / "folder.yaml").mkdir()
    assert refused(desk, front, "folder.yaml") == "folder.yaml cannot be read: Is a directory.\n"
    (desk.folder / "latin.yaml").write_bytes("name: \xe9t\xe9".encode("latin-1"))
    assert refused(desk, front, "latin.yaml") == "latin.yaml:1: this is not text (UTF-8).\n"
    (desk.folder / "zero.yaml").write_bytes(b"name: a\0b")
    assert "(zero.yaml:1). This is not valid YAML." in refused(desk, front, "zero.yaml")
    desk.write("a: " + "x" * 2_000_000, "large.yaml")
    assert refused(desk, front, "large.yaml") == "large.yaml is larger than 1,000,000 bytes.\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n\tn_layer: 2", "found character '\\t' that cannot start any token (x.yaml:2). This is not valid YAML."),
        ("model: {n_layer: 2\n", "(x.yaml:2). This is not valid YAML."),
        ("a: &a [*a]", "a.0: an alias refers to a value that contains it (x.yaml:1)."),
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefg", "bcdefgh", strict=True)),
         "aliases expand to more than 200,000 values"),
        ("[" * 70 + "]" * 70, "nested deeper than 60 levels"),
        ("[" * 100_000, "it is nested deeper than 60 levels (x.yaml:1)."),
        ("- model", "a configuration is a mapping of keys, not a list."),
        ("just text", "a configuration is a mapping of keys, not 'just text'."),
    ],
)  # fmt: skip
def test_what_is_not_plain_yaml_is_refused(desk: Desk, front: Front, text: str, words: str) -> None:
    (desk.folder / "x.yaml").write_text(text)
    assert words in refused(desk, front, "x.yaml")


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "---\n", "{}", "sweep:", "sweep: {}", "sweep: {grid: null, zip:}", "sweep: {cases: null}"],
)
def test_a_file_that_says_nothing_is_one_run_of_the_defaults(desk: Desk, text: str) -> None:
    (desk.folder / "x.yaml").write_text(text)
    (run,) = open_listing(Path("x.yaml"), []).runs
    assert run.hash == open_listing(None, []).runs[0].hash


# Mutations ------------------------------------------------------------------------------------------------------------------

VALID = """
    name: fuzz
    model: {n_layer: 1, n_embd: 16, n_head: 2, norm: {variant: rmsnorm, eps: 1e-5}, linear: {variant: pkl, scale: 0.5},
            sites: {plain: {match: ["h.*.mlp.up", "h.{0..3}.attn.proj"], except: "x", linear: standard, optional: false}}}
    data: {dataset: stdlib, tokenizer: byte}
    train: {max_iters: 3, batch_size: 2, grad_clip: null, seed: "${model.n_layer}", eval_iters: full, device: cpu}
    optimizer: {variant: muon, learning_rate: 0.1, rest: {variant: adamw, betas: [0.9, 0.95]}}
    schedule: {variant: wsd, warmup_iters: 0.1, decay_iters: 1.0, min_lr_ratio: 0.1}
    tracking: {wandb: {mode: off, tags: [a, b]}}
    runner: {devices: [cpu], per_device: 2}
    sweep:
      grid:
        optimizer.learning_rate: {log: [1e-4, 1e-2], num: 2}
        train.eval_interval: {named: {often: 1, rarely: 100}}
        model.linear.scale: {values: [1.0, 2.0], when: {model.linear: pkl}}
      zip: [{model.n_embd: [16, 32], model.n_head: [2, 4]}]
      groups: {init: {plain: {}, small: {model.init: {variant: normal, std: 0.01}}}}
      cases: {base: {}, more: {use: presets/more, set: {model.bias: false}, grid: {train.init_seed: {range: [1, 2, 1]}}}}
      exclude: [{case: more, optimizer.learning_rate: [1e-4]}]
      baseline: {case: base}
      seeds: 2
      objective: {metric: val_loss, mode: min}
      max_runs: 1000
"""

ODD: list[Any] = [
    None, True, False, 0, -1, 3, 10**30, 0.5, -0.0, float("inf"), "", "off", "x.y", "${model}", "${", "${a:b}", "é\u2028",
    "*", "[", "{", [], {}, [[]], [None], [{}], ["a", 1, {}], {"variant": None}, {"variant": []}, {"variant": {}}, {"": 1},
    {"a.b": {"c": None}}, {"variant": "none", "x": 1}, {"log": [1, 2], "num": 2}, {"values": [1], "when": {"case": "x"}},
    {"range": "x"}, {"named": {"": None}},
]  # fmt: skip


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key in it."""
    keys: Any = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [(tree, key) for key in keys] + [spot for key in keys for spot in spots(tree[key])]


def mutated(tree: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice(spots(tree))
        kind = rng.randrange(6)
        if kind <= 2:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == 3:
            del container[key]
        elif kind == 4:
            other, there = rng.choice(spots(tree))
            container[key] = copy.deepcopy(other[there])
        elif isinstance(container, dict):
            container[rng.choice(["x", "variant", "", "a.b", "null", str(key) + "s"])] = container.pop(key)
        else:
            container.append(container[key])
        if not tree:
            break
    return tree


@pytest.mark.parametrize("block", range(4))
def test_a_mutated_file_is_read_or_refused_in_sentences(desk: Desk, block: int) -> None:
    desk.preset("more", "train: {eval_batch_size: 3}")
    assert len(desk.listed(VALID).runs) == 128
    tree, rng = load_text(VALID, "x").tree, random.Random(block)
    ended = {"read": 0, "refused": 0}
    for _ in range(60):
        text = dump(mutated(tree, rng))
        try:
            listing = desk.listed(text)
            ended["read"] += 1
            assert len(set(listing.ids.values())) == len(listing.runs) > 0
        except ConfigError as error:
            ended["refused"] += 1
            assert error.sentences and all(": " in s or "more mistakes" in s for s in error.sentences), text
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{text}") from error
    assert min(ended.values()) > 5, ended
