"""The whole configuration of a run as dataclasses: the only list of its options."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any, Literal

from core.options import Invalid, Variant, nearest, node, opt, variant
from core.rules import SliceRule
from core.yaml_files import ConfigError, shown
from gpt_conf import ModelConfig

CONFIG_VERSION = 1  # raised when a default's meaning changes: old and new runs then have different identities
DEFAULT_ITERS = 2000


@dataclass(frozen=True)
class DataConfig:
    """Which tokens."""

    dataset: str = opt("stdlib", "A corpus: a folder below data/ with a prepare.py, or one prepared there.")
    tokenizer: str | None = opt(
        None,
        "How the corpus was cut into tokens (byte, char, ...), or hf:FOLDER for a checkpoint's; null means its own default.",
    )
    root: str | None = opt(None, "Folder of the corpora; null means data/ beside train.py.", identity=False)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Iterations are optimizer updates."""

    max_iters: int | None = opt(
        None, "Length of the run in iterations; null means max_tokens, or 2000 without either.", ge=1, knob=True
    )
    max_tokens: int | None = opt(
        None, "Length of the run in training tokens, rounded up to whole iterations.", ge=1, knob=True
    )
    batch_size: int = opt(12, "Sequences of one forward pass.", ge=1)
    gradient_accumulation_steps: int = opt(1, "Forward passes of one iteration.", ge=1, knob=True)
    grad_clip: float | None = opt(1.0, "Largest norm of the whole gradient; null means no clipping.", gt=0.0, knob=True)
    eval_interval: int = opt(
        250, "Iterations between evaluations; the last iteration is always evaluated.", ge=1, knob=True
    )
    eval_iters: int | Literal["full"] = opt(
        20, "Batches of an evaluation, or 'full' for the whole validation split.", ge=1
    )
    eval_batch_size: int = opt(
        64, "Windows of an evaluation batch; not the training batch, so that losses compare.", ge=1
    )
    final_eval_iters: int | Literal["full"] | None = opt(
        None, "Batches of the last evaluation, or 'full'; null means eval_iters.", ge=1
    )
    log_interval: int = opt(10, "Iterations between records of the training loss.", ge=1, identity=False)
    checkpoint_interval: int | None = opt(
        None, "Iterations between checkpoints; null means eval_interval.", ge=1, identity=False
    )
    seed: int = opt(1337, "Moves initial values, data order and dropout.", ge=0, knob=True)
    init_seed: int | None = opt(None, "Pins the initial values; null means seed.", ge=0, knob=True)
    data_seed: int | None = opt(None, "Pins the data order; null means seed.", ge=0, knob=True)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N.", identity=False)
    dtype: Literal["float32", "bfloat16", "float16"] = opt(
        "float32", "Precision of the forward pass; weights stay float32."
    )
    matmul_precision: Literal["highest", "high", "medium"] = opt(
        "highest", "Internal precision of float32 matrix products."
    )
    compile: bool = opt(False, "Whether torch.compile is used.")
    deterministic: bool = opt(
        False, "On a GPU: the same bits every time, and runs of a pack rounded as runs alone; slower."
    )
    init_from: str | None = opt(
        None,
        "A run folder or FILE.yaml (its one run is trained first) whose weights the run starts from.",
        identity=False,  # where it lies; what it holds is part of the identity
    )

    def __post_init__(self) -> None:
        wrong = []
        if self.max_iters is not None and self.max_tokens is not None:
            wrong.append(("max_tokens", "max_iters is given too; set one of them to null"))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            wrong.append(("device", f"'{self.device}' is not auto, cpu, cuda or cuda:N"))
        if wrong:
            raise Invalid(*wrong)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "off"] = opt(
        "auto", "auto is online with a key and a network, else offline."
    )
    project: str = opt("slicewise", "Project.")
    entity: str | None = opt(None, "User or team; null means the key's own.")
    tags: tuple[str, ...] = opt((), "Tags besides those made from what differs.")


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = node(WandbConfig, "Weights & Biases.")
    slice_interval: int | None = opt(
        None, "Iterations between records of every slice's norms and update; null means none.", ge=1
    )


@dataclass(frozen=True)
class SlurmConfig:
    """Jobs of a Slurm cluster. Each trial is one task of a job array."""

    partition: str | None = opt(None, "Partition; null means the cluster's own default.")
    account: str | None = opt(None, "Account that is charged; null means the user's own.")
    time: int = opt(1440, "Minutes that a job may take; one that is ended by it is continued by another.", ge=1)
    cpus: int = opt(4, "CPU cores of a trial.", ge=1)
    memory: float | None = opt(None, "GiB of a trial; null means the cluster's own default.", gt=0.0)
    at_once: int = opt(1000, "Jobs that wait or run at a time.", ge=1)
    setup: tuple[str, ...] = opt((), "Shell lines before a trial starts, such as module load.")
    more: dict[str, Any] = opt({}, "Further options of sbatch, by their long names.")


@dataclass(frozen=True)
class RayConfig:
    """Tasks of a Ray cluster."""

    address: str | None = opt(None, "Address of the cluster; null starts one on this machine.")
    cpus: float = opt(1.0, "CPU cores of a trial.", gt=0.0)
    gpus: float | None = opt(
        None, "GPUs of a trial; null means runner.devices_per_trial where the cluster has GPUs.", ge=0.0
    )


