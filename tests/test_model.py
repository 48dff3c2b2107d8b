"""The whole model against slow formulas, sites, tying, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import torch
from models import MODERN, SIZES, cases, config, losses, make, read, scrambled, sentence, tokens
from properties import logits
from torch import Tensor, nn

from gpt_conf import ModelConfig
from model import GPT
from variations.attention.causal import CausalAttention
from variations.cache import Cache
from variations.linear.pkl import PKLLinear
from variations.norm.layernorm import LayerNorm
from variations.norm.rmsnorm import RMSNorm

PKL = {"variant": "pkl", "scale": 0.5}


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# Against formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_default_model_is_gpt2(bias: bool, tied: bool) -> None:
    """float64: both sum a few hundred terms in another order, through two layers, so 1e-11 is a thousand times what is expected."""
    model = scrambled(n_kv_head=None, bias=bias, tie_weights=tied).double()
    params, x = weights(model), tokens(model, 2, 12)
    assert any(name.endswith(".bias") for name in params) == bias and ("head.weight" in params) != tied
    with torch.no_grad():
        expected = reference.gpt2_forward(params, x[:, :-1], 4)
        got, loss = model(x[:, :-1], x[:, 1:])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    # The loss is computed in float32 on purpose (bfloat16 logits): 2^-24 of a value of about 10, and a sum of 19.
    assert loss.item() == pytest.approx(reference.cross_entropy(expected, x[:, 1:]).item(), rel=1e-6)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(("kv", "head_dim"), [(4, None), (2, None), (1, None), (2, 6)])
def test_the_modern_model_is_llama(kv: int, head_dim: int | None, qk_norm: bool) -> None:
    """float64, but for rope's sines and cosines in float32: 2^-24 in q and k, through two softmaxes and layers, times values of
    about 10 is some 1e-5. A wrong pairing of heads or angles is off by more than 0.1."""
    attention = {"variant": "causal", "qk_norm": qk_norm}
    tree: dict[str, Any] = {**MODERN, "attention": attention, "n_kv_head": kv, "head_dim": head_dim}
    model = scrambled(**tree).double()
    params, x = weights(model), tokens(model, 2, 12)
    assert params["h.0.attn.qkv.weight"].shape == ((4 + 2 * kv) * (head_dim or 4), 16)
    expected = reference.modern_forward(params, x, 4, kv, qk_norm)
    torch.testing.assert_close(logits(model, x), expected, rtol=0, atol=2e-5)
    assert not torch.allclose(expected, reference.modern_forward(params, x, 4, kv, qk_norm, base=50.0), atol=1e-2)


@pytest.mark.parametrize("options", [c.node() for c in cases(("attention",)) if c.name == "causal"], ids=str)
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_attention_is_its_formula_in_every_way_it_is_computed(kv: int, options: dict[str, Any]) -> None:
    """float64, sums of 4 and 12 terms: whole, a chunk after a past, one token after a past."""
    attend: Any = scrambled(n_kv_head=kv, attention=options).double().h[0].attn
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, 4, generator=draw, dtype=torch.float64) for n in (4, kv, kv))
    expected = reference.attention(q, k, v)
    for start in (0, 5, 11):
        torch.testing.assert_close(attend.attend(q[:, :, start:], k, v), expected[:, :, start:], rtol=0, atol=1e-13)


def test_gradients_are_those_of_the_formula() -> None:
    """The reference is differentiated by autograd; float64, the sums of the forward test once more."""
    model = scrambled(n_kv_head=None, block_size=6).double()
    x = tokens(model, 2, 6)
    model(x)[0].square().mean().backward()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference.gpt2_forward(params, x, 4).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, params[name].grad, rtol=1e-9, atol=1e-10)


def test_the_loss_is_the_mean_over_tokens_in_nats() -> None:
    model = make()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert losses(model).item() == pytest.approx(math.log(19), rel=1e-6)
    x = tokens(model, 3, 5)
    assert model(x)[1] is None
    turned = x.T.contiguous().T  # targets may be any view
    assert model(x, turned)[1] is not None


def test_flops_are_six_a_weight_and_twelve_layers_heads_width_context() -> None:
    """The number of PaLM's appendix B: 6 N + 12 L H Q T, N the weights of linear maps and of the head."""
    for tree in ({}, MODERN, {"n_kv_head": 1}, {"linear": "pkl"}):
        model = make(**tree)
        effective = sum(
            m.in_features * m.out_features for m in model.modules() if isinstance(getattr(m, "in_features", None), int)
        )
        assert model.flops_per_token() == 6 * effective + 12 * 2 * 4 * 4 * 12
    gpt2 = GPT(read(ModelConfig, {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}))
    assert gpt2.flops_per_token() == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808


