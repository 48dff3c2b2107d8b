"""`python -m convert import, export, check` and `train.init_from: hf:FOLDER`, from folders that were written here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import train
from convert import huggingface
from convert.__main__ import main
from convert.commands.telling import Progress
from convert.huggingface.family import configured
from convert.table import together
from core.saved import latest
from core.weights import weights
from model import GPT, build

Captured = pytest.CaptureFixture[str]
NODE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "bias": False,
    "norm": "rmsnorm",
    "activation": "silu",
    "position": "rope",
    "mlp": {"variant": "gated", "width": 24},
}


@pytest.fixture(scope="module")
def vocabulary(data: Path) -> int:
    """Of the tests' corpus."""
    size = json.loads((data / "tiny/char/meta.json").read_text())["vocab_size"]
    assert isinstance(size, int)
    return size


@pytest.fixture(scope="module")
def made(vocabulary: int) -> GPT:
    return build(configured({**NODE, "vocab_size": vocabulary}), 5)


@pytest.fixture(scope="module")
def theirs(made: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    huggingface.write(made, "llama", folder)
    return folder


@pytest.fixture
def home(data: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file that starts from the weights, which lie beside it."""
    (tmp_path / "files").mkdir()
    shutil.copytree(theirs, tmp_path / "files" / "llama")
    tuned = runs.tree(data, name="tuned", train__init_from="hf:llama", optimizer__learning_rate=1e-30)
    tuned["model"] = dict(NODE)
    tuned["train"] |= {"max_iters": 1, "eval_interval": 1}
    tuned["runner"] = {"root": str(tmp_path / "runs")}
    runs.write(tmp_path / "files" / "tuned.yaml", tuned)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> int:
    return main([*words])


def run_of(home: Path, name: str = "tuned") -> Path:
    (found,) = (home / "runs" / name).glob("*/result.json")
    return found.parent


# Training -------------------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_a_folder(home: Path, made: GPT) -> None:
    """A path is relative to the file that says it. The rate moves nothing, so the weights are still those of the folder."""
    assert train.main(["--config", "files/tuned.yaml"]) == 0
    run = run_of(home)
    saved = latest(run / "checkpoint", ["model"])
    assert saved is not None
    own = weights(made)
    assert saved.model().keys() == own.keys()
    assert all(torch.equal(saved.model()[name], tensor) for name, tensor in own.items())
    log = (run / "attempt-1.log").read_text()
    assert f"weights of {home / 'files/llama'}" in log and "not as in" not in log


def test_a_model_may_be_another_where_weights_fit_and_that_is_told(home: Path, capsys: Captured) -> None:
    assert train.main(["--config", "files/tuned.yaml", "model.activation=gelu", "model.position.base=500"]) == 0
    out = capsys.readouterr().out
    assert "the activation is 'gelu', and the checkpoint has 'silu'" in out
    assert "base of the position is 500.0, and the checkpoint would have 10000.0" in out


def test_what_a_folder_holds_is_part_of_a_run(home: Path, capsys: Captured) -> None:
    def listed(*words: str) -> str:
        assert train.main(["--config", "files/tuned.yaml", "--dry-run", "--json", *words]) == 0
        return str(json.loads(capsys.readouterr().out)["runs"][0]["run_id"])

    first = listed()
    shutil.copytree("files/llama", "elsewhere")
    assert listed("train.init_from=hf:elsewhere") == first, (
        "where it lies is not, and the command line has its own folder"
    )
    file = home / "elsewhere/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, file)
    assert listed("train.init_from=hf:elsewhere") != first
    config = json.loads((home / "files/llama/config.json").read_text())
    (home / "files/llama/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert listed() != first


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.n_embd=32"], "the run cannot start from 'files/llama': model.layers.0.self_attn.q_proj.weight"),
        (["train.init_from=hf:nowhere"], "there is no 'nowhere' (command line). hf: is followed by a folder"),
        (["train.init_from=hf:files"], "config.json cannot be read"),
    ],
)
def test_folders_that_do_not_do(home: Path, words: list[str], told: str, capsys: Captured) -> None:
    assert train.main(["--config", "files/tuned.yaml", *words]) == 2
    wrong = capsys.readouterr().err
    assert told in wrong and wrong.count("\n") == 1 and "Traceback" not in wrong
    assert not (home / "runs").exists()


# Commands -------------------------------------------------------------------------------------------------------------------


def test_in_and_out_again(home: Path, capsys: Captured) -> None:
    """Through a run folder, from which others can start too."""
    assert command("import", "files/llama", "imported") == 0
    out = capsys.readouterr().out
    assert (
        "2 x  model.layers.*.self_attn.{q_proj,k_proj,v_proj}.weight  16 x 16 + 2 of 8 x 16  ->  h.*.attn.qkv.weight"
        in out
    )
    assert command("export", "imported", "again") == 0
    out = capsys.readouterr().out
    assert (
        "a model of the family llama" in out
        and "h.*.mlp.gate_up.weight  48 x 16" in out
        and "{gate_proj,up_proj}" in out
    )
    one, two = (load_file(Path(folder) / "model.safetensors") for folder in ("files/llama", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    configs = [json.loads((Path(folder) / "config.json").read_text()) for folder in ("files/llama", "again")]
    assert configs[0] == configs[1]
    assert train.main(["--config", "files/tuned.yaml", "train.init_from=imported"]) == 0
    assert command("check", "again", str(run_of(home))) == 0


def test_checkpoints_are_compared_in_any_format(home: Path, capsys: Captured) -> None:
    assert command("import", "files/llama", "imported") == 0
    for first, second in (("imported", "files/llama"), ("hf:files/llama", "imported"), ("imported", "imported")):
        assert command("check", first, second) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(" 0 not")
    tensors = load_file("files/llama/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    del tensors["model.norm.weight"]
    shutil.copytree("files/llama", "other")
    save_file(tensors, "other/model.safetensors")
    assert command("check", "imported", "other") == 2, "it is no whole model"
    assert "There is no 'model.norm.weight'" in capsys.readouterr().err
    tensors["model.norm.weight"] = torch.ones(16)
    save_file(tensors, "other/model.safetensors")
    assert command("check", "imported", "other") == 1
    out = capsys.readouterr().out.splitlines()
    assert out == ["h.1.mlp.gate_up.weight: 1 of 768 numbers differ, by at most 0.5", out[-1]]
    assert command("check", "imported", "other", "--tolerance", "0.51") == 0
    save_file({"ln_f.weight": torch.ones(3), "more": torch.ones(1)}, "part.safetensors")
    assert command("check", "imported", "part.safetensors") == 1
    told = capsys.readouterr().out
    assert "ln_f.weight: [16] in the first, [3] in the second" in told
    assert "more: only in the second" in told and "wte.weight: only in the first" in told


def test_what_cannot_be_done_leaves_nothing(home: Path, capsys: Captured) -> None:
    assert command("import", "files/llama", "imported") == 0
    before = sorted(path.name for path in home.iterdir())
    for words, told in (
        (("import", "files/llama", "imported"), "imported is there already"),
        (("import", "nowhere", "new"), "nowhere/config.json cannot be read"),
        (("export", "files", "new"), "files is no run folder"),
        (("export", "imported", "new", "--family", "gpt2"), "norm"),
        (("check", "imported", "nowhere"), "There is no 'nowhere'"),
    ):
        capsys.readouterr()
        assert command(*words) == 2, words
        assert told in capsys.readouterr().err
        assert sorted(path.name for path in home.iterdir()) == before
    config = json.loads((home / "files/llama/config.json").read_text())
    (home / "files/llama/config.json").write_text(json.dumps({**config, "hidden_act": "swishy"}))
    assert command("import", "files/llama", "new") == 2
    assert "hidden_act is 'swishy', and our models have gelu" in capsys.readouterr().err


def test_other_dtypes_are_told_of(home: Path, capsys: Captured) -> None:
    assert command("import", "files/llama", "imported") == 0
    assert command("export", "imported", "half", "--dtype", "bfloat16") == 0
    assert "float32 is written as bfloat16." in capsys.readouterr().out
    assert {t.dtype for t in load_file("half/model.safetensors").values()} == {torch.bfloat16}
    assert train.main(["--config", "files/tuned.yaml", "train.init_from=hf:half"]) == 0
    log = (run_of(home) / "attempt-1.log").read_text()
    assert "tensors bfloat16 to float32" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_export_that_is_stopped_leaves_no_half_of_it(home: Path, number: signal.Signals) -> None:
    """It is stopped at the first tensor that is written."""
    assert command("import", "files/llama", "imported") == 0
    script = (
        "import os, signal, sys\nfrom convert import files\nfrom convert.__main__ import main\nwas = files._bytes\n"
        "def write(*given, **more):\n    os.kill(os.getpid(), int(sys.argv[1]))\n    return was(*given, **more)\n"
        "files.write_file = write\n"
        "sys.exit(main(['export', 'imported', 'new']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(int(number))], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == (75 if number == signal.SIGINT else -9) and "Traceback" not in ended.stderr
    assert not (home / "new").exists()
    assert command("export", "imported", "new") == 0, "what is left is in nobody's way"


# Words ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["h.0.attn.qkv.weight"], "h.*.attn.qkv.weight"),
        (["a.3.q.weight", "a.3.k.weight"], "a.*.{q,k}.weight"),
        (["a.0.e.0.w1", "a.0.e.0.w3", "a.0.e.1.w1"], "a.*.e.*.{w1,w3}"),
        (["a.b", "c.d"], "a.b, c.d"),
        (["a", "b.c"], "a, b.c"),
    ],
)
def test_names_in_one_word(names: list[str], told: str) -> None:
    assert together(names) == told


def test_progress_is_for_terminals(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    with Progress("written") as told:
        told("a", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("written") as told:
        told("a", 1_000_000, 2_000_000)
        told("b", 2_000_000, 2_000_000)
    assert " 50% of 2 MB written: a" in (shown := capsys.readouterr().err) and "100% of 2 MB written: b" in shown


# Other tools ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(home: Path) -> Path:
    """A run with adapters that have learned, over weights that have not."""
    tuned = json.loads((home / "files/tuned.yaml").read_text())
    tuned["name"] = "adapted"
    tuned["optimizer"] = {"learning_rate": 0.1}
    tuned["train"] |= {"max_iters": 3}
    tuned["slices"] = {
        "adapt": {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 2, "alpha": 6}},
        "rest": {"match": "**", "frozen": True},
    }
    runs.write(home / "files/adapted.yaml", tuned)
    assert train.main(["--config", "files/adapted.yaml"]) == 0
    return run_of(home, "adapted")


def test_adapters_go_to_peft_and_come_back(home: Path, adapted: Path, capsys: Captured) -> None:
    assert command("import", "files/llama", "base") == 0
    capsys.readouterr()
    assert command("export", str(adapted), "out", "--to", "peft", "--base", "files/llama") == 0
    out = capsys.readouterr().out
    assert "model.layers.1.self_attn.v_proj.weight  <-  h.1.attn.qkv[v]  rank 2" in out
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, "files/llama")
    assert command("import", "out", "new") == 2 and "with --base RUN_DIR" in capsys.readouterr().err
    assert command("import", "out", "back", "--base", "base") == 0
    assert command("check", str(adapted), "back") == 0, "base and adapters, bit for bit"
    assert command("export", "base", "none", "--to", "peft") == 2 and not Path("none").exists()


def test_ranks_and_other_ranks(home: Path, adapted: Path, capsys: Captured) -> None:
    assert command("export", str(adapted), "merged") == 0
    assert command("export", str(adapted), "four", "--to", "ranks", "--tensor", "2", "--pipeline", "2") == 0
    assert "adapters merged: h.0.attn.qkv[q]" in capsys.readouterr().out
    assert len(list(Path("four").glob("*.safetensors"))) == 4
    assert command("check", "four", "merged") == 0
    assert command("reshard", "four", "two", "--pipeline", "2") == 0 and command("check", "two", "merged") == 0
    assert command("import", "two", "back", "--base", str(adapted)) == 0 and command("check", "back", "merged") == 0
    for words, told in (
        (("reshard", "four", "new"), "Say for how many ranks"),
        (("reshard", "four", "new", "--tensor", "3"), "3"),
        (("reshard", "four", "new", "--tensor", "0"), "tensor"),
        (("export", str(adapted), "new", "--to", "ranks"), "say for how many"),
        (("reshard", "merged", "new", "--tensor", "2"), "merged"),
    ):
        capsys.readouterr()
        assert command(*words) == 2, words
        assert told in capsys.readouterr().err and not Path("new").exists()


@pytest.mark.parametrize("sizes", [(), ("--tensor", "2")])
def test_there_and_back_with_megatron(home: Path, sizes: tuple[str, ...], capsys: Captured) -> None:
    assert command("import", "files/llama", "base") == 0
    capsys.readouterr()
    assert command("export", "base", "core", "--to", "megatron", *sizes) == 0
    table = next(line for line in capsys.readouterr().out.splitlines() if "word_embeddings" in line)
    assert table.endswith("18 x 16" if sizes else "128 x 16"), "ranks fill the vocabulary up when they are divided"
    if sizes:
        assert command("reshard", "core", "whole", "--tensor", "1", "--pipeline", "2") == 0
    assert command("import", "whole" if sizes else "core", "back", "--base", "base") == 0
    assert "decoder.layers" in capsys.readouterr().out
    assert command("check", "base", "back") == 0


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_weights_become_sums_of_two_numbers(home: Path, share: float, capsys: Captured) -> None:
    """a + scale * b stays what was read: all of it a, or b has a share."""
    tuned = json.loads((home / "files/tuned.yaml").read_text())
    tuned["name"] = "sums"
    tuned["model"] |= {"linear": {"variant": "pkl", "scale": 0.5}, "stack_layers": True}
    runs.write(home / "files/sums.yaml", tuned)
    assert train.main(["--config", "files/sums.yaml"]) == 0
    run = run_of(home, "sums")
    assert command("export", str(run), "again") == 0
    assert (
        "14 weights are written as what multiplies" not in (out := capsys.readouterr().out) and "a + scale * b" in out
    )
    assert command("check", "again", "files/llama") == 0
    assert command("import", "files/llama", "split", "--base", str(run), "--share", str(share)) == 0
    saved = latest(home / "split/checkpoint", ["model"])
    assert saved is not None
    a, b = saved.model()["h.1.attn.qkv.weight"].unbind(0)
    whole = torch.cat(
        [load_file("files/llama/model.safetensors")[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    )
    torch.testing.assert_close(0.5 * b, share * whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(a + 0.5 * b, whole, rtol=0 if not share else 1e-6, atol=0)
    assert command("export", "split", "split_again") == 0
    assert command("check", "split_again", "files/llama", "--tolerance", "0" if not share else "1e-7") == 0
