"""Tensors of several runs in one, [R, ...], for code that was written for one run.

A `Folded` tensor shows the shape of one run's. Operations that meet it are answered by a rule or, where there is none, by `vmap` of
that operation alone. Activations are plain tensors [R * B, ...], the rows of one run after those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


@dataclass
class Batch:
    """What all tensors of a pack know: how many runs there are, and of how many rows a batch is, all runs together.

    exact: operations that a kernel over all runs would round otherwise are carried out for each run by itself.
    """

    runs: int
    exact: bool = True
    rows: int = 0

    def of(self, x: Any) -> bool:
        """Whether x is an activation: a plain tensor whose first axis is the batch, or the batch and what was flattened into it."""
        return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] > 0 and x.shape[0] % self.rows == 0


class Folded:
    """A tensor of every run [R, ...] that shows the shape of one. No torch.Tensor: torch hands every operation to it instead."""

    def __init__(self, t: Tensor, batch: Batch) -> None:
        self.t, self.batch = t, batch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        return rule(*args, **kwargs) if rule is not None else each(func, args, kwargs)

    # What is asked of a tensor without computing.
    @property
    def shape(self) -> torch.Size:
        return self.t.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.t.dtype

    @property
    def device(self) -> torch.device:
        return self.t.device

    @property
    def ndim(self) -> int:
        return self.t.dim() - 1

    @property
    def is_cuda(self) -> bool:
        return self.t.is_cuda

    @property
    def mT(self) -> Folded:
        return Folded(self.t.mT, self.batch)

    @property
    def T(self) -> Folded:
        return Folded(self.t.mT, self.batch) if self.ndim == 2 else self

    def dim(self) -> int:
        return self.t.dim() - 1

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return self.t.is_floating_point()

    def __bool__(self) -> bool:
        raise TypeError("runs that are folded have values of their own, and code cannot branch on them")

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Folded]:
        return iter(self.unbind(0))  # type: ignore[attr-defined]

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, (Tensor, Folded, list)) for i in index):
            return each(torch.Tensor.__getitem__, (self, index), {})
        return Folded(self.t[(slice(None), *index)], self.batch)


def _batch(values: Sequence[Any]) -> Batch:
    return next(value.batch for value in values if isinstance(value, Folded))


def each(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The operation by `vmap` over runs. What it makes of activations alone has rows of every run, in one axis, as they have."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    batch = _batch(leaves)
    active = [i for i, x in enumerate(leaves) if batch.of(x)]
    runs = {i: x.unflatten(0, (batch.runs, -1)) for i, x in enumerate(leaves) if i in active}
    runs |= {i: x.t for i, x in enumerate(leaves) if isinstance(x, Folded)}

    def one(*values: Tensor) -> Any:
        given = dict(zip(runs, values, strict=True))
        words, named = tree_unflatten([given.get(i, x) for i, x in enumerate(leaves)], spec)
        return func(*words, **named)

    made = torch.vmap(one)(*runs.values())
    rows = {runs[i].shape[1] for i in active}

    def told(y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        return y.flatten(0, 1) if y.dim() > 1 and y.shape[1] in rows else Folded(y, batch)

    return tree_map(told, made)


# Rules -----------------------------------------------------------------------------------------------------------------------

RULES: dict[Any, Callable[..., Any]] = {}


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """One batched product for all runs."""
    batch = _batch((x, weight, bias))
    if not batch.of(x):
        return each(F.linear, (x, weight, bias), {})
    if not isinstance(weight, Folded):
        if not batch.exact:
            return F.linear(x, weight) + bias
        weight = Folded(
            weight.expand(batch.runs, -1, -1), batch
        )  # a product that begins with the bias rounds otherwise
    rows = x.reshape(batch.runs, -1, x.shape[-1])
    if bias is None:
        y = torch.bmm(rows, weight.t.mT)
    else:
        shift = bias.t.unsqueeze(1) if isinstance(bias, Folded) else bias
        y = torch.baddbmm(shift, rows, weight.t.mT)
    return y.view(*x.shape[:-1], -1)


def embedding(ids: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """One table of all runs' rows, looked up at i + r V: exact, also backward."""
    if not weight.batch.of(ids):
        return each(F.embedding, (ids, weight, *args), kwargs)
    plain = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}
    if args or not kwargs.items() <= plain.items():  # vmap's own rule minds padding_idx in the first run alone
        own = zip(ids.unflatten(0, (weight.batch.runs, -1)), weight.t, strict=True)
        return torch.cat([F.embedding(i, w, *args, **kwargs) for i, w in own])
    runs, rows, width = weight.t.shape
    first = torch.arange(runs, device=ids.device) * rows
    places = ids.unflatten(0, (runs, -1)) + first.view(-1, *(1,) * ids.dim())
    return F.embedding(places.view(ids.shape), weight.t.reshape(runs * rows, width))


