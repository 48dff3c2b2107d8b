"""One trial: trains the runs of folders, a pack of one or more, and writes the result of each as it ends.

`python -m lab.worker RUN_DIR...` is what executors start.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, TextIO

import torch

from core.options import plain
from core.secrets import scrub
from core.yaml_files import ConfigError
from engine import checkpoint, pack
from engine.data import Corpus
from engine.device import out_of_memory, pick, provenance
from engine.loop import Run
from engine.ranks import Ranks, launched
from engine.state import Anew, Paused, Stopped
from engine.tracking import Tracker
from lab.console import Console as Console
from lab.console import Line, scrubbed
from lab.listing import load_run
from lab.process import leave
from lab.pulse import GivenUp, Pulse
from lab.rungs import FileJudge
from lab.searching import Stop
from lab.store import PAUSED, attempts, current_attempt, hold, progress, release, write_atomically
from train_args import Config, with_vocabulary

DONE, FAILED, STOPPED = 0, 1, 75
TRACEBACK_LINES = 30


# A trial --------------------------------------------------------------------------------------------------------------------


def no_result(folder: Path, **known: Any) -> dict[str, Any]:
    """result.json of a run that has none yet: every field, with what its metrics tell.

    `pack` counts the runs that its process was given; `peak_memory_bytes` is the process's peak divided by it. `cause` of a failure
    is exception, oom (out of memory) or killed; `token` is that of the attempt which the result is of.
    """
    seen = progress(folder)
    return {
        "status": "failed",
        "val_loss": None,
        "best_val_loss": seen.best_val_loss,
        "train_loss": seen.train_loss,
        "iters": seen.iter,
        "tokens": seen.tokens,
        "seconds": seen.seconds,
        "tokens_per_second": None,
        "parameters": None,
        "trainable_parameters": None,
        "flops_per_token": None,
        "peak_memory_bytes": None,
        "run_id": folder.name,
        "cell": None,
        "seed": None,
        "attempt": max(1, attempts(folder)),
        "pack": 1,
        "error": None,
        "cause": None,
        "token": None,
        "provenance": None,
        **known,
    }


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_atomically(folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


Judges = Callable[[Path, Config], pack.Judge | None]  # who judges the run of a folder at rungs; None: nobody


def run_pack(
    folders: Sequence[Path],
    *,
    device: str | None = None,
    stop: Callable[[], bool],
    locks: Sequence[IO[str]] = (),
    judges: Judges | None = None,
) -> int:
    """Trains the runs in `folders` from where they are; what one of them raises ends that one alone.

    Returns STOPPED if one of them was stopped or paused at a rung, else FAILED if one failed, else DONE; all but those that were
    stopped or paused have a result.json then. `locks`: of the runs in their order, if the caller took them.
    """
    tries = [_Attempt(folder, folders, lock) for folder, lock in zip_longest(folders, locks)]
    threads = torch.get_num_threads()
    members: dict[pack.Member, _Attempt] = {}

    def make(one: _Attempt) -> pack.Member | None:
        torch.set_num_threads(threads)  # a run that continues has set the number it began with
        member = one.member(device, stop, alone=not members)
        members.update({member: one} if member is not None else {})
        return member

    try:
        ready = [one for one in tries if one.begin(judges)]
        asked = {one.config.runner.pack for one in ready} - {"auto", "off"}
        most = max((size for size in asked if isinstance(size, int)), default=None)
        pack.train([partial(make, one) for one in ready], lambda member, how: members.pop(member).end(how), most)
    finally:
        for one in tries:
            one.close()
    codes = {one.code for one in tries}
    return next((code for code in (STOPPED, FAILED) if code in codes), DONE)


class _Attempt:
    """One attempt at one run, and what is known of it when it ends.

    The first of a pack prints where the process does, the others to logs of their own.
    """

    def __init__(self, folder: Path, folders: Sequence[Path], lock: IO[str] | None) -> None:
        self.folder, self.size, self.lock = folder, len(folders), lock or hold(folder)
        self.attempt = current_attempt(folder)
        self.result = no_result(folder, pack=self.size, token=self.attempt.token if self.attempt else None)
        self.pulse = Pulse(folder, self.attempt, lambda: False, dict)
        self.tracker: Tracker | None = None
        self.ranks = Ranks()
        self.config: Config
        self.corpus: Corpus | None = None
        self.judges: Judges | None = None
        self.run: Run | None = None
        self.code = STOPPED
        self.log: TextIO | None = None
        self.out: TextIO | Console = sys.stdout
        if folder != folders[0]:
            self.log = (folder / f"attempt-{self.result['attempt']}.log").open("a", encoding="utf-8")
            self.out = Console(self.log)
            self.say(f"{folder}: in the process of {folders[0].name}, whose log has what else it prints")

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def close(self) -> None:
        """Frees the run for others."""
        if self.lock is not None and not self.lock.closed:
            release(self.lock)
        if self.log is not None:
            self.log.close()

    def begin(self, judges: Judges | None) -> bool:
        """Takes the run; False where its configuration or data are wrong, or another process trains it."""
        self.judges = judges
        if self.lock is None:
            self.say(f"{self.folder}: another process is training this run.")
            return False
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        try:
            self.load()
        except Exception as error:
            self.end(error)
        return self.corpus is not None

    def load(self) -> Corpus:
        """Reads the run's configuration, and finds its data."""
        config, self.corpus = load_run(self.folder, plugins=True)
        self.config = with_vocabulary(config, self.corpus.meta.vocab_size)
        self.result |= {"cell": config.run.cell, "seed": config.train.seed}
        return self.corpus

    def member(self, device: str | None, stop: Callable[[], bool], alone: bool) -> pack.Member | None:
        """The run, ready to train, or None where it cannot be made or is to stop. Raises that memory is out, unless it is alone."""
        try:
            if stop():
                raise Stopped
            return self.make(device, stop)
        except Exception as error:
            if out_of_memory(error) and not alone:
                self.put_down()
                raise
            self.end(error)
            return None

    def make(self, device: str | None, stop: Callable[[], bool]) -> pack.Member:
        corpus = self.corpus or self.load()
        folder, result, config = self.folder, self.result, self.config
        chosen = pick(self.ranks.device(device or config.train.device), config.train.dtype)
        saved = checkpoint.resumed(folder / "checkpoint")
        self.tracker = Tracker(
            folder,
            config.tracking,
            mode=config.run.wandb,
            sweep=config.name,
            run_id=folder.name,
            cell=config.run.cell,
            seed=config.train.seed,
            changed=config.run.changed,
            swept=config.run.swept,
            full_config=plain(config),
            keep_to=saved.state["iter"] if saved else None,
        )
        self.run = Run(config, corpus, folder, chosen, self.ranks)
        result["provenance"] = {**provenance(chosen), "data": corpus.meta.content_hash}
        self.pulse = Pulse(folder, self.attempt, stop, self.run.vitals)
        judge = self.judges(folder, config) if self.judges is not None else None
        return pack.Member(self.run, self.tracker, Line(config, self.out), self.pulse, judge)

    def put_down(self) -> None:
        """Lets go of the run, which may be made again from its checkpoint."""
        if self.tracker is not None:
            self.tracker.finish(None)
        self.run, self.tracker = None, None
        self.pulse = Pulse(self.folder, self.attempt, lambda: False, dict)

    def end(self, how: str | Exception) -> None:
        """Writes and tells what became of the run, and frees it."""
        if isinstance(how, Anew):
            self.put_down()
            return
        try:
            self.code = self.judge(how)
            if self.code != STOPPED:
                self.pulse.check()
                write_result(self.folder, self.result)
        except GivenUp as error:
            self.code = STOPPED
            self.say(f"{self.folder}: {error}")
        except OSError as error:  # the other runs go on
            self.code = FAILED
            self.say(f"{self.folder}: the result could not be written ({error}).")
        if self.tracker is not None:
            self.tracker.finish(None if self.code == STOPPED else self.result)  # may wait for uploads: after the result
            self.tracker = None
        self.put_down()  # others of the pack need its memory
        self.close()

    def told(self, error: Exception) -> str:
        """A sentence where the disk is full or cannot be written, as for what we raise ourselves; else the traceback."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            what = f"{error.filename or self.folder} could not be written ({error.strerror})"
            return f"{what}. Make room or mend the folder and give the same command again; what was saved is kept."
        return str(error) if isinstance(error, ConfigError) else "".join(traceback.format_exception(error)).rstrip()

    def judge(self, how: str | Exception) -> int:
        """Puts into the result what the run ended with: DONE, FAILED or STOPPED."""
        if isinstance(how, GivenUp):
            raise how
        if isinstance(how, Stopped):
            told = str(how) if isinstance(how, Paused) else "stopped"
            if isinstance(how, Paused):
                (self.folder / PAUSED).write_text(str(how.iteration))
            self.say(f"{self.folder}: {told}; it continues where it is.")
            return STOPPED
        measured = self.run.result() if self.run is not None else {}
        if measured:
            measured["peak_memory_bytes"] //= self.size
        if isinstance(how, Exception):
            whole = scrub(self.told(how))
            told = "\n".join(whole.splitlines()[-TRACEBACK_LINES:])
            self.say(whole)
            cause = "oom" if out_of_memory(how) else "exception"
            self.result |= measured | {"status": "failed", "val_loss": None, "error": told, "cause": cause}
            self.result["provenance"] = self.result["provenance"] or provenance(None)
            return FAILED
        self.result |= measured | {"status": how}
        if how != "done":
            why = ": a loss is not finite" if how == "diverged" else ""
            self.say(f"{self.folder}: {how} at iteration {self.result['iters']}{why}.")
        return DONE


class StopFlag:
    """True once the process was asked to end, from `with` to its end. `hard` is true once it was asked again.

    hard_ends: whether the second time ends this process at once.
    """

    def __init__(self, hard_ends: bool = True) -> None:
        self.asked, self.hard_ends = 0, hard_ends
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked += 1
        if self.hard and self.hard_ends:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __call__(self) -> bool:
        return self.asked > 0

    @property
    def hard(self) -> bool:
        return self.asked > 1


def judge(folder: Path, config: Config) -> FileJudge | None:
    """Who judges a run at rungs, where its sweep stops early."""
    given = dict(config.run.stop)
    if not given:
        return None
    mode = given.pop("mode")
    return FileJudge(folder.resolve().parent, folder.resolve().name, Stop(**given), config.iterations, mode)


def trial(folders: Sequence[Path], device: str | None, threads: int | None, locks: Sequence[int]) -> int:
    """Trains the runs of folders in this process, which may be asked to stop by a signal. `locks`: open files, by number."""
    if threads:
        torch.set_num_threads(threads)
    for number in locks:
        os.set_inheritable(number, False)
    with StopFlag() as stop, scrubbed(folders):
        held = [os.fdopen(number, "a+") for number in locks]
        return run_pack(folders, device=device, stop=stop, locks=held, judges=judge)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.worker", description="Trains the runs of folders.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--device", help="instead of train.device")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--lock", type=int, action="append", default=[], help="an open file, by number, that holds a run's lock"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="how many train the run together; --threads are of each"
    )
    parser.add_argument("--held", action="store_true", help="whoever starts this process holds the run's lock")
    words = parser.parse_args()
    if len(words.lock) not in (0, len(words.folders)):
        parser.error(
            f"{len(words.lock)} --lock for {len(words.folders)} folders: each needs one, in their order, or none"
        )
    if launched() or words.processes > 1:
        from lab import several  # which needs what is here

        if launched():
            return several.trial(words.folders, words.device, words.threads, words.held)
        if len(words.folders) > 1:
            parser.error(f"{words.processes} --processes train one run together, not {len(words.folders)}")
        return several.launch(words.folders[0], words.processes, words.device, words.threads, words.lock)
    return trial(words.folders, words.device, words.threads, words.lock)


if __name__ == "__main__":
    leave(main())
