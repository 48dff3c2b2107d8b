"""Adapters: against separate maps with adapters of their own, what they cost, what trains, and what merging and saving keep."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import reference_slices as oracle
import runs
import torch
from models import config, losses, read, scramble, sentence, tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import convert.__main__
import convert.places
import sample
import train
from core.addresses import is_adapter
from core.lora import adapted, adapter_weights, begin, effective, load_adapters, merge
from core.options import NoOptions, Reader, Variant
from core.rules import Row, RuleMistakes, SliceRule
from core.weights import load_weights, weights
from engine.optim import Optimizers
from model import GPT, assemble, build, fill
from variations import CATALOGUE
from variations.dropout import set_step
from variations.lora import LORAS

ENTRIES = [name for name in LORAS if name != "none"]
QV: dict[str, Any] = {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 4, "alpha": 8.0}}
UNTIED = {"tie_weights": False}
PKL: dict[str, Any] = {"linear": {"variant": "pkl", "scale": 0.5}}
ADAMW = Reader(CATALOGUE).variant("optimizer", {"variant": "adamw", "learning_rate": 0.01}, ())


def made(seed: int = 1, std: float = 0.0, **tree: Any) -> tuple[Any, list[Row]]:
    """A model with the rules in `slices`, and its table; with `std` all parameters are far from special values."""
    assert ADAMW is not None
    rules: dict[str, SliceRule] = {name: read(SliceRule, rule) for name, rule in tree.pop("slices").items()}
    model, rows = assemble(config(**tree), rules, ADAMW)
    fill(model, rows, seed)
    return (scramble(model, seed, std) if std else model), rows


def one(rule: dict[str, Any], std: float = 0.0, **tree: Any) -> Any:
    return made(std=std, slices={"adapt": rule}, **tree)[0]


def names(model: nn.Module) -> list[str]:
    """The addresses of all adapters' tensors in the first layer and outside of layers."""
    return sorted(name for name in adapter_weights(model) if not name.startswith("h.1."))


