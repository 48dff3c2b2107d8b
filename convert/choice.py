"""Which kind each weight of a model is: by what users registered, our declarations, a module's attributes, its type, its name.

What none of these tells is refused and not guessed: a fused weight divided as if it were one is a wrong model that loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from convert.kinds import KINDS, Weight
from convert.mapping import matches
from core.addresses import is_adapter
from core.layout import Layout
from core.slices import Declaration
from core.weights import weights
from variations.attention.delta import DeltaRule
from variations.attention.mamba2 import Mamba2
from variations.norm import NORMS

How = Callable[[str, nn.Module, Tensor], Weight | None]

# The last word of a linear map's path, as published models have it.
COLUMN = re.compile(r"(q|k|v|gate|up)_proj|fc_?1|wi|w1|w3|linear_q")
ROW = re.compile(r"(o|out|down|c)_proj|proj|fc_?2|wo|w2|linear_fc2|linear_proj|dense_4h_to_h")
FUSED = re.compile(
    r"(qkv|kv|gate_up|in|Wqkv|c_attn)(_proj)?|query_key_value|linear_qkv|linear_kv|linear_qkvz|in_proj\w*"
)
HEADS = re.compile(r"(q|k|v|o)_proj|linear_q|linear_proj|wo")
TOKENS = re.compile(r"embed_tokens|wte|word_embeddings|tok_embeddings|lm_head|output_layer|head")
POSITIONS = re.compile(r"wpe|position_embeddings|embed_positions")
ADVICE = "Say so with convert.choice.register(module class or pattern of names, kind or function that makes a Weight)"


class Unknown(ValueError):
    """Weights of which nothing tells their kind. The message lists all."""


class _Unclear(Exception):
    """Why the kind of a weight cannot be told."""


# What users say ------------------------------------------------------------------------------------------------------------

_REGISTERED: list[tuple[type | str, str | How]] = []  # the last first


def register(what: type | str, how: str | How) -> None:
    """Says of which kind weights are.

    what: a module class or its name, for all weights in modules of it and inside them, or a pattern of weights' names, which has a
    dot or a wildcard. how: a kind, or a function of a name, the module and the tensor; of a class, the name is the one inside the
    module, else the whole. What it returns is the weight, or None where it has nothing to say. What was said last holds.
    Raises ValueError for a kind that there is not.
    """
    if isinstance(how, str) and how not in KINDS:
        told = f"there is no kind '{how}'; known are {', '.join(sorted(KINDS))}"
        raise ValueError(
            f"{told}. Another one is a function of a Weight and a number of ranks, put into convert.kinds.KINDS."
        )
    _REGISTERED.insert(0, (what, how))


def choose(model: nn.Module, multiple: int = 1) -> dict[str, Weight]:
    """How each tensor of a model lies on ranks, by name; tied ones once. The model has them in full, and may be without memory.

    multiple: rows of vocabularies are filled up to a multiple of it on each rank. Raises Unknown for all of which it is unclear.
    """
    made, wrong = dict[str, Weight](), list[str]()
    for name, tensor in weights(model).items():
        try:
            found = _find(model, name, tensor)
        except _Unclear as why:
            wrong.append(f"{name} {list(tensor.shape)}: {why}.")
            continue
        made[name] = replace(
            found, dtype=tensor.dtype, multiple=multiple if found.kind == "vocabulary" else found.multiple
        )
    if wrong:
        raise Unknown("\n".join(["How these weights lie on ranks cannot be told.", *wrong, f"{ADVICE}."]))
    return made


def _find(model: nn.Module, name: str, tensor: Tensor) -> Weight:
    *path, leaf = name.split(".")
    chain = [model]  # the modules that the weight is in, its own the last
    for word in path:
        chain.append(chain[-1].get_submodule(word))
    for what, how in _REGISTERED:
        for inside, module in _registered(what, name, chain):
            found = Weight(tuple(tensor.shape), how) if isinstance(how, str) else how(inside, module, tensor)
            if found is not None:
                return found
    declared: dict[str, Declaration] = chain[-1].__dict__.get("declarations", {})
    if leaf in declared:
        return _declared(name, chain[-1], tensor, declared[leaf])
    if leaf in chain[-1]._buffers:
        return Weight(tuple(tensor.shape), "replicated")
    if any("experts" in segment for segment in path):
        raise _Unclear("experts are divided among ranks of their own, and nothing tells how they lie")
    return _foreign(chain, path[-1] if path else "", leaf, tensor)


def _registered(what: type | str, name: str, chain: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The innermost module that a registration is about, and the weight's name from there; none where it is about others."""
    if isinstance(what, str) and ("." in what or "*" in what):
        return [(name, chain[-1])] if matches(what, name) is not None else []
    words = name.split(".")
    for depth in reversed(range(len(chain))):
        types = type(chain[depth]).__mro__
        if what in types or what in [t.__name__ for t in types]:
            return [(".".join(words[depth:]), chain[depth])]
    return []


# Our models ----------------------------------------------------------------------------------------------------------------


