"""Carries out a listing: run folders, the database, trials in their slots, and the report at the end."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.options import plain
from core.yaml_files import ConfigError, dump
from engine.device import pick
from engine.rehearsal import small
from engine.tracking import resolve_mode
from lab import claim, forks, helper, packing, rungs, store
from lab.base import ended_as, untrained
from lab.beside import NoReport, Reporter
from lab.conductor import Conductor
from lab.devices import gpus
from lab.executors import make
from lab.expand import Run
from lab.listing import ENDED, Listing
from lab.plan import Slot, slots
from lab.process import cores
from lab.store import Store, Superseded, begin_attempt, hold, holder, is_paused, progress, read_result, write_atomically
from lab.wandb_sweep import log_sweep, summarised
from lab.worker import Console, StopFlag, judge, run_pack
from train_args import Config
from variations import CATALOGUE

OK, FAILED, STOPPED = 0, 1, 75


def devices(config: Config) -> tuple[str, ...]:
    """The devices of trials: what the runner lists, else the one that training names, else every GPU, else the CPU.

    Raises ConfigError for a device that is not there.
    """
    asked = config.runner.devices
    if asked == "auto" and config.train.device == "auto":
        usable = torch.cuda.is_available()
        found = tuple(gpus()) or tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) if usable else ()
        return found or (str(pick("cpu", config.train.dtype)),)
    given = (config.train.device,) if asked == "auto" else (asked,) if isinstance(asked, str) else asked
    return tuple(str(pick(device, config.train.dtype)) for device in given)


def memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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


@dataclass(frozen=True)
class Manner:
    """How the command was given. `detach`: stopping leaves trials behind. `takeover`: of a sweep whose runner's machine is dead."""

    detach: bool = False
    takeover: bool = False


def run(listing: Listing, manner: Manner = Manner()) -> int:
    """Carries out every run that is not done, and before them what they start from. Returns the exit code.

    Raises ConfigError where nothing can be started.
    """
    folder = listing.folder
    try:
        listing.settle()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / claim.FILE).open("a").close()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be written: {error.strerror}. Nothing was started."
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if code := train_bases(listing):
        return code
    with redirect_stdout(Console(sys.stdout)), redirect_stderr(Console(sys.stderr)):
        try:
            with claim.exclusive(folder, manner.takeover) as mine:
                return _Sweep(listing, manner, mine).run()
        except (claim.Refused, Superseded) as error:
            print(error, file=sys.stderr)
            return FAILED
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, sqlite3.Error) and store.is_damaged(error):
                print(store.damage(folder / store.FILE, error), file=sys.stderr)
                return FAILED
            what = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
            advice = "What runs have saved is kept; make room or mend the folder and give the same command again."
            print(f"{folder}: it could not be written, so the sweep stops here ({what}). {advice}", file=sys.stderr)
            return FAILED


