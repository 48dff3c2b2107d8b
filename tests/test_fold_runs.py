"""Whole runs computed by one folded model leave what each leaves alone: the bytes of checkpoints, records and how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from packs import MOE, NUMBERS, Pack, read, watched
from torch import Tensor

from engine.data import Corpus
from engine.pack import Member
from train_args import Config
from variations import CATALOGUE
from variations.activation.elementwise import GELU


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"), 4000)


@pytest.fixture
def configs(root: Path) -> Callable[..., list[tuple[Config, Corpus]]]:
    return partial(read, root)


@pytest.fixture(autouse=True)
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many runs each folded model had: without any, the tests would compare plain steps with plain steps."""
    yield watched(monkeypatch)


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "dropout": {"model__dropout": 0.1},
    "modern": {"model__norm": "rmsnorm", "model__position": "rope", "model__mlp": "gated", "model__tie_weights": False},
    "stacked": {"model__stack_layers": True, "model__n_layer": 2, "model__dropout": 0.1},
    "experts": {"model__mlp": {**MOE, "capacity_factor": 1.0, "load_balance": None}},
    "bfloat16": {"train__dtype": "bfloat16", "model__dropout": 0.1},
    "telemetry": {"tracking__slice_interval": 2},
}


@pytest.mark.parametrize("model", MODELS)
def test_runs_that_differ_in_numbers(model: str, tmp_path: Path, configs: Any, folds: list[int]) -> None:
    made = Pack(tmp_path, configs(NUMBERS, **MODELS[model]))
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()
    assert folds[0] == 5


