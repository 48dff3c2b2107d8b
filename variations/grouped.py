"""Many linear maps at once, each over its own rows: the one place where the way to compute them is chosen.

Files may hold the weights of experts as one stack, `mlp.down.weight`, or one by one, `mlp.down.weight.0`, `mlp.down.weight.1`, ...
`apart` and `together` turn one into the other; `load_state_dict` takes both where `join` is its hook.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 16  # bytes: what the strides of the grouped kernel's operands are multiples of
GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # what the grouped kernel takes


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """x [N, in], sorted by group; weight [E, out, in]; bias [E, out]; counts int64 [E], rows of each group, N in sum -> [N, out].

    A group without rows has a gradient of zeros. Autocast is F.linear's. One kernel, for which the host reads nothing on CUDA in
    bfloat16, widths filled up with zeros until they are `ALIGNED`; a product for each group in float64. (A batched product was no
    faster for equal groups, and slower for padded ones: bench/grouped.py.)
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype not in GROUPED:
        biases = [None] * len(weight) if bias is None else bias.unbind(0)
        groups = zip(x.split(counts.tolist()), weight.unbind(0), biases, strict=True)
        return torch.cat([F.linear(*each) for each in groups])
    wide, outputs = ALIGNED // x.itemsize, weight.shape[-2]
    rows, columns = -outputs % wide, -weight.shape[-1] % wide
    if rows or columns:
        x, weight = F.pad(x, (0, columns)), F.pad(weight, (0, columns, 0, rows))
    y: Tensor = _Grouped.apply(x.contiguous(), weight.contiguous(), counts.cumsum(0).to(torch.int32))
    y = y[:, :outputs].contiguous() if rows else y
    return y if bias is None else y + bias.repeat_interleave(counts, 0, output_size=len(x))


def _product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a [N, in] and b [E, in, out] -> [N, out], or a [rows, N] and b [N, columns] -> [E, rows, columns]."""
    made: Tensor = torch.ops.slicewise.grouped(a, b, ends) if torch.compiler.is_compiling() else _kernel(a, b, ends)
    return made


def _kernel(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=ends)


def _shape(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(*((len(a),) if b.dim() == 3 else (len(ends), len(a))), b.shape[-1])


# An operation of ours for the compiler, which knows torch's own in bfloat16 alone.
_LIBRARY = torch.library.Library("slicewise", "DEF")
_LIBRARY.define("grouped(Tensor a, Tensor b, Tensor ends) -> Tensor")
_LIBRARY.impl("grouped", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("slicewise::grouped", _shape, lib=_LIBRARY)


class _Grouped(torch.autograd.Function):
    """The grouped kernel. Its own backward refuses gradients that are expanded, such as a sum's, or whose strides are odd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_x, to_weight, _ = ctx.needs_input_grad
        return (
            _product(grad, weight, ends) if to_x else None,
            _product(grad.mT, x, ends) if to_weight else None,
            None,
        )


class Rows(torch.autograd.Function):
    """x [N, ...], each row `times` over, in another order: row `order[i] // times` stands at i. `inverse` undoes the order.

    Gradients are gathered and summed, not scattered: the same bits every time, on a GPU too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.times = times
        return x.index_select(0, order // times if times > 1 else order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad.unflatten(0, (-1, ctx.times)).sum(1) if ctx.times > 1 else grad, None, None, None


# Files ----------------------------------------------------------------------------------------------------------------------------


def _stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, int, list[str]]]:
    """Of a linear map of experts, each tensor's name, its axis of experts, and the names that the experts have one by one."""
    count: int = getattr(module, "experts", 0)
    for name, what in module.__dict__.get("declarations", {}).items() if count else ():
        axis = len(what.layout.stack) - 1
        yield prefix + name, axis, [f"{prefix}{name}.{e}" for e in range(count)]


def join(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict`: stacks the experts of `module` where the state has each of them."""
    for name, axis, names in _stacks(module, prefix):
        if name not in state and all(n in state for n in names):  # what is missing is told by its own name
            state[name] = torch.stack([state.pop(n) for n in names], axis)


def together(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model with experts in one tensor, wherever it has them one by one."""
    made = dict(state)
    for path, module in model.named_modules():
        join(module, made, f"{path}." if path else "")
    return made


def apart(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model with a tensor for each expert."""
    made = dict(state)
    for path, module in model.named_modules():
        for name, axis, names in _stacks(module, f"{path}." if path else ""):
            if name in made:
                each = (t.contiguous() for t in made.pop(name).unbind(axis))
                made.update(zip(names, each, strict=True))
    return made
