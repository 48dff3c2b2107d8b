"""Mixtures of experts: against a loop over tokens, what the router learns and keeps, and rules over experts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import reference_moe as oracle
import reference_slices
import runs
import torch
from models import config, losses, make, read, scramble, scrambled, sentence, tokens
from properties import bits, logits
from torch import Tensor

from core.lora import merge
from core.options import Reader
from core.rules import Row, SliceRule
from core.slices import slices
from core.weights import load_weights, weights
from engine.optim import Optimizers
from model import GPT, assemble, fill
from variations import CATALOGUE
from variations.mlp import MLPS

WIDTH = 16
PLAIN = {"gated": False, "width": 12}
OPTIONS: list[dict[str, Any]] = [
    {},
    PLAIN,
    {"score": "sigmoid"},
    {"score": "sigmoid", "renormalise": False, "bias_rate": 0.01},
    {"normalise": "after"},
    {"renormalise": False},
    {"top_k": 1, "renormalise": False},
    {"experts": 5, "top_k": 5},
    {"experts": 3, "width": 5, "bias_rate": 0.5},
    {"shared_experts": 2},
    {**PLAIN, "shared_experts": 1, "capacity_factor": 0.75},
    {"capacity_factor": 0.5},
    {"capacity_factor": 1.0, "top_k": 3},
]


def layer(seed: int = 1, bias: bool = True, **options: Any) -> Any:
    """The MLP of the first block, its weights far from special values, its bias of the choice too."""
    activation = "silu" if options.get("gated", True) else "gelu"
    model = scrambled(seed, mlp={"variant": "moe", **options}, activation=activation, bias=bias)
    moe = model.h[0].mlp
    if "bias_rate" in options:
        moe.balance.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return moe


def given(dtype: torch.dtype = torch.float64, b: int = 3, t: int = 7) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(b, t, WIDTH, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


def leaves(moe: Any) -> dict[str, Tensor]:
    """Its tensors, under the oracle's names."""
    return {
        name.replace(moe.first, "first"): t.detach().clone().requires_grad_() for name, t in moe.state_dict().items()
    }


def by_hand(moe: Any, x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, oracle.Told]:
    o = moe.options
    names = ("top_k", "gated", "score", "normalise", "renormalise", "capacity_factor")
    y, told = oracle.moe(x.flatten(0, 1), p, **{name: getattr(o, name) for name in names})
    return y.view_as(x), told


