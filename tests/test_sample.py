"""sample.py: from a run folder to text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import sample
import train
from core.options import Reader
from engine.corpus import CharTokenizer, write_corpus
from gpt_conf import ModelConfig
from model import GPT, build
from variations import CATALOGUE

TEXT = "pack my box with five dozen liquor jugs\n" * 80


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few iterations on a repeated sentence."""
    root = tmp_path_factory.mktemp("sample")
    tokenizer = CharTokenizer.of([TEXT])
    ids = tokenizer.encode(TEXT)
    write_corpus(
        root / "mine" / "char",
        [("train", ids), ("val", ids[:900])],
        dataset="mine",
        tokenizer=tokenizer,
        source="a pangram",
    )
    words = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.block_size=16", "train.max_iters=60"]
    words += ["train.eval_iters=1", "train.eval_interval=60", "train.batch_size=16", "optimizer.learning_rate=0.01"]
    words += [f"data.root={root}", "data.dataset=mine", f"runner.root={root}/runs", "tracking.wandb.mode=off"]
    before = os.environ.get("WANDB_MODE")
    assert train.main(words) == 0 and os.environ.get("WANDB_MODE") == before
    (folder,) = (p.parent for p in root.glob("runs/*/*/result.json"))
    return folder


def test_it_continues_the_prompt(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run_folder), "--prompt", "pack my", "--tokens", "40", "--device", "cpu"]
    assert sample.main([*words, "--seed", "7"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("pack my") and len(text.rstrip("\n")) >= 40
    assert sample.main([*words, "--seed", "7"]) == 0
    assert capsys.readouterr().out == text
    assert sample.main([*words, "--seed", "8"]) == 0
    assert capsys.readouterr().out != text
    assert sample.main([*words, "--seed", "7", "--fold-gains"]) in (0, 2)


def test_unknown_characters_are_reported(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main([str(run_folder), "--prompt", "Žack!"]) == 2
    told = capsys.readouterr().err
    assert "'Ž'" in told and "'!'" in told and "'a'" not in told


@pytest.mark.parametrize("words", [["--temperature", "-1"], ["--top-k", "0"], ["--device", "cuda:9"]])
def test_impossible_wishes_are_refused(run_folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main([str(run_folder), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_sweep_or_an_empty_folder_is_no_run(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main([str(run_folder.parent)]) == 2
    assert str(run_folder) in capsys.readouterr().err
    assert sample.main([str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err


def small_model(**options: object) -> GPT:
    reader = Reader(CATALOGUE)
    config = reader.read(ModelConfig, {"n_embd": 32, "block_size": 12, "vocab_size": 20, "n_layer": 2, **options})
    return build(config, 5).eval()


@torch.no_grad()
def greedy_without_cache(model: GPT, tokens: torch.Tensor, count: int) -> list[int]:
    made = []
    for _ in range(count):
        logits = model(tokens[:, -model.config.block_size :])[0][:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
        made.append(int(tokens[0, -1]))
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "rope", "n_kv_head": 2}, {"embedding": "ngram", "tie_weights": False}],
    ids=["gpt2", "rope", "ngram"],
)
def test_the_cache_changes_nothing_also_past_the_context(options: dict[str, object]) -> None:
    model = small_model(**options)
    start = torch.tensor([[3, 1, 4, 1, 5]])
    generator = torch.Generator().manual_seed(0)
    cached = list(sample.generate(model, start, 20, temperature=0, top_k=None, generator=generator))
    assert cached == greedy_without_cache(model, start, 20)


def test_while_the_context_lasts_only_new_tokens_are_computed() -> None:
    model, seen = small_model(), []
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    list(sample.generate(model, torch.tensor([[3, 1, 4]]), 10, temperature=1.0, top_k=3, generator=torch.Generator()))
    assert seen == [3] + [1] * 9
