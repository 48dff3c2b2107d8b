"""Small runs of a pack are one model on a CPU too, where a rehearsal of the next step leaves every bit as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from packs import MOE, NUMBERS, Pack, read, watched

from engine import rehearsal, together
from engine.data import Corpus
from engine.rehearsal import SMALL, Rehearsal, small
from train_args import Config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"), 4000)


@pytest.fixture
def configs(root: Path) -> Callable[..., list[tuple[Config, Corpus]]]:
    return partial(read, root)


@pytest.fixture(autouse=True)
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many runs each folded model had that was made, rehearsals included. Time decides nothing here."""
    monkeypatch.setattr(rehearsal, "WORTH", float("inf"))
    yield watched(monkeypatch)


@pytest.fixture
def agreed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each rehearsal said."""
    said: list[bool] = []
    plain = Rehearsal.agrees

    def agrees(self: Rehearsal, pack: Any) -> bool:
        said.append(plain(self, pack))
        return said[-1]

    monkeypatch.setattr(Rehearsal, "agrees", agrees)
    return said


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "dropout": {"model__dropout": 0.1, "train__gradient_accumulation_steps": 2},
    "modern": {"model__norm": "rmsnorm", "model__position": "rope", "model__mlp": "gated", "model__tie_weights": False},
    "odd": {"model__n_embd": 18, "model__n_head": 2, "model__mlp": "gated"},
    "odder": {"model__n_embd": 27, "model__n_head": 3, "model__activation": "silu", "train__batch_size": 5},
    "oddest": {"model__n_embd": 27, "model__n_head": 3, "model__activation": "silu", "model__block_size": 7},
    "heads": {"model__n_embd": 18, "model__n_head": 2, "model__block_size": 9, "train__batch_size": 3},
    "stacked": {"model__stack_layers": True, "model__n_layer": 2},
    "experts": {"model__mlp": {**MOE, "bias_rate": 0.01, "load_balance": None}},
    "recurrent": {"model__attention": "delta"},
    "bfloat16": {"train__dtype": "bfloat16", "model__n_embd": 24, "model__n_head": 2},
    "telemetry": {"tracking__slice_interval": 2},
}


@pytest.mark.parametrize("model", MODELS)
def test_every_bit_is_that_of_runs_alone(model: str, tmp_path: Path, configs: Any, agreed: list[bool]) -> None:
    """Whether or not they are folded: these sizes are not those that kernels are made for."""
    made = Pack(tmp_path, configs(NUMBERS, **MODELS[model]))
    assert made.solo() == made.together(fold=None) == ["done"] * 5
    made.equal()
    assert agreed[0] is (model not in ("oddest", "heads")), (
        "what a kernel does at the end of a row is another thing there"
    )


def test_one_bit_is_enough_to_go_on_alone(
    tmp_path: Path, configs: Any, agreed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = together.Together.rehearse

    def otherwise(self: Any) -> Any:
        seconds, seen = plain(self)
        grad = seen[-1][-1]
        assert grad is not None
        grad.view(-1)[-1] = torch.nextafter(grad.view(-1)[-1], torch.tensor(torch.inf))
        return seconds, seen

    monkeypatch.setattr(together.Together, "rehearse", otherwise)
    made = Pack(tmp_path, configs(NUMBERS))
    assert made.solo() == made.together(fold=None) == ["done"] * 5
    made.equal()
    assert agreed == [False]


def test_what_is_slower_goes_on_alone_with_tensors_of_its_own(
    tmp_path: Path, configs: Any, agreed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "WORTH", 0.0)
    made = Pack(tmp_path, configs(NUMBERS))
    assert made.solo() == made.together(fold=None) == ["done"] * 5
    made.equal()
    assert agreed == [False]
    for member in made.members.values():
        for p in member.run.plain.parameters():
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), "where a kernel finds it alone"


def test_what_goes_on_when_others_have_ended_has_tensors_of_its_own(
    tmp_path: Path, configs: Any, agreed: list[bool]
) -> None:
    changes = [{"train__max_iters": n, "train__seed": i} for i, n in enumerate((2, 2, 2, 6, 6))]
    made = Pack(tmp_path, configs(changes, model__n_embd=18, model__n_head=2))
    assert made.solo() == made.together(fold=None) == ["done"] * 5
    made.equal()
    assert len(agreed) > 1, "those that are left make a smaller one, which rehearses anew"


def test_a_fold_that_cannot_be_made_is_no_failure(
    tmp_path: Path, configs: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any) -> None:
        raise ValueError("this model has no fold")

    monkeypatch.setattr(together.Together, "_check", broken)
    made = Pack(tmp_path, configs(NUMBERS))
    assert made.solo() == made.together(fold=None) == ["done"] * 5
    made.equal()
    assert capsys.readouterr().out == "these runs go on one after another: this model has no fold\n"


def test_a_rehearsal_moves_nothing(tmp_path: Path, configs: Any) -> None:
    moe = {**MOE, "bias_rate": 0.01, "load_balance": None}
    every = [runs.make(tmp_path / str(i), *one) for i, one in enumerate(configs(NUMBERS, model__mlp=moe))]
    before = [{name: t.clone() for name, t in run.plain.state_dict().items()} for run in every]
    states = [dict(vars(run.state)) for run in every]
    Rehearsal(every)
    for run, held, state in zip(every, before, states, strict=True):
        assert all(torch.equal(t, held[name]) for name, t in run.plain.state_dict().items())
        assert vars(run.state) == state and all(p.grad is None for p in run.plain.parameters())


def test_what_is_large_or_compiled_is_not_tried(tmp_path: Path, configs: Any, agreed: list[bool]) -> None:
    (config, _), *_ = configs([{}])
    tokens = config.train.batch_size * config.model.block_size
    assert small(config, int(SMALL) // tokens) and not small(config, int(SMALL) // tokens + 1)
    ((compiled, _),) = configs([{"train__compile": True}])
    assert not small(compiled, 1)
    made = Pack(tmp_path, configs(NUMBERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "SMALL", 10.0)
        assert made.solo() == made.together(fold=None) == ["done"] * 5
    made.equal()
    assert not agreed
