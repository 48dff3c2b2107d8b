"""What published families of models need: each against a slow formula, in caches, folds and compiled, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import SIZES, Case, config, grads, losses, make, read, scrambled, sentence, tokens
from properties import CHECKS, bits, logits
from test_fold import check
from torch import Tensor

from convert.gains import fold_gains
from core.lora import merge
from core.options import differences
from core.rules import SliceRule
from core.slices import slices
from model import assemble, fill
from sample import generate
from train_args import Config
from variations import CATALOGUE
from variations.cache import Cache
from variations.position.rope import RoPE
from variations.site import Site

CENTRED = {"variant": "rmsnorm", "zero_centred": True}
GATED = {"mlp": "gated", "bias": False, "norm": "rmsnorm", "position": "rope", "activation": "gelu_tanh"}
SHORT, LONG = [1.0, 1.5], [3.0, 7.0]
TREES: dict[str, dict[str, Any]] = {
    "gemma": {**GATED, "norm": CENTRED, "embedding_scale": "sqrt", "head_dim": 6, "n_kv_head": 1},
    "gemma 2": {
        **GATED, "norm": {**CENTRED, "eps": 1e-3}, "embedding_scale": 1.75, "logit_softcap": 2.5,
        "attention": {"variant": "causal", "softcap": 1.5, "scale": 0.3, "window": 5},
    },
    "mistral": {**GATED, "attention": {"variant": "causal", "window": 4}, "tie_weights": False},
    "one back": {**GATED, "attention": {"variant": "causal", "window": 1, "kernel": "plain"}},
    "qwen next": {
        **GATED, "norm": CENTRED, "position": {"variant": "rope", "fraction": 0.5, "base": 50.0},
        "attention": {"variant": "causal", "gate": True, "qk_norm": True, "qkv_bias": True}, "head_dim": 8,
    },
    "linear": {**GATED, "position": {"variant": "rope_linear", "factor": 2.5, "fraction": 0.51}, "head_dim": 8},
    "llama 3": {
        **GATED, "attention": {"variant": "causal", "qkv_bias": True, "proj_bias": True}, "head_dim": 12,
        "position": {"variant": "rope_llama3", "original_length": 9, "factor": 3.0, "low_freq_factor": 0.5, "base": 20.0},
    },
    "yarn": {
        **GATED, "head_dim": 12,
        "position": {"variant": "yarn", "original_length": 8, "beta_fast": 0.9, "beta_slow": 0.2, "base": 30.0},
    },
    "phi 3": {
        **GATED, "attention": {"variant": "causal", "window": 9},
        "position": {"variant": "longrope", "original_length": 12, "short_factors": SHORT, "long_factors": LONG, "factor": 5.0},
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "long": {**TREES["phi 3"], "position": {**TREES["phi 3"]["position"], "original_length": 2}},
    "memory": {**GATED, "attention": {"variant": "memory", "slots": 3, "window": 4, "gate": True, "softcap": 2.0}},
    "memory, fused": {**GATED, "attention": {"variant": "memory", "slots": 3, "window": 4, "scale": 0.7}},
    "mixers": {"mlp": "none", "norm": "rmsnorm", "layer_pattern": ["mamba2", "causal"], "position": "none"},
    "one without": {**GATED, "sites": {"alone": {"match": "h.1.mlp", "mlp": "none"}}},
    "pkl": {
        "embedding_scale": "sqrt", "logit_softcap": 4.0,
        **{kind: {"variant": "pkl", "scale": 0.5} for kind in ("linear", "embedding", "head")},
    },
    "ngram": {"embedding": "ngram", "embedding_scale": 3.0, "tie_weights": False},
}  # fmt: skip


# The formulas ---------------------------------------------------------------------------------------------------------------


def single(x: float) -> float:
    """As float32 keeps it."""
    return torch.tensor(x, dtype=torch.float32).item()


def speeds(node: dict[str, Any], turned: int) -> tuple[list[float], float]:
    """Radians per position of every pair, and what turned vectors are multiplied by.

    Formula: f_i = base^(-2 i / turned), then linear: f / factor; llama3: by turns n = L f / 2 pi in the original length L; yarn: by
    a ramp over the numbers of pairs; longrope: f / factors_i
    Source: arXiv 2306.15595, arXiv 2407.21783, arXiv 2309.00071, arXiv 2402.13753
    """
    base, kind, made, multiplier = node.get("base", 10000.0), node["variant"], [], 1.0
    for i in range(turned // 2):
        f = 1.0 / base ** (2 * i / turned)
        if kind == "rope_linear":
            f = f / node["factor"]
        if kind == "rope_llama3":
            wavelength, low, high = 2 * math.pi / f, node["low_freq_factor"], node.get("high_freq_factor", 4.0)
            length, factor = node["original_length"], node["factor"]
            if wavelength > length / low:
                f = f / factor
            elif wavelength >= length / high:
                smooth = (length / wavelength - low) / (high - low)
                f = (1 - smooth) * f / factor + smooth * f
        if kind == "yarn":
            length, factor = node["original_length"], node.get("factor", 4.0)

            def place(turns: float, length: int = length) -> float:
                return turned * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

            low = max(math.floor(place(node["beta_fast"])), 0)
            high = min(math.ceil(place(node["beta_slow"])), turned - 1)
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            f, multiplier = (f / factor) * ramp + f * (1 - ramp), 0.1 * math.log(factor) + 1
        if kind == "longrope":
            f = f / node["short_factors"][i]
            multiplier = math.sqrt(1 + math.log(node["factor"]) / math.log(node["original_length"]))
        made.append(f)
    return made, multiplier


def turn(x: Tensor, t: int, radians: list[float], multiplier: float) -> Tensor:
    """x [D] at position t: dimensions i and i + len(radians) are turned together, and what lies behind them is left."""
    made, half = list(x), len(radians)
    for i, f in enumerate(radians):
        cos, sin = single(multiplier * math.cos(t * f)), single(multiplier * math.sin(t * f))
        made[i], made[i + half] = x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin
    return torch.stack(made)


def normed(x: Tensor, weight: Tensor, node: Any) -> Tensor:
    node = {} if node == "rmsnorm" else node
    gain = weight + 1 if node.get("zero_centred") else weight
    return x / torch.sqrt((x * x).sum() / len(x) + node.get("eps", 1e-6)) * gain


def read_heads(q: list[Tensor], k: list[Tensor], v: list[Tensor], node: dict[str, Any]) -> Tensor:
    """One head's last query over keys and values up to it: sum of softmax(cap(scale q k)) v over those in its window."""
    first = max(0, len(k) - node["window"]) if node.get("window") else 0
    scores = []
    for key in k[first:]:
        score = (q[-1] * key).sum() * (node.get("scale") or 1 / math.sqrt(len(key)))
        cap = node.get("softcap")
        scores.append(cap * torch.tanh(score / cap) if cap else score)
    powers = [torch.exp(score - max(scores)) for score in scores]
    return torch.stack([p * x for p, x in zip(powers, v[first:], strict=True)]).sum(0) / torch.stack(powers).sum()


