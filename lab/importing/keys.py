"""What the options of ReaLLM-Forge's train.py are called here, and what has no counterpart.

A unit turns the options that decide one thing together into settings by dotted key. Defaults are ReaLLM-Forge's, of August 2026,
so that a combination says everything that a run of it would have had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from train_args import DataConfig

Settings = dict[str, Any]


class Unmapped(ValueError):
    """Values of these options have no counterpart."""

    def __init__(self, keys: tuple[str, ...], text: str) -> None:
        super().__init__(text)
        self.keys = keys


@dataclass
class Values:
    """The options of a unit: each its value or ReaLLM-Forge's default, which are given, and what is to be said of them."""

    values: Mapping[str, Any]
    given: Collection[str]
    corpora: Callable[[str], str]  # why a corpus cannot be used, or ''
    said: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __contains__(self, key: str) -> bool:
        return key in self.given


@dataclass(frozen=True)
class Unit:
    """Options that are looked at together, by the kind of their values and their defaults, and the settings that they make."""

    options: Mapping[str, tuple[str, Any]]
    make: Callable[[Values], Settings]


def read(kind: str, value: Any) -> Any:
    """An option's value as its command line would read it. Raises ValueError for what it refuses."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "flag":
        if isinstance(value, bool):
            return value
        raise ValueError(f"{value!r:.60} is neither true nor false")
    if kind == "words":
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, bool) or not (number or isinstance(value, str)):
        raise ValueError(f"{value!r:.60} is no {'text' if kind == 'text' else 'number'}")
    if kind == "text":
        return str(value)
    try:
        return int(str(value)) if kind == "integer" else float(value)
    except ValueError:
        raise ValueError(f"{value!r:.60} is no {'integer' if kind == 'integer' else 'number'}") from None


def _ratio(part: float, whole: float) -> float:
    return float(f"{part / whole:.12g}")


# Units ----------------------------------------------------------------------------------------------------------------------


def _plain(ours: str, theirs: str, kind: str, default: Any) -> Unit:
    return Unit({theirs: (kind, default)}, lambda v: {ours: v[theirs]})


def _choice(ours: str, theirs: str, default: str, known: Mapping[str, str]) -> Unit:
    def make(v: Values) -> Settings:
        if v[theirs] not in known:
            raise Unmapped((theirs,), f"'{v[theirs]}' has no counterpart")
        return {ours: known[v[theirs]]}

    return Unit({theirs: ("text", default)}, make)


def _norm(v: Values) -> Settings:
    names = {"rmsnorm": "rmsnorm", "layernorm": "layernorm", "identity": "none"}
    for key in ("norm_variant_attn", "norm_variant_output"):
        if v[key] not in names:
            raise Unmapped((key,), f"the norm '{v[key]}' has no counterpart")
    blocks, last = (names[v[key]] for key in ("norm_variant_attn", "norm_variant_output"))
    return {"model.norm": blocks, "model.sites.final_norm.match": "ln_f", "model.sites.final_norm.norm": last}


def _position(v: Values) -> Settings:
    if v["use_rotary_embeddings"] and v["use_abs_pos_embeddings"]:
        raise Unmapped(
            ("use_rotary_embeddings", "use_abs_pos_embeddings"), "positions are rotary or absolute here, not both"
        )
    if v["use_abs_pos_embeddings"] and v["absolute_pos_embedding_variant"] != "learned":
        text = f"absolute positions of the kind '{v['absolute_pos_embedding_variant']}' have no counterpart"
        raise Unmapped(("absolute_pos_embedding_variant",), text)
    if v["use_rotary_embeddings"] and (v["rope_variant"] != "rope" or v["rope_length"] is not None):
        raise Unmapped(("rope_variant", "rope_length"), "rotary positions here are plain ones over the whole head")
    kind = "rope" if v["use_rotary_embeddings"] else "learned" if v["use_abs_pos_embeddings"] else "none"
    return {"model.position": kind}


def _attention(v: Values) -> Settings:
    kind, width = v["attention_variant"], None
    if kind == "infinite":
        width = v["n_qk_head_dim"]
        if not v["use_concat_heads"] or width is None or width != v["n_v_head_dim"]:
            text = (
                "infinite attention is plain attention only where heads are concatenated and both head widths are equal"
            )
            raise Unmapped(("attention_variant", "use_concat_heads", "n_qk_head_dim", "n_v_head_dim"), text)
    elif kind != "causal":
        raise Unmapped(("attention_variant",), f"the attention '{kind}' has no counterpart")
    if v["use_qk_norm"]:
        v.said.append(
            "use_qk_norm: ReaLLM-Forge divides rotated queries and keys by their length; attention.qk_norm here is the model's "
            "norm, with its gain, before the rotation."
        )
    kernel = "plain" if v["disable_flash_attention"] else "fused"
    node = {"variant": "causal", "qk_norm": v["use_qk_norm"], "kernel": kernel}
    return {"model.head_dim": width, **{f"model.attention.{key}": value for key, value in node.items()}}


def _mlp(v: Values) -> Settings:
    known = {"mlp": "standard", "swiglu": "gated"}
    if v["mlp_variant"] not in known:
        raise Unmapped(("mlp_variant",), f"the MLP '{v['mlp_variant']}' has no counterpart")
    node = {"variant": known[v["mlp_variant"]], "expansion": float(v["mlp_expansion_factor"]), "width": v["mlp_size"]}
    return {f"model.mlp.{key}": value for key, value in node.items()}


def _init(v: Values) -> Settings:
    std = v["linear_std_init"]
    if std != v["embedding_std_init"]:
        raise Unmapped(("linear_std_init", "embedding_std_init"), "one standard deviation holds for all weights here")
    if std != 0.02:
        v.said.append(
            "linear_std_init: projections onto the residual stream scale with it here; ReaLLM-Forge keeps theirs."
        )
    return {"model.init.variant": "normal", "model.init.std": std}


def _length(v: Values) -> Settings:
    """What ends a run. A key that is not the limiter is without effect there."""
    limiters = v["training_limiters"]
    if limiters == ["max_tokens"] and v["max_tokens"] is not None:
        return {"train.max_iters": None, "train.max_tokens": v["max_tokens"]}
    if limiters != ["max_iters"]:
        raise Unmapped(("training_limiters",), f"a run cannot be limited by {' and '.join(limiters)} here")
    if "max_tokens" in v:
        v.said.append("max_tokens: without effect in ReaLLM-Forge where training_limiters does not name it; left out.")
    return {"train.max_iters": v["max_iters"], "train.max_tokens": None}


def _machine(v: Values) -> Settings:
    device, dtype = v["device"], v["dtype"]
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise Unmapped(("device",), f"the device '{device}' has no counterpart")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise Unmapped(("dtype",), f"the precision '{dtype}' has no counterpart")
    if "dtype" not in v:
        v.said.append("dtype: not given. ReaLLM-Forge takes float16 on a GPU then; here it is float32.")
    elif device == "cpu" and dtype != "float32":
        v.said.append(
            f"dtype: ReaLLM-Forge computes in float32 on a CPU, whatever it says ('{dtype}'); so does this file."
        )
        dtype = "float32"
    return {"train.device": device, "train.dtype": dtype}


def _dataset(v: Values) -> Settings:
    if "dataset" not in v:
        v.said.append(
            "dataset: not given. ReaLLM-Forge takes shakespeare_char then; here it is this project's own default."
        )
        return {"data.dataset": DataConfig().dataset}
    name = re.sub(r"^(\./)?data/", "", v["dataset"])
    if problem := v.corpora(name):
        raise Unmapped(
            ("dataset",),
            f"{problem}. What runs is '{DataConfig().dataset}'; prepare the corpus and import again, or set data.dataset",
        )
    return {"data.dataset": name}


def _optimizer(v: Values) -> Settings:
    kind, betas = v["optimizer"], [v["beta1"], v["beta2"]]
    node: Settings = {"variant": kind, "learning_rate": v["learning_rate"], "weight_decay": v["weight_decay"]}
    if kind == "adamw":
        if "adamw_weight_decay" in v or "weight_decay" not in v:
            node["weight_decay"] = v["adamw_weight_decay"]
        else:
            v.said.append(
                "weight_decay: ReaLLM-Forge's AdamW reads adamw_weight_decay in its place, 0.01 unless given; taken as given here."
            )
        node |= {"betas": betas, "eps": v["adamw_eps"]}
    elif kind == "lion":
        node["betas"] = betas
    elif kind == "sgd":
        node |= {"momentum": v["sgd_momentum"], "nesterov": v["sgd_nesterov"]}
    elif kind == "muon":
        rest: Settings = {"variant": "adamw", "learning_rate": "${optimizer.learning_rate}"}
        rest |= {"weight_decay": "${optimizer.weight_decay}", "betas": betas}
        node |= {
            "momentum": v["muon_momentum"],
            "nesterov": v["muon_nesterov"],
            "ns_steps": v["muon_ns_steps"],
            "rest": rest,
        }
    else:
        raise Unmapped(("optimizer",), f"the optimizer '{kind}' has no counterpart")
    return {f"optimizer.{key}": value for key, value in node.items()}


def _schedule(v: Values) -> Settings:
    """ReaLLM-Forge keeps the rate constant unless decay_lr is true; a file that gives the decay's numbers and not the switch is
    taken by what it gives, and so is lr_decay_iters without lr_decay_match_max_iters."""
    if v["lr_scheduler"] != "none":
        raise Unmapped(("lr_scheduler",), f"torch's scheduler '{v['lr_scheduler']}' has no counterpart")
    numbers = [key for key in ("warmup_iters", "lr_decay_iters", "min_lr") if key in v]
    decays = v["decay_lr"] if "decay_lr" in v else bool(numbers)
    if numbers and "decay_lr" not in v:
        v.said.append(
            f"{', '.join(numbers)}: given without decay_lr, which ReaLLM-Forge takes as false: it keeps the rate constant. "
            "This file warms up and decays; write 'schedule: constant' for what it does."
        )
    if not decays:
        if numbers:
            v.said.append(f"{', '.join(numbers)}: without effect in ReaLLM-Forge where decay_lr is false; left out.")
        return {"schedule.variant": "constant"}
    if not 0.0 <= v["min_lr"] <= v["learning_rate"] or v["learning_rate"] == 0.0:
        raise Unmapped(
            ("min_lr",), f"min_lr {v['min_lr']:g} is no fraction of the learning rate {v['learning_rate']:g}"
        )
    follows = "lr_decay_iters" not in v
    if "lr_decay_match_max_iters" in v:
        follows = v["lr_decay_match_max_iters"]
    elif not follows:
        v.said.append(
            "lr_decay_iters: ReaLLM-Forge takes max_iters unless lr_decay_match_max_iters is false; taken as given here."
        )
    node = {
        "variant": "cosine",
        "warmup_iters": v["warmup_iters"],
        "decay_iters": 1.0 if follows else v["lr_decay_iters"],
    }
    node["min_lr_ratio"] = _ratio(v["min_lr"], v["learning_rate"])
    return {f"schedule.{key}": value for key, value in node.items()}


_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "squared_relu": "relu2", "silu": "silu", "identity": "identity"}

UNITS: tuple[Unit, ...] = (
    _plain("model.n_layer", "n_layer", "integer", 6),
    _plain("model.n_head", "n_head", "integer", 6),
    _plain("model.n_kv_head", "n_kv_group", "integer", None),
    _plain("model.n_embd", "n_embd", "integer", 384),
    _plain("model.block_size", "block_size", "integer", 256),
    _plain("model.dropout", "dropout", "number", 0.0),
    _plain("model.bias", "bias", "flag", False),
    _plain("model.tie_weights", "wte_weight_tying", "flag", True),
    Unit({"norm_variant_attn": ("text", "rmsnorm"), "norm_variant_output": ("text", "rmsnorm")}, _norm),
    _choice("model.activation", "activation_variant", "gelu", _ACTIVATIONS),
    Unit(
        {
            "use_rotary_embeddings": ("flag", False),
            "use_abs_pos_embeddings": ("flag", True),
            "absolute_pos_embedding_variant": ("text", "learned"),
            "rope_variant": ("text", "rope"),
            "rope_length": ("integer", None),
        },
        _position,
    ),
    Unit(
        {
            "attention_variant": ("text", "causal"),
            "use_concat_heads": ("flag", False),
            "n_qk_head_dim": ("integer", None),
            "n_v_head_dim": ("integer", None),
            "use_qk_norm": ("flag", False),
            "disable_flash_attention": ("flag", False),
        },
        _attention,
    ),
    Unit({"mlp_variant": ("text", "mlp"), "mlp_expansion_factor": ("integer", 4), "mlp_size": ("integer", None)}, _mlp),
    Unit({"linear_std_init": ("number", 0.02), "embedding_std_init": ("number", 0.02)}, _init),
    Unit({"dataset": ("text", None)}, _dataset),
    Unit(
        {
            "max_iters": ("integer", 3500),
            "max_tokens": ("integer", None),
            "training_limiters": ("words", ["max_iters"]),
        },
        _length,
    ),
    _plain("train.batch_size", "batch_size", "integer", 64),
    _plain("train.gradient_accumulation_steps", "gradient_accumulation_steps", "integer", 1),
    Unit({"grad_clip": ("number", 1.0)}, lambda v: {"train.grad_clip": v["grad_clip"] or None}),
    _plain("train.eval_interval", "eval_interval", "integer", 250),
    _plain("train.eval_iters", "eval_iters", "integer", 200),
    _plain("train.log_interval", "log_interval", "integer", 10),
    _plain("train.seed", "seed", "integer", 1337),
    _plain("train.compile", "compile", "flag", False),
    Unit({"device": ("text", "auto"), "dtype": ("text", "float32")}, _machine),
    Unit(
        {
            "optimizer": ("text", "adamw"),
            "learning_rate": ("number", 1e-3),
            "weight_decay": ("number", 0.1),
            "adamw_weight_decay": ("number", 0.01),
            "adamw_eps": ("number", 1e-8),
            "beta1": ("number", 0.9),
            "beta2": ("number", 0.99),
            "sgd_momentum": ("number", 0.9),
            "sgd_nesterov": ("flag", False),
            "muon_momentum": ("number", 0.95),
            "muon_nesterov": ("flag", True),
            "muon_ns_steps": ("integer", 5),
        },
        _optimizer,
    ),
    Unit(
        {
            "lr_scheduler": ("text", "none"),
            "decay_lr": ("flag", False),
            "warmup_iters": ("integer", 100),
            "lr_decay_iters": ("integer", 3500),
            "lr_decay_match_max_iters": ("flag", True),
            "min_lr": ("number", 1e-4),
            "learning_rate": ("number", 1e-3),
        },
        _schedule,
    ),
)
MAPPED = frozenset(key for unit in UNITS for key in unit.options)
