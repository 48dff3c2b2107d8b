"""What benchmarks share: alternating blocks, medians with spread, runs over random tokens, and results that name their machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.corpus import CharTokenizer, write_corpus
from engine.course import Course, Member
from engine.data import Corpus
from engine.device import Replay, autocast, move, synchronise
from engine.loop import Run
from lab.listing import open_listing
from train_args import Config, with_vocabulary

VOCABULARY = "".join(map(chr, range(33, 98)))  # 65 characters, as many as Shakespeare's
RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """Processor (or GPU), cores and torch, in words."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        name = platform.processor() or platform.machine()
        for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls each side once a round, in an order that turns round every time; the seconds that each returned."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else list(reversed(list(sides))):
            times[name].append(sides[name]())
    return times


def seconds(act: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def process_seconds(words: Sequence[str], **options: Any) -> float:
    """How long a process takes, start-up included. Raises CalledProcessError with its output where it fails."""
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return time.perf_counter() - start


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The ratio ours / theirs, round by round: median, and the smallest and largest."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    made = {"median": statistics.median(each), "min": min(each), "max": max(each), "rounds": len(each)}
    return {k: round(v, 4) for k, v in made.items()}


@dataclass
class Side:
    """What is measured by its steps, of so many training tokens each, for `period` seconds at a time."""

    tokens: int
    step: Callable[[], object]
    device: torch.device
    period: float
    every: int = 0  # steps between waits for the device; 0 until it has settled

    def settle(self) -> None:
        """Steps in which kernels are chosen, compiled and captured; then enough to see how long one takes."""
        for _ in range(Replay.WARM + 2):
            self.step()
        synchronise(self.device)
        started = time.perf_counter()
        for _ in range(2):
            self.step()
        synchronise(self.device)
        taken = (time.perf_counter() - started) / 2
        self.every = min(10, max(1, int(self.period / 20 / taken)))

    def rate(self) -> float:
        """Tokens a second."""
        if not self.every:
            self.settle()
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < self.period:
            for _ in range(self.every):
                self.step()
            synchronise(self.device)
            calls += self.every
        return calls * self.tokens / (time.perf_counter() - started)

    def __call__(self) -> float:
        """Seconds of a token."""
        return 1 / self.rate()


def peaks(device: torch.device, quick: bool) -> dict[str, float]:
    """The machine's largest rates as measured: square matrix products in TFLOP/s, and a copy, read and written, in GB/s."""
    cuda = device.type == "cuda"
    size = 512 if quick else 8192 if cuda else 2048
    torch.set_float32_matmul_precision("highest")
    made: dict[str, float] = {"matmul_size": size}

    def best(act: Callable[[], object]) -> float:
        def block() -> None:
            for _ in range(5):
                act()
            synchronise(device)

        block()
        return min(seconds(block) for _ in range(2 if quick else 5)) / 5

    for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        taken = best(partial(torch.mm, a, b, out=torch.empty_like(a)))
        made[f"{str(dtype).removeprefix('torch.')}_tflops"] = round(2 * size**3 / taken / 1e12, 4)
    here, there = (torch.zeros(2**23 if quick else 2**28 if cuda else 2**26, device=device) for _ in range(2))
    made["copy_gb_per_second"] = round(2 * here.nbytes / best(lambda: there.copy_(here)) / 1e9, 2)
    return made


# Runs ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model and the batch of a step."""

    layers: int
    heads: int
    width: int
    block: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.block


def random_corpus(root: Path, tokens: int) -> None:
    """Random tokens as the corpus `random` below `root`; the last tenth is for validation."""
    ids, cut = np.random.default_rng(0).integers(len(VOCABULARY), size=tokens), tokens * 9 // 10
    write_corpus(
        root / "random" / "char",
        [("train", ids[:cut]), ("val", ids[cut:])],
        dataset="random",
        tokenizer=CharTokenizer.of(VOCABULARY),
        source="Random tokens.",
    )


def configs(content: Mapping[str, Any]) -> tuple[list[Config], Corpus]:
    """The runs of a file, JSON being YAML, and their data."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.yaml"
        file.write_text(json.dumps(content))
        listing = open_listing(file, [])
    data: Corpus = listing.reader.corpus(listing.runs[0].config.data)
    return [with_vocabulary(run.config, data.meta.vocab_size) for run in listing.runs], data


class Silent:
    """Takes the records of a run nowhere."""

    def log(self, record: dict[str, Any]) -> None: ...


def member(run: Run) -> Member:
    return Member(run, Silent(), lambda state, evaluated: None, lambda: False)


def on_end(ended: Member, how: str | Exception) -> None:
    if how != "done":
        raise RuntimeError(f"a run of the benchmark ended otherwise than it should: {how}")


def course(config: Config, data: Corpus, device: torch.device, compiled: bool = False) -> Course:
    """A run that is about to make its first update. It comes to no checkpoint, and its folder is none."""
    config = replace(config, train=replace(config.train, compile=compiled))
    made = Course(member(Run(config, data, Path("nowhere"), device)), on_end)
    made.go(1.0)  # as if it were the loss before that
    return made


def tried(acts: Mapping[str, Callable[[], float]]) -> dict[str, Any]:
    """Tokens a second of each, or the sentence with which it failed."""
    made: dict[str, Any] = {}
    for name, act in acts.items():
        try:
            made[name] = round(act())
        except Exception as error:
            made[name] = shown(error)
        freed()
    return made


def best(rates: Mapping[str, Any]) -> str:
    found = {name: rate for name, rate in rates.items() if not isinstance(rate, str)}
    if not found:
        raise RuntimeError(f"nothing could be measured: {rates}")
    return max(found, key=lambda name: found[name])


def shown(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def freed() -> None:
    """Gives back what graphs and packs that are no longer there held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kept(run: Run) -> int:
    """Bytes that autograd keeps of a step's forward pass, beside the parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*run.plain.parameters(), *run.plain.buffers())}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        found.update({} if storage.data_ptr() in own else {storage.data_ptr(): storage.nbytes()})
        return t

    x, y = (move(t, run.device) for t in run.batches(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(run.device, run.config.train.dtype):
        run.plain(x, y)
    return sum(found.values())


# Processes at the same time --------------------------------------------------------------------------------------------------


class Pool:
    """Processes that answer each line of JSON with one, on a machine whose cores they share."""

    def __init__(self, count: int, words: Sequence[str]) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        pipes["env"] = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.workers: list[Any] = [subprocess.Popen(words, **pipes) for _ in range(count)]
        self.ask(count)

    def ask(self, count: int, **message: Any) -> list[dict[str, Any]]:
        """What the first `count` answer. Raises RuntimeError with what one of them says has failed."""
        some = self.workers[:count]
        for worker in some:
            worker.stdin.write(json.dumps(message) + "\n")
            worker.stdin.flush()
        answers = [json.loads(worker.stdout.readline() or '{"error": "it died"}') for worker in some]
        if wrong := [answer["error"] for answer in answers if "error" in answer]:
            raise RuntimeError(f"one of {count} processes failed: {wrong[0]}")
        return answers

    def rate(self, way: str, count: int) -> float:
        """Tokens a second of so many together, from when all of them are ready."""
        self.ask(count, ready=way)
        return float(sum(answer["rate"] for answer in self.ask(count, go=way)))

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()


def serve(make: Callable[[Size, str], Side]) -> None:
    """What a process of a pool does: a line in, a line out. A size is told first, and makes way for what was there before."""
    size, sides = Size(1, 1, 1, 1, 1), dict[str, Side]()
    for line in sys.stdin:
        told, answer = json.loads(line), dict[str, Any]()
        try:
            if "size" in told:
                size, sides = Size(**told["size"]), {}
                freed()
            if "ready" in told and told["ready"] not in sides:
                sides[told["ready"]] = make(size, told["ready"])
                sides[told["ready"]].settle()
            if "go" in told:
                answer = {"rate": sides[told["go"]].rate()}
        except Exception as error:
            answer = {"error": shown(error)}
        print(json.dumps(answer), flush=True)


# Results ---------------------------------------------------------------------------------------------------------------------


def commit() -> str | None:
    """The commit that is checked out."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return told.stdout.strip() or None


def write(name: str, figures: Mapping[str, Any]) -> Path:
    """bench/results/<name>.json with the machine, the date and the commit."""
    about = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about, **figures}, indent=2) + "\n")
    return path
