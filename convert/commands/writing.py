"""One file of safetensors, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from convert.files import write_file
from convert.mapping import Tensors


def written(tensors: Mapping[str, Tensor], path: Path, notes: Sequence[str]) -> int:
    """Writes the file and says so. Returns the exit code."""
    part = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        write_file(Tensors(tensors), part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print("; ".join((f"{path}: {len(tensors)} tensors", *notes)))
    return 0
