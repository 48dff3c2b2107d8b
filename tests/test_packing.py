"""Which runs are packed: what keeps a key and what changes it, what a knob may not touch, and how runs are divided."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Case, config, read, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from core.options import Variant, fields_of, hints, options_of
from core.rules import SliceRule
from gpt_conf import KINDS, ModelConfig
from lab import packing
from lab.packing import fitting, groups, key, reason
from lab.plan import Slot
from model import assemble, fill
from train_args import Config
from variations import CATALOGUE
from variations.optimizer.muon import MuonOptions
from variations.optimizer.sgd import SGD

CONTENT = {"data": "0123", "/there/plugin.py": "4567", "init_from": "89ab"}
SEEDS = {"train.seed", "train.init_seed", "train.data_seed"}


# Every option ---------------------------------------------------------------------------------------------------------------


def values(tp: Any, default: Any) -> list[Any]:
    """Two values of a type that are neither zero nor null, near a default that is a number."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is typing.Literal:
        return [default, *(value for value in args if value != default)][:2]
    if origin is tuple:
        return [(a, a) for a in values(args[0], default[0] if default else None)]
    if origin in (typing.Union, types.UnionType):
        return next((found for arm in args if (found := values(arm, default))), [])
    default = None if isinstance(default, str) else default
    if tp is bool:
        return [not default, default]
    if tp is int:
        return [1 + (default or 2), 2 + (default or 2)]
    if tp is float:
        return [0.5 * default, 0.75 * default] if default else [0.25, 0.75]
    return ["h", "cpu"] if tp is str else []


def pairs(default: Any, what: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """Of every option: what it is called, whether it is a knob, free (no part of the identity) or of the graph, and two
    instances in which it alone differs."""
    cls: Any = type(default)
    for name, spec in fields_of(cls).items():
        value = getattr(default, spec.name)
        kind = spec.metadata.get("kind")
        free = "free" if not spec.metadata["identity"] else "knob" if kind in ("schedule", "init") else ""
        said = what or free
        if isinstance(value, Variant):
            for chosen, variation in CATALOGUE[str(kind)].items():
                if (type(default), chosen) == (MuonOptions, "muon"):  # it is not the rest of itself
                    continue
                inside = Variant(chosen, read(options_of(variation), {}))
                based = replace(default, **{spec.name: inside})
                if chosen != value.name:
                    yield f"{name}={chosen}", said or "graph", default, based
                for below, inner, *both in pairs(inside.options, said):
                    made = [replace(based, **{spec.name: Variant(chosen, one)}) for one in both]
                    yield f"{name}={chosen}.{below}", inner, made[0], made[1]
        elif is_dataclass(value):
            for below, inner, *both in pairs(value, said):
                made = [replace(default, **{spec.name: one}) for one in both]
                yield f"{name}.{below}", inner, made[0], made[1]
        else:
            said = said or ("knob" if spec.metadata["knob"] else "graph")
            with contextlib.suppress(ValueError):  # values that do not go with the others
                one, two = (replace(default, **{spec.name: x}) for x in values(hints(cls)[spec.name], value))
                yield name, said, one, two


def test_a_key_depends_on_everything_but_knobs_and_what_is_no_part_of_the_identity() -> None:
    seen: dict[str, set[str]] = {}
    for name, what, one, two in pairs(read(Config, {})):
        assert one != two, name
        assert (key(one, CONTENT) == key(two, CONTENT)) is (what != "graph"), f"{name} is {what}"
        seen.setdefault(what, set()).add(name)
    assert (
        SEEDS
        | {
            *("train.max_iters", "train.max_tokens", "train.grad_clip", "train.gradient_accumulation_steps"),
            *(
                "train.eval_interval",
                "model.dropout",
                "model.linear=pkl.scale",
                "model.init=orthogonal",
                "schedule=wsd",
            ),
            *(
                "optimizer=adamw.learning_rate",
                "optimizer=adamw.betas",
                "optimizer=adamw.eps",
                "optimizer=sgd.momentum",
            ),
            *("optimizer=lion.betas", "optimizer=muon.momentum", "optimizer=muon.rest=adamw.weight_decay"),
            *("schedule=cosine.warmup_iters", "model.init=normal.std", "optimizer=adafactor.eps"),
        }
        <= seen["knob"]
    )
    assert {
        *(
            "train.batch_size",
            "train.dtype",
            "train.compile",
            "train.eval_iters",
            "model.n_layer",
            "model.norm=rmsnorm",
        ),
        *("model.norm=rmsnorm.eps", "optimizer=muon", "optimizer=muon.ns_steps", "optimizer=muon.nesterov"),
        *("optimizer=adafactor.beta2_decay", "optimizer=muon.rest=lion", "model.linear=pkl.compensate_step"),
        "model.position=rope.base",
    } <= seen["graph"]
    assert {"runner.pack", "train.log_interval", "tracking.slice_interval"} <= seen["free"]


def with_(**tree: Any) -> Config:
    made: Config = read(Config, tree)
    return made


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"model": {"dropout": 0.0}}, {"model": {"dropout": 0.1}}),
        ({"train": {"grad_clip": None}}, {"train": {"grad_clip": 1.0}}),
        ({"train": {"max_iters": 100}}, {"train": {"max_tokens": 100}}),
        (
            {"model": {"linear": {"variant": "pkl", "scale": 0.0}}},
            {"model": {"linear": {"variant": "pkl", "scale": 0.5}}},
        ),
    ],
)
def test_nothing_is_another_graph_than_a_number(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert key(with_(**one), CONTENT) != key(with_(**two), CONTENT)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"weight_decay": 0.0}, {"weight_decay": 0.1}),
        ({"betas": [0.0, 0.9]}, {"betas": [0.9, 0.9]}),
        ({"variant": "sgd", "momentum": 0}, {"variant": "sgd", "momentum": 0.9}),
        ({"variant": "muon", "rest": {"variant": "adamw", "weight_decay": 0.0}}, {"variant": "muon", "rest": "adamw"}),
    ],
)
def test_numbers_of_an_optimizer_are_in_no_graph(one: dict[str, Any], two: dict[str, Any]) -> None:
    """As those of rules, which are in the same table."""
    assert key(with_(optimizer=one), CONTENT) == key(with_(optimizer=two), CONTENT)


