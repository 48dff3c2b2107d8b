"""What the decoders after Llama share: sizes, attention of separate queries, keys and values, gated MLPs, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convert.huggingface.family import Book
from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours
from convert.huggingface.rope import read_rope, write_rope
from convert.mapping import Rules
from convert.steps import Join

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "linear": "identity",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
}
NORM = "rms_norm_eps"


def activation(ours: Ours, path: str, usual: str) -> str:
    """Their word for the activation at a place; the usual one where there are several words for it, or none."""
    found = [theirs for theirs, own in ACTIVATIONS.items() if own == ours.name(path)]
    return usual if usual in found or not found else found[0]


def dropout(keys: Keys, names: Sequence[str], usual: float) -> float:
    """The one probability of all dropouts, as ours have one."""
    found = {name: keys.take(name, usual) for name in names}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name} is {value}" for name, value in found.items())
        keys.wrong.append(f"{told}: our models have one dropout for all places.")
    return float(next(iter(found.values())))


# Configurations ------------------------------------------------------------------------------------------------------------


def sizes(keys: Keys, *, positions: int, kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """Sizes and what goes with them. Numbers given are what a key is where it is left out."""
    width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    head = keys.size("head_dim", head_dim or max(1, width // heads))
    return {
        "n_layer": keys.size("num_hidden_layers"),
        "n_head": heads,
        "n_embd": width,
        "n_kv_head": keys.size("num_key_value_heads", kv_heads or heads),
        "head_dim": head,
        "block_size": keys.size("max_position_embeddings", positions),
        "vocab_size": keys.size("vocab_size"),
    }


def read_decoder(
    keys: Keys, sizes: dict[str, Any], *, eps: float = 1e-6, act: str = "silu", tied: bool = False, **rope: Any
) -> dict[str, Any]:
    """Our model node, of gated MLPs and RMSNorms; rope: what `read_rope` is told."""
    keys.only("attention_dropout", 0.0, why="our dropout is one for all places")
    biases = keys.take("mlp_bias", False), keys.take("attention_bias", False)
    attention: dict[str, Any] = {"variant": "causal"}
    if biases[0] != biases[1]:
        attention |= {"qkv_bias": biases[1], "proj_bias": biases[1]}
    return {
        **sizes,
        "bias": biases[0],
        "tie_weights": keys.take("tie_word_embeddings", tied),
        "norm": {"variant": "rmsnorm", "eps": keys.take(NORM, eps)},
        "activation": keys.choice("hidden_act", act, ACTIVATIONS),
        "position": read_rope(keys, sizes["block_size"], **rope),
        "attention": attention,
        "mlp": {"variant": "gated", "width": keys.size("intermediate_size")},
    }


def write_decoder(ours: Ours, act: str = "silu", act_at: str = "h.0.mlp.act") -> dict[str, Any]:
    """The keys of `read_decoder`."""
    c = ours.config
    return {
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "vocab_size": c.vocab_size,
        "intermediate_size": ours.shape("h.*.mlp.down.weight")[-1],
        "max_position_embeddings": c.block_size,
        "attention_dropout": 0.0,
        "tie_word_embeddings": c.tie_weights,
        NORM: ours.option("ln_f", "eps", 1e-6),
        "hidden_act": activation(ours, act_at, act),
        **write_rope(ours),
    }


def write_biases(ours: Ours) -> dict[str, Any]:
    """Whether attention and MLP have biases."""
    return {
        "attention_bias": bool(ours.named("h.*.attn.qkv.bias")),
        "mlp_bias": bool(ours.named("h.*.mlp.gate_up.bias")),
    }


def windows(ours: Ours) -> list[int | None]:
    """The window of every layer's attention."""
    return [ours.option(f"h.{i}.attn", "window") for i in range(ours.config.n_layer)]


# Weights -------------------------------------------------------------------------------------------------------------------


def separate_attention(book: Book, theirs: str = "layers.*.self_attn") -> None:
    book.parts({x: f"{theirs}.{x}_proj" for x in "qkv"}, "h.*.attn.qkv")
    book.plain(f"{theirs}.o_proj", "h.*.attn.proj")
    book.norm(f"{theirs}.q_norm", "h.*.attn.q_norm")
    book.norm(f"{theirs}.k_norm", "h.*.attn.k_norm")


def separate_mlp(book: Book, theirs: str = "layers.*.mlp", layer: str = "*") -> None:
    """Gated MLPs, of all layers or of one."""
    theirs = theirs.replace("*", layer)
    book.parts({x: f"{theirs}.{x}_proj" for x in ("gate", "up")}, f"h.{layer}.mlp.gate_up")
    book.plain(f"{theirs}.down_proj", f"h.{layer}.mlp.down")


def experts(book: Book, theirs: str, fused: str, words: Mapping[str, str], layer: str = "*") -> None:
    """A router and its experts, of all layers or of one: one tensor for each expert, or where a folder has that, one stack for all,
    below `fused`. words: their names of gate, up and down."""
    theirs, fused = (where.replace("*", layer) for where in (theirs, fused))
    stacked = any(name.endswith(".experts.gate_up_proj") for name in book.names)
    book.plain(f"{fused if stacked else theirs}.gate", f"h.{layer}.mlp.router")
    first, last = (f"h.{layer}.mlp.{name}.weight" for name in ("gate_up", "down"))
    if stacked:
        book.add(f"{fused}.experts.gate_up_proj", first)
        book.add(f"{fused}.experts.down_proj", last)
    elif book.ours.named(first):
        layout = book.ours.layout(first)
        labels = layout.labels()  # expert by expert, its parts in their order
        book.add([f"{theirs}.experts.{e}.{words[part]}.weight" for e, part in labels], first, Join(layout))
        names = [f"{theirs}.experts.{e}.{words['down']}.weight" for e in layout.stack[0]]
        book.add(names, last, Join(book.ours.layout(last)))


def decoder(book: Book) -> Rules:
    """Llama's names."""
    separate_attention(book)
    separate_mlp(book)
    return finished(book)


def finished(book: Book, second: str = "post_attention_layernorm", last: str = "norm") -> Rules:
    """The rest of a decoder: its norms and ends."""
    book.norm("layers.*.input_layernorm", "h.*.ln_1")
    book.norm(f"layers.*.{second}", "h.*.ln_2")
    book.ends("embed_tokens.weight", last)
    return book.made("layers.*.self_attn.rotary_emb.inv_freq")
