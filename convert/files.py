"""Folders of safetensors files, read and written one tensor at a time.

A folder has `model.safetensors`, or several files and `model.safetensors.index.json` which says where each tensor is, as Hugging
Face writes them. The format: eight bytes with the header's length, the header in JSON, the tensors' bytes one after another.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convert.mapping import Source

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5_000_000_000  # bytes of one file
ALIGNED = 8
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
Told = Callable[[str, int, int], None]  # what is told of progress: a name, bytes so far, bytes in all


class Folder:
    """The tensors of a folder, or of one file, read when they are asked for; nothing of them stays in memory.

    Raises ValueError, with a sentence, for a folder without them, a file that is damaged or missing, and names that two files have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        for file in self._files():
            try:
                self.files[file] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}.") from None
            for name in self.files[file].keys():  # noqa: SIM118
                if name in self.places:
                    raise ValueError(f"{path}: {name} is in {Path(self.places[name]).name} and in {Path(file).name}.")
                self.places[name] = file
        if self.listed is not None and (odd := sorted(self.listed.keys() ^ self.places.keys())):
            raise ValueError(f"{path / INDEX} and the files do not agree on {', '.join(odd[:8])}.")

    def _files(self) -> list[str]:
        self.listed: dict[str, str] | None = None
        if self.path.is_file():
            return [str(self.path)]
        index = self.path / INDEX
        if index.is_file():
            try:
                listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self.listed = listed
                if any(Path(file).name != file for file in listed.values()):
                    raise ValueError("it names files elsewhere")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is not an index of safetensors files: {error}.") from None
            return [str(self.path / file) for file in dict.fromkeys(listed.values())]
        if (self.path / WHOLE).is_file():
            return [str(self.path / WHOLE)]
        raise ValueError(f"{self.path} has neither {WHOLE} nor {INDEX}.")

    def names(self) -> list[str]:
        return list(self.places)

    def meta(self, name: str) -> Tensor:
        found = self.files[self.places[name]].get_slice(name)
        dtype = DTYPES.get(found.get_dtype())
        if dtype is None:
            raise ValueError(f"{self.path}: {name} is of type {found.get_dtype()}, which is not read.")
        return torch.empty(found.get_shape(), dtype=dtype, device="meta")

    def get(self, name: str) -> Tensor:
        made: Tensor = self.files[self.places[name]].get_tensor(name)
        return made


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when all has gone well; else nothing of it stays. Raises ValueError where `path`
    is there and is not empty."""
    if (path.is_dir() and any(path.iterdir())) or path.is_file():
        raise ValueError(f"{path} is there already. Name a new folder, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    beside.mkdir()
    try:
        yield beside
        if path.is_dir():
            path.rmdir()
        os.rename(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
    done = 0
    for file, names in zip(files, shards, strict=True):

        def note(name: str, inside: int, whole: int, before: int = done) -> None:
            if told is not None:
                told(name, before + inside, sum(sizes.values()))

        write_file(source, folder / file, names, note)
        done += sum(sizes[name] for name in names)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(
    source: Source,
    path: Path,
    names: list[str] | None = None,
    told: Told | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors of a source (all, or some) into one file, one after another; in memory there is one of them at a time."""
    # Larger elements first: every tensor then begins where its elements may, whatever is before it.
    metas = {name: source.meta(name) for name in (source.names() if names is None else names)}
    chosen = sorted(metas, key=lambda name: -metas[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(about or {})}}
    end = 0
    for name in chosen:
        meta, size = metas[name], _bytes(metas[name])
        header[name] = {"dtype": NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in chosen:
            tensor = source.get(name).contiguous()
            assert _bytes(tensor) == _bytes(metas[name]), name
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            if told is not None:
                told(name, header[name]["data_offsets"][1], end)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
