"""Gemma: Llama with norms that store their gain less one, scaled embeddings, a tied head, and GeGLU."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import decoder, read_decoder, sizes, write_biases, write_decoder
from convert.huggingface.family import Family
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours

TANH = "gelu_pytorch_tanh"


def reading(keys: Keys) -> dict[str, Any]:
    keys.only("use_bidirectional_attention", False)
    if (
        keys.config.get("hidden_activation") is not None
    ):  # of files before it was called hidden_act, which then said 'gelu'
        keys.config = {**keys.config, "hidden_act": keys.take("hidden_activation", TANH)}
    if keys.config.get("hidden_act") == "gelu":
        keys.config = {**keys.config, "hidden_act": TANH}  # what the family computes under this name
    node = read_decoder(keys, sizes(keys, positions=8192, kv_heads=16, head_dim=256), act=TANH, tied=True)
    node["norm"] |= {"zero_centred": True}
    return node | {"embedding_scale": "sqrt"}


def writing(ours: Ours) -> dict[str, Any]:
    return {**write_decoder(ours, TANH), "attention_bias": write_biases(ours)["attention_bias"]}


FAMILY = Family("gemma", "GemmaForCausalLM", "model.", reading, writing, decoder, zero_centred=True)
