"""GPT-2: learned positions, LayerNorms, plain MLPs; weights are [in, out], queries, keys and values in one."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import ACTIVATIONS, activation, dropout
from convert.huggingface.family import Book, Family
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours
from convert.mapping import Rules
from convert.steps import TRANSPOSE

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SUMMARIES = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")  # of a head for other tasks


def reading(keys: Keys) -> dict[str, Any]:
    width = keys.size("n_embd")
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    keys.used |= {f"summary_{name}" for name in SUMMARIES}
    keys.used |= {"n_ctx", "reorder_and_upcast_attn"}  # the latter is about roundings alone
    return {
        "n_layer": keys.size("n_layer"),
        "n_head": keys.size("n_head"),
        "n_embd": width,
        "vocab_size": keys.size("vocab_size"),
        "block_size": keys.size("n_positions", 1024),
        "bias": True,
        "tie_weights": keys.take("tie_word_embeddings", True),
        "dropout": dropout(keys, DROPOUTS, 0.1),
        "norm": {"variant": "layernorm", "eps": keys.take("layer_norm_epsilon", 1e-5)},
        "activation": keys.choice("activation_function", "gelu_new", ACTIVATIONS),
        "position": "learned",
        "attention": {"variant": "causal", **({} if keys.take("scale_attn_weights", True) else {"scale": 1.0})},
        "mlp": {"variant": "standard", "width": keys.size("n_inner", 4 * width)},
    }


def writing(ours: Ours) -> dict[str, Any]:
    c = ours.config
    return {
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "n_positions": c.block_size,
        "vocab_size": c.vocab_size,
        "n_inner": ours.shape("h.*.mlp.up.weight")[0],
        "activation_function": activation(ours, "h.0.mlp.act", "gelu_new"),
        "layer_norm_epsilon": ours.option("ln_f", "eps", 1e-5),
        "tie_word_embeddings": c.tie_weights,
        **dict.fromkeys(DROPOUTS, c.dropout),
        "scale_attn_weights": ours.option("h.0.attn", "scale") is None,
    }


def mapping(book: Book) -> Rules:
    book.add("wpe.weight", "wpe.weight")
    book.fused("h.*.attn.c_attn", "h.*.attn.qkv", ("q", "k", "v"), TRANSPOSE)
    book.plain("h.*.attn.c_proj", "h.*.attn.proj", TRANSPOSE)
    book.plain("h.*.mlp.c_fc", "h.*.mlp.up", TRANSPOSE)
    book.plain("h.*.mlp.c_proj", "h.*.mlp.down", TRANSPOSE)
    book.norm("h.*.ln_1", "h.*.ln_1")
    book.norm("h.*.ln_2", "h.*.ln_2")
    book.ends("wte.weight", "ln_f")
    return book.made("h.*.attn.bias", "h.*.attn.masked_bias")  # causal masks


FAMILY = Family("gpt2", "GPT2LMHeadModel", "transformer.", reading, writing, mapping)
