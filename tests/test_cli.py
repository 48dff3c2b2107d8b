"""The front door: what each option prints, and that mistakes are sentences with the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs

import train
from lab import __main__ as lab_main
from lab import store
from lab.listing import Listing
from variations import CATALOGUE

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(data: Path, tmp_path: Path) -> str:
    content = runs.tree(data, name="s")
    content["sweep"] = {
        "grid": {"optimizer.learning_rate": [0.001, 0.01, 0.1], "model.norm": ["layernorm", "rmsnorm"]},
        "exclude": [{"model.norm": "rmsnorm", "optimizer.learning_rate": 0.1}],
        "baseline": {"model.norm": "layernorm", "optimizer.learning_rate": 0.001},
        "seeds": 2,
    }
    return str(runs.write(tmp_path / "s.yaml", content))


def read(words: list[str], captured: Captured) -> Any:
    assert train.main(words) == 0
    return json.loads(captured.readouterr().out)


def nothing_started(folder: Path) -> bool:
    return not (folder / "runs").exists()


def test_dry_run(file: str, tmp_path: Path, capsys: Captured) -> None:
    told = read(["--config", file, "--dry-run", "--json"], capsys)
    assert {key: told[key] for key in told if key != "runs"} == {
        "cells": 5,
        "excluded": 1,
        "duplicates": 0,
        "done": 0,
    }
    assert len(told["runs"]) == 10 == len({run["run_id"] for run in told["runs"]})
    for run in told["runs"]:
        assert set(run) == {"run_id", "cell", "seed", "changed", "config"}
        assert run["config"]["optimizer"]["learning_rate"] == run["changed"]["optimizer.learning_rate"]
        assert run["config"]["train"]["seed"] == run["seed"] in (1337, 1338)
    assert train.main(["--config", file, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/s: 5 cells x 2 seeds = 10 runs, 0 done"
    assert lines[1] == "excluded: 1 cells; duplicates merged: 0 cells"
    assert [line.split()[0] for line in lines[2:]] == [run["run_id"] for run in told["runs"]]
    assert sum("(baseline)" in line for line in lines) == 2
    assert nothing_started(tmp_path)


def test_slices(file: str, tmp_path: Path, capsys: Captured) -> None:
    rows = read(["--config", file, "--slices", "--json"], capsys)
    keys = {
        "address",
        "shape",
        "parameters",
        "lr_scale",
        "weight_decay",
        "optimizer",
        "init",
        "lora",
        "frozen",
        "rules",
    }
    assert all(set(row) == keys for row in rows)
    by_address = {row["address"]: row for row in rows}
    assert len(by_address) == len(rows)
    assert by_address["h.0.attn.qkv.weight[k]"]["shape"] == [16, 16]
    assert train.main(["--config", file, "--slices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "address",
        "shape",
        "parameters",
        "learning_rate",
        "lr_scale",
        "weight_decay",
        "optimizer",
        "init",
        "rules",
    ]
    assert [line.split()[0] for line in lines[1:-1]] == [row["address"] for row in rows]
    count = f"{sum(row['parameters'] for row in rows):,}"
    assert lines[-1] == f"{len(rows)} slices, {count} parameters, {count} of them trained"
    assert any("16 x 16" in line for line in lines)
    assert nothing_started(tmp_path)


def test_list(capsys: Captured) -> None:
    assert train.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:-1] for line in lines if not line.startswith(" ")] == list(CATALOGUE)
    assert train.main(["--list", "norm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "norm:" and len([line for line in lines if not line.startswith(" ")]) == 1
    assert {line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "} == set(CATALOGUE["norm"])
    assert any(line.startswith("    eps: ") and "default 1e-05" in line for line in lines)
    assert train.main(["--list", "nrom"]) == 2
    assert "--list: no kind 'nrom'. Did you mean 'norm'?" in capsys.readouterr().err


def test_help_and_words_that_do_not_go_together(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert all(option in told for option in ("--config", "--dry-run", "--slices", "--json", "--list", "--yes"))
    for words in (["--json"], ["--unknown"]):
        with pytest.raises(SystemExit) as end:
            train.main(words)
        assert end.value.code == 2
    assert "--json goes with --dry-run or --slices" in capsys.readouterr().err


def test_many_runs_need_yes(file: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def note(listing: Listing, manner: object) -> int:
        started.append(len(listing.runs))
        return 0

    monkeypatch.setattr("lab.runner.run", note)
    words = ["--config", file, "sweep.max_runs=9"]
    assert train.main(words) == 2
    assert capsys.readouterr().err == "sweep.max_runs: 10 runs are more than 9. Start them with --yes.\n"
    assert started == [] and nothing_started(tmp_path)
    assert train.main([*words, "--dry-run"]) == 0, "listing any number is free"
    assert train.main([*words, "--yes"]) == 0 and started == [10]
    assert train.main(["--config", file, "sweep.max_runs=10"]) == 0 and started == [10, 10]


def test_every_mistake_is_told_and_nothing_started(file: str, tmp_path: Path, capsys: Captured) -> None:
    assert train.main(["--config", file, "model.n_heads=4", "train.batch_size=none"]) == 2
    told = capsys.readouterr().err
    assert "n_heads" in told and "'n_head'" in told and "batch_size" in told and "Traceback" not in told
    assert train.main(["--config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert train.main(["--config", file, "data.dataset=nothing"]) == 2
    assert "no corpus 'nothing'" in capsys.readouterr().err
    assert nothing_started(tmp_path)


def test_a_folder_that_cannot_be_written(file: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "taken").write_text("a file")
    assert train.main(["--config", file, f"runner.root={tmp_path / 'taken'}"]) == 2
    assert "cannot be written: Not a directory. Nothing was started." in capsys.readouterr().err


def test_a_device_that_is_not_there(file: str, capsys: Captured) -> None:
    assert train.main(["--config", file, "train.device=cuda:99"]) == 2
    assert "'cuda:99' is not on this machine" in capsys.readouterr().err
    assert train.main(["--config", file, "runner.devices=[cpu,cuda:98]"]) == 2
    assert "'cuda:98' is not on this machine" in capsys.readouterr().err


def test_other_failures_are_sentences(file: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error, code, told in (
        (OSError(28, "No space left on device", "runs/s/x"), 1, "runs/s/x: No space left on device.\n"),
        (KeyboardInterrupt(), 75, "stopped. The same command continues.\n"),
    ):
        monkeypatch.setattr("lab.runner.run", lambda listing, manner, error=error: fail(error))
        assert train.main(["--config", file]) == code
        assert capsys.readouterr().err == told


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """As `python train.py --list | head -1`, from a folder with a module that is named like one of ours."""
    (tmp_path / "variations.py").write_text("raise SystemExit('taken for ours')")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        words = [sys.executable, str(ROOT / "train.py"), "--list"]
        done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=90)
    assert done.stderr == "the output was closed before all of it was written\n"
    assert done.returncode == 1


def test_folders_that_are_no_sweeps(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/sweep.yaml").write_text("name: broken\n")
    for folder, told in (
        ("nowhere", "nowhere is not the folder of a sweep: there is no such folder."),
        ("empty", "empty is not the folder of a sweep: it holds no sweep.yaml."),
        ("run", f"run is not the folder of a sweep: it holds no sweep.yaml. It is a run of the sweep {tmp_path}."),
        ("broken", "broken is not the folder of a sweep: it holds no sweep.db."),
    ):
        for command in ("report", "status"):
            assert lab_main.main([command, folder]) == 2
            assert capsys.readouterr().err == f"{told}\n"
    (tmp_path / "broken/sweep.db").write_bytes(b"no database at all" * 100)
    assert lab_main.main(["status", "broken"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        lab_main.main([])
    assert end.value.code == 2


def test_the_status_of_runs_on_their_way(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "sweep.yaml").write_text("name: s\n")
    database = store.Store(tmp_path / "sweep.db")
    database.list(store.Row(x, f"run-{x}", x, 1, {}, False, 50, "waiting") for x in "abc")
    database.close()
    for name in ("run-b", "run-c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "attempt-1.log").touch()
        lines: list[dict[str, Any]] = [
            {"kind": "eval", "iter": 0, "tokens": 0, "seconds": 0.1, "val_loss": 3.25},
            {"kind": "train", "iter": 10, "tokens": 640, "seconds": 0.5, "train_loss": 2.5},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"kind": "tr')
    lock = store.hold(tmp_path / "run-b")
    assert lock is not None
    with lock:
        assert lab_main.main(["status", str(tmp_path)]) == 0
    lines_told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "1 running, 1 stopped, 1 waiting" in " ".join(lines_told[0])
    rows = [line[:5] for line in lines_told[lines_told.index([]) + 2 :]]
    assert rows == [
        ["run-a", "waiting", "0/50"],
        ["run-b", "running", "10/50", "2.5000", "3.2500"],
        ["run-c", "stopped", "10/50", "2.5000", "3.2500"],
    ]
