"""`train.init_from`: what it may name, what it does to the identity, and that bases are trained before runs start from them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import lab.listing
import train
from core.yaml_files import ConfigError
from core.yaml_files import load_file as load_yaml
from engine.base import load_base
from lab.claim import exclusive
from lab.expand import Run
from lab.listing import Listing, load_run, open_listing
from model import GPT
from sample import load

Captured = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Bench:
    """A folder, the current one, with files over a tiny corpus; runs go to `runs` in it."""

    home: Path
    data: Path

    def write(self, name: str, **changes: Any) -> Path:
        """A configuration of four iterations, with changes by key ('__' for '.')."""
        return runs.write(self.home / name, runs.tree(self.data, **{"train__max_iters": 4, **changes}))

    def listed(self, name: str, *words: str) -> Listing:
        return open_listing(Path(name), words)

    def one(self, name: str, *words: str) -> Run:
        (run,) = self.listed(name, *words).runs
        return run

    def wrong(self, name: str, *words: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.listed(name, *words)
        return caught.value.sentences

    def run(self, name: str, *words: str) -> int:
        return train.main(["--config", name, *words])

    def folder(self, name: str) -> Path:
        """The folder of the only run of a file."""
        (made,) = (self.home / "runs" / name).glob("*/config.yaml")
        return made.parent

    def result(self, name: str) -> dict[str, Any]:
        made: dict[str, Any] = json.loads((self.folder(name) / "result.json").read_text())
        return made


@pytest.fixture
def bench(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    (tmp_path / "home").mkdir()
    (tmp_path / "shipped" / "explorations").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(lab.listing, "LIBRARY", tmp_path / "shipped" / "explorations")
    made = Bench(tmp_path / "home", data)
    made.write("base.yaml")
    return made


def changed_weights(folder: Path, edit: Any) -> None:
    """Edits the newest checkpoint's tensors, and takes out its checksums as somebody would who does that on purpose."""
    newest = max((folder / "checkpoint").iterdir())
    tensors = load_file(newest / "model.safetensors")
    edit(tensors)
    save_file(tensors, newest / "model.safetensors")
    written = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({"state": written["state"]}))


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# Training -------------------------------------------------------------------------------------------------------------------


def test_the_base_is_trained_first_and_then_reused(bench: Bench, capsys: Captured) -> None:
    bench.write("tuned.yaml", train__init_from="base.yaml", optimizer__learning_rate=0.001)
    assert bench.run("tuned.yaml", "--dry-run") == 0
    assert re.search(r"trained first.*runs/base/run-\w{10} \(.*base\.yaml\)", capsys.readouterr().out)
    assert bench.run("tuned.yaml", "--dry-run", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"cells", "excluded", "duplicates", "done", "runs"}
    assert not (bench.home / "runs").exists()

    assert bench.run("tuned.yaml") == 0
    base, tuned = bench.folder("base"), bench.folder("tuned")
    assert bench.result("base")["status"] == bench.result("tuned")["status"] == "done"
    first = runs.records(tuned, "eval")[0]
    assert (first["iter"], first["val_loss"]) == (0, bench.result("base")["val_loss"]), "it starts where the base ended"
    assert runs.records(tuned, "eval")[1]["val_loss"] != first["val_loss"], "and then learns"
    written = load_yaml(tuned / "config.yaml").tree
    assert written["train"]["init_from"] == str(bench.home / "base.yaml") and written["run"]["base"] == str(base)
    assert written["run"]["content"]["init_from"] == base.name.rpartition("-")[2]

    before = stamps(base) | stamps(tuned)
    bench.write("again.yaml", train__init_from="base.yaml", optimizer__learning_rate=0.002)
    assert bench.run("tuned.yaml") == 0 and bench.run("again.yaml") == 0
    assert stamps(base) | stamps(tuned) == before, "nothing was trained twice"
    capsys.readouterr()
    assert bench.run("again.yaml", "--dry-run") == 0 and "trained first" not in capsys.readouterr().out


