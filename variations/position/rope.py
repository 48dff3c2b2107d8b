"""Rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.options import opt
from variations.position.none import NoPosition
from variations.site import Site


class RoPE(NoPosition):
    """Formula: pairs (x_i, x_{i + D/2}) are turned by the angle t * base^(-2i/D)
    Source: Su et al., RoFormer, arXiv 2104.09864; halves paired as in GPT-NeoX and Llama.
    Shapes: [B, H, T, D] -> the same.
    Raises: ValueError for an odd head width.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of RoPE."""

        base: float = opt(10000.0, "Wavelengths grow to 2 pi times this.", gt=1.0)

    cos: Tensor
    sin: Tensor

    def __init__(self, options: Options, site: Site, *, width: int) -> None:
        super().__init__(options, site, width=width)
        if width % 2:
            raise ValueError(f"rope turns pairs, so the head's width must be even, not {width}")
        frequency = options.base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(torch.arange(site.config.block_size, dtype=torch.float64), frequency)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1).float(), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), -1).float(), persistent=False)

    def rotate(self, x: Tensor, offset: int) -> Tensor:
        t, half = x.shape[-2], x.shape[-1] // 2
        cos, sin = self.cos[offset : offset + t].to(x.dtype), self.sin[offset : offset + t].to(x.dtype)
        return x * cos + x.roll(half, -1) * sin
