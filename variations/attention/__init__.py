"""Mixers over time."""

from variations.attention.causal import CausalAttention

ATTENTIONS: dict[str, type] = {"causal": CausalAttention}