def attended(w: dict[str, Tensor], xs: list[Tensor], tree: dict[str, Any], heads: int, kv: int, d: int) -> list[Tensor]:
    """xs: one [C] a position. Rows of qkv are [q; k; v] or [q; k; v; z], each head after head."""
    node = {"variant": "causal", **tree.get("attention", {})}
    position = tree["position"] if isinstance(tree["position"], dict) else {"variant": tree["position"]}
    radians, multiplier = speeds(position, int(d * position.get("fraction", 1.0)))
    rows = [w["qkv.weight"] @ x + w.get("qkv.bias", torch.zeros(())) for x in xs]
    made = []
    for t, row in enumerate(rows):
        read = []
        for h in range(heads):
            group = h // (heads // kv)

            def vectors(start: int, turning: str = "", t: int = t) -> list[Tensor]:
                found = []
                for s in range(t + 1):
                    x = rows[s][start : start + d]
                    if turning:
                        x = normed(x, w[f"{turning}_norm.weight"], tree["norm"]) if node.get("qk_norm") else x
                        x = turn(x, s, radians, multiplier)
                    found.append(x)
                return found

            q, k = vectors(h * d, "q"), vectors((heads + group) * d, "k")
            y = read_heads(q, k, vectors((heads + kv + group) * d), node)
            if node.get("gate"):
                z = row[(heads + 2 * kv + h) * d :][:d]
                y = y / (1 + torch.exp(-z))
            read.append(y)
        made.append(w["proj.weight"] @ torch.cat(read) + w.get("proj.bias", torch.zeros(())))
    return made


