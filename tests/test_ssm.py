"""Mixers that keep a state, and attention to a memory: against recurrences by hand, with a cache, and part by part."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import pytest
import reference_slices as apart
import reference_ssm as ref
import torch
import torch.nn.functional as F
from models import config, grads, losses, make, read, scramble, scrambled, sentence, tokens
from properties import logits
from reference_slices import SeparateGPT, train_separately
from test_exact import FACTOR, RATES, STEPS, differing, start, values
from test_sample import greedy_without_cache, small_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sample
from core.options import Reader
from core.rules import Row, SliceRule
from core.slices import slices
from engine.loop import Run
from model import GPT, assemble, fill
from variations import CATALOGUE
from variations.attention.delta import delta_scan, delta_step
from variations.attention.mamba2 import ShortConv, scan, segment_sums, step
from variations.cache import Cache

MAMBA2 = {
    "variant": "mamba2",
    "head_dim": 8,
    "groups": 2,
    "d_state": 5,
    "chunk": 4,
}  # 4 heads in 2 groups where n_embd is 16
DELTA = {"variant": "delta", "expand": 2, "chunk": 4}
MEMORY = {"variant": "memory", "slots": 3}
MIXERS: dict[str, dict[str, Any]] = {"mamba2": MAMBA2, "delta": DELTA, "memory": MEMORY}
STATEFUL = ["mamba2", "delta"]

Scan = Callable[..., tuple[Tensor, Tensor]]


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Scans against their recurrences ------------------------------------------------------------------------------------------------


def ssm_inputs(t: int, groups: int, heads: int = 4, b: int = 2, p: int = 3, n: int = 5) -> list[Tensor]:
    """x, decay, b, c and a state that is not zero."""
    decay = -numbers(1, b, t, heads).exp()
    shared = numbers(2, b, t, groups, n), numbers(3, b, t, groups, n)
    return [numbers(0, b, t, heads, p), decay, *shared, numbers(4, b, heads, p, n)]


def delta_inputs(t: int, groups: int, heads: int = 4, b: int = 2, p: int = 3, n: int = 5) -> list[Tensor]:
    """q, k of length 1, v, decay, beta in (0, 1) and a state that is not zero; there are no groups."""
    q, k = (F.normalize(numbers(i, b, t, heads, n), dim=-1) for i in (0, 1))
    gates = -numbers(3, b, t, heads).exp(), numbers(4, b, t, heads).sigmoid()
    return [q, k, numbers(2, b, t, heads, p), *gates, numbers(5, b, heads, p, n)]


SCANS: dict[str, tuple[Callable[..., list[Tensor]], Scan, Scan, Scan]] = {
    "mamba2": (ssm_inputs, scan, step, ref.ssm),
    "delta": (delta_inputs, delta_scan, delta_step, ref.delta),
}


def slopes(y: Tensor, inputs: list[Tensor], seed: int) -> tuple[Tensor, ...]:
    """The gradients of a random sum of `y`; zeros for what it does not depend on."""
    pulled = (y * numbers(9 + seed, *y.shape)).sum()
    return torch.autograd.grad(pulled, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


LENGTHS = [(1, 4), (2, 1), (4, 4), (7, 4), (12, 4), (13, 5), (9, 64), (33, 16)]  # positions and chunk


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("t", "chunk"), LENGTHS)
@pytest.mark.parametrize("name", STATEFUL)
def test_a_scan_by_chunks_is_the_recurrence_with_its_gradients(name: str, t: int, chunk: int, groups: int) -> None:
    """From a state that is not zero, and in all arguments. In float64 both sum at most 200 terms of order 1 in other orders, each
    several products deep: 1e-12 is a thousand roundings and more; a wrong position is off by 0.1."""
    make_inputs, ours, _, theirs = SCANS[name]
    mine, other = ([x.requires_grad_() for x in make_inputs(t, groups)] for _ in range(2))
    got, wanted = ours(*mine, chunk=chunk), theirs(*other)
    for part, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
        for g, h in zip(slopes(a, mine, part), slopes(b, other, part), strict=True):
            torch.testing.assert_close(g, h, rtol=0, atol=1e-12 * max(1.0, h.abs().max().item()))


@pytest.mark.parametrize("name", STATEFUL)
def test_one_position_is_the_recurrence(name: str) -> None:
    make_inputs, _, ours, theirs = SCANS[name]
    given = make_inputs(1, 2)
    for a, b in zip(ours(*given), theirs(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14 * b.abs().max().item())


@pytest.mark.parametrize("name", STATEFUL)
def test_a_scan_in_float32_rounds_as_its_sums_must(name: str) -> None:
    """Sums have at most 40 * 5 terms, each a few products and a decay whose exponent sums at most 40 numbers; decays of e^-1 in the
    mean leave a few dozen that count. Their roundings, of random sign, add up to a few units of the largest result; 100 allows for
    terms that cancel. One step in bfloat16 would be 2^16 units, in TF32 2^13."""
    make_inputs, ours, _, theirs = SCANS[name]
    given = make_inputs(40, 2)
    got, _ = ours(*(x.float() for x in given), chunk=16)
    wanted, _ = theirs(*given)
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() < 100 * 2.0**-24 * wanted.abs().max()


@pytest.mark.parametrize("name", STATEFUL)
def test_extreme_decays_give_finite_numbers_and_gradients(name: str) -> None:
    """States that vanish at once beside states that stay for ever."""
    make_inputs, ours, _, theirs = SCANS[name]
    given = make_inputs(21, 2)
    decay = 1 if name == "mamba2" else 3
    given[decay] = torch.where(numbers(7, *given[decay].shape) > 0, -1e5, 0.0).double()
    mine = [x.float().requires_grad_() for x in given]
    got, last = ours(*mine, chunk=8)
    (got.sum() + last.sum()).backward()
    wanted, _ = theirs(*given)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in mine)
    assert (got - wanted).abs().max() < 100 * 2.0**-24 * wanted.abs().max()


def test_segment_sums_keep_the_digits_of_small_sums_beside_large_ones() -> None:
    a = torch.tensor([-1e7, -0.125, -0.3, -1e7, -0.7])
    sums = segment_sums(a)
    assert sums[2, 0] == a[1] + a[2] and sums[4, 3] == a[4], "not differences of sums from the start"
    for i, j in itertools.product(range(5), repeat=2):
        wanted = float(a[j + 1 : i + 1].double().sum()) if j <= i else -math.inf
        assert sums[i, j].item() == pytest.approx(wanted, rel=1e-6)


# Whole mixers -------------------------------------------------------------------------------------------------------------------


def parts_of(mixer: nn.Module) -> dict[str, Tensor]:
    """The slices below a mixer, each a leaf of its own."""
    held = dict(mixer.named_parameters())
    return {s.address: s.view(held[s.parameter]).detach().clone().requires_grad_() for s in slices(mixer)}


REFERENCES: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "mamba2": partial(ref.mamba2, groups=2, eps=1e-5),
    "delta": partial(ref.gated_delta, eps=1e-5),
    "memory": partial(ref.memory_attention, heads=4, kv_heads=2),
}
PLAIN: dict[str, Any] = {"bias": False, "position": "none"}


@pytest.mark.parametrize("t", [1, 3, 12, 17])
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_its_formula_by_hand_with_the_gradients_of_every_part(name: str, t: int) -> None:
    """float64: a few thousand roundings of 2^-53, which the norm over a small output may enlarge tenfold, against 1e-10."""
    mixer = scrambled(attention=MIXERS[name], block_size=32, **PLAIN).double().h[1].attn
    u, p = numbers(0, 2, t, 16), parts_of(mixer)
    got, wanted = mixer(u), REFERENCES[name](u, p)
    close = partial(torch.testing.assert_close, rtol=0)
    close(got, wanted, atol=1e-10 * wanted.abs().max().item())
    pull = numbers(1, *got.shape)
    (got * pull).sum().backward()
    (wanted * pull).sum().backward()
    held = dict(mixer.named_parameters())
    for part in slices(mixer):
        whole, other = held[part.parameter].grad, p[part.address].grad
        assert whole is not None
        if other is None:
            assert not part.view(whole).any(), part.address
        else:
            assert other.any() or t == 1, part.address
            close(part.view(whole), other, atol=1e-10 * max(1.0, other.abs().max().item()))


def test_the_short_convolution_is_torchs_own() -> None:
    conv = ShortConv((("x", 5), ("B", 2)), 4, bias=True)
    conv.weight, conv.bias = nn.Parameter(numbers(0, 7, 4)), nn.Parameter(numbers(1, 7))
    x = numbers(2, 3, 9, 7)
    wanted = F.conv1d(x.mT, conv.weight.unsqueeze(1), conv.bias, padding=3, groups=7)[..., :9].mT
    whole, past = conv(x)
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(whole, ref.causal_conv(x, conv.weight, conv.bias), rtol=0, atol=1e-13)
    assert torch.equal(past, x[:, -3:])
    first, past = conv(x[:, :2])
    assert torch.equal(torch.cat((first, conv(x[:, 2:], past)[0]), 1), whole)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_chunk_and_kernels_of_one_change_nothing_but_roundings(groups: int) -> None:
    for name, node in (("mamba2", {**MAMBA2, "groups": groups, "d_conv": 1}), ("delta", {**DELTA, "d_conv": 1})):
        made = [scrambled(attention={**node, "chunk": chunk}).double() for chunk in (1, 5, 64)]
        first, *others = (logits(model, tokens(model, 2, 12)) for model in made)
        assert all((x - first).abs().max() < 1e-11 * first.abs().max() for x in others), name


@pytest.mark.parametrize("kernel", ["fused", "plain"])
def test_every_position_sees_the_memory_and_its_keys_are_normalised_where_others_are(kernel: str) -> None:
    node = {**MEMORY, "kernel": kernel, "qk_norm": True}
    model = scrambled(attention=node, position="rope", norm="rmsnorm", bias=False).double().eval()
    x, attn = tokens(model, 1, 9), model.h[0].attn
    before = logits(model, x)
    with torch.no_grad():
        attn.kv.weight[: attn.kv_rows // 2] *= 8.0  # keys of another length
    assert (logits(model, x) - before).abs().max() < 1e-6 * before.abs().max()
    with torch.no_grad():
        attn.memory[1] += 1.0
    assert (logits(model, x) - before).abs().amax(-1).min() > 1e-4


# Generation ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("seed", range(6))
def test_any_split_of_the_tokens_gives_the_same_with_a_cache(name: str, seed: int) -> None:
    """In float64, as for every mixer (tests/properties.py), but over several chunks and in random pieces."""
    draw = random.Random(seed)
    tree: dict[str, Any] = {"attention": MIXERS[name], "block_size": 41, "position": draw.choice(["rope", "learned"])}
    model = scrambled(**tree).double().eval()
    x, cache = tokens(model, 2, 41), Cache()
    cuts = sorted({0, 41, *draw.sample(range(1, 41), draw.choice([1, 5, 25]))})
    pieces = [logits(model, x[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
    whole = logits(model, x)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-11 * max(1.0, whole.abs().max().item()))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_does_not_grow_and_is_float32_whatever_computes_in_bfloat16(name: str, autocast: bool) -> None:
    model, sizes = scrambled(std=0.1, attention=MIXERS[name], block_size=40).eval(), []
    model = model if autocast else model.bfloat16()
    x, cache = tokens(model, 2, 40), Cache()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        for a, b in ((0, 7), (7, 8), (8, 9), (9, 30), (30, 31), (31, 40)):
            model(x[:, a:b], cache=cache)
            sizes.append([tuple(part.shape) for state in cache.states.values() for part in state])
            assert {state.dtype for _, state in cache.states.values()} == {torch.float32}
    assert all(shapes == sizes[0] for shapes in sizes)
    width = {"mamba2": (8, 5), "delta": (8, 4)}[name]  # of values and keys
    assert sizes[0][1] == (2, 4, *width) and set(cache.states) == {"h.0.attn", "h.1.attn"}


@pytest.mark.parametrize("t", [1, 11])
@pytest.mark.parametrize("name", STATEFUL)
def test_autocast_stays_out_of_the_scan(name: str, t: int) -> None:
    mixer = scrambled(attention=MIXERS[name]).h[0].attn
    width = {"mamba2": 32 + 2 * 10, "delta": 2 * 16 + 32}[name]
    gates = [numbers(i, 2, t, 4).float() for i in range(1 if name == "mamba2" else 2)]
    given = numbers(5, 2, t, width).float(), *gates
    wanted = mixer.mix(*given, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixer.mix(*given, None)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", [*MIXERS, "hybrid"])
def test_sampling_with_a_cache_is_sampling_without(name: str) -> None:
    """Also past the context, where the window slides and the state begins anew."""
    untied = {"tie_weights": False, "bias": False}
    tree: dict[str, Any] = {"attention": MIXERS.get(name, "causal"), "position": "rope", **untied}
    if name == "hybrid":
        tree["sites"] = {"ssm": {"match": "h.0.attn", "attention": MAMBA2}}
    model = scramble(small_model(**tree), 3).eval()
    drawn = list(sample.generate(model, torch.tensor([[3, 1, 4, 1, 5]]), 20, temperature=0, top_k=None,
                                 generator=torch.Generator()))  # fmt: skip
    assert drawn == greedy_without_cache(model, torch.tensor([[3, 1, 4, 1, 5]]), 20) and len(set(drawn)) > 1


# Declarations and initial values ------------------------------------------------------------------------------------------------


def test_every_part_has_its_address_and_its_role() -> None:
    model = make(attention=MAMBA2, n_layer=1)
    listed = {s.address.removeprefix("h.0.attn."): s for s in slices(model) if s.address.startswith("h.0.attn.")}
    rows = {"z": 32, "x": 32, "B": 10, "C": 10, "dt": 4}
    wanted: dict[str, tuple[int, ...]] = {"A_log": (4,), "dt_bias": (4,), "D": (4,)}
    wanted |= {f"in_proj.weight[{name}]": (n, 16) for name, n in rows.items()}
    wanted |= {
        f"conv1d.{leaf}[{x}]": (rows[x], *rest) for leaf, rest in (("weight", (4,)), ("bias", ())) for x in "xBC"
    }
    wanted |= {"norm.weight": (32,), "out_proj.weight": (16, 32)}
    assert {name: part.shape for name, part in listed.items()} == wanted
    assert list(model.h[0].attn.in_proj.weight.split(list(rows.values()))[4].shape) == [4, 16], "dt is last"
    roles = {name: part.declaration.role for name, part in listed.items()}
    assert {name for name, role in roles.items() if role == "matrix"} == {n for n in wanted if "proj" in n}
    assert {name for name, role in roles.items() if role == "conv"} == {n for n in wanted if "conv1d.weight" in n}
    assert listed["out_proj.weight"].declaration.residual == pytest.approx(1 / math.sqrt(2))
    others = {s.address for name in ("delta", "memory") for s in slices(make(attention=MIXERS[name], n_layer=1))}
    assert {f"h.0.attn.in_proj.weight[{x}]" for x in ("q", "k", "v", "gate", "beta", "alpha")} < others
    assert {"h.0.attn.kv.weight[k]", "h.0.attn.kv.bias[v]", "h.0.attn.memory", "h.0.attn.qkv.weight[k]"} < others


@pytest.mark.parametrize("name", STATEFUL)
def test_steps_begin_between_dt_min_and_dt_max_and_rates_between_1_and_16(name: str) -> None:
    node: dict[str, Any] = {"variant": name, "dt_min": 0.01, "dt_max": 0.5}
    heads = {"n_embd": 512, "n_head": 512} | ({} if name == "delta" else {"n_head": 1, "n_kv_head": 1})
    node |= {"head_dim": 2} if name == "mamba2" else {}
    mixer = make(attention=node, n_layer=1, **({"n_kv_head": 512} | heads)).h[0].attn
    logs = F.softplus(mixer.dt_bias.detach().double()).log()
    low, high = math.log(0.01), math.log(0.5)
    # Twelve bits and more of dt survive: log(-expm1(-dt)) is near -4.6 at most and exact to 2^-21 there.
    assert len(logs) == 512 and logs.min() > low - 1e-5 and logs.max() < high + 1e-5
    spread = (high - low) / math.sqrt(12)
    assert abs(logs.mean() - (low + high) / 2) < 4 * spread / math.sqrt(512), "log-uniform, four standard errors"
    rates = mixer.A_log.detach().double().exp()
    assert rates.min() > 1 - 1e-5 and rates.max() < 16 + 1e-4
    assert abs(rates.mean() - 8.5) < 4 * 15 / math.sqrt(12 * 512)


def test_initial_values_are_named_and_begin_as_published() -> None:
    mixer = make(attention=MAMBA2, n_layer=1).h[0].attn
    assert (mixer.D == 1).all() and not mixer.conv1d.bias.any() and (mixer.norm.weight == 1).all()
    assert mixer.conv1d.weight.abs().max() <= 0.5 and mixer.conv1d.weight.std() > 0.2
    inits = {s.address: str(s.declaration.init) for s in slices(mixer)}
    assert inits["A_log"] == "log(uniform(1, 16))"
    assert inits["dt_bias"] == "inverse_softplus(log_uniform(0.001, 0.1))"
    assert inits["in_proj.weight[dt]"] == "normal(std=0.02)"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"head_dim": 5}, "head_dim 5 does not divide the inner width 32"),
        ({"head_dim": 8, "groups": 3}, "3 groups do not divide 4 heads"),
        ({"dt_min": 0.2}, "0.2 is above dt_max, which is 0.1"),
        ({"chunk": 0}, "0 is not >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_told(node: dict[str, Any], words: str) -> None:
    assert words in sentence(lambda: make(attention={"variant": "mamba2", **node}))


def test_the_flops_are_those_of_the_products() -> None:
    """Of one chunk: the counter sees matrix products, and in addition those between chunks, which the formula leaves out."""
    sizes: dict[str, Any] = {"n_embd": 64, "block_size": 64, "n_layer": 1, "n_kv_head": 4}
    conv = {"mamba2": 2 * 4 * (128 + 2 * 32), "delta": 2 * 4 * 3 * 64, "memory": 0}
    nodes: dict[str, Any] = {
        "mamba2": {"variant": "mamba2", "head_dim": 16, "d_state": 32},
        "delta": "delta",
        "memory": {"variant": "memory", "kernel": "plain"},
    }
    for name, node in nodes.items():
        attn = make(attention=node, **sizes).h[0].attn
        linears = sum(m.in_features * m.out_features for m in attn.modules() if hasattr(m, "in_features"))
        with FlopCounterMode(display=False) as counter:
            attn(torch.zeros(4, 64, 64))
        told = attn.flops_per_token(64) - conv[name]
        if name == "delta":
            told -= 64 * (64 + 64)  # the triangular system, which the counter does not see
        if name == "memory":
            told += 2 * 16 * 64 * 128 // (4 * 64)  # 16 slots through kv for all 4 * 64 tokens
        assert told == pytest.approx(counter.get_total_flops() / (4 * 64) - 2 * linears, rel=0.02), name


# Rules over parts ---------------------------------------------------------------------------------------------------------------

Said = dict[str, tuple[dict[str, Any], str]]  # a rule, and the addresses that it means
RULES: dict[str, Said] = {
    "mamba2": {
        "steps": ({"match": "h.*.attn.in_proj[dt]", "lr_scale": 0.25, "weight_decay": 0.5}, r".*in_proj\.weight\[dt\]"),
        "inputs": ({"match": "h.*.attn.in_proj[B]", "lr_scale": 2.0, "weight_decay": 0.0}, r".*in_proj\.weight\[B\]"),
        "still": ({"match": ["h.1.attn.in_proj[C,x]", "h.0.attn.conv1d[B]"], "frozen": True},
                  r"h\.1\.attn\.in_proj\.weight\[[Cx]\]|h\.0\.attn\.conv1d\.weight\[B\]"),
        "conv": ({"match": "h.*.attn.conv1d.bias[C]", "lr_scale": 0.5, "weight_decay": 0.1}, r".*conv1d\.bias\[C\]"),
        "rates": ({"match": "h.*.attn.A_log", "learning_rate": 0.002}, r".*A_log"),
        "bias": ({"match": "h.0.attn.dt_bias", "lr_scale": 0.0, "weight_decay": 0.2}, r"h\.0\.attn\.dt_bias"),
    },
    "delta": {
        "strength": ({"match": "h.*.attn.in_proj[beta]", "lr_scale": 0.25, "weight_decay": 0.0}, r".*weight\[beta\]"),
        "still": ({"match": ["h.0.attn.in_proj[alpha,q]", "h.1.attn.conv1d[v]"], "frozen": True},
                  r"h\.0\.attn\.in_proj\.weight\[(alpha|q)\]|h\.1\.attn\.conv1d\.weight\[v\]"),
        "gate": ({"match": "h.*.attn.in_proj[gate]", "lr_scale": 3.0, "weight_decay": 0.3}, r".*weight\[gate\]"),
    },
    "memory": {
        "keys": ({"match": "h.*.attn.kv[k]", "lr_scale": 0.25, "weight_decay": 0.5}, r".*\.kv\.weight\[k\]"),
        "still": ({"match": "h.1.attn.kv.**", "except": "h.1.attn.kv[k]", "frozen": True},
                  r"h\.1\.attn\.kv\.(weight\[v\]|bias\[.\])"),
        "slots": ({"match": "h.*.attn.memory", "lr_scale": 4.0, "weight_decay": 0.0}, r".*memory"),
    },
}  # fmt: skip
VECTOR = re.compile(r".*(bias(\[.\])?|ln_\w+\.weight|A_log|\.D|attn\.norm\.weight)")


class Joined:
    """A run's own model over separate parameters, one for each address, which it concatenates in its forward pass."""

    def __init__(self, run: Run) -> None:
        self.p = {address: nn.Parameter(value) for address, value in values(run).items()}
        self.model: nn.Module = run.model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        whole: dict[str, list[Tensor]] = {}
        for address, part in self.p.items():
            whole.setdefault(address.split("[")[0], []).append(part)
        joined = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in whole.items()}
        made: Tensor = torch.func.functional_call(self.model, joined, (x, y))[1]
        return made


