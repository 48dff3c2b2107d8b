"""Addresses of slices, and the one matcher for all patterns.

A slice of a parameter is `h.3.attn.qkv.weight[k]`. What an adapter adds to a part is `h.3.attn.qkv[k].lora_a`, whatever
module holds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from core.options import Invalid, opt

Labels = tuple[str, ...]

ADAPTER = "adapter"  # the name of the modules that hold what is added, followed by the part in brackets
_ADAPTER = re.compile(rf"^(.*)\.{ADAPTER}\d*(?:\[([^\]]*)\])?\.(\w+)$")
LAYER, SLASH = "L", "/"  # h.0-3/attn/qkv/weight with a label L2 first is the third layer's h.2.attn.qkv.weight
_ABOUT_ADAPTERS = "lora_"  # what the names of an adapter's parameters begin with


def is_adapter(parameter: str) -> bool:
    """Whether a parameter, by its name in the state dict, belongs to an adapter."""
    return _ADAPTER.match(parameter) is not None


def spelled(parameter: str, labels: Labels) -> tuple[str, Labels, str]:
    """The path, the labels and the address of a slice of a parameter. An adapter's module is not part of it; a layer is."""
    if SLASH in parameter:
        before, _, rest = parameter.partition(SLASH)
        layer, *inner = labels
        owner = before.rpartition(".")[0]
        parameter = f"{owner}.{layer.removeprefix(LAYER)}.{rest.replace(SLASH, '.')}"
        labels = tuple(inner)
    found = _ADAPTER.match(parameter)
    if found is None:
        return parameter, labels, f"{parameter}[{'.'.join(labels)}]" if labels else parameter
    owner, inside, leaf = found.groups()
    labels = (*labels, *(inside.split(".") if inside else ()))
    return f"{owner}.{leaf}", labels, f"{owner}[{'.'.join(labels)}].{leaf}" if labels else f"{owner}.{leaf}"


@dataclass(frozen=True)
class Pattern:
    """A compiled address pattern: `*` inside a dotted segment, `**` across, `{0..5}` numbers, `[q,v]` parts.

    Raises ValueError for brackets or braces that do not close, and empty patterns.
    """

    text: str

    def __post_init__(self) -> None:
        path, bracket = self.text, None
        if "[" in path or "]" in path:
            found = re.fullmatch(rf"([^\[\]]*)\[([^\[\]]*)\](\.{_ABOUT_ADAPTERS}[^\[\]]*)?", path)
            if found is None:
                raise ValueError(
                    f"the pattern '{self.text}' has a bracket that does not open and close once, at its end or before .lora_"
                )
            path = found.group(1) + (found.group(3) or "")  # in a bracket, dots separate labels except within {0..5}
            bracket = [re.split(r"\.(?![^{}]*\})", item.strip()) for item in found.group(2).split(",")]
            if not all(label for item in bracket for label in item):
                raise ValueError(f"the pattern '{self.text}' lists a part without a name")
        if not path:
            raise ValueError(f"the pattern '{self.text}' names no place")
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "_path", _regex(path, self.text))
        items = None if bracket is None else [[_regex(x, self.text) for x in item] for item in bracket]
        object.__setattr__(self, "_items", items)
        object.__setattr__(self, "items", tuple(".".join(item) for item in bracket or ()))

    path: str = ""
    items: tuple[str, ...] = ()  # what the bracket lists, as written

    @property
    def about_parts(self) -> bool:
        """Whether it has a bracket."""
        return self._items is not None  # type: ignore[attr-defined]

    @property
    def about_adapters(self) -> bool:
        """Whether it names what adapters add; all other patterns pass them by."""
        return self.path.rpartition(".")[2].startswith(_ABOUT_ADAPTERS)

    def matches_module(self, path: str) -> bool:
        """Whether a module's path is meant."""
        return bool(self._path.fullmatch(path))  # type: ignore[attr-defined]

    def matches_parameter(self, name: str) -> bool:
        """Whether a parameter is meant, whatever the part: without .weight or .bias that is the weight, and at the end of `**`
        everything below."""
        if is_adapter(name):
            return self.about_adapters and self.matches_module(spelled(name, ())[0])
        owner, _, last = name.rpartition(".")
        if self.about_adapters:
            return False
        if self.path.endswith(("**", ".weight", ".bias")) or last not in ("weight", "bias"):
            return self.matches_module(name)
        return last == "weight" and self.matches_module(owner)

    def matches(self, name: str, labels: Labels) -> bool:
        """Whether the slice of a parameter with these labels is meant."""
        return self.matches_parameter(name) and self.matches_labels(spelled(name, labels)[1])

    def matches_labels(self, labels: Labels) -> bool:
        items = self._items  # type: ignore[attr-defined]
        return items is None or any(_subsequence(item, labels) for item in items)

    def item_matches(self, index: int, labels: Labels) -> bool:
        """Whether one entry of the bracket means these labels."""
        return _subsequence(self._items[index], labels)  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """`Pattern(text)`, compiled once."""
    return Pattern(text)


