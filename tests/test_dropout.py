"""Dropout: its mask is a function of the seed, the step, the site and the element, by a second implementation and by statistics."""

from __future__ import annotations

import itertools
import math
import zlib
from typing import Any

import pytest
import torch
from models import grads, losses, make, scrambled, tokens
from properties import logits
from torch import Tensor, nn

from variations.dropout import Dropout, set_step


def words(x: int) -> int:
    """Wellons' lowbias32, on Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def kept(p: float, site: str, seed: int, step: int, count: int) -> list[bool]:
    """The mask, element by element: the hash of hashes that a run's config promises to stay the same."""
    clock = words(words((seed + 0x9E3779B9) % 2**32) ^ words((2 * step + 1) % 2**32))
    key = words(clock ^ zlib.crc32(site.encode()))
    uniform = [(words((words(i ^ key) + key) % 2**32) >> 8) / 2**24 for i in range(count)]
    threshold = torch.tensor(p, dtype=torch.float32).item()
    return [u >= threshold for u in uniform]


def mask(p: float, site: str, seed: int, step: int, *shape: int) -> Tensor:
    module = Dropout(p, site).train()
    set_step(module, seed, step)
    return module(torch.ones(shape)) != 0


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1337, 1), (1337, 123_456), (2**31 - 1, 2**31), (2**40 + 7, 3)])
@pytest.mark.parametrize(("p", "site"), [(0.1, "wte"), (0.5, "h.0.attn"), (0.9, "h.11.mlp")])
def test_the_mask_is_its_formula(p: float, site: str, seed: int, step: int) -> None:
    """Also where 32-bit products overflow, which the tensors let wrap."""
    assert mask(p, site, seed, step, 50, 40).flatten().tolist() == kept(p, site, seed, step, 2000)


def test_the_mask_repeats_and_differs_by_seed_step_and_site() -> None:
    first = mask(0.5, "h.0.attn", 3, 10, 64, 64)
    assert torch.equal(first, mask(0.5, "h.0.attn", 3, 10, 64, 64))
    torch.manual_seed(99)
    assert torch.equal(first, mask(0.5, "h.0.attn", 3, 10, 64, 64)), "torch's own stream plays no part"
    for site, seed, step in (("h.1.attn", 3, 10), ("h.0.mlp", 3, 10), ("h.0.attn", 4, 10), ("h.0.attn", 3, 11)):
        differing = (first != mask(0.5, site, seed, step, 64, 64)).float().mean().item()
        assert abs(differing - 0.5) < 4 * 0.5 / 64, "as coins that have nothing to do with each other"
    assert torch.equal(first.flatten(), mask(0.5, "h.0.attn", 3, 10, 64 * 64)), (
        "the element's number counts, not the shape"
    )


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_right(p: float) -> None:
    """Four standard deviations of a binomial, for four masks of 2^16."""
    n = 4 * 2**16
    count = sum(int(mask(p, "wte", seed, step, 2**16).sum()) for seed in (1, 2) for step in (0, 1))
    assert abs(count - n * (1 - p)) < 4 * math.sqrt(n * p * (1 - p))


def test_masks_are_uncorrelated_between_sites_steps_seeds_and_neighbours() -> None:
    """Correlation of n independent coins has deviation 1/sqrt(n); of some 200 pairs the largest is below 4.5 of them."""
    n = 2**16
    keys = [
        (site, seed, step)
        for site in ("wte", "h.0.attn", "h.0.attn.weights", "h.1.attn")
        for seed in (0, 1)
        for step in (0, 1)
    ]
    masks = torch.stack([mask(0.5, site, seed, step, n) for site, seed, step in keys]).double()
    table = torch.corrcoef(masks) - torch.eye(len(keys), dtype=torch.float64)
    assert table.abs().max() < 4.5 / math.sqrt(n)
    for row, lag in itertools.product(masks[:4], (1, 2, 3, 64, 256, 4096)):
        pair = torch.stack((row[:-lag], row[lag:]))
        assert torch.corrcoef(pair)[0, 1].abs() < 4.5 / math.sqrt(n - lag)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_in_full_precision(dtype: torch.dtype) -> None:
    """Division by 1 - p in float32, rounded once to the input's dtype."""
    module = Dropout(0.1, "wte").train()
    x = (torch.arange(1, 2001) / 100).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    on = y != 0
    expected = (x.double() / (1 - torch.tensor(0.1)).double())[on]
    torch.testing.assert_close(y[on].double(), expected, rtol=max(torch.finfo(dtype).eps, 2.0**-23) * 0.51, atol=0)


