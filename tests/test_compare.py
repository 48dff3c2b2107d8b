"""`python -m lab compare`: cells of several sweeps matched by what they are, and what differs said before any number."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from core.yaml_files import ConfigError
from lab import __main__ as door
from lab import compare, store

BASE = {
    "model": {"n_layer": 2, "norm": {"variant": "layernorm"}},
    "optimizer": {"learning_rate": 0.001},
    "train": {"seed": 1, "device": "auto", "log_interval": 10},
    "runner": {"root": "/a"},
    "run": {"content": {"data": "d1"}},
}


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


class Folder:
    """The folder of a sweep, made by hand. `fixed`: what holds in all of its configurations."""

    def __init__(self, folder: Path, objective: dict[str, str] | None = None, **fixed: Any) -> None:
        self.folder, self.fixed = folder, {key.replace("__", "."): value for key, value in fixed.items()}
        self.rows: list[store.Row] = []
        folder.mkdir(parents=True)
        tree = {"name": folder.name, "sweep": {"objective": objective or {"metric": "val_loss", "mode": "min"}}}
        (folder / "sweep.yaml").write_text(json.dumps(tree))

    def add(
        self, rate: float, seed: int, loss: float | None, cell: str = "", baseline: bool = False, **more: Any
    ) -> None:
        """A run; its hash is what it is."""
        config = json.loads(json.dumps(BASE))
        for key, value in {**self.fixed, "optimizer.learning_rate": rate, "train.seed": seed}.items():
            put(config, key, value)
        kept = {key: config[key] for key in ("model", "optimizer", "run")}
        run_id = f"lr={rate}+seed={seed}-{len(self.rows)}"
        place = self.folder / run_id
        place.mkdir()
        if not more.pop("unwritten", False):
            (place / "config.yaml").write_text(json.dumps(config))
        result = {
            "status": "done" if loss is not None else "failed",
            "val_loss": loss,
            "tokens_per_second": 5.0,
            **more,
        }
        (place / "result.json").write_text(json.dumps(result))
        changed = {"optimizer.learning_rate": rate, "train.seed": seed}
        identity = f"{json.dumps(kept)} {seed}"
        self.rows.append(
            store.Row(identity, run_id, cell or f"learning_rate={rate}", seed, changed, baseline, 10, "done", "grid")
        )

    def close(self) -> Path:
        database = store.Store(self.folder / store.FILE)
        database.list(self.rows)
        database.close()
        return self.folder


def pair(tmp_path: Path, **fixed: Any) -> tuple[Folder, Folder]:
    """Two sweeps that share one cell, and in it one run; B has two cells of its own."""
    a, b = Folder(tmp_path / "a"), Folder(tmp_path / "b", **fixed)
    for seed, loss in ((1, 2.0), (2, 2.2), (3, 2.1)):
        a.add(0.001, seed, loss, baseline=True)
    for seed, loss in ((1, 1.9), (2, 2.0), (3, 1.8)):
        b.add(0.01, seed, loss)
    return a, b


def found(*folders: Folder) -> compare.Compared:
    return compare.compare([folder.close() for folder in folders])


def test_cells_are_compared_across_sweeps_on_common_seeds(tmp_path: Path) -> None:
    made = found(*pair(tmp_path))
    best, base = made.board.cells
    assert (best.name, base.name, made.board.reference) == ("learning_rate=0.01", "learning_rate=0.001", base)
    assert best.paired and best.paired.n == 3 and best.paired.mean == pytest.approx(-0.2)
    assert made.sweeps == {"learning_rate=0.001": "a", "learning_rate=0.01": "b"}
    assert "a: 1 cell, 3 runs, 3 done." in made.said and "0 cells and 0 runs are in more than one sweep." in made.said
    assert "In everything that is not swept the sweeps' configurations are equal." in made.said


def test_one_identity_is_one_run_and_one_configuration_one_cell(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    b.add(0.001, 1, 2.0, cell="called otherwise")
    b.add(0.001, 4, 2.3, cell="called otherwise")
    made = found(a, b)
    cell = next(c for c in made.board.cells if c.name == "learning_rate=0.001")
    assert len(made.board.cells) == 2 and cell.values == {1: 2.0, 2: 2.2, 3: 2.1, 4: 2.3}
    assert made.sweeps["learning_rate=0.001"] == "a, b"
    assert "1 cell and 1 run are in more than one sweep; such a run counts once." in made.said
    assert not any("ended differently" in said for said in made.said)


def test_a_run_that_is_done_in_one_sweep_alone_is_taken_from_there(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    a.add(0.1, 1, None)
    b.add(0.1, 1, 3.0, baseline=True)
    made = found(a, b)
    cell = next(c for c in made.board.cells if c.name == "learning_rate=0.1")
    assert cell.values == {1: 3.0} and cell.baseline and len(cell.runs) == 1


def test_one_identity_with_two_results_is_warned_of(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    b.add(0.001, 2, 2.2000001)
    made = found(a, b)
    assert any("1 run of one identity ended differently in two sweeps" in said for said in made.said)
    assert next(c for c in made.board.cells if c.baseline).values[2] == 2.2


def test_unlike_sweeps_are_not_compared_silently(tmp_path: Path) -> None:
    a, b = pair(tmp_path, model__n_layer=4, run__content={"data": "d2"}, train__log_interval=1, runner__root="/b")
    for seed in (1, 2):
        b.add(0.001, seed, 1.5)
    for folder, version in ((a, "2.13"), (b, "2.11")):
        folder.add(
            0.5, 9, 9.0, provenance={"versions": {"torch": version}, "device": "cpu: x", "dirty": version == "2.11"}
        )
    made = found(a, b)
    assert "Warning: the sweeps were trained on different content: data (a: d1; b: d2)." in made.said
    assert "Warning: not swept, but different: model.n_layer (a: 2; b: 4)." in made.said
    assert "Where results come from differs: versions.torch (a: 2.13; b: 2.11)." in made.said
    warned = " ".join(said for said in made.said if said.startswith(("Warning", "Where")))
    assert not any(word in warned for word in ("log_interval", "root", "dirty"))
    names = {cell.name for cell in made.board.cells}  # equal names of unlike cells are told apart
    assert {"learning_rate=0.001", "learning_rate=0.001 [b]"} <= names


def test_a_swept_key_that_covers_the_others_value_is_no_difference(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    b.add(0.001, 1, 2.0)
    assert "In everything that is not swept the sweeps' configurations are equal." in found(a, b).said


def test_cells_without_a_configuration_are_matched_with_no_other(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    b.add(0.5, 1, 1.0, cell="learning_rate=0.001", unwritten=True)
    made = found(a, b)
    assert "learning_rate=0.001 [b]" in made.sweeps
    assert any("Of 1 cell no config.yaml can be read" in said for said in made.said)


def test_objectives_that_differ_are_told(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    fast = Folder(tmp_path / "fast", {"metric": "tokens_per_second", "mode": "max"})
    fast.add(0.2, 1, 1.0)
    made = found(fast, a, b)
    assert any("compared is tokens_per_second (max), fast's" in said for said in made.said)


def test_the_command_prints_a_table_markdown_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(folder.close()) for folder in pair(tmp_path)]
    assert door.main(["compare", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["#", "cell", "val_loss"] and "sweeps" in lines[0]
    assert lines[1].split()[1:3] == ["learning_rate=0.01", "1.9000"] and " b " in f"{lines[1]} "
    file = tmp_path / "all.csv"
    assert door.main(["compare", *folders, "--markdown", "--csv", str(file)]) == 0
    out = capsys.readouterr().out
    assert "| 1 | learning\\_rate=0.01 | 1.9000 |" in out and "* a: 1 cell, 3 runs, 3 done." in out
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["cell"], row["sweeps"]) for row in rows] == [("learning_rate=0.01", "b"), ("learning_rate=0.001", "a")]


def test_one_sweep_or_none_is_refused(tmp_path: Path) -> None:
    a, _ = pair(tmp_path)
    a.close()
    with pytest.raises(ConfigError, match="at least two sweeps"):
        compare.compare([a.folder, a.folder / ".." / "a"])
    with pytest.raises(ConfigError, match="is not the folder of a sweep"):
        compare.compare([a.folder, tmp_path])
