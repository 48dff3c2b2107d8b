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

from core.options import Path, nearest
from core.secrets import exposed, scrub, secrets

SUFFIXES = (".yaml", ".yml", ".json")
HUGGING_FACE = "hf:"  # before a folder of weights in that format, where a path is given
MAX_NODES = 200_000  # aliases expand: a kilobyte of nested anchors can mean billions of values
MAX_WRITTEN = 50_000  # keys and values before that; reading them takes seconds
MAX_BYTES = 1_000_000
MAX_DEPTH = 60
MAX_BITS = 8192  # of an integer; Python writes no larger ones out
MAX_SENTENCE = 2000  # characters; a value that a message repeats can be as long as its file
_TAG = "tag:yaml.org,2002:"
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same text, four times as fast
SCALARS = tuple(_TAG + name for name in ("str", "int", "float", "bool", "null"))


class ConfigError(ValueError):
    """The configuration is wrong. `sentences` has one for every mistake."""

    def __init__(self, *sentences: str) -> None:
        self.sentences = [printable(scrub(sentence)) for sentence in sentences]
        super().__init__("\n".join(self.sentences))


def printable(text: str) -> str:
    """One line that does no harm to a terminal: without its middle where it is long, control characters written as escapes."""
    if len(text) > MAX_SENTENCE:
        text = f"{text[: MAX_SENTENCE // 2]} ... {text[-MAX_SENTENCE // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@dataclass
class Loaded:
    """A file's tree; `places` gives 'file:line' of every key and list item; `package` is Hydra's header, if any."""

    tree: dict[str, Any]
    places: dict[Path, str]
    package: str | None = None
    folder: File | None = None  # where the file lies


class _TooMuch(yaml.MarkedYAMLError):
    """A file that is too deep or too long."""


class Scalars(yaml.SafeLoader):
    """PyYAML's safe scalars with OmegaConf's numbers and without dates; refuses what is too deep or too much to read."""

    written = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.written, self.depth = self.written + 1, self.depth + 1
        if self.written > MAX_WRITTEN or self.depth > MAX_DEPTH:
            much = f"it is nested deeper than {MAX_DEPTH} levels"
            much = much if self.depth > MAX_DEPTH else f"it has more than {MAX_WRITTEN:,} keys and values"
            raise _TooMuch(problem=much, problem_mark=self.peek_event().start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


Scalars.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (f"{_TAG}timestamp", f"{_TAG}float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Scalars.add_implicit_resolver(
    f"{_TAG}float",
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
class Builder:
    """Turns a node graph into plain values, counting what aliases expand to."""

    name: str
    loader: yaml.SafeLoader
    places: dict[Path, str] = field(default_factory=dict)
    nodes: int = 0
    open: list[int] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=secrets)

    def fail(self, node: yaml.Node, text: str) -> ConfigError:
        return ConfigError(f"{text} ({self.place(node)}).")

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail(node, f"the file's aliases expand to more than {MAX_NODES:,} values")
        if id(node) in self.open:
            raise self.fail(node, f"{'.'.join(path)}: an alias refers to a value that contains it")
        if len(self.open) > MAX_DEPTH:
            raise self.fail(node, f"nested deeper than {MAX_DEPTH} levels")
        self.open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                self.plain(node, f"{_TAG}map")
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                self.plain(node, f"{_TAG}seq")
                return self.sequence(node, path)
            return self.scalar(node)
        finally:
            self.open.pop()

    def plain(self, node: yaml.Node, *tags: str) -> None:
        if node.tag not in tags:
            tag = node.tag.replace(_TAG, "!!")
            raise self.fail(node, f"the tag '{tag}' is not allowed: a configuration holds plain values")

    def sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        made = []
        for i, item in enumerate(node.value):
            below = (*path, str(i))
            self.places[below] = self.place(item)
            made.append(self.build(item, below))
        return made

    def scalar(self, node: yaml.Node) -> Any:
        self.plain(node, *SCALARS)
        try:
            made = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fail(node, f"'{node.value}' cannot be read: {error}") from None
        if isinstance(made, int) and made.bit_length() > MAX_BITS:
            raise self.fail(node, f"'{node.value:.40}...' is larger than any number here")
        if isinstance(made, str):
            self.text(made, node)
        return made

    def text(self, text: str, node: yaml.Node) -> None:
        """Refuses what no name and no path can hold, and what must not be saved with a run, wherever it stands."""
        if what := exposed(text, self.secrets):
            raise self.fail(node, f"it holds {what}, and configurations are saved with every run")
        if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
            raise self.fail(
                node, f"{text!r:.40} holds the character 0, or half of a pair of characters, which no text may"
            )

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        made: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                for extra in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = self.build(extra, path)
                    if not isinstance(merged, dict):
                        raise self.fail(extra, "'<<' merges mappings only")
                    made = {**merged, **made}
                self.places.update({(*path, name): place for name, place in lines.items()})
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be a word or a number")
            name = key.value
            self.text(name, key)
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
    try:
        loader = Scalars(text)
        root = loader.get_single_node()
        builder = Builder(name, loader)
        tree = None if root is None else builder.build(root, ())
    except _TooMuch as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{error.problem} ({name}:{line}). A configuration is smaller.") from None
    except yaml.reader.ReaderError as error:
        at, character = int(error.position), f"U+{int(error.character):04X}"
        raise ConfigError(
            f"the character {character} is not allowed ({name}:{text.count(chr(10), 0, at) + 1}). This is not valid YAML."
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = [error.context] if error.context and (error.problem or "but").startswith("but") else []
        told = " ".join([*words, error.problem or ""]) or str(error)
        raise ConfigError(f"{told} ({name}:{mark.line + 1 if mark else 1}). This is not valid YAML.") from None
    except (yaml.YAMLError, RecursionError) as error:
        told = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(f"{name} is not valid YAML: {told}.") from None
    if not isinstance(tree, dict) and tree is not None:
        kind = "a list" if isinstance(tree, list) else f"{tree!r:.60}"
        raise ConfigError(f"{name}:1: a configuration is a mapping of keys, not {kind}.")
    return Loaded(tree or {}, builder.places, _package(text))


def _package(text: str) -> str | None:
    """What Hydra's header says: a comment '# @package NAME' before the first key."""
    for line in text.splitlines():
        words = line.strip().lstrip("\ufeff").split()
        if words and not words[0].startswith("#"):
            return None
        found = re.match(r"#\s*@package\s+(\S+)", " ".join(words))
        if found:
            return found.group(1)
    return None


def load_file(path: File) -> Loaded:
    """Parses a file. Raises ConfigError where it does not exist, is not text, or is not plain YAML."""
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
        text = raw.decode("utf-8") if len(raw) <= MAX_BYTES else " " * len(raw)
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES]
        advice = nearest(path.name, beside) if beside else ""
        raise ConfigError(f"{shown(path)}: there is no such file. {advice}".rstrip()) from None
    except OSError as error:
        raise ConfigError(f"{shown(path)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{shown(path)}:{line}: this is not text (UTF-8).") from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # JSON indents with tabs too and cannot hold one in a text; YAML refuses them
    loaded = load_text(text, shown(path))
    loaded.folder = path.resolve().parent
    return loaded


def dump(tree: Any) -> str:
    """A plain tree as YAML, keys in their order."""
    made: str = yaml.dump(tree, Dumper=DUMPER, sort_keys=False, allow_unicode=True, width=120)
    return made
