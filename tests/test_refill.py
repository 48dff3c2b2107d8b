"""Packs of more runs than are computed at once: runs that wait take the places of those that end, in the same tensors, and leave
what each leaves alone. Where memory runs out, fewer are computed at once and nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import packs
import pytest
import runs
import torch
from packs import MOE, Pack
from torch import Tensor

from engine import pack
from engine.course import Course, Queue, take_turns
from engine.loop import Run
from engine.together import Together

LENGTHS = (3, 6, 5, 2, 7)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"), 4000)


@pytest.fixture
def configs(root: Path) -> Any:
    return partial(packs.read, root)


class Watched(Together):
    """Notes how many runs a fold has and which came later, and that its tensors stay where they are."""

    seen: list[int]
    placed: list[str]

    def __init__(self, courses: Any, *rest: Any) -> None:
        self.seen.append(len(courses))
        super().__init__(courses, *rest)

    def put(self, r: int, course: Course) -> None:
        before = self.static()
        super().put(r, course)
        assert self.static() == before
        assert {p.data_ptr() for p in course.run.plain.parameters()} <= {
            s.data_ptr() for stack in self.stacks() for s in stack
        }
        self.placed.append(course.run.folder.name)

    def stacks(self) -> list[Tensor]:
        return [*self.fold.stacks.values(), *self.fold.shared.values()]

    def static(self) -> list[int]:
        """Where everything is that a captured step would read and write."""
        found = [self.x, self.y, self.starts, self.parts, self.factors, self.alive, self.due, self.told, self.norms]
        found += [*self.fold.stacks.values(), *self.fold.knobs.values(), *self.fold.shared.values()]
        if (table := self.table) is not None:
            found += [table.values, table.gradients, table.column, table.steps, table.limit]
            for kind in table.kinds.values():
                found += [kind.mine, *kind.state.values(), *kind.columns.values()]
        return [t.data_ptr() for t in found]


@pytest.fixture(autouse=True)
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Watched]]:
    Watched.seen, Watched.placed = [], []
    monkeypatch.setattr(pack, "Together", Watched)
    yield Watched


MODELS: dict[str, dict[str, Any]] = {
    "pkl": {"model__linear": "pkl"},
    "stacked": {"model__stack_layers": True, "model__n_layer": 2},
    "experts": {"model__mlp": {**MOE, "bias_rate": 0.01, "load_balance": None}},
    "muon": {"optimizer": {"variant": "muon", "learning_rate": 0.01}},
}


def of_lengths() -> list[dict[str, Any]]:
    """Five runs of several lengths and all numbers of their own."""
    own = [{**numbers, "train__max_iters": n} for numbers, n in zip(packs.NUMBERS, LENGTHS, strict=True)]
    own = [{**one, "model__dropout": 0.1 * (i + 1)} for i, one in enumerate(own)]
    return [{k: v for k, v in one.items() if not k.startswith("optimizer__")} for one in own]


@pytest.mark.parametrize("model", MODELS)
def test_runs_that_wait_take_the_places_of_those_that_end(model: str, tmp_path: Path, configs: Any) -> None:
    """In the middle of the accumulation of others, at other iterations than theirs."""
    made = Pack(tmp_path, configs(of_lengths(), **MODELS[model]))
    assert made.solo() == made.together(most=3) == ["done"] * 5
    made.equal()
    assert Watched.seen[0] == 3 and Watched.placed == ["pack3", "pack4"], "all in one fold"


def test_a_run_is_made_when_it_has_a_slot(tmp_path: Path, configs: Any) -> None:
    made, live, most = Pack(tmp_path, configs(of_lengths())), set[int](), [0]

    def mend(i: int, member: pack.Member) -> pack.Member:
        done = [j for j in live if made.members.get(j)]
        live.difference_update(done)
        live.add(i)
        most.append(len(live))
        return member

    assert made.solo() == made.together(mend=mend, most=2, fold=False) == ["done"] * 5
    made.equal()
    assert max(most) == 2 and made.made == [0, 1, 2, 3, 4] and not Watched.seen


def test_nothing_of_a_run_that_diverged_is_left_in_its_place(tmp_path: Path, configs: Any) -> None:
    """Weights, moments, gradients, losses and buffers are full of NaN there."""
    changes: list[dict[str, Any]] = [
        {"train__seed": i, "train__gradient_accumulation_steps": 1 + i % 2} for i in range(5)
    ]
    for i in (0, 1):
        changes[i] |= {"optimizer__learning_rate": 1e30, "train__grad_clip": None}
    common = {"train__max_iters": 6, "train__eval_interval": 2, "model__dropout": 0.1}
    made = Pack(tmp_path, configs(changes, **common))
    wanted = ["diverged", "diverged", "done", "done", "done"]
    assert made.solo() == wanted and made.together(most=3) == wanted
    made.equal()
    assert Watched.seen[0] == 3 and Watched.placed == ["pack3", "pack4"]


def test_a_run_that_does_not_fit_waits_for_another_model(tmp_path: Path, configs: Any) -> None:
    """Its adapter is larger than those that there are; a smaller one fits."""

    def adapter(rank: int) -> dict[str, Any]:
        rules = {"still": {"match": "**", "frozen": True}, "some": {"match": "h.*.mlp.*", "lora": {"rank": rank}}}
        return {"slices": rules, "train__init_seed": 3}

    lengths = [2, 6, 5, 4, 3]
    ranks = [64, 64, 64, 128, 128]
    changes = [{**adapter(k), "train__max_iters": n, "train__seed": n} for k, n in zip(ranks, lengths, strict=True)]
    made = Pack(tmp_path, configs(changes, model__n_embd=128))
    assert made.solo() == made.together(most=2) == ["done"] * 5
    made.equal()
    assert Watched.seen[:2] == [2, 2] and Watched.placed == ["pack2", "pack4"]


def test_what_waits_continues_where_it_was(tmp_path: Path, configs: Any) -> None:
    made = Pack(tmp_path, configs(of_lengths()))
    at = [None, 4, 3, None, 5]
    assert made.solo() == ["done"] * 5
    assert made.together(at, most=2) == ["done", "stopped", "stopped", "done", "stopped"]
    assert made.together(most=3) == ["done"] * 5
    made.equal()


# By the table ---------------------------------------------------------------------------------------------------------------


def spoil(one: Together, r: int) -> None:
    """Fills everything that a run has there with NaN."""
    assert one.table is not None
    whole = [one.table.gradients, *(t for kind in one.table.kinds.values() for t in kind.state.values())]
    stacks = [t[place].view(one.fold.stacks[name].shape) for t in whole for name, place in one.table.places.items()]
    for stack in (*stacks, *(stack.data for stack in one.fold.stacks.values()), one.norms):
        stack[r] = float("nan")
    one.partial[r] = float("nan")


@pytest.mark.parametrize("what", ["adamw", "muon", "adapter"])
def test_a_poisoned_place_changes_no_bit_of_the_next_run(what: str, root: Path, tmp_path: Path) -> None:
    """Also where rules cut its weights otherwise than those of all that were there, or where it is smaller than its place."""

    def rules(rank: int, **more: Any) -> dict[str, Any]:
        still = {"match": "**", "frozen": True}
        return {"still": still, "some": {"match": "h.*.mlp.*", "lora": {"rank": rank}, "weight_decay": 0.5, **more}}

    sizes: dict[str, Any] = {"model__n_embd": 32, "model__n_head": 2, "train__batch_size": 5, "train__init_seed": 3}
    sizes["optimizer"] = {"variant": "muon" if what == "muon" else "adamw", "learning_rate": 0.01}
    first = rules(4) if what == "adapter" else {}
    keys = {"match": "h.*.attn.qkv[k]", "lr_scale": 0.3, "weight_decay": 0.5}
    last = rules(2, lr_scale=2.0) if what == "adapter" else {"keys": keys}
    every = [{"train__seed": i, "train__max_iters": n, "slices": first} for i, n in enumerate((2, 6))]
    every.append({"train__seed": 9, "slices": last, "train__gradient_accumulation_steps": 2})
    saved = []
    for poison in (False, True):
        queue = Queue(runs.makers(root, tmp_path / str(poison), [{**sizes, **one} for one in every]), lambda *_: None)
        one = Watched(queue.take(2), False, queue)
        while len(live := one.live()) == 2:
            asking = [r for r in live if one.courses[r].ask != ("update",)]
            one.serve(asking) if asking else one.update(live)
        if poison:
            spoil(one, 0)
        one.go_on()
        queue.give_back(queue.live())
        take_turns(queue)
        saved.append([runs.saved_bytes(tmp_path / str(poison) / str(i)) for i in (1, 2)])
    assert saved[0] == saved[1] and Watched.placed == ["2", "2"]


# Memory ---------------------------------------------------------------------------------------------------------------------


def fail(monkeypatch: pytest.MonkeyPatch, owner: Any, place: str, at: Collection[int]) -> None:
    """Lets memory be out at calls of a method, by number."""
    act, calls = getattr(owner, place), itertools.count(1)

    def failing(self: Any, *given: Any) -> Any:
        if next(calls) in at:
            raise torch.OutOfMemoryError("no memory today")
        return act(self, *given)

    monkeypatch.setattr(owner, place, failing)


@pytest.mark.parametrize(
    ("owner", "place", "at"),
    [
        (Watched, "_compute", (4, 8)),
        (Watched, "evaluate", (1,)),
        (Run, "step", (8, 13)),  # some runs have moved by then
        (Watched, "__init__", (1, 2)),
    ],
)
def test_where_memory_is_out_half_as_many_go_on(
    owner: Any,
    place: str,
    at: tuple[int, ...],
    tmp_path: Path,
    configs: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Five are two, and then each is alone."""
    made = Pack(tmp_path, configs(of_lengths()))
    assert made.solo() == ["done"] * 5
    fail(monkeypatch, owner, place, at)
    assert made.together() == ["done"] * 5
    made.equal()
    assert made.made[:5] == [0, 1, 2, 3, 4] and len(made.made) > 5, "made anew"
    out = capsys.readouterr().out
    assert [f"they go on with {n}, from their checkpoints" in out for n in (2, 1)] == [True, len(at) > 1]
    assert {*Watched.seen[1:]} <= {2}


