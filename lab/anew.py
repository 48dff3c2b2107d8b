"""`python -m lab report`: writes the report of a sweep anew, from its run folders."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.store import open_sweep

if TYPE_CHECKING:
    from lab.report import Summary


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the sweep")
    parser.add_argument("--live", action="store_true", help="the sweep is still going on: the page loads itself anew")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def act(given: argparse.Namespace) -> int:
    """Writes the report and prints it in words."""
    told = write(given.folder, given.live)
    print(json.dumps(asdict(told), default=str) if given.json else told.text, flush=True)
    return 0


def write(folder: Path, live: bool) -> Summary:
    """Writes the report of a sweep from its folder. Raises ConfigError, ValueError and OSError with a sentence."""
    from lab.report import Listed, write_report

    tree, rows = open_sweep(folder)
    listed = [Listed(r.run_id, r.cell, r.seed, r.changed, folder / r.run_id, r.baseline, r.phase) for r in rows]
    sweep = tree.get("sweep") or {}
    tune = [*(sweep.get("tune") or []), *((sweep.get("search") or {}).get("over") or {})]
    how: dict[str, Any] = {"tune": tune, "stop": (sweep.get("stop") or {}).get("method"), "live": live}
    how |= sweep.get("objective") or {}
    return write_report(folder, str(tree.get("name", folder.name)), listed, **how)
