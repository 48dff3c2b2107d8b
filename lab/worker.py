"""One trial: trains the runs of folders, a pack of one or more, and writes the result of each as it ends.

`python -m lab.worker RUN_DIR...` is what executors start.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, TextIO

import torch

from core.options import plain
from core.yaml_files import ConfigError
from engine import checkpoint, pack
from engine.device import pick, provenance
from engine.loop import Run, State, Stopped
from engine.tracking import Tracker
from lab.listing import load_run
from lab.process import leave
from lab.store import attempts, hold, progress, release, write_atomically
from train_args import Config, with_vocabulary

DONE, FAILED, STOPPED = 0, 1, 75
TRACEBACK_LINES = 30
OVER = "\r\x1b[K"  # to the start of the line, which is then erased


# Output ---------------------------------------------------------------------------------------------------------------------


class Console(io.TextIOBase):
    """A stream for people that cannot fail: when its reader is gone, training goes on. Whole lines also go to `log`."""

    def __init__(self, stream: TextIO, log: TextIO | None = None) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        self._safely(self.stream.write, text)
        if self.log is not None and not (text.startswith(OVER) and not text.endswith("\n")):
            self.log.write(text.removeprefix(OVER))
            self.log.flush()
        return len(text)

    def flush(self) -> None:
        self._safely(self.stream.flush)

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def _safely(self, act: Callable[..., Any], *given: Any) -> None:
        try:
            act(*given)
        except OSError:
            with contextlib.suppress(OSError):  # what it still holds, and all that follows, goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Line:
    """Progress for people: a line at every evaluation, and between them one that is overwritten where the output is a terminal."""

    def __init__(self, config: Config, out: TextIO | Console) -> None:
        self.config, self.out, self.started, self.first = config, out, time.perf_counter(), -1

    def __call__(self, state: State, evaluated: bool) -> None:
        if self.first < 0:
            self.first, self.started = state.iter, time.perf_counter()
        over = self.out.isatty()
        if evaluated or over:
            self.out.write(OVER * over + self.words(state) + "\n" * evaluated)
            self.out.flush()

    def words(self, state: State) -> str:
        total, passed = self.config.iterations, time.perf_counter() - self.started
        words = [f"iteration {state.iter:>{len(str(total))}}/{total}"]
        if state.train_loss is not None:
            words.append(f"train loss {state.train_loss:.4f}")
        if state.val_loss is not None:
            words.append(f"validation loss {state.val_loss:.4f}")
        if state.iter:
            speed = state.iter * self.config.tokens_per_iter / max(state.train_seconds, 1e-9)
            words.append(f"{speed:,.0f} tokens/s")
        if self.first < state.iter < total:
            words.append(f"{passed / (state.iter - self.first) * (total - state.iter):.0f} s left")
        return ", ".join(words)


# A trial --------------------------------------------------------------------------------------------------------------------


def no_result(folder: Path, **known: Any) -> dict[str, Any]:
    """result.json of a run that has none yet: every field, with what its metrics tell.

    `pack` counts the runs that its process was given; `peak_memory_bytes` is the process's peak divided by it.
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
        "provenance": None,
        **known,
    }


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_atomically(folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


def run_pack(
    folders: Sequence[Path], *, device: str | None = None, stop: Callable[[], bool], locks: Sequence[IO[str]] = ()
) -> int:
    """Trains the runs in `folders` from where they are; what one of them raises ends that one alone.

    Returns STOPPED if one of them was stopped, else FAILED if one failed, else DONE; all but those that were stopped have a
    result.json then. `locks`: of the runs in their order, if the caller took them.
    """
    tries = [_Attempt(folder, folders, lock) for folder, lock in zip_longest(folders, locks)]
    threads = torch.get_num_threads()
    members: dict[pack.Member, _Attempt] = {}
    try:
        for one in tries:
            torch.set_num_threads(threads)  # a run that continues has set the number it began with
            member = one.begin(device, stop)
            members |= {member: one} if member is not None else {}
        asked = {member.run.config.runner.pack for member in members} - {"auto", "off"}
        most = max((size for size in asked if isinstance(size, int)), default=None)
        pack.train(list(members), lambda member, how: members.pop(member).end(how), most)
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
        self.result = no_result(folder, pack=self.size)
        self.tracker: Tracker | None = None
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

    def begin(self, device: str | None, stop: Callable[[], bool]) -> pack.Member | None:
        """The run, ready to train, or None where it cannot be made or another process trains it."""
        if self.lock is None:
            self.say(f"{self.folder}: another process is training this run.")
            return None
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        try:
            return self.make(device, stop)
        except Exception as error:
            self.end(error)
            return None

    def make(self, device: str | None, stop: Callable[[], bool]) -> pack.Member:
        folder, result = self.folder, self.result
        config, corpus = load_run(folder, plugins=True)
        config = with_vocabulary(config, corpus.meta.vocab_size)
        result |= {"cell": config.run.cell, "seed": config.train.seed}
        chosen = pick(device or config.train.device, config.train.dtype)
        saved = checkpoint.latest(folder / "checkpoint")
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
        self.run = Run(config, corpus, folder, chosen)
        result["provenance"] = {**provenance(chosen), "data": corpus.meta.content_hash}
        return pack.Member(self.run, self.tracker, Line(config, self.out), stop)

    def end(self, how: str | Exception) -> None:
        """Writes and tells what became of the run, and frees it."""
        try:
            self.code = self.judge(how)
            if self.code != STOPPED:
                write_result(self.folder, self.result)
        except OSError as error:  # the other runs go on
            self.code = FAILED
            self.say(f"{self.folder}: the result could not be written ({error}).")
        if self.tracker is not None:
            self.tracker.finish(None if self.code == STOPPED else self.result)  # may wait for uploads: after the result
        self.close()

    def judge(self, how: str | Exception) -> int:
        """Puts into the result what the run ended with: DONE, FAILED or STOPPED."""
        if isinstance(how, Stopped):
            self.say(f"{self.folder}: stopped; it continues where it is.")
            return STOPPED
        measured = self.run.result() if self.run is not None else {}
        if measured:
            measured["peak_memory_bytes"] //= self.size
        if isinstance(how, Exception):
            whole = str(how) if isinstance(how, ConfigError) else "".join(traceback.format_exception(how)).rstrip()
            told = "\n".join(whole.splitlines()[-TRACEBACK_LINES:])
            self.say(whole)
            self.result |= measured | {"status": "failed", "val_loss": None, "error": told}
            self.result["provenance"] = self.result["provenance"] or provenance(None)
            return FAILED
        self.result |= measured | {"status": how}
        if how == "diverged":
            self.say(f"{self.folder}: diverged at iteration {self.result['iters']}: a loss is not finite.")
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.worker", description="Trains the runs of folders.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--device", help="instead of train.device")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--lock", type=int, action="append", default=[], help="an open file, by number, that holds a run's lock"
    )
    words = parser.parse_args()
    if len(words.lock) not in (0, len(words.folders)):
        parser.error(
            f"{len(words.lock)} --lock for {len(words.folders)} folders: each needs one, in their order, or none"
        )
    if words.threads:
        torch.set_num_threads(words.threads)
    for number in words.lock:
        os.set_inheritable(number, False)
    with StopFlag() as stop:
        locks = [os.fdopen(number, "a+") for number in words.lock]
        return run_pack(words.folders, device=words.device, stop=stop, locks=locks)


if __name__ == "__main__":
    leave(main())
