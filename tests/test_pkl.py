"""PKL numbers: a weight is a + scale * b. The formula, the knob, like for like, and the effective step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from models import losses, make, read, scrambled, sentence, tokens
from properties import last_linears, logits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.resolve import Resolver
from core.slices import materialise, slices
from engine.optim import Optimizers
from model import GPT
from train_args import Config
from variations import CATALOGUE
from variations.pkl import effective

SCALES = [0.0, 0.5, 1.0, 1.25, math.sqrt(2), -3.0]


def everywhere(**options: Any) -> dict[str, Any]:
    """PKL for every linear, the embedding and the head."""
    node = {"variant": "pkl", **options}
    return {"linear": node, "embedding": node, "head": node}


def pkl_modules(model: GPT) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "scale")}


# The weight ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_linear_embedding_and_head_use_a_plus_scale_b(scale: float) -> None:
    """float64 and the scale as float32 holds it: one product and one sum an element."""
    model = scrambled(**everywhere(scale=scale), tie_weights=False).double()
    kept = torch.tensor(scale, dtype=torch.float32).double()
    modules = pkl_modules(model)
    assert set(modules) == {
        "wte",
        "head",
        *(f"h.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")),
    }
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, module in modules.items():
        weight = reference.pkl(module.weight[0], module.weight[1], kept)
        torch.testing.assert_close(module.effective(), weight, rtol=0, atol=1e-15)
        if name == "wte":
            ids = tokens(model, 2, 5)
            torch.testing.assert_close(module(ids), weight[ids], rtol=0, atol=1e-15)
        else:
            inputs = x[:, : module.in_features]
            expected = inputs @ weight.T + (0 if module.bias is None else module.bias)
            torch.testing.assert_close(module(inputs), expected, rtol=0, atol=1e-13)
            assert (module.bias is None) == (name == "head") and (name == "head" or module.bias.dim() == 1)


def test_a_pkl_model_is_the_plain_model_with_its_effective_weights() -> None:
    """The same products on the same weights: every bit."""
    model = scrambled(**everywhere(scale=1.25), tie_weights=False)
    plain = make(tie_weights=False)
    modules = pkl_modules(model)
    state = {
        key: modules[path].effective().detach() if path in modules and last == "weight" else tensor
        for key, tensor in model.state_dict().items()
        for path, _, last in [key.rpartition(".")]
    }
    plain.load_state_dict(state)
    x = tokens(model, 2, 12)
    assert torch.equal(logits(model, x), logits(plain, x))


class Ops(TorchDispatchMode):
    """Counts kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_one_weight_is_made_and_one_product_a_use() -> None:
    model = scrambled(**everywhere(), tie_weights=False)
    module: Any = model.h[0].mlp.up
    with torch.no_grad(), Ops() as ops:
        module(torch.ones(2, 3, 16))
    assert ops.seen.count("addcmul") == 1
    assert sum(ops.seen.count(name) for name in ("addmm", "mm", "bmm", "matmul", "linear")) == 1
    assert not set(ops.seen) & {"mul", "cat", "clone"}
    assert module.weight.shape == (2, 64, 16) and module.effective().shape == (64, 16)


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_of_a_and_b_are_the_weights_and_scale_times_it(scale: float) -> None:
    """One product an element, in float64."""
    model = scrambled(**everywhere(scale=scale)).double()
    losses(model).backward()
    for name, module in pkl_modules(model).items():
        a, b = module.weight.grad
        torch.testing.assert_close(b, module.scale * a, rtol=1e-14, atol=1e-16)
        assert a.any(), name


# The knob -----------------------------------------------------------------------------------------------------------------


def test_the_scale_is_configuration_and_never_state() -> None:
    half, two = scrambled(1, **everywhere(scale=0.5)), scrambled(2, **everywhere(scale=2.0))
    assert not any("scale" in key for key in half.state_dict())
    assert {key for key, _ in half.named_buffers() if key.endswith("scale")} and not any(
        key.endswith("scale") for key, _ in half.named_parameters()
    )
    two.load_state_dict(half.state_dict())
    for module in pkl_modules(two).values():
        assert module.scale.item() == 2.0 and module.scale.shape == ()
    a, b = two.wte.weight
    assert torch.equal(two.wte.effective(), torch.addcmul(a, b, torch.tensor(2.0)))
    x = tokens(half, 1, 8)
    assert not torch.allclose(logits(half, x), logits(two, x))