# Shapes and limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"n_embd": 18}, "18 is not divisible by n_head 4, and no head_dim is given"),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
        ({"n_kv_head": 8}, "n_head 4 is not divisible by n_kv_head 8"),
        ({"n_kv_head": 0}, "n_kv_head: 0 is not >= 1"),
        ({"head_dim": 0}, "head_dim: 0 is not >= 1"),
        ({"dropout": 1.0}, "dropout: 1.0 is not < 1"),
        ({"dropout": None}, "null (off) is not possible here"),
        ({"block_size": -1}, "block_size: -1 is not >= 1"),
        ({"norm": "rmsnrom"}, "Did you mean 'rmsnorm'?"),
        ({"attention": {"variant": "causal", "qk_nrom": True}}, "Did you mean 'qk_norm'?"),
    ],
)
def test_sizes_that_do_not_fit_are_told(tree: dict[str, Any], words: str) -> None:
    assert words in sentence(lambda: config(**tree))


def test_a_head_may_have_any_width() -> None:
    for tree in ({"n_embd": 18, "head_dim": 5}, {"head_dim": 8}, {"n_embd": 6, "n_head": 6, "n_kv_head": None}):
        model = scrambled(**tree)
        losses(model).backward()
        c = model.config
        qkv = model.h[0].attn.qkv.weight
        assert qkv.shape == ((c.n_head + 2 * c.kv_heads) * c.head_width, c.n_embd)
    assert config(n_kv_head=None).kv_heads == 4 and config(norm=None).norm.name == "none"


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
def test_no_more_tokens_than_block_size_with_or_without_a_cache(position: str) -> None:
    model = scrambled(position=position).eval()
    x, cache = tokens(model, 1, 14), Cache()
    assert "13 tokens are more than model.block_size, which is 12" in sentence(lambda: logits(model, x[:, :13]))
    logits(model, x[:, :11], cache)
    # Two tokens where one position is left would broadcast that position over both.
    assert "11 cached and 2 new tokens are more" in sentence(lambda: logits(model, x[:, 11:13], cache))
    logits(model, x[:, 11:12], cache)
    assert cache.offset == 12
    assert "12 cached and 1 new" in sentence(lambda: logits(model, x[:, 12:13], cache))
    short = scrambled(position=position, block_size=1)
    assert "2 tokens are more" in sentence(lambda: logits(short, x[:, :2]))


def test_positions_matter_except_where_there_are_none() -> None:
    """A permutation of the past changes the last position's logits, but for `none`, where attention alone sees a set (in float64,
    sums in another order)."""
    for position in ("learned", "rope", "none"):
        model = scrambled(position=position, n_layer=1).double()
        x = tokens(model, 1, 8)
        turned = torch.cat((x[:, :7].flip(1), x[:, 7:]), 1)
        same = torch.allclose(logits(model, x)[:, -1], logits(model, turned)[:, -1], atol=1e-12)
        assert same == (position == "none")


# Tying -----------------------------------------------------------------------------------------------------------------------


def test_a_tied_model_has_one_weight_and_sums_its_gradients() -> None:
    """The gradient is that of the embedding plus that of the head; float64, two sums."""
    tied, untied = scrambled().double(), scrambled(tie_weights=False).double()
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        losses(model).backward()
    assert untied.head.weight is not untied.wte.weight
    both = untied.wte.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.wte.weight.grad, both, rtol=1e-12, atol=1e-14)
    other = copy.deepcopy(tied)
    assert other.head.weight is other.wte.weight is not tied.wte.weight


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"head": PKL}, "the embedding is standard and the head is pkl(scale=0.5"),
        ({"embedding": PKL}, "the embedding is pkl(scale=0.5"),
        ({"head": PKL, "embedding": {**PKL, "scale": 1.0}}, "make them equal or set tie_weights: false"),
        ({"sites": {"x": {"match": "head", "linear": PKL}}}, "tie_weights: one weight is shared"),
        ({"sites": {"x": {"match": "head", "init": "zeros"}}}, "sites.x.init: the head's weight is the embedding's"),
    ],
)
def test_two_different_weights_cannot_be_tied(tree: dict[str, Any], words: str) -> None:
    assert words in sentence(lambda: make(**tree))
    make(**tree, tie_weights=False)


