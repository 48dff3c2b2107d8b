"""Runs folded into one model compute what each computes alone: to the bit on a CPU, and whatever becomes of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODERN, Case, cases, config, read, scramble
from torch import Tensor, nn

from core.folded import Batch, Folded
from core.options import fields_of, options_of
from core.rules import SliceRule
from core.runs import Fold, fits
from core.slices import Declaration, Layout, declare
from engine.optim import Optimizers
from gpt_conf import KINDS
from model import GPT, assemble, cross_entropy, fill
from train_args import Config
from variations import CATALOGUE
from variations.attention.causal import CausalAttention
from variations.dropout import set_step
from variations.init.distributions import ONES, Normal, Spread
from variations.site import Site

RUNS, ROWS, TIME = 5, 4, 16
# Widths and the tokens of a run are multiples of 64, which kernels take without a rest; no size is one of 20, the rows of all runs.
WIDE = {"n_layer": 1, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "block_size": TIME, "vocab_size": 64}
STEP = 3  # of dropout
POISONED = 1
ROUNDED: dict[
    str, str
] = {}  # entries whose bits are not those of a run alone, though sizes are multiples of 64, and why

Bits = tuple[Tensor, dict[str, Tensor]]  # of one run: its loss and its gradients
Trees = Callable[[int], dict[str, Any]]  # the model's configuration of each run


def knobs(kind: str, name: str, run: int) -> dict[str, Any]:
    """Another number for each run, of every option in which runs of one pack may differ."""
    told = {}
    for option, spec in fields_of(options_of(CATALOGUE[kind][name])).items():
        if spec.metadata.get("knob") and isinstance(spec.default, float):
            told[option] = spec.default * (1 + 0.25 * run)
    return told


def made(run: int, tree: Mapping[str, Any], rules: Mapping[str, Any] | None = None, std: float | None = 0.1) -> Any:
    """A model with adapters whose parameters are the run's own, but for the frozen ones. std: None leaves initial values."""
    node = read(Config, {"optimizer": "adamw"}).optimizer
    said = {name: read(SliceRule, rule) for name, rule in (rules or {}).items()}
    model, rows = assemble(config(**{**WIDE, **tree}), said, node)
    fill(model, rows, 1 if std is not None else run)
    Optimizers(model, rows)  # freezes
    if std is not None:
        scramble(model, 1, std)
        generator = torch.Generator().manual_seed(run)
        with torch.no_grad():
            for p in [p for p in model.parameters() if p.requires_grad]:
                p.add_(torch.empty(p.shape).normal_(0.0, std, generator=generator))
    return model.train()


def data(model: GPT) -> tuple[Tensor, Tensor]:
    """Tokens and targets of all runs [R * B, T]."""
    assert model.config.vocab_size is not None
    x = torch.randint(model.config.vocab_size, (RUNS * ROWS, TIME + 1), generator=torch.Generator().manual_seed(5))
    return x[:, :-1], x[:, 1:]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(models: Sequence[GPT]) -> list[Bits]:
    """Each model's loss and gradients; the models are left as they were."""
    told, (x, y) = [], data(models[0])
    for run, model in enumerate(copy.deepcopy(list(models))):
        set_step(model, run, STEP)
        rows = slice(run * ROWS, (run + 1) * ROWS)
        loss = model(x[rows], y[rows])[1]
        assert loss is not None
        loss.backward()
        told.append((loss.detach(), gradients(model)))
    return told


def folded(models: Sequence[GPT], exact: bool, poison: bool = False) -> list[Bits]:
    """The same of all models as one. poison: whether a run's parameters and knobs are NaN, and its tokens and keys others."""
    models, (x, y) = copy.deepcopy(list(models)), data(models[0])
    fold = Fold(models, exact)
    assert fits(fold.sizes, *x.shape)
    for run, model in enumerate(models):
        set_step(model, run, STEP)
    if poison:
        x = x.clone()
        x[POISONED * ROWS : (POISONED + 1) * ROWS] = 0
        with torch.no_grad():
            for tensor in (*fold.stacks.values(), *fold.knobs.values()):
                tensor[POISONED] = float("nan") if tensor.is_floating_point() else 7
    net: Any = fold.model.train()
    logits, _ = fold(x)
    losses = torch.stack([cross_entropy(a, b) for a, b in zip(logits.split(ROWS), y.split(ROWS), strict=True)])
    extra = net.added()
    losses = losses if extra is None else losses + extra
    losses.sum().backward()
    fold.gradients()
    return [(loss, gradients(model)) for loss, model in zip(losses.detach(), models, strict=True)]