def test_a_run_folder_gives_its_newest_weights(bench: Bench) -> None:
    assert bench.run("base.yaml") == 0
    base = bench.folder("base")
    bench.write("tuned.yaml", train__init_from=str(base.relative_to(bench.home)), optimizer__learning_rate=1e-30)
    assert bench.run("tuned.yaml") == 0
    assert runs.records(bench.folder("tuned"), "eval")[0]["val_loss"] == bench.result("base")["val_loss"]
    assert runs.saved_bytes(bench.folder("tuned"))["model"] == runs.saved_bytes(base)["model"]


def test_a_base_may_have_a_base_and_axes_name_several(bench: Bench) -> None:
    bench.write("second.yaml", train__init_from="base.yaml", train__seed=5)
    bench.write("other.yaml", train__seed=6)
    bench.write("s.yaml", sweep={"grid": {"train.init_from": ["second.yaml", "other.yaml", None]}})
    listing = bench.listed("s.yaml")
    assert [run.cell for run in listing.runs] == ["init_from=second.yaml", "init_from=other.yaml", "init_from=null"]
    assert bench.run("s.yaml") == 0
    started = {}
    for run in listing.runs:
        first, *_ = runs.records(listing.path(run), "eval")
        started[run.cell] = first["val_loss"]
    assert started["init_from=second.yaml"] == bench.result("second")["val_loss"]
    assert started["init_from=other.yaml"] == bench.result("other")["val_loss"]
    first, *_ = runs.records(bench.folder("second"), "eval")
    assert first["val_loss"] == bench.result("base")["val_loss"]
    assert started["init_from=null"] not in (list(started.values())[:2])


def test_a_base_that_does_not_end_as_done_is_an_error(bench: Bench, capsys: Captured) -> None:
    bench.write("wild.yaml", optimizer__learning_rate=1e30, train__grad_clip=None)
    bench.write("tuned.yaml", train__init_from="wild.yaml")
    for _ in range(2):
        assert bench.run("tuned.yaml") == 1
        told = capsys.readouterr().err
        assert re.search(r"its runs start from runs/wild/run-\w+, which ended as diverged\. Mend wild\.yaml", told)
    assert not list((bench.home / "runs" / "tuned").glob("*/config.yaml")), "nothing else was started"


def test_a_finished_base_without_its_checkpoint_is_told(bench: Bench, capsys: Captured) -> None:
    bench.write("tuned.yaml", train__init_from="base.yaml")
    assert bench.run("base.yaml") == 0
    shutil.rmtree(bench.folder("base") / "checkpoint")
    assert bench.run("tuned.yaml") == 1
    assert "which is done but has no checkpoint. Mend base.yaml, or remove that folder" in capsys.readouterr().err


def test_another_runner_on_the_base_is_told(bench: Bench, capsys: Captured) -> None:
    bench.write("tuned.yaml", train__init_from="base.yaml")
    (bench.home / "runs" / "base").mkdir(parents=True)
    with exclusive(bench.home / "runs" / "base"):
        assert bench.run("tuned.yaml") == 1
    told = capsys.readouterr().err
    assert "runs/base: another runner is at work on this sweep" in told and "its runs start from" not in told


def test_a_run_with_a_checkpoint_no_longer_needs_its_base(bench: Bench) -> None:
    bench.write("tuned.yaml", train__init_from="base.yaml")
    assert bench.run("tuned.yaml") == 0
    tuned, loss = bench.folder("tuned"), bench.result("tuned")["val_loss"]
    shutil.rmtree(bench.home / "runs" / "base")
    load(tuned, torch.device("cpu"), plugins=False)
    (tuned / "result.json").unlink()
    shutil.rmtree(max((tuned / "checkpoint").iterdir()))  # back to iteration 3
    assert bench.run("tuned.yaml") == 0
    assert bench.result("tuned")["val_loss"] == loss and not (bench.home / "runs" / "base").exists()


def test_a_trial_checks_that_its_base_is_still_what_it_was(bench: Bench) -> None:
    assert bench.run("base.yaml") == 0
    base = bench.folder("base")
    bench.write("tuned.yaml", train__init_from=str(base))
    assert bench.run("tuned.yaml") == 0
    tuned = bench.folder("tuned")
    shutil.rmtree(tuned / "checkpoint")
    load_run(tuned, plugins=False)
    changed_weights(base, lambda tensors: tensors["wte.weight"].add_(1))
    with pytest.raises(ConfigError, match="'init_from' has another content than when the run was listed"):
        load_run(tuned, plugins=False)
    shutil.rmtree(base / "checkpoint")
    with pytest.raises(ConfigError, match=r"starts from .*, which holds no finished run"):
        load_run(tuned, plugins=False)


