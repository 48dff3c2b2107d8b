"""Distributed checkpoints of megatron-core (`torch_dist`): folders of torch.distributed.checkpoint, read and written in pieces.

Where all layers are alike, core keeps each weight of all of them in one tensor [layers, ...] whose name has no number. Here every
layer's weight has its number, and is read, or written, by itself.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from convert.files import Told, new_folder
from convert.mapping import Source
from convert.megatron.metadata import Box, Piece, Stored, stored
from convert.steps import shape

LAYERS = "decoder.layers."
NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Modules whose state beside their weights (of quantisation) core asks for, by what their weights' names end with.
STATEFUL = re.compile(r"(.+\.(?:linear_\w+|in_proj|out_proj|\w*layernorm|norm))\.(?:weight|bias)(?:_[wv]|\.\w+)?$")
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Where:
    """The tensor of the folder that has a weight, and the layer of it, where it has all layers."""

    name: str
    layer: int | None = None


class Checkpoint:
    """The tensors of a distributed checkpoint; a Source. Nothing on disk is executed, and objects beside tensors are not read.

    path: its folder, or one of Megatron-LM with the number of the latest iteration in it. Raises ValueError where it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = _latest(path)
        self.stored = stored(self.path)
        self.places: dict[str, Where] = {}
        for name, what in self.stored.items():
            rest = name.removeprefix(LAYERS)
            if rest != name and what.shape and not rest[:1].isdigit():
                self.places |= {f"{LAYERS}{i}.{rest}": Where(name, i) for i in range(what.shape[0])}
            else:
                self.places[name] = Where(name)
        self.reader = FileSystemReader(self.path)

    def names(self) -> list[str]:
        return list(self.places)

    def meta(self, name: str) -> Tensor:
        where = self.places[name]
        what = self.stored[where.name]
        return torch.empty(what.shape if where.layer is None else what.shape[1:], dtype=what.dtype, device="meta")

    def get(self, name: str) -> Tensor:
        """Raises ValueError where bytes are missing or are not a tensor."""
        where = self.places[name]
        what = self.stored[where.name]
        wanted = Box((0,) * len(what.shape), what.shape)
        if where.layer is not None:
            wanted = Box((where.layer, *wanted.offsets[1:]), (1, *what.shape[1:]))
        made = torch.empty(wanted.sizes, dtype=what.dtype)
        found = _overlaps(where.name, what, wanted)
        if sum(math.prod(item.lengths) for item, _ in found) != made.numel():
            raise ValueError(f"{self.path} does not have all of {name}.")
        self.reader.storage_data = {item.storage_index: piece for item, piece in found}
        try:
            self.reader.read_data(LoadPlan([item for item, _ in found]), cast(LoadPlanner, _Into(made)))
        except Exception as error:  # of many kinds: torch refuses what is not a tensor, files end early
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{self.path}: {name} cannot be read: {told[0]}.") from None
        return made if where.layer is None else made[0]


