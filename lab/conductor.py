"""The loop of a sweep: what is started next, what became of what has ended, and when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.device import provenance
from lab.claim import Claim
from lab.console import scrub_logs
from lab.executors import End, Executor, Trial
from lab.expand import Run
from lab.listing import ENDED, Listing
from lab.plan import Streak, Verdict, Wish, verdict, wishes
from lab.store import Store, asked_again, attempts, current_attempt, is_paused, progress, read_result
from lab.worker import StopFlag, no_result, write_result

LOOK = 1.0  # seconds between looks at what nobody tells of
AHEAD = 1024  # trials that an executor may choose from


class Conductor:
    """Carries out the runs of a listing with an executor, and notes every change in the database.

    `grow()` returns runs that are to be carried out too, now that others have ended, prepared; `promoted(resting, last)` those that
    rest at a rung and may go on (last: nothing else is left to do); `pack(runs)` groups runs into trials; `aside()` is
    called again and again, for what is done beside the sweep.
    """

    def __init__(
        self,
        listing: Listing,
        database: Store,
        executor: Executor,
        claim: Claim,
        pack: Callable[[Sequence[Run]], list[list[Run]]],
        grow: Callable[[], Iterable[Run]] = list,
        promoted: Callable[[Sequence[str], bool], Sequence[str]] = lambda resting, last: (),
        aside: Callable[[], None] = lambda: None,
    ) -> None:
        self.listing, self.database, self.executor, self.claim = listing, database, executor, claim
        self.pack, self.grow, self.promoted, self.aside = pack, grow, promoted, aside
        self.queue: list[Wish] = []
        self.resting: list[str] = []  # at a rung of early stopping
        self.failed: set[str] = set()
        self.lost = database.losses()
        self.streak, self.why = Streak(), ""
        self.runs = {listing.ids[run.hash]: run for run in listing.runs}
        self.started, self.looked = time.monotonic(), 0.0
        self.done = 0

    def folder(self, run: str) -> Path:
        return self.listing.folder / run

    def go_on(self, pending: Sequence[Run], stop: StopFlag) -> None:
        """Carries out runs until all have ended, the user stops it, or going on is no use (`why` says so then)."""
        self.done = len(self.runs) - len(pending)
        held = self.executor.adopt([self.listing.path(run) for run in pending])
        self.note_running(held)
        taken = {folder.name for trial in held for folder in trial.folders}
        self.add([run for run in pending if self.listing.ids[run.hash] not in taken])
        while not stop() and (self.queue or self.executor.live or self.closed_rungs()):
            with self.database.batch():
                some = list(self.executor.ended())
                for end in some:
                    self.settle(end)
                if some and not self.why:
                    self.more()
                self.start()
            self.beside()
            if self.queue or self.executor.live:
                self.executor.wait(LOOK)

    def add(self, runs: Sequence[Run]) -> None:
        """Queues runs, but for those that rest at a rung, or that a trial of a killed runner has ended meanwhile."""
        names = {run.hash: self.listing.ids[run.hash] for run in runs}
        self.runs |= {names[run.hash]: run for run in runs}
        waiting = []
        for run in runs:
            name = names[run.hash]
            if self.status(name) in ENDED:
                self.done += 1
            elif is_paused(self.folder(name)):
                self.resting.append(name)
            else:
                waiting.append(run)
        for some in self.pack(waiting) if waiting else ():
            self.queue.append(Wish(tuple(names[run.hash] for run in some)))

    def more(self) -> None:
        """What follows from what has ended: runs that a search chooses, and runs that were stopped early and may go on."""
        self.add(list(self.grow()))
        self.promote(last=False)

    def promote(self, last: bool) -> None:
        """Runs that rest at a rung and may pass it are next."""
        for run in self.promoted(self.resting, last) if self.resting else ():
            self.resting.remove(run)
            self.queue.insert(0, Wish((run,)))

    def closed_rungs(self) -> bool:
        """When nothing runs and nothing waits: the best of those that rest go on, and where there are none, the others were
        stopped for good. Returns whether something is to be done again."""
        if not self.why:
            self.more()
            if not self.queue:
                self.promote(last=True)
        if self.queue or self.why:
            return bool(self.queue)
        resting, self.resting = self.resting, []
        for run in resting:
            folder, one = self.folder(run), self.runs[run]
            attempt, seen = current_attempt(folder), progress(folder)
            known: dict[str, Any] = {"status": "pruned", "cell": one.cell, "seed": one.seed}
            known |= {
                "train_loss": seen.train_loss,
                "val_loss": seen.val_loss,
                "token": attempt.token if attempt else None,
            }
            write_result(folder, no_result(folder, **known))
            self.done += 1
            self.database.event("pruned", run)
            self.tell(folder, "pruned", read_result(folder) or {})
        if resting and not self.why:
            self.more()
        return bool(self.queue)

    def start(self) -> None:
        """Starts what there is room for."""
        head = self.queue[:AHEAD]
        trials = self.executor.start(head, self.folder) if head else []
        if not trials:
            return
        taken = {id(trial.wish) for trial in trials}
        going = {folder.name for trial in trials for folder in trial.folders}
        left = []
        for wish in head:
            rest = tuple(run for run in wish.runs if run not in going)
            touched = id(wish) in taken or len(rest) < len(wish.runs)
            left += [wish] if not touched else [Wish(rest, wish.whole)] if rest else []
        self.queue[:AHEAD] = left
        self.note_running(trials)

    def status(self, run: str) -> str | None:
        result = read_result(self.folder(run))
        return None if result is None else str(result.get("status"))

    def note_running(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            names = [folder.name for folder in trial.folders]
            self.database.events("running", names, device=trial.place, adopted=trial.adopted)

    def beside(self) -> None:
        """What is looked after now and then."""
        self.claim.beat()
        self.aside()
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        for run in asked_again(self.listing.folder):
            if run in self.runs and self.status(run) is None and not self.is_open(run):
                self.failed.discard(run)
                self.done -= 1
                self.database.event("retried", run)
                self.queue.append(Wish((run,)))

    def is_open(self, run: str) -> bool:
        """Whether a run is at work, waits or rests."""
        at_work = any(folder.name == run for trial in self.executor.live for folder in trial.open)
        return at_work or run in self.resting or any(run in wish.runs for wish in self.queue)

    # How runs end -----------------------------------------------------------------------------------------------------------

    def settle(self, end: End, stopping: bool = False) -> None:
        """Notes what became of runs, and queues those that go on."""
        scrub_logs({*end.folders, end.trial.folders[0]})  # a trial that died could not do it itself
        verdicts: dict[str, Verdict] = {}
        for folder in end.folders:
            name, result = folder.name, read_result(folder)
            if result is None and stopping:
                self.database.event("stopped", name, exit_code=end.code)
                continue
            before = 0 if end.planned else self.lost.get(name, 0)
            made = verdict(end.trial.wish, result, before, is_paused(folder))
            if made.status == "failed" and result is None:
                self.give_up(folder, end)
            verdicts[name] = made
            self.note(folder, made, end)
        if not self.why:
            self.queue[:0] = wishes(verdicts)

    def note(self, folder: Path, made: Verdict, end: End) -> None:
        name = folder.name
        if not end.planned:
            self.lost[name] = self.lost.get(name, 0) + 1 if made.status == "lost" else 0
        detail = (
            {"exit_code": end.code, "why": end.why} if made.status in ("lost", "failed") else {"exit_code": end.code}
        )
        self.database.event("stopped" if made.status == "lost" and end.planned else made.status, name, **detail)
        if made.status == "paused":
            self.resting.append(name)
            return
        if made.status in ("lost", "crowded"):
            why = "it ran out of memory and goes on alone" if made.status == "crowded" else f"{end.why}; it goes on"
            self.say(folder, made.status, why)
            return
        self.done += 1
        result = read_result(folder) or {}
        error = str(result.get("error") or "")
        if made.status == "failed":
            self.failed.add(name)
        alike = self.streak.ended(made.status, error)
        self.tell(folder, made.status, result)
        if alike and not self.why:
            self.why = (
                f"{self.streak.count} runs in a row failed with the same error and none went well, so nothing more is started: "
                f"{alike}. Mend that and give the same command again."
            )
            self.queue.clear()
            print(f"{self.listing.folder}: {self.why}", flush=True)

    def give_up(self, folder: Path, end: End) -> None:
        """The result of a run whose process was lost too often."""
        run, trial, attempt = self.runs[folder.name], end.trial, current_attempt(folder)
        first = folder if trial.adopted else trial.folders[0]  # an adopted run's own log names the first's
        log = f"attempt-{attempts(first)}.log"
        place = log if first == folder else f"../{first.name}/{log}"
        error = (
            f"The process died {self.lost.get(folder.name, 0) + 1} times without a result, the last time {end.why}. "
        )
        known: dict[str, Any] = {"cell": run.cell, "seed": run.seed, "provenance": provenance(None), "cause": "killed"}
        known |= {"error": f"{error}Its last words are in {place}.", "token": attempt.token if attempt else None}
        write_result(folder, no_result(folder, pack=len(trial.folders), **known))

    def tell(self, folder: Path, status: str, result: dict[str, Any]) -> None:
        loss = result.get("val_loss")
        words = f", validation loss {loss:.4f}" if loss is not None else ""
        error = str(result.get("error") or "").strip().splitlines()
        self.say(folder, status, "", words + (f": {error[-1]} (see {folder})" if error else ""))

    def say(self, folder: Path, status: str, why: str, words: str = "") -> None:
        run = self.runs[folder.name]
        seed = f", seed {run.seed}" if "train.seed" not in run.changed else ""
        seconds, told = time.monotonic() - self.started, f": {why}" if why else ""
        print(
            f"[{self.done}/{len(self.runs)}, {seconds:.0f} s] {status}: {run.cell}{seed}{words}{told}",
            flush=True,
        )