def test_a_trial_does_not_start_from_a_half_trained_file(bench: Bench) -> None:
    bench.write("tuned.yaml", train__init_from="base.yaml")
    assert bench.run("tuned.yaml") == 0
    tuned = bench.folder("tuned")
    shutil.rmtree(tuned / "checkpoint")
    load_run(tuned, plugins=False)
    (bench.folder("base") / "result.json").unlink()
    with pytest.raises(ConfigError, match="which holds no finished run"):
        load_run(tuned, plugins=False)


# Identity -------------------------------------------------------------------------------------------------------------------


def test_the_content_is_the_identity_and_not_the_path(bench: Bench) -> None:
    bench.write("tuned.yaml", train__init_from="base.yaml")
    bench.write("deeper/copy.yaml")
    bench.write("other.yaml", train__seed=9)
    bench.write("scratch.yaml")
    run = bench.one("tuned.yaml")
    assert bench.one("tuned.yaml", "train.init_from=deeper/copy.yaml").hash == run.hash
    others = {bench.one("tuned.yaml", f"train.init_from={name}").hash for name in ("other.yaml", "null")}
    assert len({run.hash, *others}) == 3 and bench.one("scratch.yaml").hash in others
    assert bench.one("tuned.yaml", "train.init_from=other.yaml").cell_hash != run.cell_hash
    bench.write("base.yaml", train__batch_size=5)
    assert bench.one("tuned.yaml").hash != run.hash, "what the file says counts"


def test_the_content_of_a_run_folder_is_its_newest_weights(bench: Bench) -> None:
    assert bench.run("base.yaml") == 0
    base = bench.folder("base")
    shutil.copytree(base, bench.home / "moved")
    bench.write("tuned.yaml", train__init_from=str(base))
    run = bench.one("tuned.yaml")
    assert bench.one("tuned.yaml", "train.init_from=moved").hash == run.hash
    changed_weights(bench.home / "moved", lambda tensors: tensors["ln_f.weight"].mul_(2))
    assert bench.one("tuned.yaml", "train.init_from=moved").hash != run.hash
    assert bench.one("tuned.yaml").hash == run.hash


# Paths ----------------------------------------------------------------------------------------------------------------------


def test_where_paths_are_looked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str, *words: str) -> str:
        return str(bench.one(name, *words).config.train.init_from)

    inner, shipped = bench.home / "sub" / "base.yaml", lab.listing.LIBRARY / "shipped.yaml"
    bench.write("sub/tuned.yaml", train__init_from="base.yaml")
    assert named("sub/tuned.yaml") == str(bench.home / "base.yaml"), "the current folder"
    bench.write("sub/base.yaml", train__seed=2)
    assert named("sub/tuned.yaml") == str(inner), "beside the file, which comes first"
    assert named("sub/tuned.yaml", "train.init_from=base.yaml") == str(bench.home / "base.yaml"), "the command line"
    assert named("sub/tuned.yaml", "train={init_from: base.yaml}") == str(bench.home / "base.yaml")
    assert named("sub/tuned.yaml", "train.init_from=sub/base.yaml") == str(inner)
    runs.write(shipped, runs.tree(bench.data))
    assert named("sub/tuned.yaml", "train.init_from=null", "name=x") == "None"
    bench.write("sub/library.yaml", train__init_from="shipped.yaml")
    assert named("sub/library.yaml") == str(shipped)
    (bench.home / "presets").mkdir()
    (bench.home / "presets/start.yaml").write_text("# @package _global_\ntrain: {init_from: ../sub/base.yaml}\n")
    runs.write(bench.home / "composed.yaml", {**runs.tree(bench.data), "defaults": ["presets/start", "_self_"]})
    assert named("composed.yaml") == str(inner), "a preset's is relative to the preset"
    monkeypatch.chdir(bench.home / "sub")
    assert [run.cell for run in bench.listed("tuned.yaml", "train.init_from=base.yaml,../base.yaml").runs] == [
        "init_from=base.yaml",
        "init_from=../base.yaml",
    ]


