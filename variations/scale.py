"""Numbers of the configuration that activations meet. Off they leave what they are given; on they are knobs, 0-dim buffers in no
checkpoint, so that runs which differ in them share one graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """Formula: y = number * x
    Source: the embeddings of Vaswani et al., arXiv 1706.03762, section 3.4, and of Gemma, arXiv 2403.08295.
    Shapes: any -> the same; number [], or None for y = x.
    """

    number: Tensor | None

    def __init__(self, number: float | None) -> None:
        super().__init__()
        self.register_buffer("number", None if number is None else torch.tensor(number), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # In the dtype of x: of several runs the numbers are a tensor with axes, which would promote it.
        return x if self.number is None else x * self.number.to(x.dtype)


class SoftCap(Scale):
    """Formula: y = number * tanh(x / number)
    Source: Gemma 2, arXiv 2408.00118, section 2.
    Shapes: any -> the same; number [], or None for y = x.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.number is None:
            return x
        cap = self.number.to(x.dtype)
        return cap * torch.tanh(x / cap)