def differing(got: Bits, wanted: Bits) -> list[str]:
    """What has other bits."""
    assert set(got[1]) == set(wanted[1]), "other parameters have gradients"
    found = [name for name, g in wanted[1].items() if not torch.equal(got[1][name], g)]
    return found if torch.equal(got[0], wanted[0]) else ["loss", *found]


def length(gradients: Iterable[Tensor]) -> Tensor:
    return torch.stack([g.norm() for g in gradients]).norm()


def near(got: Bits, wanted: Bits, precise: Callable[[], Bits] | None = None) -> None:
    """Equal but for roundings.

    A sum in another order is off by some roundings of 2^-24 of what is summed, and those of a few dozen operations in a row add
    up as a random walk: 1e-6 is 17 roundings, of the whole gradient's length. A parameter's own gradient may be small because
    large terms cancel (a key's bias moves all scores alike) and is off by as much as these; a wrong factor or sign is more.

    `precise()` gives the same in float64. A gradient may be so sensitive (a norm of what is nearly zero) that the plain model's own
    is further from it than 1e-6: the other order of sums may then be off by as much, and no more.
    """
    assert set(got[1]) == set(wanted[1]), "other parameters have gradients"
    assert (got[0] - wanted[0]).abs() <= 1e-6 * wanted[0].abs()
    whole = length(wanted[1].values())
    off = torch.stack([(got[1][name] - g).norm() for name, g in wanted[1].items()])
    if off.norm() > 1e-6 * whole:
        assert precise is not None, f"{(off.norm() / whole).item()}"
        truth = precise()[1]
        own = length(g.double() - truth[name] for name, g in wanted[1].items())
        assert off.norm() <= own, (
            f"{(off.norm() / whole).item()}, and the plain model's is off by {(own / whole).item()}"
        )
    for (name, g), error in zip(wanted[1].items(), off, strict=True):
        assert error <= 1e-4 * g.norm() or error <= 1e-7 * whole, name


def check(
    trees: Trees,
    rules: Trees | None = None,
    rounded: bool = False,
    modes: Sequence[bool] = (True, False),
    poisoned: Sequence[bool] = (True, False),
) -> None:
    """Bits where it is exact, the same within roundings in the fast mode, and poison."""
    models = [made(run, trees(run), rules(run) if rules else None) for run in range(RUNS)]
    wanted = alone(models)
    assert all(bool(loss.isfinite()) for loss, _ in wanted)
    assert len({loss.item() for loss, _ in wanted}) == RUNS, "runs differ"
    for exact in modes:
        got = folded(models, exact)
        for run in range(RUNS):
            if exact and not rounded:
                assert not differing(got[run], wanted[run]), f"run {run}"
            else:
                near(got[run], wanted[run], lambda run=run: alone([m.double() for m in copy.deepcopy(models)])[run])  # type: ignore[misc]
        if exact in poisoned:
            left = folded(models, exact, poison=True)
            assert left[POISONED][0].isnan(), "it was poisoned"
            for run in set(range(RUNS)) - {POISONED}:
                assert not differing(left[run], got[run]), f"run {run} sees run {POISONED}"


# The catalogue ----------------------------------------------------------------------------------------------------------------

MODELS = list(cases(tuple(kind for kind in KINDS if kind != "init")))
ADAPTERS = [case for case in cases(("lora",)) if issubclass(CATALOGUE["lora"][case.name], nn.Module)]


def trees_of(case: Case) -> dict[str, Trees]:
    """A GPT-2 with dropout, and a stacked Llama. One side of a tied pair cannot be another variation."""
    untied = {"tie_weights": False} if case.kind in ("embedding", "head") else {}

    def node(run: int) -> dict[str, Any]:
        return {**untied, case.kind: {**case.node(), **knobs(case.kind, case.name, run)}}

    return {
        "gpt2": lambda run: {"dropout": 0.1 + 0.05 * run, **node(run)},
        "modern": lambda run: {**MODERN, "n_layer": 2, "stack_layers": True, **node(run)},
    }


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_every_variation_folds(case: Case) -> None:
    if reason := getattr(CATALOGUE[case.kind][case.name], "solo", None):
        pytest.skip(reason)
    trees = trees_of(case)
    check(trees["gpt2"], rounded=str(case) in ROUNDED, poisoned=[False] if case.options else [True, False])
    if not case.options:
        check(trees["modern"], rounded=str(case) in ROUNDED, modes=[True])


