"""`python -m lab report`: writes the report of a sweep anew, from its run folders."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lab.store import open_sweep


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the sweep")
    parser.add_argument("--live", action="store_true", help="the sweep is still going on: the page loads itself anew")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--when-told", action="store_true", help=argparse.SUPPRESS)  # once a line comes, if one does


def act(given: argparse.Namespace) -> int:
    """Writes the report and prints it in words."""
    from lab.report import Listed, ready, write_report

    if given.when_told:
        ready()
        if not sys.stdin.readline():
            return 0
    folder: Path = given.folder
    tree, rows = open_sweep(folder)
    listed = [Listed(r.run_id, r.cell, r.seed, r.changed, folder / r.run_id, r.baseline, r.phase) for r in rows]
    sweep = tree.get("sweep") or {}
    tune = [*(sweep.get("tune") or []), *((sweep.get("search") or {}).get("over") or {})]
    how = {"tune": tune, "stop": (sweep.get("stop") or {}).get("method"), "live": given.live}
    how |= sweep.get("objective") or {}
    told = write_report(folder, str(tree.get("name", folder.name)), listed, **how)
    print(json.dumps(asdict(told), default=str) if given.json else told.text, flush=True)
    return 0
