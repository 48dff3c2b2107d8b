"""One trial: trains the run of a folder and writes its result. `python -m lab.worker RUN_DIR` is what executors start."""

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
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TextIO

import torch

from core.options import plain
from core.yaml_files import ConfigError
from engine import checkpoint
from engine.device import pick, provenance
from engine.loop import Run, State, Stopped
from engine.tracking import Tracker
from lab.listing import load_run
from lab.process import leave
from lab.store import attempts, hold, progress, write_atomically
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

    def __init__(self, config: Config) -> None:
        self.config, self.started, self.first = config, time.perf_counter(), -1

    def __call__(self, state: State, evaluated: bool) -> None:
        if self.first < 0:
            self.first, self.started = state.iter, time.perf_counter()
        over = sys.stdout.isatty()
        if evaluated or over:
            sys.stdout.write(OVER * over + self.words(state) + "\n" * evaluated)
            sys.stdout.flush()

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
    """result.json of a run that has none yet: every field, with what its metrics tell."""
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
        "error": None,
        "provenance": None,
        **known,
    }


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_atomically(folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


def run_trial(folder: Path, *, device: str | None = None, stop: Callable[[], bool], lock: IO[str] | None = None) -> int:
    """Trains the run in `folder` from where it is. Returns DONE, FAILED or STOPPED; the first two have written result.json.

    `lock`: the run's, if the caller took it.
    """
    lock = lock or hold(folder)
    if lock is None:
        print(f"{folder}: another process is training this run.")
        return STOPPED
    with lock:
        lock.write(str(os.getpid()))
        lock.flush()
        trial = _Trial(folder)
        code = trial.attempt(device, stop)
        if code != STOPPED:
            write_result(folder, trial.result)
        if trial.tracker is not None:
            trial.tracker.finish(None if code == STOPPED else trial.result)  # may wait for uploads: after the result
    return code


class _Trial:
    """One attempt, and what is known of it when it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = no_result(folder)
        self.tracker: Tracker | None = None
        self.run: Run | None = None

    def attempt(self, device: str | None, stop: Callable[[], bool]) -> int:
        try:
            status = self.train(device, stop)
        except Stopped:
            print(f"{self.folder}: stopped; it continues where it is.")
            return STOPPED
        except Exception as error:
            whole = (
                str(error) if isinstance(error, ConfigError) else "".join(traceback.format_exception(error)).rstrip()
            )
            told = "\n".join(whole.splitlines()[-TRACEBACK_LINES:])
            print(whole)
            measured = self.run.result() if self.run is not None else {}
            self.result |= measured | {"status": "failed", "val_loss": None, "error": told}
            self.result["provenance"] = self.result["provenance"] or provenance(None)
            return FAILED
        assert self.run is not None
        self.result |= self.run.result() | {"status": status}
        if status == "diverged":
            print(f"{self.folder}: diverged at iteration {self.result['iters']}: a loss is not finite.")
        return DONE

    def train(self, device: str | None, stop: Callable[[], bool]) -> str:
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
        return self.run.run(self.tracker, Line(config), stop)


class StopFlag:
    """True once the process was asked to end, from `with` to its end. `hard` is true once it was asked again.

    hard_ends: whether the second Ctrl-C ends this process at once.
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
        if self.hard and self.hard_ends and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def __call__(self) -> bool:
        return self.asked > 0

    @property
    def hard(self) -> bool:
        return self.asked > 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.worker", description="Trains the run of one folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", help="instead of train.device")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--lock", type=int, help="an open file, by number, that holds the run's lock")
    words = parser.parse_args()
    if words.threads:
        torch.set_num_threads(words.threads)
    if words.lock is not None:
        os.set_inheritable(words.lock, False)
    lock = None if words.lock is None else os.fdopen(words.lock, "a+")
    with StopFlag() as stop:
        return run_trial(words.folder, device=words.device, stop=stop, lock=lock)


if __name__ == "__main__":
    leave(main())
