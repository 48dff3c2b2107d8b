"""The central promise: parts of a fused weight, each with settings of its own, train as separate parameters do, bit for bit.

The reference keeps every part as a parameter and concatenates them in its forward pass; torch's optimizers, or formulas, move
each by itself. Which addresses a rule means is said here a second time, as a regular expression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import reference_slices as ref
import torch
from models import config, read
from reference_slices import SeparateGPT, train_separately
from torch import Tensor, nn

from core.addresses import Labels
from core.resolve import Resolver
from core.rules import Row, SliceRule
from core.slices import Declaration, Layout, declare, initialise, materialise, slices
from engine.data import Corpus
from engine.loop import Run
from engine.optim import Optimizers
from model import assemble, fill
from train_args import Config
from variations import CATALOGUE
from variations.init.distributions import ZEROS, Normal, Spread

STEPS = 20
RATES = {  # learning rate and weight decay
    "adamw": (0.01, 0.1), "sgd": (0.5, 0.01), "lion": (0.001, 0.2), "muon": (0.02, 0.1), "adafactor": (0.01, 0.1),
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "odd heads": {
        "n_embd": 15, "n_head": 3, "n_kv_head": 3, "vocab_size": 13, "block_size": 7, "mlp": {"variant": "standard", "width": 37},
    },
    "grouped, gated, no biases": {
        "n_embd": 10, "n_head": 4, "n_kv_head": 2, "head_dim": 3, "vocab_size": 11, "block_size": 8, "bias": False,
        "mlp": {"variant": "gated", "width": 11}, "tie_weights": False,
    },
    "one key head, gated": {
        "n_embd": 10, "n_head": 3, "n_kv_head": 1, "head_dim": 5, "vocab_size": 13, "block_size": 5,
        "mlp": {"variant": "gated", "width": 9}, "tie_weights": False,
    },
    "multiples of 64": {
        "n_embd": 64, "n_head": 2, "n_kv_head": 1, "head_dim": 64, "vocab_size": 64, "block_size": 8,
        "mlp": {"variant": "gated", "width": 64},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A rule as a file says it, and the addresses that it means."""

    rule: dict[str, Any]
    meant: str


QKV = r"h\.\d\.attn\.qkv\."
MIXED = {
    "queries": Said({"match": "h.*.attn.qkv[q]", "lr_scale": 0.5, "weight_decay": 0.0}, QKV + r"weight\[q\]"),
    "keys": Said({"match": "h.*.attn.qkv[k]", "lr_scale": 0.3, "weight_decay": 0.5}, QKV + r"weight\[k\]"),
    "values": Said({"match": "h.*.attn.qkv[v]", "lr_scale": 1.7}, QKV + r"weight\[v\]"),
    "biases": Said(
        {"match": "h.*.attn.qkv.bias[q,v]", "lr_scale": 3.0, "weight_decay": 0.05, "optional": True},
        QKV + r"bias\[[qv]\]",
    ),
    "gates": Said(
        {"match": "h.*.mlp.gate_up[gate]", "lr_scale": 2.0, "optional": True}, r"h\.\d\.mlp\.gate_up\.weight\[gate\]"
    ),
    "deep": Said(
        {"match": "h.**", "except": "h.*.mlp.**", "lr_scale": {"depth": [1.0, 0.6]}}, r"h\.\d\.(ln_|attn\.).*"
    ),
    "places": Said({"match": "wpe", "learning_rate": 0.003, "lr_scale": 0.7}, r"wpe\.weight"),
    "still": Said(
        {"match": ["h.1.attn.qkv[k]", "h.0.mlp.down", "h.1.ln_2.**"], "frozen": True},
        r"h\.1\.attn\.qkv\.weight\[k\]|h\.0\.mlp\.down\.weight|h\.1\.ln_2\.\w+",
    ),
}
FEW = {  # nearly everything is frozen
    "still": Said(
        {"match": "**", "except": ["h.*.attn.qkv[v]", "ln_f.**", "h.1.attn.proj"], "frozen": True},
        r"(?!h\.\d\.attn\.qkv\.weight\[v\]|ln_f\.|h\.1\.attn\.proj\.weight).*",
    )
}


def made(rules: Mapping[str, Said]) -> dict[str, Any]:
    return {name: said.rule for name, said in rules.items()}


