"""Bamba: a hybrid of Mamba-2 and attention, with a gated MLP in every layer."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import (
    finished,
    read_decoder,
    separate_attention,
    separate_mlp,
    sizes,
    write_biases,
    write_decoder,
)
from convert.huggingface.family import Book, Family
from convert.huggingface.keys import Keys
from convert.huggingface.mamba2 import mixer, read_mixer, write_mixer
from convert.huggingface.ours import Ours
from convert.huggingface.rope import write_rope
from convert.mapping import Rules

HALF = 0.5  # of each head is turned where nothing is said
NAMES: dict[str, tuple[str, Any]] = {
    "expand": ("mamba_expand", 2),
    "heads": ("mamba_n_heads", 128),
    "d_state": ("mamba_d_state", 256),
    "groups": ("mamba_n_groups", 1),
    "d_conv": ("mamba_d_conv", 4),
    "chunk": ("mamba_chunk_size", 256),
    "proj_bias": ("mamba_proj_bias", False),
    "conv_bias": ("mamba_conv_bias", True),
}


def reading(keys: Keys) -> dict[str, Any]:
    node = read_decoder(keys, sizes(keys, positions=262144, kv_heads=8), eps=1e-5, partial=True, fraction=HALF)
    mixer = read_mixer(keys, NAMES, node["n_embd"], node["norm"]["eps"])
    keys.only("mamba_d_head", "auto", mixer["head_dim"], why="it follows from the other sizes")
    # Of generation, of a loss, and what is derived from the indices.
    keys.used |= {"num_logits_to_keep", "z_loss_coefficient", "layer_types", "layers_block_type"}
    attending = keys.take("attn_layer_indices", [])
    causal = {"match": [f"h.{i}.attn" for i in attending], "attention": node["attention"]}
    return node | {"attention": mixer} | ({"sites": {"attention": causal}} if attending else {})


def writing(ours: Ours) -> dict[str, Any]:
    kinds = [ours.name(f"h.{i}.attn") for i in range(ours.config.n_layer)]
    said = write_mixer(ours, f"h.{kinds.index('mamba2') if 'mamba2' in kinds else 0}.attn", NAMES)
    rope = write_rope(ours).get("rope_parameters", {})
    return {
        **write_decoder(ours),
        **write_biases(ours),
        **({"rope_parameters": {"partial_rotary_factor": 1.0, **rope}} if rope else {}),
        "attn_layer_indices": [i for i, kind in enumerate(kinds) if kind != "mamba2"],
        **said,
        "mamba_d_head": said["mamba_expand"] * ours.config.n_embd // said["mamba_n_heads"],
    }


def mapping(book: Book) -> Rules:
    separate_attention(book)
    mixer(book, "layers.*.mamba")
    separate_mlp(book, "layers.*.feed_forward")
    return finished(book, "pre_ff_layernorm", "final_layernorm")


FAMILY = Family("bamba", "BambaForCausalLM", "model.", reading, writing, mapping)
