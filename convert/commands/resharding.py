"""`python -m convert reshard`: the files of parallel ranks for other numbers of ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from convert import ranks
from convert.commands.telling import Progress, sizes_of, take_sizes
from convert.places import RANKS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help=f"files of ranks with {RANKS}, or mp_rank_* folders of megatron-core",
    )
    parser.add_argument("target", type=Path, metavar="NEW_FOLDER")
    parser.add_argument(
        "--vocabulary",
        type=int,
        metavar="N",
        help="megatron-core: tokens; rows that fill up the embedding are made anew",
    )
    take_sizes(parser)


def act(given: argparse.Namespace) -> int:
    """Goes through the full weights, one at a time."""
    sizes = sizes_of(given)
    if sizes is None:
        raise ValueError("Say for how many ranks, with --tensor, --pipeline, --expert or --expert-tensor.")
    with Progress("written") as told:
        if (given.folder / RANKS).is_file():
            ranks.reshard(given.folder, sizes, given.target, told)
        else:
            from convert.megatron import ranks as megatron

            megatron.reshard(given.folder, sizes, given.target, given.vocabulary, told=told)
    print(f"{given.target}: {sizes.count} ranks")
    return 0
