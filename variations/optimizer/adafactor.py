"""Adafactor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import _adafactor as library

from core.options import opt
from variations.optimizer.base import Entry, Group, Optimizer, OptimizerOptions


@dataclass(frozen=True)
class AdafactorOptions(OptimizerOptions):
    """Options of Adafactor."""

    learning_rate: float = opt(
        1e-2, "Peak learning rate, relative to the root mean square of each slice.", ge=0.0, knob=True
    )
    weight_decay: float = opt(0.0, "Decoupled weight decay of matrices and embeddings.", ge=0.0, knob=True)
    beta2_decay: float = opt(-0.8, "The second moment's decay after t steps is 1 - t^beta2_decay.", lt=0.0)
    clip: float = opt(1.0, "Largest root mean square of an update.", gt=0.0)
    eps: float = opt(1e-3, "Smallest root mean square that a slice counts as.", gt=0.0, knob=True)


class Adafactor(Optimizer):
    """Formula: w <- w - lr u / max(1, rms(u) / clip), u = g / sqrt(r c^T / mean(r)), r, c means of g^2 over columns, rows
    Source: Shazeer and Stern, arXiv 1804.04235, computed by torch.optim.
    Shapes: [rows, cols] with state [rows, 1] and [1, cols]; each slice is a matrix of its own, a vector has state of its shape.
    """

    Options = AdafactorOptions
    apart = True
    solo = "adafactor's step is torch's own, for one model"

    def fresh(self, entry: Entry) -> dict[str, Tensor]:
        shape = entry.shape
        factors = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
        shapes = {"variance": shape} if len(shape) == 1 else factors
        return {kind: entry.place.new_zeros(shape) for kind, shape in shapes.items()}

    def update(self, group: Group, lr: float) -> None:
        o: AdafactorOptions = self.options
        for entry, param, grad in zip(group.entries, group.params, group.grads, strict=True):
            whole, state = param.view(entry.shape), entry.state
            # The function under torch.optim.Adafactor, called without that class, whose first use imports the compiler.
            library._single_tensor_adafactor(
                [whole],
                [grad.view(entry.shape)],
                [state.get("row_var")],
                [state.get("col_var")],
                [state.get("variance")],
                [torch.tensor(float(entry.steps - 1))],
                None,
                None,
                d=o.clip,
                lr=lr,
                beta2_decay=o.beta2_decay,
                weight_decay=group.weight_decay,
                eps1=None,
                eps2=o.eps,
                maximize=False,
                has_complex=False,
            )