def test_runs_that_take_turns_have_memory_in_turns(
    tmp_path: Path, configs: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made = Pack(tmp_path, configs(of_lengths()))
    assert made.solo() == ["done"] * 5
    fail(monkeypatch, Run, "update", (9, 11))
    assert made.together(fold=False) == ["done"] * 5
    made.equal()
    out = capsys.readouterr().out
    assert "they go on with 2, from" in out and "they go on with 1, from" in out


def test_one_alone_that_has_too_little_memory_ends(
    tmp_path: Path, configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not."""
    made = Pack(tmp_path, configs(of_lengths()))
    assert made.solo() == ["done"] * 5
    act = Run.update

    def update(run: Run) -> None:
        if run.folder.name == "pack1":
            raise torch.OutOfMemoryError("no memory today")
        act(run)

    monkeypatch.setattr(Run, "update", update)
    told = made.together(fold=False)
    assert isinstance(told[1], torch.OutOfMemoryError) and [*told[:1], *told[2:]] == ["done"] * 4
    made.equal([0, 2, 3, 4])


def test_a_run_that_cannot_be_made_for_want_of_memory_waits(
    tmp_path: Path, configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no place, and is made when the others are done."""
    made = Pack(tmp_path, configs(of_lengths()))
    assert made.solo() == ["done"] * 5
    tried: list[int] = []

    def mend(i: int, member: pack.Member) -> pack.Member:
        tried.append(i)
        if i == 3 and tried.count(3) == 1:
            member.tracker.close()  # type: ignore[attr-defined]
            raise MemoryError("no memory today")
        return member

    assert made.together(mend=mend, most=3) == ["done"] * 5
    made.equal()
    assert tried == [0, 1, 2, 3, 3, 4] and made.made == [0, 1, 2, 3, 4]
