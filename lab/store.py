"""What is on disk of a sweep: its database, and of each run the lock, the attempt, the result and how far it is.

The database (one row a run, one event row for every change) has one writer, the runner. Trials write files only, and their
result.json is the truth about them. Each attempt at a run has a token: what an attempt that was given up writes late is nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from core.secrets import scrub
from core.yaml_files import ConfigError, load_file
from engine.metrics import Metrics

FILE = "sweep.db"
LOCK = ".lock"
ATTEMPT, HEARTBEAT, PAUSED = ".attempt", ".heartbeat", ".paused"
WISHES = ".retry"  # a folder of the sweep, with an empty file for each run that somebody wants to be tried again
PATIENCE = 0.2  # seconds; somebody who only looks whether a lock is held has it for microseconds
VERSION = 2  # of the table `runs`, which every listing makes anew
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (hash TEXT PRIMARY KEY, run_id TEXT NOT NULL, cell TEXT NOT NULL, seed INTEGER NOT NULL,
  changed TEXT NOT NULL, baseline INTEGER NOT NULL, iterations INTEGER NOT NULL, status TEXT NOT NULL, phase TEXT NOT NULL,
  place INTEGER);
CREATE INDEX IF NOT EXISTS run_ids ON runs (run_id);
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, time REAL NOT NULL, run_id TEXT, event TEXT NOT NULL,
  detail TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS suggestions (cell TEXT NOT NULL, number INTEGER NOT NULL, choices TEXT NOT NULL,
  PRIMARY KEY (cell, number));
CREATE TABLE IF NOT EXISTS owner (one INTEGER PRIMARY KEY CHECK (one = 1), token TEXT NOT NULL);
"""


def write_atomically(path: Path, text: str, lasting: bool = True) -> None:
    """The whole text or, whatever happens, what was there before. lasting: waits until it is on the disk."""
    part = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            if lasting:
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


class Superseded(RuntimeError):
    """Another runner has taken the sweep over; nothing may be written any more."""


@dataclass(frozen=True)
class Row:
    """A run as the last listing has it. `iterations` is its length, `status` the last that the runner saw; `phase` says whether the
    file lists it ('grid'), a search chose it ('search'), or it repeats what a search chose ('confirm')."""

    hash: str
    run_id: str
    cell: str
    seed: int
    changed: dict[str, Any]
    baseline: bool
    iterations: int
    status: str
    phase: str = "grid"


class Store:
    """The database, opened by the runner. A run's `place` in the listing is null once a listing leaves it out.

    Whoever opened it last owns it: a runner that was taken for dead and is not gets Superseded from every write.
    """

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None, timeout=60.0)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        if self.db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            self.db.execute("DROP TABLE IF EXISTS runs")
            self.db.execute(f"PRAGMA user_version={VERSION}")
        self.db.executescript(SCHEMA)
        self.token, self.batching = secrets.token_hex(8), False
        self.db.execute("INSERT OR REPLACE INTO owner VALUES (1, ?)", (self.token,))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Changes made inside reach the disk together: waiting for it takes longer than all the rest. Raises Superseded."""
        self.batching = True
        try:
            yield
        finally:
            self.batching = False
            if self.db.in_transaction:
                self.db.execute("COMMIT")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if not self.db.in_transaction:
            self.db.execute("BEGIN IMMEDIATE")
            if self.db.execute("SELECT token FROM owner").fetchone() != (self.token,):
                self.db.execute("ROLLBACK")
                raise Superseded("Another runner has taken this sweep over. Nothing more is started or written here.")
        yield
        if not self.batching:
            self.db.execute("COMMIT")

    def list(self, rows: Iterable[Row]) -> None:
        """Sets the runs of the sweep, in their order. A run whose status is empty keeps the one that it has."""
        values = [(*astuple(row)[:4], json.dumps(row.changed), *astuple(row)[5:], i) for i, row in enumerate(rows)]
        with self._writing():
            self.db.execute("UPDATE runs SET place = NULL")
            status = "coalesce(nullif(?8, ''), (SELECT status FROM runs WHERE hash = ?1), 'waiting')"
            self.db.executemany(f"INSERT OR REPLACE INTO runs VALUES (?1,?2,?3,?4,?5,?6,?7,{status},?9,?10)", values)

    def event(self, event: str, run_id: str | None = None, **detail: Any) -> None:
        """Notes a change; one that names a run sets its status to the event. Raises Superseded."""
        self.events(event, [run_id], **detail)

    def events(self, event: str, run_ids: Iterable[str | None], **detail: Any) -> None:
        """Notes one change of several runs, of all or of none."""
        told, now = scrub(json.dumps(detail)), time.time()
        with self._writing():
            for run_id in run_ids:
                row = (now, run_id, event, told)
                self.db.execute("INSERT INTO events (time, run_id, event, detail) VALUES (?, ?, ?, ?)", row)
                if run_id is not None:
                    self.db.execute("UPDATE runs SET status = ? WHERE run_id = ?", (event, run_id))

    def losses(self) -> dict[str, int]:
        """How often each run's process was lost; a result, or a wish to try again, begins the count anew."""
        made: dict[str, int] = {}
        rows = self.db.execute("SELECT run_id, event FROM events WHERE run_id IS NOT NULL ORDER BY number")
        for run_id, event in rows:
            if event == "lost":
                made[run_id] = made.get(run_id, 0) + 1
            elif event not in ("running", "stopped", "paused"):
                made.pop(run_id, None)
        return made

    def recall(self, cell: str, number: int) -> dict[str, Any] | None:
        """What a search suggested before, by the hash of its cell and its number."""
        found = self.db.execute(
            "SELECT choices FROM suggestions WHERE cell = ? AND number = ?", (cell, number)
        ).fetchone()
        return json.loads(found[0]) if found else None

    def note(self, cell: str, number: int, choices: dict[str, Any]) -> None:
        """Keeps what a search suggests."""
        with self._writing():
            self.db.execute("INSERT OR REPLACE INTO suggestions VALUES (?, ?, ?)", (cell, number, json.dumps(choices)))

    def close(self) -> None:
        self.db.close()


