"""Token embeddings."""

from variations.embedding.pkl import PKLEmbedding
from variations.embedding.standard import Embedding

EMBEDDINGS: dict[str, type] = {"standard": Embedding, "pkl": PKLEmbedding}
