"""Named slices: what a module declares of its weights, and the address of every part.

A Declaration says what a weight is and how its parts lie. The slices of a model are what all declarations list together:
disjoint, complete, each with an address such as `h.3.attn.qkv.weight[k]`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from core.addresses import Labels, spelled
from core.layout import Layout as Layout  # what declares a weight needs both

LARGEST = 2**53  # numbers in one weight: a petabyte and more, and few enough for torch to count


class Initialiser(Protocol):
    """What fills a slice. `str()` of it is what tables show. Optional attributes:

    exact: whether the matrix as a whole has a property (orthogonal, the identity) that a sum of independent draws would lose.
    scale_residual: false where projections onto the residual stream are not to be scaled down.
    """

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Values in float32 for one logical matrix (or vector) of `shape`, rows first."""


@dataclass(frozen=True)
class Declaration:
    """What a weight is.

    role: 'matrix' (a linear map inside the network), 'embedding' (rows or columns indexed by a vocabulary or a position), 'vector'
    (gains, biases) or 'conv'. gain: what the initialiser's values are multiplied by; residual: and by what more where the weight
    writes to the residual stream. step: the default multiplier of its learning rate. summed: the labels of a stack axis whose
    slices add up to one weight (PKL); shares: each one's share of it under an initialiser that is exact. blocks: a dimension and
    the rows (or columns) of one logical block of it, such as a head.
    """

    layout: Layout
    role: str
    init: Initialiser
    gain: float = 1.0
    step: float = 1.0
    residual: float = 1.0
    summed: Labels = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[int, int] | None = None


def declare(module: nn.Module, name: str, shape: tuple[int, ...], declaration: Declaration) -> None:
    """Gives `module` an empty parameter (on no device yet) and remembers what it is. Raises ValueError for too large a one."""
    declaration.layout.check(shape)
    if math.prod(shape) > LARGEST:
        raise ValueError(
            f"'{name}' would be {' x '.join(f'{size:.4g}' for size in shape)} numbers, more than any machine holds"
        )
    module.__dict__.pop(name, None)  # where it was announced as None
    module.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    module.__dict__.setdefault("declarations", {})[name] = declaration


@dataclass(frozen=True)
class Slice:
    """One named part of one parameter. `shape` is its logical shape; `aliases` the parameter's other names, where it is tied."""

    address: str
    parameter: str
    labels: Labels
    shape: tuple[int, ...]
    declaration: Declaration
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, parameter: Tensor) -> Tensor:
        return self.declaration.layout.view(parameter, self.labels)


def declared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Declaration]]:
    """Every declared parameter once, under its first name."""
    for names, parameter, declaration in _named(model):
        yield names[0], parameter, declaration


def _named(model: nn.Module) -> list[tuple[list[str], nn.Parameter, Declaration]]:
    found: dict[int, tuple[list[str], nn.Parameter, Declaration]] = {}
    for path, module in model.named_modules():
        for name, declaration in module.__dict__.get("declarations", {}).items():
            parameter = module._parameters.get(name)  # a stacked layer's is elsewhere
            if parameter is not None:
                made = found.setdefault(id(parameter), ([], parameter, declaration))
                made[0].append(f"{path}.{name}" if path else name)
    return list(found.values())


def slices(model: nn.Module) -> list[Slice]:
    """Every slice of a model. Asserts that each parameter is declared: nothing trains that no rule can reach."""
    listed, known = [], set()
    for (name, *aliases), parameter, declaration in _named(model):
        known.add(name)
        for labels in declaration.layout.labels():
            shape = declaration.layout.shape(parameter.shape, labels)
            address = spelled(name, labels)[2]
            listed.append(Slice(address, name, labels, shape, declaration, tuple(aliases)))
    undeclared = {name for name, _ in model.named_parameters()} - known
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
def draw(part: Slice, parameter: Tensor, seed: int, init: Initialiser) -> None:
    """Fills a slice from its own generator, seeded by `seed` and its address.

    Where several numbers add up to one weight and `init` is exact, they take their shares of one draw for the whole.
    """
    what, address, factor = part.declaration, part.address, part.declaration.gain
    share = next((x for x in part.labels if x in what.shares), None)
    if share is not None and getattr(init, "exact", False):
        rest = tuple(x for x in part.labels if x != share)
        address, factor = spelled(part.parameter, rest)[2], what.shares[share]
    factor *= what.residual if getattr(init, "scale_residual", True) else 1.0
    view = part.view(parameter)
    view.copy_((init.draw(part.shape, generator_for(seed, address)) * factor).reshape(view.shape))


def initialise(model: nn.Module, seed: int) -> None:
    """Fills every slice as its declaration says."""
    parameters = dict(model.named_parameters())
    for part in slices(model):
        draw(part, parameters[part.parameter], seed, part.declaration.init)
