"""What every benchmark shares: alternating blocks, medians with spread, and results that name their machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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
        for name in list(sides) if i % 2 == 0 else list(reversed(sides)):
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


def write(name: str, figures: Mapping[str, Any]) -> Path:
    """bench/results/<name>.json with the machine, the date and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    about = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip() or None}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about, **figures}, indent=2) + "\n")
    return path