def settings(addresses: list[str], said: Said, optimizer: str) -> dict[str, apart.Settings]:
    """How each part is to be trained, by what the rules mean."""
    found = {}
    for address in addresses:
        rate, decay = RATES[optimizer]
        scale, frozen, decay = 1.0, False, 0.0 if VECTOR.fullmatch(address) else decay
        for rule, meant in said.values():
            if re.fullmatch(meant, address):
                scale *= rule.get("lr_scale", 1.0)
                rate, decay = rule.get("learning_rate", rate), rule.get("weight_decay", decay)
                frozen = rule.get("frozen", frozen)
        found[address] = apart.Settings(rate * scale, decay, frozen, optimizer)
    return found


def begun(name: str, optimizer: Mapping[str, Any]) -> Run:
    sizes = {"n_embd": 16, "n_head": 4, "n_kv_head": 2, "block_size": 9, "vocab_size": 13}
    rules = {key: rule for key, (rule, _) in RULES[name].items()}
    return start(optimizer, rules, {**sizes, "attention": MIXERS[name]})


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_parts_of_a_mixer_train_as_separate_parameters(name: str, optimizer: str) -> None:
    """Every bit after 20 updates, with rates, decays and frozen parts of their own."""
    rate, decay = RATES[optimizer]
    run = begun(name, {"variant": optimizer, "learning_rate": rate, "weight_decay": decay})
    before, net = values(run), Joined(run)
    told = settings(list(before), RULES[name], optimizer)
    for _ in range(STEPS):
        run.update()
    factors, batches = [run.schedule.multiplier(i) for i in range(STEPS)], [run.batches(i) for i in range(STEPS)]
    train_separately(cast(SeparateGPT, net), told, batches, grad_clip=0.5, factors=factors)
    after = values(run)
    assert differing(after, {a: p.detach() for a, p in net.p.items()}) == []
    still = {address for address in before if torch.equal(after[address], before[address])}
    assert still == {a for a, own in told.items() if own.frozen or own.lr == 0} and still