@pytest.mark.parametrize("name", ["seed", "init_seed", "data_seed"])
def test_every_seed_is_a_seed(name: str) -> None:
    given = [{}, {name: 0}, {name: 7}]
    assert len({key(with_(train=train), CONTENT) for train in given}) == 1


def test_content_is_part_of_a_key() -> None:
    plain = with_()
    keys = {key(plain, {**CONTENT, name: "other"}) for name in CONTENT} | {key(plain, CONTENT)}
    assert len(keys) == 4
    assert key(plain, dict(reversed(CONTENT.items()))) == key(plain, CONTENT)


# Rules and sites ------------------------------------------------------------------------------------------------------------

K = {"match": "h.*.attn.qkv[k]"}
KNOBS = {
    "lr_scale": 0.3,
    "learning_rate": {"depth": [0.1, 0.2]},
    "weight_decay": 0.0,
    "betas": [0.8, 0.9],
    "init": "ones",
}
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({}, {"k": {**K, name: value}}) for name, value in KNOBS.items()),
    ({}, {"k": {**K, **KNOBS}}),
    ({"k": {**K, "frozen": True}}, {"k": {**K, "frozen": True, **KNOBS}}),
    ({"k": {**K, "lora": {"rank": 2}}}, {"k": {**K, "lora": {"rank": 5, "alpha": 3.0}, "lr_scale": 2.0}}),
    ({"k": {**K, "lora": {"dropout": 0.1}}}, {"k": {**K, "lora": {"dropout": 0.2}}}),
    ({"k": {**K, "optimizer": {"variant": "muon"}}}, {"k": {**K, "optimizer": {"variant": "muon", "learning_rate": 0.5}}}),
]  # fmt: skip
OTHER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        ({}, {"k": {**K, name: value}})
        for name, value in {"frozen": True, "lora": {"rank": 2}, "optimizer": "lion"}.items()
    ),
    ({"k": {**K, "frozen": True}}, {"k": {**K, "frozen": False}}),
    ({"k": {**K, "frozen": True}}, {"k": {"match": "h.*.attn.qkv[q]", "frozen": True}}),
    ({"k": {**K, "frozen": True}}, {"k": {**K, "except": "h.0.**", "frozen": True}}),
    ({"k": {**K, "lora": {"rank": 2}}}, {"k": {**K, "lora": {"variant": "dora", "rank": 2}}}),
    ({"k": {**K, "lora": {"rank": 2}}}, {"k": {**K, "lora": {"rank": 2, "rslora": True}}}),
    ({"k": {**K, "lora": {"rank": 2}}}, {"k": {**K, "lora": {"rank": 2, "dropout": 0.5}}}),
    (
        {"k": {**K, "frozen": True}, "all": {"match": "h.**", "frozen": False}},
        {"all": {"match": "h.**", "frozen": False}, "k": {**K, "frozen": True}},
    ),
]


def rules(given: Mapping[str, Any]) -> str:
    return key(with_(slices=dict(given)), CONTENT)