def start(optimizer: Mapping[str, Any], rules: Mapping[str, Any], model: Mapping[str, Any], **train: Any) -> Run:
    """A run over random tokens, before its first update."""
    tree = {
        "model": {"n_layer": 2, **model},
        "optimizer": dict(optimizer),
        "slices": dict(rules),
        "train": {"max_iters": STEPS, "batch_size": 3, "grad_clip": 0.5, **train},
        "schedule": {"variant": "cosine", "warmup_iters": 3},
    }
    tokens = np.random.default_rng(0).integers(0, model["vocab_size"], 2000).astype("<u2")
    corpus = Corpus(Path("nowhere"), cast(Any, None), tokens, tokens)
    return Run(read(Config, tree), corpus, Path("nowhere"), torch.device("cpu"))


def values(run: Run | Optimizers) -> dict[str, Tensor]:
    """The slices by address, each a tensor of its own in its logical shape."""
    held = run.optimizers if isinstance(run, Run) else run
    parts = ((row.slice, held.parameters[row.slice.parameter].detach()) for row in held.rows)
    return {part.address: part.view(whole).reshape(part.shape).clone() for part, whole in parts}


def settings(addresses: list[str], rules: Mapping[str, Said], optimizer: str) -> dict[str, ref.Settings]:
    """How each part is to be trained, by what the rules mean."""
    found = {}
    for address in addresses:
        rate, decay = RATES[optimizer]
        decay, scale, frozen = (0.0 if ".bias" in address or "ln_" in address else decay), 1.0, False
        for said in rules.values():
            if re.fullmatch(said.meant, address):
                factor = said.rule.get("lr_scale", 1.0)
                scale *= factor["depth"][int(address[2])] if isinstance(factor, dict) else factor
                rate, decay = said.rule.get("learning_rate", rate), said.rule.get("weight_decay", decay)
                frozen = said.rule.get("frozen", frozen)
        found[address] = ref.Settings(rate * scale, decay, frozen, optimizer)
    return found


def separate(run: Run) -> SeparateGPT:
    """The reference model with the run's present values."""
    m = run.config.model
    return SeparateGPT(values(run), m.n_layer, m.n_head, m.kv_heads, m.head_width, m.mlp.name == "gated")


