"""Rotary positions as config.json says them, today in `rope_parameters`, formerly in `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours

# Their names of each kind and of its numbers, and ours. A number that may be left out has its usual value beside it.
TYPES = {"default": "rope", "linear": "rope_linear", "llama3": "rope_llama3", "yarn": "yarn", "longrope": "longrope"}
NAMES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")},
    "yarn": {name: name for name in ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")},
    "longrope": {
        "factor": "factor",
        "attention_factor": "attention_factor",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    },
}
USUAL: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}
LENGTH = "original_max_position_embeddings"


def read_rope(
    keys: Keys,
    positions: int,
    *,
    base: float = 1e4,
    fraction: float = 1.0,
    partial: bool = False,
    kinds: Sequence[str] = tuple(TYPES),
) -> dict[str, Any]:
    """Our `position` node. positions: the longest context, which is the original one where none is said; partial: whether the
    family turns a part of a head where it is asked to, of which `fraction` is the usual size; kinds: what it knows."""
    base = keys.take("rope_theta", base)
    fraction = keys.take("partial_rotary_factor", fraction)
    found = keys.take("rope_parameters", {})
    found = keys.take("rope_scaling", {}) or found
    said = {name: value for name, value in found.items() if value is not None}
    kind = said.pop("rope_type", said.get("type", "default"))
    said.pop("type", None)
    if kind not in kinds:
        keys.wrong.append(f"rope_parameters.rope_type is {kind!r}, and it can be {', '.join(kinds)}.")
        return {"variant": "rope"}
    node = {"variant": TYPES[kind], "base": said.pop("rope_theta", base)}
    fraction = said.pop("partial_rotary_factor", fraction)
    if fraction != 1.0 and (partial or kind != "default"):
        node["fraction"] = fraction
    elif fraction != 1.0:
        keys.wrong.append(f"partial_rotary_factor is {fraction!r}, and a '{keys.family}' turns whole heads.")
    length = said.pop(LENGTH, positions)
    length = keys.take(LENGTH, length)
    if kind not in ("default", "linear"):
        node["original_length"] = length
    if kind in ("longrope", "yarn"):
        said.setdefault("factor", positions / length)
    if kind == "yarn":
        _attention_factor(said)
    for theirs, ours in NAMES[kind].items():
        if theirs in said:
            node[ours] = said.pop(theirs)
        elif theirs in USUAL:
            node |= {} if USUAL[theirs] is None else {ours: USUAL[theirs]}
        else:
            keys.wrong.append(f"rope_parameters.{theirs} is missing, and '{kind}' needs it.")
    keys.wrong += [f"rope_parameters.{name} is {value!r}, which is not known here." for name, value in said.items()]
    return node


def _attention_factor(said: dict[str, Any]) -> None:
    """The number that `mscale` and `mscale_all_dim` stand for (DeepSeek's form of YaRN)."""
    scales = said.pop("mscale", None), said.pop("mscale_all_dim", None)
    if said.get("attention_factor") is None and all(scales) and said.get("factor", 1.0) > 1:
        above, below = (0.1 * scale * math.log(said["factor"]) + 1.0 for scale in scales)
        said["attention_factor"] = above / below


def write_rope(ours: Ours) -> dict[str, Any]:
    """`rope_parameters`, and nothing where there is no rope."""
    path = next((p for p, (kind, _) in ours.nodes.items() if kind == "position" and p != "wpe"), "")
    kind = {ours: theirs for theirs, ours in TYPES.items()}.get(ours.name(path))
    if kind is None:
        return {}
    said: dict[str, Any] = {"rope_type": kind, "rope_theta": ours.option(path, "base")}
    if (fraction := ours.option(path, "fraction", 1.0)) != 1.0:
        said["partial_rotary_factor"] = fraction
    for theirs, own in NAMES[kind].items():
        value = ours.option(path, own)
        if value is not None:
            said[theirs] = list(value) if isinstance(value, tuple) else value
    if kind not in ("default", "linear"):
        said[LENGTH] = ours.option(path, "original_length")
    return {"rope_parameters": said}
