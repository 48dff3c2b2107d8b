"""Trials on this machine: processes that train one run or pack after another, as many at a time as there are slots."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from lab.devices import as_seen, memory
from lab.executors.trial import End, Trial
from lab.forks import Forks, Worker, begun
from lab.plan import Places, Slot, Wish, beside
from lab.process import REPOSITORY, begin
from lab.store import begin_attempt, current_attempt, heartbeat, hold, holder
from train_args import RunnerConfig

POLL = 0.1  # seconds between looks at what cannot be waited for
GRACE = 600.0  # seconds that a stopped trial has for its checkpoint
CONTEXT = 1 << 30  # bytes of a GPU that a process takes beside its tensors: libraries, kernels, fragments


class Process(Protocol):
    """A process that carries out a trial: of its own, or a warm worker."""

    pid: int

    def poll(self) -> int | None: ...


class LocalTrial(Trial):
    """A trial of this machine, with its slot and process; an adopted one has no process of ours, and perhaps no slot."""

    slot: Slot | None = None
    process: Process | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs. An adopted trial's is 0 when its locks are free: results tell the rest."""
        code = 0 if self.process is None else self.process.poll()
        # Where nobody waits for a worker, its socket closes a moment before its locks are free.
        unseen = self.process is None or (isinstance(self.process, Worker) and self.process.orphan)
        return None if unseen and any(holder(folder) is not None for folder in self.open) else code

    def processes(self) -> set[int]:
        """The numbers that signals go to; none where a process has not said its own yet."""
        if self.process is not None and self.process.pid:
            return {self.process.pid}
        return {number for folder in self.open if (number := holder(folder))}


def make(config: RunnerConfig, slots: Callable[[], Sequence[Slot]], folder: Path) -> LocalExecutor:
    """The executor of this machine."""
    return LocalExecutor(slots(), config.warm, config.per_device == "auto")