@pytest.mark.parametrize("name", CATALOGUE["init"])
def test_every_initial_value_folds(name: str) -> None:
    """Zeros and ones among them. Dropout makes runs differ where their weights do not."""
    trees: Trees = lambda run: {"init": name, "dropout": 0.1 + 0.05 * run, "position": "rope"}  # noqa: E731
    models = [made(run, trees(run), std=None) for run in range(RUNS)]
    wanted, got = alone(models), folded(models, True)
    assert not any(differing(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_every_adapter_folds(case: Case, frozen: bool) -> None:
    """Over bases of their own, and over one that is frozen and equal in all: of that there is one."""

    def rules(run: int) -> dict[str, Any]:
        node = {**case.node(), "rank": 64, **knobs(case.kind, case.name, run), "dropout": 0.1 + 0.05 * run}
        still = {"still": {"match": "**", "frozen": True}} if frozen else {}
        return {**still, "some": {"match": ["h.*.attn.qkv[q]", "h.*.mlp.*"], "lora": node}}

    check(lambda run: {}, rules)


# Odd sizes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in MODELS if not case.options], ids=str)
def test_odd_sizes_differ_by_roundings_alone(case: Case) -> None:
    """Kernels take several elements at a time and round those left over otherwise (silu, sigmoid, tanh), and products of
    other shapes sum in another order."""
    odd = {"n_embd": 24, "n_head": 3, "n_kv_head": 3, "vocab_size": 37, "block_size": 17}
    trees = trees_of(case)["gpt2"]
    models = [made(run, {**trees(run), **odd}) for run in range(RUNS)]
    wanted, got = alone(models), folded(models, True)
    for pair in zip(got, wanted, strict=True):
        near(*pair)


# Together -----------------------------------------------------------------------------------------------------------------------

MOE = {"variant": "moe", "experts": 4, "width": 64}
ADAPT = {"match": ["h.*.attn.qkv[q]", "h.*.mlp.*"], "lora": {"rank": 64}}
MODELS_TOGETHER: dict[str, Trees] = {
    "pkl": lambda r: {
        kind: {"variant": "pkl", "scale": 0.5 + 0.25 * r} for kind in ("linear", "embedding", "head")
    } | {"dropout": 0.1 + 0.05 * r},
    "pkl untied": lambda r: {"linear": {"variant": "pkl", "scale": -0.5 * r - 0.5}, "tie_weights": False},
    "qk_norm": lambda r: {"attention": {"variant": "causal", "qk_norm": True, "kernel": "plain"}, "n_kv_head": 1},
    "heads": lambda r: {"n_kv_head": 4, "attention": {"variant": "causal", "kernel": "plain"}, "norm": "rmsnorm"},
    "ngram": lambda r: {
        "embedding": {"variant": "ngram", "rows": 64, "order": 3}, "tie_weights": False, "dropout": 0.1 + 0.05 * r
    },
    "memory": lambda r: {"attention": {"variant": "memory", "slots": 64}, "n_kv_head": 4, "dropout": 0.1 + 0.05 * r},
    "mamba2": lambda r: {
        "attention": {
            "variant": "mamba2", "groups": 2, "head_dim": 32, "d_state": 32, "chunk": 8, "dt_min": 0.001 * (r + 1)
        }
    },
    "hybrid": lambda r: {"n_layer": 3, "layer_pattern": ["mamba2", "causal", "delta"], "stack_layers": True},
    "bias of choice": lambda r: {"mlp": {**MOE, "bias_rate": 0.01}, "dropout": 0.1 + 0.05 * r},
    "capacity": lambda r: {"mlp": {**MOE, "capacity_factor": 1.0, "score": "sigmoid"}},
    "shared experts": lambda r: {"mlp": {**MOE, "shared_experts": 1, "z_loss": 0.1, "load_balance": None}},
    "all of experts": lambda r: {
        "mlp": {**MOE, "bias_rate": 0.01, "capacity_factor": 1.25, "shared_experts": 2, "z_loss": 0.1},
        "linear": {"variant": "pkl", "scale": 0.5 + 0.25 * r},
        "n_layer": 2,
        "stack_layers": True,
    },
    "sites": lambda r: {
        "n_layer": 2,
        "sites": {"one": {"match": "h.0.mlp.*", "linear": {"variant": "pkl", "scale": 1.0 + r}}},
        "mlp": "gated",
    },
}  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("model", MODELS_TOGETHER)
def test_variations_fold_together(model: str, adapted: bool) -> None:
    """With adapters beside weights that train; some weights frozen, with biases that train."""

    def rules(run: int) -> dict[str, Any]:
        lora = {"rank": 64, "alpha": 8.0 * (1 + run), "dropout": 0.1 + 0.05 * run}
        still = {"match": "h.**", "frozen": True, "except": ["h.*.*.*.bias", "h.*.ln_1"]}
        adapt = {
            "match": [
                "h.*.attn.qkv[q]",
                "h.*.attn.in_proj[z,gate]",
                "h.*.mlp.*[gate,up]",
                "h.*.mlp.up",
                "h.*.mlp.down",
            ],
            "optional": True,
        }
        return {"still": still, "some": {**adapt, "lora": lora}}

    if adapted:
        check(MODELS_TOGETHER[model], rules, modes=[True], poisoned=[])
    else:
        check(MODELS_TOGETHER[model], poisoned=[False])


def test_what_experts_measure_is_each_run_s_own() -> None:
    """Statistics, and the buffer that training moves."""
    models = [made(run, {"mlp": {**MOE, "bias_rate": 0.01}}) for run in range(RUNS)]
    x, _ = data(models[0])
    solo = copy.deepcopy(models)
    fold = Fold(models)
    fold.model.train()
    fold(x)
    for run, model in enumerate(solo):
        model(x[run * ROWS : (run + 1) * ROWS])
        assert model.statistics() == models[run].statistics() != {}
        (mine,), (other,) = list(model.buffers())[-1:], list(models[run].buffers())[-1:]
        balance = [dict(m.named_buffers())["h.0.mlp.balance"] for m in (model, models[run])]
        assert torch.equal(*balance) and balance[0].any()
        assert mine.shape == other.shape


def test_adapters_of_several_ranks_are_filled_up_with_zeros() -> None:
    """What is added has no gradient of its own and no part in any other; a product over more columns may sum in another order."""
    ranks = [4, 64, 16, 1, 32]
    models = [
        made(run, {}, {"some": {**ADAPT, "lora": {"rank": rank, "alpha": float(rank)}}})
        for run, rank in enumerate(ranks)
    ]
    wanted, got = alone(models), folded(models, True)
    for (loss, grads), pair in zip(got, wanted, strict=True):
        near((loss, grads), pair)
        assert all(grads[name].shape == g.shape for name, g in pair[1].items())
    fold = Fold(models)
    fold.model.train()
    x, _ = data(models[0])
    fold(x)[0].square().sum().backward()
    (name,) = [name for name in fold.stacks if name.endswith("qkv.adapter[q].lora_a")]
    stack = fold.stacks[name]
    assert stack.shape == (RUNS, 64, 64) and stack.grad is not None
    for run, rank in enumerate(ranks):
        assert not stack[run, rank:].any() and not stack.grad[run, rank:].any()
        assert models[run].get_parameter(name).shape == (rank, 64)


# A fold -------------------------------------------------------------------------------------------------------------------------


def test_models_keep_their_parameters_as_views() -> None:
    models = [made(run, {"linear": {"variant": "pkl", "scale": 1.0 + run}, "dropout": 0.1}) for run in range(RUNS)]
    before = [{name: t.clone() for name, t in (*m.named_parameters(), *m.named_buffers())} for m in models]
    fold = Fold(models)
    assert set(fold.stacks) == set(before[0]) - {name for name, _ in models[0].named_buffers()}
    with torch.no_grad():
        for stack in (*fold.stacks.values(), *fold.knobs.values()):
            stack[2] += 1
    for run, model in enumerate(models):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert torch.equal(tensor, before[run][name] + (1 if run == 2 else 0)), name
    assert models[0].wte.weight is models[0].head.weight, "tied"


def test_of_what_is_frozen_and_equal_there_is_one() -> None:
    rules = {"still": {"match": "**", "frozen": True}, "some": ADAPT}
    models = [made(run, {}, rules) for run in range(RUNS)]
    fold: Any = Fold(models)
    assert fold.stacks and all("adapter" in name for name in fold.stacks)
    assert len({m.wte.weight.data_ptr() for m in (*models, fold.model)}) == 1
    models = [made(run, {}, {**rules, "other": {"match": "wte", "frozen": True}}) for run in range(RUNS)]
    with torch.no_grad():
        models[1].wte.weight[0, 0] += 1
    assert "wte.weight" in Fold(models).stacks, "frozen, but not equal"


def test_what_fits_can_be_told_from_activations() -> None:
    assert fits({64, 3, 0}, 20, 16) and not fits({64, 40}, 20, 16) and not fits({64}, 16, 5) and not fits({3}, 20, 20)
    models = [made(run, {"n_embd": 80}) for run in range(RUNS)]
    x, _ = data(models[0])
    with pytest.raises(AssertionError, match="also that of something else"):
        Fold(models)(x)


# What someone writes for one run ------------------------------------------------------------------------------------------------


class Tempered(CausalAttention):
    """Attention with a temperature for each head, and a learned first key."""

    heat: nn.Parameter
    first: nn.Parameter

    def __init__(self, options: Any, site: Site) -> None:
        super().__init__(options, site)
        declare(self, "heat", (self.heads, 1, 1), Declaration(Layout(), "vector", ONES))
        declare(self, "first", (1, self.kv_heads, 1, self.width), Declaration(Layout(), "vector", ONES))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat((k[:, :, :1] + self.first.expand(len(k), -1, -1, -1), k[:, :, 1:]), 2)
        return super().attend(q * self.heat.abs().clamp(min=0.1).sqrt(), k, v)


class LowRank(nn.Module):
    """An MLP of two thin matrices, a fixed mask, a running mean of its weights in a checkpoint, and a gate."""

    u: nn.Parameter
    v: nn.Parameter
    gate: nn.Parameter
    mask: Tensor
    mean: Tensor

    def __init__(self, options: Any, site: Site) -> None:
        super().__init__()
        c, init = site.config.n_embd, Normal(Spread(std=0.1))
        for name, shape in (("u", (c, 64)), ("v", (64, c)), ("gate", (c,))):
            declare(self, name, shape, Declaration(Layout(), "vector" if name == "gate" else "matrix", init))
        mask = torch.rand(64, c, generator=torch.Generator().manual_seed(0)) > 0.5
        self.register_buffer("mask", mask.float(), persistent=False)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean *= 0.9
                self.mean += 0.1 * self.v.mean(0)[:64]
        y = x @ (self.u @ (self.v * self.mask))
        scores = torch.einsum("btc,dc->btd", y, self.v).softmax(-1)
        return torch.where(x > self.gate, y, 2 - y) * self.gate.tanh() + scores + 1 / (1 + self.mean.square()).sum()


class Centred(nn.Module):
    """An MLP that sees all rows of a batch."""

    weight: nn.Parameter

    def __init__(self, options: Any, site: Site) -> None:
        super().__init__()
        declare(self, "weight", (site.config.n_embd,), Declaration(Layout(), "vector", ONES))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 1))) * self.weight


