"""How fast weights come in and go out: `python bench/convert.py [--rounds N] [--width N]`.

import   a folder in Hugging Face's format into a model's parameters, against reading the same file and copying it, tensor by
         tensor, into tensors that are there
export   a model into such a folder, against writing tensors of the same names and sizes with safetensors

A plain reader and writer do nothing with the values. Files are in the page cache, and both sides' files are on the disk when the
clock stops. Llama's names: q, k and v, gate and up are put together and taken apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from bench.measure import alternate, machine, ratio, seconds, write  # noqa: E402
from convert import huggingface  # noqa: E402
from convert.mapping import fill  # noqa: E402
from core.options import Reader  # noqa: E402
from core.weights import weights  # noqa: E402
from gpt_conf import ModelConfig  # noqa: E402
from model import build  # noqa: E402
from variations import CATALOGUE  # noqa: E402

FAMILY, FILE = "llama", "model.safetensors"


def config(width: int) -> ModelConfig:
    """A Llama of 12 layers, of about 400 million parameters at a width of 1536."""
    node: dict[str, Any] = {
        "n_layer": 12,
        "n_head": width // 64,
        "n_kv_head": width // 256,
        "n_embd": width,
        "vocab_size": 32_000,
        "block_size": 128,
        "bias": False,
        "tie_weights": False,
        "norm": "rmsnorm",
        "activation": "silu",
        "position": "rope",
        "mlp": "gated",
    }
    reader = Reader(CATALOGUE)
    made = reader.read(ModelConfig, node)
    assert made is not None, [m.sentence() for m in reader.mistakes]
    return made


def synced(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sides(home: Path, width: int) -> tuple[dict[str, dict[str, Callable[[], float]]], int]:
    """What is timed, and the bytes of the file."""
    model = build(config(width), 0).eval()
    theirs = home / "theirs"
    huggingface.write(model, FAMILY, theirs)
    plain = load_file(theirs / FILE)
    kept = {name: torch.empty_like(t) for name, t in plain.items()}
    own = weights(model)

    def read() -> None:
        for name, tensor in load_file(theirs / FILE).items():
            kept[name].copy_(tensor)

    def save() -> None:
        save_file(plain, home / "plain")
        synced(home / "plain")

    def out() -> float:
        made = home / "ours"
        shutil.rmtree(made, ignore_errors=True)
        return seconds(lambda: huggingface.write(model, FAMILY, made))

    def into() -> float:
        return seconds(lambda: fill(own, huggingface.mapped(theirs, model.config)))

    return {
        "import": {"plain": lambda: seconds(read), "ours": into},
        "export": {"plain": lambda: seconds(save), "ours": out},
    }, (theirs / FILE).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1536)
    given = parser.parse_args()
    print(machine())
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        timed, size = sides(Path(place), given.width)
        figures["megabytes"] = round(size / 1e6)
        for name, each in timed.items():
            for act in each.values():
                act()
            times = alternate(each, given.rounds)
            figures[name] = {
                "bandwidth": ratio(times["plain"], times["ours"]),  # ours to plain
                "plain_gb_per_second": [round(size / 1e9 / t, 2) for t in times["plain"]],
                "ours_gb_per_second": [round(size / 1e9 / t, 2) for t in times["ours"]],
            }
            print(name, json.dumps(figures[name], indent=1), flush=True)
    print(write("convert", figures))


if __name__ == "__main__":
    main()