class _Sweep:
    """One command over a listing."""

    def __init__(self, listing: Listing, manner: Manner, mine: claim.Claim) -> None:
        self.listing, self.manner, self.claim = listing, manner, mine
        self.config = listing.runs[0].config
        self.runner = self.config.runner
        self.pending: list[Run] = []
        self.wandb = "off"
        self.stopped = self.hard = False
        self.failed: set[str] = set()  # by this command
        self.reporter = Reporter(listing.folder)

    def run(self) -> int:
        """Returns the exit code."""
        listing = self.listing
        if self.manner.detach and self.runner.executor == "ray" and self.runner.ray.address is None:
            raise ConfigError(
                "--detach: a Ray that this command starts ends with it, and its trials too. Give runner.ray.address."
            )
        places = devices(self.config) if self.runner.executor == "local" else ()
        write_atomically(listing.folder / "sweep.yaml", dump(plain(listing.tree)))
        self.database = Store(listing.folder / store.FILE)
        try:
            if listing.campaign is not None:
                listing.campaign.connect(self.database.recall, self.database.note)
                listing.campaign.more(self.known)
            self.pending = listing.pending()
            self.wandb = resolve_mode(self.config.tracking.wandb.mode) if self.pending else "off"
            for one in self.pending:
                self.prepare(one)
            self.tabulate()
            if self.is_single():
                self.alone(places[0])
            elif self.pending:
                self.together(places)
            return self.close() if self.report() else max(self.close(), FAILED)
        finally:
            self.database.close()
            self.reporter.close()

    def report(self) -> bool:
        """The sweep's tables, plots and page, and its own run in wandb. Returns whether the report could be written."""
        listing = self.listing
        if not listing.has_sweep or self.hard:
            return True
        try:
            told = self.reporter.last()
        except NoReport as error:
            print(f"{listing.folder}: no report: {error}", file=sys.stderr)
            return False
        print(f"\n{told['text']}")
        if self.pending:
            log_sweep(listing.folder, listing.name, self.config.tracking, self.wandb, summarised(told))
        return True

    def is_single(self) -> bool:
        """Whether it is one run that this process trains itself, with its progress on the terminal."""
        local = self.runner.executor == "local" and self.runner.devices_per_trial == 1
        return not self.listing.has_sweep and len(self.pending) == 1 and local

    def tabulate(self, made: Sequence[Run] | None = None) -> None:
        """Sets the runs in the database; of all but `made`, where some are given, it knows better how they stand."""
        new = {one.hash for one in (self.listing.runs if made is None else made)}
        rows = (_row(self.listing, one, one.hash in new) for one in self.listing.runs)
        self.database.list(rows)

    def prepare(self, one: Run) -> None:
        """The run's folder and configuration, unless a killed runner's trial is at work there."""
        folder = self.listing.path(one)
        folder.mkdir(parents=True, exist_ok=True)
        if holder(folder) is None:
            data = one.config.data
            data = replace(data, root=str(Path(data.root).resolve())) if data.root else data
            config = replace(one.config, data=data, run=self.listing.info(one, self.wandb))
            write_atomically(folder / "config.yaml", dump(plain(config)), lasting=False)

    def alone(self, device: str) -> None:
        """A single run, in this process and with its progress on the terminal."""
        one = self.pending[0]
        folder, threads = self.listing.path(one), one.config.runner.threads
        if threads:
            torch.set_num_threads(threads)
        lock = hold(folder)
        if lock is None:
            raise claim.Refused(f"{folder}: process {holder(folder)} is training this run. Wait for it, or stop it.")
        attempt = begin_attempt(folder)
        self.database.event("running", folder.name, device=device)
        with (
            (folder / f"attempt-{attempt.number}.log").open("w", encoding="utf-8") as log,
            redirect_stdout(Console(sys.stdout, log)),
            redirect_stderr(Console(sys.stderr, log)),
            StopFlag() as stop,
        ):
            print(f"{folder}: {one.config.iterations} iterations")
            code = run_pack([folder], device=device, stop=stop, locks=[lock], judges=judge)
        self.stopped = code == STOPPED
        self.database.event("stopped" if self.stopped else str((read_result(folder) or {}).get("status")), folder.name)

    def together(self, places: tuple[str, ...]) -> None:
        """Many runs, as trials of an executor."""
        listing, runner = self.listing, self.runner

        def here() -> list[Slot]:
            if runner.executor != "local":
                return [Slot("auto", runner.threads or 1, runner.devices_per_trial)]
            runs = len(listing.runs) + listing.more_to_come
            return slots(places, runner.per_device, runner.threads, cores(), runs, runner.devices_per_trial)

        try:
            executor = make(runner, here, listing.folder)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        helper.discard(forks.MODULE)  # where the executor has no use for it
        conductor = Conductor(
            listing,
            self.database,
            executor,
            self.claim,
            lambda some: self.pack(some, here),
            self.grow,
            self.promoted,
            self.reporter if listing.has_sweep else lambda: None,
        )
        conductor.failed = self.failed
        try:
            with StopFlag(hard_ends=False) as stop:
                conductor.go_on(self.pending, stop)
                if stop():
                    self.stop(conductor, stop)
                elif listing.has_sweep:
                    self.reporter.begin()  # while processes end
        finally:
            executor.close()

    def known(self, one: Run) -> dict[str, Any] | None:
        """What a search is told of a run: its result, or that it rests at a rung with the loss it has there. A run that failed
        before this command is tried again."""
        folder = self.listing.path(one)
        result = read_result(folder)
        if result is not None and result.get("status") == "failed" and folder.name not in self.failed:
            return None
        if result is None and is_paused(folder):
            seen = progress(folder)
            return {"status": "paused", "val_loss": seen.val_loss, "iters": seen.iter}
        return result

    def grow(self) -> list[Run]:
        """Runs that a search chooses, now that others have ended."""
        if self.listing.campaign is None:
            return []
        made = self.listing.campaign.more(self.known)
        for one in made:
            self.prepare(one)
        if made:
            self.tabulate(made)
        return made

    def promoted(self, resting: Sequence[str], last: bool) -> list[str]:
        """Runs at rest that may pass their rung."""
        sweep = self.listing.expansion.sweep
        if sweep.stop is None:
            return []
        ended = {self.listing.ids[one.hash]: self.listing.status(one) for one in self.listing.runs} if last else {}
        out = {run for run, status in ended.items() if status in ("failed", "diverged")}
        chosen = rungs.promotions(self.listing.folder, resting, sweep.stop, sweep.objective["mode"], last, out)
        for run in chosen:
            rungs.promote(self.listing.folder, run)
        return chosen

    def stop(self, conductor: Conductor, stop: StopFlag) -> None:
        """The user has asked to stop."""
        self.stopped, executor = True, conductor.executor
        if self.manner.detach and not stop.hard:
            count = len(executor.live)
            print(f"{count} trials train on without this runner. The same command takes them up again.", flush=True)
            return
        print("stopping: trials save a checkpoint; Ctrl-C again ends them at once", flush=True)
        executor.stop(lambda: stop.hard)
        for end in executor.ended():
            conductor.settle(end, stopping=True)
        self.hard = stop.hard

    def pack(self, some: Sequence[Run], here: Callable[[], list[Slot]]) -> list[list[Run]]:
        """Runs as the trials that they are carried out in."""
        places, runner = here(), self.runner

        def most(one: Run) -> int:
            return packing.fitting(self.listing.parameters(one), memory(), len(places))

        def is_small(one: Run) -> bool:
            return small(one.config, self.listing.parameters(one))

        how = packing.wanted(runner, places)
        return packing.groups(some, how, places, self.listing.content, CATALOGUE, most, is_small)

    def close(self) -> int:
        """The last line: how the runs ended. Returns the exit code."""
        listing = self.listing
        if listing.campaign is not None:
            for told in listing.campaign.refused:
                print(told)
        counts = Counter(listing.status(r) or "unfinished" for r in listing.runs)
        told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        again = ". The same command continues." if counts["unfinished"] else ""
        print(f"{listing.folder}: {told}{again}", flush=True)
        if self.stopped:
            return STOPPED
        return FAILED if counts["failed"] else STOPPED if counts["unfinished"] else OK


def _row(listing: Listing, one: Run, new: bool) -> store.Row:
    changed, length = dict(plain(one.changed)), one.config.iterations
    status = listing.status(one) if new else ""
    return store.Row(
        one.hash,
        listing.ids[one.hash],
        one.cell,
        one.seed,
        changed,
        one.baseline,
        length,
        status if status in ("", *ENDED) else "waiting",
        one.phase,
    )
