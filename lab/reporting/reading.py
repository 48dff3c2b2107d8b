"""What run folders say: results, and learning curves of the runs that are drawn. Nothing is written.

A metrics file can be long and a sweep can have thousands, so curves are read for cells that are drawn alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.reporting.cells import Cell, Listed, Run
from lab.stats import finite

ENDED = ("done", "diverged", "failed", "pruned")
TAIL = 8192  # bytes of a metrics file, which hold its last records


@dataclass(frozen=True)
class Point:
    """One evaluation: completed updates, tokens seen and seconds trained (None: not recorded), validation loss in nats per
    token."""

    iter: int
    tokens: int | None
    loss: float
    seconds: float | None = None


Curves = Mapping[str, tuple[Point, ...]]  # by run


def read(listed: Listed, metric: str) -> Run:
    """A run as its folder has it; without result.json it has not ended."""
    try:
        result = json.loads((listed.folder / "result.json").read_bytes())
    except FileNotFoundError:
        return _unfinished(listed)
    except (OSError, ValueError) as why:
        return Run(listed, "failed", None, {}, f"result.json cannot be read: {why}")
    if not isinstance(result, dict) or result.get("status") not in ENDED:
        shown = result.get("status") if isinstance(result, dict) else result
        return Run(listed, "failed", None, {}, f"result.json has an unknown status: {shown!r}")
    status, error, cause, at = (result.get(key) for key in ("status", "error", "cause", "iters"))
    value = finite(result.get(metric)) if status == "done" else None
    at = finite(at)
    iters = None if at is None else int(at)
    return Run(listed, str(status), value, result, str(error) if error else "", iters, str(cause) if cause else "")


def _unfinished(listed: Listed) -> Run:
    try:
        with (listed.folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        begun = listed.folder.is_dir() and any(listed.folder.glob("attempt-*.log"))
        return Run(listed, "started" if begun else "pending", None, {})
    numbers = [int(at) for line in lines if (at := finite(_record(line).get("iter"))) is not None]
    return Run(listed, "started", None, {}, iters=max(numbers, default=0))


def _record(line: bytes) -> dict[str, Any]:
    """A line of a metrics file; empty where it does not parse (a killed run's last one)."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def curves(cells: Sequence[Cell]) -> Curves:
    """The evaluations of the cells' counted runs, by run; runs without any are left out."""
    runs = [run for cell in cells for run in cell.counted]
    found = ((run.listed.run_id, tuple(_curve(run.listed.folder / "metrics.jsonl"))) for run in runs)
    return {run_id: points for run_id, points in found if points}


def _curve(path: Path) -> Iterator[Point]:
    """The evaluations in a metrics file, by iteration.

    An iteration told twice, by an attempt that was killed and by the one that repeated it, keeps the later word.
    """
    points: dict[int, Point] = {}
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.split(b"\n"):
        if b'"eval"' not in line:  # most lines are of training: not parsing them is most of the speed
            continue
        record = _record(line)
        if record.get("kind") != "eval":
            continue
        at, tokens, loss, seconds = (finite(record.get(key)) for key in ("iter", "tokens", "val_loss", "seconds"))
        if at is not None and loss is not None:
            points[int(at)] = Point(int(at), None if tokens is None else int(tokens), loss, seconds)
    yield from (points[at] for at in sorted(points))
