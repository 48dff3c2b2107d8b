"""Phi3: Llama with queries, keys and values in one weight, gate and up in another, and positions in a part of each head."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import dropout, finished, read_decoder, sizes, windows, write_decoder
from convert.huggingface.family import Book, Family
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours
from convert.huggingface.rope import LENGTH
from convert.mapping import Rules

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attention_dropout")


def renamed(found: Any) -> Any:
    """Rope settings, where they are of the kind that the family once called otherwise."""
    former = isinstance(found, dict) and found.get("rope_type", found.get("type")) in ("su", "yarn")
    return {**found, "rope_type": "longrope"} if former else found


def reading(keys: Keys) -> dict[str, Any]:
    config = {**keys.config, LENGTH: keys.config.get(LENGTH) or 4096}
    config |= {name: renamed(config[name]) for name in ("rope_parameters", "rope_scaling") if name in config}
    probability = dropout(keys, DROPOUTS, 0.0)
    keys.config = {name: value for name, value in config.items() if name not in DROPOUTS}
    node = read_decoder(keys, sizes(keys, positions=4096), eps=1e-5, partial=True, kinds=("default", "longrope"))
    node["dropout"] = probability
    if node["head_dim"] * node["n_head"] != node["n_embd"]:
        keys.wrong.append(f"head_dim is {node['head_dim']}, and a 'phi3' has hidden_size / num_attention_heads.")
    node["attention"] |= {"window": keys.take("sliding_window", None)}
    return node


def writing(ours: Ours) -> dict[str, Any]:
    said = write_decoder(ours)
    del said["head_dim"]
    original = said.get("rope_parameters", {}).get(LENGTH, ours.config.block_size)
    return {
        **said,
        LENGTH: original,
        "sliding_window": windows(ours)[0],
        **dict.fromkeys(DROPOUTS, ours.config.dropout),
    }


def mapping(book: Book) -> Rules:
    book.fused("layers.*.self_attn.qkv_proj", "h.*.attn.qkv", ("q", "k", "v"))
    book.plain("layers.*.self_attn.o_proj", "h.*.attn.proj")
    book.fused("layers.*.mlp.gate_up_proj", "h.*.mlp.gate_up", ("gate", "up"))
    book.plain("layers.*.mlp.down_proj", "h.*.mlp.down")
    return finished(book)


FAMILY = Family("phi3", "Phi3ForCausalLM", "model.", reading, writing, mapping)