def test_an_init_at_the_embedding_is_the_tied_weights() -> None:
    for match in ("wte", ["wte", "head"]):
        model = make(sites={"x": {"match": match, "init": "zeros"}})
        assert not model.head.weight.any() and model.head.weight is model.wte.weight


# Sites -----------------------------------------------------------------------------------------------------------------------


def pkl_at(**tree: Any) -> set[str]:
    """Where PKL linears ended up."""
    model = make(**tree)
    return {name for name, m in model.named_modules() if isinstance(m, PKLLinear)}


def every(*names: str) -> set[str]:
    return {f"h.{i}.{name}" for i in range(2) for name in names}


LINEARS = ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")


@pytest.mark.parametrize(
    ("sites", "places"),
    [
        ({"x": {"match": "h.0.attn.qkv", "linear": "pkl"}}, {"h.0.attn.qkv"}),
        ({"x": {"match": "h.*.mlp.*", "linear": PKL}}, every("mlp.up", "mlp.down")),
        ({"x": {"match": "**", "linear": "pkl"}}, {*every(*LINEARS), "head"}),
        ({"x": {"match": "h.**", "linear": "pkl"}}, every(*LINEARS)),
        ({"x": {"match": "**.qkv", "linear": "pkl"}}, every("attn.qkv")),
        ({"x": {"match": ["h.1.mlp.up", "head"], "linear": "pkl"}}, {"h.1.mlp.up", "head"}),
        ({"x": {"match": "head", "head": "pkl"}}, {"head"}),
        ({"x": {"match": "head", "linear": "pkl"}}, {"head"}),
        ({"x": {"match": "h.**", "except": "h.0.**", "linear": "pkl"}}, {f"h.1.{n}" for n in LINEARS}),
        (
            {"x": {"match": "h.{1..5}.**", "except": ["**.proj", "**.down"], "linear": "pkl"}},
            {"h.1.attn.qkv", "h.1.mlp.up"},
        ),
        (
            {"x": {"match": "h.**", "linear": "pkl"}, "y": {"match": "h.0.**", "linear": "standard"}},
            {f"h.1.{n}" for n in LINEARS},
        ),
        ({"y": {"match": "h.0.**", "linear": "standard"}, "x": {"match": "h.**", "linear": "pkl"}}, every(*LINEARS)),
        ({"x": {"match": "h.9.**", "linear": "pkl", "optional": True}}, set()),
    ],
)
def test_a_site_rule_acts_where_it_matches_and_the_later_one_wins(sites: dict[str, Any], places: set[str]) -> None:
    assert pkl_at(sites=sites, tie_weights=False) == places


def test_a_plain_head_under_pkl_linears() -> None:
    """`linear` at the head is the head's choice, as `head` is; `model.linear` is about the blocks."""
    rule = {"plain_head": {"match": "head", "linear": "standard"}}
    assert pkl_at(linear="pkl") == every(*LINEARS)
    assert pkl_at(linear="pkl", head="pkl", tie_weights=False) == {*every(*LINEARS), "head"}
    assert pkl_at(linear="pkl", head="pkl", sites=rule) == every(*LINEARS)
    both = {"x": {"match": "head", "linear": "pkl", "head": "standard", "optional": True}}
    assert pkl_at(sites=both) == set(), "the head's own kind is nearer"


def test_options_at_a_site_are_its_own() -> None:
    model = make(linear=PKL, sites={"x": {"match": "h.0.attn.qkv", "linear": {"variant": "pkl", "scale": 3.0}}})
    scales = {name: b.item() for name, b in model.named_buffers() if name.endswith("scale")}
    assert scales == {f"{p}.scale": 3.0 if p == "h.0.attn.qkv" else 0.5 for p in every(*LINEARS)}


