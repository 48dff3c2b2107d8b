"""Packs on a CUDA device: captured, replayed and updated by the table, against runs alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from engine import pack
from engine.course import Course
from engine.together import Together

pytestmark = pytest.mark.gpu
# Relative, of a loss after some updates: sums of other kernels in float32 (TF32 is off).
ALIKE = 1e-4
SIZES = {
    "model__n_embd": 64,
    "model__n_head": 4,
    "train__batch_size": 5,
    "train__max_iters": 24,
    "train__eval_interval": 8,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"))


def members(root: Path, folder: Path, every: list[dict[str, Any]]) -> list[pack.Member]:
    return runs.members(root, folder, [{**SIZES, **changes} for changes in every], "cuda:0")


@pytest.mark.parametrize("most", [None, 3, 8])
@pytest.mark.parametrize("variant", [{}, {"model__dropout": 0.1}, {"model__linear": "pkl"}, {"train__compile": True}])
def test_a_pack_ends_where_its_runs_end_alone(
    root: Path, tmp_path: Path, variant: dict[str, Any], most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "PROBE", 0.02)
    every: list[dict[str, Any]] = [
        {**variant, "train__seed": i, "optimizer__learning_rate": 0.001 * (1 + i)} for i in range(7)
    ]
    every[3]["train__gradient_accumulation_steps"] = 2
    every[4]["train__max_iters"] = 16
    some, alone = members(root, tmp_path / "pack", every), members(root, tmp_path / "alone", every)
    told: dict[int, Any] = {}
    pack.train(
        [partial(lambda one: one, one) for one in some],
        lambda member, how: told.update({some.index(member): how}),
        most,
    )
    assert told == dict.fromkeys(range(7), "done")
    for ours, theirs in zip(some, alone, strict=True):
        theirs.run.run(theirs.tracker, theirs.say, theirs.stop)
        assert ours.run.state.val_loss == pytest.approx(theirs.run.state.val_loss, rel=ALIKE)
        assert ours.run.state.train_loss == pytest.approx(theirs.run.state.train_loss, rel=10 * ALIKE)
        assert ours.run.state.steps == theirs.run.state.steps


def test_a_step_is_captured_and_a_poisoned_run_changes_no_bit_of_another(root: Path, tmp_path: Path) -> None:
    saved = []
    for poison in (False, True):
        some = members(root, tmp_path / str(poison), [{"train__seed": i} for i in range(3)])
        if poison:
            with torch.no_grad():
                for p in some[1].run.plain.parameters():
                    p.fill_(float("nan"))
        one = Together([Course(member, lambda m, how: None) for member in some])
        for _ in range(6):
            one.update(one.live())
        assert one.compute.graph is not None
        one.leave()
        saved.append([{n: p.detach().clone() for n, p in member.run.plain.named_parameters()} for member in some])
    for i in (0, 2):
        assert all(torch.equal(saved[0][i][n], saved[1][i][n]) for n in saved[0][i])