def inputs(linear: Any, dtype: torch.dtype, count: int = 7) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(2, count, linear.in_features, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


# Against separate maps --------------------------------------------------------------------------------------------------------

# Where; the rule's match and except; the model; names of adapters and their rows in the order of the output.
Place = tuple[str, str, tuple[str, ...], dict[str, Any], list[tuple[str, int]]]
MHA, GATED = {"n_kv_head": 4}, {"mlp": {"variant": "gated", "width": 24}}
PLACES: list[Place] = [
    ("h.0.attn.qkv", "h.*.attn.qkv[q,v]", (), MHA, [("adapter[q]", 16), ("", 16), ("adapter[v]", 16)]),
    ("h.0.attn.qkv", "h.*.attn.qkv[q,v]", (), {}, [("adapter[q]", 16), ("", 8), ("adapter[v]", 8)]),
    ("h.1.attn.qkv", "h.*.attn.qkv[k]", (), PKL, [("", 16), ("adapter[k]", 8), ("", 8)]),
    ("h.0.attn.qkv", "h.*.attn.qkv", (), {}, [("adapter", 32)]),
    ("h.0.attn.qkv", "h.*.attn.qkv", ("h.*.attn.qkv[k]",), {}, [("adapter", 16), ("", 8), ("adapter", 8)]),
    ("h.0.mlp.gate_up", "h.*.mlp.*[gate,up]", (), GATED, [("adapter[gate]", 24), ("adapter[up]", 24)]),
    ("h.0.mlp.gate_up", "h.0.mlp.gate_up[up]", (), GATED | PKL, [("", 24), ("adapter[up]", 24)]),
    ("h.0.attn.proj", "h.*.attn.proj", (), PKL, [("adapter", 16)]),
    ("h.1.mlp.down", "h.*.mlp.*", (), {}, [("adapter", 16)]),
    ("h.1.mlp.up", "h.*.mlp.*", (), {}, [("adapter", 64)]),
    ("head", "head", (), UNTIED, [("adapter", 19)]),
]


def leaves(linear: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in linear.named_parameters()}


def weight_of(linear: Any, p: dict[str, Tensor]) -> Tensor:
    return reference.pkl(p["weight"][0], p["weight"][1], linear.scale) if p["weight"].dim() == 3 else p["weight"]


def adapters(p: dict[str, Tensor], parts: list[tuple[str, int]], rslora: bool) -> Iterator[oracle.Adapter | None]:
    """The adapter of each part: its own, or its rows of one that several parts share."""
    used: dict[str, int] = {}
    for name, rows in parts:
        start = used.get(name, 0)
        used[name] = start + rows
        a, b, m = (p.get(f"{name}.lora_{x}") for x in ("a", "b", "magnitude"))
        if a is None or b is None:
            yield None
        else:
            own = None if m is None else m[start : start + rows]
            yield oracle.Adapter(a, b[start : start + rows], 8.0, 4, rslora, own)


def separate(linear: Any, x: Tensor, p: dict[str, Tensor], parts: list[tuple[str, int]], rslora: bool) -> Tensor:
    """The oracle's output with the linear map cut into its parts."""
    sizes = [rows for _, rows in parts]
    bias = p["bias"].split(sizes) if "bias" in p else (None,) * len(parts)
    made_of = zip(weight_of(linear, p).split(sizes), bias, adapters(p, parts, rslora), strict=True)
    return oracle.separate_qkv_lora(x, list(made_of))


def close(ours: Tensor, theirs: Tensor) -> None:
    """Sums of at most 100 terms in another order, three deep, whose terms are at most ten times the largest result: their roundings
    are below 2000 units of it in the worst case and about 30 in fact. A wrong row or scale is off by 10% and more."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 500 * torch.finfo(theirs.dtype).eps * theirs.abs().max()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[1]}-{'-'.join(place[3])}")
@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float64, True), (torch.float64, False)])
def test_a_fused_map_is_separate_maps_with_adapters(place: Place, name: str, dtype: torch.dtype, bias: bool) -> None:
    path, match, excepted, tree, parts = place
    rslora = name == "lora" and not bias  # the root of rank 4 is exact
    lora = {"variant": name, "rank": 4, "alpha": 8.0, "rslora": rslora}
    model = one({"match": match, "except": list(excepted), "lora": lora}, 0.5, bias=bias, **tree).to(dtype)
    linear = model.get_submodule(path)
    assert {n for n, _ in linear.named_children()} == {n for n, _ in parts if n}
    x, p = inputs(linear, dtype), leaves(linear)
    ours, y = linear(x), inputs(linear, dtype)
    theirs = separate(linear, y, p, parts, rslora)
    close(ours, theirs)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    ours.backward(direction)
    theirs.backward(direction)
    assert x.grad is not None and y.grad is not None
    close(x.grad, y.grad)
    for key, parameter in linear.named_parameters():
        expected = p[key].grad
        assert parameter.grad is not None and expected is not None, key
        assert expected.abs().max() > 0 and parameter.grad.is_contiguous()
        close(parameter.grad, expected)
    merged = effective(linear)
    assert isinstance(merged, Tensor)
    for rows, base, ad in zip(
        merged.split([n for _, n in parts]),
        weight_of(linear, p).split([n for _, n in parts]),
        adapters(p, parts, rslora),
        strict=True,
    ):
        close(rows, merged_oracle(base, ad))


def merged_oracle(base: Tensor, ad: oracle.Adapter | None) -> Tensor:
    if ad is None:
        return base
    if ad.magnitude is None:
        return oracle.lora_merged(base, ad.a, ad.b, ad.alpha, ad.rank, ad.rslora)
    return oracle.dora_merged(base, ad.a, ad.b, ad.alpha, ad.rank, ad.magnitude, ad.rslora)


@pytest.mark.parametrize("linear", ["standard", "pkl"])
def test_the_derivative_is_that_of_finite_differences(linear: str) -> None:
    """In all arguments, through the function that adds in place."""
    model = one(QV, 0.5, linear=linear).double()
    qkv, x = model.h[0].attn.qkv, inputs(model.h[0].attn.qkv, torch.float64, 2)
    keys = [name for name, _ in qkv.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(qkv, dict(zip(keys, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *leaves(qkv).values()))


# Who gets which --------------------------------------------------------------------------------------------------------------


def test_a_bracket_gives_each_part_its_own_and_no_bracket_one_for_all() -> None:
    assert names(one({"match": "h.*.attn.qkv", "lora": {"rank": 2}})) == ["h.0.attn.qkv.lora_a", "h.0.attn.qkv.lora_b"]
    parts = ["h.0.attn.qkv[q].lora_a", "h.0.attn.qkv[q].lora_b", "h.0.attn.qkv[v].lora_a", "h.0.attn.qkv[v].lora_b"]
    assert names(one(QV)) == names(one(QV, **PKL)) == parts
    rest = {"match": "h.*.attn.qkv", "except": "h.*.attn.qkv[k]", "lora": {"rank": 2}}
    model = one(rest)
    (adapter,) = [m for n, m in model.h[0].attn.qkv.named_children()]
    assert adapter.ranges == ((0, 16), (24, 32)) and adapter.lora_b.shape == (24, 2)
    dora = {"match": "h.1.mlp.up", "lora": {"variant": "dora", "rank": 2}}
    assert sorted(adapter_weights(one(dora))) == [f"h.1.mlp.up.lora_{x}" for x in ("a", "b", "magnitude")]


def test_two_rules_give_two_ranks_and_the_later_one_wins() -> None:
    rules: dict[str, Any] = {
        "both": QV,
        "v": {"match": "h.*.attn.qkv[v]", "lora": {"rank": 2}},
        "none": {"match": "h.1.**", "lora": "none"},
    }
    model, rows = made(slices=rules)
    q, v = (model.h[0].attn.qkv.get_submodule(f"adapter[{x}]") for x in "qv")
    assert q.lora_a.shape == (4, 16) and v.lora_a.shape == (2, 16) and v.lora_b.shape == (8, 2)
    assert q.scale == 2.0 and v.scale == 8.0
    assert not [row for row in rows if row.slice.parameter.startswith("h.1.") and is_adapter(row.slice.parameter)]
    root = one({"match": "h.*.mlp.up", "lora": {"rank": 3, "alpha": 6.0, "rslora": True}}).h[0].mlp.up
    assert float(root.adapter.scale) == pytest.approx(6 / 3**0.5, rel=1e-7)


def refusal(rule: dict[str, Any], **tree: Any) -> str:
    with pytest.raises(RuleMistakes) as caught:
        one(rule, **tree)
    return str(caught.value)


def test_what_cannot_have_an_adapter_is_told() -> None:
    assert "slices.adapt.lora.rank" in (told := refusal({"match": "h.*.attn.qkv[v]", "lora": {"rank": 9}}))
    assert "9 is more than 8" in told and "h.0.attn.qkv.weight[v]" in told
    assert "looked up by an embedding" in refusal({"match": "wte", "lora": {}})
    assert "which is also head.weight" in refusal({"match": "head", "lora": {}})
    assert "none of what the rule matches is a linear map" in refusal({"match": "h.*.ln_1", "lora": {}})
    assert "one number of a weight that has 2" in refusal({"match": "h.*.attn.qkv[a]", "lora": {}}, **PKL)


def test_rules_about_adapters_hold_of_them_and_others_pass_them_by() -> None:
    rules: dict[str, Any] = {
        "adapt": QV,
        "all": {"match": "h.**", "lr_scale": 3.0, "frozen": True},
        "b": {"match": "h.**.lora_b", "lr_scale": 2.0, "weight_decay": 0.5},
        "a": {"match": "h.*.attn.qkv[q].lora_a", "init": {"variant": "normal", "std": 0.5}},
    }
    model, rows = made(7, slices=rules)
    for row in rows:
        address = row.slice.address
        expected = 3.0 if address.startswith("h.") and "lora" not in address else 2.0 if "lora_b" in address else 1.0
        assert row.settings.lr_scale == expected and row.settings.frozen == (expected == 3.0), address
        assert row.settings.weight_decay == 0.5 or "lora_b" not in address
    saved = adapter_weights(model)
    for layer in "01":
        drawn = oracle.initial_normal(7, f"h.{layer}.attn.qkv[q].lora_a", (4, 16), 0.5)
        assert torch.equal(saved[f"h.{layer}.attn.qkv[q].lora_a"], drawn)
        usual = oracle.initial_kaiming(7, f"h.{layer}.attn.qkv[v].lora_a", (4, 16)) / 3**0.5
        torch.testing.assert_close(saved[f"h.{layer}.attn.qkv[v].lora_a"], usual, rtol=1e-6, atol=0)
        assert not saved[f"h.{layer}.attn.qkv[v].lora_b"].any()


def test_several_adapters_of_one_part_are_saved_apart() -> None:
    """Experts with adapters of their own have these on one weight."""
    node = {"variant": "moe", "experts": 3, "top_k": 2, "width": 8}
    rules = {
        "one": {"match": "h.*.mlp.down[2]", "lora": {"rank": 2}},
        "others": {"match": "h.*.mlp.down[0,1]", "lora": {"rank": 3}},
    }
    model, _ = made(7, mlp=node, slices=rules)
    saved = adapter_weights(model)
    count = sum(1 for name, _ in model.named_parameters() if is_adapter(name))
    assert len(saved) == count == 2 * 2 * 2
    assert sorted(len(t) for name, t in saved.items() if "h.0" in name) == [1, 1, 2, 2], "by their experts"
    other, _ = made(8, mlp=node, slices=rules)
    load_adapters(other, saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter_weights(other).items())


# The start and the training --------------------------------------------------------------------------------------------------


def plain_logits(model: GPT, **tree: Any) -> Tensor:
    """The logits of a model without adapters that has the other weights of `model`."""
    bare = build(config(**tree), 0)
    load_weights(bare, {n: t for n, t in weights(model).items() if not is_adapter(n)})
    return logits(bare)


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    out = model.eval()(tokens(model, 2, 12))[0]
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("tree", [{}, UNTIED | PKL | MHA])
def test_a_model_with_lora_begins_as_its_base_to_the_bit(tree: dict[str, Any]) -> None:
    model = one({"match": ["h.*.attn.*", "h.*.mlp.*"], "lora": {"rank": 4}}, **tree)
    assert len(adapted(model)) == 8
    assert torch.equal(logits(model), plain_logits(model, **tree))
    untouched = build(config(**tree), 1)
    assert all(torch.equal(t, weights(model)[n]) for n, t in weights(untouched).items())


@pytest.mark.parametrize("tree", [{}, UNTIED | PKL])
def test_a_model_with_dora_begins_as_its_base(tree: dict[str, Any]) -> None:
    """The magnitude is the norm computed by the same operation on the same rows, so the gain is exactly 1 and what is added to
    the output is 0 times it: every bit. The norm by itself is within a few roundings of the oracle's."""
    model = one({"match": ["h.*.attn.*", "h.*.mlp.*"], "lora": {"variant": "dora", "rank": 4}}, **tree)
    assert torch.equal(logits(model), plain_logits(model, **tree))
    up = model.h[0].mlp.up
    norms = weight_of(up, leaves(up)).square().sum(1).sqrt()
    torch.testing.assert_close(up.adapter.lora_magnitude, norms, rtol=1e-6, atol=0)
    with torch.no_grad():
        up.adapter.lora_b.normal_()
    begin(model)
    torch.testing.assert_close(up.adapter.lora_magnitude, norms, rtol=1e-6, atol=0)


def trained(model: GPT, rows: list[Row], steps: int = 5) -> Optimizers:
    optimizers = Optimizers(model, rows)
    model.train()
    for _ in range(steps):
        optimizers.zero_grad()
        losses(model).backward()
        optimizers.step(1.0)
    return optimizers


@pytest.mark.parametrize("name", ENTRIES)
def test_with_a_frozen_base_adapters_alone_train(name: str) -> None:
    lora = {"match": ["h.*.attn.qkv[q,v]", "h.*.mlp.up"], "lora": {"variant": name, "rank": 2}}
    model, rows = made(slices={"adapt": lora, "base": {"match": "**", "frozen": True}})
    before = {n: t.clone() for n, t in weights(model).items()}
    optimizers = trained(model, rows)
    after = weights(model)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(key) == (not torch.equal(after[key], before[key])), key
        assert (parameter.grad is None) == (not is_adapter(key))
    held = {key.partition("/")[2] for key in optimizers.state() if not key.startswith("steps/")}
    assert held and all("adapter" in key for key in held)
    assert {row.slice.parameter for row in optimizers.trained} == {key for key in after if is_adapter(key)}


def test_a_base_that_is_not_frozen_trains_too() -> None:
    model, rows = made(slices={"adapt": QV, "k": {"match": "h.*.attn.qkv[k]", "frozen": True}})
    before = model.h[0].attn.qkv.weight.detach().clone()
    trained(model, rows)
    changed = (model.h[0].attn.qkv.weight != before).any(1).tolist()
    assert changed == [True] * 16 + [False] * 8 + [True] * 8


def test_dropout_of_adapters_is_keyed_and_off_in_evaluation() -> None:
    model = one({**QV, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.5}}, 0.5)
    qkv, still = model.h[0].attn.qkv, one(QV, 0.5).h[0].attn.qkv
    x = inputs(qkv, torch.float32)

    def at(step: int, seed: int = 1) -> Any:
        set_step(model, seed, step)
        return qkv(x)

    first = at(3)
    assert torch.equal(first, at(3)) and not torch.equal(first, at(4)) and not torch.equal(first, at(3, seed=2))
    assert torch.equal(first[..., 16:24], still(x)[..., 16:24]), "k has no adapter and nothing of it is dropped"
    set_step(model, 1, 3)
    q, v = (qkv.get_submodule(f"adapter[{part}]").drop for part in "qv")
    assert not torch.equal(q(x), v(x)), "masks of two adapters differ"
    model.eval()
    still.load_state_dict(qkv.state_dict())
    assert torch.equal(at(3), still(x))


