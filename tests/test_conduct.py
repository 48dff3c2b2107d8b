"""Whole sweeps in trouble: failures that are alike, other tries, memory that is out, kills of every process, damaged files.

Runners are forked from a warm process (see warm.py) and trials wait at held points, so nothing depends on how fast a machine is.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import until
from warm import Template, Warm, gone

from lab import __main__ as lab_main

Make = Callable[..., Warm]


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    made = Template()
    yield made
    made.close()


@pytest.fixture
def make(template: Template, data: Path, tmp_path: Path) -> Iterator[Make]:
    """Sweeps in folders of their own."""
    labs: list[Warm] = []

    def make(*labels: str, **how: Any) -> Warm:
        labs.append(Warm(tmp_path / f"lab{len(labs)}", data, labels, template=template, **how))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()


@pytest.fixture(scope="module")
def whole(template: Template, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """Runs with nothing in their way."""
    lab = Warm(tmp_path_factory.mktemp("whole"), data, tuple("abcde"), template=template)
    assert lab.carry_out()[0] == 0
    return lab


def same(ours: Warm, theirs: Warm, *labels: str) -> None:
    """The weights, the optimizers and the records of runs."""
    for label in labels:
        assert runs.saved_bytes(ours.run(label)) == runs.saved_bytes(theirs.run(label)), label
        assert runs.records(ours.run(label)) == runs.records(theirs.run(label)), label


def is_done(lab: Warm, label: str) -> bool:
    return "done" in lab.told(label)


def retry(lab: Warm, *words: str) -> int:
    return lab_main.main(["retry", str(lab.folder), *words])


# Failures ------------------------------------------------------------------------------------------------------------------------


def cases(*labels: str) -> dict[str, Any]:
    """A sweep whose runs come in this order, however often a label is there."""
    return {"cases": {f"n{i}": {"set": {"schedule.label": label, "train.seed": i}} for i, label in enumerate(labels)}}


def test_five_failures_alike_pause_a_sweep(make: Make) -> None:
    """What is at work goes on to its end; the rest waits for the next command."""
    lab = make(sweep=cases("a", *["raising"] * 5, "b", "b"), runner={"per_device": 2})
    lab.hold("a-4")
    runner = lab.begin()
    lab.reached("a-4")
    until(lambda: "nothing more is started" in runner.prints)
    lab.release("a-4")
    assert runner.wait() == 1
    out = runner.prints
    assert "5 runs in a row failed with the same error and none went well, so nothing more is started: " in out
    assert "RuntimeError: no schedule today. Mend that and give the same command again." in out
    assert "1 done, 5 failed, 2 unfinished. The same command continues." in out
    assert lab.statuses() == ["done", *["failed"] * 5, "waiting", "waiting"]


def test_a_success_in_between_pauses_nothing(make: Make) -> None:
    lab = make(sweep=cases(*["raising"] * 2, "b", *["raising"] * 2))
    code, out = lab.carry_out(prelude="import lab.plan; lab.plan.ALIKE = 3")
    assert code == 1 and "1 done, 4 failed" in out and "nothing more" not in out


def test_another_try_while_a_runner_is_at_work(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    lab = make("a", "raising", runner={"per_device": 2})
    lab.hold("a-4")
    runner = lab.begin()
    lab.reached("a-4")
    until(lambda: "failed: label=raising" in runner.prints)
    assert retry(lab, "label=raisin") == 2
    assert "has no run 'label=raisin'" in capsys.readouterr().err
    assert retry(lab, lab.run("a").name) == 2
    assert "has not ended: there is nothing to try again." in capsys.readouterr().err
    assert lab.told("raising") == ["running", "failed"], "nothing was tried again"
    assert retry(lab) == 0
    assert "A runner that is at work takes them up" in capsys.readouterr().out
    until(lambda: lab.told("raising").count("failed") == 2)
    lab.release("a-4")
    assert runner.wait() == 1
    assert lab.told("raising") == ["running", "failed", "retried", "running", "failed"]
    assert (lab.run("raising") / "attempt-1.result.json").is_file() and lab.result("raising")["attempt"] == 2
    assert "1 done, 1 failed" in runner.prints


def test_another_try_of_what_did_not_fail(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Named runs are tried again however they ended, by a runner at work, also where they had ended before it came."""
    lab = make("a", "b", runner={"per_device": 2}, sweep={
        "cases": {
            "label=a": {"set": {"schedule.label": "a"}},
            "label=b": {"set": {"schedule.label": "b", "optimizer.learning_rate": 1e30}},
        }
    })  # fmt: skip
    lab.hold("a-4")
    runner = lab.begin()
    lab.reached("a-4")
    until(lambda: "diverged: label=b" in runner.prints)
    for again in (1, 2):
        assert retry(lab) == 0
        assert "No run has failed." in capsys.readouterr().out
        assert retry(lab, lab.run("b").name) == 0
        if again == 1:
            until(lambda: lab.told("b") == ["running", "diverged", "retried", "running", "diverged"])
            runner.end()  # the trial of a trains on
            runner = lab.begin()
            until(lambda: lab.told("a").count("running") == 2)
    until(lambda: lab.told("b").count("diverged") == 3)
    lab.release("a-4")
    assert runner.wait() == 0 and "1 diverged, 1 done" in runner.prints
    assert retry(lab, lab.run("a").name) == 0
    assert lab.carry_out()[0] == 0 and lab.result("a")["attempt"] == 2, "without a runner the next command does it"


