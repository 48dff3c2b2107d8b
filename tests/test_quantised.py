"""Weights rounded to few bits: the nearest that the format has, a scale for each row or part, and gradients straight through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Case, config, losses, make, read, scrambled, sentence, tokens
from properties import CHECKS, bits, logits
from torch import Tensor

from core.lora import effective, merge
from core.options import Reader
from core.rules import SliceRule
from engine.optim import Optimizers
from model import assemble, fill
from variations import CATALOGUE

CASES = [
    Case("linear", "quantised", {"format": form, "granularity": grain})
    for form in ("int8", "float8")
    for grain in ("row", "tensor")
]
MODELS: list[dict[str, Any]] = [
    {"mlp": {"variant": "gated", "width": 24}},
    {"mlp": {"variant": "moe", "experts": 3, "width": 8}},
]


def grid(form: str) -> Tensor:
    """Every number of a format, least first; for e4m3 by its definition: sign, four bits of exponent less 7, three of mantissa."""
    if form == "int8":
        return torch.arange(-127.0, 128.0)
    sizes = {m / 8 * 2.0**-6 for m in range(8)}
    sizes |= {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
    return torch.tensor(sorted(sizes | {-x for x in sizes}))


def linears(model: Any) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if hasattr(m, "rounded")}


def pieces(weight: Tensor, sizes: list[int], grain: str) -> list[Tensor]:
    """What has a scale of its own: rows or parts, of each expert."""
    whole = weight.flatten(0, -3).unbind(0) if weight.dim() > 2 else (weight,)
    parts = [part for one in whole for part in one.split(sizes)]
    return [row for part in parts for row in part] if grain == "row" else parts


@pytest.mark.parametrize("tree", MODELS, ids=["gated", "moe"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_is_the_nearest_that_the_format_has(case: Case, tree: dict[str, Any]) -> None:
    model = scrambled(**tree, linear=case.node())
    found = linears(model)
    assert {"h.0.attn.qkv", "h.1.mlp.down"} <= set(found) and not {"head", "wte"} & set(found)
    known = grid(case.options["format"]).double()
    for path, linear in found.items():
        sizes = {"qkv": [16, 8, 8], "gate_up": [linear.out_features // 2] * 2}.get(
            path.rpartition(".")[2], [linear.out_features]
        )
        args = sizes, case.options["granularity"]
        for given, made in zip(pieces(linear.weight, *args), pieces(linear.effective(), *args), strict=True):
            scale = (given.detach().abs().max() / known[-1]).double()
            wanted = given.detach().double() / scale
            distance = (wanted[..., None] - known).abs()
            # Two roundings of 2^-24, of the quotient and the product: 2e-7 of numbers up to 448.
            assert ((made.detach().double() / scale)[..., None] - known).abs().amin(-1).max() < 2e-7 * known[-1]
            assert ((made.detach().double() / scale - wanted).abs() - distance.amin(-1)).max() < 3e-7 * known[-1]
            assert made.detach().abs().max().item() == pytest.approx(given.detach().abs().max().item(), rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_scale_belongs_to_its_rows_alone(case: Case) -> None:
    """What is said of one row (or part) changes nothing in the others."""
    model = scrambled(linear=case.node(), mlp={"variant": "moe", "experts": 3, "width": 8})
    by_row = case.options["granularity"] == "row"
    for linear, where in ((model.h[0].attn.qkv, (slice(16, 24),)), (model.h[0].mlp.gate_up, (1, slice(0, 8)))):
        before = linear.effective().detach().clone()
        place = (*where[:-1], where[-1].start) if by_row else where
        with torch.no_grad():
            linear.weight[place] *= 100.0
        after, others = linear.effective().detach(), torch.ones_like(before, dtype=torch.bool)
        others[place] = False
        assert bits(after[others], before[others])
        torch.testing.assert_close(after[~others], 100.0 * before[~others], rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_go_straight_through(case: Case) -> None:
    """The weight's gradient is, to the bit, that of a plain model that has the rounded weights."""
    model = scrambled(linear=case.node())
    plain = make()
    state = dict(model.state_dict())
    state |= {f"{path}.weight": linear.effective().detach() for path, linear in linears(model).items()}
    plain.load_state_dict(state)
    x = tokens(model, 2, 9)
    assert bits(logits(model, x), logits(plain, x))
    losses(model).backward()
    losses(plain).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bits(parameter.grad, theirs[name].grad), name
        assert parameter.dtype == torch.float32


def test_rows_of_zeros_and_tiny_rows_stay_finite() -> None:
    for case in CASES:
        linear: Any = make(linear=case.node()).h[0].mlp.up
        with torch.no_grad():
            linear.weight.zero_()
            assert not linear.effective().any()
            linear.weight[0] = 1e-45
            assert linear.effective().isfinite().all()
        linear.effective().sum().backward()
        assert (linear.weight.grad == 1).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_every_format_has_every_property(check: str, case: Case) -> None:
    CHECKS[check](case)


@pytest.mark.parametrize("form", ["int8", "float8"])
def test_what_is_rounded_still_learns(form: str) -> None:
    optimizer = Reader(CATALOGUE).variant("optimizer", {"variant": "adamw", "learning_rate": 0.01}, ())
    assert optimizer is not None
    model, rows = assemble(config(linear={"variant": "quantised", "format": form}), {}, optimizer)
    fill(model, rows, 1)
    optimizers, first = Optimizers(model, rows), losses(model).item()
    for _ in range(60):
        optimizers.zero_grad()
        losses(model).backward()
        optimizers.step(1.0)
    assert losses(model).item() < 0.3 * first  # 24 tokens by heart


@pytest.mark.parametrize("form", ["int8", "float8"])
def test_adapters_are_merged_to_within_a_rounding(form: str) -> None:
    optimizer = Reader(CATALOGUE).variant("optimizer", "adamw", ())
    assert optimizer is not None
    rule = read(SliceRule, {"match": "h.*.mlp.gate_up[gate]", "lora": {"rank": 2}})
    tree = {"linear": {"variant": "quantised", "format": form}, "mlp": {"variant": "moe", "experts": 3, "width": 8}}
    model, rows = assemble(config(**tree), {"adapt": rule}, optimizer)
    fill(model, rows, 1)
    linear: Any = model.get_submodule("h.0.mlp.gate_up")
    with torch.no_grad():
        next(linear.children()).lora_b.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    wanted = effective(linear)
    merge(model)
    rows_of = wanted.abs().amax(-1, keepdim=True)
    half = rows_of / 127 / 2 if form == "int8" else torch.maximum(wanted.abs() / 16, rows_of / 448 * 2.0**-10)
    assert ((linear.effective() - wanted).abs() <= 1.001 * half).all()  # half a step of the grid


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("mxfp8", "blocks of 32 along one dimension"),
        ("nvfp4", "stochastically rounded gradients"),
        ("int4", "'int4' is not allowed. Did you mean 'int8'? Known: float8, int8."),
    ],
)
def test_formats_that_cannot_be_trained_so_are_refused_with_the_reason(form: str, words: str) -> None:
    told = sentence(lambda: config(linear={"variant": "quantised", "format": form}))
    assert "linear.format" in told and words in told
