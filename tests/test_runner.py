"""The local runner with real trials: what is written, and what becomes of runs whose trial, runner or user stops.

Trials wait at an iteration while a file exists (see PLUGIN in runs.py), so nothing here depends on how fast a machine is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from runs import PATIENCE, Lab, alive, aside, until

import train
from lab import __main__ as lab_main

RUN_FILES = {
    ".attempt",
    ".heartbeat",
    ".lock",
    "attempt-1.log",
    "checkpoint",
    "config.yaml",
    "metrics.jsonl",
    "result.json",
}
SWEEP_FILES = {
    ".runner",
    "leaderboard.csv",
    "leaderboard.md",
    "plots",
    "report.html",
    "runs.csv",
    "sweep.db",
    "sweep.yaml",
}
RESULT = {
    *("status", "val_loss", "best_val_loss", "train_loss", "iters", "tokens", "seconds", "tokens_per_second"),
    *("parameters", "trainable_parameters", "flops_per_token", "peak_memory_bytes", "run_id", "cell", "seed"),
    *("attempt", "pack", "error", "cause", "token", "provenance"),
}


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


def same(lab: Lab, whole: Lab, *labels: str) -> None:
    """What was stopped and continued has the bits of what was not."""
    for label in labels:
        assert runs.saved_bytes(lab.run(label)) == runs.saved_bytes(whole.run(label))
        assert runs.records(lab.run(label)) == runs.records(whole.run(label))
        ours, theirs = (runs.clockless(x.result(label)) for x in (lab, whole))
        for key in RESULT - {*runs.CLOCKS, "attempt", "token", "peak_memory_bytes", "provenance"}:
            assert ours[key] == theirs[key], key


def test_what_a_sweep_leaves(whole: Lab) -> None:
    assert {path.name for path in whole.folder.iterdir() if path.name[:6] != "label="} == SWEEP_FILES
    plots = {path.name for path in (whole.folder / "plots").iterdir()}
    assert plots >= {f"{name}.{kind}" for name in ("loss_curves", "comparison") for kind in ("png", "svg")}
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
    rows = lines[lines.index([]) + 2 :]
    loss = f"{whole.result('a')['val_loss']:.4f}"
    assert rows[0][:3] == [whole.run("a").name, "done", "6/6"] and loss in rows[0]
    assert "2 done" in " ".join(lines[0])


def test_a_killed_trial_goes_on_from_its_checkpoint(lab: Lab, whole: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.hold("a-4")

    def kill() -> None:
        process = lab.reached("a-4")
        lab.release("a-4")
        os.kill(process, signal.SIGKILL)

    killer = aside(kill)
    assert lab.here() == 0
    killer.join()
    out = capsys.readouterr().out
    assert "lost: label=a" in out and "it was ended by SIGKILL; it goes on" in out and "2 done" in out
    assert lab.logs("a") == ["attempt-1.log", "attempt-2.log"] and lab.logs("b") == ["attempt-1.log"]
    assert "iteration 0/6" not in (lab.run("a") / "attempt-2.log").read_text(), "it began at its checkpoint"
    assert lab.result("a")["attempt"] == 2
    assert [event for run, event, _ in lab.events() if run.startswith("label=a")] == [
        "running",
        "lost",
        "running",
        "done",
    ]
    same(lab, whole, "a", "b")


def test_a_run_whose_process_always_dies_is_given_up(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.labels = ("dying", "b")
    assert lab.here() == 1
    out = capsys.readouterr().out
    assert out.count("lost: label=dying") == 3 and "1 done, 1 failed" in out
    result = lab.result("dying")
    assert set(result) == RESULT and (result["status"], result["cause"], result["attempt"]) == ("failed", "killed", 4)
    assert (
        "4 times" in result["error"] and "its exit code is 3" in result["error"] and "attempt-4.log" in result["error"]
    )
    assert "last words" in (lab.run("dying") / "attempt-4.log").read_text()
    assert (result["val_loss"], result["iters"], result["seed"]) == (None, 4, 1337)
    assert sorted(lab.statuses()) == ["done", "failed"]


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


def test_runs_that_fail_do_not_stop_the_others(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(lab.file.read_text())
    content["sweep"] = {
        "cases": {
            "angry": {"set": {"model.activation": "angry"}},
            "fine": {},
        }
    }
    file = runs.write(lab.home / "t.yaml", {**content, "name": "t"})
    assert train.main(["--config", str(file)]) == 1
    out = capsys.readouterr().out
    assert "1 done, 1 failed" in out and "no activation today" in out
    results = {
        path.parent.name.partition("-")[0]: json.loads(path.read_text())
        for path in lab.home.glob("runs/t/*/result.json")
    }
    assert {name: result["status"] for name, result in results.items()} == {
        "angry": "failed",
        "fine": "done",
    }
    assert all(set(result) == RESULT for result in results.values())
    assert "in forward" in results["angry"]["error"]
    assert results["angry"]["error"].splitlines()[-1] == "RuntimeError: no activation today"
    angry = next(lab.home.glob("runs/t/angry-*/attempt-1.log")).read_text()
    assert "Traceback (most recent call last)" in angry and results["angry"]["error"] in angry
    assert results["angry"]["cause"] == "exception" and results["fine"]["cause"] is None


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