class Apart(Centred):
    separately = "the mean is over a batch"


class Branching(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if self.weight[:1] > 0 else x


def test_ordinary_code_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE["attention"], "tempered", Tempered)
    monkeypatch.setitem(CATALOGUE["mlp"], "lowrank", LowRank)
    tree = {"attention": "tempered", "mlp": "lowrank", "n_layer": 2, "n_kv_head": 4}
    check(lambda run: {**tree, "dropout": 0.1 + 0.05 * run})
    check(lambda run: {**tree, "stack_layers": True, "position": "rope"})
    models = [made(run, tree) for run in range(RUNS)]
    solo, (x, _) = copy.deepcopy(models), data(models[0])
    fold = Fold(models)
    fold.model.train()
    fold(x)
    for run, model in enumerate(solo):
        model(x[run * ROWS : (run + 1) * ROWS])
        assert torch.equal(model.h[0].mlp.mean, models[run].h[0].mlp.mean) and model.h[0].mlp.mean.any()


def test_what_mixes_the_rows_of_a_batch_is_caught_unless_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE["mlp"], "centred", Centred)
    monkeypatch.setitem(CATALOGUE["mlp"], "apart", Apart)
    with pytest.raises(AssertionError):
        check(lambda run: {"mlp": "centred"})
    check(lambda run: {"mlp": "apart"})


