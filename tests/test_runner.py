"""The local runner with real trials: what is written, and what becomes of runs whose trial, runner or user stops.

Trials wait at an iteration while a file exists (see PLUGIN in runs.py), so nothing here depends on how fast a machine is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runs

import train
from lab import __main__ as lab_main
from lab import store
from lab.executors import LocalExecutor
from lab.plan import Slot, slots
from lab.worker import Console, StopFlag

ROOT = Path(__file__).parents[1]
PATIENCE = 90.0  # seconds until a test gives up
RUN_FILES = {".lock", "attempt-1.log", "checkpoint", "config.yaml", "metrics.jsonl", "result.json"}
SWEEP_FILES = {".runner", "leaderboard.csv", "plots", "report.html", "sweep.db", "sweep.yaml"}
RESULT = {
    *("status", "val_loss", "best_val_loss", "train_loss", "iters", "tokens", "seconds", "tokens_per_second"),
    *("parameters", "trainable_parameters", "flops_per_token", "peak_memory_bytes", "run_id", "cell", "seed"),
    *("attempt", "error", "provenance"),
}


def until(true: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@dataclass
class Lab:
    """A folder with a sweep file over the plugin's labels; `points` holds the files that trials wait for."""

    home: Path
    data: Path
    labels: tuple[str, ...] = ("a", "b")
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.points = self.home / "points"
        self.points.mkdir(exist_ok=True)
        (self.home / "extra.py").write_text(runs.PLUGIN)
        (self.home / "model.py").write_text("raise SystemExit('a module of the current folder was taken for ours')")

    @property
    def file(self) -> Path:
        made = runs.tree(self.data, name="s", plugins=["extra.py"], runner__root=str(self.home / "runs"))
        made["train"] |= {"max_iters": 6, "eval_interval": 6}
        made["schedule"] = {"variant": "points"}
        made["sweep"] = {"grid": {"schedule.label": list(self.labels)}, "baseline": {"schedule.label": self.labels[0]}}
        return runs.write(self.home / "s.yaml", made)

    @property
    def folder(self) -> Path:
        return self.home / "runs" / "s"

    def run(self, label: str) -> Path:
        return next(self.folder.glob(f"label={label}-*"))

    def here(self, *words: str) -> int:
        """A runner in this process."""
        return train.main(["--config", str(self.file), *words])

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A runner in a process of its own, in a folder that is not the repository."""
        command = [sys.executable, str(ROOT / "train.py"), *(words or ("--config", str(self.file)))]
        process = subprocess.Popen(
            command,
            cwd=self.home,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "POINTS": str(self.points)}

    def hold(self, *names: str) -> None:
        for name in names:
            (self.points / f"{name}.hold").touch()

    def release(self, *names: str) -> None:
        for name in names:
            (self.points / f"{name}.hold").unlink(missing_ok=True)

    def reached(self, name: str) -> int:
        """Waits until a trial stands at a held point; its process."""
        until((self.points / f"{name}.pid").exists)
        return int((self.points / f"{name}.pid").read_text())

    def asked(self, name: str) -> None:
        """Waits until the trial at a held point was asked to stop."""
        until((self.points / f"{name}.asked").exists)

    def result(self, label: str) -> dict[str, Any]:
        made: dict[str, Any] = json.loads((self.run(label) / "result.json").read_text())
        return made

    def logs(self, label: str) -> list[str]:
        return sorted(path.name for path in self.run(label).glob("attempt-*.log"))

    def events(self) -> list[tuple[str, str, dict[str, Any]]]:
        db = sqlite3.connect(self.folder / "sweep.db")
        rows = db.execute("SELECT run_id, event, detail FROM events ORDER BY number").fetchall()
        db.close()
        return [(run_id, event, json.loads(detail)) for run_id, event, detail in rows]

    def statuses(self) -> list[str]:
        return [row.status for row in store.listed(self.folder / "sweep.db")]

    def close(self) -> None:
        """Leaves no process behind, whatever failed."""
        for path in self.points.glob("*.hold"):
            path.unlink()
        for process in self.started:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The sweep with nothing in its way."""
    made = Lab(tmp_path_factory.mktemp("whole"), data)
    assert made.here() == 0
    return made


