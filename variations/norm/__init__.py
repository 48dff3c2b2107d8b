"""Normalisation layers."""

from variations.norm.layernorm import LayerNorm
from variations.norm.none import NoNorm
from variations.norm.rmsnorm import RMSNorm

NORMS: dict[str, type] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "none": NoNorm}