def _normalised(func: Callable[..., Tensor], x: Any, shape: Any, weight: Any, bias: Any, **kwargs: Any) -> Any:
    """A norm with gain and shift of every run's own. layer_norm's kernel rounds otherwise than the norm and the gain apart."""
    given = {k: v for k, v in (("weight", weight), ("bias", bias)) if v is not None}
    batch = _batch((x, weight, bias))
    active = batch.of(x)
    if batch.exact and func is F.layer_norm and (active or isinstance(x, Folded)):
        parts = {k: v.t.unbind(0) if isinstance(v, Folded) else (v,) * batch.runs for k, v in given.items()}
        runs = x.unflatten(0, (batch.runs, -1)).unbind(0) if active else x.t.unbind(0)
        made = [func(y, shape, **{k: v[r] for k, v in parts.items()}, **kwargs) for r, y in enumerate(runs)]
        return torch.cat(made) if active else Folded(torch.stack(made), batch)
    if not active:
        return each(func, (x, shape), {**given, **kwargs})
    y: Any = func(x, shape, **kwargs)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def layer_norm(x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return _normalised(F.layer_norm, x, normalized_shape, weight, bias, eps=eps)


def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    return _normalised(F.rms_norm, x, normalized_shape, weight, None, eps=eps)


def pointwise(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Arithmetic: dimensions count from the right, as for one run; before them stand the runs."""
    leaves = (*args, *kwargs.values())
    batch = _batch(leaves)
    active = any(map(batch.of, leaves))
    width = max(x.dim() for x in leaves if isinstance(x, (Tensor, Folded)))

    def shown(x: Any) -> Any:
        if isinstance(x, Folded):
            return x.t.view(batch.runs, *(1,) * (width - x.dim()), *x.shape)
        if not batch.of(x):
            return x
        assert x.dim() == width, f"an activation {list(x.shape)} has fewer axes than what it meets"
        return x.unflatten(0, (batch.runs, -1))

    if active:  # the activations' own first dimension is rows of runs, which Folded tensors have as one
        made = func(*map(shown, args), **{k: shown(v) for k, v in kwargs.items()})
        return made.flatten(0, 1)
    return Folded(func(*map(shown, args), **{k: shown(v) for k, v in kwargs.items()}), batch)


def expand(x: Folded, *sizes: Any) -> Any:
    """As Tensor.expand; a new first axis of all runs' rows makes an activation."""
    wanted = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    batch, extra = x.batch, len(wanted) - x.dim()
    own = x.t.view(batch.runs, *(1,) * extra, *x.shape)
    if wanted[0] == batch.rows and own.shape[1] == 1:
        return own.expand(batch.runs, batch.rows // batch.runs, *wanted[1:]).flatten(0, 1)
    return Folded(own.expand(batch.runs, *wanted), batch)


def unbind(x: Folded, dim: int = 0) -> tuple[Folded, ...]:
    return tuple(Folded(t, x.batch) for t in x.t.unbind(dim + 1 if dim >= 0 else dim))


def same(func: Callable[..., Any], x: Folded, *args: Any, **kwargs: Any) -> Folded:
    """What treats each element, or leaves them as they are."""
    return Folded(func(x.t, *args, **kwargs), x.batch)


ARITHMETIC = ("add", "sub", "mul", "div", "true_divide", "addcmul", "maximum", "minimum", "where", "lerp", "pow", "clamp",
              "clamp_")  # fmt: skip
OPERATORS = (
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__pow__",
)
SINGLE = ("exp", "neg", "log", "sqrt", "rsqrt", "abs", "sigmoid", "tanh", "detach", "float", "double", "clone")


def _register() -> None:
    RULES.update({F.linear: linear, F.embedding: embedding, F.layer_norm: layer_norm, F.rms_norm: rms_norm})
    RULES[torch.layer_norm] = RULES[F.layer_norm]
    for names, rule in ((ARITHMETIC, pointwise), (OPERATORS, pointwise), (SINGLE, same)):
        for name in names:
            for owner in (torch, torch.Tensor):
                if hasattr(owner, name):
                    RULES[getattr(owner, name)] = partial(rule, getattr(owner, name))
    RULES[torch.Tensor.__neg__] = partial(same, torch.neg)
    RULES[torch.Tensor.to] = partial(same, torch.Tensor.to)
    RULES[torch.Tensor.expand] = expand
    RULES[torch.unbind] = RULES[torch.Tensor.unbind] = unbind
    # Methods and operators of a tensor, by which code calls what is above.
    for name in dir(torch.Tensor):
        method = getattr(torch.Tensor, name)
        operator = name.startswith("__") and name.strip("_") in WORDS
        if callable(method) and name not in vars(Folded) and (not name.startswith("_") or operator):
            setattr(Folded, name, _method(method))


WORDS = {"neg", "abs", "invert", "matmul", "rmatmul", "pow", "rpow", "and", "rand", "or", "ror", "xor", "rxor", "eq", "ne", "lt",
         "le", "gt", "ge", "mod", "rmod", "floordiv", "rfloordiv", "lshift", "rshift",
         "iadd", "isub", "imul", "itruediv"} | {name.strip("_") for name in OPERATORS}  # fmt: skip


def _method(func: Any) -> Callable[..., Any]:
    def method(self: Folded, *args: Any, **kwargs: Any) -> Any:
        return Folded.__torch_function__(func, (), (self, *args), kwargs)

    return method


_register()
