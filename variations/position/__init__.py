"""How positions enter: added to the embedding, or by rotating queries and keys."""

from variations.position.learned import LearnedPosition
from variations.position.none import NoPosition
from variations.position.rope import RoPE

POSITIONS: dict[str, type] = {"learned": LearnedPosition, "rope": RoPE, "none": NoPosition}
