"""What a folder of torch.distributed.checkpoint says it holds: tensors, the boxes they are stored in, and where these are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.files import NAMES
from convert.megatron.plain import Record, Refused, read

FILE = ".metadata"
_METADATA, _PLANS = "torch.distributed.checkpoint.metadata.", "torch.distributed.checkpoint.planner."
TYPES = {str(dtype): dtype for dtype in NAMES}
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch."
ADMITTED = frozenset(
    {
        *(f"{_METADATA}{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *(f"{_METADATA}{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
        f"{_METADATA}_MEM_FORMAT_ENCODING",
        # Plans of those who wrote it, which core puts in as well; they are passed over.
        *(
            f"{_PLANS}{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        *(f"{_MEGATRON}{name}" for name in ("MCoreMetadata", "MCoreSavePlan")),
        *(f"torch.distributed.checkpoint.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
        *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
        *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath"),
        *("pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
        *(f"builtins.{name}" for name in ("list", "dict", "set", "tuple", "frozenset", "int", "float", "bool", "str")),
    }
)


@dataclass(frozen=True)
class Piece:
    """Where a box is: bytes of a file. The names are those that torch's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where in it it begins, and its sizes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(a + n for a, n in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: Mapping[Box, Piece]


def stored(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by name; objects, which are pickles of their own, are left out and never read.

    Raises ValueError where there is none, where it is damaged, or names what is no plain data of a checkpoint.
    """
    file = folder / FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        return _tensors(read(data, _admitted))
    except Refused as error:
        raise ValueError(f"{file} is refused: {error}.") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{file} is not what torch.distributed.checkpoint writes: {error}.") from None


def _admitted(name: str) -> bool:
    return name in ADMITTED or name in TYPES


def _tensors(metadata: Record) -> dict[str, Stored]:
    known = {
        name: what
        for name, what in metadata.state["state_dict_metadata"].items()
        if what.kind.endswith("TensorStorageMetadata")
    }
    pieces: dict[str, dict[tuple[int, ...], Piece]] = {name: {} for name in known}
    for index, info in metadata.state["storage_data"].items():
        name, offset = index.state["fqn"], index.state.get("offset")
        if name in pieces:
            place = tuple(0 for _ in _sizes(known[name].state["size"])) if offset is None else _sizes(offset)
            pieces[name][place] = _piece(info.state)
    made = {}
    for name, what in known.items():
        boxes = {}
        for chunk in what.state["chunks"]:
            box = Box(_sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"]))
            if box.offsets not in pieces[name]:
                raise ValueError(f"{name} has no bytes at {list(box.offsets)}")
            boxes[box] = pieces[name][box.offsets]
        made[name] = Stored(_dtype(what.state["properties"].state), _sizes(what.state["size"]), boxes)
    return made


def _sizes(size: Any) -> tuple[int, ...]:
    """Of a torch.Size, which is made with a tuple."""
    numbers = size.made_with[0] if isinstance(size, Record) else size
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} are not sizes")
    return tuple(numbers)


def _dtype(properties: Any) -> torch.dtype:
    name = properties["dtype"] if isinstance(properties, dict) else properties[0]
    return TYPES[name.text]


def _piece(state: dict[str, Any]) -> Piece:
    file, (offset, length) = state["relative_path"], _sizes((state["offset"], state["length"]))
    if not isinstance(file, str) or Path(file).name != file:
        raise ValueError(f"it names a file elsewhere: {file!r}")
    if state.get("transform_descriptors"):
        raise ValueError(f"{file} is stored as {state['transform_descriptors']}, which is not read")
    return Piece(file, offset, length)
