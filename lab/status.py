"""`python -m lab status DIR`: how a sweep stands, once or again and again. Imports no torch: it has to answer at once."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.yaml_files import ConfigError
from lab import live, store
from lab.live import Life, Now
from lab.reporting.numbers import clean, decimal, duration, magnitude, short
from lab.stats import finite

ABOUT = "how far every run is"
MANY = 50  # runs; of more, those on their way are shown, and the others are counted
LISTED_FAILURES = 5
EVERY = 2.0  # seconds between two looks
PATIENCE = 5.0  # seconds that nvidia-smi may take
QUERY = ("uuid", "name", "utilization.gpu", "memory.used", "memory.total")
HEADS = ("run", "status", "iteration", "train loss", "validation loss", "tokens/s", "left", "attempt", "device")
DROPPED = (
    "device",
    "attempt",
    "train loss",
    "tokens/s",
    "left",
    "validation loss",
)  # where a terminal is narrow, in this order
SHORT, SHORTEST = 24, 12  # characters of a run's name: before columns are dropped for it, and after
HOME, CLEAR = "\x1b[{}F", "\x1b[J"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the sweep")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=EVERY,
        metavar="SECONDS",
        help=f"look again every so many seconds ({EVERY:g}) until the sweep has ended",
    )
    parser.add_argument("--json", action="store_true", help="as JSON; with --watch an object a line")
    parser.add_argument("--all", action="store_true", help=f"every run, also where there are more than {MANY}")


def _seconds(word: str) -> float:
    try:
        made = float(word)
    except ValueError:
        made = math.nan
    if not 0 < made <= 86400:
        raise argparse.ArgumentTypeError(f"'{word}' is no number of seconds; DIR comes before --watch")
    return made


def act(given: argparse.Namespace) -> int:
    """Prints the status. Raises ConfigError for a folder that is no sweep's."""
    if given.watch is not None:
        return watch(given)
    seen = see(given.folder)
    if given.json:
        print(json.dumps(as_json(seen, given.all), indent=2), flush=True)
    else:
        print("\n".join(told(seen, shown(seen, given.all), _width())), flush=True)
    return 0


@dataclass(frozen=True)
class Device:
    """A GPU as its driver sees it. Memory in bytes; None where the driver does not say."""

    uuid: str
    name: str
    busy: float | None
    used: int | None
    total: int | None


@dataclass(frozen=True)
class Seen:
    """A sweep and the machine that looks at it."""

    now: Now
    gpus: list[Device]
    load: float
    cores: int


def see(folder: Path) -> Seen:
    """How the sweep in `folder` stands. Raises ConfigError for any other folder."""
    tree, rows = store.open_sweep(folder)
    asked = _ask_driver()  # it may take longer than all that is done meanwhile
    try:
        now = live.now(folder, clean(str(tree.get("name", folder.name))), rows)
    except sqlite3.Error as error:
        raise ConfigError(f"{folder / store.FILE} cannot be read: {error}.") from None
    finally:
        gpus = list(_gpus(asked))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Seen(now, gpus, os.getloadavg()[0], cores)


# Devices --------------------------------------------------------------------------------------------------------------------


