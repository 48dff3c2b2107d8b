"""Rungs: runs of a pack are judged when all have come, those that go on do so in place, with the bits of a run without rungs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import packs
import pytest
import runs
from packs import MOE, Pack

from engine import checkpoint, pack
from engine.loop import Run

RUNGS = (1, 3)  # no evaluation is due there, nor a checkpoint
Event = tuple[str, int, int]
WAYS = pytest.mark.parametrize("fold", [True, False])


class Strict:
    """A judge that notes what it is asked, and says what it was given, or raises it: by iteration; 'go' elsewhere."""

    def __init__(
        self, run: int, events: list[Event], says: dict[int, str | Exception], rungs: tuple[int, ...] = RUNGS
    ) -> None:
        self.run, self.events, self.says, self.rungs = run, events, says, rungs
        self.losses: dict[int, set[float]] = {}

    def record(self, iteration: int, loss: float) -> None:
        self.events.append(("record", self.run, iteration))
        self.losses.setdefault(iteration, set()).add(loss)

    def verdict(self, iteration: int) -> str:
        self.events.append(("verdict", self.run, iteration))
        told = self.says.get(iteration, "go")
        if isinstance(told, Exception):
            raise told
        return told


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"), 4000)


@pytest.fixture
def configs(root: Path) -> Any:
    return partial(packs.read, root)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs each folded model had."""
    return packs.watched(monkeypatch)


def judged(made: Pack, says: Sequence[dict[int, str | Exception]], rungs: tuple[int, ...] = RUNGS) -> list[Event]:
    events: list[Event] = []
    made.judges = [Strict(i, events, told, rungs) for i, told in enumerate(says)]
    return events


def at(events: list[Event], what: str, iteration: int) -> list[int]:
    return [i for i, event in enumerate(events) if event[0] == what and event[2] == iteration]


def saved(made: Pack, i: int) -> dict[str, Any]:
    found = checkpoint.latest(made.folder / f"pack{i}" / "checkpoint")
    assert found is not None
    return found.state


SLOW = [{"train__seed": i, "train__gradient_accumulation_steps": n} for i, n in enumerate((1, 3, 2))]
MODELS: dict[str, dict[str, Any]] = {
    "dropout": {"model__dropout": 0.1},
    "experts": {
        "model__mlp": {**MOE, "bias_rate": 0.01, "load_balance": None}
    },  # whose biases move in every forward pass
}


@WAYS
@pytest.mark.parametrize("model", MODELS)
def test_runs_wait_for_all_values_and_go_on_with_the_same_bits(
    fold: bool, model: str, tmp_path: Path, configs: Any, folds: list[int]
) -> None:
    """Those that are fast wait in the fold, where they are computed in vain."""
    made = Pack(tmp_path, configs(SLOW, **MODELS[model]))
    assert made.solo() == ["done"] * 3
    events = judged(made, [{}, {}, {}])
    assert made.together(fold=fold) == ["done"] * 3
    made.equal(evaluated=RUNGS)
    for rung in RUNGS:
        assert max(at(events, "record", rung)) < min(at(events, "verdict", rung))
    assert len(events) == 12 and folds == [3] * fold
    for i, judge in enumerate(made.judges):
        known = {one["iter"]: one["val_loss"] for one in runs.records(made.folder / f"pack{i}", "eval")}
        assert judge.losses == {rung: {known[rung]} for rung in RUNGS}  # type: ignore[union-attr]


