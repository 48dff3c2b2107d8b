"""The catalogue: a dictionary for every kind.

A new variation is a class in a file of its own and a line in its kind's dictionary.
"""

from core.options import Catalogue
from variations.activation import ACTIVATIONS
from variations.attention import ATTENTIONS
from variations.embedding import EMBEDDINGS
from variations.init import INITS
from variations.linear import LINEARS
from variations.lora import LORAS
from variations.mlp import MLPS
from variations.norm import NORMS
from variations.optimizer import OPTIMIZERS
from variations.position import POSITIONS
from variations.schedule import SCHEDULES

CATALOGUE: Catalogue = {
    "linear": LINEARS,
    "embedding": EMBEDDINGS,
    "head": LINEARS,  # a head is a linear map to the vocabulary
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "position": POSITIONS,
    "attention": ATTENTIONS,
    "mlp": MLPS,
    "init": INITS,
    "lora": LORAS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
