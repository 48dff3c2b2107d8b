"""Executors carry out trials, each of one run or of a pack: on this machine, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from lab.executors.trial import End as End
from lab.executors.trial import Executor as Executor
from lab.executors.trial import Trial as Trial
from lab.plan import Slot
from train_args import RunnerConfig

# Each has `make(config, slots, folder)`. Imported when it is asked for: two of them need packages that few have.
EXECUTORS = {
    "local": "lab.executors.local",
    "slurm": "lab.executors.slurm",
    "ray": "lab.executors.ray",
}


def make(config: RunnerConfig, slots: Callable[[], Sequence[Slot]], folder: Path) -> Executor:
    """The executor that a configuration names. `slots()` are the places of this machine, asked for only where they matter.

    Raises ConfigError where it cannot work here.
    """
    made: Executor = import_module(EXECUTORS[config.executor]).make(config, slots, folder)
    return made