@WAYS
def test_a_pack_is_halved_in_place(fold: bool, tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """One is pruned and one paused; the others stay where they are, and the paused one continues when it may."""
    made = Pack(tmp_path, configs([{"train__seed": i} for i in range(5)], model__dropout=0.1))
    assert made.solo() == ["done"] * 5
    judged(made, [{}, {1: "prune"}, {}, {3: "pause"}, {}])
    assert made.together(fold=fold) == ["done", "pruned", "done", "paused at iteration 3", "done"]
    made.equal([0, 2, 4], RUNGS)
    assert folds == [5] * fold
    result = made.members[1].run.result()
    assert result["iters"] == 1 and result["val_loss"] == runs.records(tmp_path / "pack1", "eval")[-1]["val_loss"]
    assert saved(made, 1)["iter"] == 1 and saved(made, 3)["iter"] == 3 and saved(made, 3)["judged"] == 1
    judged(made, [{}] * 5, RUNGS[:1])
    assert made.together(fold=fold) == ["done"] * 5
    assert runs.saved_bytes(tmp_path / "pack3") == runs.saved_bytes(tmp_path / "solo3")


@WAYS
def test_who_was_not_told_to_go_is_asked_again(fold: bool, tmp_path: Path, configs: Any) -> None:
    """Whether it was paused, or stopped while it waited for others. Who was told to go is not."""
    made = Pack(tmp_path, configs(SLOW[:2]))
    assert made.solo() == ["done"] * 2
    events = judged(made, [{1: "pause"}, {}])
    assert made.together(fold=fold) == ["paused at iteration 1", "done"]
    events = judged(made, [{}, {}])
    stopping = [False]

    def mend(i: int, member: pack.Member) -> pack.Member:
        def stop() -> bool:
            stopping[0] = stopping[0] or (i == 0 and ("record", 0, 3) in events)
            return stopping[0]

        member.stop = stop
        return member

    assert made.together(mend=mend, fold=fold) == ["stopped", "done"]
    assert events == [("record", 0, 1), ("verdict", 0, 1), ("record", 0, 3)]
    assert saved(made, 0) | {"seconds": 0} == saved(made, 0) | {"iter": 3, "judged": 1, "evaluated": 3, "seconds": 0}
    events.clear()
    assert made.together(fold=fold) == ["done", "done"]
    assert events == [("record", 0, 3), ("verdict", 0, 3)]
    made.equal(evaluated=RUNGS)


@WAYS
def test_a_stop_ends_those_that_wait(fold: bool, tmp_path: Path, configs: Any) -> None:
    made = Pack(tmp_path, configs(SLOW))
    assert made.solo() == ["done"] * 3
    events = judged(made, [{}, {}, {}])
    stopped: list[int] = []

    def mend(i: int, member: pack.Member) -> pack.Member:
        member.stop = lambda: bool(stopped) or (i == 0 and ("record", 0, 3) in events and not stopped.append(i))  # type: ignore[func-returns-value]
        return member

    assert made.together(mend=mend, fold=fold) == ["stopped"] * 3
    assert not at(events, "verdict", 3)
    assert made.together(fold=fold) == ["done"] * 3
    made.equal(evaluated=RUNGS)


def test_who_waits_in_a_table_is_not_moved(tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """Against runs that wait for nobody. The third is in another fold in the end, which rounds otherwise."""
    waiting, other = (Pack(tmp_path / name, configs(SLOW, **MODELS["experts"])) for name in ("waiting", "other"))
    judged(waiting, [{2: "pause"}] * 3, (1, 2))
    assert waiting.together(exact=False) == ["paused at iteration 2"] * 3
    assert other.together([2, 2, 2], exact=False) == ["stopped"] * 3
    for i in (0, 2):
        assert runs.saved_bytes(waiting.folder / f"pack{i}") == runs.saved_bytes(other.folder / f"pack{i}")
    assert folds[:1] == [3]


class Killed(BaseException):
    """The process is gone."""


@WAYS
@pytest.mark.parametrize(("owner", "place"), [(Strict, "record"), (Strict, "verdict"), (Run, "save")])
def test_a_kill_at_a_rung_changes_nothing(
    owner: Any, place: str, fold: bool, tmp_path: Path, configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a value was recorded or a verdict given, or when one that is paused was saved, before anybody was told."""
    made, act = Pack(tmp_path, configs(SLOW[1:])), getattr(owner, place)
    assert made.solo() == ["done"] * 2

    def killed(self: Any, *given: Any) -> None:
        told = act(self, *given)
        if (given or (self.state.iter,))[0] == 3:
            raise Killed
        return told

    judged(made, [{}, {3: "pause"}])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, place, killed)
        made.together(fold=fold)
    before = made.judges
    events = judged(made, [{}, {}])
    assert made.together(fold=fold) == ["done"] * 2
    made.equal(evaluated=RUNGS)
    assert ("verdict", 1, 3) in events
    both = zip(before, made.judges, strict=True)
    assert all(one.losses[3] == other.losses[3] for one, other in both if 3 in one.losses and 3 in other.losses)  # type: ignore[union-attr]


@WAYS
def test_a_judge_that_raises_ends_its_run_alone(fold: bool, tmp_path: Path, configs: Any) -> None:
    made = Pack(tmp_path, configs([{"train__seed": i} for i in range(3)]))
    assert made.solo() == ["done"] * 3
    judged(made, [{}, {3: OSError("no file today")}, {}])
    told = made.together(fold=fold)
    assert str(told[1]) == "no file today" and [told[0], told[2]] == ["done"] * 2
    made.equal([0, 2], RUNGS)


@WAYS
def test_nobody_waits_for_those_that_began_later(fold: bool, tmp_path: Path, configs: Any, folds: list[int]) -> None:
    """A freed place is taken by a run that is far behind; those that began together wait for each other alone."""
    made = Pack(tmp_path, configs([{"train__seed": i} for i in range(5)]))
    assert made.solo() == ["done"] * 5
    events = judged(made, [{}, {1: "prune"}, {}, {}, {}])
    assert made.together(fold=fold, most=3) == ["done", "pruned", "done", "done", "done"]
    made.equal([0, 2, 3, 4], RUNGS)
    assert max(at(events, "verdict", 3)[:2]) < events.index(("record", 3, 3))
    assert folds[:1] == [3] * fold and made.made == [0, 1, 2, 3, 4]


@WAYS
def test_two_rungs_of_several_lengths(fold: bool, tmp_path: Path, configs: Any) -> None:
    """Nobody waits for a run that will not come, because it is shorter, has ended, or is not judged."""
    lengths: list[dict[str, Any]] = [{"train__max_iters": n, "train__seed": n} for n in (2, 6, 5)]
    made = Pack(tmp_path, configs(lengths, train__gradient_accumulation_steps=2))
    assert made.solo() == ["done"] * 3
    judged(made, [{}, {}, {}])
    made.judges[0].rungs, made.judges[2] = (1,), None  # type: ignore[index, union-attr, misc]
    assert made.together(fold=fold) == ["done"] * 3
    made.equal([2])
    made.equal([1], RUNGS)
    made.equal([0], (1,))
