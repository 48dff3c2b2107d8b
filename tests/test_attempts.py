"""A pack's process: runs that are judged, that wait for a place, and that are given up for want of memory, as folders tell it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_packs import Packs

from engine import rehearsal
from engine.loop import Run
from engine.together import Together
from lab.worker import STOPPED, run_pack

LABELS = "abcd"


class Foldable(Packs):
    """As many rows as let all four be one model, where that is tried."""

    rows = 5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Packs:
    """Four runs that were trained by a process each."""
    made = Foldable(tmp_path_factory.mktemp("alone"), runs.tiny_corpus(tmp_path_factory.mktemp("data")))
    assert made.here() == 0
    return made


@pytest.fixture
def folders(alone: Packs, tmp_path: Path) -> list[Path]:
    """The same runs, before their training."""
    made = []
    for label in LABELS:
        made.append(tmp_path / alone.run(label).name)
        made[-1].mkdir()
        shutil.copy(alone.run(label) / "config.yaml", made[-1])
    return made


def same(folders: list[Path], alone: Packs, but: str = "") -> None:
    for folder, label in zip(folders, LABELS, strict=True):
        if label not in but:
            assert runs.saved_bytes(folder) == runs.saved_bytes(alone.run(label)), label
            assert runs.records(folder) == runs.records(alone.run(label)), label


def result(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return made


@pytest.mark.parametrize("folded", [False, True])
def test_runs_that_memory_was_too_little_for_are_done_all_the_same(
    folders: list[Path], alone: Packs, monkeypatch: pytest.MonkeyPatch, folded: bool
) -> None:
    owner, fault = (Together, 2) if folded else (Run, 7)
    act, calls = owner.update, itertools.count()

    def update(self: Any, *given: Any) -> None:
        if next(calls) == fault:
            raise torch.OutOfMemoryError("no memory today")
        act(self, *given)

    monkeypatch.setattr(rehearsal, "SMALL", 1e12 if folded else 0.0)
    monkeypatch.setattr(rehearsal, "WORTH", float("inf"))
    monkeypatch.setattr(owner, "update", update)
    assert run_pack(folders, stop=lambda: False) == 0
    assert next(calls) > fault
    same(folders, alone)
    assert [(result(f)["status"], result(f)["cause"], result(f)["pack"]) for f in folders] == [("done", None, 4)] * 4


def test_a_run_for_which_there_is_never_enough_fails_alone(
    folders: list[Path], alone: Packs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(run: Run, config: Any, corpus: Any, folder: Path, *given: Any) -> None:
        if folder == folders[1]:
            raise torch.OutOfMemoryError("no memory today")
        act(run, config, corpus, folder, *given)

    act = Run.__init__
    monkeypatch.setattr(Run, "__init__", make)
    assert run_pack(folders, stop=lambda: False) == 1
    same(folders, alone, but="b")
    assert (result(folders[1])["status"], result(folders[1])["cause"]) == ("failed", "oom")


class Harsh:
    """Prunes the second run and pauses the third at iteration 4."""

    rungs = (4,)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, iteration: int, loss: float) -> None:
        assert runs.records(self.folder, "eval")[-1]["val_loss"] == loss, "metrics.jsonl has it"

    def verdict(self, iteration: int) -> str:
        return {"b": "prune", "c": "pause"}.get(self.folder.name.removeprefix("label=")[0], "go")


def test_what_a_judge_says_is_in_the_folders(folders: list[Path], alone: Packs) -> None:
    def judges(folder: Path, config: Any) -> Harsh | None:
        return Harsh(folder) if config.train.max_iters > 4 else None

    assert run_pack(folders, stop=lambda: False, judges=judges) == STOPPED
    told = result(folders[1])
    assert (told["status"], told["iters"], told["error"]) == ("pruned", 4, None)
    assert told["val_loss"] == runs.records(folders[1], "eval")[-1]["val_loss"] and told["train_loss"] is not None
    assert not (folders[2] / "result.json").exists()
    assert "paused at iteration 4" in (folders[2] / "attempt-1.log").read_text()
    assert [result(folders[i])["status"] for i in (0, 3)] == ["done", "done"]
    assert run_pack(folders[2:3], stop=lambda: False) == 0
    for i in (0, 2, 3):
        assert runs.saved_bytes(folders[i]) == runs.saved_bytes(alone.run(LABELS[i]))


def test_runs_that_wait_are_not_made_for_a_stop(
    folders: list[Path], alone: Packs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(run: Run, config: Any, corpus: Any, folder: Path, *given: Any) -> None:
        made.append(folder.name)
        act(run, config, corpus, folder, *given)

    act = Run.__init__
    monkeypatch.setattr(Run, "__init__", make)
    assert run_pack(folders, stop=lambda: len(made) > 1) == STOPPED
    assert made == [folder.name for folder in folders[:2]] and not any(folders[2].glob("checkpoint/*"))
    assert run_pack(folders, stop=lambda: False) == 0
    same(folders, alone)


def test_small_runs_are_packed_where_nobody_says_otherwise(
    alone: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With warm workers too, and with the bits of runs alone."""
    lab = Foldable(tmp_path / "lab", alone.data).packed("auto")
    monkeypatch.chdir(lab.home)
    assert lab.here() == 0
    same([lab.run(label) for label in LABELS], alone)
    assert [result(lab.run(label))["pack"] for label in LABELS] == [4] * 4
    monkeypatch.setattr(rehearsal, "SMALL", 1.0)
    large = Foldable(tmp_path / "large", alone.data).packed("auto")
    assert large.here() == 0
    assert [result(large.run(label))["pack"] for label in LABELS] == [1] * 4