def differing(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The addresses whose bits are not the same."""
    assert list(got) == list(wanted)
    return [address for address, tensor in got.items() if not torch.equal(tensor, wanted[address])]


# Models -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_parts_of_fused_weights_train_as_separate_parameters(optimizer: str, size: str, dtype: str) -> None:
    """Every bit after 20 updates. Two micro-batches an update where sizes are odd; their gradients add up in the same order."""
    micro = 1 if size == "multiples of 64" else 2
    node = {"variant": optimizer, "learning_rate": RATES[optimizer][0], "weight_decay": RATES[optimizer][1]}
    run = start(node, made(MIXED), SIZES[size], dtype=dtype, gradient_accumulation_steps=micro)
    before, net = values(run), separate(run)
    told = settings(list(before), MIXED, optimizer)
    norms = []
    for _ in range(STEPS):
        run.update()
        norms.append(float(cast(Tensor, run.grad_norm)))
    batches = [run.batches(i) for i in range(STEPS * micro)]
    factors = [run.schedule.multiplier(i) for i in range(STEPS)]
    losses = train_separately(
        net, told, batches, grad_clip=0.5, autocast=dtype == "bfloat16", accumulation=micro, factors=factors
    )
    assert differing(values(run), {a: p.detach() for a, p in net.p.items()}) == []
    if micro == 1:
        assert [float(loss) for loss in run.losses] == losses
    assert max(norms) > 0.5, "the gradient was clipped"
    moved = {address for address, tensor in values(run).items() if not torch.equal(tensor, before[address])}
    assert moved == {address for address, own in told.items() if not own.frozen}, "and only what trains has moved"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_few_parts_train_as_separate_parameters_among_frozen_ones(optimizer: str) -> None:
    node = {"variant": optimizer, "learning_rate": RATES[optimizer][0], "weight_decay": RATES[optimizer][1]}
    run = start(node, made(FEW), SIZES["one key head, gated"])
    net, told = separate(run), settings(list(values(run)), FEW, optimizer)
    assert sum(not own.frozen for own in told.values()) == 5
    for _ in range(STEPS):
        run.update()
    live = {address.partition("[")[0] for address, own in told.items() if not own.frozen}
    assert {name for name, p in run.plain.named_parameters() if p.grad is not None} == live, (
        "no gradient where all is frozen"
    )
    factors = [run.schedule.multiplier(i) for i in range(STEPS)]
    train_separately(net, told, [run.batches(i) for i in range(STEPS)], grad_clip=0.5, factors=factors)
    assert differing(values(run), {a: p.detach() for a, p in net.p.items()}) == []


# A rounding before the five Newton-Schulz iterations grows by at most 3.4445 in each, the slope at zero: 485 = 3.4445^5. Each of
# the three products of an iteration rounds sums of at most 64 terms, in an order that depends on how many matrices go through at
# once; of random signs, they add some sqrt(64) roundings of 2^-24: 485 * 3 * 8 * 2^-24 = 7e-4, for entries of order 1 at most. A
# matrix that is transposed, not scaled, or orthogonalised with its neighbours is off by 0.1.
FACTOR = 485 * 3 * 8 * 2.0**-24


@pytest.mark.parametrize("size", SIZES)
def test_muon_takes_each_part_as_a_matrix_and_the_rest_keeps_every_bit(size: str) -> None:
    """One update of a model: matrices to lr * sqrt(max(1, rows / cols)) * FACTOR, all else exactly."""
    rate, decay = RATES["muon"]
    rest = {"variant": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    node = {"variant": "muon", "learning_rate": rate, "weight_decay": decay, "rest": rest}
    rules = {name: said for name, said in MIXED.items() if name not in ("biases", "places")}
    run = start(node, made(rules), SIZES[size])
    net, addresses = separate(run), list(values(run))
    matrices = [a for a in addresses if re.fullmatch(r"h\.\d\.(attn|mlp)\..*weight.*", a)]
    told = settings(addresses, rules, "adamw") | settings(matrices, rules, "muon")
    run.state.iter = 5  # past the warmup's zero
    run.update()
    train_separately(net, told, [run.batches(5)], grad_clip=0.5, factors=[run.schedule.multiplier(5)])
    got = values(run)
    assert [a for a in differing(got, {a: p.detach() for a, p in net.p.items()}) if a not in matrices] == []
    for address in matrices:
        rows, cols = got[address].shape
        bound = told[address].lr * max(1.0, rows / cols) ** 0.5 * FACTOR
        assert (got[address] - net.p[address]).abs().max() <= bound, address


# Rules that say the same ------------------------------------------------------------------------------------------------------


def trained(optimizer: Mapping[str, Any], rules: Mapping[str, Any], size: str, steps: int = 8) -> dict[str, Tensor]:
    run = start(optimizer, rules, SIZES[size])
    for _ in range(steps):
        run.update()
    return values(run)


MATRICES = ["wte", "wpe", "h.*.attn.*", "h.*.mlp.*"]
SAME: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # options, and rules to the same end
    "learning rate": ({"learning_rate": 0.005}, {"all": {"match": "**", "lr_scale": 0.5}}, {}),
    "base": ({"learning_rate": 0.005}, {"all": {"match": "**", "learning_rate": 0.005}}, {}),
    "decay": ({"weight_decay": 0.4}, {"all": {"match": MATRICES, "weight_decay": 0.4}}, {}),
    "betas": ({"betas": [0.7, 0.9]}, {"all": {"match": "**", "betas": [0.7, 0.9]}}, {}),
    "optimizer": (
        {"eps": 1e-3}, {"all": {"match": "**", "optimizer": {"variant": "adamw", "learning_rate": 0.01, "eps": 1e-3}}}, {},
    ),
    "part by part": (
        {},
        {x: {"match": f"h.*.attn.qkv[{x}]", "lr_scale": 0.3, "weight_decay": 0.0} for x in "qkv"},
        {"whole": {"match": "h.*.attn.qkv", "lr_scale": 0.3, "weight_decay": 0.0}},
    ),
    "two factors": (
        {},
        {"a": {"match": "h.*.attn.qkv[k]", "lr_scale": 2.0}, "b": {"match": "h.0.**[k]", "lr_scale": 0.5}},
        {"c": {"match": "h.1.attn.qkv[k]", "lr_scale": 2.0}, "d": {"match": "h.0.attn.qkv.bias[k]", "lr_scale": 0.5}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", ["odd heads", "multiples of 64"])
@pytest.mark.parametrize("case", SAME)
def test_the_same_said_by_parts_or_as_a_whole_gives_the_same_bits(case: str, size: str) -> None:
    """Rules on every part, one rule on the weight, and the optimizer's own option."""
    options, rules, others = SAME[case]
    plain = {"variant": "adamw", "learning_rate": 0.01}
    wanted = trained(plain | options, others, size)
    assert differing(trained(plain, rules, size), wanted) == []
    assert differing(trained(plain, {}, size), wanted), "and they change something"


NEUTRAL: list[dict[str, Any]] = [
    {"k": {"match": "h.*.attn.qkv[k]", "lr_scale": 1.0}},
    {"k": {"match": "h.0.attn.qkv[q,v]", "weight_decay": 0.1}, "b": {"match": "h.*.attn.qkv.bias[k]", "frozen": False}},
    {x: {"match": f"h.*.attn.qkv.**[{x}]", "learning_rate": 0.01} for x in "qkv"},
    {"k": {"match": "h.*.attn.qkv[k]", "optimizer": {"variant": "adamw", "learning_rate": 0.01, "eps": 1e-8}}},
]


@pytest.mark.parametrize("rules", NEUTRAL)
@pytest.mark.parametrize("size", ["odd heads", "multiples of 64"])
def test_rules_that_change_nothing_change_no_bit(size: str, rules: dict[str, Any]) -> None:
    """Neither of the gradient's norm nor of the weights."""
    node = {"variant": "adamw", "learning_rate": 0.01}
    one, other = start(node, {}, SIZES[size]), start(node, rules, SIZES[size])
    for _ in range(5):
        one.update()
        other.update()
        assert torch.equal(cast(Tensor, one.grad_norm), cast(Tensor, other.grad_norm))
    assert differing(values(one), values(other)) == []


def test_the_gradients_norm_does_not_depend_on_how_parts_are_trained() -> None:
    """The first update's has the same bits under other rates, decays and optimizers, and those of separate tensors."""
    size, node = SIZES["odd heads"], {"variant": "adamw", "learning_rate": 0.01}
    several: list[dict[str, Any]] = [
        {},
        {name: said.rule for name, said in MIXED.items() if name != "still"},
        {
            "k": {"match": "h.*.attn.qkv[k]", "optimizer": "muon"},
            "v": {"match": "h.*.attn.qkv[v]", "optimizer": "lion"},
        },
        {"all": {"match": "**", "optimizer": "adafactor"}},
    ]
    norms = []
    for rules in several:
        run = start(node, rules, size, grad_clip=None)
        run.update()
        norms.append(cast(Tensor, run.grad_norm))
    net = separate(start(node, {}, size))
    net.loss(*run.batches(0)).backward()
    wanted = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(cast(Tensor, p.grad)) for p in net.p.values()])
    )
    assert all(torch.equal(norm, wanted) for norm in norms)


