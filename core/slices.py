"""Named slices: how parts lie in one tensor, what a module declares of its weights, and the address of every part.

A Layout is index algebra over one tensor. A Declaration says what a weight is. The slices of a model are what all declarations
list together: disjoint, complete, each with an address such as `h.3.attn.qkv.weight[k]`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

Labels = tuple[str, ...]


class Initialiser(Protocol):
    """What fills a slice. `str()` of it is what tables show."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Values in float32 for one logical matrix (or vector) of `shape`, rows first."""


@dataclass(frozen=True)
class Layout:
    """Named parts along dimension `dim` (counted from the right), repeated `groups` times, under labelled leading stack axes.

    parts: (name, rows per group) in their order; empty means one nameless part. stack: the labels of each leading axis.
    Raises ValueError for sizes below 1, names that repeat or that an address could not spell, a dimension that is not negative.
    """

    parts: tuple[tuple[str, int], ...] = ()
    dim: int = -1
    groups: int = 1
    stack: tuple[Labels, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        labels = [*names, *itertools.chain(*self.stack)]
        for label in {x for x in labels if labels.count(x) > 1}:
            raise ValueError(f"the name '{label}' stands twice in one layout")
        for label in labels:
            if not re.fullmatch(r"\w+", label):
                raise ValueError(f"the name {label!r} in a layout is not made of letters, digits and '_'")
        if not all(self.stack):
            raise ValueError(f"a stack axis of a layout has no labels: {self.stack}")
        for name, size in self.parts:
            if size < 1:
                raise ValueError(f"part '{name}' has {size} rows; it needs at least 1")
        if self.dim >= 0 or self.groups < 1:
            raise ValueError(f"a layout counts dimensions from the right and has at least one group: {self}")

    @property
    def span(self) -> int:
        """Rows of one group: the sum of its parts."""
        return sum(size for _, size in self.parts)

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError where the layout does not cover `shape` exactly."""
        if any(size < 1 for size in shape):
            raise ValueError(f"a weight of shape {tuple(shape)} has no elements")
        axes = tuple(len(labels) for labels in self.stack)
        if tuple(shape[: len(axes)]) != axes or len(shape) - len(axes) < -self.dim:
            raise ValueError(f"stack axes {axes} and dimension {self.dim} do not fit the shape {tuple(shape)}")
        if self.parts and shape[self.dim] != self.groups * self.span:
            sizes = " + ".join(f"{name} {size}" for name, size in self.parts)
            raise ValueError(f"the parts ({sizes}) x {self.groups} do not add up to {shape[self.dim]}")

    def labels(self) -> list[Labels]:
        """The labels of every slice, stack axes first, in the order in which they lie."""
        names: list[Labels] = [(name,) for name, _ in self.parts] or [()]
        return [(*outer, *inner) for outer in itertools.product(*self.stack) for inner in names]

    def view(self, tensor: Tensor, labels: Labels) -> Tensor:
        """The slice as a view. With several groups the dimension becomes two: [groups, rows per group]."""
        for axis, label in zip(self.stack, labels, strict=False):
            tensor = tensor[axis.index(label)]
        if not self.parts:
            return tensor
        start = 0
        for name, size in self.parts:
            if name == labels[-1]:
                if self.groups == 1:
                    return tensor.narrow(self.dim, start, size)
                dim = tensor.dim() + self.dim
                return tensor.unflatten(dim, (self.groups, self.span)).narrow(dim + 1, start, size)
            start += size
        raise KeyError(labels)

    def shape(self, shape: Sequence[int], labels: Labels) -> tuple[int, ...]:
        """The logical shape of a slice: the stack axes gone, all groups of its part together."""
        inner = list(shape[len(self.stack) :])
        if self.parts:
            inner[self.dim] = self.groups * dict(self.parts)[labels[-1]]
        return tuple(inner)

    def split(self, tensor: Tensor) -> dict[Labels, Tensor]:
        """Every slice in its logical shape: views where one group makes that possible, copies elsewhere."""
        self.check(tensor.shape)
        return {x: self.view(tensor, x).reshape(self.shape(tensor.shape, x)) for x in self.labels()}

    def join(self, slices: dict[Labels, Tensor]) -> Tensor:
        """The inverse of `split`. Raises ValueError for slices that are missing, left over or of another shape."""
        if set(slices) != set(self.labels()):
            raise ValueError(f"{sorted(slices)} are not the slices of this layout, which are {sorted(self.labels())}")
        first = next(iter(slices.values()))
        inner = list(first.shape)
        if self.parts:
            inner[self.dim] = self.groups * self.span
        whole = first.new_empty((*(len(axis) for axis in self.stack), *inner))
        for x, values in slices.items():
            if values.shape != self.shape(whole.shape, x):
                told = f"slice '{'.'.join(x)}' is {list(values.shape)}, not {list(self.shape(whole.shape, x))}"
                raise ValueError(f"{told}: it does not fit beside the others")
            view = self.view(whole, x)
            view.copy_(values.reshape(view.shape))
        return whole

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The rows of a part along `dim` as half-open ranges, one a group, neighbours merged."""
        start = 0
        for part, size in self.parts:
            if part == name:
                break
            start += size
        else:
            raise KeyError(name)
        if size == self.span:
            return [(0, self.groups * size)]
        return [(g * self.span + start, g * self.span + start + size) for g in range(self.groups)]


@dataclass(frozen=True)
class Declaration:
    """What a weight is.

    role: 'matrix' (a linear map inside the network), 'embedding' (rows or columns indexed by a vocabulary or a position), 'vector'
    (gains, biases) or 'conv'. gain: what the initialiser's values are multiplied by. step: the default multiplier of its
    learning rate.
    """

    layout: Layout
    role: str
    init: Initialiser
    gain: float = 1.0
    step: float = 1.0


def declare(module: nn.Module, name: str, shape: tuple[int, ...], declaration: Declaration) -> None:
    """Gives `module` an empty parameter (on no device yet) and remembers what it is."""
    declaration.layout.check(shape)
    module.__dict__.pop(name, None)  # where it was announced as None
    module.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    module.__dict__.setdefault("declarations", {})[name] = declaration


@dataclass(frozen=True)
class Slice:
    """One named part of one parameter. `shape` is its logical shape."""

    address: str
    parameter: str
    labels: Labels
    shape: tuple[int, ...]
    declaration: Declaration

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, parameter: Tensor) -> Tensor:
        return self.declaration.layout.view(parameter, self.labels)


