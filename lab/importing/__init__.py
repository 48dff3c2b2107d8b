"""`python -m lab import FILE`: an exploration file of ReaLLM-Forge as a file of ours, with what could not be taken over told.

The file is expanded as ReaLLM-Forge would, every combination is translated, and what they are together is written as a sweep that
stands for exactly them; it is read back before the command says so. A value without a counterpart in an otherwise known option
leaves its combinations out; an option without any is dropped, which may make combinations equal.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path as File

from core.yaml_files import SUFFIXES, ConfigError, shown
from lab import listing
from lab.importing.dialect import Exploration, read_exploration
from lab.importing.grid import Part, Rows, plan
from lab.importing.text import account, file_text
from lab.importing.translate import Translation, translate, tree_of
from lab.reading import ConfigReader, sentences
from train_args import DataConfig

ABOUT = "turn an exploration file of ReaLLM-Forge into one of ours"
DONE, FAILED = 0, 1
TEXTS = "data/text/prepare.py"  # makes a corpus of any texts


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=File, metavar="FILE", help="the exploration: YAML or JSON")
    parser.add_argument(
        "-o", "--output", type=File, metavar="PATH", help="where to write; else NAME_imported.yaml here"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--pairs-hold",
        action="store_true",
        help="conditions that are lists of pairs hold where all pairs do, as in ReaLLM-Forge until the autumn of 2025",
    )


def act(given: argparse.Namespace) -> int:
    """Imports a file. Returns the exit code; raises ConfigError where the file is wrong."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", given.file.stem).strip("._-")[:80] or "exploration"
    output: File = given.output or File(f"{name}_imported.yaml")
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: a configuration's name ends in {', '.join(SUFFIXES)}.")
    if output.exists() and (not given.force or output.resolve() == given.file.resolve()):
        raise ConfigError(f"{shown(output)} exists. Name another with --output PATH, or replace it with --force.")
    exploration = read_exploration(given.file, pairs_hold=given.pairs_hold)
    found = translate(exploration, _corpus_problem)
    reader = listing.new_reader({})
    reader = listing.new_reader({})
    _refuse(found, reader)
    found.settle()
    rows, parts = _rows(exploration, found)
    planned = plan(rows, parts, {key for key in rows.keys if exploration.conditional & set(found.made_of(key))})
    output.write_text(file_text(name, shown(given.file), found, planned, len(rows.rows)), encoding="utf-8")
    for heading, items in account(shown(given.file), found, len(rows.rows)):
        print(heading, *(f"  {item}" for item in items), sep="\n")
    return _read_back(output, rows, reader)


def _corpus_problem(name: str) -> str:
    """Why a corpus cannot be used now; '' where it can."""
    try:
        listing.corpus_of(DataConfig(dataset=name))
    except (ValueError, OSError) as error:
        text = str(error).removeprefix("data.dataset: ").rstrip(".")
        return (
            f"there is no corpus of that name here (see python {TEXTS} --help)"
            if text.startswith("no corpus")
            else text
        )
    return ""


def _refuse(found: Translation, reader: ConfigReader) -> None:
    """Leaves out the combinations that are no configuration here, such as a width that its heads do not divide.

    Raises ConfigError where none is left.
    """
    wrong = {i: sentences(reader.read(tree_of(some))[1], lambda path: None) for i, some in enumerate(found.settings)}
    found.refuse({i: told[0].rstrip(".") for i, told in wrong.items() if told})
    if not found.kept:
        raise ConfigError("Not one combination can be run here.", *dict.fromkeys(found.left_out.values()))


def _rows(exploration: Exploration, found: Translation) -> tuple[Rows, list[Part]]:
    """The settings of all combinations, and those of each branch with its name and what its groups call each setting."""
    rows, parts, number = Rows.of(found.of(found.kept)), [], 0
    made_of = {key: found.made_of(key) for key in rows.keys}
    for branch in exploration.branches:
        settings = found.of(range(number, number + len(branch.combinations)))
        number += len(branch.combinations)
        if settings:
            called = {key: [branch.group_of[o] for o in made_of[key] if o in branch.group_of] for key in rows.keys}
            words = {key: "+".join(dict.fromkeys(groups)) for key, groups in called.items() if groups}
            parts.append(Part("+".join(dict.fromkeys(branch.groups)), Rows.of(settings), words))
    return rows, parts


def _read_back(output: File, rows: Rows, reader: ConfigReader) -> int:
    """Whether the file that was written stands for the combinations that were meant, each run by its hash."""
    hashes = set()
    for settings in rows.mappings():
        config, _ = reader.read(tree_of(settings))
        assert config is not None
        hashes.add(reader.identity(config)[0])
    runs = {run.hash for run in listing.open_listing(output, ()).runs}
    if runs != hashes:
        print(
            f"{shown(output)} stands for {len(runs)} runs and not for the {len(hashes)} that were meant.",
            file=sys.stderr,
        )
        return FAILED
    print(f"Wrote {shown(output)}: {len(runs)} runs. List them: python train.py --config {shown(output)} --dry-run")
    return DONE