# Who stops, and who is stopped ---------------------------------------------------------------------------------------------------


def test_who_detaches_leaves_trials_behind(make: Make, whole: Warm) -> None:
    lab = make("a", "b", "c", runner={"per_device": 2})
    lab.hold("a-4", "b-4")
    runner = lab.begin("--detach")
    trials = [lab.reached("a-4"), lab.reached("b-4")]
    assert runner.end(signal.SIGINT) == 75
    assert "2 trials train on without this runner. The same command takes them up again." in runner.prints
    assert not any(gone(trial) for trial in trials) and not list(lab.folder.glob("label=c*/attempt-*"))
    lab.release("a-4")
    until(lambda: gone(trials[0]))  # a worker that nobody gives more
    assert lab.result("a")["status"] == "done"
    runner = lab.begin("--detach")
    until(lambda: lab.told("b").count("running") == 2)
    lab.release("b-4")
    assert runner.wait() == 0
    assert [lab.logs(label) for label in "abc"] == [["attempt-1.log"]] * 3, "nothing ran twice"
    assert (lab.told("a"), lab.told("c")) == (["running"], ["running", "done"])
    same(lab, whole, *"abc")


def test_who_detaches_at_once_leaves_all_of_its_trials_behind(make: Make) -> None:
    """Also those whose workers have not begun: here the process that forks them begins when the runner is gone."""
    lab = make("a", "b", runner={"per_device": 2})
    prelude = """
import os, time, lab.forks
plain = lab.forks.serve
def late(control):
    runner = os.getppid()
    while os.getppid() == runner:
        time.sleep(0.01)
    plain(control)
lab.forks.serve = late
import lab.executors.local as local
local.LocalExecutor.close = lambda self: os._exit(75)
"""
    runner = lab.begin("--detach", prelude=prelude)
    until(lambda: len(list(lab.folder.glob("label=*/attempt-1.log"))) == 2)
    assert runner.end(signal.SIGINT) == 75
    until(lambda: len(list(lab.folder.glob("label=*/result.json"))) == 2)
    assert lab.logs("a") == lab.logs("b") == ["attempt-1.log"]


def test_more_trials_are_adopted_than_there_are_places(make: Make, whole: Warm) -> None:
    """Nothing is put beside them before they are few enough, and trials that had not said who they are stay apart."""
    lab = make(*"abcd", runner={"per_device": 3})
    lab.hold("a-4", "b-4", "c-4")
    runner = lab.begin()
    trials = [lab.reached(name) for name in ("a-4", "b-4", "c-4")]
    runner.end()
    for label in "ab":
        (lab.run(label) / ".lock").write_text("")
    lab.runner["per_device"] = 1
    runner = lab.begin()
    until(lambda: sum(detail.get("adopted", False) for *_, detail in lab.events()) == 3)
    os.kill(trials[0], signal.SIGKILL)
    lab.release("a-4")
    until(lambda: "lost" in lab.told("a"))  # and nobody waits with that for b
    for label in "bc":
        assert not list(lab.folder.glob("label=d*/attempt-*")) and lab.logs("a") == ["attempt-1.log"]
        lab.release(f"{label}-4")
        until(partial(is_done, lab, label))
    assert runner.wait() == 0
    assert [len(lab.logs(label)) for label in "abcd"] == [2, 1, 1, 1]
    same(lab, whole, *"abcd")


