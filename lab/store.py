"""The sweep's database: one row a run, one event row for every change. One writer, the runner; trials write files only."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (hash TEXT PRIMARY KEY, run_id TEXT NOT NULL, cell TEXT NOT NULL, seed INTEGER NOT NULL,
  changed TEXT NOT NULL, status TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, time REAL NOT NULL, run_id TEXT, event TEXT NOT NULL,
  detail TEXT NOT NULL);
"""


class Store:
    """sweep.db. `runs` hold the last known status; truth about a run is its result.json."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.executescript(SCHEMA)

    def list(self, rows: Iterable[tuple[str, str, str, int, dict[str, Any], str]]) -> None:
        """Sets the runs of the sweep: (hash, run_id, cell, seed, changed, status)."""
        with self.db:
            self.db.execute("BEGIN")
            self.db.executemany(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (hash) DO UPDATE SET status = excluded.status",
                [
                    (h, run_id, cell, seed, json.dumps(changed), status)
                    for h, run_id, cell, seed, changed, status in rows
                ],
            )

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
