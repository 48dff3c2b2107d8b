"""Checkpoints: whole or not at all, the newest that can be read, tensors and plain data only."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convert.__main__
import convert.places
import sample
import train
from core.saved import Damaged, read
from core.weights import load_weights, weights
from core.yaml_files import ConfigError
from engine import checkpoint
from engine.base import load_base
from engine.checkpoint import PARTS, latest, resumed, save

ROOT = Path(__file__).parents[1]


def state(iteration: int) -> dict[str, Any]:
    return {"iter": iteration, "best_val_loss": None, "pending": [0.1]}


def tensors(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3, 4), value), "scalar": torch.tensor(value), "strided": torch.arange(6.0).view(2, 3).T}


def put(root: Path, *iterations: int) -> None:
    for i in iterations:
        save(root, i, tensors(i), {"exp_avg/w": torch.full((3, 4), -float(i))}, state(i))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    put(tmp_path, 7)
    found = latest(tmp_path)
    assert found is not None and found.state == state(7)
    for name, tensor in tensors(7).items():
        assert torch.equal(found.model()[name], tensor)
    assert torch.equal(found.optimizer()["exp_avg/w"], torch.full((3, 4), -7.0))
    assert latest(tmp_path / "nothing") is None


def test_the_newest_two_are_kept_in_the_order_of_numbers(tmp_path: Path) -> None:
    put(tmp_path, 3, 6, 9)
    assert names(tmp_path) == ["00000006", "00000009"]
    put(
        tmp_path, 99_999_999, 123_456_789, 100_000_004
    )  # the last is earlier: what lay after it is a past that was left
    assert names(tmp_path) == ["100000004", "99999999"]
    found = latest(tmp_path)
    assert found is not None and found.state["iter"] == 100_000_004


@pytest.mark.parametrize("call", [0, 1])
def test_a_save_that_fails_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    put(tmp_path, 3)
    calls: list[Path] = []

    def failing(content: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == call + 1:
            path.write_bytes(b"half of")
            raise OSError("No space left on device")
        save_file(content, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", failing)
        with pytest.raises(OSError, match="No space"):
            put(tmp_path, 6)
    found = latest(tmp_path)
    assert found is not None and found.state["iter"] == 3
    put(tmp_path, 6)
    assert names(tmp_path) == ["00000003", "00000006"], "nothing half written is left"


def test_a_save_that_dies_before_its_rename_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 3)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            put(tmp_path, 6)
    found = latest(tmp_path)
    assert found is not None and found.state["iter"] == 3


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_one_falls_back_to_the_one_before(tmp_path: Path, part: str, damage: str) -> None:
    put(tmp_path, 3, 6)
    file = tmp_path / "00000006" / part
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "empty":
        os.truncate(file, 0)
    else:
        file.unlink()
    found = latest(tmp_path)
    assert found is not None and found.state["iter"] == 3
    assert torch.equal(found.model()["w"], torch.full((3, 4), 3.0))
    put(tmp_path, 5)
    assert names(tmp_path) == ["00000003", "00000005"], "the damaged one is gone and does not count among the two"


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def damages(folder: Path, count: int) -> Iterator[Path]:
    """Damages a file of a checkpoint in one way after another, mended between them: `count` bits flipped and `count` lengths for
    each file, and each file taken away."""
    draw = random.Random(7)
    for name in FILES:
        file = folder / name
        whole = file.read_bytes()
        for _ in range(count):
            flip(file, draw.randrange(8 * len(whole)))
            yield file
            file.write_bytes(whole[: draw.randrange(len(whole))])
            yield file
            file.write_bytes(whole)
        file.unlink()
        yield file
        file.write_bytes(whole)


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, 3, 6)
    seen = 0
    for file in damages(tmp_path / "00000006", 40):
        found = latest(tmp_path, PARTS)
        assert found is not None and found.state == state(3), f"{file}: {file.read_bytes()!r}"
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith(f"{file}: it") and second == "That of iteration 3 is used instead."
        seen += 1
    assert seen == 3 * 81
    found = latest(tmp_path, PARTS)
    assert found is not None and found.state == state(6) and capsys.readouterr().err == "", "it is mended"


def test_each_bit_of_the_state_counts(tmp_path: Path) -> None:
    """Also those whose change leaves JSON: the names of keys, digits, and what tells old checkpoints from new ones."""
    put(tmp_path, 6)
    file = tmp_path / "00000006" / "state.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        file.write_bytes(whole)
        flip(file, bit)
        with pytest.raises(Damaged):
            read(file.parent)
            raise AssertionError(file.read_bytes())
    file.write_bytes(whole)
    assert read(file.parent).state == state(6)


def test_content_is_read_where_it_will_be_used_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, 3, 6)
    file = tmp_path / "00000006" / "optimizer.safetensors"
    flip(file, 8 * file.stat().st_size - 1)
    for parts, iteration in (((), 6), (["model"], 6), (["optimizer"], 3), (PARTS, 3)):
        found = latest(tmp_path, parts)
        assert found is not None and found.state["iter"] == iteration
    assert capsys.readouterr().err.count("is used instead") == 2
    file.unlink()
    for parts, iteration in (((), 3), (["model"], 6)):
        found = latest(tmp_path, parts)
        assert found is not None and found.state["iter"] == iteration
    assert capsys.readouterr().err == "", "whoever only asks whether there is one is told nothing"


def test_checkpoints_without_checksums_are_read(tmp_path: Path) -> None:
    """Those from before there were any, and those whose tensors somebody has edited."""
    put(tmp_path, 3, 6)
    file = tmp_path / "00000006" / "state.json"
    for written in (state(6), {"state": state(6)}):
        save_file({"w": torch.full((3, 4), 8.0)}, tmp_path / "00000006" / "model.safetensors")
        file.write_text(json.dumps(written))
        found = resumed(tmp_path)
        assert (
            found is not None and found.state == state(6) and torch.equal(found.model()["w"], torch.full((3, 4), 8.0))
        )
    for written in ({"state": state(6), "checksums": {}}, {"state": []}, {"state": state(6), "more": 1}):
        file.write_text(json.dumps(written))
        found = latest(tmp_path)
        assert found is not None and found.state == state(3), written


def test_a_run_puts_damaged_checkpoints_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, 3, 6)
    flip(tmp_path / "00000006" / "model.safetensors", 2000)
    for _ in range(2):  # who asks again is told nothing new
        found = resumed(tmp_path)
        assert found is not None and found.state == state(3)
    assert capsys.readouterr().err.count("00000006") == 2, "the file, and where its checksum is"
    assert names(tmp_path) == ["00000003", "damaged-00000006"]
    flip(tmp_path / "00000003" / "state.json", 9)
    assert resumed(tmp_path) is None
    assert capsys.readouterr().err.endswith("No earlier one can be used.\n")
    put(tmp_path, 7)
    assert names(tmp_path) == ["00000007"]


def test_state_is_strict_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save(tmp_path, 1, tensors(1), {}, {"iter": 1, "train_loss": float("nan")})
    (tmp_path / "00000004").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "00000002").mkdir()
    for name in ("model", "optimizer"):
        save_file({}, tmp_path / "00000002" / f"{name}.safetensors")
    (tmp_path / "00000002" / "state.json").write_text(json.dumps(["no mapping"]))
    assert latest(tmp_path) is None


class Tied(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)


def test_a_tied_weight_is_saved_once() -> None:
    model = Tied()
    assert set(weights(model)) == {
        "first.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    other = Tied()
    load_weights(other, {name: tensor.clone() for name, tensor in weights(model).items()})
    assert torch.equal(other.second.weight, model.first.weight)
    assert other.second.weight is other.first.weight


def test_weights_of_another_model_are_refused() -> None:
    model = Tied()
    saved = {name: tensor.clone() for name, tensor in weights(Tied(5)).items()}
    saved["extra"] = saved.pop("norm.bias")
    before = model.first.weight.clone()
    with pytest.raises(ValueError) as error:
        load_weights(model, saved)
    told = str(error.value)
    assert "missing norm.bias" in told and "left over extra" in told and "first.weight is [5, 5], not [4, 4]" in told
    assert torch.equal(model.first.weight, before), "nothing was loaded"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return runs.tiny_corpus(tmp_path / "data")


def test_a_run_does_not_continue_another_model(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, train__max_iters=1)
    assert runs.drive(runs.make(tmp_path / "run", config, corpus)) == "done"
    wider, _ = runs.read(root, train__max_iters=1, model__n_embd=32)
    with pytest.raises(ConfigError, match=r"weights are of another model: .* not \[.*Remove .*checkpoint to start"):
        runs.make(tmp_path / "run", wider, corpus)
    muon, _ = runs.read(root, train__max_iters=1, optimizer={"variant": "muon"})
    with pytest.raises(
        ConfigError, match=r"qkv.weight\[q\] was trained by adamw and is now to be trained by muon, .*Remove"
    ):
        runs.make(tmp_path / "run", muon, corpus)
    file = next((tmp_path / "run/checkpoint").glob("*/state.json"))
    file.write_text(json.dumps({"state": {**json.loads(file.read_text())["state"], "unknown": 1}}))
    with pytest.raises(ConfigError, match="unexpected keyword argument 'unknown'"):
        runs.make(tmp_path / "run", config, corpus)


def test_a_run_with_damaged_checkpoints_is_still_the_undisturbed_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the newest that is flipped, cut or gone: back to the one before. All of them: back to nothing, which is said."""
    config, corpus = runs.read(root)
    assert runs.drive(runs.make(tmp_path / "whole", config, corpus)) == "done"
    first = runs.make(tmp_path / "stopped", config, corpus)
    assert runs.drive(first, lambda: first.state.iter == 5) == "stopped"

    def continued(expected: int) -> str:
        run = runs.make(tmp_path / "parts", config, corpus)
        assert run.state.iter == expected
        assert runs.drive(run) == "done"
        assert runs.saved_bytes(tmp_path / "parts") == runs.saved_bytes(tmp_path / "whole")
        assert runs.records(tmp_path / "parts") == runs.records(tmp_path / "whole")
        shutil.rmtree(tmp_path / "parts")
        return capsys.readouterr().err

    for file in damages(tmp_path / "stopped/checkpoint/00000005", 1):
        shutil.copytree(tmp_path / "stopped", tmp_path / "parts")
        told = continued(3)
        assert f"parts/checkpoint/00000005/{file.name}: it" in told and "That of iteration 3 is used" in told
    shutil.copytree(tmp_path / "stopped", tmp_path / "parts")
    for name in ("00000003/optimizer.safetensors", "00000005/model.safetensors"):
        file = tmp_path / "parts/checkpoint" / name
        flip(file, 8 * file.stat().st_size - 1)
    told = continued(0)
    assert told.count("its checksum differs") == 2 and "No earlier one can be used." in told


