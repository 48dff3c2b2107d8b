"""What a trial prints for people."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from core.secrets import scrub, scrub_file
from engine.state import State
from train_args import Config

OVER = "\r\x1b[K"  # to the start of the line, which is then erased


class Console(io.TextIOBase):
    """A stream for people that cannot fail: when its reader is gone, training goes on. Whole lines also go to `log`.

    Secrets of the environment are told by their names alone.
    """

    def __init__(self, stream: TextIO, log: TextIO | None = None) -> None:
        self.stream, self.log = stream, log

    def write(self, given: str) -> int:
        text = scrub(given)
        self._safely(self.stream.write, text)
        if self.log is not None and not (text.startswith(OVER) and not text.endswith("\n")):
            self.log.write(text.removeprefix(OVER))
            self.log.flush()
        return len(given)

    def flush(self) -> None:
        self._safely(self.stream.flush)

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def _safely(self, act: Callable[..., Any], *given: Any) -> None:
        try:
            act(*given)
        except OSError:
            with contextlib.suppress(OSError):  # what it still holds, and all that follows, goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def scrubbed(folders: Sequence[Path]) -> Iterator[None]:
    """In which what Python prints has no secrets; at its end the logs of these runs have none either, whoever wrote into them."""
    try:
        with contextlib.redirect_stdout(Console(sys.stdout)), contextlib.redirect_stderr(Console(sys.stderr)):
            yield
    finally:
        scrub_logs(folders)


def scrub_logs(folders: Iterable[Path]) -> None:
    for folder in folders:
        for log in folder.glob("attempt-*.log"):
            scrub_file(log)


class Line:
    """Progress for people: a line at every evaluation, and between them one that is overwritten where the output is a terminal."""

    def __init__(self, config: Config, out: TextIO | Console) -> None:
        self.config, self.out, self.started, self.first = config, out, time.perf_counter(), -1

    def __call__(self, state: State, evaluated: bool) -> None:
        if self.first < 0:
            self.first, self.started = state.iter, time.perf_counter()
        over = self.out.isatty()
        if evaluated or over:
            self.out.write(OVER * over + self.words(state) + "\n" * evaluated)
            self.out.flush()

    def words(self, state: State) -> str:
        total, passed = self.config.iterations, time.perf_counter() - self.started
        words = [f"iteration {state.iter:>{len(str(total))}}/{total}"]
        if state.train_loss is not None:
            words.append(f"train loss {state.train_loss:.4f}")
        if state.val_loss is not None:
            words.append(f"validation loss {state.val_loss:.4f}")
        if state.iter:
            speed = state.iter * self.config.tokens_per_iter / max(state.train_seconds, 1e-9)
            words.append(f"{speed:,.0f} tokens/s")
        if self.first < state.iter < total:
            words.append(f"{passed / (state.iter - self.first) * (total - state.iter):.0f} s left")
        return ", ".join(words)
