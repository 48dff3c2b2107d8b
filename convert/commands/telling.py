"""Progress, on a terminal alone."""

from __future__ import annotations

import sys
import time
from types import TracebackType

EVERY = 0.2  # seconds


class Progress:
    """Says how many bytes are done, in one line that is written over; nothing where stderr is no terminal."""

    def __init__(self, what: str) -> None:
        self.what, self.last, self.shown = what, 0.0, False
        self.terminal = sys.stderr.isatty()

    def __call__(self, name: str, done: int, whole: int) -> None:
        now = time.monotonic()
        if self.terminal and (now - self.last > EVERY or done == whole):
            self.last, self.shown = now, True
            share = 100 * done / whole if whole else 100
            print(
                f"\r\x1b[K{share:3.0f}% of {whole / 1e6:,.0f} MB {self.what}: {name}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
