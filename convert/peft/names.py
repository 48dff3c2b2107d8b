"""PEFT's names: of tensors in its files, of what its configuration says, and how it finds what a pattern means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convert.peft.pieces import Scale
from convert.peft.places import WEIGHT, Places

PREFIX, WRAPPED = "base_model.model.", ".base_layer"


def module(name: str) -> str:
    """The module that PEFT wraps for a weight: a linear map, or what has the parameter."""
    return name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else name.rpartition(".")[0]


def key(name: str, made: Sequence[str]) -> str:
    """What the names of a weight's adapter begin with, where these weights have adapters. Several parameters of one module are
    wrapped one around another, the last one outermost."""
    path = module(name)
    beside = [other for other in made if module(other) == path]
    return f"{PREFIX}{path}{WRAPPED * (len(beside) - 1 - beside.index(name))}"


def shortest(some: Iterable[str], every: Iterable[str]) -> list[str]:
    """Endings of dotted names that stand for just these of all of them."""
    wanted, left = set(some), dict.fromkeys(some)
    others = set(every) - wanted
    found = []
    while left:
        words = next(iter(left)).split(".")
        endings = (".".join(words[-n:]) for n in range(1, len(words)) if not words[-n].isdecimal())
        ending = next((e for e in endings if not any(_ends(name, e) for name in others)), ".".join(words))
        found.append(ending)
        left = {name: None for name in left if not _ends(name, ending)}
    return found


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def at(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What patterns say of a module or a parameter: the first that matches at its end. Raises ValueError for what is no pattern."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a pattern: {error}.") from None
    return default


def number(value: float) -> float:
    """A whole number as one."""
    return int(value) if float(value).is_integer() else float(value)


def config_of(
    scales: Mapping[str, Scale], places: Places, *, rslora: bool, dora: bool, dropout: float, transposed: bool
) -> dict[str, Any]:
    """adapter_config.json for adapters by name of the weight. What most of them have is said once, the rest by patterns."""
    modules = {name: module(name) for name in scales if not places.is_parameter(name)}
    parameters = [name for name in scales if places.is_parameter(name)]
    every = [*dict.fromkeys(module(name) for name in places.names()), *places.names()]
    labels = {name: modules.get(name, name) for name in scales}
    rank = Counter(scale.rank for scale in scales.values()).most_common(1)[0][0]
    alpha = Counter(scale.alpha for scale in scales.values() if scale.rank == rank).most_common(1)[0][0]

    def patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
        by_value: dict[float, list[str]] = {}
        for name, value in values.items():
            by_value.setdefault(value, []).append(labels[name])
        rest = {v: some for v, some in by_value.items() if v != usual}
        return {re.escape(e): number(v) for v, some in rest.items() for e in shortest(some, every)}

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": None,
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": dropout,
        "fan_in_fan_out": transposed,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": shortest(modules.values(), every),
        "target_parameters": shortest(parameters, every) or None,
        "rank_pattern": patterns({name: scale.rank for name, scale in scales.items()}, rank),
        "alpha_pattern": patterns({name: scale.alpha for name, scale in scales.items()}, alpha),
    }
