"""Rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.options import opt
from variations.position.none import NoPosition
from variations.site import Site


@dataclass(frozen=True)
class RoPEOptions:
    """Options of every kind of rotary positions."""

    base: float = opt(10000.0, "Wavelengths grow to 2 pi times this.", gt=1.0)
    fraction: float = opt(1.0, "Share of a head's dimensions that are turned, the first ones.", gt=0.0, le=1.0)


class RoPE(NoPosition):
    """Formula: pairs (x_i, x_{i + r/2}) of the first r = fraction * D dimensions are turned by the angle t * base^(-2i/r)
    Source: Su et al., RoFormer, arXiv 2104.09864; halves paired, and the rest left as it is, as in GPT-NeoX, arXiv 2204.06745.
    Shapes: [B, H, T, D] -> the same.
    Raises: ValueError where the dimensions to turn are no pairs.
    """

    Options: type = RoPEOptions
    cos: Tensor
    sin: Tensor

    def __init__(self, options: Any, site: Site, *, width: int) -> None:
        super().__init__(options, site, width=width)
        self.turned = int(width * options.fraction)
        if self.turned % 2 or not self.turned:
            told = f", and fraction {options.fraction:g} makes that {self.turned}" if options.fraction < 1 else ""
            raise ValueError(f"rope turns pairs, so the head's width must be even, not {width}{told}")
        length = site.config.block_size
        frequencies, factor = self.frequencies(options, length), self.factor(options, length)
        angle = torch.arange(length, dtype=torch.float64).unsqueeze(-1) * frequencies.unsqueeze(-2)
        cos, sin = factor * angle.cos(), factor * angle.sin()
        self.register_buffer("cos", torch.cat((cos, cos), -1).float(), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), -1).float(), persistent=False)

    def frequencies(self, options: Any, length: int) -> Tensor:
        """Radians per position of each pair, float64 [r/2], or several such sets; for contexts of at most `length` tokens."""
        return options.base ** (-torch.arange(0, self.turned, 2, dtype=torch.float64) / self.turned)

    def factor(self, options: Any, length: int) -> float:
        """What turned queries and keys are multiplied by, each."""
        return 1.0

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [block_size, r] for a text of `length` tokens so far."""
        return self.cos, self.sin

    def rotate(self, x: Tensor, offset: int) -> Tensor:
        end, half = offset + x.shape[-2], self.turned // 2
        cos, sin = (table[offset:end].to(x.dtype) for table in self.table(end))
        if self.turned == x.shape[-1]:
            return x * cos + x.roll(half, -1) * sin
        turned, rest = x.split((self.turned, x.shape[-1] - self.turned), -1)
        return torch.cat((turned * cos + turned.roll(half, -1) * sin, rest), -1)
