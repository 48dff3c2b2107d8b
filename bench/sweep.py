"""What a sweep costs beside training: `python bench/sweep.py [overhead|large|short|long ...] [--rounds N]`.

overhead   the runner's own time for a trial, with trials that take none
large      a sweep of 5,000 trials that are done: status, report, and the runner's memory
short      16 runs of about a second each, from cold, against one process after another, and what each part of it gains
wide       the same with a larger model, of which runs alone use both cores, without the parts
long       the same as wide with 16 runs of about 20 seconds
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from bench.measure import alternate, commit, machine, process_seconds, random_corpus, ratio, write  # noqa: E402
from engine.tracking import Metrics  # noqa: E402
from lab import claim  # noqa: E402
from lab.conductor import Conductor  # noqa: E402
from lab.executors import End, Trial  # noqa: E402
from lab.listing import open_listing  # noqa: E402
from lab.plan import Wish  # noqa: E402
from lab.runner import _row  # noqa: E402
from lab.store import Store, begin_attempt, hold  # noqa: E402
from lab.worker import StopFlag, no_result, write_result  # noqa: E402

RUNS = 16
TRIALS, MANY = 500, 5000
PARTS = ("overhead", "large", "short", "wide", "long")
SECONDS = {"short": 1.0, "wide": 1.0, "long": 20.0}  # of training of a run alone
BATCH = 8
SMALL, WIDE = (32, 32), (64, 64)  # n_embd and block_size, of models of 0.03M and 0.1M parameters


def tree(data: Path, iterations: int, size: tuple[int, int] = SMALL, **runner: Any) -> dict[str, Any]:
    """A sweep of 16 runs that differ in numbers alone, four rates and four decays."""
    return {
        "name": "bench",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": size[0], "block_size": size[1]},
        "data": {"dataset": "random", "root": str(data)},
        "train": {
            "max_iters": iterations,
            "batch_size": BATCH,
            "eval_interval": iterations,
            "eval_iters": 1,
            "device": "cpu",
        },
        "tracking": {"wandb": {"mode": "off"}},
        "runner": runner,
    }


AXES = {"optimizer.learning_rate": [1e-3, 2e-3, 3e-3, 4e-3], "optimizer.weight_decay": [0.0, 0.1, 0.2, 0.3]}


def file(home: Path, content: dict[str, Any]) -> Path:
    path = home / "bench.yaml"
    path.write_text(json.dumps(content))
    return path


# The runner alone -----------------------------------------------------------------------------------------------------------


class Instant:
    """An executor whose trials have ended when they have begun; `theirs` counts the seconds that are the trials' own."""

    def __init__(self, size: int) -> None:
        self.live: list[Trial] = []
        self.size, self.theirs = size, 0.0

    def adopt(self, folders: Sequence[Path]) -> list[Trial]:
        return []

    def start(self, wishes: Sequence[Wish], folder: Callable[[str], Path]) -> list[Trial]:
        made = [Trial([folder(run) for run in wish.runs], wish, "cpu") for wish in wishes[: self.size]]
        for path in [path for trial in made for path in trial.folders]:
            lock = hold(path)
            attempt = begin_attempt(path)
            assert lock is not None
            started = time.perf_counter()
            result = no_result(path, status="done", val_loss=1.0, token=attempt.token)
            write_result(path, result)
            lock.close()
            self.theirs += time.perf_counter() - started
        self.live += made
        return made

    def ended(self) -> Iterator[End]:
        for trial in list(self.live):
            self.live.remove(trial)
            yield End(trial, trial.folders, 0)

    def wait(self, seconds: float) -> None: ...

    def stop(self, now: Callable[[], bool]) -> None: ...

    def close(self) -> None: ...


def overhead(home: Path) -> dict[str, Any]:
    """Milliseconds of the runner for a trial of one run: attempt, lock, database, words, with two slots."""
    content = tree(home, 4) | {"sweep": {"grid": {"train.seed": {"range": [1, TRIALS, 1]}}}}
    content["runner"]["root"] = str(home / "runs")
    listing = open_listing(file(home, content), [])
    started = time.perf_counter()
    for one in listing.runs:
        listing.path(one).mkdir(parents=True)
    database = Store(listing.folder / "sweep.db")
    database.list(_row(listing, one, True) for one in listing.runs)
    executor = Instant(2)
    with claim.exclusive(listing.folder) as mine, StopFlag() as stop:
        conductor = Conductor(listing, database, executor, mine, lambda some: [[one] for one in some])
        print("(trials of the runner alone)")
        conductor.go_on(listing.runs, stop)
    seconds = time.perf_counter() - started - executor.theirs
    database.close()
    return {"trials": TRIALS, "milliseconds_a_trial": round(1000 * seconds / TRIALS, 2)}


# A large sweep --------------------------------------------------------------------------------------------------------------


