"""How our processes begin and end."""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")
MOST = 4  # processes side by side
REPOSITORY = Path(__file__).resolve().parent.parent

# Turns that a thread of OpenMP (GNU's, which torch brings) spins for the others before it sleeps. Its own default holds a core for
# milliseconds: with 2 threads on 2 cores and one other busy process, training became 10 times slower; idle, it gains nothing.
SPIN = "2000"


def begin(environment: MutableMapping[str, str] = os.environ) -> None:
    """What has to be set before torch is imported, unless the user has set it."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environment):
        environment["GOMP_SPINCOUNT"] = SPIN
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which its sums are the same every time


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Child:
    """A process that was forked from this one, as subprocess shows others."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, or None while it is there."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        """Waits for its end. Returns the exit code."""
        code = self._ended(0)
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def side_by_side(work: Sequence[T], act: Callable[[T], None]) -> None:
    """Does `act` for each piece of work: in several processes where this one may be forked and has cores for them, else in turn.

    It may where it has one thread and has not imported torch, whose threads a fork loses. Who is free takes the next piece. What a
    fork has taken and not done is done here again, so that its error is raised here.
    """
    may = hasattr(os, "fork") and threading.active_count() == 1 and "torch" not in sys.modules
    count = max(1, min(len(work), cores(), MOST)) if may else 1
    open_pieces, undone = _numbers(range(len(work))), mmap.mmap(-1, max(1, len(work)))

    def share() -> None:
        while piece := os.read(open_pieces, NUMBER):
            i = int(piece)
            undone[i] = 1
            act(work[i])
            undone[i] = 0

    forks = [_forked(share) for _ in range(count - 1)]
    try:
        share()
    finally:
        for fork in forks:
            fork.wait()
        os.close(open_pieces)
    for i, piece in enumerate(work):
        if undone[i]:
            act(piece)


NUMBER = 8  # bytes of one


def _numbers(some: Sequence[int]) -> int:
    """A file of which each reader gets the next number, with `NUMBER` bytes for each, until there are none."""
    reader, writer = os.pipe()
    for i in some:
        os.write(writer, f"{i:{NUMBER}}".encode())
    os.close(writer)
    return reader


def _forked(act: Callable[[], None]) -> Child:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return Child(pid)


def leave(code: int) -> NoReturn:
    """Ends the process with what has to be done at an end, and without taking apart what is in memory: for torch, half a second.

    An output that cannot be flushed any more has been told of before.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