def test_gradients_have_the_mask_of_the_forward() -> None:
    module = Dropout(0.3, "wte").train()
    set_step(module, 1, 2)
    x = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = module(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and torch.equal(x.grad != 0, y != 0)
    assert torch.allclose(x.grad[y != 0], torch.tensor(1 / 0.7))


def masks_in(model: nn.Module, sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The masks that the dropouts of a model would give a tensor of these shapes."""
    modules = dict(model.named_modules())
    return {path: modules[path](torch.ones(size)) != 0 for path, size in sizes.items()}


def test_a_site_has_its_mask_in_any_surrounding_model() -> None:
    """Layers, widths, MLPs and heads around it may change, and other dropouts may be called or not."""
    larger: dict[str, Any] = {"n_layer": 5, "n_embd": 32, "mlp": "gated", "norm": "rmsnorm"}
    small, other = (make(dropout=0.2, **tree).train() for tree in ({}, larger))
    for model in (small, other):
        set_step(model, 7, 3)
    sizes = {
        "drop": (2, 12, 16),
        "h.1.attn.drop": (2, 12, 16),
        "h.1.attn.attn_drop": (2, 4, 12, 12),
        "h.0.mlp.drop": (2, 12, 16),
    }
    mine = masks_in(small, sizes)
    losses(other)
    for path, theirs in masks_in(other, sizes).items():
        assert torch.equal(mine[path], theirs), path
    flat = [m.flatten()[:384] for m in mine.values()]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(flat, 2))


def test_every_dropout_of_a_model_has_its_own_site() -> None:
    model = make(dropout=0.2, n_layer=4)
    sites = [m.site for m in model.modules() if isinstance(m, Dropout)]
    assert len(sites) == 1 + 3 * 4 and len(set(sites)) == len(sites)
    set_step(model, 1, 1)
    assert len({int(m.key) for m in model.modules() if isinstance(m, Dropout)}) == len(sites)


def test_every_dropout_is_used_once_where_it_belongs() -> None:
    """On the embeddings, on the weights of attention, and on what a mixer and an MLP write."""
    model, seen = make(dropout=0.2, n_layer=1).train(), list[tuple[str, tuple[int, ...]]]()
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda m, x, y, name=name: seen.append((name, tuple(y.shape))))
    model.h[0].attn.proj.register_forward_hook(lambda *_: seen.append(("proj", ())))
    model.h[0].mlp.down.register_forward_hook(lambda *_: seen.append(("down", ())))
    losses(model)
    wide = (2, 12, 16)
    assert seen == [
        ("drop", wide), ("h.0.attn.attn_drop", (2 * 4, 12, 12)), ("proj", ()), ("h.0.attn.drop", wide), ("down", ()),
        ("h.0.mlp.drop", wide),
    ]  # fmt: skip


def test_a_model_trains_with_the_same_masks_again_and_other_ones_at_another_step() -> None:
    model = scrambled(dropout=0.3).train()

    def run(seed: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        set_step(model, seed, step)
        loss = losses(model)
        loss.backward()
        return loss.detach(), {k: g.clone() for k, g in grads(model).items()}

    first, before = run(1, 1)
    again, after = run(1, 1)
    assert torch.equal(first, again) and all(torch.equal(g, after[k]) for k, g in before.items())
    assert len({run(seed, step)[0].item() for seed, step in ((1, 1), (1, 2), (2, 1))}) == 3


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_attention_weights_are_dropped_as_the_formula_says(kv: int) -> None:
    """y = (softmax(scores) * mask / (1 - p)) v, forward and backward; float64, sums of at most 12 terms. The mask is asked of the
    module by itself, so that a second one drawn in the backward pass would show."""
    model: Any = scrambled(dropout=0.4, n_kv_head=kv).double().train()
    set_step(model, 5, 6)
    attend = model.h[0].attn
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(2, n, 12, 4, generator=draw, dtype=torch.float64, requires_grad=True) for n in (4, kv, kv)]
    y = attend.attend(*given)
    q, k, v = (t.detach().clone().requires_grad_() for t in given)
    keys, values = (t.repeat_interleave(4 // kv, dim=1) for t in (k, v))
    weights = ((q @ keys.mT) / 2 + torch.full((12, 12), -math.inf).triu(1)).softmax(-1)
    on = attend.attn_drop(torch.ones(2, 4, 12, 12)) != 0
    expected = (weights * on / (1 - torch.tensor(0.4).double())) @ values
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert 0.5 < on.float().mean() < 0.7
    for mine, theirs in zip((y, expected), (given, (q, k, v)), strict=True):
        mine.square().sum().backward()
        assert all(t.grad is not None for t in theirs)
    for a, b in zip(given, (q, k, v), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11)


def test_without_dropout_the_path_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = 0 and evaluation return their input itself, and attention takes the fused kernel."""
    x = torch.randn(3, 4)
    assert Dropout(0.0, "wte").train()(x) is x and Dropout(0.5, "wte").eval()(x) is x
    model = scrambled(dropout=0.3)
    ids = tokens(model, 2, 8)
    plain = logits(scrambled(dropout=0.0).train(), ids)
    assert torch.equal(logits(model.eval(), ids), plain)
    assert not torch.equal(logits(model.train(), ids), plain)
    calls: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*given: Any, **options: Any) -> Tensor:
        calls.append(1)
        return kernel(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    logits(scrambled(dropout=0.0).train(), ids)
    assert len(calls) == 2


def test_the_numbers_of_dropout_are_in_no_checkpoint() -> None:
    model = make(dropout=0.25)
    assert set(model.state_dict()) == set(make().state_dict())
    assert {b.item() for name, b in model.named_buffers() if name.endswith(".p")} == {0.25}