def _declared(name: str, owner: nn.Module, tensor: Tensor, what: Declaration) -> Weight:
    """By its declaration: a map onto the residual stream divides its inputs, any other its outputs, and a vector follows the weight
    beside it."""
    if is_adapter(name):
        raise _Unclear("it is an adapter's; merge adapters first")
    whole = Weight(tuple(tensor.shape), "replicated")
    if name in ("wte.weight", "head.weight"):
        return replace(whole, kind="vocabulary")
    if what.role == "embedding" or isinstance(owner, tuple(NORMS.values())):
        return whole  # of positions, of what embeddings add, of a router; of a norm
    beside: Declaration = owner.__dict__["declarations"].get("weight", what)
    if what.role == "vector" and beside.role == "vector":
        raise _Unclear(f"it is a vector of {type(owner).__name__}, and no weight beside it tells")
    # Heads stay whole. There may be fewer for keys and values than ranks, which then share them.
    parts = [part for part, _ in what.layout.parts] or [""]
    units = dict.fromkeys(parts, beside.blocks[1]) if beside.blocks else {}
    shared = tuple(part for part in parts if beside.blocks and part in ("k", "v"))
    experts = len(what.layout.stack) - 1 - tensor.dim() if getattr(owner, "experts", 0) else None
    whole = replace(whole, units=units, shared=shared, experts=experts)
    layout = replace(what.layout, stack=())
    if beside.residual == 1:
        return replace(whole, kind="column", layout=layout)
    return replace(whole, kind="row", layout=replace(layout, dim=-1)) if what.role != "vector" else whole


def _mixing(
    name: str, module: nn.Module, tensor: Tensor, units: dict[str, int], shared: tuple[str, ...], norm: bool
) -> Weight | None:
    """The weights of a mixer with a state, whose heads are divided. norm: whether its norm has a gain for every channel."""
    *path, leaf = name.split(".")
    owner = module.get_submodule(".".join(path))
    what = owner.__dict__.get("declarations", {}).get(leaf)
    if what is None or is_adapter(name):
        return None
    whole = Weight(tuple(tensor.shape), "column", units=units)
    if owner is module:
        return replace(whole, units={})  # a number for each head
    if isinstance(owner, tuple(NORMS.values())):
        return whole if norm else replace(whole, kind="replicated", units={})
    if owner.__dict__["declarations"].get("weight", what).residual == 1:
        return replace(whole, layout=replace(what.layout, stack=()), shared=shared)
    if what.role == "vector":
        return replace(whole, kind="replicated", units={})  # a bias is added once
    return replace(whole, kind="row", layout=replace(what.layout, dim=-1, stack=()))


def _mamba2(name: str, module: nn.Module, tensor: Tensor) -> Weight | None:
    assert isinstance(module, Mamba2)
    units = {"": module.width, "z": module.width, "x": module.width, "B": module.state, "C": module.state}
    return _mixing(name, module, tensor, units, ("B", "C"), norm=True)


def _delta(name: str, module: nn.Module, tensor: Tensor) -> Weight | None:
    assert isinstance(module, DeltaRule)
    width = module.values // module.heads
    units = {"": width, "q": module.width, "k": module.width, "v": width, "gate": width}
    return _mixing(name, module, tensor, units, (), norm=False)


_REGISTERED += [(Mamba2, _mamba2), (DeltaRule, _delta)]


# Other modules -------------------------------------------------------------------------------------------------------------


def _foreign(chain: list[nn.Module], word: str, leaf: str, tensor: Tensor) -> Weight:
    """By what Megatron writes on parameters, by the module's type, and of a plain linear map by the last word of its path."""
    owner = chain[-1]
    whole = Weight(tuple(tensor.shape), "replicated")
    types = [t.__name__ for t in type(owner).__mro__]
    linear = isinstance(owner, nn.Linear) or any("ParallelLinear" in t for t in types)
    if leaf.startswith("layer_norm_") or any("Norm" in t for t in types[:1]):
        return whole  # some linear maps hold the norm before them
    if linear and FUSED.fullmatch(word):
        raise _Unclear(
            f"'{word}' is several weights in one, each to be divided by itself, and nothing tells their sizes"
        )
    own = getattr(owner, leaf)
    if hasattr(own, "tensor_model_parallel"):
        return _marked(whole, own)
    for part, kind in (
        ("ColumnParallelLinear", "column"),
        ("RowParallelLinear", "row"),
        ("VocabParallel", "vocabulary"),
    ):
        if any(part in t for t in types):
            return whole if kind == "row" and leaf == "bias" else replace(whole, kind=kind)
    if TOKENS.fullmatch(word):
        return replace(whole, kind="vocabulary")
    if isinstance(owner, nn.Embedding) and POSITIONS.fullmatch(word):
        return whole
    if not isinstance(owner, nn.Linear):
        raise _Unclear(f"nothing is known of {type(owner).__name__}")
    if ROW.fullmatch(word) and leaf == "bias":
        return whole
    units = _heads(chain, word) if HEADS.fullmatch(word) else {}
    if COLUMN.fullmatch(word):
        return replace(whole, kind="column", units=units, shared=("",) if word[0] in "kv" else ())
    if ROW.fullmatch(word):
        return replace(whole, kind="row", units=units)
    raise _Unclear(f"a linear map named '{word}' may divide its outputs, its inputs or nothing")


def _marked(whole: Weight, own: Tensor) -> Weight:
    """By the attributes `tensor_model_parallel`, `partition_dim` and `partition_stride`, the parts of equal size that are fused."""
    if not getattr(own, "tensor_model_parallel", False):
        return whole
    dim = getattr(own, "partition_dim", 0) - own.dim()
    parts = getattr(own, "partition_stride", 1)
    sizes = tuple((f"part{i}", own.shape[dim] // parts) for i in range(parts)) if parts > 1 else ()
    return replace(whole, kind="row" if dim == -1 and own.dim() > 1 else "column", layout=Layout(sizes, dim))


def _heads(chain: list[nn.Module], word: str) -> dict[str, int]:
    """The width of a head, which the attention around its linear maps knows."""
    width = getattr(chain[-2], "head_dim", None) if len(chain) > 1 else None
    if not isinstance(width, int):
        raise _Unclear(f"heads stay whole, and what is around '{word}' has no attribute head_dim")
    return {"": width}
