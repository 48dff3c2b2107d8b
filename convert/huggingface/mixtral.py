"""Mixtral: Llama with a mixture of experts in every layer, whose weights are divided by their sum."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import (
    experts,
    finished,
    read_decoder,
    separate_attention,
    sizes,
    windows,
    write_decoder,
)
from convert.huggingface.family import Book, Family
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours
from convert.mapping import Rules


def read_experts(keys: Keys, width: int, count: str, usual: int, top_k: int, renormalise: bool) -> dict[str, Any]:
    """Our `mlp` node. The loss that evens the load is part of theirs where router logits are put out, and then only."""
    balance = keys.take("router_aux_loss_coef", 0.001)
    balanced = keys.take("output_router_logits", False) and balance > 0
    return {
        "variant": "moe",
        "experts": keys.size(count, usual),
        "top_k": keys.size("num_experts_per_tok", top_k),
        "width": width,
        "renormalise": renormalise,
        "load_balance": balance if balanced else None,
    }


def reading(keys: Keys) -> dict[str, Any]:
    keys.only("router_jitter_noise", 0.0)
    node = read_decoder(keys, sizes(keys, positions=4096 * 32, kv_heads=8), eps=1e-5, base=1e6)
    node["mlp"] = read_experts(keys, node["mlp"]["width"], "num_local_experts", 8, 2, True)
    node["attention"] |= {"window": keys.take("sliding_window", None)}
    return node


def write_experts(ours: Ours, at: str) -> dict[str, Any]:
    """The keys of `read_experts`, of the mixture at a place, but those that families call differently."""
    balance = ours.option(at, "load_balance")
    return {
        "num_experts_per_tok": ours.option(at, "top_k", 2),
        "output_router_logits": balance is not None,
        **({} if balance is None else {"router_aux_loss_coef": balance}),
    }


def writing(ours: Ours) -> dict[str, Any]:
    count = ours.option("h.0.mlp", "experts", 8)
    return {
        **write_decoder(ours),
        **write_experts(ours, "h.0.mlp"),
        "num_local_experts": count,
        "sliding_window": windows(ours)[0],
    }


def mapping(book: Book) -> Rules:
    separate_attention(book)
    experts(book, "layers.*.block_sparse_moe", "layers.*.mlp", {"gate": "w1", "up": "w3", "down": "w2"})
    return finished(book)


FAMILY = Family("mixtral", "MixtralForCausalLM", "model.", reading, writing, mapping)