def large(home: Path) -> dict[str, Any]:
    """Seconds of status and report, and the runner's memory, for a sweep of which all trials are done but one."""
    cells = {
        "optimizer.learning_rate": {"log": [1e-4, 1e-2], "num": 25},
        "optimizer.weight_decay": {"linear": [0, 1], "num": 20},
    }
    content = tree(home, 4, root=str(home / "runs")) | {"sweep": {"grid": cells, "seeds": 10, "max_runs": MANY}}
    path = file(home, content)
    listing = open_listing(path, [])
    assert len(listing.runs) == MANY
    for i, one in enumerate(listing.runs):
        folder = listing.path(one)
        folder.mkdir(parents=True)
        if i == 0:
            continue
        metrics = Metrics(folder / "metrics.jsonl")
        for at in range(0, 200, 10):
            metrics.log(
                {"kind": "train", "iter": at, "tokens": at * 512, "seconds": at / 10, "train_loss": 4 / (at + 1)}
            )
            if at % 50 == 0:
                metrics.log(
                    {"kind": "eval", "iter": at, "tokens": at * 512, "seconds": at / 10, "val_loss": 4 / (at + i)}
                )
        metrics.close()
        seen = {"cell": one.cell, "seed": one.seed, "parameters": 100_000, "flops_per_token": 600_000.0}
        result = no_result(folder, status="done", val_loss=1 + i / MANY, tokens_per_second=1e4, **seen)
        (folder / "result.json").write_text(json.dumps(result))
    runner = measured([sys.executable, str(REPOSITORY / "train.py"), "--config", str(path)], home)
    commands = {name: [sys.executable, "-m", "lab", name, str(listing.folder)] for name in ("status", "report")}
    told = {name: [measured(words, REPOSITORY) for _ in range(3)] for name, words in commands.items()}
    made: dict[str, Any] = {
        "trials": MANY,
        "runner_megabytes": runner["megabytes"],
        "runner_seconds": runner["seconds"],
    }
    for name, each in told.items():
        made[name] = {"seconds": statistics.median(one["seconds"] for one in each), "megabytes": each[0]["megabytes"]}
    return made


# What a process has in memory when it becomes another counts as that one's, so a small one starts it.
MEASURE = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
seconds = time.perf_counter() - started
print(json.dumps({"code": process.returncode, "seconds": round(seconds, 2), "megabytes": round(usage.ru_maxrss / 1024)}))
"""


def measured(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds of a process, and the largest memory that it itself had."""
    small = [sys.executable, "-S", "-c", MEASURE, *words]
    told = json.loads(subprocess.run(small, cwd=folder, stdout=subprocess.PIPE, check=True).stdout)
    assert told.pop("code") == 0, words
    made: dict[str, float] = told
    return made


# Wall time ------------------------------------------------------------------------------------------------------------------


def iterations(home: Path, wanted: float, size: tuple[int, int]) -> int:
    """How many iterations take about so many seconds in a process that has the machine to itself."""
    speeds = []
    for i in range(5):
        root = home / f"p{i}"
        path = file(home, tree(home, 200, size, root=str(root)))
        process_seconds([sys.executable, str(REPOSITORY / "train.py"), "--config", str(path)], cwd=home)
        (result,) = root.glob("bench/*/result.json")
        speeds.append(json.loads(result.read_text())["tokens_per_second"])
    return max(20, int(wanted * statistics.median(speeds) / (BATCH * size[1])))


def side(
    home: Path, count: int, size: tuple[int, int], sweep: bool, trained: list[float], **runner: Any
) -> Callable[[], float]:
    """Seconds of all runs from cold: as a sweep, or as one process after another. trained: takes what each run says it took."""

    def act() -> float:
        root = Path(tempfile.mkdtemp(dir=home))
        content = tree(home, count, size, root=str(root), **runner)
        try:
            if sweep:
                path = file(root, content | {"sweep": {"grid": AXES}})
                return process_seconds([sys.executable, str(REPOSITORY / "train.py"), "--config", str(path)], cwd=root)
            path, seconds = file(root, content), 0.0
            for rate in AXES["optimizer.learning_rate"]:
                for decay in AXES["optimizer.weight_decay"]:
                    more = [f"optimizer.learning_rate={rate}", f"optimizer.weight_decay={decay}"]
                    words = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(path), *more]
                    seconds += process_seconds(words, cwd=root)
            trained.extend(json.loads(path.read_text())["seconds"] for path in root.glob("bench/*/result.json"))
            return seconds
        finally:
            shutil.rmtree(root)

    return act


def wall(home: Path, part: str, rounds: int) -> dict[str, Any]:
    """The sweep against one process after another, and where the factor comes from."""
    size = SMALL if part == "short" else WIDE
    count = iterations(home, SECONDS[part], size)
    alone: list[float] = []
    made = partial(side, home, count, size, trained=[])
    # A sweep is two slots, warm workers and packs that are one model; each of the parts lacks some of these.
    sides = {"one after another": side(home, count, size, False, alone), "sweep": made(True)}
    if part == "short":
        sides["two slots, warm workers"] = made(True, pack="off")
        sides["two slots, a process each"] = made(True, pack="off", warm=False)
        sides["one slot, a warm worker"] = made(True, pack="off", per_device=1)
    times = alternate(sides, rounds)
    base = times.pop("one after another")
    told: dict[str, Any] = {"runs": RUNS, "n_embd": size[0], "tokens_of_a_step": BATCH * size[1], "iterations": count}
    told["seconds_of_training_alone"] = round(statistics.median(alone), 2)
    told["one after another"] = [round(t, 1) for t in base]
    for name, each in times.items():
        told[name] = {"seconds": [round(t, 1) for t in each], "ratio": ratio(each, base)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=PARTS, choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(machine())
    known = Path(__file__).parent / "results/sweep.json"
    figures: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    torch.set_num_threads(1)
    for part in given.parts:
        with tempfile.TemporaryDirectory() as place:
            home = Path(place)
            random_corpus(home, 200_000)
            if part in SECONDS:
                figures[part] = wall(home, part, given.rounds)
            else:
                figures[part] = {"overhead": overhead, "large": large}[part](home)
        figures[part]["commit"] = commit()  # parts may be measured one by one
        print(part, json.dumps(figures[part], indent=1), flush=True)
    print(write("sweep", {k: v for k, v in figures.items() if k in PARTS}))


if __name__ == "__main__":
    main()
