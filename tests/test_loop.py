"""The training loop: what is resumed is the same to the last bit, what is measured is what the formulas say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from reference import clip_scale
from torch import Tensor

from core.yaml_files import ConfigError
from engine import loop
from engine.data import gather
from engine.device import GROWTH, LARGEST_SCALE, first_scale, next_scale, pick
from engine.loop import Run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"))


class Crash(Exception):
    """Stands for a process that dies."""


MUON = {"variant": "muon", "learning_rate": 0.02}
CASES: dict[str, dict[str, Any]] = {
    "adamw, dropout, accumulation": {"model__dropout": 0.2, "train__gradient_accumulation_steps": 2},
    "muon, bfloat16": {"optimizer": MUON, "train__dtype": "bfloat16"},
    "untied, pinned seeds": {"model__tie_weights": False, "train__init_seed": 5, "train__data_seed": 6},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("end", ["stop", "crash"])
def test_a_resumed_run_is_the_undisturbed_run(root: Path, tmp_path: Path, case: str, end: str) -> None:
    config, corpus = runs.read(root, **CASES[case])
    whole = runs.make(tmp_path / "whole", config, corpus)
    assert runs.drive(whole) == "done"

    first = runs.make(tmp_path / "parts", config, corpus)
    if end == "stop":
        assert runs.drive(first, lambda: first.state.iter == 5) == "stopped"
        assert max((tmp_path / "parts/checkpoint").iterdir()).name == "00000005"
    else:
        batches = first.batches
        per_iteration = config.train.gradient_accumulation_steps
        first.batches = lambda i: crash() if i == 5 * per_iteration else batches(i)  # type: ignore[assignment]
        with pytest.raises(Crash):
            runs.drive(first)
        assert max((tmp_path / "parts/checkpoint").iterdir()).name == "00000003"
    second = runs.make(tmp_path / "parts", config, corpus)
    assert second.state.iter == (5 if end == "stop" else 3)
    assert runs.drive(second) == "done"

    assert runs.saved_bytes(tmp_path / "parts") == runs.saved_bytes(tmp_path / "whole")
    assert runs.records(tmp_path / "parts") == runs.records(tmp_path / "whole")
    results = [runs.clockless(run.result()) for run in (second, whole)]
    results = [{k: v for k, v in result.items() if k != "peak_memory_bytes"} for result in results]
    assert results[0] == results[1]


def crash() -> None:
    raise Crash


def test_a_resumed_run_does_not_evaluate_twice(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, corpus = runs.read(root)
    evaluated: list[int] = []
    evaluate = Run.evaluate

    def spy(run: Run, iters: int | str) -> float:
        evaluated.append(run.state.iter)
        return evaluate(run, iters)

    monkeypatch.setattr(Run, "evaluate", spy)
    first = runs.make(tmp_path, config, corpus)
    assert runs.drive(first, lambda: first.state.iter == 4) == "stopped"
    assert runs.drive(runs.make(tmp_path, config, corpus)) == "done"
    assert runs.drive(runs.make(tmp_path, config, corpus)) == "done", (
        "killed between its last checkpoint and its result"
    )
    assert evaluated == [0, 4, 8]


def test_every_forward_pass_drops_something_else(root: Path, tmp_path: Path) -> None:
    keys: dict[int, list[int]] = {}
    for seed in (1, 2):
        config, corpus = runs.read(
            root, model__dropout=0.1, train__seed=seed, train__gradient_accumulation_steps=2, train__max_iters=3
        )
        run = runs.make(tmp_path / str(seed), config, corpus)
        seen = keys[seed] = []
        run.plain.drop.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(int(module.key)) if module.training else None
        )
        assert runs.drive(run) == "done"
    assert len(keys[1]) == len(keys[2]) == 6
    assert len({*keys[1], *keys[2]}) == 12


def test_the_records_of_a_run(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root)
    run = runs.make(tmp_path, config, corpus)
    losses: list[float] = []
    update = run.update

    def spied() -> None:
        update()
        losses.append(run.losses[-1].item())

    run.update = spied  # type: ignore[method-assign]
    assert runs.drive(run) == "done"
    trained, evaluated = runs.records(tmp_path, "train"), runs.records(tmp_path, "eval")
    assert [r["iter"] for r in trained] == [2, 4, 6, 8]
    assert [r["iter"] for r in evaluated] == [0, 4, 8]
    for r in trained:  # the mean since the last record
        assert r["train_loss"] == sum(losses[r["iter"] - 2 : r["iter"]]) / 2
        assert r["tokens"] == r["iter"] * 4 * 16
        assert r["learning_rate"] == 0.01 * run.schedule.multiplier(r["iter"] - 1)
        assert r["grad_norm"] > 0
    result = run.result()
    assert result["val_loss"] == evaluated[-1]["val_loss"]
    assert result["best_val_loss"] == min(r["val_loss"] for r in evaluated)
    assert result["train_loss"] == losses[-1]
    assert (result["iters"], result["tokens"]) == (8, 8 * 64)
    assert result["tokens_per_second"] > 0 and result["peak_memory_bytes"] > 1 << 20
    assert result["parameters"] == sum(p.numel() for p in run.plain.parameters())


def test_a_run_learns(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, train__max_iters=60, train__eval_interval=60, train__batch_size=16)
    run = runs.make(tmp_path, config, corpus)
    assert runs.drive(run) == "done"
    first, last = (r["val_loss"] for r in runs.records(tmp_path, "eval"))
    assert abs(first - math.log(corpus.meta.vocab_size)) < 0.2  # an untrained model knows nothing
    assert last < 0.8 * first


def test_accumulation_is_one_large_batch(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, train__batch_size=8, train__grad_clip=None)
    large = runs.make(tmp_path / "large", config, corpus)
    config, corpus = runs.read(root, train__gradient_accumulation_steps=2, train__grad_clip=None)
    small = runs.make(tmp_path / "small", config, corpus)
    x, y = large.batches(0)
    small.batches = lambda i: (x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])  # type: ignore[assignment]
    for run in (large, small):
        run.optimizers.step = lambda factor: None  # type: ignore[method-assign]
        run.update()
    assert small.losses[0].item() == pytest.approx(large.losses[0].item(), rel=1e-6)
    for one, other in zip(small.optimizers.gradients(), large.optimizers.gradients(), strict=True):
        # Sums of 128 float32 terms in another order: some ulp of the largest.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize(("tokens", "iterations"), [(1, 1), (64, 1), (65, 2), (8 * 64, 8), (8 * 64 + 1, 9)])
def test_max_tokens_rounds_up(root: Path, tokens: int, iterations: int) -> None:
    config, _ = runs.read(root, train__max_iters=None, train__max_tokens=tokens)
    assert config.iterations == iterations


def test_max_tokens_is_what_is_trained(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, train__max_iters=None, train__max_tokens=65)
    run = runs.make(tmp_path, config, corpus)
    assert runs.drive(run) == "done" and run.result()["tokens"] == 128


@pytest.mark.parametrize("limit", [0.05, 1e6, None])
def test_clipping(root: Path, tmp_path: Path, limit: float | None) -> None:
    config, corpus = runs.read(root, train__grad_clip=limit)
    run = runs.make(tmp_path, config, corpus)
    x, y = run.batches(0)
    run.plain(x, y)[1].backward()
    before = [g.clone() for g in run.optimizers.gradients()]
    assert run.clip()
    scale = 1.0 if limit is None else clip_scale(before, limit)
    assert (scale < 1) == (limit == 0.05)
    for old, new in zip(before, run.optimizers.gradients(), strict=True):
        torch.testing.assert_close(new, old * scale, rtol=1e-5, atol=0)  # the norm is summed in float32
    assert run.grad_norm is not None
    assert run.grad_norm.item() == pytest.approx(math.sqrt(sum(g.double().square().sum().item() for g in before)))


# Runs that diverge ----------------------------------------------------------------------------------------------------------


def poison(run: Run, parameter: str, row: int | None = None) -> None:
    tensor = dict(run.plain.named_parameters())[parameter].data
    (tensor if row is None else tensor[row]).fill_(math.nan)


@pytest.mark.parametrize("log_interval", [1, 3, 100])
def test_a_loss_that_is_not_finite_ends_the_run_there(root: Path, tmp_path: Path, log_interval: int) -> None:
    config, corpus = runs.read(root, train__log_interval=log_interval)
    run = runs.make(tmp_path, config, corpus)
    batches = run.batches

    def poisoned(index: int) -> tuple[Tensor, Tensor]:
        if index == 5:
            poison(run, "ln_f.weight")
        return batches(index)

    run.batches = poisoned  # type: ignore[assignment]
    assert runs.drive(run) == "diverged"
    result = run.result()
    json.dumps(result, allow_nan=False)
    assert (result["iters"], result["tokens"]) == (6, 6 * 64)  # the sixth update's loss
    assert result["val_loss"] is None and result["train_loss"] is None
    assert math.isfinite(result["best_val_loss"])
    last = runs.records(tmp_path)[-1]
    assert (last["kind"], last["iter"], last["train_loss"]) == ("train", 6, None)
    assert [r["iter"] for r in runs.records(tmp_path, "eval")] == [0, 4]


def test_the_first_of_several_unread_losses_counts(root: Path, tmp_path: Path) -> None:
    """On a GPU losses are read many at a time."""
    config, corpus = runs.read(root)
    run = runs.make(tmp_path, config, corpus)
    run.state.iter = 9
    run.losses = [torch.tensor(value) for value in (1.0, 2.0, math.inf, 3.0, math.nan)]
    assert run.flush() == 7
    assert run.state.pending == [1.0, 2.0] and run.state.train_loss is None and run.losses == []


def test_an_evaluation_that_is_not_finite_ends_the_run(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, model__tie_weights=False, train__eval_iters="full")
    unseen = sorted(corpus.meta.chars or "").index(runs.UNSEEN)
    assert unseen not in corpus.train
    val = np.array(corpus.val)
    val[40] = unseen
    object.__setattr__(corpus, "val", val)
    run = runs.make(tmp_path, config, corpus)
    evaluate = run.evaluate

    def poisoned(iters: int | str) -> float:
        if run.state.iter:
            poison(run, "wte.weight", unseen)
        return evaluate(iters)

    run.evaluate = poisoned  # type: ignore[method-assign]
    assert runs.drive(run) == "diverged"
    result = run.result()
    json.dumps(result, allow_nan=False)
    assert result["iters"] == 4 and result["val_loss"] is None
    assert math.isfinite(result["train_loss"]) and math.isfinite(result["best_val_loss"])
    assert runs.records(tmp_path)[-1] == {"kind": "eval", "iter": 4, "tokens": 256, "val_loss": None}


# Evaluation -----------------------------------------------------------------------------------------------------------------


def test_a_full_evaluation_is_the_mean_over_all_windows(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, model__dropout=0.5, train__eval_batch_size=7)
    run = runs.make(tmp_path, config, corpus)
    block, losses = config.model.block_size, []
    run.plain.eval()
    for start in range(0, len(corpus.val) - block, block):
        x, y = gather(corpus.val, np.array([start]), block)
        with torch.no_grad():
            losses.append(run.plain(x, y)[1].item())
    run.plain.train()
    assert len(losses) == (len(corpus.val) - 1) // block
    assert run.evaluate("full") == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert run.plain.training, "dropout is on again"


def test_every_run_is_evaluated_on_the_same_windows(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spy(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
        seen[-1] += starts.tolist()
        return gather(tokens, starts, block_size)

    monkeypatch.setattr(loop, "gather", spy)
    for i, changes in enumerate(({}, {"train__seed": 9}, {"train__batch_size": 2}, {"train__data_seed": 4})):
        config, corpus = runs.read(root, **changes)
        run = runs.make(tmp_path / str(i), config, corpus)
        seen.append([])
        run.evaluate(2)
    assert len(seen[0]) == 16 and len(set(seen[0])) > 1
    assert all(windows == seen[0] for windows in seen)


def test_the_last_evaluation_may_be_longer(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, train__final_eval_iters="full")
    run = runs.make(tmp_path, config, corpus)
    assert runs.drive(run) == "done"
    assert runs.records(tmp_path, "eval")[-1]["val_loss"] == run.evaluate("full") != run.evaluate(2)


# Options --------------------------------------------------------------------------------------------------------------------


def test_precisions_take_effect(root: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config, corpus = runs.read(root, train__dtype=dtype)
        run = runs.make(tmp_path / dtype, config, corpus)
        run.update()
        losses[dtype] = run.losses[0].item()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in run.plain.parameters() if p.grad is not None)
    assert 0 < abs(losses["float32"] - losses["bfloat16"]) < 0.05  # 8 bits of mantissa
    before = torch.get_float32_matmul_precision()
    try:
        config, corpus = runs.read(root, train__matmul_precision="medium")
        runs.make(tmp_path / "medium", config, corpus)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.system  # the compiler takes half a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about torch
def test_a_compiled_run(root: Path, tmp_path: Path) -> None:
    losses = {}
    for compiled in (False, True):
        config, corpus = runs.read(root, train__compile=compiled, train__max_iters=1, model__n_layer=1)
        run = runs.make(tmp_path / str(compiled), config, corpus)
        assert runs.drive(run) == "done"
        losses[compiled] = run.result()["val_loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)  # fused kernels round elsewhere


def test_seeds_of_any_size(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root, train__seed=2**62, train__max_iters=1, model__dropout=0.1)
    assert runs.drive(runs.make(tmp_path, config, corpus)) == "done"


def test_a_continued_run_keeps_its_number_of_threads(root: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    config, corpus = runs.read(root)
    try:
        torch.set_num_threads(2)
        run = runs.make(tmp_path, config, corpus)
        runs.drive(run, lambda: run.state.iter == 1)
        torch.set_num_threads(1)
        runs.make(tmp_path, config, corpus)
        assert torch.get_num_threads() == 2  # sums of two threads have other last bits than sums of one
    finally:
        torch.set_num_threads(before)


# float16 --------------------------------------------------------------------------------------------------------------------


def test_float16_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match="float16 needs a CUDA device"):
        pick("cpu", "float16")
    assert pick("cpu", "bfloat16") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'cuda:99' is not on this machine"):
        pick("cuda:99")


def test_the_scale_of_the_loss() -> None:
    assert first_scale("float32") == first_scale("bfloat16") == 1.0
    scale, fitting = first_scale("float16"), 0
    for _ in range(GROWTH - 1):
        scale, fitting = next_scale(scale, fitting, True)
    assert (scale, fitting) == (2.0**16, GROWTH - 1)
    assert next_scale(scale, fitting, True) == (2.0**17, 0)
    assert next_scale(scale, fitting, False) == (2.0**15, 0)
    assert next_scale(1.0, 5, False) == (1.0, 0)
    assert next_scale(LARGEST_SCALE, GROWTH - 1, True) == (LARGEST_SCALE, 0)


def test_a_step_that_overflows_is_left_out(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root)
    object.__setattr__(config.train, "dtype", "float16")  # the reader refuses it for a CPU; its arithmetic runs there
    run = runs.make(tmp_path, config, corpus)
    run.state.grad_scale = 2.0**40
    before = {name: tensor.clone() for name, tensor in run.plain.state_dict().items()}
    run.update()
    assert (run.state.grad_scale, run.state.iter, run.state.steps) == (2.0**39, 1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.plain.state_dict().items())
    run.state.grad_scale = 4.0
    run.update()
    assert (run.state.grad_scale, run.state.iter, run.state.steps, run.state.fitting) == (4.0, 2, 1, 1)
    assert run.grad_norm is not None and 0.01 < run.grad_norm.item() < 100  # unscaled
    run.save()
    again = runs.make(tmp_path, config, corpus)
    assert {entry.steps for m in again.optimizers.members.values() for g in m.groups for entry in g.entries} == {1}


def test_experts_tell_their_load_and_the_loss_is_cross_entropy_alone(root: Path, tmp_path: Path) -> None:
    moe = {"variant": "moe", "experts": 4, "width": 8, "load_balance": 100.0}
    config, corpus = runs.read(root, model__mlp=moe, train__max_iters=3, train__log_interval=1)
    run = runs.make(tmp_path / "run", config, corpus)
    assert runs.drive(run) == "done"
    records = [r for r in runs.records(tmp_path / "run") if r["kind"] == "train"]
    assert [set(r["modules"]) for r in records] == [{f"h.{i}.mlp" for i in range(config.model.n_layer)}] * 3
    shown = records[0]["modules"]["h.0.mlp"]
    assert shown["load_max"] >= 0.25 >= shown["load_min"] and shown["dropped"] == 0
    assert run.plain.auxiliary is not None and run.plain.auxiliary.item() > 50, "it was in what was trained"
    assert all(r["train_loss"] < 10 for r in records), "and is not in what is told"
