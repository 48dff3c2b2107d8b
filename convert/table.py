"""What went where, as a table for people: layers that are alike in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from convert.mapping import Mapped
from convert.steps import shape

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def lines(mapped: Mapped) -> list[str]:
    """A line for each kind of move: how often, from which names and shapes, to which."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for move in dict.fromkeys(mapped.moves.values()):
        before = [shape(mapped.source.meta(name)) for name in move.source]
        after = [shape(mapped.meta(name)) for name in move.target]
        told = (together(move.source), _shapes(before), together(move.target), _shapes(after))
        counts[told] = counts.get(told, 0) + 1
    columns = [(f"{count} x" if count > 1 else "", *told) for told, count in counts.items()]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    made = []
    for often, *words in columns:
        source, sizes, target, made_sizes = (word.ljust(n) for word, n in zip(words, widths[1:], strict=True))
        made.append(f"{often.rjust(widths[0])}  {source}  {sizes}  ->  {target}  {made_sizes}".rstrip())
    return made


def together(names: Sequence[str]) -> str:
    """Names in one word: numbers of layers and experts as `*`, what differs in braces."""
    general = list(dict.fromkeys(NUMBER.sub("*", name) for name in names))
    if len(general) == 1:
        return general[0]
    split = [name.split(".") for name in general]
    if len({len(words) for words in split}) > 1:
        return ", ".join(general)
    each = [list(dict.fromkeys(words)) for words in zip(*split, strict=True)]
    if sum(len(words) > 1 for words in each) != 1:
        return ", ".join(general)
    return ".".join(words[0] if len(words) == 1 else "{" + ",".join(words) + "}" for words in each)


def _shapes(shapes: Iterable[Sequence[int]]) -> str:
    """Shapes in one word: several that are alike with their number."""
    counts: dict[str, int] = {}
    for one in shapes:
        told = " x ".join(map(str, one)) or "one number"
        counts[told] = counts.get(told, 0) + 1
    return " + ".join(f"{count} of {told}" if count > 1 else told for told, count in counts.items())