def slow(p: dict[str, Tensor], sequence: list[int], tree: dict[str, Any]) -> Tensor:
    """Logits [T, V] of one sequence, position after position, head after head."""
    sizes = {**SIZES, **tree}
    heads, kv, width = sizes["n_head"], sizes["n_kv_head"], sizes["n_embd"]
    d = tree.get("head_dim") or width // heads
    said = tree.get("embedding_scale") or 1.0
    scale = single(math.sqrt(width) if said == "sqrt" else said)
    xs = [p["wte.weight"][token] * scale for token in sequence]
    for layer in range(sizes["n_layer"]):
        w = {n.removeprefix(f"h.{layer}."): t for n, t in p.items() if n.startswith(f"h.{layer}.")}
        inner = {n.removeprefix("attn."): t for n, t in w.items() if n.startswith("attn.")}
        ys = attended(inner, [normed(x, w["ln_1.weight"], tree["norm"]) for x in xs], tree, heads, kv, d)
        xs = [x + y for x, y in zip(xs, ys, strict=True)]
        for t, x in enumerate(xs):
            gate, up = (w["mlp.gate_up.weight"] @ normed(x, w["ln_2.weight"], tree["norm"])).chunk(2)
            act = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            xs[t] = x + w["mlp.down.weight"] @ (act * up)
    head, cap = p.get("head.weight", p["wte.weight"]), tree.get("logit_softcap")
    out = [head @ normed(x, p["ln_f.weight"], tree["norm"]) for x in xs]
    return torch.stack([cap * torch.tanh(z / cap) if cap else z for z in out])


@pytest.mark.parametrize("name", TREES)
def test_models_and_their_gradients_are_the_formulas(name: str) -> None:
    """float64, and the same float32 sines and cosines: sums of a few hundred terms in another order, through two layers, make 1e-11
    a thousand times what is expected, and gradients are sums of such sums."""
    tree = TREES[name]
    model = scrambled(**tree).double()
    x = tokens(model, 1, 12)
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    got, expected = model(x)[0][0], slow(params, x[0].tolist(), tree)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    got.square().mean().backward()
    expected.square().mean().backward()
    for n, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, params[n].grad, rtol=1e-9, atol=1e-10, msg=n)


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("gemma", {"embedding_scale": 4.01}),
        ("gemma 2", {"logit_softcap": 2.6}),
        *(("gemma 2", {"attention": {**TREES["gemma 2"]["attention"], k: v}}) for k, v in (("softcap", 1.6), ("scale", 0.31))),
        ("mistral", {"attention": {"variant": "causal", "window": 5}}),
        ("qwen next", {"position": {"variant": "rope", "base": 50.0}}),
        ("qwen next", {"norm": "rmsnorm"}),
        ("linear", {"position": {"variant": "rope_linear", "factor": 2.6, "fraction": 0.51}}),
        ("llama 3", {"position": {**TREES["llama 3"]["position"], "high_freq_factor": 3.0}}),
        ("yarn", {"position": {**TREES["yarn"]["position"], "beta_slow": 0.05}}),
        ("phi 3", {"position": {**TREES["phi 3"]["position"], "factor": 6.0}}),
    ],
)  # fmt: skip
def test_every_number_makes_a_difference_that_the_formulas_see(name: str, without: dict[str, Any]) -> None:
    model = scrambled(**TREES[name]).double()
    other = scrambled(**{**TREES[name], **without}).double()
    x = tokens(model, 1, 12)
    assert (logits(model, x) - logits(other, x)).abs().max() > 1e-5


@dataclass(frozen=True)
class Whole(Case):
    """A whole model in place of one entry."""

    def trees(self) -> list[dict[str, Any]]:
        tree = {**TREES, **OTHERS}[self.name]
        return [tree, {**tree, "stack_layers": True}]


