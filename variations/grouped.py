"""Many linear maps at once, each over its own rows: the one place where the way to compute them is chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """x [N, in], sorted by group; weight [E, out, in]; bias [E, out]; counts int64 [E], rows of each group, N in sum -> [N, out].

    A group without rows has a gradient of zeros.
    """
    y = F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
    return y if bias is None else y + bias.repeat_interleave(counts, 0, output_size=len(x))
