"""Tiny corpora, configurations and runs: what the tests of the loop, of checkpoints and of the runner share."""

from __future__ import annotations

import copy
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from engine import checkpoint, pack
from engine.corpus import CharTokenizer, write_corpus
from engine.data import Corpus
from engine.loop import Run, Stopped
from engine.tracking import Metrics
from lab import store
from lab.listing import open_listing
from train_args import Config, with_vocabulary

ROOT = Path(__file__).parents[1]
PATIENCE = 90.0  # seconds until a test gives up
UNSEEN = "#"  # a character that only the validation split has
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "home", "but", "not", "at", "night"]
CLOCKS = ("seconds", "tokens_per_second")
PLUGIN = '''
"""Variations with which tests reach into trials: they wait, raise or die at an iteration when a file asks for it."""
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
import torch
from core.options import opt
from variations.activation import ACTIVATIONS
from variations.activation.elementwise import GELU
from variations.schedule import SCHEDULES
from variations.schedule.shapes import Cosine, Decay

@dataclass(frozen=True)
class PointsOptions(Decay):
    """Options of points."""
    label: str = opt("a", "Which files are meant.")

class Points(Cosine):
    """Formula: cosine. While $POINTS/LABEL-I.hold exists, iteration I waits; it says so in LABEL-I.pid, and in LABEL-I.asked
    once the process was asked to stop. As often as LABEL-I.oom says, iteration I has too little memory."""
    Options = PointsOptions

    def multiplier(self, i):
        folder, name = Path(os.environ.get("POINTS", "/nowhere")), f"{self.options.label}-{i}"
        while (folder / f"{name}.hold").exists():
            if not (folder / f"{name}.pid").exists():
                (folder / f"{name}.part").write_text(str(os.getpid()))
                (folder / f"{name}.part").rename(folder / f"{name}.pid")
            flag = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if flag is not None and flag():
                (folder / f"{name}.asked").touch()
            time.sleep(0.005)
        asked = folder / f"{name}.oom"
        if asked.exists() and (left := int(asked.read_text())):
            asked.write_text(str(left - 1))
            raise torch.OutOfMemoryError("no memory today")
        if self.options.label == "raising" and i == 4:
            raise RuntimeError("no schedule today")
        if self.options.label == "dying" and i == 4:
            print("last words", flush=True)
            os._exit(3)
        return super().multiplier(i)

class Angry(GELU):
    """Formula: none, it raises."""
    def forward(self, x):
        raise RuntimeError("no activation today")

SCHEDULES["points"] = Points
ACTIVATIONS["angry"] = Angry
'''


