"""Optimizers. Each takes groups of named tensors with settings of their own, and saves its state by those names."""

from variations.optimizer.adamw import AdamW
from variations.optimizer.muon import Muon

OPTIMIZERS: dict[str, type] = {"adamw": AdamW, "muon": Muon}
