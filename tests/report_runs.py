"""Run folders made by hand, and a reader of pages: what the tests of the report share."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from lab.report import Listed, Summary, write_report
from lab.reporting import drawing
from lab.reporting.cells import Board

PNG = b"\x89PNG\r\n\x1a\n"
MINUS = "\N{MINUS SIGN}"
HOSTILE = "<script>alert(1)</script>\"'&\u202e \N{SNOWMAN} $\\frac{1}{0}$ \ud800\x1b[31m"


class Sweep:
    """Run folders made by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[Listed] = []
        self.drawn: list[drawing.Drawn] = []

    def add(self, cell: str, seed: int, loss: float | None = None, status: str | None = "done", **more: Any) -> Path:
        """A run, not ended where there is no status. `more`: baseline, changed, phase, metrics, and fields of the result."""
        run_id = f"r{len(self.runs)}"
        folder = self.folder / run_id
        folder.mkdir(parents=True)
        changed = {"train.seed": seed, **more.pop("changed", {})}
        baseline, phase = more.pop("baseline", False), more.pop("phase", "grid")
        self.runs.append(Listed(run_id, cell, seed, changed, folder, baseline, phase))
        if (metrics := more.pop("metrics", None)) is not None:
            (folder / "metrics.jsonl").write_bytes(metrics)
        if status is not None:
            result = {"status": status, "val_loss": loss, "seconds": 10.0, "parameters": 1000, "error": None, **more}
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    def write(self, **more: Any) -> Summary:
        return write_report(self.folder, more.pop("name", "sweep"), self.runs, **more)

    def table(self) -> list[dict[str, str]]:
        with (self.folder / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def html(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")

    def keep(self, drawn: drawing.Drawn) -> list[tuple[str, bytes]]:
        """Stands for the pictures."""
        self.drawn.append(drawn)
        return []

    @property
    def board(self) -> Board:
        return self.drawn[-1].board


def evals(*losses: float | None, step: int = 100) -> bytes:
    lines = []
    for i, loss in enumerate(losses, 1):
        at = {"iter": i * step, "tokens": i * step * 32, "seconds": 1.0 * i}
        lines.append({"kind": "train", **at, "train_loss": 9.0, "learning_rate": 1e-3})
        lines.append({"kind": "eval", **at, "val_loss": loss, "train_eval_loss": None})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class Page(HTMLParser):
    """Tags, and the text of every table row."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._cell = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._cell = self._cell or tag == "td"
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data


def known_sweep(sweep: Sweep) -> None:
    for seed, base, other in ((1, 2.0, 1.9), (2, 2.2, 2.0), (3, 2.1, 1.8)):
        sweep.add("base", seed, base, baseline=True, changed={"model.norm": "layernorm"})
        sweep.add("other", seed, other, changed={"model.norm": "rmsnorm", "optimizer.learning_rate": 1e-3})