def test_code_that_branches_on_a_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silently, all runs would go the way of one."""
    monkeypatch.setitem(CATALOGUE["mlp"], "branching", Branching)
    models = [made(run, {"mlp": "branching"}) for run in range(RUNS)]
    with pytest.raises(TypeError, match="cannot branch"):
        folded(models, True)


# Folded tensors ---------------------------------------------------------------------------------------------------------------

R, B, T, C = 3, 2, 5, 8
SHAPES: dict[str, tuple[int, ...]] = {"x": (B, T, C), "w": (C,), "m": (7, C), "s": (), "c": (3, 2, C), "k": (C, 1, 3)}
Operation = Callable[..., Any]
# By name: what is computed of x, an activation, and of tensors of each run's own. `len(x)` is how many rows a run has.
OPERATIONS: dict[str, Operation] = {
    "linear": lambda x, m: F.linear(x, m),
    "linear, two axes": lambda x, m: F.linear(x.flatten(0, 1), m),
    "linear, four axes": lambda x, m: F.linear(x[:, None], m),
    "linear, one axis": lambda m, w: F.linear(w, m),
    "linear, bias": lambda x, m: F.linear(x, m, m[:, 0]),
    "linear of a parameter": lambda m: F.linear(m, m.mT @ m, m[0]),
    "linear, shared weight": lambda x, w: F.linear(x, torch.arange(64.0).view(8, 8), w),
    "linear, shared bias": lambda x, m: F.linear(x, m, torch.arange(7.0)),
    "embedding": lambda x, m: F.embedding(x.abs().long() % 7, m),
    "embedding without a row's gradient": lambda x, m: F.embedding(x.abs().long() % 7, m, padding_idx=0),
    "embedding of all rows": lambda m: F.embedding(torch.arange(3), m),
    "embedding of a part": lambda x, c: F.embedding(x.abs().long() % 2, c[1]),
    "layer_norm": lambda x, w: F.layer_norm(x, (C,), w, w + 1),
    "layer_norm, gain": lambda x, w: F.layer_norm(x, (C,), w),
    "layer_norm of a parameter": lambda m, w: F.layer_norm(m, (C,), w),
    "rms_norm": lambda x, w: F.rms_norm(x, (C,), w),
    "rms_norm of a parameter": lambda m, w: F.rms_norm(m, (C,), w),
    "expand": lambda x, c: torch.cat((c.expand(len(x), -1, -1, -1), x[:, None, :2].expand(-1, 3, -1, -1)), 2),
    "expand of a first axis": lambda x, m: m.unsqueeze(0).expand(len(x), -1, -1),
    "expand of sizes": lambda x, m: m.expand(torch.Size((len(x), 7, C))),
    "expand of a parameter": lambda w: w.expand(4, -1),
    "expand further": lambda x, w: w.expand(len(x), 2, 3, C),
    "unbind": lambda c: c.unbind(0)[1] + torch.unbind(c, -2)[0][1],
    "iterated": lambda m: sum(row for row in m),
    "getitem": lambda c: (c[0], c[-1], c[1:, 0], c[..., 2], c[:, None, 1], c[1, 1, 1]),
    "getitem by index": lambda m: (m[torch.tensor([0, 2])], m[[1, 1]], m[:, torch.arange(3)]),
    "split": lambda m: (*m.split((3, 4)), *m.chunk(2, -1)),
    "stacked": lambda m, w: torch.stack((m[0], w)),
    "joined": lambda x, w: torch.cat((x, x * w), 1),
    "reshaped": lambda m: (m.reshape(-1), m.view(7, 2, 4), m.flatten(), m.mT, m.T, m.permute(1, 0), m.unsqueeze(0)),
    "reduced": lambda m: (m.sum(), m.mean(0), m.amax(-1, keepdim=True), m.norm(dim=-1), m.softmax(-1)),
    "matmul": lambda x, m: x @ m.mT,
    "matmul, on the left": lambda x, m: m @ x.mT,
    "einsum": lambda x, m: torch.einsum("btc,hc->bth", x, m),
    "convolution": lambda x, k: F.conv1d(x.mT, k, groups=C),
    "normalised": lambda x, m: F.linear(x, F.normalize(m, dim=-1)),
    "scores": lambda x, s: (x @ x.mT / (1 + s.abs())).softmax(-1),
    "where": lambda x, w: torch.where(x > w, x, w),
    "where of numbers": lambda x, s: torch.where(x > s, x, 0),
    "comparisons": lambda x, w: (x == w, x >= w, w < x, w != w, ~(w > 0), (w > 0) & (w < 1)),
    "clamp": lambda x, w: (x.clamp(min=w), w.clamp(min=0.1), torch.clamp(w, max=0.5), (w * 1).clamp_(min=0.2)),
    "kinds": lambda x, w: (w.to(x), w.double().float(), w.bfloat16().to(x.dtype), w.type_as(x), w.to(torch.float64)),
    "shapes": lambda m: m * m.shape[0] + len(m) + m.size(-1) + m.dim() + m.ndim + m.numel() + m.size()[0],
    "addcmul": lambda x, w, s: (torch.addcmul(x, x, w), torch.addcmul(w, w, s, value=0.5), x.lerp(w, s)),
    "gradient stopped": lambda x, w: (x * w.detach(), (w.clone() * 2).abs().sqrt()),
}  # fmt: skip


def leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


def inputs(names: Sequence[str], seed: int = 0) -> list[Tensor]:
    """[R, ...] by letter; an activation is flattened by who uses it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(R, *SHAPES[name], generator=generator) for name in names]