def test_hybrid_norms() -> None:
    sites = {
        "outer": {"match": "h.*.ln_*", "except": "h.0.ln_2", "norm": "rmsnorm"},
        "last": {"match": "ln_f", "norm": {"variant": "rmsnorm", "gain": False}},
        "keys": {"match": "**.k_norm", "norm": "none"},
    }
    model = scrambled(sites=sites, attention={"variant": "causal", "qk_norm": True})
    losses(model).backward()
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, (RMSNorm, LayerNorm))}
    rms = ("h.0.ln_1", "h.1.ln_1", "h.1.ln_2", "ln_f")
    assert kinds == dict.fromkeys(rms, RMSNorm) | dict.fromkeys(["h.0.ln_2", *every("attn.q_norm")], LayerNorm)
    assert model.ln_f.weight is None


def test_a_layer_may_mix_differently() -> None:
    """Positions, activations, MLPs and initial values per layer."""
    sites = {
        "act": {"match": "h.0.mlp.act", "activation": "relu"},
        "mlp": {"match": "h.1.mlp", "mlp": {"variant": "gated", "width": 24}},
        "nope": {"match": "h.1.attn.position", "position": "none"},
        "zero": {"match": ["**.proj", "**.down"], "init": "zeros"},
        "qk": {"match": "h.1.attn", "attention": {"variant": "causal", "qk_norm": True}},
    }
    model: Any = make(sites=sites, position="rope")
    assert [type(b.mlp.act).__name__ for b in model.h] == ["ReLU", "GELU"]
    assert [type(b.attn.position).__name__ for b in model.h] == ["RoPE", "NoPosition"]
    assert model.h[1].mlp.down.weight.shape == (16, 24) and model.wpe is None
    assert all(
        not b.attn.proj.weight.any() and not b.mlp.down.weight.any() and b.attn.qkv.weight.any() for b in model.h
    )
    assert [b.attn.q_norm is not None for b in model.h] == [False, True]
    x = model.wte(tokens(model, 1, 5))
    assert torch.equal(model(tokens(model, 1, 5))[0], model.head(model.ln_f(x))), "blocks that write zero"


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (
            {"x": {"match": "h.*.attn.qvk", "linear": "pkl"}},
            ["sites.x", "'h.*.attn.qvk' matches no place", "h.0.attn.qkv"],
        ),
        ({"x": {"match": "haed", "linear": "pkl"}}, ["Did you mean 'head'?"]),
        (
            {"x": {"match": "h.2.**", "linear": "pkl"}},
            ["sites.x", "'h.2.**' matches no place where the linear is chosen"],
        ),
        ({"x": {"match": "h.*.attn.qkv", "norm": "none"}}, ["where the norm is chosen", "h.0.ln_1"]),
        ({"x": {"match": "h.*.attn.qkv", "linear": "pkl", "norm": "none"}}, ["where the norm is chosen"]),
        ({"x": {"match": "h.**", "except": "h.**", "linear": "pkl"}}, ["matches no place"]),
        ({"x": {"match": "h.*.attn.qkv.weight", "linear": "pkl"}}, ["matches no place", "h.0.attn.qkv"]),
        ({"x": {"match": "h.*.attn.qkv[k]", "linear": "pkl"}}, ["sites.x.match", "parts of a weight", "whole module"]),
        (
            {"x": {"match": "h.**", "except": "h.{0..1", "linear": "pkl"}},
            ["sites.x.except", "brace that does not close"],
        ),
        ({"x": {"match": "h.*[", "linear": "pkl"}}, ["sites.x.match", "bracket"]),
        ({"x": {"match": "h.**"}}, ["chooses no variation", "linear, embedding"]),
        ({"x": {"linear": "pkl"}}, ["needs a pattern"]),
        ({"x": {"match": [], "linear": "pkl"}}, ["needs a pattern"]),
        ({"x": {"match": "h.**", "linaer": "pkl"}}, ["Did you mean 'linear'?"]),
        (
            {"x": {"match": "a", "linear": "pkl"}, "y": {"match": "b", "norm": "none"}},
            ["sites.x: 'a' matches", "sites.y: 'b' matches"],
        ),
    ],
)
def test_a_site_that_chooses_nothing_is_refused(sites: dict[str, Any], words: list[str]) -> None:
    text = sentence(lambda: make(sites=sites, tie_weights=False))
    assert all(word in text for word in words), text


def test_a_model_needs_its_vocabulary() -> None:
    with pytest.raises(AssertionError, match="vocabulary"):
        GPT(read(ModelConfig, {k: v for k, v in SIZES.items() if k != "vocab_size"}))
    assert isinstance(make().h[0].attn, CausalAttention)
