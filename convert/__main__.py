"""`python -m convert effective RUN_DIR FILE.safetensors`: the weights that multiply, for other tools."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from convert.effective import effective_weights
from convert.gains import fold_gains
from core.lora import adapter_weights, merge
from core.options import Reader
from core.saved import latest
from core.weights import load_weights
from core.yaml_files import ConfigError
from core.yaml_files import load_file as load_yaml
from model import GPT, assemble, fill
from train_args import Config
from variations import CATALOGUE

WRONG = 2


def load(folder: Path) -> GPT:
    """The model of a run folder at its newest checkpoint. Raises ValueError where it has none or uses Python files of its own."""
    loaded = load_yaml(folder / "config.yaml")
    if loaded.tree.get("plugins"):
        raise ConfigError(f"{folder} uses Python files of its own, which are not executed here.")
    reader = Reader(CATALOGUE)
    config = reader.read(Config, loaded.tree)
    if config is None:
        raise ConfigError(*(m.sentence(loaded.places.get(m.path)) for m in reader.mistakes))
    found = latest(folder / "checkpoint", ["model"])
    if found is None:
        raise ConfigError(f"{folder} has no checkpoint that can be read.")
    saved = found.model()
    # Stacked or not, files are the same; separate layers have the names that other tools know.
    plain = replace(config.model, vocab_size=saved["wte.weight"].shape[-2], stack_layers=False)
    model, rows = assemble(plain, config.slices, config.optimizer)
    fill(model, rows, 0)
    load_weights(model, saved)
    return model.eval()


def main(words: list[str]) -> int:
    """Returns the exit code: 0, or 2 where the run cannot be converted."""
    parser = argparse.ArgumentParser(prog="python -m convert", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = (
        "write every weight as what multiplies: of a PKL weight a + scale * b, adapters merged; also embedding and head"
    )
    effective = commands.add_parser("effective", help=about, description=about)
    effective.add_argument(
        "--fold-gains", action="store_true", help="fold the norms' gains into the linears behind them"
    )
    about = "write the adapters alone, each tensor under its address"
    adapters = commands.add_parser("adapters", help=about, description=about)
    for command in (effective, adapters):
        command.add_argument("folder", type=Path, metavar="RUN_DIR")
        command.add_argument("file", type=Path, metavar="FILE.safetensors")
    given = parser.parse_args(words)
    try:
        model = load(given.folder)
        if given.command == "adapters":
            tensors, notes = adapter_weights(model), []
            if not tensors:
                raise ConfigError(f"{given.folder} has no adapters.")
        else:
            merged = merge(model)
            folded = fold_gains(model) if given.fold_gains else []
            tensors, named = effective_weights(model), (("adapters merged", merged), ("gains folded", folded))
            notes = [f"; {what}: {', '.join(names)}" for what, names in named if names]
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG
    part = given.file.with_name(f".{given.file.name}-{os.getpid()}")
    save_file(tensors, part)
    part.replace(given.file)
    print(f"{given.file}: {len(tensors)} tensors{''.join(notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