# What it costs ----------------------------------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Counts the tensors that operations make with a dimension of `size`, views left out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, Tensor) else [t for t in out or () if isinstance(t, Tensor)]:
            if self.size in tensor.shape and not func.is_view:
                self.found.append(str(func))
        return out


def measured(linear: Any) -> tuple[int, list[str]]:
    """Multiply-adds times two of forward and backward, and what makes tensors of the full output width."""
    x = inputs(linear, torch.float32)
    direction = torch.randn(*x.shape[:-1], linear.out_features)
    with FlopCounterMode(display=False) as flops, Shapes(linear.out_features) as shapes:
        linear(x).backward(direction)
    return flops.get_total_flops(), sorted(shapes.found)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_adapters_of_q_and_v_cost_nothing_for_k(name: str, bias: bool) -> None:
    """Beside the base's: the products with A and B of q and v, forward and twice backward, and no tensor as wide as q, k, v."""
    lora = {"match": "h.0.attn.qkv[q,v]", "lora": {"variant": name, "rank": 3}}
    base, changed = (made(slices=s, bias=bias)[0].h[0].attn.qkv for s in ({}, {"adapt": lora}))
    (flops, wide), (more_flops, more_wide) = measured(base), measured(changed)
    positions = 2 * 7
    q, v = 2 * positions * 3 * (16 + 16), 2 * positions * 3 * (16 + 8)
    product = 2 * 3 * 16 * (16 + 8) if name == "dora" else 0  # B A, whose rows' norms it needs
    assert more_flops - flops == 3 * (q + v) + product
    assert wide and (more_wide == wide or name == "dora")  # whose outputs are rescaled, and their gradients with them


