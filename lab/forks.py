"""Warm workers: processes that train one trial after another, forked from one that has imported everything.

That process is a helper: a fork of the runner while it begins, or `python -m lab.forks FD`. It has one thread, so it can fork; what
is imported is paid once a sweep, a CUDA context and compiled graphs once a worker. A worker has a socket to the runner, over which
come jobs with the open locks of their runs, and go exit codes. When the runner is gone, however that happened, a worker ends the
trial it has and then itself. After an error a worker is not used again: the next trial shares nothing with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import platform
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lab import helper
from lab.helper import Helper, has_word, receive, send, serve_here
from lab.process import leave

MODULE = "lab.forks"
PATIENCE = 5.0  # seconds for workers that have nothing to do to end


# The process that forks -----------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Forks a worker for every message, told its number; tells how each one ended. Returns when the runner is gone."""
    _prepare()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer)
    while True:
        ready = select.select([control.fileno(), reader], [], [])[0]
        if reader in ready:
            os.read(reader, 4096)
            with contextlib.suppress(ChildProcessError, OSError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    send(control, {"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})
        if control.fileno() in ready:
            message = receive(control)
            if message is None:
                return
            content, (jobs,) = message
            number = os.fork()
            if number == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for file in (reader, writer):
                    os.close(file)
                control.close()
                os.environ.update(content["environment"])
                _become_worker(socket.socket(fileno=jobs))
            os.close(jobs)
            with contextlib.suppress(OSError):  # a runner that is gone may have left other jobs
                send(control, {"began": number, "name": content["name"]})


def _prepare() -> None:
    """What a trial does first and every worker would do anew: imports, the first call of kernels, and looking which commit it is,
    which is that of the code that was imported. One thread computes here: a pool of them would not live through a fork."""
    import numpy.random  # which numpy itself imports when it is first used
    import torch

    import lab.worker
    from engine.device import provenance

    assert numpy.random and lab.worker
    provenance(None)
    torch.set_num_threads(1)
    with torch.no_grad():
        x = torch.zeros(64, 64)
        torch.nn.functional.gelu(torch.addmm(x[0], x, x))
    gc.freeze()  # what is here for good is not looked through after each trial


def _become_worker(jobs: socket.socket) -> NoReturn:
    code = 1
    try:
        os.setsid()  # Ctrl-C reaches the runner alone, which then asks its trials to stop
        work(jobs)
        code = 0
    except BaseException:  # a fork must not go on as the process that it was forked from
        traceback.print_exc()
    leave(code)


def work(jobs: socket.socket) -> None:
    """Carries out jobs until the runner is gone, or one of them has failed."""
    from lab.worker import FAILED, trial

    while (message := receive(jobs)) is not None:
        job, (log, *locks) = message
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        _forget()
        code = trial([Path(folder) for folder in job["folders"]], job["device"], job["threads"], locks)
        with contextlib.suppress(OSError):  # nobody waits for it any more
            send(jobs, {"code": code})
        if code == FAILED:
            return


def _forget() -> None:
    """Frees what the trial before has left, so that the peak of memory is that of the next one."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts VmHWM anew


# The runner's side ----------------------------------------------------------------------------------------------------------


class Worker:
    """A warm worker as the runner sees it. `pid` is 0 until it has begun; `code` is how its last job, or it itself, ended."""

    def __init__(self, forks: Forks, name: int, channel: socket.socket) -> None:
        self.forks, self.name, self.channel = forks, name, channel
        self.pid, self.closed = 0, False
        self.code: int | None = None

    def give(self, job: dict[str, Any], files: Sequence[int]) -> None:
        """Gives it a job. Where it has died meanwhile, `poll` tells."""
        self.code = None
        try:
            send(self.channel, job, files)
        except OSError:
            self.closed = True

    def poll(self) -> int | None:
        """The exit code of its job, or, where it died, its own; None while it works."""
        if self.code is None and not self.closed and has_word(self.channel):
            message = receive(self.channel)
            if message is None:
                self.closed = True
            else:
                self.code = int(message[0]["code"])
        if self.code is None and self.closed:
            self.code = self.forks.ended(self)
        return self.code

    @property
    def idle(self) -> bool:
        """Whether it can have another job."""
        if not self.closed and self.code is not None and has_word(self.channel):
            self.closed = True  # it has nothing to say but that it is gone
        return not self.closed and self.code in (0, 75)  # after an error it ends itself

    @property
    def orphan(self) -> bool:
        """Whether it is gone, and so is the process that would have waited for its end: it may not be all over yet."""
        return self.closed and self.forks.gone

    def close(self) -> None:
        """Lets go of it for good."""
        self.channel.close()
        self.forks.workers.pop(self.name, None)


class Forks:
    """The process that forks workers, started when it is made; nothing waits until its imports are done.

    `workers` are those that the runner has not let go of; `codes` tell by number how processes ended.
    """

    def __init__(self, process: Helper | None = None) -> None:
        """process: one that serves already."""
        self.helper = process or Helper(MODULE)
        self.control = self.helper.channel
        self.workers: dict[int, Worker] = {}
        self.codes: dict[int, int] = {}
        self.names = itertools.count()
        self.gone = False

    @property
    def last_words(self) -> str:
        """The last line that the process has written, such as the error that ended it."""
        return self.helper.last_words

    def worker(self, environment: dict[str, str]) -> Worker:
        """A new worker with these variables of its environment set. Jobs can be given at once."""
        ours, theirs = socket.socketpair()
        made = Worker(self, next(self.names), ours)
        self.workers[made.name] = made
        try:
            send(self.control, {"environment": environment, "name": made.name}, [theirs.fileno()])
        except OSError:
            self.gone = made.closed = True
        theirs.close()
        return made

    def listen(self) -> None:
        """Takes what the process has told meanwhile."""
        while not self.gone and has_word(self.control):
            message = receive(self.control)
            if message is None:
                self.gone = True
                return
            told = message[0]
            if "began" in told:
                self.codes.pop(told["began"], None)  # of an earlier process with that number
                if (worker := self.workers.get(told["name"])) is not None:
                    worker.pid = told["began"]
            else:
                self.codes[told["ended"]] = told["code"]

    def ended(self, worker: Worker) -> int | None:
        """How a worker that closed its socket ended; None where that is not known yet."""
        self.listen()
        if worker.pid in self.codes:
            return self.codes[worker.pid]
        return -signal.SIGKILL if self.gone else None

    def close(self) -> None:
        """Ends the workers that have nothing to do, and the process; a worker that is at work ends after its trial."""
        every = list(self.workers.values())
        idle = [worker for worker in every if worker.closed or worker.code is not None]
        for worker in every:
            worker.close()
        deadline = time.monotonic() + PATIENCE
        while not self.gone and time.monotonic() < deadline and any(w.pid not in self.codes for w in idle):
            has_word(self.control, PATIENCE / 10)
            self.listen()
        self.release()

    def release(self) -> None:
        """Waits for the process, which ends by itself; workers go on."""
        self.helper.close()


def start_early() -> None:
    """Starts the process while the runner begins, as a fork of it that has what the runner imports."""
    import lab.runner
    import lab.worker

    assert lab.runner and lab.worker
    helper.start_early(MODULE, serve)


def begun() -> Forks:
    """The process that was started early, or a new one."""
    return Forks(helper.begun(MODULE))


if __name__ == "__main__":
    serve_here(serve)
