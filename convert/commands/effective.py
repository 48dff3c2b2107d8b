"""`python -m convert effective`: every weight as what multiplies."""

from __future__ import annotations

import argparse
from pathlib import Path

from convert.commands.writing import written
from convert.effective import effective_weights
from convert.gains import fold_gains
from convert.places import load
from core.lora import merge


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fold-gains", action="store_true", help="fold the norms' gains into the linears behind them")
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("file", type=Path, metavar="FILE.safetensors")


def act(given: argparse.Namespace) -> int:
    """Of a PKL weight a + scale * b, adapters merged; also embedding and head."""
    model = load(given.folder)
    merged = merge(model)
    folded = fold_gains(model) if given.fold_gains else []
    notes = [
        f"{what}: {', '.join(names)}"
        for what, names in (("adapters merged", merged), ("gains folded", folded))
        if names
    ]
    return written(effective_weights(model), given.file, notes)
