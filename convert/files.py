"""Folders of safetensors files, read and written one tensor at a time.

A folder has `model.safetensors`, or several files and `model.safetensors.index.json` which says where each tensor is, as Hugging
Face writes them. The format: eight bytes with the header's length, the header in JSON, the tensors' bytes one after another.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convert.mapping import Source

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
METADATA = "__metadata__"  # what no tensor can be called
SHARD = 5_000_000_000  # bytes of one file
ALIGNED = 8
SMALL = 1 << 16  # bytes of a tensor that is read, larger ones are mapped
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
Told = Callable[[str, int, int], None]  # what is told of progress: a name, bytes so far, bytes in all


@dataclass(frozen=True)
class Place:
    """Where a tensor is: in the bytes begin to end of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Folder:
    """The tensors of a folder, or of one file, read when they are asked for, each into memory of its own.

    Raises ValueError, with a sentence, for a folder without them, a file that is damaged or missing, and names that two files have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, Place] = {}
        listed = self._listed()
        for file in dict.fromkeys(listed.values()) if listed is not None else [self._whole()]:
            for name, place in _places(file).items():
                if name in self.places:
                    raise ValueError(f"{path}: {name} is in {self.places[name].file.name} and in {file.name}.")
                self.places[name] = place
        if listed is not None and (odd := sorted(listed.keys() ^ self.places.keys())):
            raise ValueError(f"{path / INDEX} and the files do not agree on {', '.join(odd[:8])}.")

    def _whole(self) -> Path:
        """The one file that has everything."""
        return self.path / WHOLE if self.path.is_dir() else self.path

    def _listed(self) -> dict[str, Path] | None:
        """Each tensor's file as an index says it, None where there is none or one file has everything: that is what others read."""
        index = self.path / INDEX
        if self._whole().is_file():
            return None
        if not index.is_file():
            raise ValueError(f"{self.path} has neither {WHOLE} nor {INDEX}.")
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if any(Path(file).name != file for file in listed.values()):
                raise ValueError("it names files elsewhere")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error}.") from None
        return {name: self.path / file for name, file in listed.items()}

    def names(self) -> list[str]:
        return list(self.places)

    def meta(self, name: str) -> Tensor:
        place = self.places[name]
        return torch.empty(place.shape, dtype=self._dtype(name), device="meta")

    def get(self, name: str) -> Tensor:
        """A tensor that nothing else is made of. A large one is a copy of the file's pages when it is written to, and lets go of
        them at its end: a mapping of the whole file would keep all that was ever read."""
        place, dtype = self.places[name], self._dtype(name)
        size, inside = place.end - place.begin, place.begin % mmap.ALLOCATIONGRANULARITY
        if not size:
            return torch.empty(place.shape, dtype=dtype)
        memory: bytearray | mmap.mmap
        try:
            with place.file.open("rb", buffering=0) as file:
                if size >= SMALL and place.begin % dtype.itemsize == 0:
                    memory = mmap.mmap(
                        file.fileno(), size + inside, offset=place.begin - inside, access=mmap.ACCESS_COPY
                    )
                else:
                    memory, inside = bytearray(os.pread(file.fileno(), size, place.begin)), 0
            found = torch.frombuffer(memory, dtype=dtype, count=math.prod(place.shape), offset=inside)
        except (OSError, ValueError) as error:
            raise ValueError(f"{place.file} cannot be read any more: {error}.") from None
        return found.view(place.shape)

    def _dtype(self, name: str) -> torch.dtype:
        dtype = DTYPES.get(self.places[name].dtype)
        if dtype is None:
            raise ValueError(f"{self.path}: {name} is of type {self.places[name].dtype}, which is not read.")
        return dtype


def _places(file: Path) -> dict[str, Place]:
    """The tensors of a file as they lie in it. Raises ValueError for one that is damaged or missing."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a file")
        with safe_open(file, "pt"):  # checks that they are what the header says, beside one another and all of the file
            pass
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    header.pop(METADATA, None)
    start, places = 8 + length, dict[str, Place]()
    for name, what in sorted(header.items(), key=lambda each: each[1]["data_offsets"]):
        begin, end = (start + offset for offset in what["data_offsets"])
        places[name] = Place(file, what["dtype"], tuple(what["shape"]), begin, end)
    return places


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when all has gone well; else nothing of it stays. Raises ValueError where `path`
    is there and is not an empty folder."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already. Name a new folder, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        for made in (*beside.rglob("*"), beside):
            _settle(made)
        os.rename(beside, path)  # which takes the place of an empty folder
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _settle(path.parent)


def _beside(path: Path) -> Path:
    """A name that nothing has. Not a process's number: what a killed one left has that of a later one in another container."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def _settle(path: Path) -> None:
    """Waits until a file, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(source: Source, folder: Path, shard: int = SHARD, told: Told | None = None) -> None:
    """Writes every tensor of a source into a folder: one file, or several of at most `shard` bytes and their index."""
    sizes = {name: _bytes(source.meta(name)) for name in source.names()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = (
        [WHOLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    done, total = 0, sum(sizes.values())
    for file, names in zip(files, shards, strict=True):

        def note(name: str, inside: int, whole: int, before: int = done) -> None:
            if told is not None:
                told(name, before + inside, total)

        write_file(source, folder / file, names, note)
        done += sum(sizes[name] for name in names)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(
    source: Source,
    path: Path,
    names: list[str] | None = None,
    told: Told | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors of a source (all, or some) into one file, one after another; in memory there is one of them at a time.

    The file is there when it is complete. Raises ValueError for names and dtypes that the format has not, before anything is read.
    """
    # Larger elements first: every tensor then begins where its elements may, whatever is before it.
    metas = {name: source.meta(name) for name in (source.names() if names is None else names)}
    chosen = sorted(metas, key=lambda name: -metas[name].element_size())
    header: dict[str, Any] = {METADATA: {"format": "pt", **(about or {})}}
    end = 0
    for name in chosen:
        meta, size = metas[name], _bytes(metas[name])
        if name == METADATA or meta.dtype not in NAMES:
            raise ValueError(f"'{name}' of {meta.dtype} cannot be in a safetensors file.")
        header[name] = {"dtype": NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in chosen:
                _write(file, source.get(name), metas[name])
                if told is not None:
                    told(name, header[name]["data_offsets"][1], end)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _write(file: BinaryIO, tensor: Tensor, meta: Tensor) -> None:
    """Writes one tensor, of which nothing stays in memory: a variable of the loop would keep it until the next one is there."""
    assert (tensor.dtype, tensor.shape) == (meta.dtype, meta.shape), (tensor.dtype, tensor.shape, meta)
    file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