class LocalExecutor:
    """Carries out trials on this machine.

    warm: whether processes are used again. measure: whether as many trials are put beside one another on a GPU as its memory
    holds, once one has told what it takes.
    """

    def __init__(self, slots: Sequence[Slot], warm: bool = False, measure: bool = False) -> None:
        self.places = Places(slots)
        self.live: list[Trial] = []
        self.forks: Forks | None = begun() if warm else None
        self.idle: list[tuple[Slot, Worker]] = []
        self.unmeasured = {slot.device for slot in slots if measure and slot.device != "cpu" and slot.processes == 1}

    def adopt(self, folders: Sequence[Path]) -> list[Trial]:
        groups: dict[int | Path, list[Path]] = {}
        for folder in folders:
            if (process := holder(folder)) is not None:
                groups.setdefault(process or folder, []).append(folder)  # who has not said its number is on its own
        return [self._adopted(some) for some in groups.values()]

    def _adopted(self, folders: list[Path]) -> Trial:
        trial = LocalTrial(folders, Wish(tuple(f.name for f in folders)), adopted=True)
        attempt = current_attempt(folders[0])
        trial.place = str(attempt.where.get("device", "")) if attempt else ""
        trial.slot = self.places.take(on=trial.place)
        self.live.append(trial)
        return trial

    def start(self, wishes: Sequence[Wish], folder: Callable[[str], Path]) -> list[Trial]:
        made: list[Trial] = []
        for wish in wishes:
            slot = self.places.take(wish.whole)
            if slot is None:
                if wish.whole:
                    continue  # it has a device reserved, and others may go on elsewhere
                break
            with contextlib.ExitStack() as stack:  # from here on the trial has the locks
                locks: dict[Path, IO[str]] = {}
                for path in map(folder, wish.runs):
                    lock = hold(path) if holder(path) is None else None
                    locks |= {path: stack.enter_context(lock)} if lock is not None else {}
                if not locks:
                    self.places.give(slot)
                    made += self.adopt([folder(run) for run in wish.runs])
                    continue
                trial = LocalTrial(list(locks), wish, slot.device)
                trial.slot, trial.process = slot, self._start(locks, slot)
            self.live.append(trial)
            made.append(trial)
        return made

    def _start(self, locks: Mapping[Path, IO[str]], slot: Slot) -> Process:
        numbers = [lock.fileno() for lock in locks.values()]
        logs = [path / f"attempt-{begin_attempt(path, device=slot.device).number}.log" for path in locks]
        device, environment = as_seen(slot.device)
        with logs[0].open("wb") as log:
            if self.forks is None or slot.processes > 1:
                return self._spawn(list(locks), slot, device, environment, numbers, log)
            worker = self._worker(slot, environment)
            job = {"folders": [str(path.absolute()) for path in locks], "device": device, "threads": slot.threads}
            worker.give(job, [log.fileno(), *numbers])
            return worker

    def _worker(self, slot: Slot, environment: dict[str, str]) -> Worker:
        """A warm worker of the slot's device that is idle, or a new one."""
        assert self.forks is not None
        for i, (other, worker) in reversed(list(enumerate(self.idle))):
            if other.device == slot.device:
                del self.idle[i]
                if worker.idle:
                    return worker
                worker.close()
        if self.forks.gone:
            self.forks.release()
            self.forks = Forks()
        return self.forks.worker(environment)

    def _spawn(
        self,
        folders: Sequence[Path],
        slot: Slot,
        device: str,
        more: Mapping[str, str],
        locks: Sequence[int],
        log: IO[bytes],
    ) -> subprocess.Popen[bytes]:
        """A process of its own for the trial."""
        environment = {**os.environ, **more, "OMP_NUM_THREADS": str(slot.threads), "PYTHONUNBUFFERED": "1"}
        begin(environment)
        environment.pop("TORCHELASTIC_RUN_ID", None)  # a trial is not one of several that train this runner
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        words = ["-m", "lab.worker", *map(str, folders), "--device", device, "--threads", str(slot.threads)]
        words += [word for number in locks for word in ("--lock", str(number))]
        words += ["--processes", str(slot.processes)] if slot.processes > 1 else []
        # A session of its own: Ctrl-C reaches the runner alone, which then asks its trials to stop.
        # -P: a module of the current folder is not taken for one of ours.
        return subprocess.Popen(
            [sys.executable, "-P", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=locks,
            start_new_session=True,
        )

    def ended(self) -> Iterator[End]:
        if self.forks is not None:
            self.forks.listen()
        for trial in list(self.live):
            assert isinstance(trial, LocalTrial)
            code = trial.poll()  # before its locks, which a process that ends gives back too
            over = trial.early() if code is None else list(trial.open)
            trial.open = [folder for folder in trial.open if folder not in over]
            if trial.place in self.unmeasured:
                self._measure(trial)
            if code is not None:
                self.live.remove(trial)
                self._free(trial)
            if over or code is not None:
                yield End(trial, over, code, _why(trial, code))

    def _free(self, trial: LocalTrial) -> None:
        if trial.slot is not None:
            self.places.give(trial.slot)
            for other in self.live:  # an adopted one for which there was no room comes first
                if isinstance(other, LocalTrial) and other.slot is None:
                    other.slot = self.places.take(on=other.place)
            if isinstance(trial.process, Worker):
                if trial.process.idle:
                    self.idle.append((trial.slot, trial.process))
                else:
                    trial.process.close()

    def _measure(self, trial: LocalTrial) -> None:
        """Puts more trials on a GPU once one has told how much of its memory it takes."""
        told = max((heartbeat(folder).get("peak_memory_bytes") or 0 for folder in trial.folders), default=0)
        total = memory(trial.place)
        if told and total:
            self.unmeasured.discard(trial.place)
            self.places.widen(trial.place, beside(total, told + CONTEXT))

    def wait(self, seconds: float) -> None:
        waiting = [t.process for t in self.live if isinstance(t, LocalTrial)]
        sockets = [process.channel for process in waiting if isinstance(process, Worker) and not process.closed]
        others = len(sockets) < len(waiting) or any(len(trial.folders) > 1 for trial in self.live)
        files = [*sockets, *([self.forks.control] if self.forks and not self.forks.gone else [])]
        select.select(files, [], [], min(seconds, POLL) if others else seconds)

    def stop(self, now: Callable[[], bool]) -> None:
        """Asks every trial to save and end, and waits; once `now()` is true, or after GRACE, ends them at once."""
        deadline = time.monotonic() + GRACE
        asked: set[int] = set()
        while live := [t for t in self.live if isinstance(t, LocalTrial) and t.poll() is None]:
            if self.forks is not None:
                self.forks.listen()
            hard = now() or time.monotonic() > deadline
            for process in {number for trial in live for number in trial.processes()}:
                if hard or process not in asked:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL if hard else signal.SIGTERM)
                    asked.add(process)  # once: the second time would end it at once
            time.sleep(POLL / 5)

    def close(self) -> None:
        if self.forks is not None:
            self.forks.close()
        for _, worker in self.idle:  # also of a process that died before
            worker.close()


def _why(trial: LocalTrial, code: int | None) -> str:
    if trial.process is None:
        return "nobody saw it end"
    if code is None:
        return ""
    if isinstance(trial.process, Worker) and not trial.process.pid and (words := trial.process.forks.last_words):
        return f"no process could be started for it: {words}"
    return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"its exit code is {code}"