def close(ours: Tensor, theirs: Tensor) -> None:
    """Sums of at most 45 terms in another order, three deep, whose terms are at most ten times the largest result: below 2000
    units of it in the worst case, about 30 in fact. Another expert or weight for one token is off by 1% and more."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 500 * torch.finfo(theirs.dtype).eps * theirs.abs().max().clamp(min=1e-3)


# Against the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float64, True), (torch.float32, True), (torch.float32, False)])
def test_it_is_the_loop_over_tokens_and_experts(options: dict[str, Any], dtype: torch.dtype, bias: bool) -> None:
    moe = layer(bias=bias, z_loss=0.1, **options).to(dtype)
    p, x = leaves(moe), given(dtype)
    ours, y = moe(x), given(dtype)
    theirs, told = by_hand(moe, y, p)
    close(ours, theirs)
    auxiliary = 0.01 * told.balance_loss + 0.1 * told.z_loss
    close(moe.auxiliary_loss, auxiliary)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(dtype)
    torch.autograd.backward((ours, moe.auxiliary_loss), (direction, torch.ones_like(auxiliary)))
    torch.autograd.backward((theirs, auxiliary), (direction, torch.ones_like(auxiliary)))
    assert x.grad is not None and y.grad is not None
    close(x.grad, y.grad)
    for name, parameter in moe.named_parameters():
        expected = p[name.replace(moe.first, "first")].grad
        assert expected is not None and expected.any(), name
        close(parameter.grad, expected)
    count = len(told.chosen) * moe.options.top_k
    assert moe.statistics["dropped"].item() == pytest.approx(len(told.dropped) / count, abs=1e-6)
    assert bool(told.dropped) == ("capacity_factor" in options)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_one_expert_is_the_plain_mlp(gated: bool, bias: bool) -> None:
    """One weight, which is 1: the same products, to the bit."""
    one: Any = layer(experts=1, top_k=1, width=24, gated=gated, bias=bias).double()
    name = "gated" if gated else "standard"
    activation = "silu" if gated else "gelu"
    plain: Any = make(mlp={"variant": name, "width": 24}, activation=activation, bias=bias).h[0].mlp.double()
    plain.load_state_dict({n: t[0] for n, t in one.state_dict().items() if n != "router.weight"})
    assert bits(one(given()), plain(given()))
    assert set(MLPS) >= {"moe", "gated", "standard"}


def test_no_token_is_lost_without_a_capacity() -> None:
    """With the same weights in all experts, and gains that add up to one, the layer is that one expert."""
    moe = layer(experts=5, top_k=3, width=8).double()
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if name != "router.weight":
                parameter.copy_(parameter[0].clone().expand_as(parameter))
    p = leaves(moe)
    x = given(b=4, t=9)
    expected = [
        oracle.mlp(row, p["first.weight"][0], p["first.bias"][0], p["down.weight"][0], p["down.bias"][0], True)
        for row in x.flatten(0, 1)
    ]
    close(moe(x).flatten(0, 1), torch.stack(expected))
    assert moe.statistics["dropped"] == 0


def test_the_order_of_the_experts_means_nothing() -> None:
    moe = layer(experts=6, top_k=2, bias_rate=0.1).double()
    other, order = copy.deepcopy(moe), torch.tensor([3, 5, 0, 1, 4, 2])
    other.load_state_dict({name: t[order] for name, t in moe.state_dict().items()})
    close(moe(given()), other(given()))


def test_what_an_expert_sees_lies_in_the_order_of_the_text() -> None:
    moe, seen = layer(experts=4), []
    moe.gate_up.register_forward_hook(lambda m, args, y: seen.append(args))
    x = given(torch.float32)
    moe(x)
    rows, counts = seen[0]
    assert counts.tolist() == moe_counts(moe, x) and counts.sum() == 2 * 21
    number = {bytes(row.numpy().tobytes()): n for n, row in enumerate(x.detach().flatten(0, 1))}
    for group in rows.detach().split(counts.tolist()):
        order = [number[bytes(row.numpy().tobytes())] for row in group]
        assert order == sorted(order)


def moe_counts(moe: Any, x: Tensor) -> list[int]:
    chosen = by_hand(moe, x.double(), {n: t.double() for n, t in leaves(moe).items()})[1].chosen
    return [sum(some.count(e) for some in chosen) for e in range(moe.options.experts)]


def test_in_evaluation_nothing_is_dropped_and_nothing_moves() -> None:
    moe = layer(capacity_factor=0.5, bias_rate=0.1, z_loss=0.1).double()
    free = layer(bias_rate=0.1).double()
    before = moe.balance.clone()
    trained = moe(given())
    assert moe.auxiliary_loss is not None and moe.statistics["dropped"] > 0
    assert not bits(moe.balance, before)
    moe.balance.copy_(before)
    moe.eval()
    y = moe(given())
    assert moe.auxiliary_loss is None and bits(moe.balance, before)
    free.eval()
    free.load_state_dict(moe.state_dict())
    assert bits(y, free(given())) and not bits(y, trained)


def test_the_router_does_not_compute_in_bfloat16() -> None:
    moe, seen = layer(shared_experts=1), []
    moe.router.register_forward_hook(lambda m, args, y: seen.append(y))
    x = given(torch.float32)
    exact = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x.bfloat16().float())
        assert moe.gate_up(x.flatten(0, 1)[:8], torch.ones(8, dtype=torch.int64)).dtype == torch.bfloat16
    moe(x.bfloat16().float())
    assert all(made.dtype == torch.float32 for made in seen) and bits(seen[1], seen[2])
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).square().mean() < 0.01 * exact.square().mean()  # 8 bits, and the same experts
    torch.autograd.backward((y, moe.auxiliary_loss), (torch.ones_like(y), torch.ones(())))
    assert moe.router.weight.grad.dtype == torch.float32


# What is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"experts": 4, "top_k": 5}, "top_k", "5 is more than the 4 experts"),
        ({"top_k": 1}, "top_k", "the router learns nothing"),
        ({"top_k": 1, "renormalise": False, "normalise": "after"}, "top_k", "set renormalise: false"),
        ({"score": "sigmoid", "normalise": "after"}, "normalise", "about a softmax"),
        ({"capacity_factor": 0.0}, "capacity_factor", "not > 0.0"),
    ],
)
def test_routers_that_cannot_be_are_refused(options: dict[str, Any], key: str, words: str) -> None:
    told = sentence(lambda: config(mlp={"variant": "moe", **options}))
    assert f"mlp.{key}" in told and words in told


# Balance ------------------------------------------------------------------------------------------------------------------


def skewed(**options: Any) -> tuple[Any, Tensor]:
    """Experts of which two have nearly all the load, and 512 tokens."""
    moe = layer(experts=8, top_k=2, width=8, load_balance=None, **options)
    x = torch.randn(8, 64, WIDTH, generator=torch.Generator().manual_seed(9))
    x[..., 0] = 3.0
    with torch.no_grad():
        moe.router.weight.mul_(0.3)
        moe.router.weight[:2, 0] += 0.5
        if "bias_rate" in options:
            moe.balance.zero_()
    return moe, x


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_evens_the_load_and_no_weight_feels_it(score: str) -> None:
    moe, x = skewed(bias_rate=0.005, score=score)
    moe(x)
    assert moe.statistics["load_max"] > 2.5 / 8 and moe.auxiliary_loss is None
    for _ in range(300):
        moe(x)
    # A step moves the choices of several of the 512 tokens, so the load goes on swinging a little.
    assert moe.statistics["load_max"] < 1.2 / 8 and moe.statistics["load_min"] > 0.8 / 8
    p = leaves(moe)
    y, told = by_hand(moe, x, p)
    assert all(torch.stack(some).sum().item() == pytest.approx(1, abs=1e-5) for some in told.weights)
    moe.eval()
    close(moe(x), y)


def test_the_bias_moves_by_its_rate_once_a_training_pass_with_gradients() -> None:
    moe, x = skewed(bias_rate=0.25)
    load = torch.tensor(moe_counts(moe, x))
    step = 0.25 * (128 - load).sign()
    moe(x)
    assert bits(moe.balance, step)
    with torch.no_grad():
        moe(x)
    assert bits(moe.balance, step) and moe.statistics["load_max"] > 0
    even = layer(experts=2, top_k=2, bias_rate=0.25)
    before = even.balance.clone()
    even(x)
    assert bits(even.balance, before), "an even load moves nothing"


def test_the_loss_evens_the_load() -> None:
    moe, x = skewed()
    moe.options = read(type(moe.options), {"experts": 8, "top_k": 2, "width": 8, "load_balance": 1.0})
    optimizer = torch.optim.SGD([moe.router.weight], 0.3)
    moe(x)
    before = moe.statistics["load_max"].item()
    for _ in range(200):
        optimizer.zero_grad()
        moe(x)
        moe.auxiliary_loss.backward()
        optimizer.step()
    assert before > 2.5 / 8 and moe.statistics["load_max"] < 1.5 / 8
    assert moe.auxiliary_loss.item() == pytest.approx(1, abs=0.05), "an even load's loss is the coefficient"


def test_statistics_are_plain_numbers_of_the_last_pass() -> None:
    moe = layer(capacity_factor=1.0)
    x = given(torch.float32)
    moe(x)
    told, chosen = moe.statistics, moe_counts(moe, x)
    assert set(told) == {"load_max", "load_min", "dropped", "entropy", "z"}
    assert all(t.shape == () and not t.requires_grad for t in told.values())
    assert told["load_max"].item() == pytest.approx(max(chosen) / 42)
    assert told["load_min"].item() == pytest.approx(min(chosen) / 42)
    shares = moe.router(x).flatten(0, 1).softmax(-1)
    assert told["entropy"].item() == pytest.approx(-(shares * shares.log()).sum(-1).mean().item(), rel=1e-5)
    assert told["z"].item() == pytest.approx(moe.router(x).logsumexp(-1).square().mean().item(), rel=1e-5)


# State --------------------------------------------------------------------------------------------------------------------

BALANCED: dict[str, Any] = {"variant": "moe", "experts": 4, "width": 8, "bias_rate": 0.05}


def test_weights_hold_the_bias_of_the_choice() -> None:
    model, other = scrambled(1, mlp=BALANCED), scrambled(2, mlp=BALANCED)
    losses(model)
    saved = weights(model)
    assert saved["h.1.mlp.balance"].any() and not any("balance" in s.address for s in slices(model))
    load_weights(other, saved)
    assert bits(other.h[1].mlp.balance, model.h[1].mlp.balance)
    x = tokens(model, 2, 7)
    assert bits(logits(model.eval(), x), logits(other.eval(), x))
    free = {key: value for key, value in BALANCED.items() if key != "bias_rate"}
    assert "left over h.0.mlp.balance" in sentence(lambda: load_weights(make(mlp=free), saved))


def test_a_stopped_run_goes_on_with_its_bias(tmp_path: Path) -> None:
    """To the bit, a pass before the checkpoint and one after it."""
    changes: dict[str, Any] = {"model__mlp": BALANCED, "train__gradient_accumulation_steps": 2}
    settings, corpus = runs.read(runs.tiny_corpus(tmp_path), **changes)
    whole = runs.make(tmp_path / "whole", settings, corpus)
    assert runs.drive(whole) == "done"
    first = runs.make(tmp_path / "parts", settings, corpus)
    asked = iter([False] * 4 + [True] * 9)
    assert runs.drive(first, lambda: next(asked)) == "stopped"
    again = runs.make(tmp_path / "parts", settings, corpus)
    assert weights(again.plain)["h.0.mlp.balance"].any()
    assert runs.drive(again) == "done"
    assert runs.saved_bytes(tmp_path / "whole") == runs.saved_bytes(tmp_path / "parts")
    assert runs.records(tmp_path / "whole") == runs.records(tmp_path / "parts")


def test_a_model_is_copied_in_the_middle_of_a_pass() -> None:
    model = scrambled(mlp=BALANCED)
    losses(model).backward()
    other = copy.deepcopy(model)
    assert model.h[0].mlp.auxiliary_loss is not None and other.h[0].mlp.auxiliary_loss is None
    assert bits(logits(model.eval(), tokens(model, 1, 5)), logits(other.eval(), tokens(model, 1, 5)))


def test_stacked_layers_compute_the_same() -> None:
    tree: dict[str, Any] = {"mlp": {**BALANCED, "shared_experts": 1}}
    plain, stacked = make(**tree), make(**tree, stack_layers=True)
    x = tokens(plain, 2, 7)
    assert bits(logits(plain, x), logits(stacked, x))
    losses(plain).backward()
    losses(stacked).backward()
    together = torch.stack([block.mlp.gate_up.weight.grad for block in plain.h])
    assert bits(dict(stacked.named_parameters())["h.0-1/mlp/gate_up/weight"].grad, together)


# Slices -------------------------------------------------------------------------------------------------------------------

MOE: dict[str, Any] = {"variant": "moe", "experts": 6, "width": 12}


def assembled(
    optimizer: dict[str, Any] | str = "adamw", rules: dict[str, Any] | None = None, std: float = 0.3, **tree: Any
) -> tuple[Any, list[Row]]:
    chosen = Reader(CATALOGUE).variant("optimizer", optimizer, ())
    assert chosen is not None
    made = {name: read(SliceRule, rule) for name, rule in (rules or {}).items()}
    model, rows = assemble(config(**{"mlp": MOE, **tree}), made, chosen)
    fill(model, rows, 1)
    return scramble(model, 1, std) if std else model, rows


def by_address(model: GPT) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {s.address: s.view(parameters[s.parameter]).detach() for s in slices(model)}


def test_every_expert_has_an_address_and_its_own_initial_values() -> None:
    model, _ = assembled(std=0, init={"variant": "xavier"})
    named = by_address(model)
    assert {a for a in named if a.startswith("h.0.mlp")} == {
        "h.0.mlp.router.weight",
        *(f"h.0.mlp.gate_up.weight[{e}.{part}]" for e in range(6) for part in ("gate", "up")),
        *(f"h.0.mlp.gate_up.bias[{e}.{part}]" for e in range(6) for part in ("gate", "up")),
        *(f"h.0.mlp.down.{name}[{e}]" for e in range(6) for name in ("weight", "bias")),
    }
    for address, shape in {"gate_up.weight[{}.gate]": (12, 16), "down.weight[{}]": (16, 12)}.items():
        each = [named[f"h.1.mlp.{address.format(e)}"] for e in range(6)]
        assert all(w.shape == shape for w in each)
        residual = 0.5 if shape[0] == 16 else 1.0  # 1/sqrt(2 n_layer)
        expected = residual * math.sqrt(2 / sum(shape))  # Xavier's, of one expert's fans
        # 1152 values: the deviation's own is 2%. The fans of the stack would make it less than half, or all alike.
        assert torch.stack(each).std().item() == pytest.approx(expected, rel=0.1)
        assert not bits(each[0], each[1])


def test_the_rate_of_one_experts_gate_is_that_of_a_separate_parameter() -> None:
    rules = {
        "one": {"match": "h.*.mlp.gate_up[2.gate]", "lr_scale": 0.1, "weight_decay": 0.0},
        "gates": {"match": "h.1.mlp.gate_up[gate]", "lr_scale": 3.0},
        "router": {"match": "h.*.mlp.router", "learning_rate": 0.004},
    }
    model, rows = assembled({"variant": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}, rules)
    optimizers = Optimizers(model, rows)
    alone = {address: w.clone().requires_grad_() for address, w in by_address(model).items()}
    groups = [
        {"params": [alone[row.slice.address]], "lr": row.learning_rate, "weight_decay": row.settings.weight_decay}
        for row in rows
    ]
    options = next(row.settings.optimizer.options for row in rows)
    theirs = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, foreach=False)
    rates = {row.slice.address: row.learning_rate for row in rows}
    assert rates["h.0.mlp.gate_up.weight[2.gate]"] == pytest.approx(0.001)
    assert rates["h.1.mlp.gate_up.weight[2.gate]"] == pytest.approx(0.003)
    assert rates["h.0.mlp.gate_up.weight[3.gate]"] == rates["h.1.mlp.gate_up.weight[2.up]"] == 0.01
    parameters = dict(model.named_parameters())
    for _ in range(5):
        optimizers.zero_grad()
        losses(model).backward()
        for part in slices(model):
            grad = parameters[part.parameter].grad
            assert grad is not None
            alone[part.address].grad = part.view(grad).clone()
        optimizers.step(1.0)
        theirs.step()
    # Five steps of at most 0.03, each with a few roundings of 2^-24 of weights of order 1. A wrong rate is off by 1e-3.
    for address, w in by_address(model).items():
        torch.testing.assert_close(w, alone[address].detach(), rtol=1e-6, atol=2e-6, msg=address)


def test_muon_takes_every_experts_gate_and_up_apart_and_leaves_the_router() -> None:
    model, rows = assembled({"variant": "muon", "learning_rate": 0.02, "weight_decay": 0.1})
    taken = {row.slice.address: row.settings.optimizer.name for row in rows if row.slice.address.startswith("h.0.mlp")}
    matrices = {address for address in taken if "gate_up.weight" in address or "down.weight" in address}
    assert {address for address, name in taken.items() if name == "muon"} == matrices
    assert taken["h.0.mlp.router.weight"] == "adamw"
    losses(model).backward()
    parameters, before = dict(model.named_parameters()), {a: w.clone() for a, w in by_address(model).items()}
    Optimizers(model, rows).step(1.0)
    after = by_address(model)
    for part in slices(model):
        if taken.get(part.address) != "muon":
            continue
        grad = parameters[part.parameter].grad
        assert grad is not None
        g, w = part.view(grad), before[part.address]
        expected, _ = reference_slices.muon_update(w, g, torch.zeros_like(g), 0.02, 0.1)
        # An update of entries below 0.02, from five iterations of products of 16 terms; slices of a whole would differ by 1e-3.
        torch.testing.assert_close(after[part.address], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("match", ["h.*.mlp.gate_up[gate]", "h.*.mlp.gate_up[3.up]", "h.*.mlp.down[1,4]"])
def test_adapters_of_experts_are_adapters_of_separate_maps(variant: str, match: str) -> None:
    rules = {"adapt": {"match": match, "lora": {"variant": variant, "rank": 2, "alpha": 4.0}}}
    model: Any = assembled(rules=rules, std=0)[0]
    x = tokens(model, 2, 9)
    plain = make(1, mlp=MOE)
    # At first an adapter adds nothing: DoRA's magnitudes are the norms, up to a rounding or two in each row.
    start = (logits(model, x) - logits(plain, x)).abs().max()
    assert start <= (0 if variant == "lora" else 1e-5)
    scramble(model, 6).double()  # with tokens for these experts
    linear = model.h[1].mlp.down if "down" in match else model.h[1].mlp.gate_up
    experts = {"gate": list(range(6)), "3.up": [3], "1,4": [1, 4]}[match.partition("[")[2].rstrip("]")]
    rows = slice(0, 12) if "gate]" in match else slice(12, 24) if "up]" in match else slice(0, 16)
    merged = linear.weight.detach().clone()
    adapter = next(m for name, m in linear.named_children())
    assert adapter.lora_a.shape == (len(experts), 2, linear.in_features)
    for i, e in enumerate(experts):
        w = merged[e, rows] + 2.0 * adapter.lora_b[i].detach() @ adapter.lora_a[i].detach()
        if variant == "dora":
            w = adapter.lora_magnitude[i].detach()[:, None] * w / w.norm(dim=-1, keepdim=True)
        merged[e, rows] = w
    before = logits(model, x)
    losses(model, 16).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in adapter.named_parameters())
    merge(model)
    # In float64, sums of two ranks and of at most 16 terms.
    torch.testing.assert_close(linear.weight.detach(), merged, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=1e-10 * before.abs().max().item())


def test_flops_are_those_of_the_experts_that_a_token_meets() -> None:
    def flops(**mlp: Any) -> int:
        made: int = make(mlp=mlp).flops_per_token()
        return made

    one = flops(variant="gated", width=24)
    for k in (1, 2, 5):
        moe = flops(variant="moe", experts=7, top_k=k, width=24, renormalise=False)
        assert moe == one + 2 * 6 * ((k - 1) * 3 * 16 * 24 + 7 * 16)  # two layers; the router is a linear
    plain = flops(variant="standard", width=24)
    both = flops(variant="moe", experts=4, top_k=2, width=24, gated=False, shared_experts=3)
    assert both == plain + 2 * 6 * ((1 + 3) * 2 * 16 * 24 + 4 * 16)