def told(made: Any) -> list[Tensor]:
    """What an operation gave, with every run in the first axis."""
    some = made if isinstance(made, tuple) else (made,)
    return [y.t if isinstance(y, Folded) else y.unflatten(0, (R, -1)) for y in some]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_each_run(name: str, exact: bool) -> None:
    """Values and gradients, against a loop. Sums of a few dozen numbers of order 1 to 10 in another order: 1e-5."""
    act = OPERATIONS[name]
    names = act.__code__.co_varnames[: act.__code__.co_argcount]
    one = [leaf(t) for t in inputs(names)]
    made = [act(*(t[r] for t in one)) for r in range(R)]
    wanted = [torch.stack(y) for y in zip(*(y if isinstance(y, tuple) else (y,) for y in made), strict=True)]
    every, batch = [leaf(t) for t in inputs(names)], Batch(R, exact, R * B)
    made = act(*(t.flatten(0, 1) if n == "x" else Folded(t, batch) for n, t in zip(names, every, strict=True)))
    for y, w in zip(made if isinstance(made, tuple) else (made,), wanted, strict=True):
        rows = "x" in names and w.dim() > 1 and w.shape[1] in (B, B * T)
        assert isinstance(y, Tensor) == rows, "what has the rows of every run is an activation"
    got = told(made)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if any(y.requires_grad for y in wanted):
        for some in (got, wanted):
            sum(
                (y * torch.linspace(-1, 1, y[0].numel()).view(y[0].shape)).sum() for y in some if y.requires_grad
            ).backward()  # type: ignore
        for a, b in zip(every, one, strict=True):
            assert (a.grad is None) == (b.grad is None)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


