"""Qwen3: Llama with queries and keys normalised per head, and a window in some layers."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import decoder, read_decoder, sizes, windows, write_biases, write_decoder
from convert.huggingface.family import Family
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours

FULL, SLIDING = "full_attention", "sliding_attention"


def reading(keys: Keys) -> dict[str, Any]:
    node = read_decoder(keys, sizes(keys, positions=32768, kv_heads=32, head_dim=128))
    node["attention"] |= {"qk_norm": True}
    sliding = keys.take("use_sliding_window", False)
    window, first = keys.size("sliding_window", 4096), keys.take("max_window_layers", 28)
    count = node["n_layer"]
    types = keys.take("layer_types", [SLIDING if sliding and i >= first else FULL for i in range(count)])
    if len(types) != count or set(types) - {FULL, SLIDING} or (SLIDING in types and not sliding):
        keys.wrong.append(f"layer_types is {types}, and our layers are {FULL}, or {SLIDING} with use_sliding_window.")
    places = [f"h.{i}.attn" for i, kind in enumerate(types) if kind == SLIDING]
    if places:
        windowed = {**node["attention"], "window": window}
        some = {"sites": {"windows": {"match": places, "attention": windowed}}}
        node |= {"attention": windowed} if len(places) == count else some
    return node


def writing(ours: Ours) -> dict[str, Any]:
    found = windows(ours)
    window = next((w for w in found if w is not None), None)
    return {
        **write_decoder(ours),
        "attention_bias": write_biases(ours)["attention_bias"],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": [FULL if w is None else SLIDING for w in found],
    }


FAMILY = Family("qwen3", "Qwen3ForCausalLM", "model.", reading, writing, decoder)
