"""`python -m convert export`: a run of ours in the format of another tool."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from convert import huggingface
from convert.commands.telling import Progress
from convert.places import load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run folder")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the new folder")
    parser.add_argument(
        "--family", choices=sorted(huggingface.FAMILIES), help="whose form it takes; else the first that can"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="what tensors are written in; else as they are")


def act(given: argparse.Namespace) -> int:
    """Writes config.json and safetensors files that `transformers` loads."""
    model = load(given.run)
    family = given.family or huggingface.pick_family(model.config)
    with Progress("written") as told:
        notes = huggingface.write(model, family, given.folder, DTYPES.get(given.dtype), told)
    for note in notes:
        print(f"{note}.")
    print(f"{given.folder}: a model of the family {family}")
    return 0
