"""A sweep's own run in Weights & Biases: the leaderboard as a table, the plots, and what came out, beside the runs of its group.

Whatever happens here, the sweep has ended as it has: a failure is told in a line.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import tracking
from engine.metrics import plain_record
from lab.reporting.numbers import clean
from lab.stats import finite

JOB = "sweep"
TABLE, PLOTS = "leaderboard.csv", "plots"
MOST_ROWS = 10_000  # of a table that wandb shows


def sweep_id(name: str, folder: Path) -> str:
    """The same whenever a sweep is continued in its folder, and another one for every folder."""
    return tracking.wandb_id(f"{name}\0{folder.resolve()}", f"{name}-{JOB}")


def log_sweep(
    folder: Path,
    name: str,
    config: Any,
    mode: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] | None = None,
    plots: Sequence[Path] | None = None,
) -> bool:
    """Makes, or continues, the run of the sweep in `folder`. Returns whether it could; if not, a line on stderr says why.

    config: the configuration's `tracking` node. mode: from `resolve_mode`; with 'off' nothing is done. summary: what becomes the
    run's summary, such as the best cell, its mean and the counts. rows, plots: the leaderboard's and pictures; None means those
    that the report has left in the folder.
    """
    if mode == "off":
        return True
    about = {
        "project": config.wandb.project,
        "entity": config.wandb.entity,
        "group": tracking.fit(name, tracking.NAME),
        "job_type": JOB,
        "id": sweep_id(name, folder),
        "name": tracking.fit(f"{name} ({JOB})", tracking.NAME),
        "tags": [tracking.fit(str(tag), tracking.WORD) for tag in dict.fromkeys(config.wandb.tags) if tag],
        "config": {"sweep": name},
    }
    run: Any = None
    try:
        run = tracking.start(folder, about, mode)
        if told := _pictured(folder, rows, plots):
            run.log(told)
        tracking.forget(folder, run)
        run.summary.update({key: value for key, value in plain_record(summary).items() if value is not None})
        run.finish(exit_code=0)
    except Exception as error:  # whatever it is
        tracking.warn(
            f"the sweep's own run in wandb failed ({type(error).__name__}: {error}); nothing else is affected."
        )
        with contextlib.suppress(Exception):
            run.finish(exit_code=1)
        return False
    return True


def _pictured(folder: Path, rows: Sequence[Mapping[str, Any]] | None, plots: Sequence[Path] | None) -> dict[str, Any]:
    """The leaderboard and the plots as wandb takes them."""
    wandb = importlib.import_module("wandb")
    board = leaderboard(folder) if rows is None else rows
    pictures = sorted((folder / PLOTS).glob("*.png")) if plots is None else plots
    told: dict[str, Any] = {f"{PLOTS}/{path.stem}": wandb.Image(str(path)) for path in pictures if path.is_file()}
    return told | ({"leaderboard": wandb.Table(*_table(board))} if board else {})


def summarised(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields of the report's Summary say, for the run's own: the best cell and its mean, the counts, the sentences."""
    counts = {f"runs_{status}": count for status, count in told["counts"].items()}
    same = {key: told[key] for key in ("metric", "mode", "cells", "best_cell", "best_mean")}
    return {**same, **counts, "outcome": " ".join(clean(sentence) for sentence in told["sentences"])}


def leaderboard(folder: Path) -> list[dict[str, str]]:
    """The rows of the leaderboard that the report has written; none where there is none."""
    path = folder / TABLE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digest(folder: Path) -> str:
    """Of the leaderboard, to see whether it has changed; empty where there is none."""
    path = folder / TABLE
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and data for wandb, where a column holds either numbers or words: one that has a word holds words alone."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    made: list[list[Any]] = []
    for column in columns:
        values = [row.get(column) for row in rows[:MOST_ROWS]]
        numbers = [number(value) for value in values]
        empty = [value is None or value == "" for value in values]
        if all(number is not None or nothing for number, nothing in zip(numbers, empty, strict=True)):
            made.append(list(numbers))
        else:
            made.append([None if nothing else clean(str(v)) for v, nothing in zip(values, empty, strict=True)])
    return [clean(column) for column in columns], [list(row) for row in zip(*made, strict=True)]


def number(value: Any) -> float | None:
    """A number, also one that is written as text; else None."""
    try:
        return finite(float(value)) if isinstance(value, str) else finite(value)
    except ValueError:
        return None
