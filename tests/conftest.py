"""A small corpus, and a folder in which configuration files are written and listed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

import lab.listing
import lab.runner
import train
from core.yaml_files import ConfigError
from engine.corpus import ByteTokenizer, write_corpus
from lab.listing import Listing, open_listing
from variations import CATALOGUE


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of corpora that holds a tiny one under the name of the default: bytes, 3,000 for training and 300 held out."""
    root = tmp_path_factory.mktemp("corpora")
    ids = (np.arange(3300) * 7919 % 251).astype("<u2")
    parts = [("train", ids[:3000]), ("val", ids[3000:])]
    write_corpus(root / "stdlib" / "byte", parts, dataset="stdlib", tokenizer=ByteTokenizer(), source="A test.")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus of tests that train."""
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"))


@dataclass(frozen=True)
class Desk:
    """A folder to write files in. It is the current folder, and `presets` lie where the shipped ones would."""

    folder: Path
    presets: Path

    def write(self, text: str, name: str = "x.yaml") -> Path:
        """A file in the folder; without its indentation of four spaces."""
        lines = text.strip("\n").split("\n")
        depth = min((len(line) - len(line.lstrip(" ")) for line in lines if line.strip()), default=0)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line[depth:] for line in lines) + "\n", encoding="utf-8")
        return path

    def preset(self, name: str, text: str) -> None:
        """A preset with its header."""
        self.write(text, str(self.presets / f"{name}.yaml"))
        path = self.presets / f"{name}.yaml"
        path.write_text(f"# @package _global_\n{path.read_text()}")

    def listed(self, text: str, *words: str, name: str = "x.yaml") -> Listing:
        """What a file stands for."""
        return open_listing(self.write(text, name), words)

    def config(self, text: str, *words: str) -> Any:
        """The configuration of a file without a sweep."""
        (run,) = self.listed(text, *words).runs
        return run.config

    def wrong(self, text: str, *words: str, name: str = "x.yaml") -> list[str]:
        """Every sentence about a file that is refused. File names in them are relative to the folder."""
        with pytest.raises(ConfigError) as caught:
            self.listed(text, *words, name=name)
        return caught.value.sentences

    def values(self, text: str, key: str, *words: str) -> list[Any]:
        """What a key holds in every run, in their order."""
        return [dig(run.config, key) for run in self.listed(text, *words).runs]

    def cells(self, text: str, *words: str) -> list[str]:
        return [run.cell for run in self.listed(text, *words).runs]

    def nothing_made(self) -> bool:
        """Whether the folder holds no more than what a test wrote."""
        return not (self.folder / "runs").exists() and not (self.folder / "data").exists()


def dig(config: Any, key: str) -> Any:
    """The option at a dotted key of a read configuration; a variant's name where the key ends at it."""
    for word in key.split("."):
        config = getattr(config, "options", config)
        config = config[word] if isinstance(config, dict) else getattr(config, word)
    return getattr(config, "name", config)


@pytest.fixture
def desk(corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    library = tmp_path / "shipped" / "explorations"
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (library / "presets").mkdir(parents=True)
    monkeypatch.setattr(lab.listing, "DATA", corpora)
    monkeypatch.setattr(lab.listing, "LIBRARY", library)
    monkeypatch.chdir(folder)
    return Desk(folder, library / "presets")


@pytest.fixture
def front(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The front door: words -> exit code, what was printed, what was complained of. Nothing is trained."""

    def started(listing: Listing, manner: object) -> int:
        raise AssertionError(f"started {len(listing.runs)} runs")

    monkeypatch.setattr(lab.runner, "run", started)

    def run(*words: str) -> tuple[int, str, str]:
        code = train.main(list(words))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


# Files that take longest. They begin first, so that both test processes end at about the same time. Before them comes the one that
# measures memory in forks of its process, which has to have little of its own.
SLOW = (
    "test_safetensors_files",
    *(
        "test_packs",
        "test_conduct",
        "test_schedules_of_kills",
        "test_ranks",
        "test_runner",
        "test_secrets",
        "test_disk",
    ),
    *("test_forks", "test_rungs", "test_refill", "test_attempts", "test_check", "test_sync", "test_campaign"),
    *("test_mutated", "test_importing", "test_init_from", "test_fold_runs", "test_variations", "test_status"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files; tests of a file stay in their order."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@contextmanager
def restored() -> Iterator[None]:
    """What plugins add to the dictionaries inside is gone afterwards."""
    before = {kind: dict(known) for kind, known in CATALOGUE.items()}
    yield
    for kind, known in CATALOGUE.items():
        assert isinstance(known, dict)
        known.clear()
        known.update(before[kind])
    for name in [name for name in sys.modules if name.startswith("slicewise_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def catalogue() -> Iterator[None]:
    """What a plugin adds to the dictionaries is gone after the test."""
    with restored():
        yield


@pytest.fixture(scope="module", autouse=True)
def _catalogue_of_a_module() -> Iterator[None]:
    """And after the tests of a file."""
    with restored():
        yield
