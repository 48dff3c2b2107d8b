"""What README says holds: its files, its commands, its sweep, its plugin."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shipped import small_corpora

import train
from lab.__main__ import COMMANDS
from variations.norm import NORMS

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
SWEEPS = (REPOSITORY / "docs/sweeps.md").read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(README)


def block(start: str) -> str:
    (found,) = (text for _, text in BLOCKS if text.startswith(start))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """README's files in an otherwise empty folder, and small data."""
    made = tmp_path_factory.mktemp("readme")
    before, modules = dict(NORMS), set(sys.modules)
    (made / "my_sweep.yaml").write_text(block("# my_sweep.yaml"))
    (made / "my_slices.yaml").write_text(block("# my_slices.yaml"))
    (made / "my_variations.py").write_text(block("# my_variations.py"))
    (made / "plugged.yaml").write_text(block("plugins:"))
    small_corpora(made / "data")
    yield made
    NORMS.clear()  # plugins add to the dictionaries of this process
    NORMS.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("slicewise_plugin"):
            del sys.modules[name]


def commands() -> list[list[str]]:
    lines = [line for _, text in BLOCKS for line in text.splitlines() if line.startswith("python train.py")]
    return [shlex.split(line, comments=True)[2:] for line in lines]


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    assert README.count("\n") <= 200
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_the_map_names_every_room() -> None:
    rooms = [p.name for p in REPOSITORY.iterdir() if (p / "__init__.py").exists() or p.suffix == ".py"]
    for room in rooms:
        assert room.removesuffix(".py") in README, room


@pytest.mark.parametrize("words", commands(), ids=lambda w: " ".join(w)[:60])
def test_its_commands_are_understood(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if "--list" not in words:
        words = [
            *words,
            f"data.root={folder}/data",
            *([] if "--slices" in words or "--dry-run" in words else ["--dry-run"]),
        ]
    assert train.main(words) == 0


@pytest.mark.parametrize("text", [t for kind, t in FENCED.findall(SWEEPS) if kind == "yaml"], ids=lambda t: t[:20])
def test_the_files_about_sweeps_compose(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("more.yaml").write_text(text)
    assert train.main(["--config", "more.yaml", "--dry-run", f"data.root={folder}/data"]) == 0


def test_the_commands_about_sweeps_are_there() -> None:
    assert set(re.findall(r"^python -m lab (\w+)", SWEEPS, re.MULTILINE)) == set(COMMANDS)
    for target in re.findall(r"\]\(([^)]+)\)", SWEEPS):
        assert (REPOSITORY / "docs" / target).exists(), target


def test_its_example_of_a_mistake_is_what_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.yaml").write_text("\n" * 5 + "model:\n  norm: rmsnrom\n")
    assert train.main(["--config", str(folder / "x.yaml"), f"data.root={folder}/data"]) == 2
    said = capsys.readouterr().err.strip().replace(f"{folder}/", "")
    assert f"`{said}`" in README


def test_its_sweep_is_what_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert train.main(["--config", "my_sweep.yaml", "--dry-run", "--json", f"data.root={folder}/data"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["cells"], len(listed["runs"])) == (6, 18)


def test_its_rules_are_what_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    data = f"data.root={folder}/data"
    assert train.main(["--config", "my_slices.yaml", "--slices", "--json", data, "slices.adapt.lora.rank=4"]) == 0
    rows = {row["address"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["h.3.attn.qkv.weight[k]"]["lr_scale"] == pytest.approx(0.1 * 0.3)
    assert rows["h.3.attn.qkv.weight[k]"]["weight_decay"] == 0.0
    assert rows["h.1.attn.qkv.weight[v]"]["init"] == "normal(std=0.005)"
    assert rows["h.0.attn.proj.weight"]["frozen"] and not rows["h.0.mlp.up.weight"]["frozen"]
    assert rows["h.0.mlp.up.weight"]["optimizer"] == "muon" and rows["h.1.attn.proj.weight"]["optimizer"] == "adamw"
    assert {a for a in rows if "lora" in a and a.startswith("h.2")} == {
        f"h.2.attn.qkv[{part}].lora_{x}" for part in "qv" for x in "ab"
    }


def test_its_plugin_trains(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    small = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "train.max_iters=2", "train.eval_iters=1"]
    words = ["--config", "plugged.yaml", *small, f"data.root={folder}/data", "tracking.wandb.mode=off"]
    assert train.main(words) == 0
    results = [json.loads(p.read_text()) for p in folder.glob("runs/plugged/*/result.json")]
    assert sorted(r["cell"] for r in results) == ["norm=dyt", "norm=layernorm"]
    assert {r["status"] for r in results} == {"done"}