def test_a_rate_of_zero_is_not_frozen() -> None:
    """Neither moves. At rate zero there is state, and the gradient counts in the norm; the others train accordingly."""
    size, node = SIZES["odd heads"], {"variant": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    meant = QKV + r"weight\[k\]"
    told = {
        "slow": {"zero": Said({"match": "h.*.attn.qkv[k]", "lr_scale": 0.0}, meant)},
        "still": {"still": Said({"match": "h.*.attn.qkv[k]", "frozen": True}, meant)},
    }
    runs = {name: start(node, made(rules), size, grad_clip=0.05) for name, rules in told.items()}
    first = values(runs["slow"])
    keys = [address for address in first if re.fullmatch(meant, address)]
    for name, run in runs.items():
        net = separate(run)
        for _ in range(STEPS):
            run.update()
        batches, factors = [run.batches(i) for i in range(STEPS)], [run.schedule.multiplier(i) for i in range(STEPS)]
        train_separately(net, settings(list(first), told[name], "adamw"), batches, grad_clip=0.05, factors=factors)
        assert differing(values(run), {a: p.detach() for a, p in net.p.items()}) == []
        assert all(torch.equal(values(run)[key], first[key]) for key in keys)
    slow, still = (run.optimizers.state() for run in runs.values())
    width = size["n_embd"]
    for kind in ("exp_avg", "exp_avg_sq"):
        held = [state[f"adamw.{kind}/h.0.attn.qkv.weight"][width : 2 * width] for state in (slow, still)]
        assert held[0].all() and not held[1].any()
    assert slow["steps/h.0.attn.qkv.weight"].tolist() == [STEPS] * 3
    assert still["steps/h.0.attn.qkv.weight"].tolist() == [STEPS, -1, STEPS]
    fresh = {name: start(node, made(rules), size) for name, rules in told.items()}
    for run in fresh.values():
        run.update()
    a, b = (cast(Tensor, run.grad_norm) for run in fresh.values())
    of_keys = [
        n for n, row in zip(fresh["slow"].slice_norms, fresh["slow"].rows, strict=True) if row.slice.address in keys
    ]
    torch.testing.assert_close(a**2, b**2 + torch.stack(of_keys).square().sum())
    assert a > b


# Overflow ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_in_frozen_slices_does_not_count(bad: float) -> None:
    """With float16's scaled gradients: no step is left out, and norm and weights are those without the overflow."""
    rules = {"still": {"match": ["h.*.attn.qkv[k]", "h.0.attn.qkv.bias[q]", "wpe"], "frozen": True}}
    node, size = {"variant": "adamw", "learning_rate": 0.01}, SIZES["odd heads"]

    def stepped(spoilt: str | None) -> tuple[bool, Run]:
        run = start(node, rules, size, dtype="float16")
        assert run.state.grad_scale == 2.0**16
        for row in run.rows:
            whole = run.optimizers.parameters[row.slice.parameter]
            if whole.requires_grad:
                whole.grad = torch.zeros_like(whole) if whole.grad is None else whole.grad
                wanted = ref.initial_normal(2, row.slice.address, row.slice.shape, 3.0 * 2.0**16)
                row.slice.view(whole.grad).copy_(wanted)
                if row.slice.address == spoilt or (spoilt == "frozen" and row.settings.frozen):
                    row.slice.view(whole.grad)[0] = bad
        going = run.clip()
        if going:
            run.optimizers.step(1.0)
        return going, run

    (_, clean), (going, spoilt) = stepped(None), stepped("frozen")
    live = [row.slice for row in clean.rows if not row.settings.frozen]
    norms = [torch.linalg.vector_norm(ref.initial_normal(2, part.address, part.shape, 3.0)) for part in live]
    assert torch.equal(cast(Tensor, clean.grad_norm), torch.linalg.vector_norm(torch.stack(norms))), (
        "the scale is taken out"
    )
    assert going and spoilt.state.grad_scale == 2.0**16 and spoilt.state.fitting == 1
    assert torch.equal(cast(Tensor, clean.grad_norm), cast(Tensor, spoilt.grad_norm))
    assert differing(values(spoilt), values(clean)) == [] and all(x.isfinite().all() for x in values(spoilt).values())
    for address in ("h.0.attn.qkv.weight[q]", "h.1.attn.qkv.bias[q]", "wte.weight"):
        going, run = stepped(address)
        assert not going and run.state.grad_scale == 2.0**15 and run.state.fitting == 0


# Initial values ---------------------------------------------------------------------------------------------------------------


def filled(rules: Mapping[str, Any] | None = None, seed: int = 9, **tree: Any) -> tuple[dict[str, Tensor], Any]:
    """The initial values of a model by address, and the model."""
    told = {name: read(SliceRule, rule) for name, rule in (rules or {}).items()}
    optimizer: Any = read(Config, {}).optimizer
    model, rows = assemble(config(**tree), told, optimizer)
    fill(model, rows, seed)
    return values(Optimizers(model, rows)), model


@pytest.mark.parametrize("size", SIZES)
def test_initial_values_are_those_of_separate_parameters(size: str) -> None:
    got, _ = filled(**SIZES[size], n_layer=3)
    assert "h.2.attn.qkv.weight[k]" in got
    for address, tensor in got.items():
        if ".bias" in address:
            assert not tensor.any()
        elif "ln_" in address:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            wanted = ref.initial_normal(9, address, tensor.shape, 0.02)
            residual = re.search(r"(proj|down)\.weight", address)
            assert torch.equal(tensor, wanted * (1 / math.sqrt(2 * 3)) if residual else wanted), address


INITS: list[tuple[dict[str, Any], Callable[[str, Any], Tensor]]] = [
    ({"variant": "normal", "std": 0.3}, lambda a, shape: ref.initial_normal(9, a, shape, 0.3)),
    ({"variant": "uniform", "std": 0.25}, lambda a, shape: ref.initial_uniform(9, a, shape, 0.25)),  # exact factors
    ({"variant": "xavier"}, lambda a, shape: ref.initial_xavier(9, a, shape)),
    ({"variant": "kaiming"}, lambda a, shape: ref.initial_kaiming(9, a, shape)),
    ({"variant": "zeros"}, lambda a, shape: torch.zeros(shape)),
    ({"variant": "identity", "scale": 0.5}, lambda a, shape: torch.eye(*shape) * 0.5),
    (
        {"variant": "orthogonal"},
        lambda a, shape: nn.init.orthogonal_(torch.empty(shape), generator=ref._generator(9, a)),
    ),
]


@pytest.mark.parametrize("size", ["grouped, gated, no biases", "multiples of 64"])
@pytest.mark.parametrize(("node", "wanted"), INITS, ids=lambda x: x["variant"] if isinstance(x, dict) else "")
def test_a_parts_init_is_its_own_and_leaves_the_others(node: dict[str, Any], wanted: Any, size: str) -> None:
    """Fans are the part's: k of grouped heads has fewer rows than q, and than the fused weight."""
    usual, _ = filled(**SIZES[size])
    got, _ = filled({"keys": {"match": "h.*.attn.qkv[k]", "init": node}}, **SIZES[size])
    keys = ["h.0.attn.qkv.weight[k]", "h.1.attn.qkv.weight[k]"]
    assert differing(got, usual) == keys, "all else keeps its bits"
    for address in keys:
        shape = got[address].shape
        assert shape[0] < got[address.replace("[k]", "[q]")].shape[0]
        if node["variant"] == "kaiming" and size != "multiples of 64":
            # Times 1 / sqrt(10) in float32 here, divided by sqrt(10) there: three roundings against one.
            torch.testing.assert_close(got[address], wanted(address, shape), rtol=4 * 2.0**-24, atol=0)
        else:
            assert torch.equal(got[address], wanted(address, shape))


def test_a_biass_part_can_have_an_init() -> None:
    node = {"variant": "normal", "std": 0.1}
    got, _ = filled({"b": {"match": "h.*.attn.qkv.bias[q]", "init": node}}, **SIZES["odd heads"])
    address = "h.1.attn.qkv.bias[q]"
    assert (
        torch.equal(got[address], ref.initial_normal(9, address, (15,), 0.1)) and not got["h.1.attn.qkv.bias[k]"].any()
    )


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_an_init_of_a_pkl_part_is_the_effective_weights(scale: float) -> None:
    """Deviations of 64 x 64 draws vary by 1 / sqrt(2 * 4096) = 1.1%; five times that is allowed. What is exact, is: a and b each
    round once and their sum once, of entries up to 1, so 4 * 2^-24; rows of an orthogonal matrix sum 64 products."""
    size = SIZES["multiples of 64"] | {"linear": {"variant": "pkl", "scale": scale}}
    usual, _ = filled(**size)
    rules = {
        "keys": {"match": "h.0.attn.qkv[k]", "init": {"variant": "normal", "std": 0.3}},
        "same": {"match": "h.1.attn.qkv[k]", "init": "identity"},
        "turn": {"match": "h.1.attn.qkv[v]", "init": "orthogonal"},
        "xavier": {"match": "h.0.attn.qkv[v]", "init": "xavier"},
    }
    got, model = filled(rules, **size)
    changed = [f"h.{i}.attn.qkv.weight[{x}.{part}]" for i in (0, 1) for x in "ab" for part in "kv"]
    assert differing(got, usual) == changed
    first, second = (block.attn.qkv.effective().detach().split([128, 64, 64]) for block in model.h)
    assert first[0].std().item() == pytest.approx(0.02, rel=0.055)
    assert first[1].std().item() == pytest.approx(0.3, rel=0.055)
    assert first[2].std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.055)
    torch.testing.assert_close(second[1], torch.eye(64), rtol=0, atol=4 * 2.0**-24)
    turned = nn.init.orthogonal_(torch.empty(64, 64), generator=ref._generator(9, "h.1.attn.qkv.weight[v]"))
    torch.testing.assert_close(second[2], turned, rtol=0, atol=4 * 2.0**-24)
    torch.testing.assert_close(second[2] @ second[2].T, torch.eye(64), rtol=0, atol=64 * 4 * 2.0**-24)