def is_damaged(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is no database, or not a whole one; others are about disks and locks."""
    return type(error) is sqlite3.DatabaseError


def damage(path: Path, error: sqlite3.Error) -> str:
    """What there is to do about a damaged database, as a sentence."""
    return (
        f"{path} cannot be read: it is damaged ({error}). Move it away, with {path.name}-wal and {path.name}-shm where there are "
        "such files, and run the sweep's file again: what counts is in the folders of the runs, from which it is made anew."
    )


def _read_only(path: Path) -> str:
    return f"file:{quote(str(path.resolve()))}?mode=ro"


def listed(path: Path) -> list[Row]:
    """The runs of the last listing in its order, also while a runner is at work. Raises sqlite3.Error for another file."""
    db = sqlite3.connect(_read_only(path), uri=True)
    try:
        found = db.execute("SELECT * FROM runs WHERE place IS NOT NULL ORDER BY place").fetchall()
    finally:
        db.close()
    return [
        Row(key, run_id, cell, seed, json.loads(changed), bool(baseline), iterations, status, phase)
        for key, run_id, cell, seed, changed, baseline, iterations, status, phase, _ in found
    ]


def suggested(folder: Path) -> Callable[[str, int], dict[str, Any] | None]:
    """What searches of the sweep in `folder` suggested before: a function of a cell's hash and a number. It reads, once."""
    path = folder / FILE
    found: list[tuple[str, int, str]] = []
    if path.is_file():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(_read_only(path), uri=True)) as db:
            found = db.execute("SELECT cell, number, choices FROM suggestions").fetchall()
    known = {(cell, number): choices for cell, number, choices in found}
    return lambda cell, number: json.loads(known[cell, number]) if (cell, number) in known else None


def open_sweep(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """What a sweep's folder says: its file as composed, and its runs. Raises ConfigError for any other folder."""
    file, database = folder / "sweep.yaml", folder / FILE
    if not file.is_file() or not database.is_file():
        lacks = file.name if not file.is_file() else database.name
        why = f"it holds no {lacks}" if folder.is_dir() else "there is no such folder"
        above = folder.resolve().parent
        hint = f" It is a run of the sweep {above}." if (folder / "config.yaml").is_file() else ""
        raise ConfigError(f"{folder} is not the folder of a sweep: {why}.{hint}")
    try:
        return load_file(file).tree, listed(database)
    except sqlite3.Error as error:
        if is_damaged(error):
            raise ConfigError(damage(database, error)) from None
        raise ConfigError(f"{database} cannot be read: {error}. Run the sweep's file again to list its runs.") from None


# Attempts -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run. `where` says what a runner needs to find it again, such as a cluster's job."""

    number: int
    token: str
    where: dict[str, Any]


def begin_attempt(folder: Path, **where: Any) -> Attempt:
    """Begins an attempt at a run: what an earlier one still writes is nothing from now on.

    Only whoever holds the run's lock, or knows that nobody trains it, may do so.
    """
    attempt = Attempt(attempts(folder) + 1, secrets.token_hex(8), where)
    write_atomically(folder / ATTEMPT, json.dumps(asdict(attempt)), lasting=False)
    (folder / f"attempt-{attempt.number}.log").touch()  # each attempt counts, also where the process comes to nothing
    for left in ("result.json", PAUSED, HEARTBEAT):
        (folder / left).unlink(missing_ok=True)
    return attempt


def current_attempt(folder: Path) -> Attempt | None:
    """The attempt that counts, or None where none was begun."""
    made = _json(folder / ATTEMPT)
    try:
        return None if made is None else Attempt(int(made["number"]), str(made["token"]), dict(made["where"]))
    except (KeyError, TypeError, ValueError):
        return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        made = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return made if isinstance(made, dict) else None


# Runs -----------------------------------------------------------------------------------------------------------------------


def attempts(folder: Path) -> int:
    """How many attempts at a run have a log."""
    numbers = (p.stem.partition("-")[2] for p in folder.glob("attempt-*.log"))
    return max([0, *(int(n) for n in numbers if n.isdecimal())])


def read_result(folder: Path) -> dict[str, Any] | None:
    """A run folder's result.json, or None where there is none that can be read, or it is of an attempt that was given up."""
    made = _json(folder / "result.json")
    if made is None or made.get("token") is None:
        return made
    attempt = current_attempt(folder)
    return made if attempt is None or made["token"] == attempt.token else None


def heartbeat(folder: Path) -> dict[str, Any]:
    """What a run's process last said of itself: iter, time, pid, host, device, peak_memory_bytes. Empty where it said nothing."""
    return _json(folder / HEARTBEAT) or {}


def is_paused(folder: Path) -> bool:
    """Whether the run rests at a rung of early stopping, where it was saved."""
    return (folder / PAUSED).exists()


def ask_again(folder: Path, run_id: str) -> None:
    """Tells a runner at work on the sweep in `folder` that a run, whose result was set aside, is to be tried again."""
    (folder / WISHES).mkdir(exist_ok=True)
    (folder / WISHES / run_id).touch()


def asked_again(folder: Path) -> list[str]:
    """The runs that are to be tried again, each told once."""
    found = sorted((folder / WISHES).glob("*"))
    for path in found:
        path.unlink(missing_ok=True)
    return [path.name for path in found]


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
