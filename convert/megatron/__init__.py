"""Checkpoints of megatron-core: distributed ones (`torch_dist`), and folders of ranks (`mp_rank_*`) with safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from convert.files import Told
from convert.kinds import Sizes
from convert.mapping import Mapped, Source
from convert.megatron import checkpoint, ranks
from convert.megatron.names import Form, exported, padded
from convert.megatron.names import mapped as mapped
from convert.megatron.names import recognised as recognised
from model import GPT

MULTIPLE = 128  # make_vocab_size_divisible_by, if nothing else is said


def opened(path: Path) -> Source:
    """The full weights of a checkpoint of either kind, under core's names. Raises ValueError where it is none of them."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder.")
    if any(ranks.FOLDER.fullmatch(each.name) for each in path.iterdir()):
        return ranks.read(path)
    return checkpoint.Checkpoint(path)


def export(
    source: Source,
    model: GPT,
    folder: Path,
    sizes: Sizes | None = None,
    *,
    norms: Literal["fused", "local"] = "fused",
    experts: Literal["each", "grouped"] = "grouped",
    zero_centred: bool = False,
    multiple: int = MULTIPLE,
    told: Told | None = None,
) -> Mapped:
    """Writes weights under our names, of the model's sizes, into a new folder for core: for ranks of these sizes, or, without any,
    a distributed checkpoint, which core loads with all.

    norms, experts: how core's layers are built, with Transformer Engine by default. zero_centred: `layernorm_zero_centered_gamma`.
    multiple: `make_vocab_size_divisible_by`. Returns what was written.

    Raises ValueError for what core has no place for, or where the folder is there.
    """
    size = model.config.vocab_size
    assert size is not None
    if sizes is None:
        form = Form(
            norms="mapped" if norms == "local" else norms, zero_centred=zero_centred, vocabulary=padded(size, multiple)
        )
        made = exported(source, model, form)
        checkpoint.write(made, folder, told=told)
        return made
    form = Form(norms, experts, parts=False, zero_centred=zero_centred)
    made = exported(source, model, form)
    ranks.write(made, sizes, folder, multiple, told)
    return made