@dataclass(frozen=True)
class Rule:
    """What every entry of a named table of rules says: where it holds. Raises Invalid for patterns that cannot be read."""

    match: str | tuple[str, ...] = opt("", "A pattern, or a list of them.")
    excepted: str | tuple[str, ...] = opt((), "Patterns of what is left out.", key="except")
    optional: bool = opt(False, "Whether the rule may match nothing.")

    def __post_init__(self) -> None:
        wrong = [] if self.patterns else [("match", "a rule needs a pattern")]
        for key, texts in (("match", self.patterns), ("except", self.exceptions)):
            for text in texts:
                try:
                    self.check(pattern(text))
                except ValueError as error:
                    wrong.append((key, str(error)))
        if wrong:
            raise Invalid(*wrong)

    def check(self, made: Pattern) -> None:
        """Raises ValueError for a pattern that such a rule cannot have."""

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.match,) if isinstance(self.match, str) and self.match else tuple(self.match)

    @property
    def exceptions(self) -> tuple[str, ...]:
        return (self.excepted,) if isinstance(self.excepted, str) else tuple(self.excepted)


def _subsequence(wanted: Sequence[re.Pattern[str]], labels: Labels) -> bool:
    rest: Iterator[str] = iter(labels)
    return all(any(pattern.fullmatch(label) for label in rest) for pattern in wanted)


def _regex(text: str, whole: str) -> re.Pattern[str]:
    if text.count("{") != text.count("}"):
        raise ValueError(f"the pattern '{whole}' has a brace that does not close")
    made = ""
    for token in re.findall(r"\{[^{}]*\}|(?:^|(?<=\.))\*\*\.|\*\*|\*|[^{}*]|[{}]", text):
        if token == "**.":  # whole segments, also none
            made += r"(?:.*\.)?"
        elif token in ("**", "*"):
            made += ".*" if token == "**" else r"[^.]*"
        elif token[0] in "{}":
            made += _numbers(token, whole)
        else:
            made += re.escape(token)
    return re.compile(made)


def _numbers(token: str, whole: str) -> str:
    found = re.fullmatch(r"\{(\d{1,5})\.\.(\d{1,5})\}", token)
    if found is None or int(found.group(1)) > int(found.group(2)):
        raise ValueError(f"the pattern '{whole}': '{token}' is not a range of numbers such as {{0..5}}")
    return "(?:" + "|".join(str(n) for n in range(int(found.group(1)), int(found.group(2)) + 1)) + ")"


def select(patterns: Iterable[str], excepted: Iterable[str], test: Callable[[Pattern], bool]) -> bool:
    """Whether any of `patterns` passes `test` and none of `excepted` does."""
    return any(test(pattern(p)) for p in patterns) and not any(test(pattern(p)) for p in excepted)
