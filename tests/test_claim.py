"""Who may carry out a sweep: one runner, on one machine. A dead machine's can be taken over, and who is not dead finds out."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import PATIENCE, ROOT, until

from lab.claim import FILE, STALE, Refused, exclusive
from lab.store import Store, Superseded, begin_attempt, current_attempt, read_result, write_atomically

HOLDER = """
import sys, time
from pathlib import Path
from lab.claim import exclusive
folder = Path(sys.argv[1])
with exclusive(folder):
    (folder / "ready").touch()
    time.sleep(60)
"""
ELSEWHERE = "process 7 on another-machine"


def test_the_holder_is_named(tmp_path: Path) -> None:
    """And it cannot be taken over from while it lives on this machine."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT)
    try:
        until((tmp_path / "ready").exists)
        for takeover in (False, True):
            with pytest.raises(Refused, match=rf"another runner is at work .*process {process.pid} on "):
                exclusive(tmp_path, takeover).__enter__()
    finally:
        process.kill()
        process.wait(PATIENCE)
    with exclusive(tmp_path):
        assert (tmp_path / FILE).read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    assert (tmp_path / FILE).read_text() == "", "who leaves says so"


def elsewhere(folder: Path, age: float) -> None:
    """A runner on a machine whose locks do not reach this one."""
    (folder / FILE).write_text(ELSEWHERE)
    os.utime(folder / FILE, (time.time() - age,) * 2)


def test_another_machine_s_runner_gives_signs_of_life(tmp_path: Path) -> None:
    elsewhere(tmp_path, STALE / 2)
    with pytest.raises(Refused, match=r"process 7 on another-machine, last sign of life \d+ s ago\).*--takeover"):
        exclusive(tmp_path).__enter__()
    assert (tmp_path / FILE).read_text() == ELSEWHERE
    elsewhere(tmp_path, STALE * 2)
    with exclusive(tmp_path):
        pass
    elsewhere(tmp_path, -STALE / 2)  # its clock is ahead of ours
    with pytest.raises(Refused):
        exclusive(tmp_path).__enter__()


def test_taking_over(tmp_path: Path) -> None:
    """The lock of a dead machine is held for ever by a file server, on a file without a name from then on."""
    elsewhere(tmp_path, 1)
    with (tmp_path / FILE).open("a+") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(Refused):
            exclusive(tmp_path).__enter__()
        with exclusive(tmp_path, takeover=True) as mine:
            assert str(os.getpid()) in (tmp_path / FILE).read_text()
            mine.last -= 3600
            os.utime(tmp_path / FILE, (0, 0))
            mine.beat()
            assert time.time() - (tmp_path / FILE).stat().st_mtime < 60, "a sign of life"
            with pytest.raises(Refused):
                exclusive(tmp_path).__enter__()


def test_who_was_taken_for_dead_writes_nothing_more(tmp_path: Path) -> None:
    first = Store(tmp_path / "sweep.db")
    first.event("running", "a")
    second = Store(tmp_path / "sweep.db")
    for write in (lambda: first.event("done", "a"), lambda: first.list([]), lambda: first.note("cell", 1, {})):
        with pytest.raises(Superseded, match="Another runner has taken this sweep over"):
            write()
    second.event("lost", "a")
    assert second.losses() == {"a": 1}
    first.close()
    second.close()


def test_the_result_of_an_attempt_that_was_given_up_is_none(tmp_path: Path) -> None:
    old = begin_attempt(tmp_path)
    write_atomically(tmp_path / "result.json", f'{{"status": "done", "token": "{old.token}"}}')
    assert read_result(tmp_path) == {"status": "done", "token": old.token}
    new = begin_attempt(tmp_path, job="7")
    assert read_result(tmp_path) is None and not (tmp_path / "result.json").exists()
    write_atomically(tmp_path / "result.json", f'{{"status": "done", "token": "{old.token}"}}')  # late
    assert read_result(tmp_path) is None
    assert current_attempt(tmp_path) == new and (new.number, new.where) == (2, {"job": "7"})
    for broken in ("", "[]", '{"number": 1}', "\x00"):
        (tmp_path / ".attempt").write_text(broken)
        assert current_attempt(tmp_path) is None
