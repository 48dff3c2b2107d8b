"""The model's configuration: sizes, a node for every kind of variation, and sites that choose another one at some places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from core.addresses import Pattern, Rule
from core.options import Invalid, Variant, opt, said, variant

KINDS = ("linear", "embedding", "head", "norm", "activation", "position", "attention", "mlp", "init")


def _site(kind: str) -> Variant | None:
    made: Variant | None = said(f"The {kind} at these places.", kind=kind)
    return made


@dataclass(frozen=True)
class SiteRule(Rule):
    """Other variations at the places whose path matches."""

    linear: Variant | None = _site("linear")
    embedding: Variant | None = _site("embedding")
    head: Variant | None = _site("head")
    norm: Variant | None = _site("norm")
    activation: Variant | None = _site("activation")
    position: Variant | None = _site("position")
    attention: Variant | None = _site("attention")
    mlp: Variant | None = _site("mlp")
    init: Variant | None = _site("init")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.nodes():
            raise Invalid(("", f"the site chooses no variation; it may name {', '.join(KINDS)}"))

    def check(self, made: Pattern) -> None:
        if made.about_parts:
            raise ValueError(f"'{made.text}' is about parts of a weight, and a site is a whole module")

    def nodes(self) -> dict[str, Variant]:
        """The kinds that the site chooses."""
        return {kind: chosen for kind in KINDS if (chosen := getattr(self, kind)) is not None}


@dataclass(frozen=True)
class ModelConfig:
    """A GPT. Letters in shapes: B batch, T time, C n_embd, H heads, K kv heads, D head_dim, F mlp width, V vocabulary."""

    n_layer: int = opt(4, "Number of blocks.", ge=1, le=2000)
    n_head: int = opt(4, "Number of query heads.", ge=1)
    n_kv_head: int | None = opt(None, "Number of key and value heads; null means as many as query heads.", ge=1)
    n_embd: int = opt(128, "Width of the residual stream.", ge=1)
    head_dim: int | None = opt(None, "Width of a head; null means n_embd / n_head.", ge=1)
    block_size: int = opt(64, "Longest context, in tokens.", ge=1)
    vocab_size: int | None = opt(None, "Number of tokens; null means the data's.", ge=1)
    dropout: float = opt(0.0, "Probability of dropping an activation.", ge=0.0, lt=1.0, knob=True)
    bias: bool = opt(True, "Whether linears and LayerNorms have a bias.")
    stack_layers: bool = opt(False, "Whether each weight of the blocks is one parameter for all layers.")
    tie_weights: bool = opt(True, "Whether the embedding and the head share one weight.")
    embedding_scale: float | Literal["sqrt"] | None = opt(
        None, "What embedded tokens are multiplied by; sqrt is the root of n_embd, null is 1.", gt=0.0, knob=True
    )
    logit_softcap: float | None = opt(
        None, "Logits z become cap * tanh(z / cap), which stays within the cap; null means no cap.", gt=0.0, knob=True
    )
    linear: Variant = variant("linear", "standard", "Linear maps inside the blocks.")
    embedding: Variant = variant("embedding", "standard", "The token embedding.")
    head: Variant = variant("head", "standard", "The linear map to the vocabulary.")
    norm: Variant = variant("norm", "layernorm", "Normalisation layers.")
    activation: Variant = variant("activation", "gelu", "The nonlinearity of the MLPs.")
    position: Variant = variant("position", "learned", "How positions enter.")
    attention: Variant = variant("attention", "causal", "The attention of the blocks.")
    layer_pattern: tuple[str, ...] = opt(
        (), "Names of the attention of one layer after another, repeated; none means model.attention everywhere."
    )
    mlp: Variant = variant("mlp", "standard", "The MLP of the blocks.")
    init: Variant = variant("init", "normal", "Initial values of matrices and embeddings.")
    sites: dict[str, SiteRule] = opt({}, "Other variations at named places.")

    def __post_init__(self) -> None:
        wrong = []
        if self.head_dim is None and self.n_embd % self.n_head:
            wrong.append(
                ("n_embd", f"{self.n_embd} is not divisible by n_head {self.n_head}, and no head_dim is given")
            )
        if self.n_head % self.kv_heads:
            wrong.append(("n_kv_head", f"n_head {self.n_head} is not divisible by n_kv_head {self.kv_heads}"))
        if wrong:
            raise Invalid(*wrong)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def embedding_factor(self) -> float | None:
        """What embedded tokens are multiplied by, as a number."""
        return math.sqrt(self.n_embd) if self.embedding_scale == "sqrt" else self.embedding_scale
