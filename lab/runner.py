"""Carries out a listing: run folders, the database, trials in their slots, and the report at the end."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.options import plain
from core.yaml_files import dump
from engine.tracking import resolve_mode
from lab.executors import LocalExecutor
from lab.expand import Run
from lab.listing import Listing, read_result
from lab.plan import slots
from lab.report import Listed, Summary, write_report
from lab.store import Store
from lab.worker import StopFlag, run_trial, write_atomically
from train_args import RunnerConfig

OK, FAILED, STOPPED = 0, 1, 75


def devices(runner: RunnerConfig) -> tuple[str, ...]:
    """The devices of trials: what the file lists, else every GPU, else the CPU."""
    if runner.devices == "auto":
        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) or ("cpu",)
    return (runner.devices,) if isinstance(runner.devices, str) else runner.devices


@contextmanager
def exclusive(folder: Path) -> Iterator[bool]:
    """Whether this process is the only runner of the sweep, while inside."""
    with (folder / ".runner").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        handle.truncate(0)
        handle.write(f"{os.uname().nodename} {os.getpid()}")
        handle.flush()
        yield True


def run(listing: Listing) -> int:
    """Carries out every run that is not done. Returns the exit code."""
    listing.settle()
    listing.folder.mkdir(parents=True, exist_ok=True)
    with exclusive(listing.folder) as alone:
        if not alone:
            holder = (listing.folder / ".runner").read_text()
            print(
                f"{listing.folder}: another runner is at work on this sweep ({holder or 'unknown'}).", file=sys.stderr
            )
            return FAILED
        return _run(listing)


def _run(listing: Listing) -> int:
    pending = listing.pending()
    wandb = resolve_mode(listing.runs[0].config.tracking.wandb.mode) if pending else "off"
    write_atomically(listing.folder / "sweep.yaml", dump(plain(listing.tree)))
    for one in pending:
        _prepare(listing, one, wandb)
    store = Store(listing.folder / "sweep.db")
    waiting = {one.hash for one in pending}
    store.list(
        (
            r.hash,
            listing.ids[r.hash],
            r.cell,
            r.seed,
            dict(plain(r.changed)),
            "waiting" if r.hash in waiting else "done",
        )
        for r in listing.runs
    )
    stop = StopFlag()
    try:
        if not listing.has_sweep and len(pending) == 1:
            stopped = _alone(listing, pending[0], store, stop)
        else:
            stopped = _together(listing, pending, store, stop)
    finally:
        store.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if listing.has_sweep:
        print(f"\n{report(listing).text}")
    return _close(listing, stopped)


def _prepare(listing: Listing, one: Run, wandb: str) -> None:
    folder = listing.path(one)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of a failed attempt
    config = replace(one.config, run=listing.info(one, wandb))
    write_atomically(folder / "config.yaml", dump(plain(config)))


def _alone(listing: Listing, one: Run, store: Store, stop: StopFlag) -> bool:
    """A single run, in this process and with its progress on the terminal."""
    folder = listing.path(one)
    print(f"{folder}: {one.config.iterations} iterations")
    store.event("running", folder.name)
    (folder / f"attempt-{1 + len(list(folder.glob('attempt-*.log')))}.log").touch()
    code = run_trial(folder, stop=stop)
    store.event("stopped" if code == STOPPED else _status(folder), folder.name)
    return code == STOPPED


def _together(listing: Listing, pending: list[Run], store: Store, stop: StopFlag) -> bool:
    """Many runs, as processes. Returns whether it was stopped."""
    runner, cores = listing.runs[0].config.runner, len(os.sched_getaffinity(0))
    executor = LocalExecutor(slots(devices(runner), runner.per_device, runner.threads, cores, len(pending)))
    queue = list(pending)
    names = {listing.ids[r.hash]: r for r in listing.runs}
    ended = len(listing.runs) - len(pending)
    started = time.monotonic()
    while (queue or executor.live) and not stop():
        while queue and executor.free:
            trial = executor.start(listing.path(queue.pop(0)))
            store.event("running", trial.folder.name, device=trial.slot.device, adopted=trial.process is None)
        executor.wait()
        for trial, code in executor.finished():
            ended += 1
            status = "stopped" if code == STOPPED else _status(trial.folder)
            store.event(status, trial.folder.name, exit_code=code)
            _tell(names[trial.folder.name], trial.folder, status, ended, len(listing.runs), time.monotonic() - started)
    if not stop():
        return False
    print("stopping: trials save a checkpoint; Ctrl-C again ends them at once", flush=True)
    again = StopFlag()
    executor.stop(again)
    for trial, code in executor.finished():
        store.event("stopped" if code == STOPPED else _status(trial.folder), trial.folder.name, exit_code=code)
    return True


def _status(folder: Path) -> str:
    result = read_result(folder)
    return "failed" if result is None else str(result["status"])


def _tell(one: Run, folder: Path, status: str, ended: int, total: int, seconds: float) -> None:
    """A line about a run that has ended."""
    result = read_result(folder) or {}
    loss = result.get("val_loss")
    words = f", validation loss {loss:.4f}" if loss is not None else ""
    seed = f", seed {one.seed}" if "train.seed" not in one.changed else ""
    error = str(result.get("error") or "").strip().splitlines()
    why = f": {error[-1]} (see {folder})" if error else f" (see {folder})" if status == "failed" else ""
    print(f"[{ended}/{total}, {seconds:.0f} s] {status}: {one.cell}{seed}{words}{why}", flush=True)


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
    print(f"{listing.folder}: {', '.join(f'{n} {status}' for status, n in sorted(counts.items()))}")
    if stopped:
        return STOPPED
    return FAILED if counts["failed"] or counts["unfinished"] else OK
