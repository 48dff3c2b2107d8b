"""`python -m convert import`: weights of another tool as a run folder of ours."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import huggingface
from convert.commands.telling import Progress
from convert.effective import numbered
from convert.files import Told, new_folder, write_file
from convert.mapping import Mapped, Source, Tensors
from convert.places import RANKS, assembled, hugging_face, run_config
from convert.table import lines
from core.options import plain
from core.saved import STATE, file_name, written_state
from core.weights import weights
from core.yaml_files import HUGGING_FACE, dump
from core.yaml_files import load_file as load_yaml

ADAPTERS = "adapter_config.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    about = "a folder of Hugging Face's (config.json), PEFT's (adapter_config.json) or megatron-core's, or files of parallel ranks"
    parser.add_argument("folder", metavar="FOLDER", help=about)
    parser.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="the new run folder, for train.init_from and the other commands"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="RUN_DIR",
        help="PEFT: the run that the adapters are for; others: a run whose model takes the weights",
    )
    parser.add_argument(
        "--family",
        choices=sorted(huggingface.FAMILIES),
        help="PEFT: whose form the adapters have; else the first that can",
    )

    parser.add_argument(
        "--share",
        type=float,
        default=0.0,
        help="of weights that are a + scale * b: b's part of the sum (default 0: all is a)",
    )


def act(given: argparse.Namespace) -> int:
    """Writes config.yaml and a checkpoint; the table says what became of each tensor."""
    folder = Path(given.folder.removeprefix(HUGGING_FACE))
    if (folder / ADAPTERS).is_file():
        tree, source, told = _adapters(folder, given)
    elif (folder / huggingface.CONFIG).is_file() or given.base is None:
        tree, source, told = _hugging_face(folder, given)
    else:
        tree, source, told = _like(folder, given)
    print("\n".join(told), flush=True)
    with Progress("read") as progress:
        write_run(tree, source, given.run, progress)
    print(f"{given.run}: {sum(source.meta(name).numel() for name in source.names()):,} parameters")
    return 0


def write_run(tree: Mapping[str, Any], source: Source, run: Path, told: Told | None = None) -> None:
    """A new run folder with a configuration and a checkpoint at iteration 0, whole or not at all."""
    with new_folder(run) as beside:
        saved = beside / "checkpoint" / f"{0:08d}"
        saved.mkdir(parents=True)
        write_file(source, saved / file_name("model"), told=told)
        write_file(source, saved / file_name("optimizer"), [])  # training begins with no moments
        (saved / STATE).write_text(written_state({"iter": 0}, saved))
        (beside / "config.yaml").write_text(dump(tree), encoding="utf-8")


def _hugging_face(folder: Path, given: argparse.Namespace) -> tuple[dict[str, Any], Source, list[str]]:
    if given.base is not None:  # a model of its own choice for the same weights
        model = assembled(given.base)[0].config
        mapped = huggingface.mapped(folder, model)
        return _of_run(given.base), numbered(mapped, model, given.share), lines(mapped)
    mapped = hugging_face(folder)
    tree: dict[str, Any] = {"model": huggingface.model_node(folder)}
    if (folder / "tokenizer.json").is_file():
        tree["data"] = {"tokenizer": f"{HUGGING_FACE}{folder.resolve()}"}
    return tree, mapped, lines(mapped)


def _adapters(folder: Path, given: argparse.Namespace) -> tuple[dict[str, Any], Source, list[str]]:
    """The base with the adapters, and the rules that ask for them."""
    from convert import peft

    if given.base is None:
        raise ValueError(f"{folder} holds adapters. Name the run that they are for with --base RUN_DIR.")
    model, _ = assembled(given.base)
    family = huggingface.FAMILIES[given.family or huggingface.pick_family(model.config)]
    imported = peft.read(folder, model, family)
    made, _ = peft.load(model, imported)
    tree = _of_run(given.base) | {"slices": imported.rules}
    return tree, Tensors(weights(made)), [f"{theirs}  ->  {ours}" for theirs, ours in imported.sources.items()]


def _like(folder: Path, given: argparse.Namespace) -> tuple[dict[str, Any], Source, list[str]]:
    """Weights that say nothing of their model, as another run's."""
    base: Path = given.base
    model, _ = assembled(base)
    if (folder / RANKS).is_file():
        from convert import ranks

        return _of_run(base), ranks.whole(folder), []
    from convert import megatron

    mapped: Mapped = megatron.mapped(megatron.opened(folder), model, share=given.share)
    return _of_run(base), mapped, lines(mapped)


def _of_run(base: Path) -> dict[str, Any]:
    """What a run's configuration says of its model and data."""
    tree = load_yaml(base / "config.yaml").tree
    return {"model": plain(run_config(base).model), **({"data": tree["data"]} if "data" in tree else {})}