def declared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Declaration]]:
    """Every declared parameter once, under its first name."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, declaration in module.__dict__.get("declarations", {}).items():
            parameter = module._parameters[name]
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter, declaration


def slices(model: nn.Module) -> list[Slice]:
    """Every slice of a model. Asserts that each parameter is declared: nothing trains that no rule can reach."""
    listed, names = [], []
    for name, parameter, declaration in declared(model):
        names.append(name)
        for labels in declaration.layout.labels():
            address = f"{name}[{'.'.join(labels)}]" if labels else name
            shape = declaration.layout.shape(parameter.shape, labels)
            listed.append(Slice(address, name, labels, shape, declaration))
    undeclared = {name for name, _ in model.named_parameters()} - set(names)
    assert not undeclared, f"parameters without a declaration: {sorted(undeclared)}"
    return listed


def generator_for(seed: int, address: str) -> torch.Generator:
    """A slice's own generator, so that its values do not depend on its neighbours."""
    digest = hashlib.sha256(f"{seed}:{address}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Gives every parameter memory on `device`, values undefined. Buffers move. What is shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                empty = torch.empty(
                    parameter.shape, dtype=parameter.dtype, device=device
                )  # empty_like of meta imports sympy
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fills every slice from its own generator, seeded by `seed` and its address."""
    parameters = dict(model.named_parameters())
    for part in slices(model):
        values = part.declaration.init.draw(part.shape, generator_for(seed, part.address))
        view = part.view(parameters[part.parameter])
        view.copy_((values * part.declaration.gain).reshape(view.shape))


# Patterns -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """A compiled address pattern: `*` inside a dotted segment, `**` across, `{0..5}` numbers, `[q,v]` parts.

    Raises ValueError for brackets or braces that do not close, and empty patterns.
    """

    text: str

    def __post_init__(self) -> None:
        path, bracket = self.text, None
        if "[" in path or "]" in path:
            found = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", path)
            if found is None or found.group(3):
                raise ValueError(
                    f"the pattern '{self.text}' has a bracket that does not open and close once, at its end"
                )
            path = found.group(1)  # in a bracket, dots separate labels except within {0..5}
            bracket = [re.split(r"\.(?![^{}]*\})", item.strip()) for item in found.group(2).split(",")]
            if not all(label for item in bracket for label in item):
                raise ValueError(f"the pattern '{self.text}' lists a part without a name")
        if not path:
            raise ValueError(f"the pattern '{self.text}' names no place")
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "_path", _regex(path, self.text))
        items = None if bracket is None else [[_regex(x, self.text) for x in item] for item in bracket]
        object.__setattr__(self, "_items", items)

    path: str = ""

    @property
    def about_parts(self) -> bool:
        """Whether it has a bracket."""
        return self._items is not None  # type: ignore[attr-defined]

    def matches_module(self, path: str) -> bool:
        """Whether a module's path is meant."""
        return bool(self._path.fullmatch(path))  # type: ignore[attr-defined]

    def matches(self, part: Slice) -> bool:
        """Whether a slice is meant: without .weight or .bias that is the weight, and at the end of `**` everything below."""
        name, owner = part.parameter, part.parameter.rpartition(".")[0]
        last = name.rpartition(".")[2]
        whole = self.path.endswith(("**", ".weight", ".bias")) or last not in ("weight", "bias")
        hit = self.matches_module(name) if whole else last == "weight" and self.matches_module(owner)
        return hit and self.matches_labels(part.labels)

    def matches_labels(self, labels: Labels) -> bool:
        items = self._items  # type: ignore[attr-defined]
        return items is None or any(_subsequence(item, labels) for item in items)


@lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """`Pattern(text)`, compiled once."""
    return Pattern(text)


def _subsequence(wanted: Sequence[re.Pattern[str]], labels: Labels) -> bool:
    rest: Iterator[str] = iter(labels)
    return all(any(pattern.fullmatch(label) for label in rest) for pattern in wanted)


def _regex(text: str, whole: str) -> re.Pattern[str]:
    if text.count("{") != text.count("}"):
        raise ValueError(f"the pattern '{whole}' has a brace that does not close")
    made = ""
    for token in re.findall(r"\{[^{}]*\}|(?:^|(?<=\.))\*\*\.|\*\*|\*|[^{}*]|[{}]", text):
        if token == "**.":  # whole segments, also none
            made += r"(?:.*\.)?"
        elif token in ("**", "*"):
            made += ".*" if token == "**" else r"[^.]*"
        elif token[0] in "{}":
            made += _numbers(token, whole)
        else:
            made += re.escape(token)
    return re.compile(made)


def _numbers(token: str, whole: str) -> str:
    found = re.fullmatch(r"\{(\d{1,5})\.\.(\d{1,5})\}", token)
    if found is None or int(found.group(1)) > int(found.group(2)):
        raise ValueError(f"the pattern '{whole}': '{token}' is not a range of numbers such as {{0..5}}")
    return "(?:" + "|".join(str(n) for n in range(int(found.group(1)), int(found.group(2)) + 1)) + ")"


def select(patterns: Iterable[str], excepted: Iterable[str], test: Callable[[Pattern], bool]) -> bool:
    """Whether any of `patterns` passes `test` and none of `excepted` does."""
    return any(test(pattern(p)) for p in patterns) and not any(test(pattern(p)) for p in excepted)
