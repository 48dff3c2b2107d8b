"""Configurations as trees of plain data, before they are read: merging, values at paths, and where each of them was set.

Naming a variant replaces a node, everything else merges, and a redefined rule moves to the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from core.options import Path
from core.yaml_files import HUGGING_FACE

ORDERED_TABLES: tuple[Path, ...] = (
    ("slices",),
    ("model", "sites"),
)  # a redefined entry moves to the later file's place
TABLES: tuple[Path, ...] = (
    *ORDERED_TABLES,
    ("sweep", "grid"),
    ("sweep", "zip"),
    ("sweep", "groups"),
    ("sweep", "cases"),
)  # an entry set to null is removed
BASE: Path = ("train", "init_from")
TOKENIZER: Path = ("data", "tokenizer")
PATHS = (BASE, TOKENIZER)  # what holds a path, which, as those of plugins, is relative to the file that says it
COMMAND_LINE = "command line"


def names_variant(node: Any) -> bool:
    """Whether a node is a mapping that names a variant (a rule, a site or a case may itself be called 'variant')."""
    return isinstance(node, Mapping) and not isinstance(node.get("variant", {}), Mapping)


def merge(base: Any, over: Any, path: Path = ()) -> Any:
    """`over` laid on `base`, neither changed: a mapping merges key by key unless it names a variant."""
    if not isinstance(over, Mapping) or names_variant(over):
        return over
    if isinstance(base, str) or base is False:
        return {"variant": base, **over}  # a node that is a name, or off
    if not isinstance(base, Mapping):
        return over
    made = dict(base)
    for key, value in over.items():
        below = (*path, key)
        merged = merge(made[key], value, below) if key in made else value
        if path in ORDERED_TABLES:
            made.pop(key, None)
        made[key] = merged
    return made


def put(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A tree with `value` merged in at `path`. Branches off the path are shared with the given tree, which is left as it is."""
    head, rest = path[0], path[1:]
    if not rest:
        return {**tree, head: merge(tree.get(head), value, ("?",))}
    below = tree.get(head)
    if isinstance(below, str) or below is False:
        below = {"variant": below}
    if rest == ("variant",) and not isinstance(value, Mapping):
        return {**tree, head: {"variant": value}}
    return {**tree, head: put(below if isinstance(below, Mapping) else {}, rest, value)}


def get(tree: Any, path: Path, default: Any = None) -> Any:
    """The value at `path`, or `default`."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return default
        tree = tree[key]
    return tree


def leaves(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that a tree sets, with its path: nodes that name a variant, lists and scalars are values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not names_variant(value):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def drop_nulls(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree without the rules, sites, axes and cases that were set to null."""
    for path in TABLES:
        table = get(tree, path)
        if isinstance(table, Mapping) and any(v is None for v in table.values()):
            kept = {k: v for k, v in table.items() if v is not None}
            tree = replaced(tree, path, kept)
    return tree


def replaced(tree: Mapping[str, Any], path: Path, value: Any) -> Mapping[str, Any]:
    """A tree with another value at a path that it has, instead of what is there."""
    if len(path) == 1:
        return {**tree, path[0]: value}
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)}


def path_in(key: Path, value: Any) -> tuple[str, str] | None:
    """The prefix, 'hf:' or none, and the path that a value of a key holds; None where it holds none.

    A tokenizer is a path after the prefix alone: else it is a name.
    """
    if key not in PATHS or not isinstance(value, str) or not value:
        return None
    prefix = HUGGING_FACE if value.startswith(HUGGING_FACE) else ""
    return (prefix, value.removeprefix(prefix)) if prefix or key != TOKENIZER else None


@dataclass
class Composed:
    """Merged files: the tree, where each key was last set, the folder that plugins are relative to."""

    tree: dict[str, Any]
    places: dict[Path, str]
    folder: File
    packages: set[str] = field(default_factory=set)  # where files without a package header landed
    file: str | None = None  # the place of what is written nowhere

    def place(self, path: Path) -> str | None:
        """'file:line' of a key, of one inside it (the command line sets single keys), or of the nearest above it; else the file."""
        if path not in self.places:
            inside = [place for below, place in self.places.items() if below[: len(path)] == path]
            if path and inside:
                return inside[-1]
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.file


@dataclass(frozen=True)
class Setting:
    """One word of the command line: a value for a key, or several (an axis)."""

    path: Path
    values: tuple[Any, ...]
    axis: bool
    word: str
