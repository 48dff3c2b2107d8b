"""References: `${a.b}` in a tree stands for what another key holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from core.options import MISSING, Mistake, Path, nearest

MAX_LOOKUPS = 10_000  # references to references multiply: forty lines can mean 2^40 values
MAX_TRAIL = 40
MAX_TEXT = 100_000
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


def has_references(value: Any) -> bool:
    """Whether any text in a tree refers to another key."""
    if isinstance(value, Mapping):
        return any(has_references(v) for v in value.values())
    if isinstance(value, list):
        return any(has_references(v) for v in value)
    return isinstance(value, str) and "${" in value


class _Wrong(ValueError):
    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.advice = advice


def resolve(tree: Mapping[str, Any], default: Callable[[Path], Any]) -> tuple[dict[str, Any], list[Mistake]]:
    """The tree with every `${a.b}` (or `${.b}`, beside it) replaced by what it names, and what could not be.

    A value that is one reference takes the other's type; inside text it is written out. A key that the tree does not set has its
    option's default: `default(path)`, or MISSING. Resolvers (`${name:...}`) are refused. Parts without references are not copied.
    """
    resolver = _Resolver(tree, default)
    return resolver.walk(tree, (), ()), resolver.mistakes


class _Resolver:
    def __init__(self, tree: Mapping[str, Any], default: Callable[[Path], Any]) -> None:
        self.tree, self.default = tree, default
        self.mistakes: list[Mistake] = []
        self.lookups = 0

    def walk(self, value: Any, path: Path, trail: tuple[Path, ...]) -> Any:
        """`value`, which stands at `path`, with its references replaced. `trail` holds those that led here."""
        if isinstance(value, str):
            return self.text(value, path, trail) if "${" in value else value
        if isinstance(value, Mapping):
            made = {k: self.walk(v, (*path, k), trail) for k, v in value.items()}
            return value if all(made[k] is value[k] for k in value) else made
        if isinstance(value, list):
            items = [self.walk(v, (*path, str(i)), trail) for i, v in enumerate(value)]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        return value

    def text(self, value: str, path: Path, trail: tuple[Path, ...]) -> Any:
        whole = _REFERENCE.fullmatch(value)
        try:
            if whole:
                return self.lookup(whole.group(1), path, trail)
            made = _REFERENCE.sub(lambda m: _written(self.lookup(m.group(1), path, trail)), value)
            if "${" in made:
                raise _Wrong(f"{value!r} has a reference that does not close or stands inside another")
            if len(made) > MAX_TEXT:
                raise _Wrong("the text grows without end")
            return made
        except _Wrong as error:
            self.mistakes.append(Mistake(path, str(error), error.advice))
            return None

    def lookup(self, reference: str, path: Path, trail: tuple[Path, ...]) -> Any:
        if ":" in reference:
            raise _Wrong(f"'${{{reference}}}' is not allowed", "Only keys of the configuration can be referred to.")
        dots = len(reference) - len(reference.lstrip("."))
        target = (*(path[: len(path) - dots] if dots else ()), *reference[dots:].split("."))
        self.lookups += 1
        if target in trail:
            raise _Wrong(f"'${{{reference}}}' refers to itself")
        if self.lookups > MAX_LOOKUPS or len(trail) > MAX_TRAIL:
            raise _Wrong("the references lead through too many others")
        return self.at(target, reference, (*trail, target))

    def at(self, target: Path, reference: str, trail: tuple[Path, ...]) -> Any:
        value: Any = self.tree
        for i, key in enumerate(target):
            if isinstance(value, str) and "${" in value:  # a section that is itself a reference
                value = self.text(value, target[:i], trail)
            if isinstance(value, str) and key == "variant":
                continue
            if not isinstance(value, Mapping) or key not in value:
                found = self.default(target)
                if found is not MISSING:
                    return found
                known = [".".join((*target[:i], k)) for k in value] if isinstance(value, Mapping) else []
                raise _Wrong(f"'${{{reference}}}' names nothing", nearest(".".join(target), known))
            value = value[key]
        return self.walk(value, target, trail)


def _written(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
