"""Executors carry out trials. The local one starts a process for each, as many at a time as there are slots."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.plan import Slot
from lab.worker import STOPPED, held

REPOSITORY = Path(__file__).resolve().parent.parent
POLL = 0.1  # seconds
GRACE = 600.0  # seconds that a stopped trial has for its checkpoint


@dataclass
class Trial:
    """A run on its way: a process of ours, or (adopted) one that a killed runner left behind."""

    folder: Path
    slot: Slot
    process: subprocess.Popen[bytes] | None

    def poll(self) -> int | None:
        """The exit code, or None while it runs. An adopted trial's is 0 when its lock is free: result.json tells the rest."""
        if self.process is not None:
            return self.process.poll()
        return None if held(self.folder) else 0


class LocalExecutor:
    """Runs trials on this machine."""

    def __init__(self, slots: list[Slot]) -> None:
        self.free = list(slots)
        self.live: list[Trial] = []

    def start(self, folder: Path) -> Trial:
        """Starts the trial of a run folder in a free slot, or adopts the one that is training there."""
        slot = self.free.pop(0)
        process = None if held(folder) else self._spawn(folder, slot)
        trial = Trial(folder, slot, process)
        self.live.append(trial)
        return trial

    def _spawn(self, folder: Path, slot: Slot) -> subprocess.Popen[bytes]:
        number = 1 + max([0, *(int(p.stem.partition("-")[2]) for p in folder.glob("attempt-*.log"))])
        environment = {**os.environ, "OMP_NUM_THREADS": str(slot.threads), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        words = [
            sys.executable,
            "-m",
            "lab.worker",
            str(folder),
            "--device",
            slot.device,
            "--threads",
            str(slot.threads),
        ]
        with (folder / f"attempt-{number}.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches the runner alone, which then asks its trials to stop.
            return subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def finished(self) -> Iterator[tuple[Trial, int]]:
        """Trials that have ended since the last call, with their exit codes."""
        for trial in list(self.live):
            code = trial.poll()
            if code is not None:
                self.live.remove(trial)
                self.free.append(trial.slot)
                yield trial, code

    def wait(self) -> None:
        time.sleep(POLL)

    def stop(self, now: Callable[[], bool]) -> None:
        """Asks every trial of ours to save and end, and waits; once `now()` is true, ends them at once."""
        for trial in self.live:
            if trial.process is not None:
                trial.process.terminate()
        deadline = time.monotonic() + GRACE
        while any(t.process is not None and t.process.poll() is None for t in self.live):
            if now() or time.monotonic() > deadline:
                for trial in self.live:
                    if trial.process is not None and trial.process.poll() is None:
                        trial.process.kill()
            self.wait()


__all__ = ["STOPPED", "LocalExecutor", "Trial"]
