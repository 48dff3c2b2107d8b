"""Composition: Hydra finds and orders the files of a defaults list and reads overrides; merging is by our rules.

Hydra's own merge would keep an old variant's options under a new variant's name and loses line numbers, so the files that
Hydra lists are merged here: naming a variant replaces a node, everything else merges, and a redefined rule moves to the end.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import hydra.version
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from core.options import Path, nearest
from core.yaml_files import ConfigError, Loaded, load_file, shown

PRIMARY = "__primary__"
SUFFIXES = (".yaml", ".yml", ".json")
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
COMMAND_LINE = "command line"


def merge(base: Any, over: Any, path: Path = ()) -> Any:
    """`over` laid on `base`, neither changed: a mapping merges key by key unless it names a variant."""
    if not isinstance(over, Mapping) or "variant" in over:
        return over
    if isinstance(base, str):
        return {"variant": base, **over}
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
    if isinstance(below, str):
        below = {"variant": below}
    if rest == ("variant",):
        return {**tree, head: {"variant": value}}
    return {**tree, head: put(below if isinstance(below, Mapping) else {}, rest, value)}


def get(tree: Any, path: Path) -> Any:
    """The value at `path`, or None."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def drop_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the rules, sites, axes and cases that were set to null."""
    for path in TABLES:
        table = get(tree, path)
        if isinstance(table, Mapping) and None in table.values():
            kept = {k: v for k, v in table.items() if v is not None}
            tree = _replace(tree, path, kept)
    return tree


def _replace(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**tree, path[0]: value}
    return {**tree, path[0]: _replace(tree[path[0]], path[1:], value)}


@dataclass
class Composed:
    """Merged files: the tree, where each key was last set, the folder that plugins are relative to."""

    tree: dict[str, Any]
    places: dict[Path, str]
    folder: File
    packages: set[str] = field(default_factory=set)  # where files without a package header landed

    def place(self, path: Path) -> str | None:
        """'file:line' of a key, or of the nearest key above it that somebody wrote."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None


class _Folder(ConfigSource):
    """A folder of configuration files, read by our loader; Hydra sees only their defaults lists."""

    def __init__(self, path: File, primary: File | None, files: dict[str, Loaded]) -> None:
        self.provider, self.path, self.primary, self.files = "files", str(path), primary, files

    @staticmethod
    def scheme() -> str:
        return "file"

    def _file(self, config_path: str) -> File | None:
        if config_path == PRIMARY:
            return self.primary
        for suffix in ("", *SUFFIXES):
            candidate = File(self.path) / (config_path + suffix)
            if candidate.suffix in SUFFIXES and candidate.is_file():
                return candidate
        return None

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        assert file is not None
        if config_path not in self.files:
            self.files[config_path] = load_file(file)
        loaded = self.files[config_path]
        defaults = loaded.tree.get("defaults", [])
        if not isinstance(defaults, list):
            raise ConfigError(f"defaults: {defaults!r} is not a list of files ({loaded.places.get(('defaults',))}).")
        config = OmegaConf.create({"defaults": defaults, "content": 1})
        return ConfigResult(provider=self.provider, path=str(file), config=config, header={"package": loaded.package})

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return (File(self.path) / config_path).is_dir()

    def available(self) -> bool:
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found = (File(self.path) / config_path).glob("*")
        return sorted(p.stem for p in found if p.is_dir() or p.suffix in SUFFIXES)


class _Repository(ConfigRepository):
    """Hydra's repository over folders of ours; refuses defaults lists that never end."""

    def __init__(self, folders: Sequence[_Folder]) -> None:
        self.sources = list(folders)
        self.loads = 0

    def load_config(self, config_path: str) -> ConfigResult | None:
        self.loads += 1
        if self.loads > 500:
            raise ConfigError(f"defaults: the files include one another without end (at '{config_path}').")
        return super().load_config(config_path)