@pytest.mark.parametrize(("one", "two"), SAME)
def test_rules_that_differ_in_knobs_pack(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert rules(one) == rules(two)


@pytest.mark.parametrize(("one", "two"), OTHER)
def test_rules_that_differ_otherwise_do_not(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert rules(one) != rules(two)


def test_a_site_of_initial_values_alone_is_none() -> None:
    def sites(**given: Any) -> str:
        return key(with_(model={"sites": given}), CONTENT)

    up = {"match": "h.*.mlp.*"}
    assert sites() == sites(a={**up, "init": "ones"})
    assert sites(a={**up, "linear": "pkl"}) == sites(
        a={**up, "linear": {"variant": "pkl", "scale": 2.0}, "init": "ones"}
    )
    assert sites() != sites(a={**up, "linear": "pkl"})


# What cannot be folded ------------------------------------------------------------------------------------------------------

TOLD = "It draws lots."
CLAIMED: dict[str, dict[str, Any]] = {
    "norm": {"model": {"norm": "rmsnorm"}},
    "optimizer": {"optimizer": "sgd"},
    "attention": {"model": {"layer_pattern": ["causal", "mamba2"]}},
    "linear": {"model": {"sites": {"x": {"match": "h.0.mlp.*", "linear": "pkl"}}}},
    "lora": {"slices": {"x": {**K, "lora": "dora"}}},
}
SOLO = {"norm": "rmsnorm", "optimizer": "sgd", "attention": "mamba2", "linear": "pkl", "lora": "dora"}


@pytest.mark.parametrize("kind", SOLO)
def test_a_variation_says_why_it_is_alone_wherever_it_is_chosen(kind: str) -> None:
    name = SOLO[kind]
    catalogue = {**CATALOGUE, kind: {**CATALOGUE[kind], name: type("Solo", (CATALOGUE[kind][name],), {"solo": TOLD})}}
    assert reason(with_(), catalogue) is None
    assert reason(with_(**CLAIMED[kind]), CATALOGUE) is None
    assert reason(with_(**CLAIMED[kind]), catalogue) == f"{kind} {name}: {TOLD}"


def test_an_optimizer_inside_another_or_in_a_rule_counts() -> None:
    solo = type("Solo", (SGD,), {"solo": TOLD})
    catalogue = {**CATALOGUE, "optimizer": {**CATALOGUE["optimizer"], "sgd": solo}}
    assert reason(with_(optimizer={"variant": "muon", "rest": "sgd"}), catalogue) == f"optimizer sgd: {TOLD}"
    assert reason(with_(slices={"k": {**K, "optimizer": "sgd"}}), catalogue) == f"optimizer sgd: {TOLD}"


def test_what_reads_the_host_is_alone() -> None:
    assert "float16" in str(reason(with_(train={"dtype": "float16"}), CATALOGUE))
    assert "slice_interval" in str(reason(with_(tracking={"slice_interval": 5}), CATALOGUE))
    assert reason(with_(train={"dtype": "bfloat16"}), CATALOGUE) is None


# How many -------------------------------------------------------------------------------------------------------------------

LAYERS = [with_(model={"n_layer": n}) for n in (1, 2, 3)]
HALF = with_(train={"dtype": "float16"})


def listed(*configs: Config) -> list[Any]:
    return [SimpleNamespace(hash=str(i), config=config) for i, config in enumerate(configs)]


def trials(
    runs: list[Any], pack: int | str, device: str = "cpu", slots: int = 1, most: int = 1000, layers: int = 3
) -> list[list[int]]:
    """layers: up to which a model is small."""
    places = [Slot(device, 1)] * slots

    def is_small(run: Any) -> bool:
        return int(run.config.model.n_layer) <= layers

    made = groups(runs, pack, places, lambda run: CONTENT, CATALOGUE, lambda run: most, is_small)
    return [[int(run.hash) for run in some] for some in made]


@given(
    st.lists(st.sampled_from(range(3)), max_size=40),
    st.one_of(st.sampled_from(["auto", "small"]), st.integers(1, 20)),
    st.sampled_from(["cpu", "cuda:0"]),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_each_run_is_in_one_pack_of_its_like_and_order_is_kept(
    kinds: list[int], pack: int | str, device: str, slots: int, most: int
) -> None:
    made = trials(listed(*(LAYERS[kind] for kind in kinds)), pack, device, slots, most)
    assert sorted(i for some in made for i in some) == list(range(len(kinds)))
    assert all(some == sorted(some) for some in made) and made == sorted(made)
    assert all(len({kinds[i] for i in some}) == 1 for some in made)
    for kind in set(kinds):
        sizes = [len(some) for some in made if kinds[some[0]] == kind]
        count = sum(sizes)
        assert max(sizes) - min(sizes) <= 1, "evenly"
        if isinstance(pack, int):
            assert max(sizes) <= pack and len(sizes) == -(-count // pack)
        elif device == "cpu":
            least, most_of_one = min(slots, count), min(most, packing.MOST)
            assert max(sizes) <= min(-(-count // slots), most_of_one)
            assert len(sizes) == min(count, least * -(-count // (least * most_of_one))), "as many in every slot"
        else:
            assert len(sizes) == min(slots, count)


def test_off_is_a_process_each() -> None:
    for device in ("cpu", "cuda:0"):
        assert trials(listed(*[LAYERS[0]] * 3), "off", device) == [[0], [1], [2]]


def test_what_cannot_be_folded_is_alone_on_a_gpu_only() -> None:
    runs = listed(HALF, LAYERS[0], HALF, LAYERS[0])
    for pack in ("auto", 4):
        assert trials(runs, pack, "cuda:0") == [[0], [1, 3], [2]]
        assert trials(runs, pack, "cpu") == [[0, 2], [1, 3]]


def test_what_is_small_is_packed_with_warm_workers_too() -> None:
    runs = listed(HALF, LAYERS[0], HALF, LAYERS[0], LAYERS[2], LAYERS[2], LAYERS[0])
    assert trials(runs, "small", layers=2) == [[0], [1, 3, 6], [2], [4], [5]], "and what can be folded"
    assert trials(runs, "small", slots=2, layers=3) == [[0], [1], [2], [3, 6], [4], [5]]


def test_a_pack_leaves_memory_for_the_rest() -> None:
    assert fitting(10**6, 64 * 10**6, 2) == 1 and fitting(10**6, 64 * 10**6, 1) == 2
    assert fitting(10**9, 1, 1) == 1, "a run too large is alone, and fails as it would alone"


def test_it_knows_no_torch() -> None:
    script = "import sys, lab.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(("given", "wanted"), [("off", "off"), (False, "off"), ("auto", "auto"), (8, 8)])
def test_how_it_is_said(given: Any, wanted: int | str) -> None:
    assert with_(runner={"pack": given}).runner.pack == wanted


@pytest.mark.parametrize("given", [0, True, "on", None, 2.5])
def test_how_it_is_not_said(given: Any) -> None:
    with pytest.raises(ValueError, match=r"runner\.pack"):
        with_(runner={"pack": given})


# No knob changes a shape or a graph -----------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Writes down every operation with its arguments, of tensors their shape and type alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def told(value: Any) -> Any:
            return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value

        self.seen.append(f"{func} {tree_map(told, (args, kwargs))}")
        return func(*args, **(kwargs or {}))


def work(model: ModelConfig, slices: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Shapes of a model's weights, and what a forward and a backward pass of training does."""
    made, rows = assemble(
        model, {name: read(SliceRule, rule) for name, rule in slices.items()}, read(Config, {}).optimizer
    )
    fill(made, rows, 1)
    made.train()
    x = tokens(made, 2, model.block_size + 1)
    with Operations() as operations:
        loss = made(x[:, :-1], x[:, 1:])[1]
        assert loss is not None
        loss.backward()
    return {name: tuple(t.shape) for name, t in made.state_dict().items()}, operations.seen


def knobs() -> Iterator[tuple[str, str, str, list[Any]]]:
    """Every knob of the model: kind ('' for the model itself), variation, option, two values."""
    for kind in ("", *KINDS, "lora"):
        classes = {"": ModelConfig} if not kind else {n: options_of(cls) for n, cls in CATALOGUE[kind].items()}
        for name, options in classes.items() if kind != "init" else ():
            for option, spec in fields_of(options).items():
                if (
                    spec.metadata.get("knob") and option != "rank"
                ):  # a rank is padded in a pack: the one shape that differs
                    yield kind, name, option, values(hints(options)[spec.name], spec.default)


@pytest.mark.parametrize(("kind", "name", "option", "numbers"), list(knobs()), ids=str)
def test_no_knob_changes_a_shape_or_the_graph(kind: str, name: str, option: str, numbers: list[Any]) -> None:
    if kind == "lora":
        each = [{"x": {**K, "lora": {"variant": name, "rank": 2, option: x}}} for x in numbers]
        assert work(config(), each[0]) == work(config(), each[1])
    elif not kind:
        assert work(config(**{option: numbers[0]}), {}) == work(config(**{option: numbers[1]}), {})
    else:
        for one, two in zip(*(Case(kind, name, {option: x}).trees() for x in numbers), strict=True):
            assert work(config(**one), {}) == work(config(**two), {})


def test_a_number_that_is_no_knob_would_be_seen() -> None:
    one, two = (work(config(norm={"variant": "rmsnorm", "eps": eps}), {}) for eps in (0.1, 0.2))
    assert one[0] == two[0] and one[1] != two[1]
    assert {(kind, option) for kind, _, option, _ in knobs()} >= {
        *(("", "dropout"), ("linear", "scale"), ("embedding", "scale"), ("lora", "alpha"), ("lora", "dropout"))
    }
    assert torch.is_grad_enabled()
