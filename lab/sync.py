"""`python -m lab sync DIR`: uploads the runs of a sweep to Weights & Biases, from metrics.jsonl. Given again, only what is missing.

Each run is the one that tracking would have made while it trained: the same id, name, group, tags and configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core.yaml_files import load_file
from engine import tracking
from engine.corpus import DATA, META, Meta
from engine.metrics import Metrics
from lab import store, wandb_sweep
from lab.reporting.numbers import clean, many

ABOUT = "upload the runs of a sweep to W&B"
MARK = ".synced"  # by mode, how many records were sent and how the run had ended
GIVEN_UP = 3  # failures in a row, after which the server is taken for gone
WORDS = {
    "uploaded": "uploaded",
    "current": "up to date",
    "running": "on their way (left out)",
    "empty": "without records",
    "failed": "failed",
    "left": "not tried",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the sweep")
    parser.add_argument(
        "--offline", action="store_true", help="write wandb's own files into the run folders instead of uploading"
    )


def act(given: argparse.Namespace) -> int:
    """Uploads, and says what. Returns 1 where something could not be. Raises ConfigError for a folder that is no sweep's."""
    folder: Path = given.folder
    tree, rows = store.open_sweep(folder)
    mode = "offline" if given.offline else "online"
    why = None if tracking.installed() else "wandb is not installed (pip install wandb)"
    if why is None and mode == "online":
        why = tracking.unreachable(timeout_s=10.0)
    if why is not None:
        print(f"Nothing was uploaded: {why}.", file=sys.stderr)
        return 1
    counts, last = Counter[str](), ""
    for i, row in enumerate(rows):
        word = _safely(folder / row.run_id, str(tree.get("name", folder.name)), mode)
        counts[word] += 1
        if word in ("uploaded", "failed"):
            print(f"[{i + 1}/{len(rows)}] {clean(row.run_id)}: {_said(word, mode)}", flush=True)
        last = f"{last} {word}" if word == "failed" else "" if word == "uploaded" else last
        if len(last.split()) == GIVEN_UP:
            counts["left"] = len(rows) - i - 1
            break
    sweep = counts["left"] == 0 and _sweep(folder, tree, rows, mode)
    told = ", ".join(f"{counts[word]:,} {_said(word, mode)}" for word in WORDS if counts[word])
    print(f"{folder}: {many(len(rows), 'run')}: {told}", flush=True)
    return 1 if counts["failed"] or not sweep else 0


def _said(word: str, mode: str) -> str:
    return "written" if (word, mode) == ("uploaded", "offline") else WORDS[word]


def _safely(folder: Path, sweep: str, mode: str) -> str:
    try:
        return upload(folder, sweep, mode)
    except Exception as error:  # whatever it is, the other runs go on
        tracking.warn(f"{folder.name}: {type(error).__name__}: {error}")
        return "failed"


def upload(folder: Path, sweep: str, mode: str) -> str:
    """Uploads one run, if there is something new. Returns which of WORDS it was. Raises what wandb raises, and OSError or
    ValueError for files that cannot be read."""
    if not (folder / "metrics.jsonl").is_file():
        return "empty"
    if store.holder(folder) is not None:  # the process that trains it may send to the same run
        return "running"
    records, result = Metrics.read(folder / "metrics.jsonl"), store.read_result(folder)
    state = {"records": len(records), "status": result.get("status") if result else None}
    if not records and not result:
        return "empty"
    if marks(folder).get(mode) == state:
        return "current"
    board = tracking.Board(folder, described(folder, sweep), records, mode)
    began = time.monotonic()
    board.finish(result)
    if mode == "online" and time.monotonic() - began >= tracking.FINISH:
        raise TimeoutError("the server did not take everything in time; the same command continues")
    mark(folder, mode, state)
    return "uploaded"


def described(folder: Path, sweep: str) -> dict[str, Any]:
    """What wandb is told of a run, from its own configuration."""
    tree = load_file(folder / "config.yaml").tree
    about, model = tree["run"], tree["model"]
    if model.get("vocab_size") is None:  # training fills it in from the data
        model["vocab_size"] = _vocabulary(tree["data"], about.get("content", {}).get("data"))
    return tracking.described(
        _tracking(tree),
        sweep,
        folder.name,
        about["cell"],
        tree["train"]["seed"],
        about["changed"],
        tree,
        about["swept"],
    )


def _tracking(tree: dict[str, Any]) -> Any:
    """The `tracking` node of a run's configuration."""
    return SimpleNamespace(wandb=SimpleNamespace(**tree["tracking"]["wandb"]))


def _vocabulary(data: dict[str, Any], content: str | None) -> int | None:
    """The vocabulary of the corpus with that content; None where it is not on this machine."""
    root = Path(data["root"]) if data.get("root") else DATA
    for path in sorted((root / data["dataset"]).glob(f"*/{META}")):
        try:
            meta = Meta.read(path.parent)
        except (OSError, ValueError):
            continue
        if meta.content_hash == content:
            return meta.vocab_size
    return None


def marks(folder: Path) -> dict[str, Any]:
    """What was uploaded before, by mode."""
    try:
        made = json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def mark(folder: Path, mode: str, state: dict[str, Any]) -> None:
    store.write_atomically(folder / MARK, json.dumps({**marks(folder), mode: state}) + "\n")


def _sweep(folder: Path, tree: dict[str, Any], rows: list[store.Row], mode: str) -> bool:
    """Uploads the sweep's own run, if the leaderboard is new. Returns whether there is nothing left to do."""
    state = {"leaderboard": wandb_sweep.digest(folder)}
    if not state["leaderboard"] or marks(folder).get(mode) == state:
        return True
    counts = Counter(row.status for row in rows)
    board = wandb_sweep.leaderboard(folder)
    best = next((row for row in board if row.get("rank") == "1"), {})
    summary = {"best_cell": best.get("cell"), "best_mean": wandb_sweep.number(best.get("mean")), "cells": len(board)}
    summary |= {f"runs_{status}": count for status, count in counts.items()}
    name = str(tree.get("name", folder.name))
    config = next(
        (folder / row.run_id / "config.yaml" for row in rows if (folder / row.run_id / "config.yaml").is_file()), None
    )
    if config is None or not wandb_sweep.log_sweep(
        folder, name, _tracking(load_file(config).tree), mode, summary, board
    ):
        return False
    mark(folder, mode, state)
    return True
