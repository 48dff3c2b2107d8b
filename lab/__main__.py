"""`python -m lab COMMAND`: what can be done with the folder of a sweep after, or while, it runs."""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.yaml_files import ConfigError, load_file
from lab import store

OK, FAILED, WRONG = 0, 1, 2


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab", description="Works on the folder of a sweep.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, about in (
        ("report", "write the leaderboard, plots and page anew"),
        ("status", "how far every run is"),
    ):
        one = commands.add_parser(command, help=about, description=about)
        one.add_argument("folder", type=Path, metavar="DIR", help="the folder of the sweep")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 it could not be done, 2 the folder is no sweep's."""
    given = parse(words)
    try:
        tree, rows = open_sweep(given.folder)
        print({"report": report, "status": status}[given.command](given.folder, tree, rows), flush=True)
    except ConfigError as error:
        print("\n".join(error.sentences), file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return FAILED
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return FAILED
    return OK


def open_sweep(folder: Path) -> tuple[dict[str, Any], list[store.Row]]:
    """What a sweep's folder says: its file as composed, and its runs. Raises ConfigError for any other folder."""
    file, database = folder / "sweep.yaml", folder / store.FILE
    if not file.is_file() or not database.is_file():
        lacks = file.name if not file.is_file() else database.name
        why = f"it holds no {lacks}" if folder.is_dir() else "there is no such folder"
        above = folder.resolve().parent
        hint = f" It is a run of the sweep {above}." if (folder / "config.yaml").is_file() else ""
        raise ConfigError(f"{folder} is not the folder of a sweep: {why}.{hint}")
    try:
        return load_file(file).tree, store.listed(database)
    except sqlite3.Error as error:
        raise ConfigError(f"{database} cannot be read: {error}. Run the sweep's file again to list its runs.") from None


def report(folder: Path, tree: dict[str, Any], rows: list[store.Row]) -> str:
    """Writes the report anew, from the run folders. Returns it in words."""
    from lab.report import Listed, write_report

    listed = [Listed(r.run_id, r.cell, r.seed, r.changed, folder / r.run_id, r.baseline) for r in rows]
    objective = (tree.get("sweep") or {}).get("objective") or {}
    return write_report(folder, str(tree.get("name", folder.name)), listed, **objective).text


def status(folder: Path, tree: dict[str, Any], rows: list[store.Row]) -> str:
    """A line for every run: what became of it, or where it is and its last losses."""
    lines: list[tuple[str, ...]] = [("run", "status", "iteration", "train loss", "validation loss")]
    counts: dict[str, int] = {}
    for row in rows:
        where, result = folder / row.run_id, store.read_result(folder / row.run_id)
        at = store.progress(where)
        word = str(result["status"]) if result else store.standing(where)
        counts[word] = counts.get(word, 0) + 1
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (at.train_loss, at.val_loss)]
        lines.append((row.run_id, word, f"{at.iter}/{row.iterations}", *losses))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, ", ".join(f"{n} {word}" for word, n in counts.items())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