TWO = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "maximum": torch.maximum,
    "minimum": lambda a, b: a.minimum(b),
    "add": lambda a, b: torch.add(a, b, alpha=3),
    "method": lambda a, b: a.sub(b, alpha=2),
    "where": lambda a, b: torch.where(a > b, a, b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
}


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(TWO)),
    shape=st.lists(st.sampled_from([1, 3, 4]), max_size=3),
    other=st.lists(st.sampled_from([1, 3, 4]), max_size=4),
    kinds=st.sampled_from(
        ["act fold", "fold act", "fold fold", "const fold", "fold const", "number fold", "fold number"]
    ),
    exact=st.booleans(),
)
def test_arithmetic_counts_dimensions_from_the_right(
    name: str, shape: list[int], other: list[int], kinds: str, exact: bool
) -> None:
    """Of an activation, the rows come before what the shapes are about."""
    batch, generator = Batch(R, exact, R * B), torch.Generator().manual_seed(1)
    made: list[Any] = []
    shapes = {"fold": shape, "act": [B, *other], "const": other[-len(shape) :] if shape else []}
    if "act" in kinds and len(shape) > len(other) + 1:
        return
    for i, kind in enumerate(kinds.split()):
        made.append(2.0 if kind == "number" else torch.rand(R, *shapes[kind], generator=generator) + 0.5 + i)
    for i, kind in enumerate(kinds.split()):
        if kind == "const":
            made[i] = made[i][0]
    one = [[t[r] if k in ("fold", "act") else t for t, k in zip(made, kinds.split(), strict=True)] for r in range(R)]
    if "number" in kinds and name not in ("+", "-", "*", "/", "**", "//", "%"):
        return
    try:
        wanted = torch.stack([TWO[name](*each) for each in one])
    except RuntimeError:  # shapes that do not go together
        return
    if "act" in kinds and len(wanted.shape) > 1 and wanted.shape[1] != B:
        return  # a parameter whose first axis is wider than the batch's
    some = [
        Folded(t, batch) if k == "fold" else t.flatten(0, 1) if k == "act" else t
        for t, k in zip(made, kinds.split(), strict=True)
    ]
    (got,) = told(TWO[name](*some))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def test_what_is_changed_in_place_is_changed() -> None:
    """Also by operators, for buffers that a checkpoint holds."""
    batch = Batch(R, True, R * B)
    changes: dict[str, Callable[[Any, Any], Any]] = {
        "add_": lambda a, b: a.add_(b),
        "mul_": lambda a, b: a.mul_(b),
        "copy_": lambda a, b: a.copy_(b),
        "+=": lambda a, b: a.__iadd__(b),
        "-=": lambda a, b: a.__isub__(b),
        "*=": lambda a, b: a.__imul__(b),
        "/=": lambda a, b: a.__itruediv__(b),
        "clamp_": lambda a, b: a.clamp_(min=0.5),
        "zero_": lambda a, b: a.zero_(),
    }
    for name, change in changes.items():
        for left, right in (("x", "w"), ("x", "s"), ("w", "s"), ("w", "w")):
            a, b = inputs((left, right))
            wanted = a.clone()
            for r in range(R):
                change(wanted[r], b[r])
            given: Any = a.flatten(0, 1) if left == "x" else Folded(a, batch)
            made = change(given, Folded(b, batch))
            assert torch.allclose(a, wanted), name
            assert torch.allclose(told(made)[0], wanted), name


