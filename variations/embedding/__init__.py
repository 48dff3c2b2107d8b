"""Token embeddings."""

from variations.embedding.ngram import NgramEmbedding
from variations.embedding.pkl import PKLEmbedding
from variations.embedding.standard import Embedding

EMBEDDINGS: dict[str, type] = {"standard": Embedding, "pkl": PKLEmbedding, "ngram": NgramEmbedding}
