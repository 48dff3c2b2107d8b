"""What a runner has done beside a sweep: the report, by processes of its own, anew now and then and for the last time at the end.

The runner imports nothing that draws, and the process of the last report does its imports while the last trials are at work.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lab.process import REPOSITORY

FIRST = 60.0  # seconds until the first report
SPARING = 20  # a report may take one part in so many of a core's time


class NoReport(Exception):
    """The last report could not be written, for the reason in its words."""


class Reporter:
    """Writes the report of a sweep. Called again and again while trials run, it starts a process when a report is due, and never
    waits. `last` waits."""

    def __init__(self, folder: Path, first: float = FIRST) -> None:
        self.folder, self.first = folder, first
        self.process: subprocess.Popen[str] | None = None  # of a report on the way
        self.final: subprocess.Popen[str] | None = None  # of the last one
        self.due = time.monotonic() + first
        self.started = 0.0

    def __call__(self, nearly_over: bool = False) -> None:
        """nearly_over: nothing waits to be started, and there is room for a process more."""
        if nearly_over and self.final is None:
            with contextlib.suppress(OSError):
                self.final = self._begin("--json", "--when-told")
        now = time.monotonic()
        if self.process is not None:
            if self.process.poll() is None:
                return
            self.process = None
            self.due = now + max(self.first, SPARING * (now - self.started))
        if now < self.due:
            return
        self.started = now
        with contextlib.suppress(OSError):  # a sweep does not end for want of a picture of it
            self.process = self._begin("--live")

    def last(self) -> dict[str, Any]:
        """Writes the report of a sweep at its end. Returns the fields of its Summary. Raises NoReport."""
        self._end(self.process)
        try:
            self.final = self.final or self._begin("--json", "--when-told")
            told, wrong = self.final.communicate("now\n")
        except OSError as error:
            raise NoReport(str(error)) from None
        if self.final.returncode:
            raise NoReport(wrong.strip() or f"its process ended with code {self.final.returncode}")
        summary: dict[str, Any] = json.loads(told)
        return summary

    def close(self) -> None:
        """Ends what is on its way."""
        self._end(self.process)
        self._end(self.final)

    def _begin(self, *words: str) -> subprocess.Popen[str]:
        ours = subprocess.DEVNULL if "--live" in words else subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lab", "report", *words, str(self.folder.resolve())],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=ours,
            stdout=ours,
            stderr=ours,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the runner alone
        )

    def _end(self, process: subprocess.Popen[str] | None) -> None:
        if process is not None:
            with process:  # which closes its pipes, and waits
                process.kill()
