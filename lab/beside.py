"""What a runner has done beside a sweep: the report, written anew now and then by a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from lab.process import REPOSITORY

FIRST = 60.0  # seconds until the first report
SPARING = 20  # a report may take one part in so many of a core's time


class Reporter:
    """Writes the report of a running sweep. Called again and again, it starts a process when one is due, and never waits."""

    def __init__(self, folder: Path, first: float = FIRST) -> None:
        self.folder, self.first = folder, first
        self.process: subprocess.Popen[bytes] | None = None
        self.due = time.monotonic() + first
        self.started = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if self.process is not None:
            if self.process.poll() is None:
                return
            self.process = None
            self.due = now + max(self.first, SPARING * (now - self.started))
        if now < self.due:
            return
        self.started = now
        words = [sys.executable, "-P", "-m", "lab", "report", "--live", str(self.folder.resolve())]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with contextlib.suppress(OSError):  # a sweep does not end for want of a picture of it
            self.process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def close(self) -> None:
        """Ends a report that is on its way; the last one is written by the runner itself."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
