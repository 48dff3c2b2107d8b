"""The machine a run is on: device, precision, memory, and where its results come from."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def pick(wanted: str) -> torch.device:
    """The torch device of a word of the configuration. Raises ValueError for a CUDA device that is not there."""
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"train.device: '{wanted}' is not on this machine, which has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """The forward pass's precision; weights and the optimizer stay in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype])


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on a CUDA device, or the process's largest resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


def synchronise(device: torch.device) -> None:
    """Waits for queued CUDA work, so that a clock read afterwards counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, whether tracked files differ from it, versions and the device's name."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
    }
