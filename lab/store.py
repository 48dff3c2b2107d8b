"""What is on disk of a sweep: its database, and of each run the lock, the result and how far it is.

The database (one row a run, one event row for every change) has one writer, the runner. Trials write files only, and their
result.json is the truth about them.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from engine.tracking import Metrics

FILE = "sweep.db"
LOCK = ".lock"
PATIENCE = 0.2  # seconds; somebody who only looks whether a lock is held has it for microseconds
VERSION = 1  # of the table `runs`, which every listing makes anew
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (hash TEXT PRIMARY KEY, run_id TEXT NOT NULL, cell TEXT NOT NULL, seed INTEGER NOT NULL,
  changed TEXT NOT NULL, baseline INTEGER NOT NULL, iterations INTEGER NOT NULL, status TEXT NOT NULL, place INTEGER);
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, time REAL NOT NULL, run_id TEXT, event TEXT NOT NULL,
  detail TEXT NOT NULL);
"""


def write_atomically(path: Path, text: str) -> None:
    """The whole text or, whatever happens, what was there before."""
    part = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# Locks: who trains a run. A lock lives as long as the process that holds it, however that ends. ---------------------------


def hold(folder: Path) -> IO[str] | None:
    """Takes the run's lock for as long as the returned file, or a copy of it in a child, is open; None where another has it."""
    handle = (folder / LOCK).open("a+")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                handle.close()
                return None
            time.sleep(PATIENCE / 10)
        else:
            handle.truncate(0)
            return handle


def release(lock: IO[str]) -> None:
    """Gives a lock back, also where another process has inherited it."""
    fcntl.flock(lock, fcntl.LOCK_UN)
    lock.close()


def holder(folder: Path) -> int | None:
    """The process that trains this run, 0 if it has not said its number yet, None where there is none."""
    try:
        with (folder / LOCK).open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                text = handle.read()
                return int(text) if text.isdecimal() else 0
    except FileNotFoundError:
        pass
    return None


# The database ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A run as the last listing has it. `iterations` is its length, `status` the last that the runner saw."""

    hash: str
    run_id: str
    cell: str
    seed: int
    changed: dict[str, Any]
    baseline: bool
    iterations: int
    status: str


class Store:
    """The database, opened by the runner. A run's `place` in the listing is null once a listing leaves it out."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        if self.db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            self.db.execute("DROP TABLE IF EXISTS runs")
            self.db.execute(f"PRAGMA user_version={VERSION}")
        self.db.executescript(SCHEMA)

    def list(self, rows: Iterable[Row]) -> None:
        """Sets the runs of the sweep, in their order."""
        values = [(*astuple(row)[:4], json.dumps(row.changed), *astuple(row)[5:], i) for i, row in enumerate(rows)]
        with self.db:
            self.db.execute("BEGIN")
            self.db.execute("UPDATE runs SET place = NULL")
            self.db.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def event(self, event: str, run_id: str | None = None, **detail: Any) -> None:
        """Notes a change; one that names a run sets its status to the event."""
        with self.db:
            self.db.execute("BEGIN")
            row = (time.time(), run_id, event, json.dumps(detail))
            self.db.execute("INSERT INTO events (time, run_id, event, detail) VALUES (?, ?, ?, ?)", row)
            if run_id is not None:
                self.db.execute("UPDATE runs SET status = ? WHERE run_id = ?", (event, run_id))

    def close(self) -> None:
        self.db.close()


def listed(path: Path) -> list[Row]:
    """The runs of the last listing in its order, also while a runner is at work. Raises sqlite3.Error for another file."""
    place = f"file:{quote(str(path.resolve()))}?mode=ro"
    db = sqlite3.connect(place, uri=True)
    try:
        found = db.execute("SELECT * FROM runs WHERE place IS NOT NULL ORDER BY place").fetchall()
    finally:
        db.close()
    return [
        Row(key, run_id, cell, seed, json.loads(changed), bool(baseline), iterations, status)
        for key, run_id, cell, seed, changed, baseline, iterations, status, _ in found
    ]


# Runs -----------------------------------------------------------------------------------------------------------------------


def attempts(folder: Path) -> int:
    """How many attempts at a run have a log."""
    numbers = (p.stem.partition("-")[2] for p in folder.glob("attempt-*.log"))
    return max([0, *(int(n) for n in numbers if n.isdecimal())])


def read_result(folder: Path) -> dict[str, Any] | None:
    """A run folder's result.json, or None where there is none that can be read."""
    try:
        made = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return made if isinstance(made, dict) else None


def standing(folder: Path) -> str:
    """What a run without a result does: running, stopped (it was begun), or waiting."""
    if holder(folder) is not None:
        return "running"
    return "stopped" if attempts(folder) else "waiting"


@dataclass
class Progress:
    """How far a run's metrics.jsonl is. Losses are the last ones, null where there are none."""

    iter: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None


def progress(folder: Path) -> Progress:
    """Where the run in `folder` is, from its metrics; at 0 without any that can be read."""
    made = Progress()
    try:
        records = Metrics.read(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return made
    for record in records:
        made.iter, made.tokens = record.get("iter", made.iter), record.get("tokens", made.tokens)
        made.seconds = record.get("seconds", made.seconds)
        if record.get("kind") == "train":
            made.train_loss = record.get("train_loss")
        elif record.get("kind") == "eval":
            made.val_loss = record.get("val_loss")
            finite = [x for x in (made.val_loss, made.best_val_loss) if x is not None]
            made.best_val_loss = min(finite, default=None)
    return made