def test_a_model_counts_the_work_of_its_adapters() -> None:
    base, changed = made(slices={})[0], one(QV)
    per_layer = 2 * 4 * (16 + 16) + 2 * 4 * (16 + 8)
    assert changed.flops_per_token() - base.flops_per_token() == 3 * 2 * per_layer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about torch
def test_a_model_with_adapters_compiles_as_one_graph() -> None:
    """The same operations in the same order, traced: a few roundings of the loss."""
    for name in ENTRIES:
        model = one({**QV, "lora": {"variant": name, "rank": 2}}, 0.2, n_layer=1)
        x = tokens(model, 2, 13)
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        plain, traced = (f(x[:, :-1], x[:, 1:])[1] for f in (model, compiled))
        assert abs(plain.item() - traced.item()) < 1e-6 * plain.item()
        ours, theirs = (torch.autograd.grad(y, list(model.parameters())) for y in (plain, traced))
        for a, b in zip(ours, theirs, strict=True):
            close(b, a)


# Merging, saving, copying -------------------------------------------------------------------------------------------------------


def shapes_kept(model: GPT, tree: dict[str, Any]) -> None:
    for linear, _ in adapted(model):
        x = inputs(linear, torch.float64)
        assert linear(x).shape == (*x.shape[:-1], linear.out_features)


