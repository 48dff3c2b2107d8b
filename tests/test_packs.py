"""Packs through the command line: many runs in one process leave what each leaves alone, whatever becomes of one of them.

On a CPU a pack takes turns: each run goes on until it was evaluated. Trials wait at an iteration while a file exists (see PLUGIN
in runs.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import PATIENCE, Lab, alive, aside, until

from engine import checkpoint
from lab import __main__ as lab_main
from lab.executors.local import LocalExecutor, LocalTrial
from lab.listing import open_listing
from lab.plan import Slot, Wish
from lab.store import holder

NUMBERS: dict[str, list[Any]] = {
    "schedule.label": ["a", "b", "c", "d"],
    "train.max_iters": [3, 6, 6, 7],
    "train.seed": [1, 2, 3, 2],
    "train.gradient_accumulation_steps": [1, 2, 1, 3],
    "train.grad_clip": [1.0, 0.5, 0.1, 2.0],
    "optimizer.learning_rate": [0.01, 0.002, 0.03, 0.005],
    "optimizer.weight_decay": [0.1, 0.2, 0.3, 0.1],
    "optimizer.betas": [[0.9, 0.99], [0.8, 0.9], [0.7, 0.95], [0.5, 0.5]],
    "schedule.warmup_iters": [0, 2, 3, 0],
    "model.dropout": [0.1, 0.2, 0.3, 0.4],
    "model.linear.scale": [1.0, 0.5, 2.0, 1.5],
    "slices.calm.lr_scale": [0.3, 1.0, 0.1, 3.0],
}


class Packs(Lab):
    """A sweep of four runs that differ in every kind of number, one process at a time, evaluated every third iteration."""

    axes = NUMBERS
    rows = 4  # with which no number of these runs can be folded

    @property
    def file(self) -> Path:
        made: dict[str, Any] = json.loads(super().file.read_text())
        made["train"] |= {"eval_interval": 3, "batch_size": self.rows}
        made["model"]["linear"] = {"variant": "pkl"}
        made["slices"] = {"calm": {"match": "h.*.attn.qkv[k]"}}
        made["runner"] |= {"per_device": 1, "threads": 1}
        made["sweep"] = {"zip": self.axes}
        return runs.write(self.home / "s.yaml", made)

    def run(self, label: str) -> Path:
        return next(self.folder.glob(f"label={label}+*"))

    def packed(self, pack: int | str) -> Packs:
        self.pack = pack
        return self

    def told(self) -> dict[str, tuple[str, ...]]:
        """By label, what became of a run in words of the database."""
        made: dict[str, tuple[str, ...]] = {}
        for run_id, event, _ in self.events():
            label = run_id.partition("label=")[2][:1]
            made[label] = (*made.get(label, ()), event)
        return made


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Packs:
    """The sweep with a process for each run."""
    made = Packs(tmp_path_factory.mktemp("alone"), data)
    assert made.here() == 0
    return made


@pytest.fixture
def lab(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packs]:
    made = Packs(tmp_path / "lab", data).packed(4)
    monkeypatch.setenv("POINTS", str(made.points))
    monkeypatch.chdir(made.home)
    yield made
    made.close()


TIMES = {*runs.CLOCKS, "attempt", "token", "pack", "peak_memory_bytes", "provenance"}


def same(lab: Packs, alone: Packs, labels: Sequence[str] = "abcd") -> None:
    """The bits of runs alone: weights, optimizer, every record, the result."""
    for label in labels:
        assert runs.saved_bytes(lab.run(label)) == runs.saved_bytes(alone.run(label)), label
        assert runs.records(lab.run(label)) == runs.records(alone.run(label)), label
        ours, theirs = ({k: v for k, v in x.result(label).items() if k not in TIMES} for x in (lab, alone))
        assert ours == theirs, label
        assert lab.run(label).name == alone.run(label).name


def saved(lab: Packs, label: str) -> list[int]:
    return sorted(int(path.name) for path in (lab.run(label) / "checkpoint").iterdir())


def spoil(lab: Packs, label: str) -> None:
    """Gives a run the checkpoint of another model, from which it cannot be made."""
    listing = open_listing(lab.file, [])
    (one,) = (run for run in listing.runs if run.changed["schedule.label"] == label)
    tensors = {"x": torch.zeros(1)}
    checkpoint.save(listing.path(one) / "checkpoint", 1, tensors, tensors, {"iter": 1})


def page(lab: Packs) -> str:
    return (lab.folder / "report.html").read_text()


def test_a_pack_leaves_what_runs_alone_leave(lab: Packs, alone: Packs, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.here() == 0
    out = capsys.readouterr().out
    same(lab, alone)
    assert [saved(lab, label) for label in "abcd"] == [saved(alone, label) for label in "abcd"]
    for label in "abcd":
        ours, theirs = lab.result(label), alone.result(label)
        assert list(ours) == list(theirs) and (ours["pack"], theirs["pack"]) == (4, 1)
        assert ours["provenance"] == theirs["provenance"] and ours["peak_memory_bytes"] < theirs["peak_memory_bytes"]
        assert {path.name for path in lab.run(label).iterdir()} == {path.name for path in alone.run(label).iterdir()}
        log = (lab.run(label) / "attempt-1.log").read_text()
        total = ours["iters"]
        assert f"iteration {total}/{total}" in log and log.count(f"iteration 0/{total}") == 1, "its own lines"
    assert lab.run("a").name in (lab.run("c") / "attempt-1.log").read_text(), "where the process prints"
    assert lab.told() == dict.fromkeys("abcd", ("running", "done"))
    assert "4 runs of 4 shared a process with others, at most 4 in one." in out and "shared a process" in page(lab)
    for sweep, size in ((lab, 4), (alone, 1)):
        assert page(sweep).count(f'data-v="{size}">{size}</td><td class="word" data-v=""') == 4, "a column of its own"
    assert "shared a process" not in page(alone)


def test_auto_shares_the_slots_and_keeps_other_graphs_apart(lab: Packs, alone: Packs) -> None:
    lab.axes = {**NUMBERS, "model.norm": ["layernorm", "layernorm", "layernorm", "rmsnorm"]}
    assert lab.packed("auto").here("runner.warm=false") == 0
    assert [lab.result(label)["pack"] for label in "abcd"] == [3, 3, 3, 1]
    for label in "abc":
        assert runs.saved_bytes(lab.run(label)) == runs.saved_bytes(alone.run(label))
        assert runs.records(lab.run(label)) == runs.records(alone.run(label))


# One of them ----------------------------------------------------------------------------------------------------------------


def test_what_becomes_of_one_is_its_own(lab: Packs, alone: Packs, capsys: pytest.CaptureFixture[str]) -> None:
    """One cannot be made, one raises, one diverges; each as it would alone, and the fourth is done."""
    lab.axes = {
        **NUMBERS,
        "schedule.label": ["a", "raising", "c", "d"],
        "optimizer.learning_rate": [0.01, 0.002, 0.03, 1e30],
    }
    spoil(lab, "a")
    assert lab.here() == 1
    out = capsys.readouterr().out
    assert "1 diverged, 1 done, 2 failed" in out
    same(lab, alone, "c")
    results = {label: lab.result(label) for label in ("a", "raising", "c", "d")}
    assert {label: result["status"] for label, result in results.items()} == {
        "a": "failed",
        "raising": "failed",
        "c": "done",
        "d": "diverged",
    }
    logs = {label: (lab.run(label) / "attempt-1.log").read_text() for label in results}
    for label, result in results.items():
        assert set(result) == set(alone.result("a")) and result["pack"] == 4
        assert ("no schedule today" in logs[label]) is (label == "raising")
    assert "Remove" in results["a"]["error"] and "Traceback" not in logs["a"], "a sentence"
    assert "Traceback" in logs["raising"] and results["raising"]["error"] in logs["raising"]
    assert results["raising"]["val_loss"] is None and results["raising"]["best_val_loss"] is not None
    assert "diverged at iteration" in logs["d"]
    shutil.rmtree(lab.run("a") / "checkpoint")
    assert lab.here() == 1
    same(lab, alone, "a")
    assert lab.result("a")["pack"] == lab.result("raising")["pack"] == 2 and lab.result("a")["attempt"] == 2


def test_a_run_is_told_of_when_it_ends_and_free(lab: Packs, alone: Packs, capsys: pytest.CaptureFixture[str]) -> None:
    lab.hold("b-4")
    runner = lab.start()
    lab.reached("b-4")
    until(lambda: lab.told()["a"] == ("running", "done"))
    assert holder(lab.run("a")) is None
    assert {holder(lab.run(label)) for label in "bcd"} == {lab.reached("b-4")}
    assert lab_main.main(["status", str(lab.folder)]) == 0
    assert "1 done, 3 running" in capsys.readouterr().out
    lab.release("b-4")
    out, err = runner.communicate(timeout=PATIENCE)
    assert (runner.returncode, err) == (0, "") and "[1/4" in out and "4 done" in out
    same(lab, alone)


def test_a_pack_that_dies_goes_on_and_then_each_alone(lab: Packs, alone: Packs) -> None:
    """One of its runs ends every process that it is in: the others are in the second one too, and then without it."""
    lab.axes = {**NUMBERS, "schedule.label": ["a", "dying", "c", "d"]}
    assert lab.here() == 1
    assert lab.logs("a") == ["attempt-1.log"], "it had ended"
    assert "last words" in (lab.run("a") / "attempt-1.log").read_text(), "where the pack prints"
    result = lab.result("dying")
    assert (result["status"], result["cause"], result["pack"], result["attempt"]) == ("failed", "killed", 1, 4)
    assert "its exit code is 3. Its last words are in attempt-4.log." in result["error"]
    assert lab.told()["c"] == ("running", "lost", "running", "lost", "running", "done")
    assert lab.result("c")["attempt"] == 3 and lab.result("c")["pack"] == 1
    same(lab, alone, "acd")


# Stopping and continuing ----------------------------------------------------------------------------------------------------


def interrupt(lab: Packs, number: signal.Signals, at: str = "b-4", *, of_the_pack: bool = False) -> tuple[int, str]:
    """Starts the sweep, holds a run in an iteration and sends a signal. Returns the exit code and what was printed."""
    lab.hold(at)
    runner = lab.start()
    process = lab.reached(at)
    if of_the_pack:
        os.kill(process, number)
    else:
        os.killpg(runner.pid, number)  # as a terminal does
    lab.asked(at)
    lab.release(at)
    out, err = runner.communicate(timeout=PATIENCE)
    assert not alive(process) and err == ""
    return runner.returncode, out


@pytest.mark.parametrize(("before", "after"), [(4, 3), (4, "off"), ("off", 4)])
def test_it_stops_at_checkpoints_and_continues_in_any_pack(
    lab: Packs, alone: Packs, before: int | str, after: int | str
) -> None:
    code, out = interrupt(lab.packed(before), signal.SIGINT)
    assert code == 75 and "1 done, 3 unfinished. The same command continues." in out
    assert saved(lab, "b") == [3, 5] and holder(lab.run("b")) is None
    if before == 4:
        assert (saved(lab, "c"), saved(lab, "d")) == ([3, 4], [3, 4]), "each saves where it is"
        assert lab.told()["c"] == ("running", "stopped")
    assert not any((lab.run(label) / "result.json").exists() for label in "bcd")
    assert lab.packed(after).here() == 0
    same(lab, alone)
    assert lab.logs("a") == ["attempt-1.log"] and lab.logs("b") == ["attempt-1.log", "attempt-2.log"]


def test_a_pack_that_others_stop_goes_on(lab: Packs, alone: Packs) -> None:
    """One is in its last iteration, and one could not be made."""
    spoil(lab, "d")
    code, out = interrupt(lab, signal.SIGTERM, "a-2", of_the_pack=True)
    assert code == 1 and "3 done, 1 failed" in out
    assert {label: events[1:] for label, events in lab.told().items()} == {
        "a": ("done",),
        "b": ("lost", "running", "done"),
        "c": ("lost", "running", "done"),
        "d": ("failed",),
    }
    assert "iteration 0/6" not in (lab.run("c") / "attempt-2.log").read_text(), "it began where it was stopped"
    assert lab.result("b")["pack"] == lab.result("c")["pack"] == 2
    same(lab, alone, "abc")


def test_the_second_time_it_ends_at_once(lab: Packs, alone: Packs) -> None:
    lab.hold("b-4")
    runner = lab.start()
    process = lab.reached("b-4")
    os.kill(process, signal.SIGTERM)
    lab.asked("b-4")
    os.kill(process, signal.SIGTERM)
    lab.release("b-4")
    out, _ = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 0 and "it was ended by SIGTERM" in out
    same(lab, alone)


def test_a_killed_pack_continues_at_its_checkpoints(lab: Packs, alone: Packs) -> None:
    lab.hold("b-4")
    runner = lab.start()
    process = lab.reached("b-4")
    lab.release("b-4")
    os.kill(process, signal.SIGKILL)
    out, _ = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 0 and out.count("SIGKILL") == 3 and "4 done" in out
    assert lab.told() == {"a": ("running", "done")} | dict.fromkeys("bcd", ("running", "lost", "running", "done"))
    assert "iteration 0/6" not in (lab.run("c") / "attempt-2.log").read_text(), "it began at its checkpoint"
    same(lab, alone)


def test_the_pack_of_a_killed_runner_is_adopted_as_one_trial(lab: Packs, alone: Packs) -> None:
    lab.hold("b-4", "d-6")
    runner = lab.start()
    process = lab.reached("b-4")
    until(lambda: lab.told()["a"] == ("running", "done"))
    runner.kill()
    runner.communicate()
    assert alive(process)

    def adopted() -> None:
        try:
            until(lambda: [detail.get("adopted") for *_, detail in lab.events()].count(True) == 3)
            lab.release("b-4")
            lab.reached("d-6")
            until(lambda: lab.told()["c"][-1] == "done")  # each as it ends
        finally:  # a failure here must not leave the runner waiting
            lab.release("b-4", "d-6")

    helper = aside(adopted)
    assert lab.packed(2).here() == 0
    helper.join()
    assert all(lab.logs(label) == ["attempt-1.log"] for label in "abcd"), "nothing ran twice"
    assert lab.told() == {"a": ("running", "done")} | dict.fromkeys("bcd", ("running", "running", "done"))
    same(lab, alone)


def test_a_run_keeps_the_threads_that_it_began_with(lab: Packs) -> None:
    """Sums of several threads have other last bits."""
    lab.hold("b-4")
    lab.pack = 2
    runner = lab.start("--config", str(lab.file), "runner.threads=2")
    lab.reached("b-4")
    os.killpg(runner.pid, signal.SIGINT)
    lab.asked("b-4")
    lab.release("b-4")
    runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 75 and lab.packed(4).here() == 0
    assert [lab.result(label)["provenance"]["threads"] for label in "abcd"] == [2, 2, 1, 1]


# Parts ----------------------------------------------------------------------------------------------------------------------


class Sleepers(LocalExecutor):
    """Starts processes that hold their locks and do nothing."""

    def _spawn(self, folders: Any, slot: Slot, device: str, more: Any, locks: Any, log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], pass_fds=locks)


def test_what_others_train_is_left_to_them(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
    executor = Sleepers([Slot("cpu", 1)] * 3)

    def start(some: LocalExecutor, names: str) -> list[LocalTrial]:
        trials = some.start([Wish(tuple(names))], lambda run: tmp_path / run)
        assert all(isinstance(trial, LocalTrial) for trial in trials)
        return [trial for trial in trials if isinstance(trial, LocalTrial)]

    try:
        (one,) = start(executor, "bc")
        (two,) = start(executor, "abcd")
        assert (one.folders, two.folders) == (folders[1:3], [folders[0], folders[3]])
        assert all(holder(folder) is not None for folder in folders)
        other = LocalExecutor([Slot("cpu", 1)])
        for folder, number in zip(folders, "1221", strict=True):
            (folder / ".lock").write_text(number)
        adopted, second = start(other, "abcd")
        assert adopted.process is None and adopted.folders == [folders[0], folders[3]]
        assert second.folders == folders[1:3] and second.slot is None, "there was one slot"
        assert adopted.processes() == {1} and two.process is not None and two.processes() == {two.process.pid}
        (folders[0] / "result.json").write_text("{}")
        assert list(executor.ended()) == [] and list(other.ended()) == [], "its process holds it still"
    finally:
        for trial in executor.live:
            assert isinstance(trial, LocalTrial) and isinstance(trial.process, subprocess.Popen)
            trial.process.kill()
            trial.process.wait()
    assert [folder for end in executor.ended() if end.code == -signal.SIGKILL for folder in end.folders] == [
        *(folders[1], folders[2], folders[0], folders[3])
    ]
    assert len(executor.places.free) == 3 and sum(len(end.folders) for end in other.ended()) == 4


@pytest.mark.parametrize("words", [["--lock", "7"], ["--lock", "7", "--lock", "8", "--lock", "9"]])
def test_each_folder_has_a_lock_or_none_has(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lab.worker", str(tmp_path / "a"), str(tmp_path / "b"), *words]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2 and "for 2 folders: each needs one" in done.stderr