def test_the_effective_weight_follows_the_buffer_and_the_weights_dtype() -> None:
    weight = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = effective(weight.to(dtype), torch.tensor(0.5))
        assert got.dtype == dtype
        # Halving is exact, so that only the sum rounds.
        torch.testing.assert_close(got, weight.to(dtype)[0] + weight.to(dtype)[1] * 0.5, rtol=0, atol=0)


def test_tied_models_share_a_b_and_one_scale() -> None:
    model = scrambled(**everywhere(scale=0.5))
    moved = copy.deepcopy(model)
    materialise(moved, "cpu")
    for net in (model, moved, copy.deepcopy(model)):
        assert net.head.weight is net.wte.weight and net.head.scale is net.wte.scale
        assert net.wte.weight.shape == (2, 19, 16)
    addresses = {s.address for s in slices(model)}
    assert {"wte.weight[a]", "wte.weight[b]"} <= addresses and not any(a.startswith("head") for a in addresses)
    model.wte.scale.fill_(3.0)
    assert torch.equal(model.head.effective(), model.wte.effective())


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"embedding": {"variant": "pkl", "scale": 0.5}, "head": "pkl"}, "pkl(scale=0.5"),
        ({"embedding": "pkl"}, "the embedding is pkl(scale=1.0"),
        ({"head": "pkl"}, "the embedding is standard and the head is pkl"),
        ({"embedding": {"variant": "pkl", "naive_init": True}, "head": "pkl"}, "naive_init=True"),
    ],
)
def test_tying_needs_the_same_numbers_on_both_sides(tree: dict[str, Any], words: str) -> None:
    text = sentence(lambda: make(**tree))
    assert text.startswith("tie_weights: one weight is shared, but") and words in text
    assert "make them equal or set tie_weights: false" in text
    make(**tree, tie_weights=False)


def test_slices_name_a_and_b_and_the_parts_of_each() -> None:
    listed = {s.address: s.shape for s in slices(make(linear="pkl")) if s.address.startswith("h.0.attn.qkv")}
    names = {f"{half}.{part}": (16 if part == "q" else 8, 16) for half in "ab" for part in "qkv"}
    expected = {f"h.0.attn.qkv.weight[{label}]": shape for label, shape in names.items()}
    assert listed == expected | {f"h.0.attn.qkv.bias[{p}]": (16 if p == "q" else 8,) for p in "qkv"}


# Like for like ---------------------------------------------------------------------------------------------------------------


def deviations(model: GPT) -> tuple[float, float, int]:
    """Root mean squares of the effective weights that write to the residual stream, and of the others; the smaller count."""
    residual, pools = last_linears(model), (list[Tensor](), list[Tensor]())
    for name, module in pkl_modules(model).items():
        pools[name in residual].append(module.effective().detach().double().flatten())
    others, writing = (torch.cat(pool) for pool in pools)
    return writing.square().mean().sqrt().item(), others.square().mean().sqrt().item(), min(len(writing), len(others))