PAIRS = [(prop, name) for prop in CHECKS for name in (*TREES, *OTHERS)]
OTHERWISE = ("cached", "long")  # what came before depends on the length, and has tests of its own


@pytest.mark.parametrize(("prop", "name"), [pair for pair in PAIRS if pair[0] != "documented" and pair != OTHERWISE])
def test_models_of_these_families_have_every_property(prop: str, name: str) -> None:
    CHECKS[prop](Whole("model", name))


# One after another ----------------------------------------------------------------------------------------------------------


def test_nothing_changes_unless_it_is_asked_for() -> None:
    assert set(differences(config())) <= set(SIZES)
    told = {"attention": {"variant": "causal", "window": None, "gate": False}, "embedding_scale": None}
    assert config(**told) == config(attention="causal") == config()
    names = [name for name, _ in make().named_buffers()]
    assert not [name for name in names if name.endswith(".number")]


def test_a_scaled_embedding_shares_its_weight_with_a_capped_head() -> None:
    model, usual = scrambled(embedding_scale=3.0, logit_softcap=0.5), scrambled()
    assert model.head.weight is model.wte.weight and model.state_dict().keys() == usual.state_dict().keys()
    assert {"wte_scale.number", "head_cap.number"} == {n for n, _ in model.named_buffers()} - {
        n for n, _ in usual.named_buffers()
    }
    x = tokens(model, 2, 12)
    assert logits(model, x).abs().max() < 0.5 < logits(usual, x).abs().max()
    losses(model).backward()
    assert "wte.weight" in grads(model) and "head.weight" not in grads(model)


@pytest.mark.parametrize("words", ["root", 0.0, -1.0, True, "inf"])
def test_no_other_scale_of_embeddings(words: Any) -> None:
    assert "embedding_scale" in sentence(lambda: config(embedding_scale=words))


def test_adapters_on_a_capped_head_are_inside_the_cap() -> None:
    """Merging puts them into the weight, so they must be added before the cap."""
    node = read(Config, {"optimizer": "adamw"}).optimizer
    rule = read(SliceRule, {"match": "head", "lora": {"rank": 2}})
    model, rows = assemble(config(logit_softcap=0.5, tie_weights=False), {"adapt": rule}, node)
    fill(model, rows, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    x, model = tokens(model, 2, 12), model.double()
    before, other = logits(model, x), copy.deepcopy(model)
    assert merge(model) and not torch.allclose(before, logits(scrambled(logit_softcap=0.5).double(), x))
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=1e-12)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.mul_(0 if "lora_b" in name else 1)
    assert not torch.allclose(logits(other, x), before, atol=1e-3)


def test_a_centred_gain_begins_at_zero_and_can_be_folded_into_what_reads_it() -> None:
    fresh = make(norm=CENTRED, position="rope", bias=False)
    assert not fresh.ln_f.weight.any() and bits(logits(fresh, tokens(fresh, 1, 5)), logits(
        make(norm="rmsnorm", position="rope", bias=False), tokens(fresh, 1, 5)))  # fmt: skip
    model = scrambled(**TREES["qwen next"], tie_weights=False).double()
    x = tokens(model, 2, 12)
    before, weight = logits(model, x), model.h[0].attn.qkv.weight.detach().clone()
    gain = 1 + model.h[0].ln_1.weight.detach()
    assert fold_gains(model) == ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"]
    assert not model.ln_f.weight.any() and torch.equal(model.h[0].attn.qkv.weight, weight * gain)
    torch.testing.assert_close(logits(model, x), before, rtol=1e-12, atol=1e-12)