def all_learn(model: GPT, tree: dict[str, Any]) -> None:
    losses(model).backward()
    for key, parameter in model.named_parameters():
        assert not is_adapter(key) or (parameter.grad is not None and parameter.grad.abs().max() > 0), key


def merges(model: GPT, tree: dict[str, Any]) -> None:
    """The merged model is a plain one, and gives the adapted one's outputs but for roundings."""
    before, plain = logits(model), build(config(**tree), 0).double()
    expected = {id(linear): effective(linear) for linear, _ in adapted(model)}
    gone = merge(model)
    assert sorted(gone)[:2] == ["h.0.attn.proj", "h.0.attn.qkv[q]"] and len(gone) == 10
    assert list(model.state_dict()) == list(plain.state_dict()) and not adapted(model)
    assert not any(m._forward_hooks for m in model.modules())
    for module in model.modules():
        if id(module) in expected:
            close(effective(module), expected[id(module)])
    close(logits(model), before)
    load_weights(plain, weights(model))
    close(logits(plain), before)


def returns(model: GPT, tree: dict[str, Any]) -> None:
    """State dicts and what is saved alone fill another model: the same bits."""
    other, third = (one(model_rule(model), 0.3, **tree).double() for _ in range(2))
    scramble(other, 5)
    other.load_state_dict(model.state_dict())
    third.load_state_dict(plain_state(model), strict=False)
    load_adapters(third, adapter_weights(model))
    assert torch.equal(logits(other), logits(model)) and torch.equal(logits(third), logits(model))


