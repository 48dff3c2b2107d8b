"""Qwen3-MoE: Qwen3 with a mixture of experts, in every layer or in some."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import (
    experts,
    finished,
    read_decoder,
    separate_attention,
    separate_mlp,
    sizes,
    windows,
    write_biases,
    write_decoder,
)
from convert.huggingface.family import Book, Family
from convert.huggingface.keys import Keys
from convert.huggingface.mixtral import read_experts, write_experts
from convert.huggingface.ours import Ours
from convert.mapping import Rules


def reading(keys: Keys) -> dict[str, Any]:
    node = read_decoder(keys, sizes(keys, positions=32768, kv_heads=4))
    node["attention"] |= {"qk_norm": True}
    if keys.take("use_sliding_window", False):
        node["attention"] |= {"window": keys.size("sliding_window", 4096)}
    keys.used |= {"sliding_window", "max_window_layers"}
    step, alone = keys.size("decoder_sparse_step", 1), keys.take("mlp_only_layers", [])
    many = "num_experts" if "num_experts" in keys.config else "num_local_experts"  # the library says it both ways
    width = keys.size("moe_intermediate_size", 768)
    moe = read_experts(keys, width, many, 128, 8, keys.take("norm_topk_prob", False))
    dense = [i for i in range(node["n_layer"]) if i in alone or (i + 1) % step]
    if not dense:
        return node | {"mlp": moe}
    site = {"match": [f"h.{i}.mlp" for i in dense], "mlp": node["mlp"]}
    return node | {"mlp": moe, "sites": {"dense": site}}


def writing(ours: Ours) -> dict[str, Any]:
    kinds = [ours.name(f"h.{i}.mlp") for i in range(ours.config.n_layer)]
    sparse, dense = ([i for i, kind in enumerate(kinds) if (kind == "moe") == wanted] for wanted in (True, False))
    at = f"h.{sparse[0] if sparse else 0}.mlp"
    said = write_decoder(ours, act_at=f"{at}.act")
    width = ours.shape(f"{at}.down.weight")[-1]
    return {
        **said,
        **write_experts(ours, at),
        "num_experts": ours.option(at, "experts", 128),
        "norm_topk_prob": ours.option(at, "renormalise", True),
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "intermediate_size": ours.shape(f"h.{dense[0]}.mlp.down.weight")[-1] if dense else width,
        "attention_bias": write_biases(ours)["attention_bias"],
        "sliding_window": windows(ours)[0],
        "use_sliding_window": windows(ours)[0] is not None,
    }


def mapping(book: Book) -> Rules:
    separate_attention(book)
    words = {name: f"{name}_proj" for name in ("gate", "up", "down")}
    kinds = [book.ours.name(f"h.{i}.mlp") for i in range(book.ours.config.n_layer)]
    if set(kinds) == {"moe"}:
        experts(book, "layers.*.mlp", "layers.*.mlp", words)
        return finished(book)
    for i, kind in enumerate(kinds):  # their names agree, so each layer has rules of its own
        if kind == "moe":
            experts(book, "layers.*.mlp", "layers.*.mlp", words, str(i))
        else:
            separate_mlp(book, layer=str(i))
    return finished(book)


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", "model.", reading, writing, mapping)
