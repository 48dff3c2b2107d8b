"""A token embedding that also looks up the last few tokens together."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from core.options import opt
from core.slices import Declaration, Layout, declare
from variations.cache import Cache
from variations.embedding.standard import Embedding
from variations.init.distributions import ZEROS
from variations.site import Site

_BASE, _FACTOR, _MASK = 1_000_003, 0x9E3779B1, (1 << 31) - 1


class NgramEmbedding(Embedding):
    """Formula: y_t = W[token_t] + sum over n = 2 .. order of E_n[hash(token_{t-n+1}, ..., token_t) mod rows]
    Source: hashed n-gram embeddings, Pagnoni et al., arXiv 2412.09871; Huang et al., arXiv 2501.16975.
    Shapes: [B, T] -> [B, T, C]; weight [V, C], tables [order - 1, rows, C], which start at zero.

    Before the first token stand tokens that no vocabulary has. A part is named after its n: `wte.tables[3gram]`.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of n-gram embeddings."""

        order: int = opt(3, "Longest run of tokens that is looked up.", ge=2, le=8)
        rows: int = opt(16384, "Rows of each table; runs whose hashes agree share one.", ge=1)

    tables: nn.Parameter

    def __init__(self, options: Options, site: Site, *, rows: int, width: int) -> None:
        super().__init__(options, site, rows=rows, width=width)
        self.order, self.rows, self.path = options.order, options.rows, site.path
        labels = tuple(f"{n}gram" for n in range(2, self.order + 1))
        layout = Layout(dim=-2, stack=(labels,))
        declare(self, "tables", (len(labels), self.rows, width), Declaration(layout, "embedding", ZEROS))

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        known = F.pad(tokens + 1, (self.order - 1, 0))  # 0 is the token before the first
        if cache is not None:
            if self.path in cache.states:
                known[:, : self.order - 1] = cache.states[self.path]
            cache.states[self.path] = known[:, 1 - self.order :]
        y, hashed = F.embedding(tokens, self.weight), tokens + 1
        for n, table in enumerate(self.tables.unbind(0), start=2):
            earlier = known[:, self.order - n : known.shape[1] - n + 1]
            hashed = (hashed * _BASE + earlier) & _MASK
            y = y + F.embedding(((hashed * _FACTOR) >> 12) % self.rows, table)
        return y
