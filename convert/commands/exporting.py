"""`python -m convert export`: a run of ours in the format of another tool."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from convert import huggingface
from convert.commands.telling import Progress, sizes_of, take_sizes
from convert.effective import effective_weights
from convert.files import Told
from convert.mapping import Tensors
from convert.places import assembled
from convert.table import lines
from core.lora import adapted, merge
from core.rules import Row
from core.weights import weights
from model import GPT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Lines = list[str]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run folder")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the new folder")
    parser.add_argument("--to", choices=FORMATS, default="huggingface", help="the format (default %(default)s)")
    parser.add_argument(
        "--family",
        choices=sorted(huggingface.FAMILIES),
        help="huggingface, peft: whose form it takes; else the first that can",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="huggingface: what tensors are written in; else as they are")
    parser.add_argument("--base", help="peft: where PEFT finds the model that the adapters are for")
    parser.add_argument("--zero-centred", action="store_true", help="megatron: gains are stored less one")
    parser.add_argument(
        "--multiple", type=int, default=128, help="megatron, ranks: the vocabulary is filled up to a multiple of it"
    )
    take_sizes(parser)


def act(given: argparse.Namespace) -> int:
    """Writes the folder, whole or not at all, and says what there is to say."""
    model, rows = assembled(given.run)
    with Progress("written") as told:
        said = FORMATS[given.to](given, model, rows, told)
    for line in said:
        print(line)
    return 0


def _hugging_face(given: argparse.Namespace, model: GPT, rows: list[Row], told: Told) -> Lines:
    """Adapters are merged."""
    family = given.family or huggingface.pick_family(model.config)
    notes = huggingface.write(model, family, given.folder, DTYPES.get(given.dtype), told)
    return [
        *lines(huggingface.outward(model, family)),
        *(f"{note}." for note in notes),
        f"{given.folder}: a model of the family {family}",
    ]


def _peft(given: argparse.Namespace, model: GPT, rows: list[Row], told: Told) -> Lines:
    """The adapters alone."""
    from convert import peft

    family = given.family or huggingface.pick_family(model.config)
    written = peft.write(model, rows, huggingface.FAMILIES[family], given.folder, given.base)
    made = [f"{name}  <-  {', '.join(ours)}  rank {rank}" for name, (ours, rank) in written.targets.items()]
    return [*made, *written.notes, f"{given.folder}: adapters for a model of the family {family}"]


def _megatron(given: argparse.Namespace, model: GPT, rows: list[Row], told: Told) -> Lines:
    """A distributed checkpoint, or with sizes a folder for each rank."""
    from convert import megatron

    notes = _alone(model)
    sizes = sizes_of(given)
    own = weights(model)  # a tied weight is there once
    source = Tensors({name: t for name, t in effective_weights(model).items() if name in own})
    how = {"zero_centred": given.zero_centred, "multiple": given.multiple, "told": told}
    table = lines(megatron.export(source, model, given.folder, sizes, **how))
    what = "a distributed checkpoint" if sizes is None else f"{sizes.count} ranks"
    return [*notes, *table, f"{given.folder}: {what} of megatron-core"]


def _ranks(given: argparse.Namespace, model: GPT, rows: list[Row], told: Told) -> Lines:
    """Our names on parallel ranks."""
    from convert import ranks
    from convert.choice import choose

    notes, sizes = _alone(model), sizes_of(given)
    if sizes is None:
        raise ValueError("--to ranks: say for how many, with --tensor, --pipeline, --expert or --expert-tensor.")
    plan = ranks.Sharding(choose(model, given.multiple if sizes.tensor > 1 else 1), sizes)
    ranks.write(Tensors(weights(model)), plan, given.folder, told)
    return [*notes, f"{given.folder}: {sizes.count} ranks"]


def _alone(model: GPT) -> Lines:
    """Merges adapters, where there are any."""
    if not adapted(model):
        return []
    return [f"adapters merged: {', '.join(merge(model))}"]


FORMATS: dict[str, Callable[[argparse.Namespace, GPT, list[Row], Told], Lines]] = {
    "huggingface": _hugging_face,
    "peft": _peft,
    "megatron": _megatron,
    "ranks": _ranks,
}