def test_the_process_that_forks_workers_is_killed(make: Make, whole: Warm) -> None:
    """Trials at work go on, and what is started later has workers of another one."""
    lab = make(*"abcd", runner={"per_device": 2})
    lab.hold("a-4", "b-4")
    prelude = """
from lab.helper import Helper
plain = Helper._fork
def fork(self, serve, theirs):
    made = plain(self, serve, theirs)
    open("servers", "a").write(f"{made.pid}\\n")
    return made
Helper._fork = fork
"""
    runner = lab.begin(prelude=prelude)
    trials = [lab.reached("a-4"), lab.reached("b-4")]
    servers = lab.home / "servers"
    os.kill(int(servers.read_text()), signal.SIGKILL)
    until(lambda: gone(int(servers.read_text().split()[0])))
    os.kill(trials[1], signal.SIGKILL)
    lab.release("a-4", "b-4")
    assert runner.wait() == 0 and "4 done" in runner.prints
    assert lab.told("a") == ["running", "done"] and lab.told("b") == ["running", "lost", "running", "done"]
    assert len(servers.read_text().split()) == 2
    same(lab, whole, *"abcd")


# Memory --------------------------------------------------------------------------------------------------------------------------


def test_out_of_memory_beside_others(make: Make, whole: Warm) -> None:
    lab = make("a", "b", "c", runner={"per_device": 2})
    (lab.points / "a-4.oom").write_text("1")
    lab.hold("b-4")
    runner = lab.begin()
    lab.reached("b-4")
    until(lambda: "crowded" in lab.told("a"))
    assert lab.told("a") == ["running", "crowded"], "it waits until the device is empty"
    assert not list(lab.folder.glob("label=c*/attempt-*")), "and nobody passes it over"
    lab.release("b-4")
    assert runner.wait() == 0 and "it ran out of memory and goes on alone" in runner.prints
    assert lab.told("a") == ["running", "crowded", "running", "done"] and lab.result("a")["attempt"] == 2
    same(lab, whole, *"abc")


def test_out_of_memory_alone(make: Make) -> None:
    lab = make("a", "b")
    (lab.points / "a-4.oom").write_text("2")
    code, out = lab.carry_out()
    assert code == 1 and "1 done, 1 failed" in out
    result = lab.result("a")
    assert (result["status"], result["cause"], result["attempt"]) == ("failed", "oom", 2)
    assert "no memory today" in result["error"] and lab.told("a")[-2:] == ["running", "failed"]


def test_out_of_memory_in_a_pack(make: Make, whole: Warm) -> None:
    lab = make(*"abc", pack=3)
    (lab.points / "b-4.oom").write_text("1")
    code, out = lab.carry_out()
    assert code == 0 and "3 done" in out
    assert [lab.logs(label) for label in "abc"] == [["attempt-1.log"]] * 3, "it is halved in its process"
    same(lab, whole, *"abc")


# Search and early stopping -------------------------------------------------------------------------------------------------------

SEARCH = {
    "search": {
        "method": "tpe",
        "trials": 7,
        "over": {"optimizer.learning_rate": {"log": [1e-3, 1e-1]}, "schedule.label": ["a", "b", "raising"]},
        "confirm": {"top": 1, "seeds": 2},
    }
}


def state(lab: Warm) -> dict[str, Any]:
    """By run, how it ended, and its tensors and records."""
    made: dict[str, Any] = {}
    for folder in lab.folder.glob("*=*"):
        status = json.loads((folder / "result.json").read_text())["status"]
        made[folder.name] = (status, runs.records(folder), runs.saved_bytes(folder) if status == "done" else None)
    return made


