"""What a trial does beside training: it says that it lives, and looks whether it is still wanted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.store import HEARTBEAT, Attempt, current_attempt, write_atomically

INTERVAL = 5.0  # seconds


class GivenUp(RuntimeError):
    """Another attempt at the run has begun, so this one writes nothing more."""


class Pulse:
    """Asked at every iteration whether to stop; every INTERVAL it writes the heartbeat and looks whether its attempt still counts.

    `position()` gives what the heartbeat says beside time and process. Raises GivenUp.
    """

    def __init__(
        self, folder: Path, attempt: Attempt | None, stop: Callable[[], bool], position: Callable[[], dict[str, Any]]
    ) -> None:
        self.folder, self.attempt, self.stop, self.position = folder, attempt, stop, position
        self.last = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self.last or now - self.last >= INTERVAL:
            self.last = now
            self.check()
            told = {"time": time.time(), "pid": os.getpid(), "host": os.uname().nodename, **self.position()}
            write_atomically(self.folder / HEARTBEAT, json.dumps(told), lasting=False)
        return self.stop()

    def check(self) -> None:
        """Raises GivenUp where another attempt has begun."""
        current = current_attempt(self.folder)
        if self.attempt is not None and current is not None and current.token != self.attempt.token:
            raise GivenUp(
                f"Attempt {current.number} at this run has begun, so attempt {self.attempt.number} was given up: it writes nothing."
            )