@pytest.mark.parametrize("naive", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_the_effective_weight_starts_as_wide_as_a_plain_one(scale: float, naive: bool) -> None:
    """std, and std / sqrt(2 n_layer) on the residual stream; drawn naively both are sqrt(1 + scale^2) too wide. The tolerance is
    three standard errors of a normal's deviation."""
    model = make(
        n_embd=64,
        **everywhere(scale=scale, naive_init=naive),
        tie_weights=False,
        init={"variant": "normal", "std": 0.05},
    )
    wider = math.sqrt(1 + scale * scale) if naive else 1.0
    writing, others, count = deviations(model)
    error = 3 / math.sqrt(2 * count)
    assert abs(others / (0.05 * wider) - 1) < error
    assert abs(writing / (0.05 * wider / math.sqrt(2 * 2)) - 1) < error


def test_a_and_b_are_drawn_independently_and_equally() -> None:
    """Correlations of 4,096 independent pairs stay below 4.5 / sqrt(4096)."""
    model: Any = make(n_embd=32, linear={"variant": "pkl", "scale": -3.0})
    a, b = model.h[0].mlp.up.weight.detach()
    assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].abs() < 4.5 / 64
    assert (a.std() / b.std()).log().abs() < 6 / math.sqrt(2 * 4096)
    assert abs(a.std().item() * math.sqrt(10) / 0.02 - 1) < 3 / math.sqrt(2 * 4096)


# The effective step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_compensation_divides_the_rate_of_a_and_b_alone(scale: float) -> None:
    adamw = read(Config, {}).optimizer
    for compensate in (False, True):
        model = make(**everywhere(scale=scale, compensate_step=compensate))
        for row in Resolver(slices(model), CATALOGUE).resolve({}, adamw):
            mine = compensate and row.slice.labels[:1] in (("a",), ("b",))
            expected = 1 / (1 + abs(scale)) if mine else 1.0
            assert row.settings.lr_scale == expected and row.learning_rate == 1e-3 * expected
            assert ("default.pkl_step" in row.rules) == (mine and scale != 0)


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_the_first_adam_step_of_the_effective_weight(scale: float, compensate: bool) -> None:
    """Measured against a plain model with the same effective weights, hence the same gradient g of them.

    Adam's first step is lr g / (|g| + eps), the sign of g; b's gradient is scale g, so b moves by lr sign(scale g), and a + scale b
    by (1 + |scale|) lr sign(g). In float64 with |g| above 1e-9 and eps 1e-20, what remains is the scale itself, which the buffer
    keeps in float32: 2^-24 relative. Decay is off: it follows the weight, not the gradient.
    """
    options = {"scale": scale, "compensate_step": compensate}
    model = scrambled(**everywhere(**options), tie_weights=False).double()
    plain = make(tie_weights=False).double()
    modules, others = pkl_modules(model), dict(plain.named_modules())
    own = plain.state_dict()
    plain.load_state_dict({k: v if v.shape == own[k].shape else own[k] for k, v in model.state_dict().items()})
    with torch.no_grad():
        for name, module in modules.items():
            others[name].weight.copy_(module.effective())
    node = read(Config, {"optimizer": {"learning_rate": 0.01, "weight_decay": 0.0, "eps": 1e-20}}).optimizer
    before = {name: module.effective().detach().clone() for name, module in modules.items()}
    for net in (model, plain):
        losses(net).backward()
        Optimizers(net, Resolver(slices(net), CATALOGUE).resolve({}, node)).step(1.0)
    factor = 1.0 if compensate else 1 + abs(scale)
    for name, module in modules.items():
        weight: Any = others[name].weight
        clear = weight.grad.abs() > 1e-9
        assert clear.float().mean() > 0.3, name
        plain_step, step = weight - before[name], module.effective() - before[name]
        torch.testing.assert_close(step[clear], factor * plain_step[clear], rtol=2.0**-23, atol=1e-14)
        assert torch.allclose(plain_step[clear].abs(), torch.tensor(0.01, dtype=torch.float64))


def test_what_pkl_does_not_take_is_told() -> None:
    assert "Did you mean 'scale'?" in sentence(lambda: make(linear={"variant": "pkl", "scael": 1}))
    assert "'big' is not a number" in sentence(lambda: make(linear={"variant": "pkl", "scale": "big"}))
    assert "null (off) is not possible here" in sentence(lambda: make(linear={"variant": "pkl", "scale": None}))
    linear: Any = make(linear="pkl").h[0].mlp.up
    given = torch.randn(64, 16)
    x = torch.randn(2, 16)
    assert torch.equal(linear.op(x, given), F.linear(x, given, linear.bias)) and isinstance(linear, nn.Module)
