"""Numbers and names as text, in one place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lab.stats import Estimate, finite


def clean(text: str) -> str:
    """`text` on one line, without control, direction and surrogate characters: terminals and pictures show it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(text: str, width: int) -> str:
    """`text` cleaned, with its middle left out where it is longer than `width`."""
    text = clean(text)
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[-(width - 1 - head) :]


def told(value: Any) -> str:
    """A swept value as text: words as they are, the rest as JSON, floats in full."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def brief(value: Any) -> str:
    """A swept value for reading: a number with at most six digits."""
    return f"{value:g}" if isinstance(value, float) and finite(value) is not None else told(value)


def last_words(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's last word, or the key itself where another one ends alike."""
    ends = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: clean(key if ends.count(end) > 1 else end) for key, end in zip(keys, ends, strict=True)}


def decimal(value: float | None, signed: bool = False) -> str:
    """A metric for reading: four decimals, fewer of large numbers, four significant digits of tiny and huge ones."""
    if value is None:
        return ""
    value += 0.0  # no minus sign before a zero
    size = abs(value)
    form = ".4f" if size == 0 or 0.0005 <= size < 100 else ".2f" if 100 <= size < 1000 else ",.0f"
    if 0 < size < 0.0005 or size >= 1e9:
        form = ".4g"
    return f"{value:{'+' if signed else ''}{form}}".replace("-", "\N{MINUS SIGN}", value < 0)


def interval(estimate: Estimate) -> str:
    """[low, high] with signs, for differences."""
    return f"[{decimal(estimate.low, True)}, {decimal(estimate.high, True)}]"


def chance(p: float | None) -> str:
    """A p-value for reading: 0.25, 0.013, 2e-05."""
    if p is None:
        return ""
    return "< 1e-15" if p < 1e-15 else f"{p:.2g}" if p < 0.0995 else f"{p:.2f}"


def equals(p: float) -> str:
    """'p = 0.013' or 'p < 1e-15'."""
    return f"p {'' if p < 1e-15 else '= '}{chance(p)}"


def percent(share: float) -> str:
    """A share for reading: 43%, 0.4%."""
    if 0 < share < 0.001:
        return "< 0.1%"
    return f"{100 * share:.0f}%" if share >= 0.0095 or share == 0 else f"{100 * share:.1f}%"


def many(count: int, noun: str) -> str:
    """'1 run', '1,204 runs'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def magnitude(value: float | None) -> str:
    """A count for reading: 123.6M."""
    if value is None:
        return ""
    for size, unit in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "B"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= size * 0.9995:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds for reading: 8.2 s, 14 min 05 s, 3 h 20 min."""
    if seconds is None:
        return ""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