def test_what_cannot_be_told_of_several_runs_raises() -> None:
    batch = Batch(R, True, R * B)
    wide: Any = Folded(torch.ones(R, C), batch)
    acts: list[Callable[[Any], Any]] = [
        bool,
        float,
        torch.rand_like,
        lambda w: w.item(),
        lambda w: w.tolist(),
        lambda w: [1, 2][w],
    ]
    for act in acts:
        with pytest.raises((TypeError, RuntimeError)):
            act(Folded(torch.ones(R, 1), batch))
    with pytest.raises((TypeError, RuntimeError)):
        torch.ones(C).add_(wide)
    with pytest.raises(AssertionError, match="fewer axes"):
        torch.ones(R * B, C) + wide[None, None]


@pytest.mark.system  # the compiler takes half a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about torch
@pytest.mark.parametrize("exact", [False, True])
def test_a_fold_compiles_in_one_graph(exact: bool) -> None:
    """Fused kernels round elsewhere: 1e-5 of the logits' size."""
    trees: Trees = lambda r: {"linear": {"variant": "pkl", "scale": 1.0 + r}, "dropout": 0.1 + 0.05 * r}  # noqa: E731
    models = [made(run, trees(run)) for run in range(RUNS)]
    fold, (x, y) = Fold(models, exact), data(models[0])
    fold.model.train()
    for run, model in enumerate(models):
        set_step(model, run, STEP)
    told = []
    for net in (fold.model, torch.compile(fold.model, fullgraph=True)):
        fold.batch.rows = len(x)
        logits = net(x)[0]
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        fold.gradients()
        told.append([logits.detach(), *(g for model in models for g in gradients(model).values())])
        for stack in fold.stacks.values():
            stack.grad = None
    for one, other in zip(*told, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
