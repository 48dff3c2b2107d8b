"""What a model costs, measured: built for real and trained for two steps, in a process of its own, so that peaks of memory are true
and what breaks costs nobody else anything."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.addresses import spelled
from core.rules import Row
from core.stack import Stack
from engine.data import Corpus
from engine.device import peak_memory, pick, synchronise
from engine.loop import Run
from lab.packing import BYTES
from lab.reporting.numbers import magnitude
from model import GPT, assemble, fill
from train_args import Config

STEPS = 2
LONGER = 0.2  # seconds of further steps where two are too short to be timed
MOST_STEPS = 20
PROFILED = 10.0  # seconds in which initial values of cells with one graph are looked at
LINES = 12  # of a traceback


class TooLarge(RuntimeError):
    """A model that would not fit; nothing was allocated."""


# Processes ------------------------------------------------------------------------------------------------------------------


def apart(act: Callable[[], Any]) -> dict[str, Any]:
    """Does something in a forked child: {'made': what it returned, as JSON has it} or {'error': ..., 'traceback': ...}.

    The child is silent. What it allocates, and a GPU that it uses, this process never sees.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of other threads: they are libraries', which the child does not need
        child = os.fork()
    if child == 0:
        _carry_out(act, reader, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as file:
            told = file.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if told and code == 0:
        made: dict[str, Any] = json.loads(told)
        return made
    why = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"its exit code is {code}"
    hint = "; memory may have run out" if code == -signal.SIGKILL else ""
    return {"error": f"The process died: {why}{hint}", "traceback": ""}


def _carry_out(act: Callable[[], Any], reader: int, writer: int) -> None:
    """The child: never returns, as it must not go on as the process that it was forked from."""
    code = 1
    try:
        os.close(reader)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        try:
            answer = {"made": act()}
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
            answer = {"error": _told(error), "traceback": "\n".join(lines[-LINES:])}
        with os.fdopen(writer, "wb") as file:
            file.write(json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)


def _told(error: BaseException) -> str:
    """An exception in a line, with the place that raised it."""
    if isinstance(error, TooLarge):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


# Memory ---------------------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Bytes that a new process could have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    left = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, StopIteration):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
        left = [int(line.split()[1]) * 1024]
    with contextlib.suppress(OSError, ValueError):  # of a container
        group = Path("/sys/fs/cgroup")
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(left))


def _resident() -> int:
    """Bytes of this process in memory now, 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


# Measuring ------------------------------------------------------------------------------------------------------------------


def measure(config: Config, corpus: Corpus, device: str, threads: int) -> dict[str, Any]:
    """What a run of this configuration costs: parameters, bytes, seconds. Raises what the model raises, and TooLarge."""
    where = pick(device, config.train.dtype)
    torch.set_num_threads(threads)
    _, rows = assemble(config.model, config.slices, config.optimizer)
    needed, free = BYTES * sum(row.slice.numel for row in rows), free_memory(where)
    if needed > free:
        text = f"{magnitude(needed / BYTES)} parameters need at least {magnitude(needed)} bytes, and {magnitude(free)} are free"
        raise TooLarge(f"It was not built: {text} on {device}.")
    before = _resident()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, corpus, Path(folder), where)
        run.model.train()
        seconds: list[float] = []
        while len(seconds) < STEPS or (sum(seconds[1:]) < LONGER and len(seconds) < MOST_STEPS):
            seconds.append(_timed(run.update, where))
            if run.flush() is not None:
                raise FloatingPointError(f"the loss of step {len(seconds)} is not finite")
        evaluation = _timed(lambda: run.evaluate(1), where)
        result = run.result()
    peak = peak_memory(where)
    return {
        "parameters": result["parameters"],
        "trainable_parameters": result["trainable_parameters"],
        "flops_per_token": result["flops_per_token"],
        "peak_memory_bytes": peak if where.type == "cuda" else max(0, peak - before),
        "process_memory_bytes": peak,
        "free_memory_bytes": free,
        "seconds_per_step": statistics.median(seconds[1:]),
        "seconds_per_evaluation_batch": evaluation,
    }


def _timed(act: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    act()
    synchronise(device)
    return time.perf_counter() - started


# What could differ beyond what was asked ------------------------------------------------------------------------------------


def profiles(configs: Sequence[Config]) -> list[dict[str, Any] | None]:
    """The profile of each configuration, on the CPU; None for those that PROFILED seconds did not suffice for."""
    torch.set_num_threads(1)
    started, made = time.perf_counter(), list[dict[str, Any] | None]()
    for config in configs:
        late = made and time.perf_counter() - started > PROFILED
        made.append(None if late else profile(config))
    return made


def profile(config: Config) -> dict[str, Any]:
    """What a model and its treatment are, beside their names: sizes, slices by optimizer, the trained share under weight decay, the
    factors of projections onto the residual stream, and the deviation of every effective weight (with how many values it is of).

    Layers and experts are taken together: 'h.*.attn.qkv[k]'.
    """
    model, rows = assemble(config.model, config.slices, config.optimizer)
    fill(model, rows, config.seeds[0])
    trained = [row for row in rows if not row.settings.frozen]
    size = sum(row.slice.numel for row in trained)
    return {
        "parameters": sum(row.slice.numel for row in rows),
        "trainable_parameters": size,
        "flops_per_token": model.flops_per_token(),
        "optimizers": dict(Counter(row.settings.optimizer.name for row in trained)),
        "decayed": sum(row.slice.numel for row in trained if row.settings.weight_decay) / max(1, size),
        "residual": _residual(rows),
        "std": _deviations(model),
    }


def _residual(rows: Sequence[Row]) -> dict[str, float]:
    made: dict[str, float] = {}
    for row in rows:
        what = row.slice.declaration
        if what.residual != 1.0:
            factor = what.residual if getattr(row.init, "scale_residual", True) else 1.0
            made[_general(row.slice.address.partition("[")[0])] = factor
    return made


@torch.no_grad()
def _deviations(model: GPT) -> dict[str, tuple[float, int]]:
    """Of the weights that multiply, whatever they are made of. Vectors are left out: their values are constants."""
    found: dict[str, list[tuple[float, int]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Stack):
            continue
        for name, what in module.__dict__.get("declarations", {}).items():
            if what.role == "vector":
                continue
            whole: Any = getattr(module, "effective", None) if name == "weight" else None
            tensor = whole() if whole is not None else getattr(module, name)
            stack = tuple(axis for axis in what.layout.stack if axis != what.summed)
            layout = replace(what.layout, stack=stack if whole is not None else what.layout.stack)
            for labels in layout.labels():
                view = layout.view(tensor, labels)
                place = _general(spelled(f"{path}.{name}", labels)[2])
                found.setdefault(place, []).append((float(view.float().var(correction=0)), view.numel()))
    made = {}
    for place, some in found.items():
        count = sum(n for _, n in some)
        made[place] = ((sum(var * n for var, n in some) / count) ** 0.5, count)
    return made


def _general(address: str) -> str:
    """An address for all layers and experts: 'h.*.mlp.gate_up[*.gate]'."""
    path, bracket, inside = address.partition("[")
    words = ["*" if word.isdecimal() else word for word in path.split(".")]
    if words[-1] == "weight":
        words.pop()
    labels = ["*" if word.isdecimal() else word for word in inside.removesuffix("]").split(".")]
    return ".".join(words) + (f"[{'.'.join(labels)}]" if bracket else "")
