"""What a cluster starts on one of its machines: it looks whether its attempts still count, and becomes the process of the trial.

It is run by its path, and imports no more than the standard library before it is the trial.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STOPPED = 75
STOP = ".stop"  # the end of the name of a file that tells a job which has not begun to train not to


def order(folders: Sequence[Path], threads: int, processes: int, **where: Any) -> dict[str, Any]:
    """Begins an attempt of each run and returns what `carry_out` needs, plain data without a secret. `where`: of the attempts.

    threads: of each process; processes: that train the trial together.
    """
    from engine.ranks import torchrun
    from lab.process import REPOSITORY, begin
    from lab.store import begin_attempt

    attempts = [begin_attempt(folder, **where) for folder in folders]
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    begin(environment)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    # -P: a module of the current folder is not taken for one of ours.
    words = ["-m", "lab.worker", "--threads", str(threads)]
    return {
        "words": torchrun(words, processes) if processes > 1 else [sys.executable, "-P", *words],
        "environment": environment,
        "runs": [[str(folder.absolute()), a.token, a.number] for folder, a in zip(folders, attempts, strict=True)],
    }


def command(*given: str) -> list[str]:
    """The command that runs this file."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), *given]


def carry_out(made: Mapping[str, Any]) -> None:
    """Becomes the process that trains the runs of an order whose attempts still count; returns where none does.

    It may come to this more than once: a cluster that takes a machine away from a job starts the same job again elsewhere.
    """
    wanted = [(folder, number) for folder, token, number in made["runs"] if _token(Path(folder)) == token]
    if not wanted:
        return
    folder, number = wanted[0]
    log = os.open(f"{folder}/attempt-{number}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(made["environment"])
    words = [*made["words"], *(folder for folder, _ in wanted)]
    os.execvp(words[0], words)


def _token(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / ".attempt").read_text())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main() -> int:
    """Given an order as JSON, carries it out; given a folder, the order there of the Slurm job that this is."""
    if sys.argv[1].startswith("{"):
        carry_out(json.loads(sys.argv[1]))
        return STOPPED
    folder, job, index = Path(sys.argv[1]), os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]
    if not (folder / f"{job}_{index}{STOP}").exists():
        carry_out(json.loads((folder / f"{job}.json").read_text())[int(index)])
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