def test_the_gate_is_a_part_of_its_own() -> None:
    model = make(**TREES["qwen next"])
    parts = {s.address: s.shape for s in slices(model) if s.address.startswith("h.0.attn.qkv")}
    shapes = {"q": 32, "k": 16, "v": 16, "z": 32}
    assert parts == {
        **{f"h.0.attn.qkv.weight[{part}]": (rows, 16) for part, rows in shapes.items()},
        **{f"h.0.attn.qkv.bias[{part}]": (rows,) for part, rows in shapes.items()},
    }
    for qkv, proj, own in ((True, False, False), (False, True, True), (None, None, True), (None, None, False)):
        attn = make(bias=own, attention={"variant": "causal", "qkv_bias": qkv, "proj_bias": proj}).h[0].attn
        assert (attn.qkv.bias is not None) == (own if qkv is None else qkv)
        assert (attn.proj.bias is not None) == (own if proj is None else proj)


# Windows and lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize("window", [1, 4, 12, 20])
def test_a_query_sees_its_window_and_no_more(window: int, kernel: str) -> None:
    """One layer, so that nothing comes from further back by way of others."""
    node = {"variant": "causal", "window": window, "kernel": kernel}
    model = scrambled(n_layer=1, attention=node, position="none").double()
    x = tokens(model, 1, 12)
    before = logits(model, x)[0]
    for changed in range(12):
        other = x.clone()
        other[0, changed] = (x[0, changed] + 1) % 19
        moved = (logits(model, other)[0] - before).abs().amax(-1) > 1e-6
        assert moved.tolist() == [changed <= t < changed + window for t in range(12)]


def test_what_no_query_will_see_is_forgotten() -> None:
    model, cache = scrambled(**TREES["mistral"]).eval(), Cache()
    x = tokens(model, 2, 12)
    for a, b, kept in ((0, 2, 2), (2, 9, 3), (9, 10, 3), (10, 12, 3)):
        logits(model, x[:, a:b], cache)
        assert {state[0].shape for state in cache.states.values()} == {(2, 2, kept, 4)}
    node = {"variant": "causal", "window": 1}
    model, cache = scrambled(attention=node).eval(), Cache()
    for t in range(3):
        logits(model, tokens(model, 1, 1, seed=t), cache)
        assert cache.states["h.0.attn"][0].shape[-2] == 0


def test_a_memory_is_seen_whatever_the_window() -> None:
    """Against the attention by hand, the memory standing before the past."""
    for name in ("memory", "memory, fused"):
        node = OTHERS[name]["attention"]
        attn = scrambled(**{**OTHERS[name], "n_kv_head": 4}).double().h[0].attn
        q, k, v = (torch.randn(1, 4, 12, 4, generator=torch.Generator().manual_seed(s)).double() for s in range(3))
        k_m, v_m = (attn.memory @ attn.kv.weight.T).view(3, 2, 4, 4).permute(1, 2, 0, 3)
        for start in (0, 5, 11):
            got = attn.attend(q[:, :, start:], k, v)
            for h in range(4):
                for t in range(start, 12):
                    seen = slice(max(0, t + 1 - node["window"]), t + 1)
                    keys, values = [*k_m[h], *k[0, h, seen]], [*v_m[h], *v[0, h, seen]]
                    free = {key: value for key, value in node.items() if key != "window"}
                    expected = read_heads([q[0, h, t]], keys, values, free)
                    torch.testing.assert_close(got[0, h, t - start], expected, rtol=0, atol=1e-12)


def test_a_context_within_a_window_has_the_floating_point_operations_of_the_window() -> None:
    whole, some, memory, both = (
        make(attention={"variant": name, **options}).flops_per_token()
        for name, options in (("causal", {}), ("causal", {"window": 5}), ("memory", {}), ("memory", {"window": 5}))
    )
    assert whole - some == memory - both == 3 * 2 * 4 * 4 * 4 * (12 - 5)
    assert make(attention={"variant": "causal", "window": 50}).flops_per_token() == whole


