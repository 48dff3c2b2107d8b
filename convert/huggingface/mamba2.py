"""Mamba-2: blocks of a state space mixer alone, without positions and without MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.huggingface.family import Book, Family
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours
from convert.mapping import Rules
from convert.steps import Reshape

CONTEXT = 2048  # the family says none, and ours has one: what such models were trained with
PARTS = ("z", "x", "B", "C", "dt")
EPS = "layer_norm_epsilon"


# Our names of a mixer's sizes, and for each family theirs and what they are where they are left out.
NAMES: dict[str, tuple[str, Any]] = {
    "expand": ("expand", 2),
    "heads": ("num_heads", 128),
    "d_state": ("state_size", 128),
    "groups": ("n_groups", 8),
    "d_conv": ("conv_kernel", 4),
    "chunk": ("chunk_size", 256),
    "proj_bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}
ENDLESS = ([0, float("inf")], [0, {"__float__": "Infinity"}])  # as files say it


def read_mixer(keys: Keys, names: Mapping[str, tuple[str, Any]], width: int, eps: float) -> dict[str, Any]:
    """Our node of a mixer. names: theirs and the usual values, by ours."""
    keys.only("hidden_act", "silu", "swish")
    keys.only("time_step_limit", *ENDLESS)
    said = {own: keys.take(*theirs) for own, theirs in names.items()}
    heads = said.pop("heads")
    return {
        "variant": "mamba2",
        **said,
        "head_dim": max(1, said["expand"] * width // max(1, heads)),
        "norm_groups": said["groups"],
        "norm_eps": eps,
    }


def reading(keys: Keys) -> dict[str, Any]:
    width, eps = keys.size("hidden_size"), keys.take(EPS, 1e-5)
    mixer = read_mixer(keys, NAMES, width, eps)
    keys.only("head_dim", mixer["head_dim"], why="it follows from the other sizes")
    keys.used |= {"residual_in_fp32", "time_step_rank", "time_step_floor", "rescale_prenorm_residual"}
    steps = {"dt_min": keys.take("time_step_min", 0.001), "dt_max": keys.take("time_step_max", 0.1)}
    return {
        "n_layer": keys.size("num_hidden_layers"),
        "n_head": 1,
        "n_embd": width,
        "block_size": CONTEXT,
        "vocab_size": keys.size("vocab_size"),
        "bias": False,
        "tie_weights": keys.take("tie_word_embeddings", False),
        "norm": {"variant": "rmsnorm", "eps": eps},
        "position": "none",
        "attention": {**mixer, **steps},
        "mlp": "none",
    }


def write_mixer(ours: Ours, at: str, names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """The keys of `read_mixer`, of the mixer at a place."""
    said = {
        "heads": ours.shape(f"{at}.A_log", (1,))[0],
        "proj_bias": bool(ours.named(f"{at}.in_proj.bias")),
        "conv_bias": bool(ours.named(f"{at}.conv1d.bias")),
    }
    return {theirs: said.get(own, ours.option(at, own, usual)) for own, (theirs, usual) in names.items()}


def writing(ours: Ours) -> dict[str, Any]:
    c, said = ours.config, write_mixer(ours, "h.0.attn", NAMES)
    return {
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "vocab_size": c.vocab_size,
        **said,
        "head_dim": said["expand"] * c.n_embd // said["num_heads"],
        "hidden_act": "silu",
        EPS: ours.option("ln_f", "eps", 1e-5),
        "residual_in_fp32": False,
        "tie_word_embeddings": c.tie_weights,
        **{f"time_step_{x}": ours.option("h.0.attn", f"dt_{x}", 0.1) for x in ("min", "max")},
    }


def mixer(book: Book, theirs: str) -> None:
    """A mixer's weights; the convolution is [channels, 1, k] there."""
    book.fused(f"{theirs}.in_proj", "h.*.attn.in_proj", PARTS)
    if found := book.ours.named("h.*.attn.conv1d.weight"):
        rows, size = book.ours.shapes[found[0]]
        flat = Reshape((rows, 1, size), (rows, size))
        book.fused(f"{theirs}.conv1d", "h.*.attn.conv1d", PARTS[1:-1], flat)
    for name in ("A_log", "dt_bias", "D"):
        book.add(f"{theirs}.{name}", f"h.*.attn.{name}")
    book.plain(f"{theirs}.norm", "h.*.attn.norm")
    book.plain(f"{theirs}.out_proj", "h.*.attn.out_proj")


def mapping(book: Book) -> Rules:
    mixer(book, "layers.*.mixer")
    book.norm("layers.*.norm", "h.*.ln_1")
    embedding = (
        "embedding.weight" if "backbone.embedding.weight" in book.names else "embeddings.weight"
    )  # in older files
    book.ends(embedding, "norm_f")
    return book.made()


UNSAID = ("n_head", "kv_heads", "head_width", "block_size")
FAMILY = Family("mamba2", "Mamba2ForCausalLM", "backbone.", reading, writing, mapping, unsaid=UNSAID)
