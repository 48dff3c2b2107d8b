"""Disks that fill or cannot be written, clocks that jump: nothing lost, nothing double, and a sentence that says so."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import runs

import train
from lab import store

MEBIBYTES = 4
STEP = 48 * 1024  # bytes between the places where the disk is full


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@dataclass
class Disk:
    """A small file system at `root`, and files beside it that train a run, or a sweep of two, with results on it."""

    root: Path
    run: Path
    sweep: Path

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "s"

    def leave(self, size: int) -> None:
        """Fills it up but for `size` bytes."""
        free = os.statvfs(self.root).f_bavail * os.statvfs(self.root).f_bsize
        (self.root / "ballast").write_bytes(bytes(free - size))

    def clear(self) -> None:
        (self.root / "ballast").unlink()

    def folders(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("*/config.yaml"))

    def remount(self, how: str) -> None:
        assert mount("-o", f"remount,{how}", str(self.root))


def files(home: Path, data: Path, root: Path) -> tuple[Path, Path]:
    """A run of six iterations, and a sweep of two of them."""
    made = runs.tree(
        data,
        name="s",
        runner__root=str(root),
        runner__pack="off",
        runner__threads=1,
        train__max_iters=6,
        train__eval_interval=3,
    )
    alone = runs.write(home / "alone.yaml", made)
    made["sweep"] = {"grid": {"optimizer.learning_rate": [0.01, 0.02]}}
    return alone, runs.write(home / "sweep.yaml", made)


@pytest.fixture
def disk(tmp_path: Path, data: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "tmpfs", str(root)):
        pytest.skip("a small file system can be mounted by root alone: full and read-only disks are NOT tested here")
    try:
        yield Disk(root, *files(tmp_path, data, root / "runs"))
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


Undisturbed = Callable[[str], tuple[dict[str, bytes], list[dict[str, object]]]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Undisturbed:
    """What a run leaves that nothing disturbs, by its learning rate."""
    home = tmp_path_factory.mktemp("undisturbed")
    alone, _ = files(home, data, home / "runs")

    def left(rate: str) -> tuple[dict[str, bytes], list[dict[str, object]]]:
        assert train.main(["--config", str(alone), f"optimizer.learning_rate={rate}", f"name=r{rate}"]) == 0
        (folder,) = (home / "runs" / f"r{rate}").glob("*/checkpoint")
        return runs.saved_bytes(folder.parent), runs.records(folder.parent)

    made = {rate: left(rate) for rate in ("0.01", "0.02")}
    return lambda rate: made[rate]


def is_undisturbed(folder: Path, undisturbed: Undisturbed) -> bool:
    rate = "0.02" if "0.02" in folder.name else "0.01"
    return (runs.saved_bytes(folder), runs.records(folder)) == undisturbed(rate)


def test_wherever_a_disk_is_full_a_run_says_so_and_goes_on_later(
    disk: Disk, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    told, left, code = set(), 0, -1
    while True:  # a little more room each time, until it is enough
        disk.leave(left)
        code = train.main(["--config", str(disk.run)])
        out, err = capsys.readouterr()
        disk.clear()
        if code == 0:
            break
        assert "No space left on device" in out + err or "disk is full" in out + err, (left, out, err)
        assert (
            "Traceback" not in out + err and "the same command again" in out + err
        ) or "Nothing was started" in err, (
            left,
            out,
            err,
        )
        told.add("checkpoint of iteration" in out + err)
        assert train.main(["--config", str(disk.run)]) == 0, capsys.readouterr()
        (folder,) = disk.folders()
        assert is_undisturbed(folder, undisturbed), left
        assert not list(disk.root.rglob(".writing-*")) and not list(disk.root.rglob("*.part")), "no rest is left"
        shutil.rmtree(disk.folder)
        capsys.readouterr()
        left += STEP
    assert told == {False, True} and left > 3 * STEP, "it was full before, while and after checkpoints were written"


def test_a_sweep_on_a_full_disk_stops_and_goes_on_later(
    disk: Disk, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.leave(4 * STEP)
    assert train.main(["--config", str(disk.sweep)]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and ("No space left" in out + err or "disk is full" in out + err)
    disk.clear()
    assert train.main(["--config", str(disk.sweep)]) == 0
    assert len(disk.folders()) == 2 and all(is_undisturbed(folder, undisturbed) for folder in disk.folders())
    assert [row.status for row in store.listed(disk.folder / "sweep.db")] == ["done", "done"]


def test_a_disk_that_cannot_be_written(
    disk: Disk, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.remount("ro")
    assert train.main(["--config", str(disk.run)]) == 2
    assert "cannot be written: Read-only file system. Nothing was started." in capsys.readouterr().err
    disk.remount("rw")
    assert train.main(["--config", str(disk.run), "train.max_iters=3"]) == 0
    before = {path: path.read_bytes() for path in disk.root.rglob("*") if path.is_file()}
    disk.remount("ro")
    capsys.readouterr()
    assert train.main(["--config", str(disk.run)]) == 2 and train.main(["--config", str(disk.run), "--dry-run"]) == 0
    assert before == {path: path.read_bytes() for path in disk.root.rglob("*") if path.is_file()}
    disk.remount("rw")
    assert train.main(["--config", str(disk.run)]) == 0
    assert is_undisturbed(max(disk.folders(), key=lambda folder: folder.stat().st_mtime), undisturbed)


def test_a_run_folder_that_cannot_be_written(
    disk: Disk, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails alone, with a sentence; the other run of the sweep is done."""
    assert train.main(["--config", str(disk.sweep), "train.max_iters=6"]) == 0
    first, second = disk.folders()
    shutil.rmtree(first / "checkpoint")
    (first / "result.json").unlink()
    assert mount("--bind", str(first), str(first)) and mount("-o", "remount,ro,bind", str(first))
    try:
        capsys.readouterr()
        assert train.main(["--config", str(disk.sweep)]) == 1
        out, err = capsys.readouterr()
        assert "Read-only file system" in out + err and str(first.name) in out + err and "Traceback" not in out + err
    finally:
        subprocess.run(["umount", str(first)], check=True)
    assert train.main(["--config", str(disk.sweep)]) == 0
    assert is_undisturbed(first, undisturbed) and is_undisturbed(second, undisturbed)


@pytest.mark.parametrize("jump", ["backwards", "anywhere"])
def test_a_clock_that_jumps_changes_nothing(
    jump: str, tmp_path: Path, data: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the wall, which people and services set. Durations are of one that only goes on."""
    draw, now = random.Random(3), [time.time()]

    def jumping() -> float:
        now[0] += -3600.0 if jump == "backwards" else draw.uniform(-1e6, 1e6)
        return now[0]

    alone, _ = files(tmp_path, data, tmp_path / "runs")
    monkeypatch.setattr(time, "time", jumping)
    assert train.main(["--config", str(alone), "name=early", "train.max_iters=3"]) == 0
    assert train.main(["--config", str(alone)]) == 0 and train.main(["--config", str(alone)]) == 0
    (folder,) = (path.parent for path in tmp_path.glob("runs/s/*/config.yaml"))
    assert is_undisturbed(folder, undisturbed)
    seconds = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[0] >= 0.0
    assert 0.0 <= json.loads((folder / "result.json").read_text())["seconds"] < 3600.0
    assert sorted(path.name for path in folder.glob("attempt-*.log")) == ["attempt-1.log"], "it was trained once"