class _Into:
    """Where torch's reader puts what it reads."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        view = self.whole
        for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """The view was filled already."""


def _overlaps(name: str, what: Stored, wanted: Box) -> list[tuple[ReadItem, Piece]]:
    """What to read for a part of a tensor, and where: the overlap of each stored box with it."""
    found = []
    for box, piece in what.boxes.items():
        begins = [max(a, b) for a, b in zip(box.offsets, wanted.offsets, strict=True)]
        ends = [min(a, b) for a, b in zip(box.ends, wanted.ends, strict=True)]
        if all(begin < end for begin, end in zip(begins, ends, strict=True)):
            index = MetadataIndex(name, box.offsets)
            item = ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=index,
                dest_offsets=torch.Size(x - y for x, y in zip(begins, wanted.offsets, strict=True)),
                storage_index=index,
                storage_offsets=torch.Size(x - y for x, y in zip(begins, box.offsets, strict=True)),
                lengths=torch.Size(x - y for x, y in zip(ends, begins, strict=True)),
            )
            found.append((item, piece))
    return found


def _latest(path: Path) -> Path:
    if not (path / LATEST).is_file():
        return path
    text = (path / LATEST).read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"\d+|release", text):
        raise ValueError(f"{path / LATEST} says '{text[:40]}', which is not the number of an iteration.")
    return path / ("release" if text == "release" else f"iter_{int(text):07}")


# Written -------------------------------------------------------------------------------------------------------------------


def write(source: Source, folder: Path, single: bool = False, told: Told | None = None) -> None:
    """Writes weights under core's names into a new folder that core loads; one tensor at a time is in memory.

    Layers that have the same weights are written as one tensor for all. single: each layer's by itself, as core does it with
    `singleton_local_shards`; of a source with halves of gated maps that is meant. Raises ValueError where the folder is not empty.
    """
    with new_folder(folder) as beside:
        planner = _Planner(source, single, told)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="torch.distributed is disabled"
            )  # which is meant: one process writes
            save({}, storage_writer=_Writer(beside, thread_count=1), planner=planner, no_dist=True)
        (beside / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
        content = {"singleton_local_shards": planner.single, "non_homogeneous_layers": not planner.layers}
        # Since 3.0 the rows of linear_qkv are in their present order.
        torch.save({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}, beside / "common.pt")


def alike(source: Source) -> int:
    """The number of layers, where each has the same weights of the same shapes and types; 0 where they differ."""
    found: dict[int, dict[str, tuple[Any, ...]]] = {}
    for name in source.names():
        if (match := NUMBERED.fullmatch(name)) is not None:
            meta = source.meta(name)
            found.setdefault(int(match[1]), {})[match[2]] = (meta.shape, meta.dtype)
    same = set(found) == set(range(len(found))) and all(layer == found[0] for layer in found.values())
    return len(found) if same else 0


class _Planner(DefaultSavePlanner):
    """What is written where; tensors are asked of the source when it is their turn."""

    def __init__(self, source: Source, single: bool, told: Told | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.source, self.told = source, told
        self.single = single or any(
            name.endswith(("weight_w", ".experts.0.linear_fc1.weight")) for name in source.names()
        )
        self.layers = 0 if self.single else alike(source)
        self.names: dict[tuple[str, tuple[int, ...]], str] = {}
        self.done = 0
        metas = [source.meta(name) for name in source.names()]
        self.total = sum(meta.numel() * meta.element_size() for meta in metas)

    def create_local_plan(self) -> SavePlan:
        items, states = [], dict[str, WriteItem]()
        for name in self.source.names():
            meta, match = self.source.meta(name), NUMBERED.fullmatch(name)
            sizes, offsets, whole, key = shape(meta), [0] * meta.dim(), shape(meta), name
            layer = int(match[1]) if match is not None and self.layers else None
            if match is not None and layer is not None:
                key, sizes = f"{LAYERS}{match[2]}", [1, *sizes]
                offsets, whole = [layer, *offsets], [self.layers, *whole]
            self.names[key, tuple(offsets)] = name
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            data = TensorWriteData(chunk, TensorProperties(dtype=meta.dtype), torch.Size(whole))
            items.append(WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data))
            states |= {
                state: WriteItem(MetadataIndex(state), WriteItemType.BYTE_IO)
                for state in self._states(key, layer, meta)
            }
        self.plan = SavePlan([*items, *states.values()])
        return self.plan

    def _states(self, key: str, layer: int | None, meta: Tensor) -> list[str]:
        """Names of the states that core asks for beside a weight: none is in them, and without them it does not load."""
        match = STATEFUL.fullmatch(key)
        modules = [match[1]] if match is not None else []
        modules += [f"{m.removesuffix('linear_qkv')}core_attention" for m in modules if m.endswith("linear_qkv")]
        places, counts = ([layer], [self.layers]) if layer is not None else ([], [])
        experts = [[e] for e in range(meta.shape[0])] if ".experts.experts.linear" in key else [[]]
        if len(experts) > 1 or ".experts.experts.linear" in key:
            counts = [*counts, meta.shape[0]]
        made = []
        for module in modules:
            for expert in experts:
                place = ".".join(map(str, [*places, *expert])) or "0"
                made.append(f"{module}._extra_state/shard_{place}_{'.'.join(map(str, counts)) or '1'}")
        return made

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)
            return nothing
        index = write_item.index
        name = self.names[index.fqn, tuple(index.offset or ())]
        assert write_item.tensor_data is not None
        tensor = self.source.get(name).reshape(write_item.tensor_data.chunk.sizes).contiguous()
        self.done += tensor.numel() * tensor.element_size()
        if self.told is not None:
            self.told(name, self.done, self.total)
        return tensor


class _Writer(FileSystemWriter):
    """Says nothing of the folder's place, which is another one while it is written."""

    def storage_meta(self) -> None:
        return None
