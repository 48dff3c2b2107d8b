"""Gain fusion and effective weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file
from shipped import small_corpora

import convert.__main__
import train
from convert.effective import effective_weights
from convert.gains import fold_gains
from core.options import Reader
from gpt_conf import ModelConfig
from model import GPT, build
from variations import CATALOGUE

TOKENS = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))


def model(**options: Any) -> GPT:
    """A small float64 model with every parameter, gains included, away from its initial value."""
    reader = Reader(CATALOGUE)
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}
    config = reader.read(ModelConfig, {**small, **options})
    assert not reader.mistakes
    made = build(config, 3).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double() * 0.1)
    return made.eval()


PKL = {"variant": "pkl", "scale": 1.25}


@pytest.mark.parametrize(
    "options",
    [
        {"tie_weights": False},
        {"tie_weights": False, "norm": "rmsnorm", "bias": False, "mlp": "gated", "n_kv_head": 1},
        {"tie_weights": False, "norm": "rmsnorm", "bias": False, "linear": PKL, "head": PKL},
        {"tie_weights": False, "linear": PKL, "attention": {"variant": "causal", "qk_norm": True}},
        {"norm": "rmsnorm", "embedding": PKL, "head": PKL, "linear": PKL},
    ],
    ids=["gpt2", "modern", "pkl", "pkl-bias", "tied"],
)
def test_outputs_stay_equal_and_gains_become_one(options: dict[str, Any]) -> None:
    made = model(**options)
    norm: Any = made.ln_f
    if not made.config.tie_weights and getattr(norm, "bias", None) is not None:
        norm.bias.data.zero_()  # the head has no bias that could take the final norm's
    before = made(TOKENS)[0]
    folded = fold_gains(made)
    assert ("ln_f" in folded) == (not made.config.tie_weights)
    assert len(folded) == 2 * made.config.n_layer + (not made.config.tie_weights)
    for path in folded:
        norm = made.get_submodule(path)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    # Only the order of the products changed: 1e-12 is some thousand units in the last place of float64.
    torch.testing.assert_close(made(TOKENS)[0], before, rtol=1e-12, atol=1e-12)


def test_columns_are_scaled_as_written_by_hand() -> None:
    made = model(tie_weights=False, norm="rmsnorm", bias=False, linear=PKL)
    block: Any = made.h[0]
    weight, gain = block.attn.qkv.weight.detach().clone(), block.ln_1.weight.detach().clone()
    fold_gains(made)
    for half in (0, 1):
        torch.testing.assert_close(block.attn.qkv.weight[half], reference.flashnorm_fold(weight[half], gain))


def test_a_norms_bias_without_a_place_to_go_is_refused() -> None:
    made = model(tie_weights=False)
    with pytest.raises(ValueError, match="ln_f has a bias"):
        fold_gains(made)


def test_effective_weights_are_what_multiplies() -> None:
    made = model(linear=PKL, embedding=PKL, head=PKL)
    saved = effective_weights(made)
    block: Any = made.h[1]
    a, b = block.mlp.up.weight.detach()
    torch.testing.assert_close(saved["h.1.mlp.up.weight"], reference.pkl(a, b, 1.25), rtol=1e-15, atol=1e-15)
    table: Any = made.wte
    a, b = table.weight.detach()
    torch.testing.assert_close(saved["wte.weight"], reference.pkl(a, b, 1.25), rtol=1e-15, atol=1e-15)
    assert torch.equal(saved["head.weight"], saved["wte.weight"])
    assert saved["wte.weight"].shape == (11, 16) and saved["wpe.weight"].shape == (8, 16)
    plain = model()
    with torch.no_grad():
        names = dict(plain.named_parameters())
        for name, value in saved.items():
            if name in names:
                names[name].copy_(value)
    torch.testing.assert_close(plain(TOKENS)[0], made(TOKENS)[0], rtol=1e-12, atol=1e-12)


def test_a_run_is_exported_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, words = small_corpora(tmp_path / "data"), ["model.n_layer=1", "model.n_embd=16", "model.n_head=2"]
    words += ["train.max_iters=2", "train.eval_iters=1", "tracking.wandb.mode=off", "model.linear=pkl"]
    words += [
        "model.embedding={variant: pkl, scale: 0.5}",
        "model.head={variant: pkl, scale: 0.5}",
        "model.norm=rmsnorm",
    ]
    assert train.main([*words, f"data.root={data}", f"runner.root={tmp_path}/runs"]) == 0
    (run,) = (p.parent for p in tmp_path.glob("runs/*/*/result.json"))
    assert convert.__main__.main(["effective", str(run), str(tmp_path / "plain.safetensors"), "--fold-gains"]) == 0
    assert "h.0.ln_1" in capsys.readouterr().out
    made = load_file(tmp_path / "plain.safetensors")
    (saved,) = (load_file(p) for p in run.glob("checkpoint/*2/model.safetensors"))
    assert torch.equal(made["wte.weight"], saved["wte.weight"][0] + 0.5 * saved["wte.weight"][1])
    assert torch.equal(made["head.weight"], made["wte.weight"]) and made["h.0.attn.qkv.weight"].shape == (48, 16)
    assert convert.__main__.main(["effective", str(tmp_path), str(tmp_path / "x.safetensors")]) == 2
    assert not (tmp_path / "x.safetensors").exists() and "config.yaml" in capsys.readouterr().err