@pytest.fixture
def lab(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    made = Lab(tmp_path / "lab", data)
    monkeypatch.setenv("POINTS", str(made.points))
    monkeypatch.chdir(made.home)
    yield made
    made.close()


def aside(act: Callable[[], None]) -> threading.Thread:
    """Does something while the runner is at work in this thread."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def same(lab: Lab, whole: Lab, *labels: str) -> None:
    """What was stopped and continued has the bits of what was not."""
    for label in labels:
        assert runs.saved_bytes(lab.run(label)) == runs.saved_bytes(whole.run(label))
        assert runs.records(lab.run(label)) == runs.records(whole.run(label))
        ours, theirs = (runs.clockless(x.result(label)) for x in (lab, whole))
        for key in RESULT - {*runs.CLOCKS, "attempt", "peak_memory_bytes", "provenance"}:
            assert ours[key] == theirs[key], key


def test_what_a_sweep_leaves(whole: Lab) -> None:
    assert {path.name for path in whole.folder.iterdir() if path.name[:6] != "label="} == SWEEP_FILES
    assert {path.name for path in (whole.folder / "plots").iterdir()} == {"loss_curves.png", "comparison.png"}
    assert len(list(whole.folder.glob("label=*"))) == 2
    for label in whole.labels:
        folder = whole.run(label)
        assert {path.name for path in folder.iterdir()} == RUN_FILES
        assert [path.name for path in sorted((folder / "checkpoint").iterdir())] == ["00000003", "00000006"]
        result = whole.result(label)
        assert set(result) == RESULT
        assert (result["status"], result["error"], result["attempt"]) == ("done", None, 1)
        assert (result["run_id"], result["cell"], result["seed"]) == (folder.name, f"label={label}", 1337)
        assert (result["iters"], result["tokens"]) == (6, 6 * 64)
        evaluated = runs.records(folder, "eval")
        assert [record["iter"] for record in evaluated] == [0, 6]
        assert result["val_loss"] == result["best_val_loss"] == evaluated[-1]["val_loss"]
        assert "iteration 6/6" in (folder / "attempt-1.log").read_text()
        told = result["provenance"]
        assert set(told) >= {"commit", "dirty", "versions", "device"} and told["device"].startswith("cpu: ")
        assert told["threads"] == max(1, len(os.sched_getaffinity(0)) // 2), "the trials share the cores"
        assert result["peak_memory_bytes"] > 50e6
    assert whole.statuses() == ["done", "done"]
    assert [event for _, event, _ in whole.events()].count("done") == 2


def test_done_runs_are_skipped(whole: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.glob("label=*/*")}
    assert whole.here() == 0
    assert "2 done" in capsys.readouterr().out.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in whole.folder.glob("label=*/*")} == before
    assert whole.here("--dry-run", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["done"] == 2 and {run["run_id"] for run in listed["runs"]} == {whole.run(x).name for x in "ab"}


def test_the_report_and_the_status_come_from_files(whole: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    table = (whole.folder / "leaderboard.csv").read_bytes()
    for name in ("leaderboard.csv", "report.html", "plots/comparison.png"):
        (whole.folder / name).unlink()
    assert lab_main.main(["report", str(whole.folder)]) == 0
    assert "2 runs in 2 cells" in capsys.readouterr().out
    assert (whole.folder / "leaderboard.csv").read_bytes() == table and b"baseline" in table
    assert (whole.folder / "report.html").is_file() and (whole.folder / "plots/comparison.png").is_file()
    assert lab_main.main(["status", str(whole.folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    loss = f"{whole.result('a')['val_loss']:.4f}"
    assert lines[1][:3] == [whole.run("a").name, "done", "6/6"] and lines[1][-1] == loss
    assert lines[-1] == ["2", "done"]


def test_a_killed_trial_is_a_failed_run_until_it_is_run_again(
    lab: Lab, whole: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.hold("a-4")
    killer = aside(lambda: os.kill(lab.reached("a-4"), signal.SIGKILL))
    assert lab.here() == 1
    killer.join()
    out = capsys.readouterr().out
    assert "1 done, 1 failed" in out and "SIGKILL" in out
    result = lab.result("a")
    assert set(result) == RESULT and result["status"] == "failed" and "SIGKILL" in result["error"]
    assert (result["val_loss"], result["iters"], result["seed"]) == (None, 4, 1337)
    assert sorted(lab.statuses()) == ["done", "failed"]
    lab.release("a-4")
    assert lab.here() == 0
    assert lab.logs("a") == ["attempt-1.log", "attempt-2.log"] and lab.logs("b") == ["attempt-1.log"]
    assert "iteration 0/6" not in (lab.run("a") / "attempt-2.log").read_text(), "it began at its checkpoint"
    assert lab.result("a")["attempt"] == 2
    same(lab, whole, "a", "b")


def test_ctrl_c_stops_at_a_checkpoint_and_the_same_command_continues(
    lab: Lab, whole: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.hold("a-4", "b-3")
    runner = lab.start()
    processes = [lab.reached("a-4"), lab.reached("b-3")]
    assert lab.here() == 1
    assert f"another runner is at work on this sweep (process {runner.pid}" in capsys.readouterr().err
    assert lab_main.main(["status", str(lab.folder)]) == 0
    assert "2 running" in capsys.readouterr().out
    os.killpg(runner.pid, signal.SIGINT)  # as a terminal does
    lab.asked("a-4")
    lab.asked("b-3")
    lab.release("a-4", "b-3")
    out, err = runner.communicate(timeout=PATIENCE)
    assert "stopping: trials save a checkpoint" in out
    assert runner.returncode == 75 and "2 unfinished. The same command continues." in out
    assert "Traceback" not in err
    assert not any(alive(process) for process in processes)
    assert lab.statuses() == ["stopped", "stopped"]
    for label, iteration in (("a", 5), ("b", 4)):
        assert not (lab.run(label) / "result.json").exists()
        assert (lab.run(label) / f"checkpoint/{iteration:08d}").is_dir()
    assert lab_main.main(["status", str(lab.folder)]) == 0
    assert "2 stopped" in capsys.readouterr().out
    assert lab.here() == 0
    same(lab, whole, "a", "b")


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_trials_of_a_killed_runner_are_adopted(lab: Lab, whole: Lab) -> None:
    lab.hold("a-4", "b-4")
    runner = lab.start()
    processes = [lab.reached("a-4"), lab.reached("b-4")]
    runner.kill()
    runner.communicate()
    assert all(alive(process) for process in processes)

    def adopted() -> None:
        until(lambda: [detail.get("adopted") for *_, detail in lab.events()].count(True) == 2)
        lab.release("a-4", "b-4")

    helper = aside(adopted)
    assert lab.here() == 0
    helper.join()
    assert lab.logs("a") == lab.logs("b") == ["attempt-1.log"], "nothing ran twice"
    assert lab.statuses() == ["done", "done"]
    same(lab, whole, "a", "b")


def test_a_second_ctrl_c_ends_at_once(lab: Lab) -> None:
    lab.labels = ("a",)
    lab.hold("a-4")
    runner = lab.start()
    trial = lab.reached("a-4")
    os.killpg(runner.pid, signal.SIGINT)  # as a terminal does
    lab.asked("a-4")
    assert alive(trial), "it may save first"
    os.killpg(runner.pid, signal.SIGINT)  # as a terminal does
    out, _ = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 75 and "Ctrl-C again ends them at once" in out
    assert not alive(trial) and not (lab.run("a") / "result.json").exists()
    assert (lab.run("a") / "checkpoint/00000003").is_dir()


STUBBORN = """
import fcntl, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
lock = (folder / ".lock").open("a+")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch())
lock.write(str(os.getpid()))
lock.flush()
(folder / "ready").touch()
while True:
    time.sleep(60)