def test_axes_and_cases_name_paths_relative_to_the_sweep(bench: Bench) -> None:
    bench.write("sub/a.yaml", train__seed=2)
    sweep = {"cases": {"plain": {}, "from_a": {"set": {"train.init_from": "a.yaml"}}}}
    bench.write("sub/s.yaml", sweep={**sweep, "baseline": {"case": "plain"}})
    named = [run.config.train.init_from for run in bench.listed("sub/s.yaml").runs]
    assert named == [None, str(bench.home / "sub/a.yaml")]


def test_what_is_nowhere_is_told_with_its_line_and_near_names(bench: Bench) -> None:
    (bench.home / "x.yaml").write_text(f"data: {{dataset: tiny, root: {bench.data}}}\ntrain:\n  init_from: bse.yaml\n")
    (told,) = bench.wrong("x.yaml")
    assert told.startswith(
        "train.init_from: there is no 'bse.yaml' (x.yaml:3). Did you mean 'base.yaml'? Known: base.yaml"
    )
    assert told.endswith("beside the file, then in the current folder, then in explorations/.")
    (told,) = bench.wrong("base.yaml", "train.init_from=runs/base/run-1")
    assert "there is no 'runs/base/run-1' (command line)" in told
    (bench.home / "runs/base/run-12").mkdir(parents=True)
    assert "Did you mean 'runs/base/run-12'?" in bench.wrong("base.yaml", "train.init_from=runs/base/run-1")[0]
    assert "Known: runs." in bench.wrong("base.yaml", "train.init_from=run/base/run-1")[0]
    bench.write("s.yaml", sweep={"grid": {"train.init_from": ["base.yaml", "bse.yaml"]}})
    assert [x for x in bench.wrong("s.yaml") if x.startswith("train.init_from: there is no 'bse.yaml' (s.yaml:1)")]
    (bench.home / "y.yaml").write_text("train: {init_from: bse.yaml}\nmodel: {n_layer: 0}\ndata: {dataset: nope}\n")
    assert len(bench.wrong("y.yaml")) == 3, "with every other mistake"


# What it may not name -------------------------------------------------------------------------------------------------------


def test_what_is_no_base_is_told(bench: Bench) -> None:
    bench.write("two.yaml", sweep={"seeds": 2})
    told = bench.wrong("base.yaml", "train.init_from=two.yaml")[0]
    assert told.startswith(
        "train.init_from: 'two.yaml' stands for 2 runs (command line). Name a file that stands for one"
    )
    (bench.home / "weights.bin").write_bytes(b"")
    assert (
        "'weights.bin' is neither a run folder nor a YAML file"
        in bench.wrong("base.yaml", "train.init_from=weights.bin")[0]
    )
    (bench.home / "empty").mkdir()
    assert "'empty' is no run folder: it holds no config.yaml" in bench.wrong("base.yaml", "train.init_from=empty")[0]
    assert bench.run("base.yaml") == 0
    told = bench.wrong("base.yaml", "train.init_from=runs/base")[0]
    assert "It is a sweep; name one of its runs, for example runs/base/run-" in told
    shutil.rmtree(bench.folder("base") / "checkpoint")
    told = bench.wrong("base.yaml", f"train.init_from={bench.folder('base')}")[0]
    assert re.search(r"the run 'runs/base/run-\w+' has no checkpoint", told)
    told = bench.wrong("base.yaml", "train.init_from=hf:gpt2")[0]
    assert "there is no 'gpt2'" in told and "`hf download NAME --local-dir FOLDER`" in told


def test_the_mistakes_of_a_base_have_their_own_places(bench: Bench) -> None:
    (bench.home / "base.yaml").write_text("model:\n  norm: rmsnrom\ntrain: {batch_size: 0}\n")
    (bench.home / "x.yaml").write_text(
        f"data: {{dataset: tiny, root: {bench.data}}}\ntrain: {{init_from: base.yaml}}\n"
    )
    first, *rest = bench.wrong("x.yaml")
    assert first == "train.init_from: 'base.yaml' has mistakes of its own (x.yaml:2). They follow."
    assert len(rest) == 2 and not any(told.endswith("..") for told in rest)
    assert any("(base.yaml:2). Did you mean 'rmsnorm'?" in told for told in rest)
    assert "train.batch_size: 0 is not >= 1 (base.yaml:3)." in rest