def copies(model: GPT, tree: dict[str, Any]) -> None:
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            parameter.mul_(1.5 if is_adapter(key) else 1.0)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    merge(twin)
    assert torch.equal(logits(model), before) and len(adapted(model)) == 8


def plain_state(model: GPT) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if not is_adapter(n)}


def rule_of(name: str) -> dict[str, Any]:
    return {"match": ["h.*.attn.qkv[q,v]", "h.*.attn.proj", "h.*.mlp.*"], "lora": {"variant": name, "rank": 2}}


def model_rule(model: GPT) -> dict[str, Any]:
    kinds = {type(adapter) for _, some in adapted(model) for adapter in some}
    return rule_of(next(name for name in ENTRIES if {LORAS[name]} == kinds))


CHECKS: list[Callable[[GPT, dict[str, Any]], None]] = [shapes_kept, all_learn, merges, returns, copies]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("tree", [{}, PKL | UNTIED | {"bias": False}], ids=["standard", "pkl"])
@pytest.mark.parametrize("name", ENTRIES)
def test_every_adapter_has_the_property(
    name: str, tree: dict[str, Any], check: Callable[[GPT, dict[str, Any]], None]
) -> None:
    """In float64, with all parameters far from those at the start."""
    check(one(rule_of(name), 0.3, **tree).double(), tree)


def test_adapters_of_another_model_are_refused() -> None:
    model, saved = one(QV), adapter_weights(one(QV, 0.5))
    other = {n: t for n, t in saved.items() if n != "h.0.attn.qkv[q].lora_b"}
    told = sentence(lambda: load_adapters(model, other | {"h.9.lora_a": torch.zeros(1)}))
    assert "missing h.0.attn.qkv[q].lora_b" in told and "left over h.9.lora_a" in told
    told = sentence(lambda: load_adapters(model, saved | {"h.1.attn.qkv[v].lora_a": torch.zeros(2, 16)}))
    assert told.startswith("the saved adapters are of another model")
    assert "h.1.attn.qkv[v].lora_a is [2, 16], not [4, 16]" in told
    assert not adapter_weights(model)["h.0.attn.qkv[q].lora_b"].any(), "nothing is filled by halves"


# Runs ---------------------------------------------------------------------------------------------------------------------------


