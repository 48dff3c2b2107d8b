"""How a sweep stands now, read from its database and from the files of the runs that are on their way. Imports no torch.

What the database says of runs that ended is believed; of every other run the files decide: a result, then the lock, then the
heartbeat of a process on another machine. Of metrics.jsonl the end alone is read.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lab import claim, store
from lab.reporting.numbers import clean
from lab.stats import finite

ENDED = ("done", "diverged", "pruned", "failed")
ORDER = (*ENDED, "running", "paused", "stopped", "waiting")
SILENT = 60.0  # seconds without a heartbeat, of which one is due every 5, after which a run counts as silent
TAIL, MOST_TAIL = 1 << 16, 1 << 22  # bytes of metrics.jsonl that are read: at first, and where records are long
WINDOW = 20  # records over which a rate is taken
EVENTS = 2000  # the last of them tell how long runs take
FAILURES = 200  # of which the last words are read


@dataclass
class Life:
    """A run as it stands. Losses are its last; `seconds_left` None: not known. `silent`: seconds since its last heartbeat."""

    run_id: str
    cell: str
    seed: int
    status: str
    iter: int
    iterations: int
    train_loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    attempt: int = 0
    device: str = ""
    peak_memory_bytes: int | None = None
    silent: float | None = None
    process: str = ""  # where, and its number: runs of a pack share it
    rate: float | None = None  # iterations a second of its own time


@dataclass
class Failure:
    """Runs that failed with the same last words."""

    words: str
    runs: list[str]


@dataclass
class Now:
    """A sweep as it stands. `counts`: runs by status. `lives`: of the runs on their way. `seconds_left` None: not known.

    runner: whether the process that carries it out lives; None where that cannot be known.
    """

    name: str
    folder: Path
    rows: list[store.Row]
    statuses: list[str]
    counts: dict[str, int]
    lives: dict[str, Life]
    seconds_left: float | None
    failures: list[Failure]
    runner: bool | None
    devices: dict[str, str] = field(default_factory=dict)  # by run, the last one that the runner noted

    @property
    def ended(self) -> bool:
        """Whether nothing is to be expected any more. A runner that lives may try a failed run again."""
        if self.runner is None:
            return all(status in ENDED for status in self.statuses)
        return not self.runner and "running" not in self.statuses

    def life(self, row: store.Row, status: str) -> Life:
        """Any run's, from its files."""
        return self.lives.get(row.run_id) or look(self.folder / row.run_id, row, status, self.devices)


def now(folder: Path, name: str, rows: list[store.Row]) -> Now:
    """How the sweep in `folder` stands. Raises sqlite3.Error where its database cannot be read."""
    events = _events(folder / store.FILE)
    devices = {
        run_id: str(json.loads(detail).get("device", "")) for run_id, event, _, detail in events if '"dev' in detail
    }
    statuses = [standing(folder / row.run_id, row.status) for row in rows]
    pairs = list(zip(rows, statuses, strict=True))
    lives = {r.run_id: look(folder / r.run_id, r, status, devices) for r, status in pairs if status == "running"}
    _left(list(lives.values()))
    seen = Counter(statuses)
    counts = {s: seen[s] for s in (*ORDER, *sorted(set(seen) - set(ORDER))) if seen[s]}
    left = _sweep_left(pairs, lives, _pace(rows, events))
    failed = [folder / row.run_id for row, status in pairs if status == "failed"]
    return Now(name, folder, rows, statuses, counts, lives, left, _failures(failed), _runner(folder), devices)


# What runs do ---------------------------------------------------------------------------------------------------------------


