"""Carries out a listing: run folders, the database, trials in their slots, and the report at the end."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.options import plain
from core.yaml_files import ConfigError, dump
from engine.device import pick, provenance
from engine.tracking import resolve_mode
from lab import packing, store
from lab.base import ended_as, untrained
from lab.executors import LocalExecutor, Trial
from lab.expand import Run
from lab.listing import ENDED, Listing
from lab.plan import Slot, slots
from lab.report import Listed, Summary, write_report
from lab.store import Store, attempts, holder, read_result, write_atomically
from lab.worker import Console, StopFlag, no_result, run_pack, write_result
from train_args import Config
from variations import CATALOGUE

OK, FAILED, STOPPED = 0, 1, 75


def devices(config: Config) -> tuple[str, ...]:
    """The devices of trials: what the runner lists, else the one that training names, else every GPU, else the CPU.

    Raises ConfigError for a device that is not there.
    """
    asked = config.runner.devices
    if asked == "auto" and config.train.device == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(f"cuda:{i}" for i in range(count)) or (str(pick("cpu", config.train.dtype)),)
    given = (config.train.device,) if asked == "auto" else (asked,) if isinstance(asked, str) else asked
    return tuple(str(pick(device, config.train.dtype)) for device in given)


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def exclusive(folder: Path) -> Iterator[str | None]:
    """None where this process is the only runner of the sweep, while inside; else who the other one is."""
    with (folder / ".runner").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            yield handle.read() or "unknown"
            return
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        yield None


def train_bases(listing: Listing) -> int:
    """Carries out the files that runs of a listing start from, where they are not done. Returns the exit code."""
    bases = untrained(listing)
    if bases:
        devices(listing.runs[0].config)  # what is missing for the runs themselves is told before hours of training
    for base in bases:
        assert base.listing is not None
        threads = torch.get_num_threads()
        code = run(base.listing)
        torch.set_num_threads(threads)  # a run in this process sets its own
        if code == STOPPED or (code == FAILED and base.status is None):  # the runner has said why
            return code
        if not base.ready:
            print(ended_as(base, listing.folder), file=sys.stderr)
            return FAILED
    return OK


def run(listing: Listing) -> int:
    """Carries out every run that is not done, and before them what they start from. Returns the exit code.

    Raises ConfigError where nothing can be started.
    """
    folder = listing.folder
    try:
        listing.settle()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".runner").open("a").close()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be written: {error.strerror}. Nothing was started."
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if code := train_bases(listing):
        return code
    with exclusive(folder) as other, redirect_stdout(Console(sys.stdout)), redirect_stderr(Console(sys.stderr)):
        if other is not None:
            print(
                f"{folder}: another runner is at work on this sweep ({other}). Wait for it, stop it, or give this one "
                "another name=...",
                file=sys.stderr,
            )
            return FAILED
        return _run(listing)


def _run(listing: Listing) -> int:
    places = devices(listing.runs[0].config)
    pending = listing.pending()
    wandb = resolve_mode(listing.runs[0].config.tracking.wandb.mode) if pending else "off"
    write_atomically(listing.folder / "sweep.yaml", dump(plain(listing.tree)))
    for one in pending:
        _prepare(listing, one, wandb)
    database = Store(listing.folder / store.FILE)
    stopped = hard = False
    try:
        database.list(_row(listing, one) for one in listing.runs)
        if not listing.has_sweep and len(pending) == 1:
            stopped = _alone(listing, pending[0], places, database)
        elif pending:
            stopped, hard = _together(listing, pending, places, database)
    finally:
        database.close()
    if listing.has_sweep and not hard:
        try:
            print(f"\n{report(listing).text}")
        except ValueError as error:
            print(error, file=sys.stderr)
            _close(listing, stopped)
            return FAILED
    return _close(listing, stopped)


def _row(listing: Listing, one: Run) -> store.Row:
    changed, length = dict(plain(one.changed)), one.config.iterations
    status = listing.status(one)
    return store.Row(
        one.hash,
        listing.ids[one.hash],
        one.cell,
        one.seed,
        changed,
        one.baseline,
        length,
        status if status in ENDED else "waiting",
    )


def _prepare(listing: Listing, one: Run, wandb: str) -> None:
    """The run's folder and configuration, unless a killed runner's trial is at work there."""
    folder = listing.path(one)
    folder.mkdir(parents=True, exist_ok=True)
    if holder(folder) is None:
        data = one.config.data
        data = replace(data, root=str(Path(data.root).resolve())) if data.root else data
        config = replace(one.config, data=data, run=listing.info(one, wandb))
        write_atomically(folder / "config.yaml", dump(plain(config)))


def _alone(listing: Listing, one: Run, places: tuple[str, ...], database: Store) -> bool:
    """A single run, in this process and with its progress on the terminal. Returns whether it was stopped."""
    folder, threads = listing.path(one), one.config.runner.threads
    if threads:
        torch.set_num_threads(threads)
    (folder / "result.json").unlink(missing_ok=True)  # of a failed attempt
    database.event("running", folder.name, device=places[0])
    with (
        (folder / f"attempt-{attempts(folder) + 1}.log").open("w", encoding="utf-8") as log,
        redirect_stdout(Console(sys.stdout, log)),
        redirect_stderr(Console(sys.stderr, log)),
        StopFlag() as stop,
    ):
        print(f"{folder}: {one.config.iterations} iterations")
        code = run_pack([folder], device=places[0], stop=stop)
    database.event("stopped" if code == STOPPED else _status(folder), folder.name)
    return code == STOPPED


def _together(listing: Listing, pending: list[Run], places: tuple[str, ...], database: Store) -> tuple[bool, bool]:
    """Many runs, as processes. Returns whether it was stopped, and whether at once."""
    runner = listing.runs[0].config.runner
    executor = LocalExecutor(slots(places, runner.per_device, runner.threads, cores(), len(listing.runs)))
    queue = _trials(listing, pending, executor.free)
    teller = _Teller(listing, len(listing.runs) - len(pending), database)
    with StopFlag(hard_ends=False) as stop:
        while (queue or executor.live) and not stop():
            while queue and executor.free:
                listed = queue.pop(0)
                some = [one for one in listed if listing.status(one) not in ENDED]
                teller.done += len(listed) - len(some)  # a trial of a killed runner ended them meanwhile
                if not some:
                    continue
                trial = executor.start([listing.path(one) for one in some])
                left = [one for one in some if listing.path(one) not in trial.folders]
                queue[:0] = [left] if left else []  # other processes train them
                for folder in trial.folders:
                    adopted = trial.process is None
                    database.event("running", folder.name, device=trial.slot.device, adopted=adopted)
            executor.wait()
            for trial, folder, code in executor.finished():
                teller.ended(trial, folder, code)
        if not stop():
            return False, False
        print("stopping: trials save a checkpoint; Ctrl-C again ends them at once", flush=True)
        executor.stop(lambda: stop.hard)
        for trial, folder, code in executor.finished():
            teller.ended(trial, folder, code, stopping=True)
        return True, stop.hard


def _trials(listing: Listing, pending: list[Run], places: list[Slot]) -> list[list[Run]]:
    """The runs to be carried out, as packs; first those that the processes of a killed runner train, to be adopted together."""
    held: dict[int, list[Run]] = {}
    rest: list[Run] = []
    for one in pending:
        process = holder(listing.path(one))
        (rest if process is None else held.setdefault(process, [])).append(one)

    def most(one: Run) -> int:
        return packing.fitting(listing.parameters(one), memory(), len(places))

    pack = listing.runs[0].config.runner.pack
    return [*held.values(), *packing.groups(rest, pack, places, listing.content, CATALOGUE, most)]


class _Teller:
    """Notes and tells how runs end."""

    def __init__(self, listing: Listing, done: int, database: Store) -> None:
        self.listing, self.done, self.database, self.started = listing, done, database, time.monotonic()
        self.runs = {listing.ids[one.hash]: one for one in listing.runs}

    def ended(self, trial: Trial, folder: Path, code: int | None, stopping: bool = False) -> None:
        """A run without a result was stopped, or else its process died, which becomes its result."""
        one, missing = self.runs[folder.name], read_result(folder) is None
        stopped = missing and (code == STOPPED or stopping)
        if missing and not stopped:
            error = f"The process died without a result: {_death(trial, folder, code)}"
            known = {"cell": one.cell, "seed": one.seed, "error": error, "provenance": provenance(None)}
            write_result(folder, no_result(folder, pack=len(trial.folders), **known))
        status = "stopped" if stopped else _status(folder)
        self.done += status != "stopped"
        self.database.event(status, folder.name, exit_code=code)
        if not stopping:
            self.tell(one, folder, status)

    def tell(self, one: Run, folder: Path, status: str) -> None:
        result = read_result(folder) or {}
        loss = result.get("val_loss")
        words = f", validation loss {loss:.4f}" if loss is not None else ""
        seed = f", seed {one.seed}" if "train.seed" not in one.changed else ""
        error = str(result.get("error") or "").strip().splitlines()
        why = f": {error[-1]} (see {folder})" if error else ""
        seconds = time.monotonic() - self.started
        total = len(self.listing.runs)
        print(f"[{self.done}/{total}, {seconds:.0f} s] {status}: {one.cell}{seed}{words}{why}", flush=True)


def _death(trial: Trial, folder: Path, code: int | None) -> str:
    """How a process ended that left a run without a result, and where its last words are."""
    assert code is not None
    why = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"its exit code is {code}"
    first = folder if trial.process is None else trial.folders[0]  # an adopted run's own log names the first's
    log = f"attempt-{attempts(first)}.log"
    place = log if first == folder else f"../{first.name}/{log}"
    return f"{'nobody saw it end' if trial.process is None else why}. Its last words are in {place}."


def _status(folder: Path) -> str:
    result = read_result(folder)
    return "failed" if result is None else str(result["status"])


def report(listing: Listing) -> Summary:
    """Writes the report of a listing from its run folders."""
    listed = [
        Listed(listing.ids[r.hash], r.cell, r.seed, dict(plain(r.changed)), listing.path(r), r.baseline)
        for r in listing.runs
    ]
    objective: Any = listing.expansion.sweep.objective
    return write_report(listing.folder, listing.name, listed, objective["metric"], objective["mode"])


def _close(listing: Listing, stopped: bool) -> int:
    """The last line: how the runs ended. Returns the exit code."""
    counts = Counter(listing.status(r) or "unfinished" for r in listing.runs)
    told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    again = ". The same command continues." if counts["unfinished"] else ""
    print(f"{listing.folder}: {told}{again}", flush=True)
    if stopped:
        return STOPPED
    return FAILED if counts["failed"] else STOPPED if counts["unfinished"] else OK
