"""What cells, conditions and values are called: in folders' names, on the terminal and in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab.sweep import SEED, Match


def in_words(labels: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """Labels in words: the case's name first, then each key by its short name. A cell has no seed."""
    words = [str(labels["case"])] if "case" in labels else []
    words += [f"{short[k]}={told(v)}" for k, v in labels.items() if k not in ("case", SEED)]
    return ", ".join(words) or "default"


def condition(match: Match) -> str:
    """A match in words."""
    return ", ".join(f"{k}: {told(v)}" for k, v in match.items())


def told(value: Any) -> str:
    """A value as files write it, on one line; a long number with six significant digits."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}={told(v)}" for k, v in value.items() if k != "variant")
        return f"{value['variant']}({inner})" if "variant" in value else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(told(v) for v in value)}]"
    if isinstance(value, float) and len(str(value)) > 8:
        return f"{value:.6g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest suffix of whole segments that no other key ends in."""
    made = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            suffix = ".".join(parts[-n:])
            if sum(k == suffix or k.endswith(f".{suffix}") for k in keys) == 1:
                break
        made[key] = suffix
    return made