@pytest.mark.parametrize("window", [None, 3])
def test_texts_longer_than_the_original_turn_by_the_long_factors(window: int | None) -> None:
    """All of their positions, so a cache of less is refused; a model that can see no long text needs no long factors."""
    base = {"variant": "longrope", "short_factors": SHORT, "long_factors": LONG, "attention_factor": 1.25}

    def made(length: int, **more: Any) -> Any:
        node = {**base, "original_length": length, **more}
        tree: dict[str, Any] = {**GATED, "attention": {"variant": "causal", "window": window}, "position": node}
        return scrambled(**tree).double()

    model, short, long = made(5).eval(), made(12).eval(), made(12, short_factors=LONG).eval()
    assert (model.switches, short.switches) == ({5}, set())
    x, cache = tokens(model, 2, 12), Cache()
    wanted = logits(short, x[:, :5])
    assert bits(logits(model, x[:, :5]), wanted) and bits(logits(model, x), logits(long, x))
    got = torch.cat([logits(model, x[:, a:b], cache) for a, b in ((0, 2), (2, 4), (4, 5))], 1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    text = sentence(lambda: model(x[:, 5:6], cache=cache))
    assert (
        text == "what is cached of 5 tokens is turned otherwise in a text of 6: begin a new cache with the whole text"
    )
    cache = Cache()
    got = torch.cat([logits(model, x[:, a:b], cache) for a, b in ((0, 6), (6, 7), (7, 12))], 1)
    torch.testing.assert_close(got, logits(long, x), rtol=0, atol=1e-11)


def test_generation_begins_anew_where_positions_depend_on_the_length() -> None:
    """Each token is the likeliest after the whole text before it."""
    model = scrambled(3, **OTHERS["long"], block_size=9, tie_weights=False).double().eval()
    start = tokens(model, 1, 1)
    made = list(generate(model, start, 12, temperature=0, top_k=None, generator=torch.Generator()))
    text = [int(start), *made]
    for i, token in enumerate(made, start=1):
        seen = torch.tensor([text[max(0, i - 9) : i]])
        assert token == int(logits(model, seen)[0, -1].argmax())
    assert len(set(made)) > 2


# Together with everything else ----------------------------------------------------------------------------------------------


def test_a_block_without_mlp_is_its_mixer_alone() -> None:
    model = scrambled(**OTHERS["one without"]).double()
    assert {n.split(".")[2] for n, _ in model.named_parameters() if n.startswith("h.1.")} == {"ln_1", "attn"}
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    block = model.h[1]
    assert bits(block(x), x + block.attn(block.ln_1(x)))
    assert config(mlp=None).mlp.name == "none"
    site = {"norms": {"match": "h.1.ln_2", "norm": "layernorm"}}
    assert "matches no place" in sentence(lambda: make(mlp="none", sites=site))
    assert fold_gains(scrambled(**OTHERS["one without"], tie_weights=False)) == [
        "h.0.ln_1",
        "h.0.ln_2",
        "h.1.ln_1",
        "ln_f",
    ]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"norm": {**CENTRED, "gain": False}}, "norm.zero_centred: it is about the gain, and there is none"),
        ({"attention": {"variant": "causal", "window": 0}}, "0 is not >= 1"),
        ({"attention": {"variant": "causal", "softcap": 0}}, "0.0 is not > 0"),
        ({"logit_softcap": -1.0}, "-1.0 is not > 0"),
        ({"position": {"variant": "rope", "fraction": 1.5}}, "1.5 is not <= 1"),
        ({"position": {"variant": "rope", "fraction": 0.8}}, "must be even, not 4, and fraction 0.8 makes that 3"),
        ({"position": {"variant": "rope", "fraction": 0.1}}, "fraction 0.1 makes that 0"),
        ({"position": {"variant": "rope_linear", "factor": 0.5}}, "0.5 is not >= 1"),
        ({"position": {"variant": "rope_llama3", "low_freq_factor": 4}}, "4 is not below high_freq_factor, which is 4"),
        ({"position": {"variant": "yarn", "beta_slow": 40}}, "40 is not below beta_fast, which is 32"),
        (
            {"position": {"variant": "longrope", "short_factors": [1, 2, 3]}},
            "short_factors are 3, and 2 pairs are turned",
        ),
        (
            {"position": {"variant": "longrope", "original_length": 3, "long_factors": [1]}},
            "long_factors are 1, and 2 pairs are turned",
        ),
        ({"position": {"variant": "longrope", "long_factors": [0.0, 1.0]}}, "0.0 is not > 0"),
    ],
)
def test_what_cannot_be_is_told(tree: dict[str, Any], words: str) -> None:
    assert words in sentence(lambda: make(**tree))


