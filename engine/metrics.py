"""metrics.jsonl: the truth about what a run measured, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.secrets import scrub


class Metrics:
    """metrics.jsonl: `log` hands each line to the operating system at once, so a killed process loses none.

    `keep_to`: the iteration of the checkpoint that training continues from; records after it and a torn last line are
    dropped, atomically. Without it training starts from nothing, and so does the file.
    """

    def __init__(self, path: Path, *, keep_to: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept: list[dict[str, Any]] = []
        if keep_to is not None and path.exists():
            self.kept = [record for record in self.read(path) if iteration(record, keep_to) <= keep_to]
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("wb") as file:
                file.writelines(map(_line, self.kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        # An evaluation at the checkpoint's own iteration may be repeated by the loop that continues from it.
        self._seen = {(r.get("kind"), keep_to) for r in self.kept if r.get("iter") == keep_to}
        self._file = path.open("wb" if keep_to is None else "ab")

    def log(self, record: Mapping[str, Any]) -> bool:
        """Append a record; non-finite numbers become null. False: it was already there when training continued."""
        if (record.get("kind"), record.get("iter")) in self._seen:
            return False
        self._file.write(_line(record))
        self._file.flush()
        return True

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All records of a file that may still be written: a torn last line is left out. ValueError: another is bad."""
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(dict(json.loads(line)))
            except (TypeError, ValueError):
                if number < len(lines):
                    raise ValueError(f"{path}:{number} is no JSON object; delete the line, or the folder.") from None
        return records


def iteration(record: Mapping[str, Any], default: int) -> int:
    given = record.get("iter")
    return default if given is None else int(given)


def plain_record(value: Any) -> Any:
    """The value as JSON can hold it: non-finite numbers are None, one-element tensors and numpy scalars are numbers."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_record(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_record(inner) for inner in value]
    return plain_record(value.item()) if hasattr(value, "item") else str(value)


def _line(record: Mapping[str, Any]) -> bytes:
    return scrub(json.dumps(plain_record(record), allow_nan=False)).encode() + b"\n"