def _ask_driver() -> subprocess.Popen[str] | None:
    """nvidia-smi on its way, where it is installed."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    words = [command, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        return subprocess.Popen(words, stdin=null, stdout=pipe, stderr=null, text=True, errors="replace")
    except OSError:
        return None


def _gpus(asked: subprocess.Popen[str] | None) -> Iterator[Device]:
    """What nvidia-smi says; nothing where it fails."""
    if asked is None:
        return
    try:
        out, _ = asked.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        asked.kill()
        asked.communicate()
        return
    for line in out.splitlines() if asked.returncode == 0 else ():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) >= len(QUERY):  # a name may hold a comma
            busy, used, total = (_number(cell) for cell in cells[-3:])
            memory = (None if x is None else int(x * 2**20) for x in (used, total))
            yield Device(clean(cells[0]), clean(", ".join(cells[1:-3])), busy, *memory)


def _number(word: str) -> float | None:
    try:
        return finite(float(word))
    except ValueError:  # '[N/A]'
        return None


def _machine(seen: Seen) -> Iterator[str]:
    for i, gpu in enumerate(seen.gpus):
        busy = "" if gpu.busy is None else f": {gpu.busy:.0f}% busy"
        memory = "" if gpu.used is None or not gpu.total else f", {gpu.used / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB"
        yield f"GPU {i}, {gpu.name}{busy}{memory}"
    if not seen.gpus:
        yield f"CPU: load {seen.load:.1f} on {seen.cores} core{'' if seen.cores == 1 else 's'}"


# Telling --------------------------------------------------------------------------------------------------------------------


def shown(seen: Seen, everything: bool) -> list[Life]:
    """The runs of the table: all, or those on their way where there are many."""
    now = seen.now
    pairs = zip(now.rows, now.statuses, strict=True)
    few = everything or len(now.rows) <= MANY
    return [now.life(row, status) for row, status in pairs if few or row.run_id in now.lives]


def as_json(seen: Seen, everything: bool) -> dict[str, Any]:
    """What the table says, for programs. Times in seconds, memory in bytes."""
    now = seen.now
    return {
        "name": now.name,
        "folder": str(now.folder),
        "total": len(now.rows),
        "counts": now.counts,
        "seconds_left": now.seconds_left,
        "runner": now.runner,
        "ended": now.ended,
        "failures": [asdict(failure) for failure in now.failures],
        "gpus": [asdict(gpu) for gpu in seen.gpus],
        "load": seen.load,
        "cores": seen.cores,
        "runs": [{k: v for k, v in asdict(one).items() if k != "rate"} for one in shown(seen, everything)],
    }


def told(seen: Seen, lives: Sequence[Life], width: int | None, most: int | None = None) -> list[str]:
    """The lines for people, of at most `width` columns. most: how many in all."""
    lines = [*head(seen), *failures(seen.now)]
    if lives:
        lines += ["", *table(lives, width)]
    if most is not None and (over := len(lines) - most) > 0:
        lines = [*lines[: max(0, most - 1)], f"... and {over + 1:,} more lines"]
    return lines if width is None else [cut(line, width) for line in lines]


def head(seen: Seen) -> Iterator[str]:
    """Counts, time left, and the devices."""
    yield summary(seen.now)
    if seen.now.runner is False and not all(status in live.ENDED for status in seen.now.statuses):
        yield "No runner is at work on it. The command that began the sweep continues it."
    for life in seen.now.lives.values():
        if life.silent is not None and life.silent > live.SILENT:
            yield f"{clean(life.run_id)}: no sign of life for {duration(life.silent)}"
    yield from _machine(seen)


def summary(now: Now) -> str:
    """The sweep in a line."""
    counts = ", ".join(f"{n:,} {clean(status)}" for status, n in now.counts.items()) or "no runs"
    left = f"; about {duration(now.seconds_left)} left" if now.seconds_left is not None else ""
    return f"{now.name}: {counts}{left}"


def failures(now: Now) -> Iterator[str]:
    """The last words of what failed, those that are equal together."""
    for failure in now.failures[:LISTED_FAILURES]:
        others = f" and {len(failure.runs) - 1:,} more" if len(failure.runs) > 1 else ""
        yield f"failed: {clean(failure.runs[-1])}{others}: {failure.words}"
    if (more := len(now.failures) - LISTED_FAILURES) > 0:
        yield f"... and {more:,} other failures"


def table(lives: Sequence[Life], width: int | None) -> list[str]:
    """A line for every run. Columns without a value are left out, and where it is too wide those that matter least."""
    rows = [dict(zip(HEADS, _cells(life), strict=True)) for life in lives]
    always = ("run", "status", "iteration", "train loss", "validation loss")
    columns = [head for head in HEADS if head in always or any(row[head] for row in rows)]

    def widths() -> dict[str, int]:
        return {c: max([columns_of(c), *(columns_of(row[c]) for row in rows)]) for c in columns}

    def over() -> int:
        return 0 if width is None else sum(widths().values()) + 2 * (len(columns) - 1) - width

    def shorten(least: int) -> None:
        most = max(least, widths()["run"] - over())
        for row in rows:
            row["run"] = short(row["run"], most)

    if over() > 0:
        shorten(SHORT)
    for name in DROPPED:
        if over() > 0:
            columns = [c for c in columns if c != name]
    if over() > 0:
        shorten(SHORTEST)
    wide = widths()
    lines = [{c: c for c in columns}, *rows]
    return ["  ".join(r[c] + " " * (wide[c] - columns_of(r[c])) for c in columns).rstrip() for r in lines]


def _cells(life: Life) -> tuple[str, ...]:
    return (
        clean(life.run_id),
        clean(life.status),
        f"{life.iter}/{life.iterations}",
        decimal(life.train_loss),
        decimal(life.val_loss),
        magnitude(life.tokens_per_second),
        duration(life.seconds_left),
        str(life.attempt) if life.attempt > 1 else "",
        clean(life.device),
    )


def columns_of(text: str) -> int:
    """The columns of a terminal that a text takes: none for marks that combine, two for wide characters."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def cut(line: str, width: int) -> str:
    """A line of at most `width` columns."""
    while columns_of(line) > width:
        line = line[: max(0, min(len(line) - 2, width - 1))] + "…" if len(line) > 2 else ""
    return line


# Watching -------------------------------------------------------------------------------------------------------------------


def _width() -> int | None:
    """The columns of the terminal; None where the output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def watch(given: argparse.Namespace, sleep: Callable[[float], None] = time.sleep) -> int:
    """Looks until the sweep has ended or Ctrl-C: the whole in its place on a terminal, elsewhere a line whenever it changes."""
    before, last = 0, ""
    try:
        while True:
            seen = see(given.folder)
            if given.json:
                print(json.dumps(as_json(seen, given.all)), flush=True)
            elif sys.stdout.isatty():
                before = _redraw(seen, given.all, before)
            elif (line := summary(seen.now)) != last and not seen.now.ended:
                print(line, flush=True)
                last = line
            if seen.now.ended:
                break
            sleep(given.watch)
    except KeyboardInterrupt:
        if not given.json:
            print(flush=True)
        return 0
    if not given.json and not sys.stdout.isatty():
        print("\n".join(told(seen, shown(seen, given.all), None)), flush=True)
    return 0


def _redraw(seen: Seen, everything: bool, before: int) -> int:
    """Draws over the `before` lines drawn last. Returns how many there are now: no more than the terminal has."""
    size = shutil.get_terminal_size()
    lines = told(seen, shown(seen, everything), size.columns - 1, most=max(1, size.lines - 1))
    sys.stdout.write((HOME.format(before) if before else "") + CLEAR + "\n".join(lines) + "\n")
    sys.stdout.flush()
    return len(lines)
