"""What commands share: progress on a terminal, and how many ranks there are."""

from __future__ import annotations

import argparse
import sys
import time
from types import TracebackType

from convert.kinds import Sizes

EVERY = 0.2  # seconds
SIZES = {
    "tensor": "ranks that divide each weight",
    "pipeline": "stages that divide the layers",
    "expert": "ranks that divide the experts",
    "expert_tensor": "ranks that divide each expert; else as --tensor",
}


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


def take_sizes(parser: argparse.ArgumentParser) -> None:
    """Lets a command be told how many ranks there are."""
    for name, about in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=about)


def sizes_of(given: argparse.Namespace) -> Sizes | None:
    """How many ranks were asked for; None where nothing was said of any. Raises ValueError for numbers below one."""
    said = {name: getattr(given, name) for name in SIZES if getattr(given, name) is not None}
    return Sizes(**said) if said else None
