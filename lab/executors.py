"""Executors carry out trials, each of one run or of a pack. The local one starts a process for each, as many as there are slots."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lab.plan import Slot
from lab.process import begin
from lab.store import attempts, hold, holder, read_result

REPOSITORY = Path(__file__).resolve().parent.parent
POLL = 0.1  # seconds
GRACE = 600.0  # seconds that a stopped trial has for its checkpoint


@dataclass
class Trial:
    """Runs on their way: in a process of ours, or (adopted) in one that a killed runner left behind.

    `folders` are its runs, `open` those that have not been told of as ended.
    """

    folders: list[Path]
    slot: Slot
    process: subprocess.Popen[bytes] | None

    def __post_init__(self) -> None:
        self.open = list(self.folders)

    def poll(self) -> int | None:
        """The exit code, or None while it runs. An adopted trial's is 0 when its locks are free: results tell the rest."""
        if self.process is not None:
            return self.process.poll()
        return None if any(holder(folder) is not None for folder in self.open) else 0

    def ended(self) -> list[Path]:
        """The runs of a pack that have a result and are free while others train on."""
        if len(self.folders) == 1:
            return []
        return [folder for folder in self.open if holder(folder) is None and read_result(folder) is not None]

    def processes(self) -> set[int]:
        """The numbers that signals go to; none where an adopted process has not said its own yet."""
        if self.process is not None:
            return {self.process.pid}
        return {number for folder in self.open if (number := holder(folder))}


class LocalExecutor:
    """Runs trials on this machine."""

    def __init__(self, slots: list[Slot]) -> None:
        self.free = list(slots)
        self.live: list[Trial] = []

    def start(self, folders: Sequence[Path]) -> Trial:
        """Starts a trial of run folders in a free slot: of those that no other process trains, the locks of all taken first.

        Where others train all of them, adopts the process that trains the first.
        """
        with contextlib.ExitStack() as stack:  # from here on the trial has the locks
            locks: dict[Path, IO[str]] = {}
            for folder in folders:
                lock = hold(folder) if holder(folder) is None else None
                locks |= {folder: stack.enter_context(lock)} if lock is not None else {}
            slot = self.free.pop(0)
            if locks:
                for folder in locks:
                    (folder / "result.json").unlink(missing_ok=True)  # of a failed attempt
                trial = Trial(list(locks), slot, self._spawn(locks, slot))
            else:
                first = holder(folders[0])
                trial = Trial([folders[0], *(f for f in folders[1:] if holder(f) == first)], slot, None)
        self.live.append(trial)
        return trial

    def _spawn(self, locks: Mapping[Path, IO[str]], slot: Slot) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(slot.threads), "PYTHONUNBUFFERED": "1"}
        begin(environment)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        numbers = [lock.fileno() for lock in locks.values()]
        # -P: a module of the current folder is not taken for one of ours.
        words = [sys.executable, "-P", "-m", "lab.worker", *map(str, locks)]
        words += ["--device", slot.device, "--threads", str(slot.threads)]
        words += [word for number in numbers for word in ("--lock", str(number))]
        logs = [folder / f"attempt-{attempts(folder) + 1}.log" for folder in locks]
        for log in logs:
            log.touch()  # each attempt counts, also where the process comes to nothing
        with logs[0].open("wb") as out:
            # A session of its own: Ctrl-C reaches the runner alone, which then asks its trials to stop.
            return subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=numbers,
                start_new_session=True,
            )

    def finished(self) -> Iterator[tuple[Trial, Path, int | None]]:
        """Runs that have ended since the last call, with their trial and its exit code: negative for the signal that ended it,
        None while it trains others."""
        for trial in list(self.live):
            code = trial.poll()  # before its locks, which a process that ends gives back too
            over = trial.ended() if code is None else list(trial.open)
            trial.open = [folder for folder in trial.open if folder not in over]
            if code is not None:
                self.live.remove(trial)
                self.free.append(trial.slot)
            yield from ((trial, folder, code) for folder in over)

    def wait(self) -> None:
        time.sleep(POLL)

    def stop(self, now: Callable[[], bool]) -> None:
        """Asks every trial to save and end, and waits; once `now()` is true, or after GRACE, ends them at once."""
        deadline = time.monotonic() + GRACE
        asked: set[int] = set()
        while live := [trial for trial in self.live if trial.poll() is None]:
            hard = now() or time.monotonic() > deadline
            for process in {number for trial in live for number in trial.processes()}:
                if hard or process not in asked:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL if hard else signal.SIGTERM)
                    asked.add(process)  # once: the second time would end it at once
            self.wait()
