"""How positions enter: added to the embedding, or by rotating queries and keys."""

from variations.position.learned import LearnedPosition
from variations.position.none import NoPosition
from variations.position.rope import RoPE
from variations.position.scaled import LinearRoPE, Llama3RoPE, LongRoPE, YaRN

POSITIONS: dict[str, type] = {
    "learned": LearnedPosition,
    "rope": RoPE,
    "rope_linear": LinearRoPE,
    "rope_llama3": Llama3RoPE,
    "yarn": YaRN,
    "longrope": LongRoPE,
    "none": NoPosition,
}
