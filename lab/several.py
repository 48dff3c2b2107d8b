"""A trial of several processes that train one run: torchrun starts them, the first tells of the run and writes its files.

`torchrun --nproc-per-node 2 -m lab.worker RUN_DIR`, given by hand, does the same; its own exit code is then 0 or 1, and result.json
(or that there is none) says the rest.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from core.weights import weights
from core.yaml_files import ConfigError
from engine.course import Course, Judge, Member
from engine.device import pick
from engine.loop import Run
from engine.ranks import Lost, Ranks, join
from engine.state import State, Stopped
from lab.console import scrubbed
from lab.listing import load_run
from lab.store import LOCK, hold, read_result, release
from lab.worker import DONE, FAILED, STOPPED, StopFlag, _Attempt, judge
from train_args import with_vocabulary

GRACE = "600"  # seconds that processes have for their checkpoint once torchrun was asked to stop


# The process that starts the others ------------------------------------------------------------------------------------------


def launch(folder: Path, processes: int, device: str | None, threads: int | None, locks: Sequence[int]) -> int:
    """Trains the run in `folder` by so many processes, each with so many threads. Returns the trial's exit code.

    `locks`: an open file, by number, that holds the run's lock, if the caller took it. It is held here, for as long as any of the
    processes lives.
    """
    for number in locks:
        os.set_inheritable(number, False)
    held = os.fdopen(locks[0], "a+") if locks else hold(folder)
    if held is None:
        print(f"{folder}: another process is training this run.", flush=True)
        return STOPPED
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    words = [sys.executable, "-P", "-m", "lab.worker", str(folder), "--held"]
    words += ["--device", device] if device else []
    words += ["--threads", str(threads)] if threads else []
    try:
        with scrubbed([folder]):  # also what a process wrote that was killed
            return _run(words, processes, folder)
    finally:
        release(held)


def _run(command: Sequence[str], processes: int, folder: Path) -> int:
    """torchrun in this process, which so learns the code that its first worker ended with."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with a warning
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the workers say themselves what happened
    given = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", str(processes), "--no-python", *command]
    try:
        run(parse_args(given))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        for rank, code in codes.items():
            if code not in (FAILED, STOPPED):  # with which they say themselves why
                ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                print(f"process {rank + 1} of {processes} {ended}", flush=True)
        return STOPPED if codes.get(0) == STOPPED else FAILED
    except SignalException:  # and all have ended
        status = (read_result(folder) or {}).get("status")
        return STOPPED if status is None else FAILED if status == "failed" else DONE
    return DONE


# One of the processes that train ---------------------------------------------------------------------------------------------


def trial(folders: Sequence[Path], device: str | None, threads: int | None, held: bool) -> int:
    """One of the processes that torchrun has started for a trial. `held`: whether whoever started them has the run's lock.

    The first returns DONE, FAILED or STOPPED; the others DONE, also where the run failed, which the first tells. FAILED without a
    result means that a process was lost.
    """
    if threads:
        torch.set_num_threads(threads)
    # It is asked to stop by whoever stops torchrun and by torchrun too, which is once.
    with StopFlag(hard_ends=False) as stop, scrubbed(folders):
        ranks = join()
        if ranks.rank:
            return _follow(ranks, folders, device, stop)
        return _lead(ranks, folders, device, stop, held)


def _lead(ranks: Ranks, folders: Sequence[Path], device: str | None, stop: Callable[[], bool], held: bool) -> int:
    """The first process: trains, tells, and writes."""
    folder = folders[0]
    lock = (folder / LOCK).open("a+") if held else hold(folder)
    if lock is None:
        print(f"{folder}: another process is training this run.", flush=True)
        ranks.leave(RuntimeError("another process is training this run"))
        return STOPPED
    one = _Attempt(folder, folders[:1], lock)
    one.ranks, one.judges = ranks, judge
    how: str | Exception
    try:
        _single(ranks, folders)
        how = train(ranks, one.make(device, stop))
    except Exception as error:
        how = error
    there = ranks.leave(_failure(how))
    if isinstance(how, Lost) or (not there and _failure(how)):
        one.say(f"{folder}: {how}")
        if one.tracker is not None:
            one.tracker.finish(None)
        one.close()
        return FAILED
    one.end(how)
    return one.code


def _follow(ranks: Ranks, folders: Sequence[Path], device: str | None, stop: Callable[[], bool]) -> int:
    """Another process: trains, and prints only what it can tell nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    how: str | Exception
    try:
        _single(ranks, folders)
        config, corpus = load_run(folders[0], plugins=True)
        config = with_vocabulary(config, corpus.meta.vocab_size)
        chosen = pick(ranks.device(device or config.train.device), config.train.dtype)
        how = train(ranks, Member(Run(config, corpus, folders[0], chosen, ranks), _Nobody(), _nothing, stop))
    except Exception as error:
        how = error
    there = ranks.leave(_failure(how))
    if not there and isinstance(how, Exception) and not isinstance(how, Lost):
        traceback.print_exception(how)
    return DONE if there else FAILED


def train(ranks: Ranks, member: Member) -> str | Exception:
    """One process's part of a run. Returns how that ended: 'done', 'diverged', 'pruned', or what was raised, here or elsewhere.

    Of the first process alone the tracker takes records and the judge decides; each may be asked to stop.
    """
    ended: list[str | Exception] = []
    run = member.run
    ranks.alike(run.state.iter, weights(run.plain).values())
    rungs = tuple(json.loads(ranks.word(json.dumps(member.rungs))))
    shared = _Judge(ranks, member.judge, rungs) if rungs else None
    member = Member(run, member.tracker, member.say, ranks.asked(member.stop), shared)
    course = Course(member, lambda _, how: ended.append(how))
    while course.ask is not None:
        if course.resting:
            course.decide()
        else:
            course.alone()
    return ended[0]


class _Judge:
    """The first process's judge, for all."""

    def __init__(self, ranks: Ranks, judge: Judge | None, rungs: tuple[int, ...]) -> None:
        self.ranks, self.judge, self.rungs = ranks, judge, rungs

    def record(self, iteration: int, loss: float) -> None:
        if self.judge is not None:
            self.judge.record(iteration, loss)

    def verdict(self, iteration: int) -> str:
        return self.ranks.word(self.judge.verdict(iteration) if self.judge is not None else "")


def _failure(how: str | Exception) -> Exception | None:
    """What the others have to be told of."""
    return how if isinstance(how, Exception) and not isinstance(how, Stopped) else None


def _single(ranks: Ranks, folders: Sequence[Path]) -> None:
    if len(folders) > 1:
        raise ConfigError(f"{ranks.count} processes train one run together, and {len(folders)} folders were given.")


class _Nobody:
    """Takes records and keeps none."""

    def log(self, record: dict[str, Any]) -> None: ...


def _nothing(state: State, evaluated: bool) -> None: ...
