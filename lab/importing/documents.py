"""YAML as ReaLLM-Forge reads it: several documents, lists at the top, and of a key given twice the later one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Any

import yaml

from core.options import Path
from core.yaml_files import MAX_BYTES, Builder, ConfigError, Scalars, shown


class _YAML(yaml.SafeLoader):
    """YAML as PyYAML reads it, `1e-3` being a text, without dates."""


_YAML.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _last_wins(root: yaml.Node, place: Callable[[yaml.Node], str]) -> Iterator[str]:
    """Drops what a later key of the same name replaces, as PyYAML does, and yields a sentence for each."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            last: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
            for i, (key, value) in enumerate(node.value):
                name = key.value if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge") else i
                if name in last:
                    yield f"'{name}' is given twice; the later one counts ({place(last[name][0])}, {place(key)})."
                    del last[name]
                last[name] = (key, value)
            node.value = list(last.values())
            waiting += [value for _, value in node.value]


def read_documents(path: File) -> tuple[list[Any], dict[Path, str], list[str]]:
    """The documents of a file, the place of every key, and what is to be said. Raises ConfigError for what is not plain YAML."""
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{shown(path)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{shown(path)} is not text (UTF-8).") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{shown(path)} is larger than {MAX_BYTES:,} bytes.")
    json = path.suffix == ".json"
    made: list[Any] = []
    told: list[str] = []
    try:
        loader = Scalars(text.replace("\t", " ")) if json else _YAML(text)
        builder = Builder(shown(path), loader)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            told += _last_wins(node, builder.place)
            builder.places[(str(len(made)),)] = builder.place(node)
            made.append(builder.build(node, (str(len(made)),)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{error.problem or error.context} ({shown(path)}:{line}). This is not valid YAML.") from None
    except (yaml.YAMLError, RecursionError) as error:
        told_of = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"{shown(path)} is not valid YAML: {told_of}.") from None
    return made, builder.places, told
