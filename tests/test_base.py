"""Loading a base: the model's own tensors are filled strictly, adapters are left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from torch import nn

from core.weights import mismatch, weights
from core.yaml_files import ConfigError
from engine import checkpoint
from engine.base import load_base
from model import GPT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return runs.tiny_corpus(tmp_path / "data")


def test_own_tensors_are_filled_and_adapters_left_as_they_are(data: Path, tmp_path: Path) -> None:
    base = runs.make(tmp_path / "base", *runs.read(data, train__seed=1))
    base.save()
    own = runs.make(tmp_path / "own", *runs.read(data, train__seed=2)).plain
    own.get_submodule("h.0.attn.qkv").register_module("adapter[q]", nn.Linear(3, 3))
    before = {name: tensor.clone() for name, tensor in weights(own).items()}
    load_base(own, str(tmp_path / "base"))
    saved, now = weights(base.plain), weights(own)
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.items())
    assert any(not torch.equal(now[name], before[name]) for name in saved)
    new = set(now) - set(saved)
    assert new == {"h.0.attn.qkv.adapter[q].weight", "h.0.attn.qkv.adapter[q].bias"}
    assert all(torch.equal(now[name], before[name]) for name in new)


def test_what_does_not_fit_is_refused_before_anything_is_filled(data: Path, tmp_path: Path) -> None:
    run = runs.make(tmp_path / "own", *runs.read(data))
    with pytest.raises(ConfigError, match="there is no checkpoint to start from"):
        load_base(run.plain, str(tmp_path / "own"))
    run.save()
    (newest,) = (tmp_path / "own" / "checkpoint").iterdir()
    before = {name: tensor.clone() for name, tensor in weights(run.plain).items()}
    saved = {name: tensor + 1 for name, tensor in load_file(newest / "model.safetensors").items()}
    wrong = {
        r"its weights are of another model: missing ln_f\.weight\.": {
            k: v for k, v in saved.items() if k != "ln_f.weight"
        },
        r"left over extra\.": {**saved, "extra": torch.zeros(1)},
        r"ln_f\.weight is \[3\], not \[16\]\.": {**saved, "ln_f.weight": torch.zeros(3)},
        r"it has adapters; merge them first\.": {**saved, "h.0.attn.qkv.adapter[q].lora_a": torch.zeros(2, 16)},
    }
    for told, tensors in wrong.items():
        checkpoint.save(newest.parent, 0, tensors, {}, {"iter": 0})
        with pytest.raises(ConfigError, match=told):
            load_base(run.plain, str(tmp_path / "own"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run.plain).items())


def test_a_model_without_memory_has_the_tensors_of_one_with(data: Path, tmp_path: Path) -> None:
    for tied in (True, False):
        config, corpus = runs.read(data, model__tie_weights=tied, model__norm="rmsnorm")
        own = weights(runs.make(tmp_path / f"own-{tied}", config, corpus).plain)
        empty = weights(GPT(config.model))
        assert mismatch(own, empty) == "" and list(own) == list(empty)
        assert ("head.weight" in own) is not tied