@dataclass(frozen=True)
class RunnerConfig:
    """How the runs of a sweep are carried out. Nothing here changes a result."""

    executor: Literal["local", "slurm", "ray"] = opt("local", "Where trials run.")
    devices: str | tuple[str, ...] = opt(
        "auto", "Devices of the trials: auto, cpu, or a list such as [cuda:0, cuda:1]."
    )
    per_device: int | Literal["auto"] = opt(
        "auto", "Trials at a time on one device; auto is as many as memory holds on a GPU, one a core on a CPU.", ge=1
    )
    devices_per_trial: int = opt(1, "Devices, or on a CPU processes, that train one run together.", ge=1)
    warm: bool = opt(True, "Whether a process trains one run after another; false starts one for each trial.")
    pack: int | Literal["auto", "off"] = opt(
        "auto",
        "Runs that differ in numbers alone, trained in one process: at most so many, off, or auto (on a GPU, of small models, or "
        "with warm off).",
        ge=1,
    )
    threads: int | None = opt(None, "CPU threads of a trial; null divides the cores among the trials.", ge=1)
    root: str = opt("runs", "Folder of the run folders.")
    slurm: SlurmConfig = node(SlurmConfig, "With executor: slurm.")
    ray: RayConfig = node(RayConfig, "With executor: ray.")


@dataclass(frozen=True)
class RunInfo:
    """What a run's own config.yaml says of its place in a sweep."""

    run_id: str = opt("", "Label and hash.")
    cell: str = opt("", "The run without its seed.")
    changed: dict[str, Any] = opt({}, "What the sweep set.")
    swept: tuple[str, ...] = opt((), "Every key that differs somewhere in the sweep.")
    content: dict[str, str] = opt({}, "Hashes of the data, plugins and base that the run was made with.")
    wandb: str = opt("off", "The tracking mode that the sweep resolved.")
    base: str = opt("", "The run folder whose weights the run starts from, if any.")
    stop: dict[str, Any] = opt(
        {}, "The sweep's early stopping, if any: method, min_iters, eta and the objective's mode."
    )


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    name: str = opt("default", "Name of the sweep; without it, the file's own.", identity=False)
    plugins: tuple[str, ...] = opt((), "Python files that add variations.", identity=False)
    model: ModelConfig = node(ModelConfig, "The model.")
    data: DataConfig = node(DataConfig, "The data.")
    train: TrainConfig = node(TrainConfig, "The training.")
    optimizer: Variant = variant("optimizer", "adamw", "The optimizer.")
    schedule: Variant = variant("schedule", "cosine", "The learning-rate schedule.")
    slices: dict[str, SliceRule] = opt({}, "Rules over named slices.")
    tracking: TrackingConfig = node(TrackingConfig, "Tracking.", identity=False)
    runner: RunnerConfig = node(RunnerConfig, "The runner.", identity=False)
    run: RunInfo = node(RunInfo, "Written by the runner, ignored in files.", identity=False)

    def __post_init__(self) -> None:
        wrong = []
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", self.name):
            wrong.append(
                (
                    "name",
                    f"{self.name!r} is not made of letters, digits, '-', '_' and '.' (at most 100, the first no '-' or '.')",
                )
            )
        if self.train.batch_size * self.train.gradient_accumulation_steps * self.model.block_size > 2**40:
            wrong.append(("train", "one iteration has more than 2^40 tokens"))
        if wrong:
            raise Invalid(*wrong)

    @property
    def tokens_per_iter(self) -> int:
        return self.train.batch_size * self.train.gradient_accumulation_steps * self.model.block_size

    @property
    def iterations(self) -> int:
        """The number of optimizer updates of the run."""
        if self.train.max_tokens is not None:
            return -(-self.train.max_tokens // self.tokens_per_iter)
        return self.train.max_iters or DEFAULT_ITERS

    @property
    def seeds(self) -> tuple[int, int]:
        """Seeds of the initial values and of the data order."""
        t = self.train
        return (t.seed if t.init_seed is None else t.init_seed, t.seed if t.data_seed is None else t.data_seed)


def with_vocabulary(config: Config, size: int) -> Config:
    """The configuration with the data's vocabulary where the file named none."""
    return config if config.model.vocab_size else replace(config, model=replace(config.model, vocab_size=size))


def load_plugins(
    files: Sequence[str], folder: File, place: Callable[[int], str | None] = lambda i: None
) -> dict[str, str]:
    """Runs each Python file (relative to `folder`), which adds entries to the catalogue's dictionaries.

    Returns the hash of its content by its absolute path. A file whose content has run in this process is not run again.
    `place(i)` is where the i-th name was written. Raises ConfigError where a file is missing or fails.
    """
    made = {}
    for i, name in enumerate(files):
        where = f" ({place(i)})" if place(i) else ""
        path = (folder / name).resolve()
        if path.suffix != ".py" or not os.path.isfile(path):
            beside = [p.name for p in path.parent.glob("*.py")]
            raise ConfigError(f"plugins: there is no Python file '{shown(path)}'{where}. {nearest(path.name, beside)}")
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        made[str(path)] = content
        if f"slicewise_plugin_{content}" not in sys.modules:
            _execute(path, f"slicewise_plugin_{content}", where)
    return made


def _execute(path: File, module: str, where: str) -> None:
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[module])
    except (Exception, SystemExit) as error:
        del sys.modules[module]
        line = getattr(error, "lineno", None)  # of a syntax error
        trace = error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
            trace = trace.tb_next
        at = f" in line {line}" if line else ""
        raise ConfigError(f"plugins: {shown(path)} failed{at}{where}: {type(error).__name__}: {error}.") from error