# Slices that are no rows ------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Weights whose parts lie along columns, interleaved, in a stack, or between other dimensions."""

    def __init__(self) -> None:
        super().__init__()
        normal = Normal(Spread(std=0.5))
        parts = (("a", 2), ("b", 5), ("c", 3))
        weights: dict[str, tuple[tuple[int, ...], Layout]] = {
            "columns": ((6, 10), Layout(parts, -1)),
            "mixed": ((5, 20), Layout(parts, -1, groups=2)),
            "heads": ((20, 7), Layout(parts, -2, groups=2)),
            "lines": ((64, 8), Layout((("q", 16), ("k", 8), ("v", 8)), -2, groups=2)),
            "stack": ((2, 10, 3), Layout(parts, -2, stack=(("x", "y"),))),
            "deep": ((2, 4, 10), Layout(parts, -1, stack=(("x", "y"),))),
        }
        for name, (shape, layout) in weights.items():
            declare(self, name, shape, Declaration(layout, "matrix", normal))
        declare(self, "ln_parts", (20,), Declaration(Layout(parts, -1, groups=2), "vector", ZEROS))
        declare(self, "ln_whole", (17,), Declaration(Layout(), "vector", ZEROS))


class Pulled:
    """A model, for the reference, whose gradients are given: its loss is the sum of all parameters times these."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self.p = {address: nn.Parameter(part.clone()) for address, part in parts.items()}

    def loss(self, step: Tensor, _: Tensor) -> Tensor:
        return torch.stack([(p * pull(a, p.shape, int(step))).sum() for a, p in self.p.items()]).sum()


def pull(address: str, shape: tuple[int, ...], step: int) -> Tensor:
    """The gradient of a slice at a step; some are much larger than those before."""
    return ref.initial_normal(step, address, shape, 0.1 * (1 + step % 5))


ODD_RULES = {
    "slow": Said({"match": "*[a]", "lr_scale": 0.3, "weight_decay": 0.4}, r"\w+\[(\w\.)?a\]"),
    "still": Said({"match": ["columns[b]", "mixed[c]", "heads[b]", "deep[y.a]"], "frozen": True},
                  r"columns\[b\]|mixed\[c\]|heads\[b\]|deep\[y\.a\]"),
    "vector": Said({"match": "ln_parts[b]", "lr_scale": 2.0}, r"ln_parts\[b\]"),
    "half": Said({"match": "stack[x]", "lr_scale": 0.5}, r"stack\[x\..\]"),
}  # fmt: skip


def odd(optimizer: str, **options: Any) -> tuple[Optimizers, list[Row]]:
    """The module above under its rules."""
    module = Odd()
    node = {"variant": optimizer, "learning_rate": RATES[optimizer][0], "weight_decay": RATES[optimizer][1], **options}
    told = {name: read(SliceRule, said.rule) for name, said in ODD_RULES.items()}
    rows = Resolver(slices(module), CATALOGUE).resolve(told, read(Config, {"optimizer": node}).optimizer)
    materialise(module, "cpu")
    initialise(module, 4)
    return Optimizers(module, rows), rows


def drive(optimizers: Optimizers, steps: int, limit: float | None) -> None:
    """Updates by the given gradients, clipped as a run does it."""
    for step in range(steps):
        for row in optimizers.rows:
            whole = optimizers.parameters[row.slice.parameter]
            whole.grad = torch.zeros_like(whole) if whole.grad is None else whole.grad
            view = row.slice.view(whole.grad)
            view.copy_(pull(row.slice.address, row.slice.shape, step).reshape(view.shape))
        if limit is not None:
            norm = torch.linalg.vector_norm(torch.stack(optimizers.norms(lambda p: p.grad)))
            torch._foreach_mul_(optimizers.gradients(), (limit / (norm + 1e-6)).clamp(max=1.0))
        optimizers.step(1.0 - step / 40)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_columns_and_interleaved_groups_train_as_separate_parameters(optimizer: str) -> None:
    """Every bit, whether a slice is a view of rows or has to be gathered from columns."""
    optimizers, rows = odd(optimizer)
    addresses = [row.slice.address for row in rows]
    apart = Pulled(values(optimizers))
    told = settings(addresses, ODD_RULES, optimizer)
    batches = [(torch.tensor(step), torch.tensor(0)) for step in range(STEPS)]
    train_separately(
        cast(SeparateGPT, apart), told, batches, grad_clip=1.0, factors=[1.0 - step / 40 for step in range(STEPS)]
    )
    before = values(optimizers)
    drive(optimizers, STEPS, 1.0)
    got = values(optimizers)
    assert differing(got, {a: p.detach() for a, p in apart.p.items()}) == []
    still = [a for a in addresses if torch.equal(got[a], before[a])]
    assert still == [a for a in addresses if re.fullmatch(ODD_RULES["still"].meant, a)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_takes_columns_and_interleaved_groups_as_matrices(nesterov: bool) -> None:
    """The averaged gradients have every bit of separate matrices' own, and so has what the rest's AdamW trains; matrices agree to a
    step's bound for each step (given gradients: nothing feeds back) and two roundings of weights up to 4."""
    rest = {"variant": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    optimizers, rows = odd("muon", rest=rest, nesterov=nesterov)
    addresses, before = [row.slice.address for row in rows], values(optimizers)
    vectors = [a for a in addresses if a.startswith("ln_")]
    told = settings(addresses, ODD_RULES, "muon") | settings(vectors, ODD_RULES, "adamw")
    drive(optimizers, STEPS, None)
    got, state = values(optimizers), optimizers.state()
    apart = Pulled(before)
    batches = [(torch.tensor(step), torch.tensor(0)) for step in range(STEPS)]
    factors = [1.0 - step / 40 for step in range(STEPS)]
    train_separately(cast(SeparateGPT, apart), told, batches, grad_clip=None, factors=factors)
    assert all(torch.equal(got[a], apart.p[a]) for a in vectors)
    for row in rows:
        address, own = row.slice.address, told[row.slice.address]
        if address in vectors or own.frozen:
            continue
        momentum, expected = torch.zeros(row.slice.shape), before[address]
        for step in range(STEPS):
            grad = pull(address, row.slice.shape, step)
            momentum = torch.lerp(momentum, grad, 1.0 - ref.MUON_MOMENTUM)
            direction = torch.lerp(grad, momentum, ref.MUON_MOMENTUM) if nesterov else momentum
            rows_, cols = row.slice.shape
            size = own.lr * factors[step] * max(1.0, rows_ / cols) ** 0.5
            expected = expected * (1 - own.lr * factors[step] * own.weight_decay) - size * ref.orthogonalised(direction)
        held = row.slice.view(state[f"muon.momentum/{row.slice.parameter}"]).reshape(row.slice.shape)
        assert torch.equal(held, momentum), address
        bound = STEPS * (own.lr * max(1.0, rows_ / cols) ** 0.5 * FACTOR + 2 * 4 * 2.0**-24)
        assert (got[address] - expected).abs().max() <= bound, address
        if nesterov:
            assert (got[address] - apart.p[address]).abs().max() <= bound, address


def test_adafactor_factors_each_slice_by_itself() -> None:
    """Every bit of torch's own class on separate parameters, columns and interleaved groups too."""
    optimizers, rows = odd("adafactor", clip=1.2, beta2_decay=-0.6)
    told = settings([row.slice.address for row in rows], ODD_RULES, "adafactor")
    apart = {address: nn.Parameter(part) for address, part in values(optimizers).items()}
    live = {a: p for a, p in apart.items() if not told[a].frozen}
    groups = [{"params": [p], "lr": told[a].lr, "weight_decay": told[a].weight_decay} for a, p in live.items()]
    theirs = torch.optim.Adafactor(groups, beta2_decay=-0.6, d=1.2, foreach=False)
    for step in range(STEPS):
        for (address, p), group in zip(live.items(), theirs.param_groups, strict=True):
            p.grad = pull(address, tuple(p.shape), step)
            group["lr"] = told[address].lr * (1.0 - step / 40)
        theirs.step()
    drive(optimizers, STEPS, None)
    assert differing(values(optimizers), {a: p.detach() for a, p in apart.items()}) == []


def test_the_slices_of_a_tensor_have_the_norms_of_separate_tensors() -> None:
    optimizers, rows = odd("adamw")
    got = optimizers.norms(lambda p: p.detach())
    live = [row.slice for row in rows if not row.settings.frozen]
    assert len(got) == len(live) < len(rows)
    apart = values(optimizers)
    for part, norm in zip(live, got, strict=True):
        labels: Labels = part.labels
        assert torch.equal(norm, torch.linalg.vector_norm(apart[part.address])), labels
