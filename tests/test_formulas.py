"""Every variation on its own against its formula, and initial values against their distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from models import config, make, read, scrambled, sentence
from torch import Tensor, nn

from core.options import Variant, fields_of, options_of
from core.slices import initialise
from gpt_conf import ModelConfig
from variations import CATALOGUE
from variations.activation import ACTIVATIONS
from variations.init import INITS
from variations.norm import NORMS
from variations.position.rope import RoPE
from variations.site import Site

# Formulas ---------------------------------------------------------------------------------------------------------------------


def oracle(name: str) -> Callable[..., Tensor]:
    """A formula of tests/reference.py; a variation without a formula does not change its input."""
    found: Callable[..., Tensor] | None = getattr(reference, name, None)
    assert found or name in ("identity", "none"), f"write the formula of '{name}' in tests/reference.py"
    return found or (lambda x, *_: x)


def part(kind: str, node: Any, **shape: Any) -> Any:
    """One variation on its own, in float64, with random parameters."""
    whole = config(**{kind: node})
    site = Site(whole, CATALOGUE)
    module = site.make(kind, "here", **shape)
    generator = torch.Generator().manual_seed(3)
    module = module.to_empty(device="cpu") if any(p.is_meta for p in module.parameters()) else module
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name: str) -> None:
    """float64, elementwise: the library's erf, tanh and exp may differ from ours by a few units of 2^-53."""
    x = torch.cat((normal(3, 5, 64) * 3, torch.zeros(3, 5, 1)), -1).requires_grad_()
    y, expected = part("activation", name)(x), oracle(name)(x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-14)
    mine, theirs = (torch.autograd.grad(z.sum(), x)[0] for z in (y, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("switch", [{}, {"gain": False}, {"bias": False}, {"eps": 0.1}, {"gain": False, "bias": True}])
def test_norms_are_their_formulas(name: str, switch: dict[str, Any]) -> None:
    """float64; a mean of 24 terms in another order differs by about 24 * 2^-53."""
    known = fields_of(options_of(NORMS[name]))
    options = {k: v for k, v in switch.items() if k in known}
    module = part("norm", {"variant": name, **options}, width=24)
    x = normal(2, 7, 24) * 2 + 1
    given: list[Any] = []
    if "gain" in known:
        assert (module.weight is None) == (options.get("gain") is False)
        given.append(torch.ones(24, dtype=torch.float64) if module.weight is None else module.weight)
    if "bias" in known:
        assert (module.bias is None) == (options.get("bias") is False)
        given.append(module.bias)
    eps = {"eps": options["eps"]} if "eps" in options else {}
    torch.testing.assert_close(module(x), oracle(name)(x, *given, **eps), rtol=1e-12, atol=1e-13)


def test_layernorm_follows_the_models_bias_unless_it_says_otherwise() -> None:
    said = [(model, own) for model in (True, False) for own in (None, True, False)]
    for model, own in said:
        made = make(bias=model, norm={"variant": "layernorm", "bias": own})
        assert (made.ln_f.bias is not None) == (model if own is None else own)


@pytest.mark.parametrize("base", [10000.0, 37.0])
def test_rope_is_its_formula(base: float) -> None:
    """Sines and cosines are kept in float32 (2^-24 relative), and two multiply values of at most 5: 1e-6 is ten of those."""
    rope = part("position", {"variant": "rope", "base": base}, width=6)
    x = normal(2, 3, 12, 6)
    for offset, t in ((0, 12), (5, 7), (11, 1)):
        got = rope.rotate(x[:, :, :t], offset)
        torch.testing.assert_close(got, reference.rope(x[:, :, :t], base, offset), rtol=0, atol=1e-6)
    assert isinstance(rope, RoPE)


def test_rope_scores_depend_on_distance_alone() -> None:
    """q_i . k_j is the same for all i - j = d: rotation by the difference. The tolerance is rope's."""
    rope = part("position", "rope", width=8)
    q, k = (rope.rotate(normal(1, 1, 1, 8, seed=s).expand(1, 1, 12, 8), 0)[0, 0] for s in (1, 2))
    scores = q @ k.T
    for d in range(12):
        line = scores.diagonal(-d)
        assert (line - line[0]).abs().max() < 1e-5
    assert scores[:, 0].unique().numel() == 12


def test_odd_heads_cannot_turn() -> None:
    text = sentence(lambda: make(position="rope", n_embd=12, n_head=4, n_kv_head=4))
    assert "at 'h.0.attn.position'" in text and "even, not 3" in text


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_gated_mlp_is_its_formula(act: str) -> None:
    """float64, sums of at most 48 terms."""
    model = scrambled(mlp="gated", activation=act, bias=False).double()
    block: Any = model.h[0]
    gate, up = block.mlp.gate_up.weight.split(block.mlp.gate_up.weight.shape[0] // 2)
    x = normal(2, 5, 16)
    expected = reference.gated_mlp(x, gate, up, block.mlp.down.weight, oracle(act))
    torch.testing.assert_close(block.mlp(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "tree", "width"),
    [
        ("standard", {"expansion": 2.3}, 230),  # 2.3 * 100 is 229.99999999999997
        ("standard", {"width": 7}, 7),
        ("standard", {}, 400),
        ("gated", {}, 264),  # 8/3 * 100 = 266.7, to the nearest multiple of 8
        ("gated", {"width": 13}, 13),
        ("gated", {"expansion": 0.001}, 8),
    ],
)
def test_mlp_widths(kind: str, tree: dict[str, Any], width: int) -> None:
    model = make(n_embd=100, mlp={"variant": kind, **tree})
    assert model.h[0].mlp.down.weight.shape == (100, width)


# Initial values -----------------------------------------------------------------------------------------------------------


def drawn(name: str, shape: tuple[int, ...], **options: Any) -> Tensor:
    node: Variant = read(ModelConfig, {"init": {"variant": name, **options}}).init
    made: Tensor = INITS[name](node.options).draw(shape, torch.Generator().manual_seed(11))
    assert made.shape == shape and made.dtype == torch.float32
    return made


@pytest.mark.parametrize(
    ("name", "options", "std", "excess"),
    [
        ("normal", {"std": 0.3}, 0.3, 3.0),
        ("truncated_normal", {"std": 0.3}, 0.3, 3.0),
        ("uniform", {"std": 0.3}, 0.3, 1.8),
        ("xavier", {"scale": 2.0}, 2 * math.sqrt(2 / 500), 3.0),
        ("kaiming", {"scale": 2.0}, 2 / math.sqrt(200), 3.0),
    ],
)
def test_inits_have_their_deviation(name: str, options: dict[str, float], std: float, excess: float) -> None:
    """[300, 200]. The standard error of a deviation is std sqrt((kurtosis - 1) / (4 n)); three of them."""
    x = drawn(name, (300, 200), **options).double()
    assert abs(x.std().item() - std) < 3 * std * math.sqrt((excess - 1) / (4 * x.numel()))
    assert abs(x.mean().item()) < 3 * std / math.sqrt(x.numel())
    kurtosis = (x.pow(4).mean() / x.square().mean().square()).item()
    if name == "truncated_normal":
        cut = 2 * 0.3 / 0.8796256610342398
        assert 0.99 * cut < x.abs().max() <= cut * (1 + 1e-6)
    elif name == "uniform":
        assert 0.99 * math.sqrt(3) * std < x.abs().max() <= math.sqrt(3) * std * (1 + 1e-6)
    else:
        assert abs(kurtosis - 3) < 3 * math.sqrt(24 / x.numel())  # normal


def test_orthogonal_zeros_and_ones() -> None:
    """float32, sums of 60 products."""
    for shape in ((20, 60), (60, 20)):
        q = drawn("orthogonal", shape, scale=2.0)
        small = q @ q.T if shape[0] == 20 else q.T @ q
        torch.testing.assert_close(small, 4 * torch.eye(20), rtol=0, atol=1e-5)
    assert abs(drawn("orthogonal", (9,)).norm().item() - 1) < 1e-6
    assert not drawn("zeros", (3, 4)).any() and (drawn("ones", (5,)) == 1).all()


def test_an_init_can_leave_residual_projections_alone() -> None:
    """Without scale_residual they are exactly sqrt(2 n_layer) times what they are with it, which is 2 here."""
    with_it, without = make(), make(init={"variant": "normal", "scale_residual": False})
    for (name, a), b in zip(with_it.named_parameters(), without.parameters(), strict=True):
        residual = name.endswith(("proj.weight", "down.weight"))
        torch.testing.assert_close(b, 2 * a if residual else a, rtol=2**-23, atol=0)


def test_neighbours_do_not_move_initial_values() -> None:
    """A part keeps its bits when other parts change their sizes, when layers are added and when the vocabulary grows."""
    base = dict(make(3, n_kv_head=2).named_parameters())
    other = dict(make(3, n_kv_head=4).named_parameters())
    assert base["h.0.attn.qkv.weight"].shape != other["h.0.attn.qkv.weight"].shape
    torch.testing.assert_close(base["h.0.attn.qkv.weight"][:16], other["h.0.attn.qkv.weight"][:16], rtol=0, atol=0)
    deeper = dict(make(3, n_layer=4, vocab_size=40).named_parameters())
    for name in ("h.1.attn.qkv.weight", "h.0.mlp.up.weight", "wpe.weight"):
        assert torch.equal(base[name], deeper[name])
    again = make(9)
    initialise(again, 3)
    assert torch.equal(base["wte.weight"], again.wte.weight)
