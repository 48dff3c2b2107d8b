"""Llama: rotary positions, RMSNorms, gated MLPs, groups of query heads that share keys and values."""

from __future__ import annotations

from typing import Any

from convert.huggingface.decoder import decoder, read_decoder, sizes, write_biases, write_decoder
from convert.huggingface.family import Family
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours


def reading(keys: Keys) -> dict[str, Any]:
    keys.used.add("pretraining_tp")  # how products are added up
    return read_decoder(keys, sizes(keys, positions=2048))


def writing(ours: Ours) -> dict[str, Any]:
    c = ours.config
    if c.n_embd % c.n_head:
        raise ValueError(f"model.n_embd {c.n_embd} is not divisible by n_head {c.n_head}, which 'llama' demands.")
    return {**write_decoder(ours), **write_biases(ours)}


FAMILY = Family("llama", "LlamaForCausalLM", "model.", reading, writing, decoder)
