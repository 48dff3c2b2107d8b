"""What executors have in common: a trial, how its runs end, and what a runner asks of whoever carries trials out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lab.plan import Wish
from lab.store import holder, read_result


@dataclass(eq=False)
class Trial:
    """Runs on their way in one process, ours or (adopted) one that a killed runner left behind.

    `folders` are its runs, `open` those that have not been told of as ended; `place` says where it runs, for people.
    """

    folders: list[Path]
    wish: Wish
    place: str = ""
    adopted: bool = False
    open: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open = list(self.folders)

    def early(self) -> list[Path]:
        """The runs of a pack that have a result and are free while others train on."""
        if len(self.folders) == 1:
            return []
        return [folder for folder in self.open if holder(folder) is None and read_result(folder) is not None]


@dataclass(frozen=True)
class End:
    """Runs of a trial that have ended together. `code`: its exit code, negative for the signal that ended it, None while it trains
    others or where nobody knows. `why` says for people how a process ended that left no result; `planned`: that it would was known
    when it began, as at the end of a job's time, so that it does not count as a loss."""

    trial: Trial
    folders: list[Path]
    code: int | None
    why: str = ""
    planned: bool = False


class Executor(Protocol):
    """Carries out trials. The runs' folders and configurations are there; results, checkpoints and logs are files in them.

    Whoever starts a trial takes the locks of its runs first (where processes of this machine train) and begins an attempt of each
    (lab.store.begin_attempt), whose `where` must be enough to find the trial again after the runner was killed.
    """

    live: list[Trial]

    def adopt(self, folders: Sequence[Path]) -> list[Trial]:
        """Trials of a killed runner that still train, or will train, some of these runs; they are `live` from now on."""

    def start(self, wishes: Sequence[Wish], folder: Callable[[str], Path]) -> list[Trial]:
        """Starts trials for as many of these as there is room for, in about their order. `folder(run)` is a run's folder.

        A trial's `wish` says which one it carries out; `folders` may lack runs that somebody else trains.
        """

    def ended(self) -> Iterator[End]:
        """What has ended since the last call. A trial that is over is no longer `live`."""

    def wait(self, seconds: float) -> None:
        """Returns when something may have ended, or after so many seconds."""

    def stop(self, now: Callable[[], bool]) -> None:
        """Asks every trial to save and end, and waits for that; once `now()` is true ends them at once."""

    def close(self) -> None:
        """Frees what the executor itself holds. Trials that are live go on without it."""
