"""Warm workers: one process trains many runs, what one run leaves does not reach the next, and an error ends the worker."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from runs import Lab, aside, until

from lab.forks import Forks
from lab.helper import receive, send


@pytest.fixture
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()
    assert made.helper.process.poll() is not None


def test_messages_carry_open_files(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    files = [(tmp_path / str(i)).open("w") for i in range(450)]
    content = {"word": "x" * 300_000, "number": 1}
    sender = aside(lambda: send(here, content, [file.fileno() for file in files]))
    message = receive(there)
    sender.join()
    assert message is not None and message[0] == content and len(message[1]) == 450
    os.write(message[1][449], b"the last")
    assert (tmp_path / "449").read_text() == "the last"
    for file in files:
        file.close()
    for number in message[1]:
        os.close(number)
    here.close()
    assert receive(there) is None, "nobody is there any more"
    there.close()


def test_a_worker_that_dies_says_how(forks: Forks) -> None:
    worker = forks.worker({})

    def began() -> bool:
        forks.listen()
        return worker.pid > 0

    until(began)
    assert worker.poll() is None
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: worker.poll() is not None)
    assert worker.code == -signal.SIGKILL and not worker.idle
    worker.give({"folders": []}, [])
    assert worker.closed


class OneByOne(Lab):
    """Four runs of different graphs, one worker at a time."""

    warm = True

    @property
    def file(self) -> Path:
        made = json.loads(super().file.read_text())
        made["runner"] |= {"per_device": 1, "threads": 1, "warm": self.warm, "pack": "off"}
        cases: dict[str, object] = {"plain": {}, "other": {"set": {"model.norm": "rmsnorm"}}}
        cases |= {"angry": {"set": {"model.activation": "angry"}}, "last": {"set": {"model.dropout": 0.1}}}
        cases |= {
            "bits": {"set": {"train.matmul_precision": "medium"}},
            "again": {"set": {"model.bias": True, "train.seed": 7}},
        }
        made["sweep"] = {"cases": cases}
        return runs.write(self.home / "s.yaml", made)

    def run(self, label: str) -> Path:
        return next(self.folder.glob(f"{label}[+-]*"))

    def workers(self) -> dict[str, str]:
        """By case, the process that trained it."""
        return {
            name: (self.run(name) / ".lock").read_text()
            for name in ("plain", "other", "angry", "last", "bits", "again")
        }


def test_one_worker_trains_one_run_after_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalogue: None
) -> None:
    """Until one fails: the next runs have another worker. All have the bits of runs in processes of their own."""
    monkeypatch.chdir(tmp_path)
    made = {}
    for warm in (True, False):
        lab = OneByOne(tmp_path / str(warm), data)
        lab.warm = warm
        assert lab.here() == 1, "one of them raises"
        made[warm] = lab
    workers = made[True].workers()
    assert workers["plain"] == workers["other"] == workers["angry"]
    assert workers["last"] == workers["bits"] == workers["again"] != workers["plain"]
    assert len(set(made[False].workers().values())) == 6, "and without warmth each has a process"
    for name in ("plain", "other", "last", "bits", "again"):
        assert runs.saved_bytes(made[True].run(name)) == runs.saved_bytes(made[False].run(name)), name
        assert runs.records(made[True].run(name)) == runs.records(made[False].run(name)), name
        log = (made[True].run(name) / "attempt-1.log").read_text()
        assert log.count("iteration 6/6") == 1, "each has its own log"
    assert "no activation today" in (made[True].run("angry") / "attempt-1.log").read_text()
    peaks = [made[True].result(name)["peak_memory_bytes"] for name in ("plain", "again")]
    assert peaks[1] < peaks[0] * 1.5, "the peak is that of the run"


def test_a_process_that_cannot_fork_says_why(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends before it can serve, as with a torch that is broken. Each run fails with the reason; none is left waiting."""
    lab = Lab(tmp_path / "lab", data)
    monkeypatch.chdir(lab.home)
    broken = "import os, sys\nif 'lab.forks' in sys.orig_argv:\n    os.write(2, b'no torch here\\n')\n    os._exit(3)\n"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/sitecustomize.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    assert lab.here() == 1
    assert "no process could be started for it: no torch here" in capsys.readouterr().out
    assert "no torch here" in lab.result("a")["error"] and lab.statuses() == ["failed", "failed"]