def suggestions(lab: Warm) -> list[Any]:
    with sqlite3.connect(lab.folder / "sweep.db") as db:
        return db.execute("SELECT cell, number, choices FROM suggestions ORDER BY number").fetchall()


def killed(at: int) -> str:
    """A prelude: the runner ends itself at a fault point."""
    return f"import os, schedules; schedules.at_passes({at}, lambda: os.kill(os.getpid(), 9))"


def test_a_search_whose_runner_is_killed_is_the_same_search(make: Make) -> None:
    lab, whole = make(sweep=SEARCH, runner={"per_device": 2}), make(sweep=SEARCH)
    code, out = whole.carry_out()
    assert code == 1 and "failed: " in out, "a suggestion that fails is a part of it"
    assert "failed" in whole.statuses() and "waiting" not in whole.statuses()
    for at in (29, 37):
        assert lab.begin(prelude=killed(at)).wait() == -signal.SIGKILL
    assert lab.carry_out()[0] == 1
    assert suggestions(lab) == suggestions(whole) and len(suggestions(lab)) == 7
    assert state(lab) == state(whole)
    rows = [row for row in whole.rows() if row.phase == "confirm"]
    assert [row.seed for row in rows] == [1338, 1339] and {row.status for row in rows} == {"done"}
    begun = [run for run, event, _ in whole.events() if event == "running"]
    assert set(begun[-2:]) == {row.run_id for row in rows}, "what is confirmed comes last"


def halving(eta: int = 2) -> dict[str, Any]:
    return {"stop": {"method": "halving", "eta": eta, "min_iters": 2}}


def stopped_early(lab: Warm, whole: Warm) -> dict[str, str]:
    """How runs of a sweep ended that stops early; those that are done have the bits of runs that nobody judged."""
    made = {label: lab.result(label)["status"] for label in lab.labels}
    assert set(made.values()) <= {"done", "pruned"} and "done" in made.values()
    assert lab.statuses() == list(made.values())
    for label, status in made.items():
        if status == "done":
            judged = [one for one in runs.records(lab.run(label)) if one["kind"] == "eval" and one["iter"] in (2, 4)]
            assert [one for one in runs.records(lab.run(label)) if one not in judged] == runs.records(whole.run(label))
            assert runs.saved_bytes(lab.run(label)) == runs.saved_bytes(whole.run(label))
    return made


def test_halving_goes_on_after_a_kill_while_runs_rest(make: Make, whole: Warm) -> None:
    plain, lab = (make(*"abcde", more=halving()) for _ in range(2))
    assert plain.carry_out()[0] == 0
    made = stopped_early(plain, whole)
    assert "pruned" in made.values()
    went_on = [label for label in "abcde" if len(plain.logs(label)) > 1]
    assert went_on, "some rested and went on"
    for label in went_on:
        assert "iteration 0/6" not in (plain.run(label) / "attempt-2.log").read_text(), "from their checkpoints"
    lab.hold("d-1")
    runner = lab.begin()
    trial = lab.reached("d-1")
    assert list(lab.folder.glob("label=*/.paused"))
    runner.end()
    os.kill(trial, signal.SIGKILL)
    lab.release("d-1")
    assert lab.carry_out()[0] == 0
    assert stopped_early(lab, whole) == made
    assert [len(lab.logs(x)) - len(plain.logs(x)) for x in "abcde"] == [0, 0, 0, 1, 0], "who rests is not asked again"
    assert {label: runs.records(lab.run(label)) for label in "abcde"} == {
        label: runs.records(plain.run(label)) for label in "abcde"
    }


def test_halving_in_a_pack(make: Make, whole: Warm) -> None:
    lab = make(*"abcde", more=halving(), pack=5)
    assert lab.carry_out()[0] == 0
    assert "pruned" in stopped_early(lab, whole).values()


def test_a_few_runs_leave_one_that_is_done(make: Make, whole: Warm, capsys: pytest.CaptureFixture[str]) -> None:
    lab = make("a", "b", more=halving(3))
    assert lab.carry_out()[0] == 0
    made = stopped_early(lab, whole)
    assert sorted(made.values()) == ["done", "pruned"]
    (label,) = (label for label, status in made.items() if status == "pruned")
    assert retry(lab, lab.run(label).name) == 0
    assert lab.carry_out()[0] == 0 and lab.told(label).count("pruned") == 1, "who asks for it lets it pass"


