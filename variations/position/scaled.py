"""Rotary positions for contexts longer than those a model was trained on first: other frequencies, as published."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.options import Invalid, opt
from variations.position.rope import RoPE, RoPEOptions
from variations.site import Site


class LinearRoPE(RoPE):
    """Formula: RoPE at t / factor: frequencies are divided by factor
    Source: position interpolation, Chen et al., arXiv 2306.15595.
    Shapes: [B, H, T, D] -> the same.
    """

    @dataclass(frozen=True)
    class Options(RoPEOptions):
        """Options of linearly scaled RoPE."""

        factor: float = opt(2.0, "How many times the context grows.", ge=1.0)

    def frequencies(self, options: Any, length: int) -> Tensor:
        return super().frequencies(options, length) / options.factor


class Llama3RoPE(RoPE):
    """Formula: f (1 - s) / factor + f s, where s rises from 0 to 1 as the turns in the original length rise from low to high
    Source: Llama 3.1, Grattafiori et al., arXiv 2407.21783; the published code's frequencies.
    Shapes: [B, H, T, D] -> the same.
    Raises: Invalid where low_freq_factor is not below high_freq_factor.
    """

    @dataclass(frozen=True)
    class Options(RoPEOptions):
        """Options of Llama 3.1's RoPE."""

        factor: float = opt(8.0, "How many times the context grows.", ge=1.0)
        low_freq_factor: float = opt(1.0, "Pairs of fewer turns in the original length are slowed in full.", gt=0.0)
        high_freq_factor: float = opt(4.0, "Pairs of more turns in the original length stay as they are.", gt=0.0)
        original_length: int = opt(8192, "Context before it grew, in tokens.", ge=1)

        def __post_init__(self) -> None:
            if self.low_freq_factor >= self.high_freq_factor:
                told = f"{self.low_freq_factor:g} is not below high_freq_factor, which is {self.high_freq_factor:g}"
                raise Invalid(("low_freq_factor", told))

    def frequencies(self, options: Any, length: int) -> Tensor:
        usual, low, high = super().frequencies(options, length), options.low_freq_factor, options.high_freq_factor
        turns = options.original_length * usual / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return usual * (kept + (1 - kept) / options.factor)


class YaRN(RoPE):
    """Formula: f (1 - s) / factor + f s, where s falls from 1 to 0 between the pairs that turn beta_fast and beta_slow times
        in the original length; turned q and k times 0.1 ln(factor) + 1
    Source: Peng et al., arXiv 2309.00071, sections 3.2 and 3.4; s over the numbers of pairs as in the authors' code.
    Shapes: [B, H, T, D] -> the same.
    Raises: Invalid where beta_slow is not below beta_fast.
    """

    @dataclass(frozen=True)
    class Options(RoPEOptions):
        """Options of YaRN."""

        factor: float = opt(4.0, "How many times the context grows.", ge=1.0)
        original_length: int = opt(4096, "Context before it grew, in tokens.", ge=1)
        beta_fast: float = opt(32.0, "Pairs of more turns in the original length stay as they are.", gt=0.0)
        beta_slow: float = opt(1.0, "Pairs of fewer turns in the original length are slowed in full.", gt=0.0)
        truncate: bool = opt(True, "Whether the two bounds are rounded outwards to whole pairs.")
        attention_factor: float | None = opt(
            None, "What turned queries and keys are multiplied by; null means the paper's.", gt=0.0
        )

        def __post_init__(self) -> None:
            if self.beta_slow >= self.beta_fast:
                raise Invalid(("beta_slow", f"{self.beta_slow:g} is not below beta_fast, which is {self.beta_fast:g}"))

    def frequencies(self, options: Any, length: int) -> Tensor:
        def pair(turns: float) -> float:
            """The pair, as a fraction of one, that turns so often in the original length."""
            radians = 2 * math.pi * turns / options.original_length  # a position
            return -self.turned / 2 * math.log(radians) / math.log(options.base)

        first, last = pair(options.beta_fast), pair(options.beta_slow)
        if options.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.turned - 1)
        width = last - first or 0.001  # a step, where both are one pair
        slowed = ((torch.arange(self.turned // 2, dtype=torch.float64) - first) / width).clamp(0, 1)
        return super().frequencies(options, length) * (1 - slowed + slowed / options.factor)

    def factor(self, options: Any, length: int) -> float:
        return float(options.attention_factor or 0.1 * math.log(options.factor) + 1)


class LongRoPE(RoPE):
    """Formula: pair i of frequency f_i / short_factors_i, or f_i / long_factors_i once a text is longer than original_length;
        turned q and k times sqrt(1 + ln(factor) / ln(original_length))
    Source: Ding et al., arXiv 2402.13753; the multiplier: Phi-3, Abdin et al., arXiv 2404.14219, whose code it is of.
    Shapes: [B, H, T, D] -> the same.
    Raises: ValueError where the factors are not one for each pair.

    What a token becomes depends on the length of the text, so what is remembered of a short one is of no use for a long one.
    """

    @dataclass(frozen=True)
    class Options(RoPEOptions):
        """Options of LongRoPE."""

        original_length: int = opt(4096, "Longest text for the short factors, in tokens.", ge=2)
        short_factors: tuple[float, ...] = opt((), "A divisor of each pair's frequency; none means 1 for all.", gt=0.0)
        long_factors: tuple[float, ...] = opt((), "The same for texts that are longer.", gt=0.0)
        factor: float | None = opt(
            None, "How many times the context grows; null means block_size / original_length.", gt=0.0
        )
        attention_factor: float | None = opt(
            None, "What turned queries and keys are multiplied by; null means the paper's.", gt=0.0
        )

    def __init__(self, options: Any, site: Site, *, width: int) -> None:
        super().__init__(options, site, width=width)
        self.switch = options.original_length if site.config.block_size > options.original_length else None

    def frequencies(self, options: Any, length: int) -> Tensor:
        usual, made = super().frequencies(options, length), []
        for name in ("short_factors", "long_factors")[: 1 + (length > options.original_length)]:
            factors = getattr(options, name) or (1.0,) * len(usual)
            if len(factors) != len(usual):
                raise ValueError(f"{name} are {len(factors)}, and {len(usual)} pairs are turned")
            made.append(usual / torch.tensor(factors, dtype=torch.float64))
        return torch.stack(made)

    def factor(self, options: Any, length: int) -> float:
        factor = options.factor or length / options.original_length
        usual = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(options.original_length))
        return float(options.attention_factor or usual)

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        which = int(self.switch is not None and length > self.switch)
        return self.cos[which], self.sin[which]
