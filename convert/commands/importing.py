"""`python -m convert import`: a folder in Hugging Face's format as a run folder of ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convert.commands.telling import Progress
from convert.files import new_folder, write_file
from convert.places import hugging_face, node_of
from convert.table import lines
from core.saved import STATE, file_name, written_state
from core.yaml_files import HUGGING_FACE, dump


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a folder with config.json and safetensors files")
    parser.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="the new run folder, for train.init_from and the other commands"
    )


def act(given: argparse.Namespace) -> int:
    """Writes config.yaml and a checkpoint; the table says what became of each tensor."""
    folder = Path(given.folder.removeprefix(HUGGING_FACE))
    mapped = hugging_face(folder)
    print("\n".join(lines(mapped)), flush=True)
    config: dict[str, Any] = {"model": node_of(folder)}
    if (folder / "tokenizer.json").is_file():
        config["data"] = {"tokenizer": f"{HUGGING_FACE}{folder.resolve()}"}
    with new_folder(given.run) as beside, Progress("read") as told:
        saved = beside / "checkpoint" / f"{0:08d}"
        saved.mkdir(parents=True)
        write_file(mapped, saved / file_name("model"), told=told)
        write_file(mapped, saved / file_name("optimizer"), [])  # training begins with no moments
        (saved / STATE).write_text(written_state({"iter": 0}, saved))
        (beside / "config.yaml").write_text(dump(config), encoding="utf-8")
    print(f"{given.run}: {sum(mapped.meta(name).numel() for name in mapped.names()):,} parameters")
    return 0