def rules(name: str) -> dict[str, Any]:
    lora = {"variant": name, "rank": 2, "dropout": 0.25}
    adapt = {"match": ["h.*.attn.qkv[q,v]", "h.*.mlp.up"], "lora": lora}
    return {"adapt": adapt, "base": {"match": "h.**", "frozen": True}, "b": {"match": "h.**.lora_b", "lr_scale": 2.0}}


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_run_with_adapters_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    config, corpus = runs.read(runs.tiny_corpus(tmp_path), slices=rules(name))
    whole = runs.make(tmp_path / "whole", config, corpus)
    assert runs.drive(whole) == "done"
    stops = iter([False] * 5 + [True])
    assert runs.drive(runs.make(tmp_path / "parts", config, corpus), lambda: next(stops)) == "stopped"
    assert runs.drive(runs.make(tmp_path / "parts", config, corpus)) == "done"
    assert runs.saved_bytes(tmp_path / "whole") == runs.saved_bytes(tmp_path / "parts")
    assert runs.records(tmp_path / "whole") == runs.records(tmp_path / "parts")
    learnt = adapter_weights(whole.plain)
    assert len(learnt) == 2 * 3 * (3 if name == "dora" else 2) and all(t.any() for t in learnt.values())


def test_dora_on_trained_weights_begins_with_their_norms(tmp_path: Path) -> None:
    """Also where they come from another run, after the adapters were made: the loss is that run's, to the bit."""
    base_config, corpus = runs.read(runs.tiny_corpus(tmp_path))
    base = runs.make(tmp_path / "base", base_config, corpus)
    assert runs.drive(base) == "done"
    config, _ = runs.read(tmp_path, slices=rules("dora"))
    run = runs.make(tmp_path / "on", replace(config, run=replace(config.run, base=str(tmp_path / "base"))), corpus)
    assert len(adapted(run.plain)) == 4 and run.evaluate(2) == base.evaluate(2)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters over PKL linears, trained from the command line."""
    home = tmp_path_factory.mktemp("lora")
    changes = {"slices": rules("dora"), "runner__root": str(home / "runs"), "model__linear": "pkl"}
    file = runs.write(home / "adapted.yaml", runs.tree(runs.tiny_corpus(home / "data"), **changes))
    assert train.main(["--config", str(file)]) == 0
    (folder,) = (p.parent for p in home.glob("runs/*/*/result.json"))
    return folder


def test_a_run_is_exported_merged_and_its_adapters_alone(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = convert.places.load(run_folder)
    assert convert.__main__.main(["adapters", str(run_folder), str(tmp_path / "alone")]) == 0
    alone = load_file(tmp_path / "alone")
    assert "18 tensors" in capsys.readouterr().out
    assert {n: t.tolist() for n, t in alone.items()} == {n: t.tolist() for n, t in adapter_weights(model).items()}
    assert convert.__main__.main(["effective", str(run_folder), str(tmp_path / "merged")]) == 0
    assert "adapters merged: h.0.attn.qkv[q], h.0.attn.qkv[v], h.0.mlp.up" in capsys.readouterr().out
    merged, qkv = load_file(tmp_path / "merged"), model.h[0].attn.qkv
    assert not [name for name in merged if "adapter" in name or "lora" in name]
    close(merged["h.0.attn.qkv.weight"], effective(qkv))
    plain = build(replace(model.config, linear=Variant("standard", NoOptions())), 0)
    load_weights(plain, {name: merged[name] for name in weights(plain)})
    close(logits(plain), logits(model))


def test_a_run_without_adapters_has_none_to_export(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = runs.tree(runs.tiny_corpus(tmp_path), runner__root=str(tmp_path / "runs"), train__max_iters=1)
    assert train.main(["--config", str(runs.write(tmp_path / "plain.yaml", tree))]) == 0
    (folder,) = (p.parent for p in tmp_path.glob("runs/*/*/result.json"))
    capsys.readouterr()
    assert convert.__main__.main(["adapters", str(folder), str(tmp_path / "none")]) == 2
    assert "has no adapters" in capsys.readouterr().err and not (tmp_path / "none").exists()
    result = json.loads((run_folder / "result.json").read_text())
    trainable = json.loads((folder / "result.json").read_text())["trainable_parameters"]
    assert result["trainable_parameters"] < trainable


def test_an_adapted_run_is_sampled(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for more in ([], ["--fold-gains"]):  # which must reach adapters too; the likeliest token shows what is computed
        words = [str(run_folder), "--prompt", "the cat", "--tokens", "9", "--device", "cpu", "--temperature", "0"]
        assert sample.main([*words, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith("the cat") and said[1] == said[0]