def tiny_corpus(root: Path, tokens: int = 20_000) -> Path:
    """Random words as the corpus `tiny` below `root`; the last tenth is for validation."""
    chosen = np.random.default_rng(0).choice(WORDS, tokens // 4)
    text = " ".join(chosen)[:tokens]
    tokenizer = CharTokenizer.of(text + UNSEEN)
    cut = len(text) * 9 // 10
    chunks = [("train", tokenizer.encode(text[:cut])), ("val", tokenizer.encode(text[cut:]))]
    write_corpus(root / "tiny" / "char", chunks, dataset="tiny", tokenizer=tokenizer, source="Random words.")
    return root


def tree(root: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of seconds over the corpus below `root`, for a YAML file. `changes`: by key with '__' for '.'."""
    made: dict[str, Any] = {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16},
        "data": {"dataset": "tiny", "root": str(root)},
        "train": {
            "max_iters": 8,
            "batch_size": 4,
            "eval_interval": 4,
            "eval_iters": 2,
            "eval_batch_size": 8,
            "log_interval": 2,
            "checkpoint_interval": 3,
            "device": "cpu",
        },
        "optimizer": {"variant": "adamw", "learning_rate": 0.01},
        "tracking": {"wandb": {"mode": "off"}},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = made
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return made


def write(file: Path, content: Mapping[str, Any]) -> Path:
    """A configuration file; JSON is YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def read(root: Path, **changes: Any) -> tuple[Config, Corpus]:
    """The configuration and corpus of `tree(root, ...)`."""
    listing = open_listing(write(root / "read.yaml", tree(root, **changes)), [])
    config = listing.runs[0].config
    corpus: Corpus = listing.reader.corpus(config.data)
    return with_vocabulary(config, corpus.meta.vocab_size), corpus


def make(folder: Path, config: Config, corpus: Corpus) -> Run:
    """A run in `folder`, continued where it holds a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    return Run(config, corpus, folder, torch.device("cpu"))


class Silent:
    """Where records go that nobody reads."""

    def log(self, record: dict[str, Any]) -> None: ...


def makers(
    root: Path, folder: Path, every: Sequence[Mapping[str, Any]], device: str = "cpu"
) -> list[Callable[[], pack.Member]]:
    """What makes runs of `tree(root, ...)` for each of the changes, in folders 0, 1, ..., continued from checkpoints there."""

    def make(i: int) -> pack.Member:
        (folder / str(i)).mkdir(parents=True, exist_ok=True)
        run = Run(*read(root, **every[i]), folder / str(i), torch.device(device))
        return pack.Member(run, Silent(), lambda state, evaluated: None, lambda: False)

    return [partial(make, i) for i in range(len(every))]


def members(root: Path, folder: Path, every: Sequence[Mapping[str, Any]], device: str = "cpu") -> list[pack.Member]:
    """Runs of `makers`, made."""
    return [make() for make in makers(root, folder, every, device)]


def drive(run: Run, stop: Callable[[], bool] = lambda: False) -> str:
    """Trains with metrics.jsonl written as a trial does. Returns how it ended: done, diverged or stopped."""
    saved = checkpoint.latest(run.folder / "checkpoint")
    metrics = Metrics(run.folder / "metrics.jsonl", keep_to=saved.state["iter"] if saved else None)
    try:
        return run.run(metrics, lambda state, evaluated: None, stop)  # type: ignore[arg-type]
    except Stopped:
        return "stopped"
    finally:
        metrics.close()


def clockless(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.copy(value) for key, value in record.items() if key not in CLOCKS}


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times; strict JSON, so NaN is an error."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    made = [clockless(json.loads(line, parse_constant=refuse)) for line in lines]
    return [record for record in made if kind in (None, record["kind"])]


def saved_bytes(folder: Path) -> dict[str, bytes]:
    """The newest checkpoint's tensors, as files."""
    newest = max((folder / "checkpoint").iterdir())
    return {name: (newest / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}


# Sweeps in processes of their own -----------------------------------------------------------------------------------------


def until(true: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@dataclass
class Lab:
    """A folder with a sweep file over the plugin's labels; `points` holds the files that trials wait for.

    pack: runner.pack; a process for each run unless a test is about packs."""

    home: Path
    data: Path
    labels: tuple[str, ...] = ("a", "b")
    pack: int | str = "off"
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.points = self.home / "points"
        self.points.mkdir(exist_ok=True)
        (self.home / "extra.py").write_text(PLUGIN)
        (self.home / "model.py").write_text("raise SystemExit('a module of the current folder was taken for ours')")

    @property
    def file(self) -> Path:
        made = tree(self.data, name="s", plugins=["extra.py"], runner__root=str(self.home / "runs"))
        made["runner"]["pack"] = self.pack
        made["train"] |= {"max_iters": 6, "eval_interval": 6}
        made["schedule"] = {"variant": "points"}
        made["sweep"] = {"grid": {"schedule.label": list(self.labels)}, "baseline": {"schedule.label": self.labels[0]}}
        return write(self.home / "s.yaml", made)

    @property
    def folder(self) -> Path:
        return self.home / "runs" / "s"

    def run(self, label: str) -> Path:
        return next(self.folder.glob(f"label={label}-*"))

    def here(self, *words: str) -> int:
        """A runner in this process."""
        return train.main(["--config", str(self.file), *words])

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A runner in a process of its own, in a folder that is not the repository."""
        command = [sys.executable, str(ROOT / "train.py"), *(words or ("--config", str(self.file)))]
        process = subprocess.Popen(
            command,
            cwd=self.home,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "POINTS": str(self.points)}

    def hold(self, *names: str) -> None:
        for name in names:
            (self.points / f"{name}.hold").touch()

    def release(self, *names: str) -> None:
        for name in names:
            (self.points / f"{name}.hold").unlink(missing_ok=True)

    def reached(self, name: str) -> int:
        """Waits until a trial stands at a held point; its process."""
        until((self.points / f"{name}.pid").exists)
        return int((self.points / f"{name}.pid").read_text())

    def asked(self, name: str) -> None:
        """Waits until the trial at a held point was asked to stop."""
        until((self.points / f"{name}.asked").exists)

    def result(self, label: str) -> dict[str, Any]:
        made: dict[str, Any] = json.loads((self.run(label) / "result.json").read_text())
        return made

    def logs(self, label: str) -> list[str]:
        return sorted(path.name for path in self.run(label).glob("attempt-*.log"))

    def events(self) -> list[tuple[str, str, dict[str, Any]]]:
        db = sqlite3.connect(self.folder / "sweep.db")
        rows = db.execute("SELECT run_id, event, detail FROM events ORDER BY number").fetchall()
        db.close()
        return [(run_id, event, json.loads(detail)) for run_id, event, detail in rows]

    def statuses(self) -> list[str]:
        return [row.status for row in store.listed(self.folder / "sweep.db")]

    def close(self) -> None:
        """Leaves no process behind, whatever failed."""
        for path in self.points.glob("*.hold"):
            path.unlink()
        for process in self.started:
            process.kill()
            process.communicate()


def same_as_here(lab: Lab, whole: Lab, *labels: str) -> None:
    """Trials of a cluster leave the bits that trials of this machine leave."""
    for label in labels:
        assert saved_bytes(lab.run(label)) == saved_bytes(whole.run(label))
        assert records(lab.run(label)) == records(whole.run(label))
        ours, theirs = lab.result(label), whole.result(label)
        for key in ("val_loss", "train_loss", "iters", "tokens", "status"):
            assert ours[key] == theirs[key], key


def aside(act: Callable[[], None]) -> threading.Thread:
    """Does something while the runner is at work in this thread."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
