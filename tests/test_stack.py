"""Stacked layers: the values, the files and the addresses of the unstacked model, from one parameter for all layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from models import MODERN, config, losses, make, read, tokens
from safetensors.torch import load_file

from convert.__main__ import main as convert
from core.lora import merge
from core.options import plain
from core.rules import Row, SliceRule
from core.slices import slices
from core.stack import Stack
from core.weights import load_weights, weights
from core.yaml_files import dump
from engine.loop import Run
from engine.optim import Optimizers
from model import GPT, assemble, fill
from train_args import Config
from variations.cache import Cache
from variations.optimizer import OPTIMIZERS

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_kv_head": 4},
    "modern": {"n_layer": 3, **MODERN},
    "dropout": {"n_layer": 3, "dropout": 0.2},
    "pkl": {"n_layer": 3, "linear": "pkl"},
    "two kinds": {"n_layer": 4, "sites": {"even": {"match": "h.{0..1}.mlp.*", "linear": "pkl"}}},
    "alternating": {"n_layer": 4, "sites": {"odd": {"match": ["h.1.mlp", "h.3.mlp"], "mlp": "gated"}}},
    "one layer": {"n_layer": 1},
    "experts": {"n_layer": 3, "mlp": {"variant": "moe", "experts": 4, "width": 8, "bias_rate": 0.01}},
    "hybrid": {"n_layer": 4, "layer_pattern": ["mamba2", "causal"]},
    "delta": {"n_layer": 3, "attention": "delta"},
}
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "parts": {
        "k": {"match": "h.*.attn.qkv[k]", "lr_scale": 0.3, "weight_decay": 0.0},
        "deep": {"match": "h.**", "lr_scale": {"depth": [1.0, 0.3]}},
        "still": {"match": "h.0.attn.proj", "frozen": True},
        "small": {"match": "h.0.attn.qkv[v]", "init": {"variant": "normal", "std": 0.5}},
    },
    "adapters": {"some": {"match": "h.0.attn.qkv[q]", "lora": {"rank": 2}}, "all": {"match": "h.*.mlp.*", "lora": {"rank": 2}}},
}  # fmt: skip


def node(name: str = "adamw", **options: Any) -> Any:
    return read(Config, {"optimizer": {"variant": name, "learning_rate": 0.01, **options}}).optimizer


def made(stacked: bool, model: str, rules: str = "none", optimizer: str = "adamw") -> tuple[GPT, list[Row], Optimizers]:
    said = {name: read(SliceRule, {**rule, "optional": True}) for name, rule in RULES[rules].items()}
    net, rows = assemble(config(**MODELS[model], stack_layers=stacked), said, node(optimizer))
    fill(net, rows, 3)
    return net, rows, Optimizers(net, rows)


def train(net: GPT, optimizers: Optimizers, first: int, count: int) -> list[tuple[float, float]]:
    """Losses and gradient norms."""
    told = []
    for i in range(first, first + count):
        optimizers.zero_grad()
        loss = losses(net) * (1 + i)
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack(optimizers.norms(lambda p: p.grad)))
        optimizers.step(1.0)
        told.append((loss.item(), norm.item()))
    return told


def told(row: Row) -> tuple[str, object]:
    return str(row.init), replace(row.settings, init=None)


def same(one: GPT, other: GPT) -> bool:
    a, b = weights(one), weights(other)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_training_equals_the_unstacked_model_bit_for_bit(model: str, rules: str) -> None:
    plain, rows, ours = made(False, model, rules)
    stacked, other, theirs = made(True, model, rules)
    assert isinstance(stacked.h, Stack) and same(plain, stacked), "initial values"
    assert [row.slice.address for row in rows] == [row.slice.address for row in other]
    assert [told(row) for row in rows] == [told(row) for row in other]
    assert train(plain, ours, 0, 5) == train(stacked, theirs, 0, 5)
    assert same(plain, stacked)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_moves_a_stack_as_it_moves_its_layers(optimizer: str) -> None:
    plain, _, ours = made(False, "modern", "parts", optimizer)
    stacked, _, theirs = made(True, "modern", "parts", optimizer)
    assert train(plain, ours, 0, 4) == train(stacked, theirs, 0, 4) and same(plain, stacked)
    a, b = ours.state(), theirs.state()
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stacked", [True, False])
def test_either_continues_from_what_the_other_saved(stacked: bool, optimizer: str) -> None:
    first, _, before = made(stacked, "two kinds", "parts", optimizer)
    train(first, before, 0, 3)
    saved, state = ({k: t.clone() for k, t in x.items()} for x in (weights(first), before.state()))
    second, _, after = made(not stacked, "two kinds", "parts", optimizer)
    load_weights(second, saved)
    after.load(state)
    assert train(first, before, 3, 3) == train(second, after, 3, 3) and same(first, second)


@pytest.mark.parametrize("model", MODELS)
def test_one_parameter_for_each_weight_and_kind_of_layer(model: str) -> None:
    net, _, _ = made(True, model)
    names = [name for name, _ in net.named_parameters() if name.startswith("h.")]
    kinds = {name.split("/")[0] for name in names}
    assert len(kinds) == (2 if model in ("two kinds", "alternating", "hybrid") else 1)
    assert all(p.shape[0] == len(made(False, model)[0].h) / len(kinds) for n, p in net.named_parameters() if "/" in n)
    assert not any(list(block.parameters()) for block in net.h), "blocks own nothing"
    plain = {part.address: part.shape for part in slices(made(False, model)[0])}
    assert {part.address: part.shape for part in slices(net)} == plain


def test_layers_of_other_kinds_are_told_by_their_numbers() -> None:
    names = {name.split("/")[0] for name, _ in made(True, "alternating")[0].named_parameters() if "/" in name}
    assert names == {"h.0,2", "h.1,3"}
    assert {n.split("/")[0] for n, _ in made(True, "two kinds")[0].named_parameters() if "/" in n} == {"h.0-1", "h.2-3"}


def test_equal_rows_of_all_layers_merge() -> None:
    _, _, plain = made(False, "gpt2")
    _, _, stacked = made(True, "gpt2")
    count = [sum(len(g.entries) for m in o.members.values() for g in m.groups) for o in (plain, stacked)]
    blocks = 12  # parameters of a GPT-2 block
    assert count[0] - count[1] == (3 - 1) * blocks


@pytest.mark.parametrize("stacked", [True, False])
def test_state_dicts_load_strictly_both_ways(stacked: bool) -> None:
    one, _, _ = made(stacked, "two kinds", "adapters")
    other, _, optimizers = made(not stacked, "two kinds", "adapters")
    train(other, optimizers, 0, 1)
    assert not same(one, other)
    one.load_state_dict(other.state_dict())
    assert same(one, other) and torch.equal(losses(one), losses(other))
    state = other.state_dict()
    state["h.1.attn.proj.extra"] = state.pop("h.1.attn.proj.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*proj.*Unexpected.*h\.1\.attn\.proj\.extra"):
        one.load_state_dict(state)


def test_a_layer_s_tensors_are_views_of_the_stack() -> None:
    net, _, _ = made(True, "gpt2")
    whole = dict(net.named_parameters())["h.0-2/attn/qkv/weight"]
    saved = weights(net)
    for i in range(3):
        assert saved[f"h.{i}.attn.qkv.weight"].data_ptr() == whole[i].data_ptr(), "nothing is copied to be saved"
    load_weights(net, {name: torch.zeros_like(t) for name, t in saved.items()})
    assert not whole.any()


def test_layers_are_views_made_once_and_no_gradient_is_of_full_size_for_each_layer() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []
            self.sizes: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.names.append(func.__name__)
            self.sizes += (
                [out.numel()] if func.__name__.startswith(("zeros", "new_zeros", "empty_like", "stack")) else []
            )
            return out

    net, _, optimizers = made(True, "gpt2")
    losses(net).backward()
    optimizers.zero_grad()
    with Calls() as calls:
        losses(net).backward()
    assert {"mm.default", "copy_.default"} <= {*calls.names}, "the pass was seen"
    assert not any(name.startswith(("unbind", "select_backward", "select_scatter", "stack")) for name in calls.names)
    assert max(calls.sizes, default=0) < max(p.numel() for n, p in net.named_parameters() if "/" in n)


def test_a_layer_that_a_loss_does_not_reach_has_a_gradient_of_zeros() -> None:
    """The memory of the gradient is kept from the step before, and its values there are not."""
    net, _, optimizers = made(True, "gpt2")
    losses(net).backward()
    stacked = {n: p for n, p in net.named_parameters() if "/" in n}
    assert all(p.grad is not None and p.grad[2].any() for p in stacked.values())
    optimizers.zero_grad()
    x = torch.randn(1, 4, net.config.n_embd)
    for block in list(net.h.layers())[:2]:  # type: ignore[operator]
        x = block(x)
    x.square().sum().backward()
    assert all(p.grad is not None and not p.grad[2].any() for p in stacked.values())
    assert all(p.grad is not None and p.grad[0].any() for n, p in stacked.items() if n.endswith("weight"))


def test_gradients_of_several_passes_add_up_and_a_new_step_begins_anew() -> None:
    """The memory of a gradient is kept; its values are not, and a frozen stack has none."""
    made_ = {stacked: made(stacked, "gpt2") for stacked in (False, True)}
    told: dict[bool, list[torch.Tensor]] = {}
    for stacked, (net, _, optimizers) in made_.items():
        norms = []
        for passes in (2, 1, 3):
            optimizers.zero_grad()
            for i in range(passes):
                (losses(net) * (1 + i)).backward()
            norms.append(torch.stack(optimizers.norms(lambda p: p.grad)))
        told[stacked] = norms
    assert all(torch.equal(a, b) for a, b in zip(told[False], told[True], strict=True))
    net, _, _ = made_[True]
    for name, parameter in net.named_parameters():
        parameter.grad = None
        parameter.requires_grad_("/attn/" not in name)
    losses(net).backward()
    assert all((p.grad is None) == ("/attn/" in name) for name, p in net.named_parameters())


def test_a_copy_is_independent() -> None:
    net, _, _ = made(True, "gpt2")
    before = losses(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(losses(net), before) and not torch.equal(losses(other), before)


def test_decoding_with_a_cache_equals_a_full_pass() -> None:
    net = make(**MODELS["modern"], stack_layers=True).eval()
    x = tokens(net, 1, 10)
    with torch.no_grad():
        whole, cache = net(x)[0], Cache()
        parts = torch.cat(
            [net(x[:, :4], cache=cache)[0], *(net(x[:, i : i + 1], cache=cache)[0] for i in range(4, 10))], 1
        )
    # Sums over other lengths of keys round otherwise: some 16 roundings of logits of order 1.
    torch.testing.assert_close(parts, whole, rtol=0, atol=16 * 2.0**-22)


def at(run: Run, iteration: int) -> bool:
    return run.state.iter == iteration


def test_runs_stop_and_continue_and_equal_the_unstacked_run(tmp_path: Path) -> None:
    root = runs.tiny_corpus(tmp_path / "data")
    saved = {}
    for stacked in (False, True):
        config, corpus = runs.read(root, model__stack_layers=stacked, model__n_layer=3, model__dropout=0.1)
        first = runs.make(tmp_path / str(stacked), config, corpus)
        assert runs.drive(first, partial(at, first, 5)) == "stopped"
        assert runs.drive(runs.make(tmp_path / str(stacked), config, corpus)) == "done"
        folder = max((tmp_path / str(stacked) / "checkpoint").iterdir())
        saved[stacked] = [load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")]
    for one, other in zip(saved[False], saved[True], strict=True):
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_pattern_of_layers_chooses_their_attention() -> None:
    net = make(n_layer=4, layer_pattern=["memory", "causal"], attention={"variant": "causal", "qk_norm": True})
    assert [type(block.attn).__name__ for block in net.h] == ["MemoryAttention", "CausalAttention"] * 2
    assert net.h[1].attn.q_norm is not None, "the options of model.attention"
    with pytest.raises(ValueError, match=r"layer_pattern: no variant 'casual'. Did you mean 'causal'"):
        make(layer_pattern=["casual"])


@pytest.mark.parametrize("stacked", [False, True])
def test_an_optimizer_has_as_many_groups_as_there_are_settings(stacked: bool) -> None:
    """24 layers of 64 experts: with equal settings, rows merge to whole weights; a rule adds its own group and no more."""
    moe = {"variant": "moe", "experts": 64, "width": 8}
    tree = {"n_layer": 24, "mlp": moe, "stack_layers": stacked, "bias": False, "norm": "rmsnorm", "n_kv_head": 4}
    for rules, settings in (({}, 2), ({"gates": {"match": "h.*.mlp.gate_up[gate]", "lr_scale": 2.0}}, 3)):
        said = {name: read(SliceRule, rule) for name, rule in rules.items()}
        net, rows = assemble(config(**tree), said, node())
        fill(net, rows, 1)
        (member,) = Optimizers(net, rows).members.values()
        assert len(member.groups) == settings == len({(r.learning_rate, r.settings.weight_decay) for r in rows})
        if not rules:
            assert sum(len(group.entries) for group in member.groups) == len(list(net.parameters()))


def test_a_stacked_run_is_converted_under_each_layer_s_name(tmp_path: Path) -> None:
    config, corpus = runs.read(runs.tiny_corpus(tmp_path / "data"), model__stack_layers=True, train__max_iters=2)
    assert runs.drive(runs.make(tmp_path / "run", config, corpus)) == "done"
    (tmp_path / "run/config.yaml").write_text(dump(plain(config)))
    assert convert(["effective", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    names = set(load_file(tmp_path / "out.safetensors"))
    assert "h.0.attn.qkv.weight" in names and not any("/" in name for name in names)


def test_merging_takes_every_adapter_of_one_map_away() -> None:
    """Two rules give two experts adapters of different rank at the same part."""
    moe = {"variant": "moe", "experts": 4, "width": 8}
    rules = {str(e): read(SliceRule, {"match": f"h.*.mlp.gate_up[{e}.gate]", "lora": {"rank": 1 + e}}) for e in (0, 1)}
    net, rows = assemble(config(mlp=moe), rules, node())
    fill(net, rows, 1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0.0, 0.3)
    net.eval()
    before = losses(net)
    assert len(merge(net)) == 4 and not any("lora" in name for name in net.state_dict())
    # A product of two matrices added once instead of beside: a few roundings of logits of order 1.
    torch.testing.assert_close(losses(net), before, rtol=0, atol=1e-5)
