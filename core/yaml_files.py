"""YAML (and JSON) files as plain trees that remember the line of every key.

Safe by construction: only scalars, lists and mappings come out; aliases are expanded under a bound, cycles and duplicate keys are
refused, timestamps stay text and `1e-3` is a number (plain YAML 1.1 reads it as text).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from core.options import Path

MAX_NODES = 200_000  # aliases expand: a kilobyte of nested anchors can mean billions of values
MAX_BYTES = 4_000_000
MAX_DEPTH = 60


class ConfigError(ValueError):
    """The configuration is wrong. `sentences` has one for every mistake."""

    def __init__(self, *sentences: str) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = list(sentences)


@dataclass
class Loaded:
    """A file's tree; `places` gives 'file:line' of every key path; `package` is Hydra's header, if any."""

    tree: dict[str, Any]
    places: dict[Path, str]
    package: str | None = None


class _Scalars(yaml.SafeLoader):
    """PyYAML's safe scalars with OmegaConf's numbers and without dates."""


_Scalars.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in pairs
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Scalars.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def shown(path: str | os.PathLike[str]) -> str:
    """A path as people type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith("..") else relative


@dataclass
class _Builder:
    """Turns a node graph into plain values, counting what aliases expand to."""

    name: str
    loader: yaml.SafeLoader
    places: dict[Path, str] = field(default_factory=dict)
    nodes: int = 0
    open: list[int] = field(default_factory=list)

    def fail(self, node: yaml.Node, text: str) -> ConfigError:
        return ConfigError(f"{text} ({self.place(node)}).")

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail(node, f"the file's aliases expand to more than {MAX_NODES:,} values")
        if id(node) in self.open:
            raise self.fail(node, f"{'.'.join(path)}: an alias refers to a node that contains it")
        if len(self.open) > MAX_DEPTH:
            raise self.fail(node, f"nested deeper than {MAX_DEPTH} levels")
        self.open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                self.places.setdefault(path, self.place(node))
                return [self.build(item, (*path, str(i))) for i, item in enumerate(node.value)]
            return self.scalar(node)
        finally:
            self.open.pop()

    def scalar(self, node: yaml.Node) -> Any:
        if node.tag.startswith("!") or "python" in node.tag:
            raise self.fail(node, f"the tag '{node.tag}' is not allowed: a configuration holds plain values")
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fail(node, f"'{node.value}' cannot be read: {error}") from None

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        made: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for extra in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = self.build(extra, path)
                    if not isinstance(merged, dict):
                        raise self.fail(extra, "'<<' merges mappings only")
                    made = {**merged, **made}
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be a word or a number")
            name = key.value
            if name in lines:
                raise self.fail(key, f"{'.'.join((*path, name))}: the key is given twice, first at {lines[name]}")
            lines[name] = self.place(key)
            self.places[(*path, name)] = lines[name]
            made[name] = self.build(value, (*path, name))
        return made


def load_text(text: str, name: str) -> Loaded:
    """Parses YAML text. `name` is the file's name in messages. Raises ConfigError, with line, for what is not plain YAML."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES:,} bytes.")
    loader = _Scalars(text)
    try:
        root = loader.get_single_node()
        builder = _Builder(name, loader)
        tree = {} if root is None else builder.build(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            f"{error.problem or error} ({name}:{mark.line + 1 if mark else 1}). This is not valid YAML."
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}:1: a configuration is a mapping of keys, not {type(tree).__name__}.")
    header = re.match(r"(?:\s*#[^\n]*\n|\s*\n)*?\s*#\s*@package\s+(\S+)", text)
    return Loaded(tree, builder.places, header.group(1) if header else None)


def load_file(path: File) -> Loaded:
    """Parses a file. Raises ConfigError where it does not exist, is not text, or is not plain YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{shown(path)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{shown(path)} is not text (UTF-8).") from None
    return load_text(text, shown(path))


def dump(tree: Any) -> str:
    """A plain tree as YAML, keys in their order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