def test_experts_that_add_to_the_loss(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    made = Pack(tmp_path, configs(NUMBERS, model__mlp={**MOE, "z_loss": 0.1}))
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()


def test_buffers_that_training_moves_survive_a_fold_anew(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """Three of five end while the others are in the middle of an update."""
    changes = [
        {"train__max_iters": n, "train__gradient_accumulation_steps": k} for n, k in ((2, 1),) * 3 + ((5, 3),) * 2
    ]
    moe = {**MOE, "bias_rate": 0.01, "load_balance": None}
    made = Pack(tmp_path, configs([{**c, "train__seed": i} for i, c in enumerate(changes)], model__mlp=moe))
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()


def test_buffers_that_training_moves(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    moe = {**MOE, "bias_rate": 0.01, "load_balance": None}
    changes = [{"train__seed": i, "train__gradient_accumulation_steps": 1 + i % 2} for i in range(5)]
    made = Pack(
        tmp_path, configs([{**c, "train__max_iters": 4 - i % 2 * 2} for i, c in enumerate(changes)], model__mlp=moe)
    )
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()
    assert folds == [5]


@pytest.mark.parametrize("name", [name for name in CATALOGUE["optimizer"] if name != "adamw"])
def test_every_optimizer(name: str, tmp_path: Path, configs: Any, folds: list[int]) -> None:
    rates = [0.01, 0.003, 0.02]
    node = lambda rate: {"variant": name, "learning_rate": rate}  # noqa: E731
    changes = [{**NUMBERS[i], "optimizer": node(rate)} for i, rate in zip((1, 3, 4), rates, strict=True)]
    changes = [{k: v for k, v in c.items() if not k.startswith("optimizer__")} for c in changes]
    made = Pack(tmp_path, configs(changes, model__n_layer=2))
    assert made.solo() == made.together() == ["done"] * 3
    made.equal()
    assert folds[0] == 3


def test_rules_and_knobs_of_each_run(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """Rates, decay, betas and init by slice, schedules, numbers of dropout and PKL."""
    rules: list[dict[str, Any]] = [
        {"lr_scale": 3.0}, {"weight_decay": 0.7}, {"init": {"variant": "normal", "std": 0.3}},
        {"betas": [0.5, 0.6]}, {"learning_rate": 0.0},
    ]  # fmt: skip
    schedules: list[dict[str, Any]] = [
        {"variant": name} for name in ("cosine", "linear", "constant", "cosine", "linear")
    ]
    assert {s["variant"] for s in schedules} <= set(CATALOGUE["schedule"])
    changes = [
        {
            "slices": {"some": {"match": "h.*.attn.qkv[k]", **rule}},
            "schedule": schedule,
            "model__dropout": 0.1 + 0.1 * i,
            "model__linear": {"variant": "pkl", "scale": 0.5 + 0.5 * i},
            "optimizer__betas": [0.9 - 0.1 * i, 0.99 - 0.1 * i],
            "train__seed": 7,
        }
        for i, (rule, schedule) in enumerate(zip(rules, schedules, strict=True))
    ]
    made = Pack(tmp_path, configs(changes))
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()
    assert folds == [5]


@pytest.mark.parametrize("base", ["frozen", "trained"])
def test_adapters(base: str, tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """Alphas, rates and dropout of their own, over one base."""
    still = {"still": {"match": "**", "frozen": True}} if base == "frozen" else {}
    changes = [
        {
            "slices": {
                **still,
                "some": {
                    "match": ["h.*.attn.qkv[q]", "h.*.mlp.*"],
                    "lora": {"rank": 64, "alpha": 8.0 + i, "dropout": 0.1 + 0.1 * i},
                    "learning_rate": 0.01 * (i + 1),
                },
            },
            "train__seed": i,
            "train__init_seed": 3,
        }
        for i in range(3)
    ]
    made = Pack(tmp_path, configs(changes))
    assert made.solo() == made.together() == ["done"] * 3
    made.equal()
    assert folds == [3]


# How they end -------------------------------------------------------------------------------------------------------------------


def test_what_stops_together_continues_alone_and_the_other_way_round(
    tmp_path: Path, configs: Any, folds: list[int]
) -> None:
    """Also in the middle of the accumulation of others, at iterations of their own."""
    made = Pack(tmp_path, configs(NUMBERS, model__dropout=0.1))
    at = [2, 3, 1, 4, 5]
    assert made.solo() == ["done"] * 5
    assert made.together(at) == ["stopped"] * 5
    for i, config in enumerate(made.configs[:3]):  # alone
        assert runs.drive(runs.make(tmp_path / f"pack{i}", *config)) == "done"
    made.equal([0, 1, 2])
    assert made.together()[3:] == ["done", "done"]  # those that are done have nothing left to do
    made.equal([3, 4])
    other = Pack(tmp_path / "other", made.configs)
    assert other.solo(at) == ["stopped"] * 5
    for i in range(5):
        (tmp_path / f"other/solo{i}").rename(tmp_path / f"other/pack{i}")
    assert other.together() == other.solo() == ["done"] * 5
    other.equal()


def test_a_run_that_diverges_ends_alone(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """Its NaN stays its own, and the others are folded anew when half of them have ended."""
    changes = [{**change} for change in NUMBERS]
    for i in (0, 2, 3):
        changes[i] |= {"optimizer__learning_rate": 1e30, "train__grad_clip": None}
    made = Pack(tmp_path, configs(changes, train__eval_interval=4, train__checkpoint_interval=1))
    wanted = ["diverged", "done", "diverged", "diverged", "done"]
    assert made.solo() == wanted and made.together() == wanted
    made.equal()
    assert folds == [5, 2]
    for i, member in made.members.items():
        solo = runs.make(tmp_path / f"again{i}", *made.configs[i])
        assert runs.drive(solo) == wanted[i]
        times = ("seconds", "tokens_per_second", "peak_memory_bytes")
        mine, other = ({k: v for k, v in r.result().items() if k not in times} for r in (solo, member.run))
        assert mine == other


class Full(Exception):
    """What a tracker raises."""


def test_a_member_that_raises_ends_alone(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    made = Pack(tmp_path, configs(NUMBERS))

    def mend(i: int, member: Member) -> Member:
        def say(state: Any, evaluated: bool) -> None:
            if state.iter == 4:
                raise Full("say")

        def stop() -> bool:
            if member.run.state.iter == 3:
                raise Full("stop")
            return False

        class Tracker:
            def log(self, record: dict[str, Any]) -> None:
                if record["iter"] == 2:
                    raise Full("log")

        changed: dict[int, dict[str, Any]] = {1: {"say": say}, 2: {"tracker": Tracker()}, 3: {"stop": stop}}
        return replace(member, **changed.get(i, {}))

    made.solo()
    told = made.together(mend=mend)
    assert [str(how) for how in told] == ["done", "say", "log", "stop", "done"]
    assert all(isinstance(how, Full) for how in told[1:4])
    made.equal([0, 4])
    assert folds == [5, 2]


class Shy(GELU):
    """Raises where it sees the rows of several runs."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 8:
            raise RuntimeError("too many")
        return super().forward(x)


def test_what_fails_together_goes_on_alone(
    tmp_path: Path, configs: Any, folds: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(CATALOGUE["activation"], "shy", Shy)
    made = Pack(tmp_path, configs(NUMBERS, model__activation="shy", model__dropout=0.1))
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()
    printed = capsys.readouterr().out
    assert folds == [5] and "one after another" in printed and "too many" in printed


class Late(GELU):
    """Raises once, in the middle of training, after some micro-batches of an update were computed."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 8 and self.training:
            Late.calls += 1
            if Late.calls == 4:
                raise RuntimeError("once")
        return super().forward(x)


def test_what_fails_in_the_middle_of_an_update_begins_it_anew(
    tmp_path: Path, configs: Any, folds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE["activation"], "late", Late)
    Late.calls = 0
    made = Pack(tmp_path, configs(NUMBERS, model__activation="late"))
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()
    assert folds == [5] and Late.calls == 4


def test_turns_and_sizes_that_do_not_fit(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """16 rows of four runs are the block: three are folded, and the fourth goes on by itself."""
    made = Pack(
        tmp_path,
        configs([{"train__seed": i} for i in range(4)], model__n_kv_head=2, train__max_iters=3, train__batch_size=4),
    )
    assert made.solo() == made.together() == ["done"] * 4
    made.equal()
    assert folds == [3]
    turns = Pack(tmp_path / "turns", made.configs)
    assert turns.solo() == turns.together(fold=False) == ["done"] * 4
    turns.equal()
    assert folds == [3]


def test_one_alone_is_the_plain_model(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    made = Pack(tmp_path, configs(NUMBERS[:1]))
    assert made.solo() == made.together() == ["done"]
    made.equal()
    assert folds == []


def test_a_fold_anew_keeps_the_state_of_optimizers(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """Lengths of 2, 3, 4, 6 and 8: packs of five, two, and then one alone."""
    changes = [{"train__max_iters": n, "train__seed": n} for n in (2, 3, 4, 6, 8)]
    made = Pack(tmp_path, configs(changes, model__dropout=0.1))
    assert made.solo() == made.together() == ["done"] * 5
    made.equal()
    assert folds == [5, 2] and torch.is_grad_enabled()