"""


def test_an_adopted_trial_is_asked_and_then_ended(tmp_path: Path) -> None:
    """It is no child of the runner, which knows it by its lock."""
    trial = subprocess.Popen([sys.executable, "-c", STUBBORN, str(tmp_path)])
    try:
        until((tmp_path / "ready").exists)
        executor = LocalExecutor([Slot("cpu", 1)])
        assert executor.start(tmp_path).process is None and executor.free == []
        assert store.holder(tmp_path) == trial.pid and list(executor.finished()) == []
        executor.stop((tmp_path / "asked").exists)
        assert trial.wait(PATIENCE) == -signal.SIGKILL and (tmp_path / "asked").exists()
        assert [code for _, code in executor.finished()] == [0]
        assert len(executor.free) == 1 and store.holder(tmp_path) is None
    finally:
        trial.kill()
        trial.wait()


def test_runs_that_fail_do_not_stop_the_others(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(lab.file.read_text())
    content["sweep"] = {
        "cases": {
            "angry": {"set": {"model.activation": "angry"}},
            "dying": {"set": {"schedule.label": "dying"}},
            "fine": {},
        }
    }
    file = runs.write(lab.home / "t.yaml", {**content, "name": "t"})
    assert train.main(["--config", str(file)]) == 1
    out = capsys.readouterr().out
    assert "1 done, 2 failed" in out and "no activation today" in out
    results = {
        path.parent.name.partition("-")[0]: json.loads(path.read_text())
        for path in lab.home.glob("runs/t/*/result.json")
    }
    assert {name: result["status"] for name, result in results.items()} == {
        "angry": "failed",
        "dying": "failed",
        "fine": "done",
    }
    assert all(set(result) == RESULT for result in results.values())
    assert "in forward" in results["angry"]["error"]
    assert results["angry"]["error"].splitlines()[-1] == "RuntimeError: no activation today"
    angry, dying = (next(lab.home.glob(f"runs/t/{name}-*/attempt-1.log")).read_text() for name in ("angry", "dying"))
    assert "Traceback (most recent call last)" in angry and results["angry"]["error"] in angry
    assert "its exit code is 3" in results["dying"]["error"] and "last words" in dying


def test_a_metric_that_no_run_has_is_a_sentence(whole: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(whole.folder, tmp_path / "copy")
    file = copy / "sweep.yaml"
    file.write_text(file.read_text().replace("sweep:\n", "sweep:\n  objective: {metric: val_los, mode: min}\n"))
    assert lab_main.main(["report", str(copy)]) == 1
    assert "no result has a field 'val_los'" in capsys.readouterr().err


# One run --------------------------------------------------------------------------------------------------------------------


def test_one_run_without_a_file(lab: Lab) -> None:
    words = [f"data.root={lab.data}", "data.dataset=tiny", "train.max_iters=5", "train.eval_iters=1"]
    words += ["model.n_layer=2", "model.n_embd=16", "model.n_head=2", "tracking.wandb.mode=off", "train.batch_size=2"]
    process = lab.start(*words)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    (folder,) = (lab.home / "runs/default").glob("run-*")
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    lines = out.splitlines()
    assert lines[0].endswith("5 iterations") and "iteration 5/5, train loss" in lines[2]
    assert lines[-1] == "runs/default: 1 done"
    assert (folder / "attempt-1.log").read_text().splitlines() == lines[:-1]
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == RESULT and result["status"] == "done" and result["iters"] == 5


def test_one_run_stops_and_continues(lab: Lab, data: Path) -> None:
    content = runs.tree(data, name="one", plugins=["extra.py"], schedule={"variant": "points"}, runner={"threads": 1})
    file = runs.write(lab.home / "one.yaml", content)
    lab.hold("a-4")
    process = lab.start("--config", str(file))
    assert lab.reached("a-4") == process.pid, "a single run needs no other process"
    process.send_signal(signal.SIGINT)
    lab.asked("a-4")
    lab.release("a-4")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (75, "") and "stopped; it continues where it is" in out
    (folder,) = (lab.home / "runs/one").glob("*-*")
    assert [path.name for path in sorted((folder / "checkpoint").iterdir())] == ["00000003", "00000005"]
    assert not (folder / "result.json").exists()
    assert train.main(["--config", str(file)]) == 0
    assert json.loads((folder / "result.json").read_text())["attempt"] == 2
    whole = runs.write(lab.home / "whole.yaml", {**content, "name": "whole"})
    assert train.main(["--config", str(whole)]) == 0
    (other,) = (lab.home / "runs/whole").glob("*-*")
    assert runs.saved_bytes(folder) == runs.saved_bytes(other)
    assert runs.records(folder) == runs.records(other)


def test_one_run_that_diverges(lab: Lab, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = runs.tree(data, name="wild", optimizer__learning_rate=1e30)
    assert train.main(["--config", str(runs.write(lab.home / "wild.yaml", content))]) == 0
    assert "1 diverged" in capsys.readouterr().out
    (folder,) = (lab.home / "runs/wild").glob("*-*")
    text = (folder / "result.json").read_text()
    result = json.loads(text)
    assert set(result) == RESULT and "NaN" not in text
    assert (result["status"], result["val_loss"]) == ("diverged", None) and 0 < result["iters"] <= 8
    assert runs.records(folder)[-1]["iter"] == result["iters"]


# Parts ----------------------------------------------------------------------------------------------------------------------


def test_slots() -> None:
    def plan(*devices: str, per_device: int | str = "auto", threads: int | None = None, trials: int = 9) -> list[Slot]:
        return slots(devices, per_device, threads, cores=8, trials=trials)

    assert plan("cpu") == [Slot("cpu", 1)] * 8
    assert plan("cpu", trials=2) == [Slot("cpu", 4)] * 2
    assert plan("cpu", trials=0) == [Slot("cpu", 8)]
    assert plan("cpu", per_device=3) == [Slot("cpu", 2)] * 3
    assert plan("cpu", threads=5, trials=1) == [Slot("cpu", 5)]
    assert plan("cuda:0", "cuda:1") == [Slot("cuda:0", 4), Slot("cuda:1", 4)]
    assert [s.device for s in plan("cuda:0", "cuda:1", per_device=2, trials=3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_the_database_keeps_what_a_later_listing_leaves_out(tmp_path: Path) -> None:
    def row(name: str, status: str = "waiting") -> store.Row:
        return store.Row(name, f"run-{name}", "cell", 1, {"a.b": [1, None]}, name == "x", 10, status)

    first = store.Store(tmp_path / "sweep.db")
    first.list([row("x"), row("y")])
    first.event("running", "run-x", device="cpu")
    assert [r.status for r in store.listed(tmp_path / "sweep.db")] == ["running", "waiting"], "read beside the writer"
    first.close()
    second = store.Store(tmp_path / "sweep.db")
    second.list([row("z", "done"), row("x")])
    second.close()
    assert store.listed(tmp_path / "sweep.db") == [row("z", "done"), row("x")]
    db = sqlite3.connect(tmp_path / "sweep.db")
    assert db.execute("SELECT run_id, event FROM events").fetchall() == [("run-x", "running")]
    assert db.execute("SELECT count(*) FROM runs").fetchall() == [(3,)]
    db.execute("PRAGMA user_version=0")
    db.close()
    third = store.Store(tmp_path / "sweep.db")  # of another version: listed anew, events kept
    third.list([row("x")])
    third.close()
    assert store.listed(tmp_path / "sweep.db") == [row("x")]


def test_a_lock_belongs_to_whoever_has_it_open(tmp_path: Path) -> None:
    assert store.holder(tmp_path) is None
    lock = store.hold(tmp_path)
    assert lock is not None and store.hold(tmp_path) is None and store.holder(tmp_path) == 0
    lock.write("123")
    lock.flush()
    assert store.holder(tmp_path) == 123 == store.holder(tmp_path)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    lock.close()
    try:
        assert store.holder(tmp_path) == 123, "the child has it still"
    finally:
        child.kill()
        child.wait()
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert store.holder(tmp_path) is None, "who only looks is not in the way of another who does"
    again = store.hold(tmp_path)
    assert again is not None and (tmp_path / ".lock").read_text() == ""
    again.close()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    store.write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        store.write_atomically(file, "new \ud800")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_signals_are_asked_for_and_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopFlag(hard_ends=False) as stop:
        assert (stop(), stop.hard) == (False, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop(), stop.hard) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.hard
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_output_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, (tmp_path / "log").open("w") as log:
        console = Console(stream, log)
        print("first", file=console, flush=True)
        os.close(reader)
        print("second", file=console, flush=True)
        console.write("\r\x1b[Kiteration 1/9")
        console.write("\r\x1b[Kiteration 2/9\n")
        assert (tmp_path / "log").read_text() == "first\nsecond\niteration 2/9\n"
