"""The GPUs of this machine: by the names that people use, and by the UUIDs that mean the same to every process."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache

QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use. `total` is its memory in bytes, 0 where that is not known."""

    uuid: str
    total: int


@cache
def gpus() -> dict[str, Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, as cuda:0, cuda:1 and so on; none where the driver's tool is not there.

    Asked of the driver and not of torch, which would take memory on every one of them for the runner.
    """
    try:
        told = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[word.strip() for word in line.split(",")] for line in told.splitlines() if line.strip()]
        known = {int(index): Gpu(uuid, int(total) << 20) for index, uuid, total in rows}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {f"cuda:{i}": gpu for i, gpu in enumerate(known.values())}
    chosen: list[Gpu] = []
    for word in filter(None, (word.strip() for word in visible.split(","))):
        found = (
            known.get(int(word))
            if word.isdecimal()
            else next((g for g in known.values() if g.uuid.startswith(word)), None)
        )
        if found is None and word.startswith("MIG-"):
            found = Gpu(word, 0)  # a part of a GPU
        if found is None:
            break  # as CUDA does: what follows an unknown device is not seen
        chosen.append(found)
    return {f"cuda:{i}": gpu for i, gpu in enumerate(chosen)}


def as_seen(device: str) -> tuple[str, dict[str, str]]:
    """How a trial's process calls its device, or devices (with commas between them), and what its environment must say so.

    A process sees its own GPUs alone, so what it calls cuda:0 is its first one, whatever the order of this machine.
    """
    names = device.split(",")
    found = [gpus()[name].uuid for name in names if name in gpus()]
    if len(found) < len(names):
        return names[0], {}
    return "cuda:0", {"CUDA_VISIBLE_DEVICES": ",".join(found)}


def memory(device: str) -> int:
    """Bytes of memory of a GPU, 0 where that is not known."""
    gpu = gpus().get(device)
    return gpu.total if gpu else 0
