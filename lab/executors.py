"""Executors carry out trials. The local one starts a process for each, as many at a time as there are slots."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lab.plan import Slot
from lab.process import begin
from lab.store import attempts, hold, holder

REPOSITORY = Path(__file__).resolve().parent.parent
POLL = 0.1  # seconds
GRACE = 600.0  # seconds that a stopped trial has for its checkpoint


@dataclass
class Trial:
    """A run on its way: a process of ours, or (adopted) one that a killed runner left behind."""

    folder: Path
    slot: Slot
    process: subprocess.Popen[bytes] | None
    asked: bool = False

    def poll(self) -> int | None:
        """The exit code, or None while it runs. An adopted trial's is 0 when its lock is free: result.json tells the rest."""
        if self.process is not None:
            return self.process.poll()
        return 0 if holder(self.folder) is None else None

    def send(self, number: signal.Signals) -> bool:
        """Sends a signal; False where the process is not known yet."""
        if self.process is not None:
            self.process.send_signal(number)
            return True
        if process := holder(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return bool(process)


class LocalExecutor:
    """Runs trials on this machine."""

    def __init__(self, slots: list[Slot]) -> None:
        self.free = list(slots)
        self.live: list[Trial] = []

    def start(self, folder: Path) -> Trial:
        """Starts the trial of a run folder in a free slot, or adopts the one that is training there."""
        lock = hold(folder)
        slot = self.free.pop(0)
        if lock is None:
            trial = Trial(folder, slot, None)
        else:
            with lock:  # from here on the trial has it
                (folder / "result.json").unlink(missing_ok=True)  # of a failed attempt
                trial = Trial(folder, slot, self._spawn(folder, slot, lock))
        self.live.append(trial)
        return trial

    def _spawn(self, folder: Path, slot: Slot, lock: IO[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(slot.threads), "PYTHONUNBUFFERED": "1"}
        begin(environment)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        # -P: a module of the current folder is not taken for one of ours.
        words = [sys.executable, "-P", "-m", "lab.worker", str(folder)]
        words += ["--device", slot.device, "--threads", str(slot.threads), "--lock", str(lock.fileno())]
        with (folder / f"attempt-{attempts(folder) + 1}.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches the runner alone, which then asks its trials to stop.
            return subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )

    def finished(self) -> Iterator[tuple[Trial, int]]:
        """Trials that have ended since the last call, with their exit codes; negative: the signal that ended it."""
        for trial in list(self.live):
            code = trial.poll()
            if code is not None:
                self.live.remove(trial)
                self.free.append(trial.slot)
                yield trial, code

    def wait(self) -> None:
        time.sleep(POLL)

    def stop(self, now: Callable[[], bool]) -> None:
        """Asks every trial to save and end, and waits; once `now()` is true, or after GRACE, ends them at once."""
        deadline = time.monotonic() + GRACE
        while live := [trial for trial in self.live if trial.poll() is None]:
            hard = now() or time.monotonic() > deadline
            for trial in live:
                if hard:
                    trial.send(signal.SIGKILL)
                elif not trial.asked:
                    trial.asked = trial.send(signal.SIGTERM)
            self.wait()