def standing(folder: Path, noted: str) -> str:
    """What a run does, given the status that the runner noted last. Of one that ended no file is looked at."""
    if noted in ENDED:
        return noted
    path = str(folder)
    if not os.path.lexists(f"{path}/{store.LOCK}"):
        begun = os.path.lexists(f"{path}/attempt-1.log")
        return "stopped" if begun else "waiting" if noted == "running" else noted
    if store.holder(folder) is not None:
        return "running"
    if result := store.read_result(folder):
        return str(result.get("status"))
    beat, age = heartbeat(folder)
    if beat and beat.get("host") not in (None, os.uname().nodename) and age < SILENT:
        return "running"  # on a machine whose locks are not seen here
    if store.is_paused(folder):
        return "paused"
    return "stopped" if noted in ("running", "waiting") else noted


def heartbeat(folder: Path) -> tuple[dict[str, Any], float]:
    """What a run's process said last, empty if nothing, and how many seconds ago: the lesser of what its clock and the file
    system's say, since either may have been set."""
    beat = store.heartbeat(folder)
    try:
        written = (folder / store.HEARTBEAT).stat().st_mtime
    except OSError:
        return {}, 0.0
    told = finite(beat.get("time"))
    return beat, max(0.0, time.time() - max(written, written if told is None else told))


def look(folder: Path, row: store.Row, status: str, devices: dict[str, str]) -> Life:
    """A run from its files: the result where it has ended, else the end of its metrics and its heartbeat."""
    life = Life(row.run_id, row.cell, row.seed, status, 0, row.iterations, device=devices.get(row.run_id, ""))
    if status in ENDED and (result := store.read_result(folder)) is not None:
        life.iter = int(finite(result.get("iters")) or 0)
        life.train_loss, life.val_loss = finite(result.get("train_loss")), finite(result.get("val_loss"))
        life.tokens_per_second = finite(result.get("tokens_per_second"))
        life.attempt = int(finite(result.get("attempt")) or 0)
        return life
    if status != "waiting":
        _read_end(folder / "metrics.jsonl", life)
        attempt = store.current_attempt(folder)
        life.attempt = attempt.number if attempt else store.attempts(folder)
    if status == "running":
        beat, age = heartbeat(folder)
        life.process = f"{beat.get('host', '')}:{beat.get('pid') or store.holder(folder)}"
        if beat:
            life.iter = max(life.iter, int(finite(beat.get("iter")) or 0))
            life.device = str(beat.get("device") or life.device)
            memory = finite(beat.get("peak_memory_bytes"))
            life.peak_memory_bytes = None if memory is None else int(memory)
            life.silent = age
    return life


def _read_end(path: Path, life: Life) -> None:
    """Position, last losses and rate, from as much of the end of metrics.jsonl as they need.

    The rate is of the run's own clock (`seconds` are counted on its way), so no clock that is set matters.
    """
    size = TAIL
    while True:
        found, whole = _records(path, size)
        train = next((r for r in found if r.get("kind") == "train"), None)
        val = next((r for r in found if r.get("kind") == "eval"), None)
        if whole or size >= MOST_TAIL or (train and val):
            break
        size *= 8
    life.train_loss = finite(train.get("train_loss")) if train else None
    life.val_loss = finite(val.get("val_loss")) if val else None
    timed = [(finite(r.get("iter")), finite(r.get("seconds")), finite(r.get("tokens"))) for r in found]
    known = [(i, at, tokens) for i, at, tokens in timed if i is not None and at is not None][:WINDOW]
    life.iter = int(max((i for i, _, _ in known), default=0))
    if len(known) > 1:
        (i, at, tokens), (i_0, at_0, tokens_0) = known[0], known[-1]
        if at > at_0 and i > i_0:
            life.rate = (i - i_0) / (at - at_0)
            if tokens is not None and tokens_0 is not None:
                life.tokens_per_second = (tokens - tokens_0) / (at - at_0)


