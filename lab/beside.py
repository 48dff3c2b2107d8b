"""What a runner has done beside a sweep: the report, by a helper, anew now and then and for the last time at the end.

The runner imports nothing that draws. The helper imports it once, while the runner begins, and forks for each report, so that what
one has left in memory is gone before the next. `python -m lab.beside FD` is the helper.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.yaml_files import ConfigError
from lab import helper
from lab.helper import Helper, has_word, receive, send, serve_here
from lab.process import leave

MODULE = "lab.beside"
FIRST = 60.0  # seconds until the first report
SPARING = 20  # a report may take one part in so many of a core's time


class NoReport(Exception):
    """The last report could not be written, for the reason in its words."""


class Reporter:
    """Writes the report of a sweep. Called again and again while trials run, it has one written when it is due, and never waits.
    `last` waits."""

    def __init__(self, folder: Path, first: float = FIRST) -> None:
        self.folder, self.first = folder.resolve(), first
        self.helper: Helper | None = None
        self.asked: list[bool] = []  # of reports that are on their way, whether the sweep still goes on
        self.since, self.due = 0.0, time.monotonic() + first
        self.wrong = ""  # why there is no helper

    def __call__(self) -> None:
        now = time.monotonic()
        if self.asked and self.helper is not None and has_word(self.helper.channel):
            self._answer()
            self.due = now + max(self.first, SPARING * (now - self.since))
        if now >= self.due and not self.asked:
            self.due = now + self.first
            self.begin(live=True)  # where that fails, a sweep does not end for want of a picture of it

    def begin(self, live: bool = False) -> None:
        """Has a report written, for which nobody waits yet. live: the sweep still goes on."""
        try:
            self.helper = self.helper or helper.begun(MODULE)
            send(self.helper.channel, {"folder": str(self.folder), "live": live})
        except OSError as error:
            self.wrong = str(error)
            self.close()
            return
        self.asked.append(live)
        self.since = time.monotonic()

    def last(self) -> dict[str, Any]:
        """The report of a sweep at its end. Returns the fields of its Summary. Raises NoReport."""
        for _ in range(2):  # a helper that has died, perhaps long ago, is replaced once
            if False not in self.asked:
                self.begin()
            while self.asked:
                live, told = self.asked[0], self._answer()
                if told is not None and not live:
                    return self._summary(told)
        raise NoReport(self.wrong)

    def _summary(self, told: dict[str, Any]) -> dict[str, Any]:
        assert self.helper is not None
        if "code" in told:
            raise NoReport(
                f"{self.helper.last_words or 'the process that writes it has died'} (exit code {told['code']})"
            )
        if "wrong" in told:
            raise NoReport(told["wrong"])
        made: dict[str, Any] = told["summary"]
        return made

    def _answer(self) -> dict[str, Any] | None:
        """What became of the report that was asked for first, or None where the helper has died."""
        assert self.helper is not None
        message = receive(self.helper.channel)
        if message is None:
            self.helper.process.wait()
            self.wrong = self.helper.last_words or "the process that writes it has died."
            self.close()
            return None
        self.asked.pop(0)
        return message[0]

    def close(self) -> None:
        """Ends what is on its way."""
        if self.helper is not None:
            self.helper.kill()
        self.helper, self.asked = None, []


# The helper -----------------------------------------------------------------------------------------------------------------


def start_early() -> None:
    """Starts the helper while the runner begins."""
    helper.start_early(MODULE)


def serve(channel: socket.socket) -> None:
    """Writes a report for every message, each in a fork. Returns when the runner is gone."""
    from lab.report import ready

    ready()
    gc.freeze()  # a fork that looked through all this would copy it
    while (message := receive(channel)) is not None:
        asked, _ = message
        number = os.fork()
        if number == 0:
            send(channel, _written(Path(asked["folder"]), asked["live"]))
            leave(0)
        _, status = os.waitpid(number, 0)
        if code := os.waitstatus_to_exitcode(status):
            send(channel, {"code": code})


def _written(folder: Path, live: bool) -> dict[str, Any]:
    """Writes a report. Returns its `summary`, or what is `wrong`."""
    from lab.anew import write

    try:
        return {
            "summary": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(write(folder, live)).items()}
        }
    except ConfigError as error:
        return {"wrong": "\n".join(error.sentences)}
    except (OSError, ValueError) as error:
        return {"wrong": str(error)}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # numpy would start a thread a core, for nothing
    serve_here(serve)
