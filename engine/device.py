"""The machine a run is on: device, precision, memory, and where its results come from."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from core.yaml_files import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
GROWTH = 2000  # steps; as torch's GradScaler
LARGEST_SCALE = 2.0**24
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def pick(wanted: str, dtype: str = "float32") -> torch.device:
    """The torch device of a word of the configuration, with its index.

    Raises ConfigError for a CUDA device that is not there, and for a dtype that the device cannot train in.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda" if count else "cpu") if wanted == "auto" else torch.device(wanted)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= count:
            raise ConfigError(f"The device '{wanted}' is not on this machine, which has {count} CUDA devices.")
    if device.type == "cpu" and dtype == "float16":
        raise ConfigError("train.dtype: float16 needs a CUDA device, and this run is on the CPU. Use bfloat16.")
    return device


def claim(device: torch.device, deterministic: bool = False) -> None:
    """Makes a CUDA device the process's current one, so that nothing lands on another, and counts its peak memory anew.

    deterministic: kernels whose sums come in any order are not used there. (cuBLAS needs CUBLAS_WORKSPACE_CONFIG before its start.)

    On a CPU, lets the process keep freed memory, as torch does on a GPU: a step asks for what the step before gave back, and the
    system takes longer to give pages anew than a tensor's values take to be written.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.use_deterministic_algorithms(deterministic)
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def seed(number: int, device: torch.device) -> None:
    """Begins torch's own generators anew: the CPU's, and a GPU's where the run is on one.

    As torch.manual_seed, which also asks every kind of device that there might be, for a millisecond each time.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from pinned memory to a GPU, so that the copy runs beside what is queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """The forward pass's precision; weights and the optimizer stay in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype])


def first_scale(dtype: str) -> float:
    """What the loss is multiplied by at first: float16 gradients would underflow otherwise."""
    return 2.0**16 if dtype == "float16" else 1.0


def next_scale(scale: float, fitting: int, finite: bool) -> tuple[float, int]:
    """The loss's scale after a step, and how many steps in a row have fitted: halved where the gradient overflowed, doubled
    after GROWTH steps that fitted."""
    if not finite:
        return max(scale / 2, 1.0), 0
    if fitting + 1 >= GROWTH:
        return min(scale * 2, LARGEST_SCALE), 0
    return scale, fitting + 1


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on a CUDA device since `claim`, or the process's largest resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts the parent's peak into ru_maxrss when a process begins; its own is in VmHWM.
    with contextlib.suppress(OSError, StopIteration):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came of, says that a device, or the machine, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # of torch's allocator for CPUs
        return True
    before = (
        error.__cause__ or error.__context__
    )  # a capture that memory was too little for ends with an error of its own
    return before is not None and out_of_memory(before)


def free_memory() -> None:
    """Gives back what is no longer used, also where objects that are gone refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Waits for queued CUDA work, so that a clock read afterwards counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls_per_second(act: Callable[[], object], device: torch.device, seconds: float) -> float:
    """How often a second something can be done, by doing it for so long."""
    synchronise(device)
    started, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds or not calls:
        act()
        synchronise(device)
        calls += 1
    return calls / passed


class Replay:
    """A computation on tensors that stay where they are. On CUDA it is captured as a graph after some calls, and then replayed.

    It may not read anything on the host.
    """

    WARM = 3  # calls before the capture, in which kernels are chosen and memory is found

    def __init__(self, act: Callable[[], None], device: torch.device) -> None:
        self.act, self.device, self.calls = act, device, 0
        self.graph: Any = None
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> None:
        self.calls += 1
        if self.stream is None:
            self.act()
        elif self.calls <= self.WARM:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.act()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.act()  # is not carried out
            self.graph.replay()


@functools.cache
def _code() -> dict[str, Any]:
    """The commit of the code that this process has imported, and whether tracked files differ from it; null without git."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance(device: torch.device | None) -> dict[str, Any]:
    """Commit, whether tracked files differ from it, versions, the device's name (null: none was reached) and CPU threads."""
    shown = None
    if device is not None:
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
        shown = f"{device}: {name}"
    return {
        **_code(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "device": shown,
        "threads": None if device is None else torch.get_num_threads(),
    }
