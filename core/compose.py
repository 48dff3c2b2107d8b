"""Composition: Hydra finds and orders the files of a defaults list and reads overrides; merging is by our rules.

Hydra's own merge would keep an old variant's options under a new variant's name and loses line numbers, so the files that
Hydra lists are merged here.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
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
from omegaconf.errors import OmegaConfBaseException

from core.options import nearest
from core.secrets import exposed, secrets
from core.trees import COMMAND_LINE, PATHS, Composed, Setting, drop_nulls, get, merge, path_in, replaced
from core.yaml_files import SUFFIXES, ConfigError, Loaded, load_file, shown

PRIMARY = "__primary__"
MAX_LOADS = 500


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
        place = loaded.places.get(("defaults",))
        if not isinstance(defaults, list):
            raise ConfigError(f"defaults: {defaults!r} is not a list of files ({place}).")
        if "${" in str(defaults):  # Hydra would read environment variables
            raise ConfigError(f"defaults: '${{...}}' is not allowed in the names of files ({place}).")
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
        if self.loads > MAX_LOADS:
            raise ValueError(f"the files include one another without end, at '{config_path}'")
        return super().load_config(config_path)


def compose(primary: File, library: File, *, preset: bool = False) -> Composed:
    """The file `primary` with everything its defaults list names, found beside it or in the folder `library`.

    preset: whether the file is one itself.
    Raises ConfigError for files that are missing or not plain YAML, cycles, and a preset that carries a sweep.
    """
    files: dict[str, Loaded] = {PRIMARY: load_file(primary)}
    folders = [_Folder(primary.resolve().parent, primary.resolve(), files), _Folder(library, None, files)]
    hydra.version.setbase("1.3")
    try:
        with warnings.catch_warnings():
            # Hydra's advice about a missing _self_: the file itself comes last then, as one expects.
            warnings.simplefilter("ignore")
            listed = create_defaults_list(_Repository(folders), PRIMARY, [], prepend_hydra=False, skip_missing=False)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, OSError, ValueError, AssertionError, RecursionError) as error:
        raise ConfigError(_defaults_sentence(error, files, folders)) from None
    composed = Composed({}, {}, primary.resolve().parent, file=shown(primary))
    for default in listed.defaults:
        if default.config_path is not None:
            own = default.config_path == PRIMARY and not preset
            _add(composed, files[default.config_path], default.package or "", own)
    composed.tree = dict(drop_nulls(composed.tree))
    return composed


def _add(composed: Composed, loaded: Loaded, package: str, primary: bool) -> None:
    tree = {k: v for k, v in loaded.tree.items() if k != "defaults"}
    if not primary and "sweep" in tree:
        raise ConfigError(
            f"sweep: a preset may not carry a sweep ({loaded.places[('sweep',)]}). Move it to the file you run."
        )
    if not package:
        tree = _plugins_from(tree, loaded)
    prefix = tuple(filter(None, package.split(".")))  # './x' and '../x' give empty words
    for key in reversed(prefix):
        tree = {key: tree}
    if not primary:  # the primary file's folder is the first in which a path is looked for
        tree = _paths_from(tree, loaded)
    if prefix and not primary:
        composed.packages.add(prefix[0])
    composed.tree = merge(composed.tree, tree)
    composed.places.update({prefix + path: place for path, place in loaded.places.items()})


def _plugins_from(tree: dict[str, Any], loaded: Loaded) -> dict[str, Any]:
    """The tree with its plugins' paths, which are relative to the file, made absolute."""
    given = tree.get("plugins")
    if not isinstance(given, list) or loaded.folder is None:
        return tree
    folder = loaded.folder
    return {**tree, "plugins": [str(folder / name) if isinstance(name, str) else name for name in given]}


def _paths_from(tree: dict[str, Any], loaded: Loaded) -> dict[str, Any]:
    """The tree with the paths of `PATHS` made absolute where they are relative to the file."""
    for key in PATHS:
        held = path_in(key, get(tree, key))
        if held and loaded.folder and os.path.exists(place := loaded.folder / held[1]):
            tree = dict(replaced(tree, key, f"{held[0]}{place}"))
    return tree


def _defaults_sentence(error: BaseException, files: Mapping[str, Loaded], folders: Sequence[_Folder]) -> str:
    """Hydra's complaint about a defaults list as one sentence of ours."""
    text = " ".join(str(error).split())
    inside = re.match(r"In '?(\w[\w./-]*)'?: ", text)
    place = files[inside.group(1) if inside and inside.group(1) in files else PRIMARY].places.get(("defaults",))
    missing = re.search(r"[Cc]ould not (?:find|load) '([^']*)'", text)
    if missing is None:
        return f"defaults: {text[inside.end() if inside else 0 :].rstrip('.')} ({place})."
    known = set()
    for folder in folders:
        for file in (*File(folder.path).glob("*"), *File(folder.path).glob("*/*")):
            if file.suffix in SUFFIXES and file != folder.primary:
                known.add(str(file.relative_to(folder.path).with_suffix("")))
    return f"defaults: no file '{missing.group(1)}' ({place}). {nearest(missing.group(1), known)}"


def parse_overrides(words: Sequence[str]) -> list[Setting]:
    """Hydra's override grammar: `key=value`, `key=a,b`, `key=range(1,4)`, `key=choice(...)`, `~key`; `+` is accepted, not needed.

    Raises ConfigError with a sentence for every word that cannot be read.
    """
    parser, known, made, wrong = OverridesParser.create(), secrets(), [], []
    for word in words:
        try:
            if what := exposed(word, known):
                raise ConfigError(
                    f"{word}: it holds {what}, and configurations are saved with every run ({COMMAND_LINE})."
                )
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