def test_nobody_uses_damaged_weights(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other programs fall back too; but a run does not start from another's earlier weights than those its identity names."""
    assert (
        train.main(["--config", str(runs.write(tmp_path / "x.yaml", runs.tree(root, runner__root=str(tmp_path))))]) == 0
    )
    (folder,) = (p.parent for p in tmp_path.glob("x/*/result.json"))
    capsys.readouterr()
    file = folder / "checkpoint/00000008/model.safetensors"
    flip(file, 8 * file.stat().st_size - 1)
    before = load_file(folder / "checkpoint/00000006/model.safetensors")
    model, _ = sample.load(folder, torch.device("cpu"), False)
    for made in (weights(model), weights(convert.places.load(folder))):
        assert all(torch.equal(made[name], tensor) for name, tensor in before.items())
    assert capsys.readouterr().err.count("That of iteration 6 is used instead.") == 2
    with pytest.raises(ConfigError, match=r"model.safetensors: it is not what .* No run starts from damaged weights"):
        load_base(model, str(folder))
    words = [f"train.init_from={folder}", f"data.root={root}", "--dry-run"]
    assert train.main(words) == 2
    assert re.search(r"train.init_from: the checkpoint of the run .* is damaged .*Remove", capsys.readouterr().err)


def test_a_run_s_checkpoint_holds_tensors_and_plain_data(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, train__max_iters=3, model__dropout=0.1)
    run = runs.make(tmp_path / "run", config, corpus)
    assert runs.drive(run) == "done"
    folders = sorted((tmp_path / "run/checkpoint").iterdir())
    assert [folder.name for folder in folders] == ["00000003"]
    assert names(folders[0]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    saved = load_file(folders[0] / "model.safetensors")
    assert "head.weight" not in saved and "wte.weight" in saved, "the tied weight has one name"
    assert sum(t.numel() for t in saved.values()) == run.result()["parameters"]
    optimizer = load_file(folders[0] / "optimizer.safetensors")
    kinds = ("steps", "adamw.steps", "adamw.exp_avg", "adamw.exp_avg_sq")
    assert set(optimizer) == {f"{kind}/{name}" for name in saved for kind in kinds}
    assert optimizer["steps/h.0.attn.qkv.weight"].tolist() == [3, 3, 3], "one count for each slice"
    assert all(optimizer[f"adamw.exp_avg/{name}"].shape == t.shape for name, t in saved.items())


def test_nothing_here_can_run_code_from_a_file() -> None:
    """No pickle: neither the module nor torch's functions that use it."""
    for folder in ("core", "engine", "lab"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {"pickle", "marshal", "shelve", "joblib"} & {name.split(".")[0] for name in imported}, path
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                    assert node.attr not in ("load", "save"), path


def test_a_full_disk_is_told_in_a_sentence_and_gets_its_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, corpus = runs.read(runs.tiny_corpus(tmp_path / "data"))
    run = runs.make(tmp_path / "run", config, corpus)
    run.save()

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    run.state.iter = 3
    with pytest.raises(ConfigError, match=r"checkpoint of iteration 3 could not be written \(No space left.*Make room"):
        run.save()
    assert [p.name for p in (tmp_path / "run/checkpoint").iterdir()] == ["00000000"]
