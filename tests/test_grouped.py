"""Grouped linear maps against a linear map for each group, on every way to compute them; experts in files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import make, scrambled, tokens
from properties import bits, logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.weights import load_weights, weights
from variations.grouped import Rows, apart, grouped_linear, together

SPLITS = [[3, 4, 5], [0, 12, 0], [1, 0, 2, 9], [12], [0, 0, 0, 7, 0, 5], [1] * 12, [0, 0]]
SIZES = [(16, 32), (5, 10), (16, 10), (6, 8), (1, 1)]  # aligned in all types, and not
EXPERTS: dict[str, Any] = {"mlp": {"variant": "moe", "experts": 3, "width": 8}}


def given(
    split: list[int], sizes: tuple[int, int], dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    x, weight = some(sum(split), sizes[0]), some(len(split), sizes[1], sizes[0])
    return x, weight, some(len(split), sizes[1]) if bias else None, torch.tensor(split)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """A product of each row with its group's weight, in float64."""
    rows, row = [], 0
    for e, count in enumerate(counts.tolist()):
        for _ in range(count):
            y = (weight[e].double() * x[row].double()).sum(-1)
            rows.append(y if bias is None else y + bias[e].double())
            row += 1
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def close(ours: Tensor, theirs: Tensor, terms: int) -> None:
    """Sums of so many terms of order 1, in any order, with each result rounded once more: `terms` roundings of sums below `terms`,
    at most. One wrong row is off by order 1."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=2 * eps, atol=4 * terms * eps)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_row_meets_its_own_groups_weight(split: list[int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    for bias in (True, False):
        args = given(split, sizes, dtype, bias)
        ours, theirs = grouped_linear(*args), by_hand(*args)
        assert ours.dtype == dtype and ours.shape == (sum(split), sizes[1])
        close(ours, theirs, sizes[0] + 1)
        leaves = [t for t in args[:3] if t is not None]
        direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = torch.autograd.grad(ours, leaves, direction)
        if sum(split):
            expected = torch.autograd.grad(theirs, leaves, direction.double())
            for a, b in zip(got, expected, strict=True):
                close(a, b, max(*sizes, sum(split)))
        for e, count in enumerate(split):
            if not count:
                assert all(not g[e].any() for g in got[1:]), "an empty group's gradient is zero, and not missing"


@pytest.mark.parametrize("sizes", [(3, 2), (8, 8)])
def test_gradients_are_those_of_finite_differences(sizes: tuple[int, int]) -> None:
    x, weight, bias, counts = given([2, 0, 3], sizes)
    assert bias is not None
    assert torch.autograd.gradcheck(lambda x, w, b: grouped_linear(x, w, b, counts), (x, weight, bias))


def test_gradients_of_any_strides_are_taken() -> None:
    """A sum's gradient is one number for all, and its kernel wants rows."""
    x, weight, bias, counts = given([3, 0, 9], (16, 32), torch.float32)
    wide = torch.randn(12, 33)
    one = torch.ones(())
    for direction in (one.expand(12, 32), wide[:, :1].expand(12, 32), wide[:1, :32].expand(12, 32), wide[:, 1:],
                      torch.randn(32, 12).T):  # fmt: skip
        y = grouped_linear(x, weight, bias, counts)
        got = torch.autograd.grad(y, (x, weight), direction)
        dense = torch.autograd.grad(grouped_linear(x, weight, bias, counts), (x, weight), direction.contiguous())
        assert all(bits(a, b) for a, b in zip(got, dense, strict=True))
    grouped_linear(x, weight, bias, counts).sum().backward()


def test_inputs_of_any_strides_are_taken() -> None:
    x, weight, _, counts = given([3, 0, 9], (16, 32), torch.float32, bias=False)
    expected = grouped_linear(x, weight, None, counts)
    turned = x.detach().T.contiguous().T, weight.detach().mT.contiguous().mT
    offset = torch.cat((torch.zeros(12, 1), x.detach()), 1)[:, 1:]
    assert bits(grouped_linear(*turned, None, counts), expected)
    assert bits(grouped_linear(offset, weight, None, counts), expected)
    assert bits(grouped_linear(x[:1].expand(12, 16), weight, None, counts)[0], expected[0])


