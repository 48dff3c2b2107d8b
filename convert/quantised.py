"""Weights that are stored in eight bits with a scale for each block, as the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convert.mapping import Source

SCALE, INPUT = "_scale_inv", ".input_scale"
BLOCK = (128, 128)  # rows and columns of a block where nothing else is said
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def dequantised(source: Source, config: Mapping[str, Any]) -> Source:
    """The source as it is, or with its eight-bit weights as numbers: what `quantization_config` of a config.json asks for.

    Raises ValueError for another method than fp8, and for weights without a scale or with one of another shape.
    """
    how = config.get("quantization_config")
    if not isinstance(how, Mapping):
        return source
    method = how.get("quant_method")
    if method != "fp8":
        raise ValueError(
            f"quantization_config: weights stored by the method {method!r} cannot be read; only 'fp8' can."
        )
    block = tuple(how.get("weight_block_size") or BLOCK)
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(
            f"quantization_config.weight_block_size: {list(block)} is not a number of rows and one of columns."
        )
    return Dequantised(source, (block[0], block[1]))


class Dequantised:
    """A source without scales: w = q * s, with one s for each block of the last two dimensions, the last ones cut off.

    Formula: w_ij = q_ij s_(i // rows, j // columns), in float32
    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2; the scales' names as in its files.
    Shapes: q [..., out, in]; s [..., ceil(out / rows), ceil(in / columns)], or one number for all of it.
    """

    def __init__(self, source: Source, block: tuple[int, int] = BLOCK) -> None:
        self.source, self.block = source, block
        known = set(source.names())
        wrong = []
        for name in known:
            if name.endswith(SCALE) and name.removesuffix(SCALE) not in known:
                wrong.append(f"{name} is the scale of a weight that there is not.")
        for name in sorted(known):
            meta = source.meta(name)
            if meta.dtype not in EIGHT_BITS:
                continue
            if name + SCALE not in known:
                wrong.append(f"{name} is stored in eight bits and has no {name.rpartition('.')[2]}{SCALE}.")
            elif (found := list(source.meta(name + SCALE).shape)) not in self._shapes(meta.shape):
                wrong.append(
                    f"{name}{SCALE} is {found}, and for a weight {list(meta.shape)} should be {self._shapes(meta.shape)[0]}."
                )
        if wrong:
            raise ValueError("\n".join(wrong))

    def _shapes(self, shape: Sequence[int]) -> list[list[int]]:
        """Those that a scale may have; the first is that of blocks."""
        if len(shape) < 2:
            return [[], [1]]
        (rows, columns), (*outer, height, width) = self.block, shape
        return [[*outer, -(-height // rows), -(-width // columns)], [], [1]]

    def names(self) -> list[str]:
        return [name for name in self.source.names() if not name.endswith((SCALE, INPUT))]

    def meta(self, name: str) -> Tensor:
        meta = self.source.meta(name)
        return meta.float() if meta.dtype in EIGHT_BITS else meta

    def get(self, name: str) -> Tensor:
        stored = self.source.get(name)
        if stored.dtype not in EIGHT_BITS:
            return stored
        scale, made = self.source.get(name + SCALE).float(), stored.float()
        if scale.numel() == 1:
            return made.mul_(scale.reshape(()))
        height, width = made.shape[-2:]
        for i in range(
            scale.shape[-2]
        ):  # a row of blocks at a time, so that no scale of the whole weight's size is made
            rows = made.narrow(-2, i * self.block[0], min(self.block[0], height - i * self.block[0]))
            rows.mul_(scale[..., i : i + 1, :].repeat_interleave(self.block[1], -1)[..., :width])
        return made