FOLDS: dict[str, Any] = {
    "gemma 2": lambda r: {
        **TREES["gemma 2"], "embedding_scale": 1.0 + r, "logit_softcap": 2.0 + r, "dropout": 0.1 + 0.05 * r,
        "attention": {"variant": "causal", "softcap": 0.5 + 0.25 * r, "window": 5},
    },
    "caps": lambda r: {
        "attention": {"variant": "memory", "slots": 64, "softcap": 0.5 + r, "gate": True}, "logit_softcap": 1.0 + r,
        "linear": {"variant": "pkl", "scale": 1.0 + r}, "n_layer": 2, "stack_layers": True,
    },
    "qwen next": lambda r: {**TREES["qwen next"], "head_dim": 16, "dropout": 0.1 + 0.05 * r},
    "mixers": lambda r: {**OTHERS["mixers"], "n_layer": 2, "stack_layers": True, "dropout": 0.1 + 0.05 * r},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_models_of_these_families_fold(name: str) -> None:
    check(FOLDS[name], poisoned=[True])


@pytest.mark.parametrize("name", ["gemma 2", "qwen next", "phi 3", "memory, fused"])
def test_models_of_these_families_are_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = scrambled(**{**TREES, **OTHERS}[name])
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    x = tokens(model, 2, 12)
    assert bits(compiled(x)[0], model(x)[0])


@pytest.mark.system
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["rope", "rope_linear", "rope_llama3", "yarn", "longrope"])
def test_frequencies_are_those_of_transformers(kind: str, fraction: float) -> None:
    """Theirs are computed in float32, by a power and a quotient: 2^-24 times some."""
    reason = "THE FREQUENCIES ARE NOT COMPARED: pip install transformers"
    pytest.importorskip("transformers", reason=reason)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    names = {"rope_linear": "linear", "rope_llama3": "llama3", "original_length": "original_max_position_embeddings"}
    names |= {
        "base": "rope_theta",
        "fraction": "partial_rotary_factor",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
    }
    draw, length = torch.Generator().manual_seed(0), 4096
    for _ in range(20):
        a, b, c = torch.rand(3, generator=draw).tolist()
        factors = [(1 + 9 * torch.rand(16 if fraction < 1 else 32, generator=draw)).tolist() for _ in range(2)]
        node: dict[str, Any] = {"base": 10 ** (2 + 4 * a), "fraction": fraction}
        node |= {
            "rope": {},
            "rope_linear": {"factor": 1 + 8 * b},
            "rope_llama3": {"factor": 1 + 8 * b, "original_length": 512, "low_freq_factor": 0.5 + c, "high_freq_factor": 3.0},
            "yarn": {"factor": 1 + 8 * b, "original_length": 512, "beta_fast": 16.0 + c, "beta_slow": c + 0.1, "truncate": b < 0.5},
            "longrope": {"factor": 1 + 8 * b, "original_length": 512, "short_factors": factors[0], "long_factors": factors[1]},
        }[kind]  # fmt: skip
        small = config(position={"variant": kind, **node}, head_dim=64, block_size=length)
        made: RoPE = Site(small, CATALOGUE).make("position", "here", width=64)  # type: ignore[assignment]
        options = small.position.options
        ours, factor = made.frequencies(options, length), made.factor(options, length)
        theirs = {"rope_type": names.get(kind, kind), **{names.get(k, k): v for k, v in node.items()}}
        given = LlamaConfig(rope_parameters=theirs, head_dim=64, max_position_embeddings=length)
        if kind == "rope":
            given.rope_parameters = {**theirs, "rope_type": "linear", "factor": 1.0}
            wanted = [ROPE_INIT_FUNCTIONS["linear"](given)]
        else:
            wanted = [ROPE_INIT_FUNCTIONS[names.get(kind, kind)](given, seq_len=n) for n in (512, 513)]
        for i, (frequencies, multiplier) in enumerate(wanted):
            assert made.switch == (512 if kind == "longrope" else None)
            torch.testing.assert_close(ours[i] if kind == "longrope" else ours, frequencies.double(), rtol=3e-6, atol=0)
            assert factor == pytest.approx(multiplier, rel=1e-12)
