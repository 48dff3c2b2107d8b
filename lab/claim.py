"""Who may carry out a sweep: one runner at a time, on whatever machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FILE = ".runner"
STALE = 120.0  # seconds after which a runner on another machine that gave no sign of life may be dead
BEAT = 10.0  # seconds between signs of life


class Refused(RuntimeError):
    """Another runner is at work; the text says who and what can be done."""


class Claim:
    """The right to carry out a sweep. The file is locked, says who has it, and its time is a sign of life."""

    def __init__(self, path: Path, handle: IO[str]) -> None:
        self.path, self.handle, self.last = path, handle, time.monotonic()
        handle.seek(0)
        handle.truncate()
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()

    def beat(self) -> None:
        """Gives a sign of life where it is due."""
        if time.monotonic() - self.last > BEAT:
            self.last = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.handle.fileno())

    def leave(self) -> None:
        """Gives the sweep back, unless it was taken over."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.handle.fileno()), self.path.stat()):
                self.handle.truncate(0)
        self.handle.close()


@contextmanager
def exclusive(folder: Path, takeover: bool = False) -> Iterator[Claim]:
    """The claim to the sweep in `folder`, while inside. Raises Refused where another runner has it.

    takeover: from a runner on another machine, which is dead as far as the user knows. What it still writes to the database is
    refused there, and the trials that it has are known by their locks and attempts.
    """
    path = folder / FILE
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:
        locked = False
    handle.seek(0)
    other = handle.read()
    here = not other or other.endswith(f" on {os.uname().nodename}")
    age = time.time() - os.fstat(handle.fileno()).st_mtime
    # Locks do not reach every machine that shares a disk: what the file says counts too.
    if not locked or (not here and abs(age) < STALE):
        if here or not takeover:
            handle.close()
            raise Refused(_refusal(folder, other, here, age))
        handle.close()
        path.unlink(missing_ok=True)  # the lock of the other is on a file without a name from now on
        handle = path.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(f"{folder}: another runner has just taken this sweep over.") from None
    try:
        claim = Claim(path, handle)
    except OSError:  # the disk is full, which closing says again
        with contextlib.suppress(OSError):
            handle.close()
        raise
    try:
        yield claim
    finally:
        claim.leave()


def _refusal(folder: Path, other: str, here: bool, age: float) -> str:
    told = f"{folder}: another runner is at work on this sweep ({other or 'unknown'}"
    if here:
        return f"{told}). Wait for it, stop it, or give this one another name=..."
    return f"{told}, last sign of life {max(0.0, age):.0f} s ago). If that machine is dead, take the sweep over with --takeover."
