"""`python -m convert adapters`: the adapters of a run alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from convert.commands.writing import written
from convert.places import load
from core.lora import adapter_weights
from core.yaml_files import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("file", type=Path, metavar="FILE.safetensors")


def act(given: argparse.Namespace) -> int:
    """Writes each tensor under its address."""
    tensors = adapter_weights(load(given.folder))
    if not tensors:
        raise ConfigError(f"{given.folder} has no adapters.")
    return written(tensors, given.file, [])
