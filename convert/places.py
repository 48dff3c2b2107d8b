"""What a path holds: a run of ours, a folder in Hugging Face's format, the files of parallel ranks, or a file of safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from convert import huggingface
from convert.files import Folder
from convert.huggingface.family import configured
from convert.mapping import Mapped, Source, Tensors
from convert.ranks import whole
from core.options import Reader
from core.rules import Row
from core.saved import latest
from core.weights import load_weights
from core.yaml_files import HUGGING_FACE, ConfigError
from core.yaml_files import load_file as load_yaml
from model import GPT, assemble, fill
from train_args import Config
from variations import CATALOGUE

RANKS = "ranks.json"


def run_config(folder: Path) -> Config:
    """The configuration of a run folder. Raises ConfigError where it has none, or uses Python files of its own."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no config.yaml.")
    loaded = load_yaml(folder / "config.yaml")
    if loaded.tree.get("plugins"):
        raise ConfigError(f"{folder} uses Python files of its own, which are not executed here.")
    reader = Reader(CATALOGUE)
    config: Config | None = reader.read(Config, loaded.tree)
    if config is None:
        raise ConfigError(*(m.sentence(loaded.places.get(m.path)) for m in reader.mistakes))
    return config


def load(folder: Path) -> GPT:
    """The model of a run folder at its newest checkpoint, with separate layers. Raises ConfigError where it has none."""
    return assembled(folder)[0]


def assembled(folder: Path) -> tuple[GPT, list[Row]]:
    """The model of a run folder, and the table of its slices."""
    config = run_config(folder)
    saved = saved_tensors(folder)
    # Stacked or not, files are the same; separate layers have the names that other tools know.
    plain = replace(config.model, vocab_size=saved["wte.weight"].shape[-2], stack_layers=False)
    model, rows = assemble(plain, config.slices, config.optimizer)
    fill(model, rows, 0)
    load_weights(model, saved)
    return model.eval(), rows


def saved_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a run folder's newest checkpoint. Raises ConfigError where it has none that can be read."""
    found = latest(folder / "checkpoint", ["model"])
    if found is None:
        raise ConfigError(f"{folder} has no checkpoint that can be read.")
    return found.model()


def opened(given: str) -> Source:
    """The weights at a path under our names. 'hf:' may stand before a folder. Raises ValueError where it is none of these."""
    path = Path(given.removeprefix(HUGGING_FACE))
    if path.is_file():
        return Folder(path)
    if (path / "config.yaml").is_file():
        return Tensors(saved_tensors(path))
    if (path / huggingface.CONFIG).is_file():
        return hugging_face(path)
    if (path / RANKS).is_file():
        return whole(path)
    if path.is_dir():
        return Folder(path)
    raise ValueError(f"There is no '{path}'.")


def hugging_face(folder: Path) -> Mapped:
    """A folder's weights under our names. Raises ValueError for what our models cannot represent."""
    return huggingface.mapped(folder, configured(huggingface.model_node(folder)))
