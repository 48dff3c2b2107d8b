"""Sweeps whose runner and trials are killed and interrupted again and again (see schedules.py): each run is completed once, with
the bits of a sweep that nobody disturbed.

Here are the first of the schedules; `PYTHONPATH=. python tests/schedules.py 0 200` carries out more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

FORKED, REAL = 20, 5


def carried_out(*words: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("schedules.py")), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_forked_schedules() -> None:
    told = carried_out("0", str(FORKED))
    assert [one["seed"] for one in told] == list(range(FORKED))
    wrong = [one for one in told if "error" in one]
    assert not wrong, wrong[0]
    codes = [code for one in told for code in one["codes"]]
    assert codes.count(-9) >= 3 and codes.count(75) >= 3, "runners were killed, and interrupted"
    assert sum(max(one["attempts"]) > 1 for one in told) >= FORKED / 4, "and so were trials"
    assert any(one["folded"] and len(one["codes"]) > 1 for one in told), "of packs that were one model too"


@pytest.mark.parametrize("seed", [1000])
def test_schedules_of_real_processes(seed: int) -> None:
    told = carried_out(str(seed), str(REAL), "--real")
    wrong = [one for one in told if "error" in one]
    assert len(told) == REAL and not wrong, wrong[0]
    assert sum(len(one["codes"]) > 1 or max(one["attempts"]) > 1 for one in told) >= 2, "something was disturbed"
