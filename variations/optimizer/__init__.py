"""Optimizers. Each takes groups of slices with settings of their own."""

from variations.optimizer.adafactor import Adafactor
from variations.optimizer.adamw import AdamW
from variations.optimizer.lion import Lion
from variations.optimizer.muon import Muon
from variations.optimizer.sgd import SGD

OPTIMIZERS: dict[str, type] = {"adamw": AdamW, "sgd": SGD, "lion": Lion, "muon": Muon, "adafactor": Adafactor}