def test_one_that_comes_to_nothing_does_not_take_the_others_with_it(make: Make, whole: Warm) -> None:
    """The best at the first rung fails later; the next best goes on in its place."""
    sweep = {"cases": {
        "label=a": {"set": {"schedule.label": "a", "optimizer.learning_rate": 0.01}},
        "label=best": {"set": {"schedule.label": "raising", "optimizer.learning_rate": 0.03}},
    }}  # fmt: skip
    lab = make("a", sweep=sweep, more=halving(3))
    assert lab.carry_out()[0] == 1
    assert lab.result("best")["status"] == "failed" and lab.result("a")["status"] == "done"


# Files ---------------------------------------------------------------------------------------------------------------------------


def test_a_database_that_another_process_has_locked(make: Make, whole: Warm) -> None:
    """For a while it is waited for. After that the sweep stops, what is at work goes on, and the same command continues."""
    lab = make("a", "b")
    impatient = """
import sqlite3
plain = sqlite3.connect
sqlite3.connect = lambda *given, **named: plain(*given, **{**named, "timeout": 0.05})
"""
    for prelude, label in ((impatient, "a"), ("", "b")):
        lab.hold(f"{label}-4")
        runner = lab.begin(prelude=prelude)
        lab.reached(f"{label}-4")
        with sqlite3.connect(lab.folder / "sweep.db", isolation_level=None) as db:
            db.execute("BEGIN IMMEDIATE")
            lab.release(f"{label}-4")
            until((lab.run(label) / "result.json").exists)
            if prelude:
                assert runner.wait() == 1
                assert "(database is locked). What runs have saved is kept;" in runner.prints
                assert "Traceback" not in runner.prints
            db.execute("ROLLBACK")
        db.close()
    assert runner.wait() == 0 and "2 done" in runner.prints
    assert lab.logs("a") == lab.logs("b") == ["attempt-1.log"]
    same(lab, whole, "a", "b")


def test_damaged_files(make: Make, whole: Warm, capsys: pytest.CaptureFixture[str]) -> None:
    lab = make("a", "b")
    assert lab.carry_out()[0] == 0
    (lab.run("a") / "result.json").write_text('{"status": "do')
    database = lab.folder / "sweep.db"
    database.write_bytes(b"x" * 4096)
    code, out = lab.carry_out()
    advice = f"{database} cannot be read: it is damaged (file is not a database). Move it away"
    assert code == 1 and advice in out
    assert retry(lab) == 2 and advice in capsys.readouterr().err
    database.unlink()
    code, out = lab.carry_out()
    assert code == 0 and "2 done" in out
    assert (lab.logs("a"), lab.logs("b")) == (["attempt-1.log", "attempt-2.log"], ["attempt-1.log"])
    same(lab, whole, "a", "b")


# What lasts ----------------------------------------------------------------------------------------------------------------------


def test_what_has_ended_is_let_go_of(make: Make) -> None:
    """Every failure has a worker of its own, and of those that are gone nothing is kept."""
    lab = make(sweep=cases("a", *["raising"] * 4, "b"))
    prelude = """
from pathlib import Path
from lab.executors.local import LocalExecutor
plain = LocalExecutor.close
def close(self):
    kept = (len(self.forks.workers), len(self.idle), len(self.live), len(self.places.taken))
    Path("kept").write_text(repr((kept, len(list(Path("/proc/self/fd").iterdir())))))
    plain(self)
LocalExecutor.close = close
"""
    files = []
    for _ in range(2):
        assert lab.carry_out(prelude=prelude)[0] == 1
        kept, count = eval((lab.home / "kept").read_text())
        assert kept[0] <= 1 and kept[1] <= 1 and kept[2:] == (0, 0), kept
        files.append(count)
    assert abs(files[0] - files[1]) <= 1, "open files"


def test_a_run_s_threads_are_what_was_asked_for(whole: Warm) -> None:
    assert [whole.result(label)["provenance"]["threads"] for label in "ab"] == [1, 1]
