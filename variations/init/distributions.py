"""Distributions for initial values. Each draws a logical matrix [out, in] (or vector [n]) in float32 from a generator."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from core.options import NoOptions, opt

Shape = tuple[int, ...]


class Distribution:
    """A named distribution with options; `str()` shows it as tables do."""

    Options: type = NoOptions
    exact = False  # see core.slices.Initialiser

    def __init__(self, options: object) -> None:
        self.options = options

    @property
    def scale_residual(self) -> bool:
        return bool(getattr(self.options, "scale_residual", True))

    def __str__(self) -> str:
        values = {f.name: getattr(self.options, f.name) for f in fields(self.options)}  # type: ignore[arg-type]
        shown = [f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()]
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        return f"{name}({', '.join(x for x in shown if not x.startswith('scale_residual=True'))})" if shown else name

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Residual:
    """Shared by distributions with a width."""

    scale_residual: bool = opt(True, "Whether projections onto the residual stream are scaled by 1/sqrt(2 n_layer).")


@dataclass(frozen=True)
class Spread(Residual):
    """A distribution given by its standard deviation."""

    std: float = opt(0.02, "Standard deviation of the effective weight.", ge=0.0)


class Normal(Distribution):
    """Formula: w ~ N(0, std^2)
    Source: GPT-2 (Radford et al., 2019) and nanoGPT.
    Shapes: [out, in].
    """

    Options = Spread
    options: Spread

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.empty(shape).normal_(0.0, 1.0, generator=generator) * self.options.std


class TruncatedNormal(Distribution):
    """Formula: w ~ N(0, s^2) cut at 2 s, with s such that the standard deviation after the cut is std
    Source: the cut at two deviations is that of BERT (arXiv 1810.04805).
    Shapes: [out, in].
    """

    Options = Spread
    options: Spread

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        values = nn.init.trunc_normal_(torch.empty(shape), 0.0, 1.0, -2.0, 2.0, generator=generator)
        return values * (self.options.std / 0.8796256610342398)  # deviation of a unit normal cut at 2


class Uniform(Distribution):
    """Formula: w ~ U(-sqrt(3) std, sqrt(3) std)
    Source: the uniform distribution of the same variance.
    Shapes: [out, in].
    """

    Options = Spread
    options: Spread

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        bound = math.sqrt(3.0) * self.options.std
        return torch.empty(shape).uniform_(-1.0, 1.0, generator=generator) * bound


@dataclass(frozen=True)
class Scaled(Residual):
    """A distribution whose deviation follows from the fans."""

    scale: float = opt(1.0, "Multiplier of the deviation.", ge=0.0)


class Xavier(Distribution):
    """Formula: w ~ N(0, scale^2 * 2 / (in + out))
    Source: Glorot and Bengio, AISTATS 2010.
    Shapes: [out, in]; a vector's fans are both its length.
    """

    Options = Scaled
    options: Scaled

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        std = self.options.scale * math.sqrt(2.0 / (shape[-1] + shape[0]))
        return torch.empty(shape).normal_(0.0, 1.0, generator=generator) * std


class Kaiming(Distribution):
    """Formula: w ~ N(0, scale^2 / in)
    Source: He et al., arXiv 1502.01852 (scale sqrt(2) for relu).
    Shapes: [out, in].
    """

    Options = Scaled
    options: Scaled

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.empty(shape).normal_(0.0, 1.0, generator=generator) * (self.options.scale / math.sqrt(shape[-1]))


class Orthogonal(Distribution):
    """Formula: w = scale * Q, Q with orthonormal rows or columns
    Source: Saxe et al., arXiv 1312.6120.
    Shapes: [out, in]; a vector has unit norm.
    """

    Options = Scaled
    options: Scaled
    exact = True

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        made = nn.init.orthogonal_(torch.empty((*shape, 1) if len(shape) == 1 else shape), generator=generator)
        return made.view(shape) * self.options.scale


class Identity(Distribution):
    """Formula: w_ij = scale if i = j, else 0
    Source: Le, Jaitly and Hinton, arXiv 1504.00941.
    Shapes: [out, in], also where they differ; a vector is filled with scale.
    """

    Options = Scaled
    options: Scaled
    exact = True

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        return (torch.ones(shape) if len(shape) == 1 else torch.eye(*shape)) * self.options.scale


@dataclass(frozen=True)
class WidthScaled(Spread):
    """A deviation that is given at one width."""

    base_width: int = opt(256, "The number of inputs at which the deviation is std.", ge=1)


class Mup(Distribution):
    """Formula: w ~ N(0, std^2 base_width / in)
    Source: hidden weights of the maximal update parameterisation, Yang et al., arXiv 2203.03466, table 3.
    Shapes: [out, in].
    """

    Options = WidthScaled
    options: WidthScaled

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        std = self.options.std * math.sqrt(self.options.base_width / shape[-1])
        return torch.empty(shape).normal_(0.0, 1.0, generator=generator) * std


class Zeros(Distribution):
    """Formula: w = 0
    Source: output projections at zero, as in Fixup (arXiv 1901.09321).
    Shapes: any.
    """

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.zeros(shape)


class Ones(Distribution):
    """Formula: w = 1
    Source: the gain of a fresh norm (arXiv 1607.06450).
    Shapes: any.
    """

    exact = True

    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.ones(shape)


ZEROS, ONES = Zeros(NoOptions()), Ones(NoOptions())
