"""`python -m lab retry`: lets runs that have ended be tried again, from their checkpoints, by a runner at work or the next one."""

from __future__ import annotations

import argparse
from pathlib import Path

from core.options import nearest
from core.yaml_files import ConfigError
from lab.store import ask_again, attempts, is_paused, open_sweep, read_result


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the sweep")
    parser.add_argument(
        "runs", nargs="*", metavar="RUN_ID", help="these runs, however they ended; otherwise all that failed"
    )


def act(given: argparse.Namespace) -> int:
    """Sets results aside, as attempt-N.result.json. Raises ConfigError for a run that is not there or has not ended."""
    folder: Path = given.folder
    _, rows = open_sweep(folder)
    known = {row.run_id: read_result(folder / row.run_id) for row in rows}
    wrong = [f"{folder} has no run '{run}'. {nearest(run, known)}" for run in given.runs if run not in known]
    open_ones = [run for run in given.runs if run in known and not known[run]]
    wrong += [f"{folder / run} has not ended: there is nothing to try again." for run in open_ones]
    if wrong:
        raise ConfigError(*wrong)
    chosen = given.runs or [run for run, result in known.items() if result and result.get("status") == "failed"]
    for run in chosen:
        result = folder / run / "result.json"
        try:
            result.rename(result.with_name(f"attempt-{attempts(folder / run)}.result.json"))
        except FileNotFoundError:
            continue  # its next attempt has just begun
        if is_paused(folder / run):  # it was pruned
            from lab.rungs import promote  # which needs torch

            promote(folder, run)
        ask_again(folder, run)
        print(f"{folder / run}: to be tried again", flush=True)
    told = (
        "A runner that is at work takes them up; otherwise give the sweep's command again."
        if chosen
        else "No run has failed."
    )
    print(told, flush=True)
    return 0