def _records(path: Path, size: int) -> tuple[list[dict[str, Any]], bool]:
    """The records in the last `size` bytes of a file, the last first, and whether that is all of it."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read(size).split(b"\n")
    except OSError:
        return [], True
    whole = end <= size
    found = []
    for line in reversed(lines if whole else lines[1:]):
        if b'"kind": "slices"' in line[:40]:  # long, and with nothing that is told here
            continue
        try:
            record = json.loads(line)
        except ValueError:  # torn
            continue
        if isinstance(record, dict):
            found.append(record)
    return found, whole


# Time -----------------------------------------------------------------------------------------------------------------------


def _left(lives: Sequence[Life]) -> None:
    """Each run's remaining seconds. Runs of one process take turns, or share each other's updates."""
    sharing = Counter(life.process for life in lives)
    for life in lives:
        if life.rate and not (life.silent or 0) > SILENT:
            life.seconds_left = (life.iterations - life.iter) / life.rate * sharing[life.process]


def _events(path: Path) -> list[tuple[str, str, float, str]]:
    """The last changes of runs, in their order: run, event, time, detail."""
    db = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
    try:
        words = "SELECT run_id, event, time, detail FROM events WHERE run_id IS NOT NULL ORDER BY number DESC LIMIT ?"
        return db.execute(words, (EVENTS,)).fetchall()[::-1]
    finally:
        db.close()


def _pace(rows: Sequence[store.Row], events: Sequence[tuple[str, str, float, str]]) -> float | None:
    """The seconds that an iteration took a run that is done, from its start to its end and everything included.

    The median over runs, so a clock that was set, or a machine that slept, spoils only the few that saw it.
    """
    lengths, begun, paces = {row.run_id: row.iterations for row in rows}, {}, []
    for run_id, event, at, _ in events:
        if event == "running":
            begun[run_id] = at
        elif event == "done" and run_id in begun and lengths.get(run_id) and at > begun[run_id]:
            paces.append((at - begun[run_id]) / lengths[run_id])
    return statistics.median(paces) if paces else None


def _sweep_left(pairs: Sequence[tuple[store.Row, str]], lives: dict[str, Life], pace: float | None) -> float | None:
    """Seconds until all runs have ended, if as many go on at a time as now; None while nothing is known to go on.

    With n at a time and `pace` seconds an iteration of each, n / pace iterations are done a second (Little's law): packs, starts
    of processes and slots are all in it.
    """
    going = [life for life in lives.values() if not (life.silent or 0) > SILENT]
    if not going:
        return None
    timed = [(life, life.seconds_left) for life in going if life.seconds_left]
    rates = [(life.iterations - life.iter) / left for life, left in timed]
    speed = len(going) / pace if pace else sum(rates) * len(going) / len(rates) if rates else 0.0
    if not speed:
        return None
    done = {life.run_id: life.iter for life in going}
    if len(timed) == sum(status not in ENDED for _, status in pairs):  # all that is left is on its way
        return max(left for _, left in timed)
    todo = sum(row.iterations - done.get(row.run_id, 0) for row, status in pairs if status not in ENDED)
    return max([todo / speed, *(left for _, left in timed)])


# Others ---------------------------------------------------------------------------------------------------------------------


def last_words(folder: Path) -> str:
    """The last line of what a failed run says went wrong."""
    error = str((store.read_result(folder) or {}).get("error") or "").strip()
    return clean(error.splitlines()[-1]) if error else "it left no words; see its logs"


def _failures(folders: Sequence[Path]) -> list[Failure]:
    """The most frequent first."""
    made: dict[str, Failure] = {}
    for folder in folders[-FAILURES:]:
        words = last_words(folder).replace(folder.name, "...")
        made.setdefault(words, Failure(words, [])).runs.append(folder.name)
    return sorted(made.values(), key=lambda failure: -len(failure.runs))


def _runner(folder: Path) -> bool | None:
    """Whether the runner lives. Its lock is not tried: a runner that starts at this moment would take us for another one."""
    path = folder / claim.FILE
    try:
        text, age = path.read_text(), time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    said = re.fullmatch(r"process (\d+) on (\S+)", text.strip())
    if said is None:  # it is emptied when a runner leaves
        return None if text.strip() else False
    if said[2] != os.uname().nodename:
        return True if abs(age) < claim.STALE else None
    try:
        os.kill(int(said[1]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        pass
    return True