@pytest.mark.parametrize("sizes", [(16, 32), (5, 10)])
def test_autocast_is_that_of_a_linear_map(sizes: tuple[int, int]) -> None:
    args = given([3, 0, 9], sizes, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(*args)
        assert y.dtype == F.linear(args[0], args[1][0]).dtype == torch.bfloat16
    x, weight, bias, counts = args
    assert bias is not None
    close(y, by_hand(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), counts), sizes[0])
    y.float().sum().backward()
    assert args[1].grad is not None and args[1].grad.dtype == torch.float32
    double = given([3, 0, 9], sizes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_linear(*double).dtype == torch.float64


def test_what_is_frozen_has_no_gradient() -> None:
    x, weight, bias, counts = given([3, 0, 9], (16, 32), torch.float32)
    assert bias is not None
    for a, w, b in ((x, weight.detach(), bias.detach()), (x.detach(), weight, None)):
        with Ops() as ops:
            grouped_linear(a, w, b, counts).sum().backward()
        assert ops.seen.count("_grouped_mm") == 2, "a product that nobody asked for"
    assert x.grad is not None and weight.grad is not None and bias.grad is None


class Ops(TorchDispatchMode):
    """Kernels by name, and what they were told by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.told: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        self.told[self.seen[-1]] = kwargs or {}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [(16, 32), (5, 3)])
def test_where_there_is_a_kernel_the_host_reads_no_count(sizes: tuple[int, int]) -> None:
    """Nothing becomes a number of Python's on the way, forward or backward: on a GPU that would wait for it."""
    args = given([3, 0, 9], sizes, torch.bfloat16)
    with Ops() as ops:
        grouped_linear(*args).sum().backward()
    assert ops.seen.count("_grouped_mm") == 3
    assert not {"_local_scalar_dense", "item", "nonzero", "equal"} & set(ops.seen)
    assert ops.told["repeat_interleave"] == {"output_size": 12}, "without it the sum of the counts is read"


@pytest.mark.gpu
@pytest.mark.parametrize("split", SPLITS[:-1], ids=str)
@pytest.mark.parametrize("sizes", [(16, 32), (5, 3)])
def test_on_a_gpu_it_is_the_same_and_nothing_waits(split: list[int], sizes: tuple[int, int]) -> None:
    x, weight, bias, counts = given(split, sizes, torch.bfloat16)
    assert bias is not None
    far = [t.detach().cuda().requires_grad_() for t in (x, weight, bias)]
    there, direction = counts.cuda(), torch.ones((), device="cuda", dtype=torch.bfloat16).expand(len(x), sizes[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = grouped_linear(far[0], far[1], far[2], there)
        ours.backward(direction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    theirs = by_hand(x, weight, bias, counts)
    theirs.backward(torch.ones_like(theirs))
    close(ours.cpu(), theirs, sizes[0] + 1)
    for a, b in zip(far, (x, weight, bias), strict=True):
        assert a.grad is not None and b.grad is not None
        close(a.grad.cpu(), b.grad, max(*sizes, sum(split)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_compiled_in_one_piece(dtype: torch.dtype) -> None:
    """Without a break: it would be at every linear map of every layer."""
    args = given([3, 0, 9], (16, 32), dtype)
    made = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    ours, theirs = made(*args), grouped_linear(*args)
    assert bits(ours, theirs)
    assert args[2] is not None
    for a, b in zip(*(torch.autograd.grad(y.sum(), (args[0], args[1], args[2])) for y in (ours, theirs)), strict=True):
        close(a, b, 12)  # the compiler may sum in another order


# Rows in another order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
def test_rows_are_gathered_and_their_gradients_too(times: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(5 * times, generator=draw)
    ours, theirs = Rows.apply(x, order, order.argsort(), times), x[order // times]
    assert bits(ours, theirs)
    direction = torch.randn(ours.shape, generator=draw, dtype=torch.float64)
    # Sums of three terms of order 1 in another order.
    torch.testing.assert_close(*(torch.autograd.grad(y, x, direction)[0] for y in (ours, theirs)), rtol=0, atol=1e-14)
    with Ops() as ops:
        Rows.apply(x, order, order.argsort(), times).sum().backward()
    scattered = {"index_add", "index_add_", "index_put_", "scatter_add_"} & set(ops.seen)
    assert not scattered, "the order of sums is not fixed"


# Files --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["standard", {"variant": "pkl", "scale": 0.5}], ids=["standard", "pkl"])
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_written_and_read_in_one_tensor_or_in_many(linear: Any, stacked: bool) -> None:
    tree: dict[str, Any] = {**EXPERTS, "linear": linear}
    model, other, third = (scrambled(seed, **tree, stack_layers=stacked) for seed in (1, 2, 3))
    whole = model.state_dict()
    many = apart(model, whole)
    assert "h.0.mlp.gate_up.weight" not in many
    shape = (16, 16) if linear == "standard" else (2, 16, 16)
    assert all(many[f"h.1.mlp.gate_up.weight.{e}"].shape == shape for e in range(3))
    assert many["h.1.mlp.down.bias.2"].shape == (16,) and all(t.is_contiguous() for t in many.values())
    axis = 0 if linear == "standard" else 1
    assert bits(many["h.0.mlp.down.weight.1"], whole["h.0.mlp.down.weight"].select(axis, 1))
    back = together(model, many)
    assert set(back) == set(whole) and all(bits(back[name], whole[name]) for name in whole)
    x = tokens(model, 2, 7)
    other.load_state_dict(back)
    third.load_state_dict(back if stacked else many)  # a stack of layers reads the layers' own names
    assert bits(logits(other, x), logits(model, x)) and bits(logits(third, x), logits(model, x))


def test_files_of_experts_are_read_strictly() -> None:
    model = scrambled(**EXPERTS)
    many = apart(model, model.state_dict())
    del many["h.0.mlp.down.weight.1"]
    name = r"h\.0\.mlp\.down\.weight"
    with pytest.raises(RuntimeError, match=rf"Missing.*{name}(?s:.)*Unexpected.*{name}\.0"):
        make(**EXPERTS).load_state_dict(many)
    with pytest.raises(ValueError, match=r"missing h\.0\.mlp\.down\.weight;.*left over h\.0\.mlp\.down\.weight\.0"):
        load_weights(make(**EXPERTS), together(model, many))
    both = {**apart(model, model.state_dict()), **model.state_dict()}
    with pytest.raises(RuntimeError, match="Unexpected"):
        make(**EXPERTS).load_state_dict(both)
    load_weights(make(**EXPERTS), together(model, apart(model, weights(model))))
