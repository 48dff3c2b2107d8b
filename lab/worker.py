"""One trial: trains the run of a folder and writes its result. `python -m lab.worker RUN_DIR` is what executors start."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from core.options import plain
from core.yaml_files import ConfigError
from engine import checkpoint
from engine.device import pick, provenance
from engine.loop import Run, State, Stopped
from engine.tracking import Tracker
from lab.listing import load_run
from train_args import Config, with_vocabulary

DONE, FAILED, STOPPED = 0, 1, 75
LOCK = ".lock"
TRACEBACK_LINES = 30


def write_atomically(path: Path, text: str) -> None:
    """The whole text or, whatever happens, what was there before."""
    part = path.with_name(f".{path.name}-{os.getpid()}")
    with part.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(path)


def hold(folder: Path) -> TextIO | None:
    """Takes the run's lock for as long as the returned file is open; None where another process has it."""
    handle = (folder / LOCK).open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


def held(folder: Path) -> bool:
    """Whether some process is training this run."""
    if not (folder / LOCK).exists():
        return False
    handle = hold(folder)
    if handle is not None:
        handle.close()
    return handle is None


class Line:
    """Progress for people: a line at every evaluation, and between them one that is overwritten where the output is a terminal."""

    def __init__(self, config: Config, out: TextIO) -> None:
        self.config, self.out, self.started, self.first = config, out, time.perf_counter(), -1

    def __call__(self, state: State, evaluated: bool) -> None:
        if self.first < 0:
            self.first, self.started = state.iter, time.perf_counter()
        if not evaluated and not self.out.isatty():
            return
        total, passed = self.config.iterations, time.perf_counter() - self.started
        left = passed / (state.iter - self.first) * (total - state.iter) if state.iter > self.first else None
        words = [f"iteration {state.iter:>{len(str(total))}}/{total}"]
        words += [f"train loss {state.train_loss:.4f}"] if state.train_loss is not None else []
        words += [f"validation loss {state.val_loss:.4f}"] if state.val_loss is not None else []
        words += (
            [f"{state.iter * self.config.tokens_per_iter / max(state.train_seconds, 1e-9):,.0f} tokens/s"]
            if state.iter
            else []
        )
        words += [f"{left:.0f} s left"] if left is not None and state.iter < total else []
        self.out.write(
            "\r\x1b[K" * self.out.isatty() + ", ".join(words) + ("\n" if evaluated or not self.out.isatty() else "")
        )
        self.out.flush()


def run_trial(folder: Path, *, device: str | None = None, stop: Callable[[], bool], out: TextIO = sys.stdout) -> int:
    """Trains the run in `folder` from where it is. Returns DONE, FAILED or STOPPED; the first two have written result.json."""
    lock = hold(folder)
    if lock is None:
        out.write(f"{folder}: another process is training this run.\n")
        return STOPPED
    attempt = max([1, *(int(p.stem.partition("-")[2]) for p in folder.glob("attempt-*.log"))])
    result: dict[str, Any] = {"status": "failed", "error": None, "attempt": attempt, "run_id": folder.name}
    tracker: Tracker | None = None
    code = DONE
    try:
        config, corpus = load_run(folder, plugins=True)
        config = with_vocabulary(config, corpus.meta.vocab_size)
        result |= {"cell": config.run.cell, "seed": config.train.seed}
        torch_device = pick(device or config.train.device)
        saved = checkpoint.latest(folder / "checkpoint")
        tracker = Tracker(
            folder,
            config.tracking,
            mode=config.run.wandb,
            sweep=config.name,
            run_id=folder.name,
            cell=config.run.cell,
            seed=config.train.seed,
            changed=config.run.changed,
            full_config=plain(config),
            keep_to=saved.state["iter"] if saved else -1,
        )
        run = Run(config, corpus, folder, torch_device)
        result["provenance"] = {**provenance(torch_device), "data": corpus.meta.content_hash}
        result["status"] = run.run(tracker, Line(config, out), stop)
        result |= run.result()
    except Stopped:
        out.write(f"{folder}: stopped; the checkpoint is saved.\n")
        code = STOPPED
    except Exception as error:
        code = FAILED
        tail = "".join(traceback.format_exception(error)).splitlines()[-TRACEBACK_LINES:]
        told = str(error) if isinstance(error, ConfigError) else "\n".join(tail)
        result |= {"status": "failed", "error": told}
        out.write(told + "\n")
    if tracker is not None:
        tracker.finish(None if code == STOPPED else result)
    if code != STOPPED:
        write_atomically(folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    lock.close()
    return code


class StopFlag:
    """True once the process was asked to end. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.worker", description="Trains the run of one folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", help="instead of train.device")
    parser.add_argument("--threads", type=int, help="CPU threads")
    words = parser.parse_args()
    if words.threads:
        torch.set_num_threads(words.threads)
    return run_trial(words.folder, device=words.device, stop=StopFlag())


if __name__ == "__main__":
    sys.exit(main())
