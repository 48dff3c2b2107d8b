"""Updates against their formulas and against torch, which parameters each optimizer takes, and state that comes back."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import reference
import torch
from models import losses, make, read, scrambled, sentence
from torch import Tensor, nn

from core.options import Variant
from core.resolve import Resolver
from core.rules import Row
from core.slices import Declaration, Layout, Slice, declared, slices
from engine.optim import Optimizers
from model import GPT
from train_args import Config
from variations import CATALOGUE
from variations.init.distributions import ZEROS
from variations.optimizer import OPTIMIZERS
from variations.optimizer.base import Entry, Group, Optimizer
from variations.optimizer.muon import orthogonalise

STEPS = 20
SHAPES = [(8, 8), (12, 8), (8, 20), (2, 8, 6), (7,), (3, 2, 5, 5)]


def node(name: str, **options: Any) -> Any:
    return read(Config, {"optimizer": {"variant": name, **options}}).optimizer


def weights(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]


def gradient(p: Tensor, i: int, step: int) -> Tensor:
    """Gradients of very different sizes, some of them exactly zero."""
    draw = torch.Generator().manual_seed(1000 * i + step)
    g = torch.randn(p.shape, generator=draw, dtype=torch.float64) * 10.0 ** (i - 2)
    return (g * (torch.rand(p.shape, generator=draw) > 0.1)).to(p.dtype)


def group_of(cls: type[Optimizer], params: list[Tensor], layouts: list[Layout] | None, decay: float) -> Group:
    """The slices of tensors as the entries that an optimizer wants."""
    entries: list[Entry] = []
    for i, p in enumerate(params):
        what = Declaration(layouts[i] if layouts else Layout(), "matrix", ZEROS)
        labels = what.layout.labels()
        parts = [Slice(f"{i}[{'.'.join(x)}]", str(i), x, what.layout.shape(p.shape, x), what) for x in labels]
        entries += [Entry(p, x.view, (x,)) for x in parts] if cls.apart else [Entry(p, Tensor.flatten, tuple(parts))]
    return Group(entries, 0.05, decay)


def stepped(
    name: str, params: list[Tensor], layouts: list[Layout] | None = None, decay: float = 0.1, **options: Any
) -> Any:
    """Twenty updates of one group, at a rate that changes."""
    cls: Any = OPTIMIZERS[name]
    made = cls(node(name, **options).options, [group_of(cls, params, layouts, decay)])
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = gradient(p, i, step)
        made.step(rate(step))
    return made


def rate(step: int) -> float:
    return 1.0 - step / 40


# AdamW -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_is_its_formula(dtype: torch.dtype) -> None:
    """The fused kernel, against the formula in float64.

    A step rounds the weight twice (decay, update): 2 u max|w|, u the unit roundoff. The ratio m / sqrt(v) is at most
    sqrt(1 / (1 - b2)) = 10 / sqrt(1 - b2^t), and carries some 16 roundings of m, v, the root and the quotient: lr * 10 * 16 u.
    Both add up over the steps. A wrong bias correction or order of decay is off by 1e-3.
    """
    params = weights(dtype)
    expected = [p.double().clone() for p in params]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    stepped("adamw", params, betas=[0.9, 0.99], eps=1e-6)
    for step in range(STEPS):
        for i, p in enumerate(expected):
            g = gradient(params[i], i, step).double()
            new, m, v = reference.adamw_step(p, g, *moments[i], step + 1, 0.05 * rate(step), 0.9, 0.99, 1e-6, 0.1)
            expected[i], moments[i] = new, (m, v)
    unit = torch.finfo(dtype).eps / 2
    for got, want in zip(params, expected, strict=True):
        bound = STEPS * (2 * unit * max(1.0, want.abs().max().item()) + 0.05 * 160 * unit)
        assert (got.double() - want).abs().max() < bound


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_has_the_bits_of_torchs_fused_adamw(decay: float) -> None:
    """It is the same kernel, so every bit; torch's foreach and loop forms round in another order."""
    mine, theirs = weights(torch.float32), [nn.Parameter(p) for p in weights(torch.float32)]
    made = stepped("adamw", mine, decay=decay, betas=[0.8, 0.95], eps=1e-8)
    other = torch.optim.AdamW(theirs, lr=0.05, betas=(0.8, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    for step in range(STEPS):
        other.param_groups[0]["lr"] = 0.05 * rate(step)
        for i, p in enumerate(theirs):
            p.grad = gradient(p, i, step)
        other.step()
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(a, b)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(made.groups[0].entries[i].state[kind], other.state[b][kind].flatten())


def test_adamw_needs_two_betas() -> None:
    assert "betas: [0.9] is not two numbers" in sentence(lambda: node("adamw", betas=[0.9]))
    assert "is not < 1" in sentence(lambda: node("adamw", betas=[0.9, 1.0]))


# Muon ------------------------------------------------------------------------------------------------------------------------

# A rounding of X before the five iterations grows by at most 3.4445^5 = 485, the slope at zero (a gradient's singular values may
# be tiny), and each product of at most 20 terms adds some 20 roundings: 485 * 40 * 2^-24 = 1.2e-3 for an orthogonal factor with
# entries of order 0.3. That is the worst place of a matrix; a transposed, unscaled or merged matrix is off by 0.1.
FACTOR = 485 * 40 * 2.0**-24


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_its_formula_for_every_matrix_of_a_stack(decay: float, nesterov: bool) -> None:
    """Batches of mixed shapes, in float64 but for the iterations: the state agrees to 2^-53, a step to lr * scale * FACTOR."""
    shapes = [s for s in SHAPES if len(s) > 1] + [(8, 8), (20, 8)]
    params = weights(torch.float64, shapes)
    expected = [p.clone() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    made = stepped("muon", params, decay=decay, nesterov=nesterov, momentum=0.9)
    for step in range(STEPS):
        for i, (p, buffer) in enumerate(zip(expected, buffers, strict=True)):
            rows = [x.view(-1, *p.shape[-2:]) for x in (p, gradient(p, i, step), buffer)]
            for w, g, m in zip(*rows, strict=True):
                new, moved = reference.muon_step(w, g, m, 0.05 * rate(step), 0.9, decay, nesterov)
                w.copy_(new), m.copy_(moved)
    for i, (got, want) in enumerate(zip(params, expected, strict=True)):
        torch.testing.assert_close(made.groups[0].entries[i].state["momentum"], buffers[i], rtol=1e-12, atol=1e-12)
        scale = max(1.0, want.shape[-2] / want.shape[-1]) ** 0.5
        assert (got - want).abs().max() < STEPS * 0.05 * scale * FACTOR


def test_muon_takes_the_parts_of_a_fused_weight_one_by_one() -> None:
    """[q; k; v] and interleaved groups are stored together and are three matrices, each with the factor of its own shape."""
    fused = Layout((("q", 16), ("k", 4), ("v", 4)), dim=-2)
    groups = Layout((("q", 4), ("k", 2)), dim=-2, groups=2)
    stack = Layout((("gate", 6), ("up", 6)), dim=-2, stack=(("a", "b"),))
    columns = Layout((("x", 3), ("y", 5)), dim=-1)
    layouts, shapes = [fused, groups, stack, columns], [(24, 8), (12, 8), (2, 12, 8), (8, 8)]
    params, parts = weights(torch.float32, shapes), list[Tensor]()
    apart = [layout.split(p.clone()) for layout, p in zip(layouts, params, strict=True)]
    made = stepped("muon", params, layouts)
    for whole in apart:
        parts += [part.clone() for part in whole.values()]
    other = OPTIMIZERS["muon"](made.options, [group_of(OPTIMIZERS["muon"], parts, None, 0.1)])
    for step in range(STEPS):
        pieces: list[Tensor] = []
        for i, layout in enumerate(layouts):
            pieces += list(layout.split(gradient(params[i], i, step)).values())
        for part, g in zip(parts, pieces, strict=True):
            part.grad = g.contiguous()
        other.step(rate(step))
    split = [part for layout, p in zip(layouts, params, strict=True) for part in layout.split(p).values()]
    bound = STEPS * 0.05 * 2 * FACTOR  # the same numbers through the same products, but for the order of the batch
    for got, want in zip(split, parts, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=bound)
    merged = weights(torch.float32, shapes)
    stepped("muon", merged)
    assert all((a - b).abs().max() > 10 * bound for a, b in zip(merged, params, strict=True)), (
        "merged, it goes elsewhere"
    )


def test_orthogonalise_brings_singular_values_near_one() -> None:
    """The quintic's band is 0.68 to 1.13 (Jordan, 2024) for values that are not tiny; singular vectors stay (float32)."""
    for shape in ((16, 16), (8, 24), (24, 8)):
        u, _, v = torch.linalg.svd(
            torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)), full_matrices=False
        )
        s = torch.linspace(0.1, 1.0, 8 if 8 in shape else 16)
        got = orthogonalise(u * s @ v, 5)
        made = torch.linalg.svdvals(got)
        assert made.min() > 0.65 and made.max() < 1.2 and got.shape == (3, *shape)
        turned = u.mT @ got @ v.mT
        off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < FACTOR
        torch.testing.assert_close(orthogonalise(1e4 * (u * s @ v), 5), got, rtol=0, atol=FACTOR)
    assert not orthogonalise(torch.zeros(1, 4, 4), 5).any()


def test_muon_cannot_be_its_own_rest() -> None:
    assert "rest: embeddings, the head and vectors need another optimizer" in sentence(
        lambda: node("muon", rest="muon")
    )


# Every optimizer -------------------------------------------------------------------------------------------------------------


def model() -> GPT:
    """A model with every role: a PKL stack, fused weights, gains, biases, two embeddings and an untied head."""
    return scrambled(sites={"p": {"match": "h.0.**", "linear": "pkl"}}, tie_weights=False, mlp="gated")


def table(net: nn.Module, optimizer: Variant) -> list[Row]:
    return Resolver(slices(net), CATALOGUE).resolve({}, optimizer)


def optimizers_of(net: nn.Module, optimizer: Variant) -> Optimizers:
    return Optimizers(net, table(net, optimizer))


def train(net: GPT, optimizers: Optimizers, first: int, steps: int) -> None:
    for i in range(first, first + steps):
        optimizers.zero_grad()
        (losses(net, 1) * (1 + i)).backward()
        optimizers.step(1 / (1 + i))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_continues_bit_for_bit(name: str) -> None:
    whole = model()
    optimizers = optimizers_of(whole, node(name))
    train(whole, optimizers, 0, 3)
    half = copy.deepcopy(whole)
    saved = {key: tensor.clone() for key, tensor in optimizers.state().items()}
    train(whole, optimizers, 3, 3)
    again = optimizers_of(half, node(name))
    again.load(saved)
    train(half, again, 3, 3)
    for (key, a), b in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b), key
    fresh = model()
    unset = optimizers_of(fresh, node(name))
    fresh.load_state_dict({k: v.clone() for k, v in half.state_dict().items()})
    assert set(unset.state()) == set(saved) and all(not t.any() for t in unset.state().values())
    with pytest.raises(ValueError, match="another model"):
        unset.load({})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss_and_moves_nothing_at_rate_zero(name: str) -> None:
    net = make()
    optimizers = optimizers_of(net, node(name, learning_rate=0.05 if name == "adafactor" else 0.01))
    before, start = [p.clone() for p in net.parameters()], losses(net).item()
    losses(net).backward()
    optimizers.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    for _ in range(10):
        optimizers.zero_grad()
        assert all(p.grad is None for p in net.parameters()) and optimizers.gradients() == []
        losses(net).backward()
        assert len(optimizers.gradients()) == len(before)
        optimizers.step(1.0)
    assert losses(net).item() < start - 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_stays(name: str) -> None:
    net = make()
    optimizers = optimizers_of(net, node(name))
    before = {key: p.clone() for key, p in net.named_parameters()}
    losses(net).backward()
    net.h[0].attn.proj.weight.grad = None
    optimizers.step(1.0)
    moved = {key for key, p in net.named_parameters() if not torch.equal(p, before[key])}
    assert moved == set(before) - {"h.0.attn.proj.weight"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_cover_every_parameter_once_with_its_own_settings(name: str) -> None:
    """No decay on vectors; matrices to whom takes matrices alone, the rest to the rest; names and tensors agree."""
    net = model()
    chosen, cls = node(name, weight_decay=0.3), cast("type[Optimizer]", OPTIMIZERS[name])
    made, parameters = optimizers_of(net, chosen), dict(net.named_parameters())
    roles = {key: what.role for key, _, what in declared(net)}
    layouts = {key: what.layout for key, _, what in declared(net)}
    assert set(roles.values()) == {"matrix", "embedding", "vector"}
    taken: list[str] = []
    for member in made.members.values():
        for group in member.groups:
            for entry in group.entries:
                taken += [part.address for part in entry.covers]
                key = entry.covers[0].parameter
                assert entry.parameter is parameters[key]
                assert all(part.declaration.layout == layouts[key] for part in entry.covers)
                assert entry.view.numel() == sum(part.numel for part in entry.covers)
                assert group.weight_decay == (0.0 if roles[key] == "vector" else member.options.weight_decay)
                assert group.learning_rate == member.options.learning_rate
                mine = cls.roles is None or roles[key] in cls.roles
                assert (member.options == chosen.options) == mine
                assert member.apart or key == ", ".join({part.parameter for part in entry.covers}), "merged to a whole"
    assert sorted(taken) == sorted(part.address for part in slices(net))
    settings = [(type(m), g.learning_rate, g.weight_decay) for m in made.members.values() for g in m.groups]
    assert len(set(settings)) == len(settings), "equal settings are one group"


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    rows = {
        row.slice.address: row
        for row in table(model(), node("muon", rest={"variant": "adamw", "learning_rate": 0.002}))
    }
    muon = {a for a, row in rows.items() if row.settings.optimizer.name == "muon"}
    assert {"h.0.attn.qkv.weight[a.q]", "h.0.mlp.gate_up.weight[b.up]", "h.1.attn.qkv.weight[k]"} <= muon
    assert not any(a.startswith(("wte", "wpe", "head", "ln_f")) or "bias" in a or "ln_" in a for a in muon)
    assert rows["wte.weight"].rules == ("default.rest",) and rows["wte.weight"].learning_rate == 0.002
    assert rows["ln_f.weight"].rules == ("default.rest", "default.no_decay_on_vectors")
    assert rows["h.1.mlp.down.weight"].rules == () and rows["h.1.mlp.down.weight"].learning_rate == 0.02


def test_the_table_has_a_row_for_every_slice_with_its_numbers() -> None:
    net = model()
    rows = {row.slice.address: row for row in table(net, node("adamw"))}
    assert sum(row.slice.numel for row in rows.values()) == sum(p.numel() for p in net.parameters())
    assert all(row.slice.numel == math.prod(row.slice.shape) for row in rows.values())
    keys = rows["h.1.attn.qkv.weight[k]"]
    assert keys.slice.shape == (8, 16) and keys.settings.weight_decay == 0.1
    assert rows["ln_f.bias"].settings.weight_decay == 0.0 and str(rows["ln_f.bias"].init) == "zeros"
    assert str(rows["wte.weight"].init) == "normal(std=0.02)"
    other = make(init={"variant": "truncated_normal", "std": 0.1, "scale_residual": False})
    assert str(table(other, node("adamw"))[0].init) == "truncated_normal(scale_residual=False, std=0.1)"


def test_no_decay_means_one_group() -> None:
    for decay, count in ((0.0, 1), (0.1, 2)):
        (member,) = optimizers_of(model(), node("adamw", weight_decay=decay)).members.values()
        assert len(member.groups) == count


def test_muon_takes_heads_apart_where_asked() -> None:
    """Rows of q, k and v by head, columns of the projection by head: as separate parameters of one head each."""
    layout = Layout((("q", 8), ("k", 4), ("v", 4)), dim=-2)
    columns = Declaration(Layout(dim=-2), "matrix", ZEROS, blocks=(-1, 4))
    heads = {"qkv": Declaration(layout, "matrix", ZEROS, blocks=(-2, 4)), "proj": columns}
    shapes = {"qkv": (16, 8), "proj": (8, 8)}
    params = dict(zip(heads, weights(torch.float32, list(shapes.values())), strict=True))
    apart = [x.clone() for x in (*params["qkv"].split(4), *params["proj"].split(4, dim=1))]
    entries = [
        Entry(params[name], part.view, (part,))
        for name, what in heads.items()
        for x in what.layout.labels()
        for part in [Slice(f"{name}{x}", name, x, what.layout.shape(shapes[name], x), what)]
    ]
    options = node("muon", heads_apart=True).options
    mine = OPTIMIZERS["muon"](options, [Group(entries, 0.05, 0.1)])
    theirs = OPTIMIZERS["muon"](options, [group_of(OPTIMIZERS["muon"], apart, None, 0.1)])
    for step in range(STEPS):
        for i, (name, p) in enumerate(params.items()):
            p.grad = gradient(p, i, step)
            for place, g in zip(
                apart[4 * i :], p.grad.split(4, dim=1) if name == "proj" else p.grad.split(4), strict=False
            ):
                place.grad = g.contiguous()
        mine.step(rate(step))
        theirs.step(rate(step))
    got = [*params["qkv"].split(4), *params["proj"].split(4, dim=1)]
    assert len(got) == len(apart)
    for a, b in zip(got, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=STEPS * 0.05 * 2 * FACTOR)
