"""Models of Hugging Face's `transformers`, read and written: one file a family, by the `model_type` of config.json.

A family says its configuration as our model node and back, and its weights as rules. Whatever one side has and the other cannot
represent is refused by its name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.files import Folder, Told, new_folder, write_folder
from convert.huggingface import bamba, gemma, gpt2, llama, mamba2, mixtral, phi3, qwen3, qwen3_moe
from convert.huggingface.family import Family, configured
from convert.huggingface.ours import Multiplied, Ours, differences
from convert.mapping import Mapped, Source
from convert.quantised import dequantised
from core.options import nearest
from gpt_conf import ModelConfig
from model import GPT

CONFIG = "config.json"
FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (gpt2, llama, qwen3, phi3, gemma, mixtral, qwen3_moe, mamba2, bamba)
}


def _config(folder: Path) -> tuple[Family, dict[str, Any]]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    name = config.get("model_type") if isinstance(config, dict) else None
    if name not in FAMILIES:
        raise ValueError(f"{path}: model_type is {name!r}. {nearest(str(name), FAMILIES)}")
    return FAMILIES[name], config


def model_node(folder: Path) -> dict[str, Any]:
    """Our `model` node for a folder's config.json. Raises ValueError that names every key that our models cannot represent."""
    family, config = _config(folder)
    try:
        return family.read(config)
    except ValueError as error:
        raise ValueError("\n".join(f"{folder / CONFIG}: {line}" for line in str(error).split("\n"))) from None


def mapped(folder: Path, model: ModelConfig, source: Source | None = None) -> Mapped:
    """A folder's tensors under our names, each made when it is asked for.

    source: its tensors, if they are read elsewhere. Those in blocks of eight bits come as numbers. Raises ValueError where a folder
    cannot be read, and Mismatch, before a tensor is read, for tensors that are missing, left over or of another shape.
    """
    family, config = _config(folder)
    source = dequantised(Folder(folder) if source is None else source, config)
    return Mapped(source, family.rules(model, source.names()), Ours(model).shapes)


def unlike(folder: Path, model: ModelConfig) -> list[str]:
    """In what a model is another than a folder's own, as sentences, where weights fit both: that may be meant."""
    found = differences(Ours(model), Ours(configured(model_node(folder))), ("block_size",))
    return [told.replace("the family", "the checkpoint") for told in found]


def digest(folder: Path) -> str:
    """The hash of what a folder's configuration and weights are: sixteen hexadecimal digits. Raises ValueError."""
    _config(folder)
    made = hashlib.sha256((folder / CONFIG).read_bytes())
    for file in sorted({place.file for place in Folder(folder).places.values()}):
        with file.open("rb") as content:
            made.update(hashlib.file_digest(content, "sha256").digest())
    return made.hexdigest()[:16]


def outward(model: GPT, family: str) -> Mapped:
    """A model's weights under a family's names, as what multiplies; adapters are merged into them. Raises ValueError."""
    ours = Ours(model.config)
    return Mapped(Multiplied(model, ours), FAMILIES[family].rules(model.config).inverse)


class Cast:
    """A source on the processor, in another dtype where one is given."""

    def __init__(self, source: Source, dtype: torch.dtype | None) -> None:
        self.source, self.dtype = source, dtype

    def names(self) -> list[str]:
        return self.source.names()

    def meta(self, name: str) -> Tensor:
        return self.source.meta(name).to(self.dtype or self.source.meta(name).dtype)

    def get(self, name: str) -> Tensor:
        made = self.source.get(name)
        return made.to("cpu", self.dtype or made.dtype)


def write(
    model: GPT, family: str, folder: Path, dtype: torch.dtype | None = None, told: Told | None = None
) -> list[str]:
    """Writes a model as a new folder that `transformers` loads: config.json and safetensors, one tensor in memory at a time.

    Weights are written as what multiplies: adapters merged, a + scale * b of PKL. The model is not changed. dtype: what the
    tensors are written in; None is their own. Returns what there is to note, as sentences. Raises ValueError that names
    everything that the family cannot represent; nothing is left in `folder` then, nor where writing is interrupted.
    """
    if family not in FAMILIES:
        raise ValueError(f"There is no family '{family}'. {nearest(family, FAMILIES)}")
    made, ours = FAMILIES[family], Ours(model.config)
    config = made.said(ours)
    source = Multiplied(model, ours)
    tensors = Cast(Mapped(source, made.rules(model.config).inverse), dtype)
    dtypes = sorted({str(tensors.meta(name).dtype).removeprefix("torch.") for name in tensors.names()})
    config["dtype"] = dtypes[0]
    notes = list(source.notes)
    if dtype is not None and (own := {t.dtype for t in source.own.values()}) != {dtype}:
        notes.append(f"{', '.join(sorted(str(d).removeprefix('torch.') for d in own))} is written as {dtypes[0]}")
    if model.config.dropout and "resid_pdrop" not in config:
        notes.append(
            f"dropout {model.config.dropout:g} is left out: '{family}' has none, and it acts in training alone"
        )
    with new_folder(folder) as beside:
        (beside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_folder(tensors, beside, told=told)
    return notes


def pick_family(model: ModelConfig) -> str:
    """The first family that can represent a model. Raises ValueError with what each lacks."""
    ours, reasons = Ours(model), []
    for name, family in FAMILIES.items():
        try:
            family.said(ours)
        except ValueError as error:
            first, *more = str(error).split("\n")
            reasons.append(f"{name}: {first}{f' (and {len(more)} more)' if more else ''}")
        else:
            return name
    raise ValueError("\n".join(["No family of Hugging Face can represent this model.", *reasons]))