@pytest.mark.parametrize("name", MIXERS)
def test_muon_takes_every_part_as_a_matrix_and_the_rest_keeps_every_bit(name: str) -> None:
    """One update: matrices to the bound of tests/test_exact.py, convolutions, rates, norms and the memory exactly."""
    (rate, decay), rest = RATES["muon"], {"variant": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    run = begun(name, {"variant": "muon", "learning_rate": rate, "weight_decay": decay, "rest": rest})
    net, addresses = Joined(run), list(values(run))
    matrices = [
        a for a in addresses if re.fullmatch(r"h\.\d\.(attn\.(in_|out_)?proj|attn\.q?kv|mlp\.\w+)\.weight.*", a)
    ]
    told = settings(addresses, RULES[name], "adamw") | settings(matrices, RULES[name], "muon")
    run.state.iter = 5  # past the warmup's zero
    run.update()
    batch, factor = run.batches(5), run.schedule.multiplier(5)
    train_separately(cast(SeparateGPT, net), told, [batch], grad_clip=0.5, factors=[factor])
    got = values(run)
    assert [a for a in differing(got, {a: p.detach() for a, p in net.p.items()}) if a not in matrices] == []
    for address in matrices:
        rows, cols = got[address].shape
        bound = told[address].lr * max(1.0, rows / cols) ** 0.5 * FACTOR
        assert (got[address] - net.p[address]).abs().max() <= bound, address


def ruled(rules: dict[str, Any], **tree: Any) -> tuple[GPT, list[Row]]:
    adamw = Reader(CATALOGUE).variant("optimizer", {"variant": "adamw"}, ())
    assert adamw is not None
    model, rows = assemble(config(**tree), {name: read(SliceRule, rule) for name, rule in rules.items()}, adamw)
    fill(model, rows, 9)
    return model, rows


def test_the_init_of_a_part_is_its_own_and_leaves_the_others() -> None:
    rules = {
        "steps": {"match": "h.*.attn.in_proj[dt]", "init": "zeros"},
        "inputs": {"match": "h.*.attn.in_proj[B]", "init": {"variant": "normal", "std": 0.5}},
        "rates": {"match": "h.0.attn.A_log", "init": "zeros"},
        "conv": {"match": "h.*.attn.conv1d[C]", "init": "identity"},
    }
    (plain, _), (model, _) = ruled({}, attention=MAMBA2), ruled(rules, attention=MAMBA2)
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    changed = {
        s.address for s in slices(model) if not torch.equal(s.view(after[s.parameter]), s.view(before[s.parameter]))
    }
    per_layer = ("in_proj.weight[dt]", "in_proj.weight[B]", "conv1d.weight[C]")
    assert changed == {f"h.{i}.attn.{x}" for i in range(2) for x in per_layer} | {"h.0.attn.A_log"}
    mixer: Any = model.h[0].attn
    _, _, b, _, dt = mixer.in_proj.weight.split([32, 32, 10, 10, 4])
    assert not dt.any() and not mixer.A_log.any() and torch.equal(mixer.conv1d.weight[-10:], torch.eye(10, 4))
    assert torch.equal(b, apart.initial_normal(9, "h.0.attn.in_proj.weight[B]", (10, 16), 0.5))


def test_adapters_on_dt_and_b_alone_are_separate_maps_with_adapters() -> None:
    rules = {
        "base": {"match": "**", "frozen": True},
        "adapt": {"match": "h.*.attn.in_proj[B,dt]", "lora": {"rank": 2, "alpha": 6.0}},
    }
    model, rows = ruled(rules, attention=MAMBA2)
    trained = {row.slice.address for row in rows if not row.settings.frozen}
    assert trained == {f"h.{i}.attn.in_proj[{x}].lora_{y}" for i in range(2) for x in ("B", "dt") for y in "ab"}
    linear: Any = scramble(model).double().get_submodule("h.0.attn.in_proj")
    x, p = numbers(0, 2, 5, 16), dict(linear.named_parameters())
    at = 0
    for name, n in (("z", 32), ("x", 32), ("B", 10), ("C", 10), ("dt", 4)):
        wanted = x @ p["weight"][at : at + n].T
        if name in ("B", "dt"):
            wanted = wanted + 3.0 * (x @ p[f"adapter[{name}].lora_a"].T) @ p[f"adapter[{name}].lora_b"].T
        torch.testing.assert_close(linear(x)[..., at : at + n], wanted, rtol=0, atol=1e-12)
        at += n
    losses(model.float()).backward()
    assert all(grad.any() for name, grad in grads(model).items() if "lora" in name)


def test_which_layer_has_which_mixer_is_a_matter_of_sites_and_rules_hold_over_all() -> None:
    sites = {"ssm": {"match": "h.{0..1}.attn", "attention": MAMBA2}, "rule": {"match": "h.3.attn", "attention": DELTA}}
    rules = {
        "keys": {"match": ["h.*.attn.in_proj[B,k]", "h.*.attn.qkv[k]"], "lr_scale": 0.5},
        "rest": {"match": "h.*.attn.kv[k]", "lr_scale": 2.0, "optional": True},
    }
    model, rows = ruled(rules, sites=sites, n_layer=4)
    assert [type(cast(Any, block).attn).__name__ for block in model.h] == ["Mamba2"] * 2 + [
        "CausalAttention",
        "DeltaRule",
    ]
    scaled = {row.slice.address for row in rows if row.settings.lr_scale == 0.5}
    places = {f"h.{i}.attn.in_proj.weight[B]" for i in range(2)} | {
        "h.2.attn.qkv.weight[k]",
        "h.3.attn.in_proj.weight[k]",
    }
    assert scaled == places
    losses(model).backward()
    assert len(grads(model)) == len(dict(model.named_parameters()))