def compose(primary: File, library: File) -> Composed:
    """The file `primary` with everything its defaults list names, found beside it or in the folder `library`.

    Raises ConfigError for files that are missing or not plain YAML, cycles, and a preset that carries a sweep.
    """
    files: dict[str, Loaded] = {PRIMARY: load_file(primary)}
    folders = [_Folder(primary.resolve().parent, primary, files), _Folder(library, None, files)]
    hydra.version.setbase("1.3")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Hydra's advice about a missing _self_: ours comes last then, as one expects
            listed = create_defaults_list(_Repository(folders), PRIMARY, [], prepend_hydra=False, skip_missing=False)
    except ConfigError:
        raise
    except (HydraException, ValueError, AssertionError, RecursionError) as error:
        raise ConfigError(_defaults_sentence(error, primary, files[PRIMARY], folders)) from None
    composed = Composed({}, {}, primary.resolve().parent)
    for default in listed.defaults:
        if default.config_path is not None:
            _add(composed, files[default.config_path], default.package or "", default.config_path == PRIMARY)
    composed.tree = drop_nulls(composed.tree)
    return composed


def _add(composed: Composed, loaded: Loaded, package: str, primary: bool) -> None:
    tree = {k: v for k, v in loaded.tree.items() if k != "defaults"}
    if not primary and "sweep" in tree and not package:
        raise ConfigError(
            f"sweep: a preset may not carry a sweep ({loaded.places[('sweep',)]}). Move it to the file you run."
        )
    prefix = tuple(package.split(".")) if package else ()
    for key in reversed(prefix):
        tree = {key: tree}
    if prefix and not primary:
        composed.packages.add(prefix[0])
    composed.tree = merge(composed.tree, tree)
    composed.places.update({prefix + path: place for path, place in loaded.places.items()})


def _defaults_sentence(error: BaseException, primary: File, loaded: Loaded, folders: Sequence[_Folder]) -> str:
    """Hydra's complaint about a defaults list as one sentence of ours."""
    text = " ".join(str(error).split())
    place = loaded.places.get(("defaults",), shown(primary))
    missing = re.search(r"[Cc]ould not (?:find|load) '([^']+)'", text)
    if missing is None:
        return f"defaults: {text} ({place})."
    known = set()
    for folder in folders:
        for file in (*File(folder.path).glob("*"), *File(folder.path).glob("*/*")):
            if file.suffix in SUFFIXES:
                known.add(str(file.relative_to(folder.path).with_suffix("")))
    return f"defaults: no file '{missing.group(1)}' ({place}). {nearest(missing.group(1), known)}"


@dataclass(frozen=True)
class Setting:
    """One word of the command line: a value for a key, or several (an axis)."""

    path: Path
    values: tuple[Any, ...]
    axis: bool
    word: str


def parse_overrides(words: Sequence[str]) -> list[Setting]:
    """Hydra's override grammar: `key=value`, `key=a,b`, `key=range(1,4)`, `key=choice(...)`, `~key`; `+` is accepted, not needed.

    Raises ConfigError with a sentence for every word that cannot be read.
    """
    parser, made, wrong = OverridesParser.create(), [], []
    for word in words:
        try:
            made.append(_setting(parser.parse_override(word), word))
        except ConfigError as error:
            wrong += error.sentences
        except (HydraException, ValueError) as error:
            reason = str(error).splitlines()[0]
            wrong.append(
                f"{word}: cannot be read ({COMMAND_LINE}): {reason}. Write key=value; quote text with special characters."
            )
    if wrong:
        raise ConfigError(*wrong)
    return made


def _setting(override: Override, word: str) -> Setting:
    path = tuple(override.key_or_group.split("."))
    if override.package is not None or override.key_or_group.split(".")[0] in ("hydra", "defaults"):
        raise ConfigError(f"{word}: the command line sets keys of the configuration, not files ({COMMAND_LINE}).")
    if override.is_delete():
        return Setting(path, (None,), False, word)
    if not override.is_sweep_override():
        return Setting(path, (_plain(override.value()),), False, word)
    sweep = override.value()
    if not isinstance(sweep, (ChoiceSweep, RangeSweep)):
        raise ConfigError(f"{word}: only lists, choice() and range() make an axis ({COMMAND_LINE}).")
    return Setting(path, tuple(_plain(v) for v in override.sweep_iterator()), True, word)


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    return value
