"""The parts of the local runner: slots, the database, locks, signals, output, and trials that belong to nobody."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PATIENCE, until

from lab import store
from lab.executors.local import LocalExecutor
from lab.plan import Slot, Wish, slots
from lab.process import SPIN, begin
from lab.worker import Console, StopFlag

STUBBORN = """
import fcntl, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
lock = (folder / ".lock").open("a+")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").open("a").write("x"))
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
        (adopted,) = executor.start([Wish((tmp_path.name,))], lambda run: tmp_path)
        assert adopted.adopted and executor.places.free == []
        assert store.holder(tmp_path) == trial.pid and list(executor.ended()) == []
        looks = iter([False] * 4 + [True] * 999)
        executor.stop(lambda: (tmp_path / "asked").exists() and next(looks))
        assert trial.wait(PATIENCE) == -signal.SIGKILL
        assert (tmp_path / "asked").read_text() == "x", "asked a second time, a trial ends at once"
        assert [end.code for end in executor.ended()] == [0]
        assert len(executor.places.free) == 1 and store.holder(tmp_path) is None
    finally:
        trial.kill()
        trial.wait()


def test_what_a_process_begins_with_is_the_user_s_choice() -> None:
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    for given in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        environment = given | workspace
        begin(environment)
        assert environment == given | workspace
    environment = {}
    begin(environment)
    assert environment == {"GOMP_SPINCOUNT": SPIN, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


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
