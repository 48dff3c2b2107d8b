"""Mixers over time."""

from variations.attention.causal import CausalAttention
from variations.attention.delta import DeltaRule
from variations.attention.mamba2 import Mamba2
from variations.attention.memory import MemoryAttention

ATTENTIONS: dict[str, type] = {
    "causal": CausalAttention,
    "memory": MemoryAttention,
    "mamba2": Mamba2,
    "delta": DeltaRule,
}
