"""Position-wise networks."""

from variations.mlp.gated import GatedMLP
from variations.mlp.moe import MoE
from variations.mlp.none import NoMLP
from variations.mlp.standard import MLP

MLPS: dict[str, type] = {"standard": MLP, "gated": GatedMLP, "moe": MoE, "none": NoMLP}
