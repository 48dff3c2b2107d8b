"""How our processes begin and end."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent

# Turns that a thread of OpenMP (GNU's, which torch brings) spins for the others before it sleeps. Its own default holds a core for
# milliseconds: with 2 threads on 2 cores and one other busy process, training became 10 times slower; idle, it gains nothing.
SPIN = "2000"


def begin(environment: MutableMapping[str, str] = os.environ) -> None:
    """What has to be set before torch is imported, unless the user has set it."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environment):
        environment["GOMP_SPINCOUNT"] = SPIN
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which its sums are the same every time


def leave(code: int) -> NoReturn:
    """Ends the process with what has to be done at an end, and without taking apart what is in memory: for torch, half a second.

    An output that cannot be flushed any more has been told of before.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