def test_a_base_that_leads_back_to_itself_is_refused(bench: Bench) -> None:
    bench.write("a.yaml", train__init_from="b.yaml")
    bench.write("b.yaml", train__init_from="a.yaml")
    told = bench.wrong("a.yaml")
    assert told[-1] == (
        "train.init_from: no run can start from itself, and here b.yaml from a.yaml from b.yaml (a.yaml:1). "
        "Leave it out in one of these files."
    )
    bench.write("self.yaml", train__init_from="self.yaml")
    assert "self.yaml from self.yaml (self.yaml:1)" in bench.wrong("self.yaml")[-1]
    again = bench.one("base.yaml", "train.init_from=base.yaml")
    assert again.hash != bench.one("base.yaml").hash, (
        "the file as it is written is a base of what the command line makes"
    )


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_base_of_another_model_is_refused(bench: Bench, kind: str) -> None:
    bench.write("base.yaml", model__tie_weights=False)
    base = "base.yaml"
    if kind == "folder":
        assert bench.run("base.yaml") == 0
        base = str(bench.folder("base").relative_to(bench.home))
    bench.write("x.yaml", train__init_from=base, model__tie_weights=False)
    assert bench.one("x.yaml").config.train.init_from == str(bench.home / base)
    (told,) = bench.wrong("x.yaml", "model.n_embd=32")
    head = f"train.init_from: the run cannot start from '{base}': its weights are of another model: "
    assert told.startswith(f"{head}wte.weight is [") and ", 16], not [" in told and told.endswith("more (x.yaml:1).")
    (told,) = bench.wrong("x.yaml", "model.tie_weights=true")
    assert told == f"{head}left over head.weight (x.yaml:1)."
    (told,) = bench.wrong("x.yaml", "model.n_layer=3")
    assert "missing h.2." in told
    (told,) = bench.wrong("x.yaml", "model.vocab_size=200")
    assert "wte.weight is [" in told and "not [200, 16]" in told
    bench.write("s.yaml", train__init_from=base, model__tie_weights=False, sweep={"grid": {"model.n_embd": [16, 32]}})
    (told,) = bench.wrong("s.yaml")
    assert told.startswith(f"{head}wte.weight is [")


def test_a_base_with_adapters_is_refused(bench: Bench) -> None:
    assert bench.run("base.yaml") == 0
    base = bench.folder("base")
    changed_weights(base, lambda tensors: tensors.update({"h.0.attn.qkv.adapter[q].lora_a": torch.zeros(2, 16)}))
    bench.write("x.yaml", train__init_from=str(base))
    (told,) = bench.wrong("x.yaml")
    assert re.search(r"cannot start from 'runs/base/run-\w+': it has adapters; merge them first \(x\.yaml:1\)", told)
    with pytest.raises(ConfigError, match="it has adapters; merge them first"):
        load_base(GPT(bench.one("base.yaml", "model.vocab_size=65").config.model), str(base))


def test_adapters_are_new_over_a_base_and_may_not_be_in_it(bench: Bench) -> None:
    slices = {"adapt": {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 2}}}
    bench.write("adapted.yaml", train__init_from="base.yaml", slices=slices)
    assert bench.run("adapted.yaml") == 0
    first, *_ = runs.records(bench.folder("adapted"), "eval")
    assert first["val_loss"] == bench.result("base")["val_loss"], "adapters add nothing at first"
    for base in ("adapted.yaml", str(bench.folder("adapted"))):
        bench.write("x.yaml", train__init_from=base)
        (told,) = bench.wrong("x.yaml")
        assert "it has adapters; merge them first (x.yaml:1)" in told


def test_where_results_lie_on_the_command_line_holds_of_the_base_too(bench: Bench) -> None:
    bench.write("tuned.yaml", train__init_from="base.yaml")
    assert bench.run("tuned.yaml", "runner.root=there") == 0
    assert len(list((bench.home / "there/base").glob("*/result.json"))) == 1 and not (bench.home / "runs").exists()
