"""Schedules of kills, each from a seed: a small sweep whose runner and trials are ended at fault points until it is through.

`PYTHONPATH=. python tests/schedules.py FIRST COUNT [--real]` carries them out and prints a JSON line for each. Without --real
everything is forked from this process, which has imported all and has one thread, so that a sweep starts in a moment. A round of a
schedule is one command with one fault: the runner is killed or interrupted at its n-th change of state (before or after it is on
disk), at the beginning of an attempt, before or after a job is given to a worker; or a trial is killed, or interrupts the runner,
at an update.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import runs
import torch

import lab.executors.local
import lab.forks
import lab.helper
import lab.runner
import lab.worker
import train
from engine import loop
from engine.together import Together
from lab.beside import Reporter
from lab.report import Summary
from lab.store import Store, holder

ROUNDS = 12  # the last ones without a fault
FAULTY = 5
PATIENCE = 60.0  # seconds for a round
CELLS = {"optimizer.learning_rate": [0.01, 0.003], "model.norm": ["layernorm", "rmsnorm"]}
ENDINGS = ("kill-runner", "interrupt-runner", "kill-trial", "trial-interrupts")


def sweep(home: Path, data: Path, pack: int | str, warm: bool) -> Path:
    """The file of the sweep: four runs, two of which may be one pack."""
    made = runs.tree(data, name="s", runner__root=str(home / "runs"))
    made["runner"] |= {"pack": pack, "per_device": 2, "threads": 1, "warm": warm}
    made["train"] |= {"batch_size": 5, "max_iters": 5, "eval_interval": 5, "checkpoint_interval": 2, "eval_iters": 1}
    made["model"] |= {"n_layer": 1, "dropout": 0.1}
    made["sweep"] = {"grid": CELLS}
    return runs.write(home / "s.yaml", made)


# Faults: in processes that were forked for a round ------------------------------------------------------------------------------


def fork_helpers() -> None:
    """Lets a runner of this process fork what forks its workers, without a start of Python: this process is warm already."""
    plain = lab.helper.Helper

    def forked(module: str) -> lab.helper.Helper:
        return plain(module, lambda channel: lab.forks.serve(channel))

    setattr(lab.forks, "Helper", forked)  # noqa: B010 for the type checker
    setattr(lab.helper, "begun", forked)  # noqa: B010


def at_passes(count: int, act: Callable[[], None]) -> None:
    """Does something at the count-th pass of a fault point of the runner."""
    passes = [0]

    def passed() -> None:
        passes[0] += 1
        if passes[0] == count:
            act()

    def around(holder: Any, name: str, after: bool = True) -> None:
        plain = getattr(holder, name)

        def made(*given: Any, **named: Any) -> Any:
            passed()
            value = plain(*given, **named)
            if after:
                passed()
            return value

        setattr(holder, name, made)

    around(Store, "events")
    around(Store, "list")
    around(lab.executors.local, "begin_attempt")
    around(lab.forks.Worker, "give")
    around(lab.runner, "write_atomically")


def at_update(points: Path, ending: str, target: str, iteration: int, runner: int) -> None:
    """In trials: once, when a run of a folder named so begins an iteration, ends the process or interrupts the runner."""
    plain, folded = loop.Run.update, Together.update
    marker = points / "armed"

    def look(run: Any) -> None:
        if run.state.iter == iteration and run.folder.name.startswith(target):
            try:
                marker.unlink()
            except FileNotFoundError:
                pass
            else:
                if ending == "kill-trial":
                    os.kill(os.getpid(), signal.SIGKILL)
                os.kill(runner, signal.SIGINT)

    def update(self: Any) -> None:
        look(self)
        plain(self)

    def update_together(self: Any, live: Any) -> None:
        for r in live:
            look(self.runs[r])
        folded(self, live)

    marker.touch()
    loop.Run.update = update  # type: ignore[method-assign]
    Together.update = update_together  # type: ignore[method-assign]


def noting(home: Path) -> None:
    """Every result that is written leaves a line, and so does every folded model."""
    plain, folded, completions = lab.worker.write_result, Together.go_on, home / "completions"

    def go_on(self: Together) -> None:
        with (home / "folds").open("a") as log:
            log.write(f"{self.count}\n")
        folded(self)

    Together.go_on = go_on  # type: ignore[method-assign]

    def write(folder: Path, result: dict[str, Any]) -> None:
        plain(folder, result)
        with completions.open("a") as log:
            log.write(f"{folder.name} {result['status']}\n")

    lab.worker.write_result = write


def silent_reports() -> None:
    """Lets runners of this process write no report."""
    none = Summary("s", "val_loss", "min", {}, 0, None, None, (), "", Path())
    setattr(Reporter, "__call__", lambda self: None)  # noqa: B010 for the type checker
    setattr(Reporter, "begin", lambda self: None)  # noqa: B010
    setattr(Reporter, "last", lambda self: asdict(none))  # noqa: B010


def forked_round(home: Path, file: Path, faults: random.Random | None) -> int:
    """One command in a process forked from this one. Returns its exit code, negative for a signal."""
    number = os.fork()
    if number == 0:
        code = 99
        try:
            os.setsid()
            log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            fork_helpers()
            silent_reports()
            noting(home)
            if faults is not None:
                arm(home, faults)
            code = train.main(["--config", str(file)])
            sys.stdout.flush()
        except BaseException:
            with (home / "log").open("a") as told:
                traceback.print_exc(file=told)
        os._exit(code)
    deadline = time.monotonic() + PATIENCE
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            raise TimeoutError(f"a round took more than {PATIENCE} s, see {home / 'log'}")
        time.sleep(0.005)


def arm(home: Path, faults: random.Random) -> None:
    ending = faults.choice(ENDINGS)
    if ending in ("kill-runner", "interrupt-runner"):
        number = signal.SIGKILL if ending == "kill-runner" else signal.SIGINT
        at_passes(faults.randint(1, 30), lambda: os.kill(os.getpid(), number))
    else:
        target = faults.choice(
            ("learning_rate=0.01+norm=layernorm", "learning_rate=0.003+norm=rmsnorm", "learning_rate")
        )
        at_update(home, ending, target, faults.randint(0, 4), os.getpid())


# A schedule ---------------------------------------------------------------------------------------------------------------------


def state(home: Path) -> dict[str, Any]:
    """What a finished sweep has: by run, the bytes of its tensors, its records, and its result without what depends on clocks."""
    made = {}
    for folder in sorted((home / "runs/s").glob("learning_rate=*")):
        result = runs.clockless(json.loads((folder / "result.json").read_text()))
        for key in ("attempt", "token", "pack", "peak_memory_bytes", "provenance"):
            result.pop(key)
        made[folder.name] = (runs.saved_bytes(folder), runs.records(folder), result)
    return made


def carry_out(seed: int, home: Path, data: Path, whole: dict[str, Any], real: bool) -> dict[str, Any]:
    """One schedule. Raises AssertionError where something was lost, done twice, or is not what an undisturbed sweep has."""
    chance = random.Random(seed)
    packs: list[int | str] = ["off", "off", 2, 4]
    warm = chance.random() < 0.9
    file = sweep(home, data, chance.choice(packs), warm)
    one_round = real_round if real else forked_round
    codes = []
    for i in range(ROUNDS):
        faults = random.Random(chance.getrandbits(64)) if i < FAULTY and chance.random() < 0.8 else None
        codes.append(one_round(home, file, faults))
        if codes[-1] == 0:
            break
    log = (home / "log").read_text()
    assert codes[-1] == 0, f"exit codes {codes}\n{log[-3000:]}"
    assert "Traceback" not in log, log[-3000:]
    if warm and not real:  # others are processes that note nothing
        done = sorted(line.split()[0] for line in (home / "completions").read_text().splitlines())
        assert done == sorted(whole), f"results were written for {done}"
    ours = state(home)
    assert ours.keys() == whole.keys()
    for name, theirs in whole.items():
        for mine, other, what in zip(ours[name], theirs, ("tensors", "records", "result"), strict=True):
            assert mine == other, f"{what} of {name} differ"
    tries = sorted(len(list(f.glob("attempt-*.log"))) for f in folders(home))
    return {"seed": seed, "codes": codes, "attempts": tries, "folded": (home / "folds").exists()}


def folders(home: Path) -> list[Path]:
    return list((home / "runs/s").glob("learning_rate=*"))


def real_round(home: Path, file: Path, faults: random.Random | None) -> int:
    """One command, started as a user does; what goes wrong comes from outside, when so many changes are in the database."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (home / "log").open("ab") as log:
        words = [sys.executable, str(runs.ROOT / "train.py"), "--config", str(file)]
        process = subprocess.Popen(words, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)
    before = changes(home)
    point, ending = (faults.randint(1, 8), faults.choice(ENDINGS)) if faults else (10**9, "")
    while process.poll() is None:
        if changes(home) - before >= point:
            trials = [pid for folder in folders(home) if (pid := holder(folder))]
            target = trials[0] if ending == "kill-trial" and trials else process.pid
            os.kill(target, signal.SIGINT if "interrupt" in ending else signal.SIGKILL)
            break
        time.sleep(0.001)
    return process.wait(PATIENCE * 4)


def changes(home: Path) -> int:
    """How many events the database has."""
    try:
        with contextlib.closing(sqlite3.connect(home / "runs/s/sweep.db")) as db:
            return int(db.execute("SELECT count(*) FROM events").fetchone()[0])
    except sqlite3.Error:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--real", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = tempfile.mkdtemp()  # no TemporaryDirectory: every fork would remove it at its end
    try:
        data = runs.tiny_corpus(Path(place) / "data")
        home = Path(place) / "whole"
        home.mkdir()
        assert forked_round(home, sweep(home, data, "off", True), None) == 0, (home / "log").read_text()
        whole = state(home)
        assert len(whole) == 4
        for seed in range(given.first, given.first + given.count):
            home = Path(place) / str(seed)
            home.mkdir()
            try:
                told = carry_out(seed, home, data, whole, given.real)
            except (AssertionError, TimeoutError) as error:
                told = {"seed": seed, "error": str(error)}
            print(json.dumps(told), flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
