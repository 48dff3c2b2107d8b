"""Dropout whose mask is a function of (seed, step, site) and of nothing else: not of other layers, of devices, or of a resume."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

_GOLDEN = 0x9E3779B9
_M1, _M2 = 0x7FEB352D, 0x846CA68B


def mix(x: int) -> int:
    """A 32-bit finaliser: every input bit reaches every output bit. Source: C. Wellons, "lowbias32", 2018."""
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * _M1) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * _M2) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def _mix(x: Tensor) -> Tensor:
    """`mix` on int32 tensors; products wrap, and a mask makes the arithmetic shift a logical one."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _M1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(_M2)
    return x ^ ((x >> 16) & 0xFFFF)


def uniform(x: Tensor, key: Tensor, part: int = 0) -> Tensor:
    """A number in [0, 1) for each element of x, in float32. One operation for those who replace tensors: elements are counted,
    from `part` times as many as x has."""
    if has_torch_function((key,)):
        made: Tensor = handle_torch_function(uniform, (key,), x, key)
        return made
    first = part * x.numel()
    index = torch.arange(first, first + x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    bits = _mix(_mix(index ^ key) + key)
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


class Dropout(nn.Module):
    """Formula: y = x * keep / (1 - p), keep = hash(element, key) >= p
    Source: N. Srivastava et al., "Dropout", JMLR 2014.
    Shapes: any -> the same.

    `key` (int32) and `p` are buffers that no checkpoint holds: runs that differ in them share one graph. `part`: where processes
    share the rows of a batch, how many times as many stand before those of x.
    """

    key: Tensor
    p: Tensor

    def __init__(self, p: float, path: str) -> None:
        super().__init__()
        self.on, self.part = p > 0, 0
        self.site = zlib.crc32(path.encode())
        self.register_buffer("p", torch.tensor(p), persistent=False)
        self.register_buffer("key", torch.zeros((), dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.on and self.training):
            return x
        # Divided in float32 at least: 0.9 in bfloat16 is 0.2% off.
        scaled = x.to(torch.promote_types(x.dtype, torch.float32)) / (1 - self.p)
        return torch.where(uniform(x, self.key, self.part) >= self.p, scaled.to(x.dtype), 0)


def set_step(model: nn.Module, seed: int, step: int) -> None:
    """Sets every dropout's key for micro-step `step` of the run with `seed`."""
    clock = mix(mix(seed + _GOLDEN) ^ mix(step * 2 + 1))
    for module in model.modules():
        if isinstance(module, Dropout) and module.on:
            module.key.fill_(_signed(mix(clock ^ module.site)))
