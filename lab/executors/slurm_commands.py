"""Slurm's own commands: what it says of jobs, and what it is told to do with them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 60.0  # seconds that a command may take
SOME = 500  # jobs of one scancel: a command has a length
FIELDS = "ArrayJobID:20,ArrayTaskID:20,State:30,exit_code:20,Reason:100"
WAITS = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "REVOKED")
OFTEN_OVER = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")  # or about to wait again
OUTAGE = (
    "contact",
    "timed out",
    "connect",
    "zero bytes",
    "temporarily",
    "communication",
    "busy",
)  # in what sbatch says


class Unanswered(RuntimeError):
    """A command of Slurm failed; the text is its last words."""


@dataclass(frozen=True)
class Word:
    """What Slurm says of a job. `code` is its exit code, negative for a signal, None where it has none."""

    state: str
    code: int | None = None
    reason: str = ""

    @property
    def on_hold(self) -> bool:
        """Whether it waits for a user to release it."""
        return self.state in WAITS and self.reason == "JobHeldUser"


def answer(*words: str) -> str:
    """What a command prints. Ctrl-C does not reach it. Raises Unanswered where it fails or takes too long."""
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, start_new_session=True)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Unanswered(str(error)) from None
    if told.returncode:
        lines = told.stderr.strip().splitlines() or [f"exit code {told.returncode}"]
        raise Unanswered(lines[-1].removesuffix("."))
    return told.stdout


def ask(name: str) -> dict[str, Word]:
    """What Slurm knows of this user's array jobs of a name, by their numbers as '123_4'. Raises Unanswered."""
    told = answer("squeue", "-h", "-r", "-t", "all", "-u", str(os.getuid()), f"--name={name}", "-O", FIELDS)
    rows = [row for line in told.splitlines() if len(row := line.split(None, 4)) == 5]
    return {f"{row[0]}_{row[1]}": Word(row[2], code(row[2], row[3]), row[4].strip()) for row in rows}


def code(state: str, told: str) -> int | None:
    """A job's exit code from squeue's word for it, which is wait's status, or 'code:signal'."""
    number, _, signal = told.partition(":")
    if state not in (*OVER, *OFTEN_OVER) or not number.isdecimal():
        return None
    if signal:
        made = -int(signal) if int(signal) else int(number)
    else:
        made = os.waitstatus_to_exitcode(int(number))
    return made if made or state == "COMPLETED" else None


def cancel(jobs: Sequence[str], *options: str) -> None:
    """Cancels jobs, or sends them a signal; those that are over are passed over."""
    for i in range(0, len(jobs), SOME):
        with contextlib.suppress(Unanswered):
            answer("scancel", "--quiet", *options, *jobs[i : i + SOME])


def is_outage(told: str) -> bool:
    """Whether sbatch has failed because Slurm's controller does not answer."""
    return any(word in told.lower() for word in OUTAGE)
