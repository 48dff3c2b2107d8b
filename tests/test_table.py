"""The update of many runs at once: the formulas of optimizers over a table of settings, against each run's own optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from core.weights import weights
from engine import checkpoint, pack
from engine.course import Course
from engine.table import Table
from engine.together import Together
from variations.optimizer import OPTIMIZERS

SIZES = {"model__n_embd": 32, "model__n_head": 2, "train__batch_size": 5}
RATES = {"adamw": 0.01, "sgd": 0.1, "lion": 0.001, "muon": 0.01}
ALIKE = 1e-5  # relative: some updates, each a few roundings of float32 (6e-8) apart; measured at most 3e-6
STEEP = 485  # muon's quintic multiplies a small singular value by 3.4445 five times, and what was rounded with it
PARTS = {
    "keys": {"match": "h.*.attn.qkv[k]", "lr_scale": 0.3},
    "values": {"match": "h.*.attn.qkv[v]", "weight_decay": 0.0},
    "still": {"match": "h.1.mlp.up", "frozen": True},
}
OTHERS = {
    "keys": {"match": "h.*.attn.qkv[k]", "lr_scale": 2.0},
    "values": {"match": "h.*.attn.qkv[v]", "weight_decay": 0.3},
    "still": {"match": "h.1.mlp.up", "frozen": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"))


def members(root: Path, folder: Path, every: list[dict[str, Any]]) -> list[pack.Member]:
    return runs.members(root, folder, [{**SIZES, **changes} for changes in every])


def together(root: Path, folder: Path, every: list[dict[str, Any]], most: int | None = None) -> dict[int, Any]:
    """How each run of a pack ended."""
    told: dict[int, Any] = {}

    def ended(member: pack.Member, how: str | Exception) -> None:
        told[int(member.run.folder.name)] = how

    pack.train(runs.makers(root, folder, [{**SIZES, **changes} for changes in every]), ended, most, True, False)
    return told


def compare(
    root: Path, tmp_path: Path, every: list[dict[str, Any]], weights_too: bool = True, most: int | None = None
) -> None:
    told = together(root, tmp_path / "pack", every, most)
    assert told == dict.fromkeys(range(len(every)), "done")
    for i, changes in enumerate(every):
        alone = runs.make(tmp_path / "alone" / str(i), *runs.read(root, **{**SIZES, **changes}))
        assert runs.drive(alone) == "done"
        ours, theirs = (checkpoint.latest(tmp_path / side / str(i) / "checkpoint") for side in ("pack", "alone"))
        assert ours is not None and theirs is not None
        assert ours.state["val_loss"] == pytest.approx(theirs.state["val_loss"], rel=ALIKE)
        assert {k: ours.state[k] for k in ("iter", "steps")} == {k: theirs.state[k] for k in ("iter", "steps")}
        saved, wanted = ours.optimizer(), theirs.optimizer()
        assert saved.keys() == wanted.keys()
        within = ALIKE * (STEEP if any(name.startswith("muon") for name in wanted) else 1)
        for name, tensor in wanted.items():
            assert same(saved[name], tensor, within), name
        for name, tensor in theirs.model().items() if weights_too else ():
            # Adam and the like move an element whose gradient is rounding noise by a learning rate, whatever its sign: such
            # elements (a key's bias) are far between, so weights are compared as a whole.
            gap = torch.linalg.vector_norm(ours.model()[name] - tensor)
            assert gap <= 1e-3 * torch.linalg.vector_norm(tensor) + 1e-6, name


def same(a: torch.Tensor, b: torch.Tensor, within: float) -> bool:
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= within * b.abs().max() + 1e-12)


@pytest.mark.parametrize("name", [name for name, cls in OPTIMIZERS.items() if not getattr(cls, "solo", None)])
def test_every_optimizer_moves_as_its_own_does(root: Path, tmp_path: Path, name: str) -> None:
    """Rules, options, seeds, lengths, accumulation and clipping of every run's own; a frozen part stays."""
    node = {"variant": name, "learning_rate": RATES[name], "weight_decay": 0.2}
    every: list[dict[str, Any]] = [
        {"slices": PARTS},
        {"train__seed": 3, "slices": OTHERS},
        {"train__max_iters": 6, "optimizer": {**node, "learning_rate": RATES[name] / 3}, "slices": PARTS},
        {"train__gradient_accumulation_steps": 2, "slices": OTHERS},
        {"train__grad_clip": 0.1, "optimizer": {**node, "weight_decay": 0.5}, "slices": PARTS},
    ]
    compare(root, tmp_path, [{"optimizer": node, **changes} for changes in every], weights_too=name != "lion")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_that_comes_later_moves_as_its_own_does(root: Path, tmp_path: Path, name: str) -> None:
    """In the place of one with other rules, numbers and accumulation."""
    still = {"still": PARTS["still"]}
    every: list[dict[str, Any]] = [
        {"train__max_iters": 3, "slices": still},
        {"train__seed": 3, "slices": still},
        {"train__grad_clip": 0.1, "train__max_iters": 6, "slices": OTHERS},
        {"train__gradient_accumulation_steps": 2, "train__seed": 4, "slices": PARTS},
    ]
    node = {"variant": name, "learning_rate": RATES[name], "weight_decay": 0.2}
    compare(root, tmp_path, [{"optimizer": node, **changes} for changes in every], most=2)


def test_other_options_of_an_optimizer_are_each_runs_own(root: Path, tmp_path: Path) -> None:
    node: dict[str, Any] = {"variant": "adamw", "learning_rate": 0.001}
    every = [
        {"optimizer": {**node, "betas": [b, 0.95], "eps": eps}} for b, eps in ((0.9, 1e-8), (0.5, 1e-4), (0.8, 1e-6))
    ]
    compare(root, tmp_path, every)
    node = {"variant": "muon", "learning_rate": 0.01, "heads_apart": True}
    every = [{"optimizer": {**node, "momentum": m, "rest": {"variant": "adamw", "eps": eps}}} for m, eps in
             ((0.9, 1e-8), (0.5, 1e-4), (0.95, 1e-6))]  # fmt: skip
    compare(root, tmp_path / "muon", every)


def test_two_optimizers_in_one_parameter(root: Path, tmp_path: Path) -> None:
    def rules(rate: float) -> dict[str, Any]:
        sgd = {"variant": "sgd", "learning_rate": rate}
        return {"slices": {"other": {"match": "h.*.attn.qkv[k]", "optimizer": sgd}}}

    compare(root, tmp_path, [rules(0.1), rules(0.03), rules(0.2)])


def adapter(rank: int, alpha: float, **changes: Any) -> dict[str, Any]:
    rules = {
        "base": {"match": "**", "frozen": True},
        "adapt": {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": rank, "alpha": alpha}},
        "all": {"match": "h.0.mlp.*", "lora": {"rank": rank, "alpha": alpha}, "weight_decay": 0.5},
    }
    return {"slices": rules, "train__init_seed": 5, **changes}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_of_several_ranks_share_a_base(root: Path, tmp_path: Path, optimizer: str) -> None:
    node = {"variant": optimizer, "learning_rate": 0.01}
    every = [adapter(rank, alpha, optimizer=node) for rank, alpha in ((2, 4.0), (4, 8.0), (3, 16.0))]
    compare(root, tmp_path, every)
    some = members(root, tmp_path / "again", every)
    ended: dict[int, Any] = {}
    courses = [Course(member, lambda m, how: ended.update({some.index(m): how})) for member in some]
    one = Together(courses, exact=False)
    assert set(one.fold.stacks) == {n for n, _ in some[0].run.plain.named_parameters() if "lora" in n}, "one base"
    one.go_on()
    for name, stack in one.fold.stacks.items():
        for p, whole in zip(one.fold.members[name], stack.data, strict=True):
            padding = whole.clone()
            padding[tuple(slice(0, n) for n in p.shape)] = 0.0
            assert not padding.any(), "what fills up a smaller rank stays zero, weight decay or not"


def test_experts_adapters_of_several_ranks(root: Path, tmp_path: Path) -> None:
    """Ranks are told from inputs by the tensor's own shape, also where a rank is as large as another run's input would be."""

    def one(rank: int, rate: float) -> dict[str, Any]:
        rules = {
            "base": {"match": "**", "frozen": True},
            "adapt": {"match": "h.*.mlp.gate_up[gate]", "lora": {"rank": rank, "alpha": 4.0}},
            "some": {"match": "h.*.mlp.gate_up[0.gate].lora_*", "lr_scale": rate},
        }
        moe = {"variant": "moe", "width": 8, "experts": 4}
        return {"slices": rules, "train__init_seed": 5, "model__mlp": moe}

    compare(root, tmp_path, [one(2, 1.0), one(4, 0.3), one(3, 3.0)])


def test_a_poisoned_run_changes_no_bit_of_another(root: Path, tmp_path: Path) -> None:
    """Not through clipping, settings, or the one tensor that all parameters lie in."""
    for name in RATES:
        node = {"variant": name, "learning_rate": RATES[name]}
        every = [{"optimizer": node, "train__seed": i} for i in range(3)]
        saved = []
        for poison in (False, True):
            some = members(root, tmp_path / name / str(poison), every)
            if poison:
                with torch.no_grad():
                    for p in some[1].run.plain.parameters():
                        p.fill_(float("nan"))
            one = Together([Course(member, lambda m, how: None) for member in some], exact=False)
            for _ in range(3):
                one.update(one.live())
            one.leave()
            saved.append([{n: t.clone() for n, t in weights(member.run.plain).items()} for member in some])
        clean, poisoned = saved
        for i in (0, 2):
            assert all(torch.equal(clean[i][n], poisoned[i][n]) for n in clean[i]), name
        assert poisoned[1]["wte.weight"].isnan().all()


def test_the_number_of_runs_is_measured_and_the_runs_stay_as_they_were(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "PROBE", 0.01)
    every = [{"train__seed": i, "model__dropout": 0.1} for i in range(5)]
    some = members(root, tmp_path / "pack", every)
    evaluated: dict[int, list[int]] = {i: [] for i in range(5)}
    for i, member in enumerate(some):
        member.say = lambda state, last, i=i: evaluated[i].append(state.iter) if last else None  # type: ignore[misc]
    told: dict[int, Any] = {}
    courses = [Course(member, lambda m, how: told.update({some.index(m): how})) for member in some]
    courses[0].alone()  # the evaluation before the first update
    assert 1 <= pack.knee(courses) <= 5
    for course in courses:
        while course.ask is not None:
            course.alone()
    for i, changes in enumerate(every):
        alone = runs.make(tmp_path / "alone" / str(i), *runs.read(root, **{**SIZES, **changes}))
        runs.drive(alone)
        assert runs.saved_bytes(alone.folder) == runs.saved_bytes(some[i].run.folder)
        assert evaluated[i] == [0, 4, 8]


@pytest.mark.parametrize(
    ("speeds", "wanted"), [((100, 190, 350, 360), 8), ((100, 99, 150, 150), 1), ((100, 120, 121, 500), 4)]
)
def test_the_knee(speeds: tuple[int, ...], wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many runs as long as that is worth it; alone where that is fastest."""

    class Fake:
        def __init__(self, some: list[Any], exact: bool) -> None:
            self.count = len(some)

        def speed(self, seconds: float) -> float:
            return speeds[self.count.bit_length() - 1]

        def leave(self) -> None: ...

    class Device:
        type = "cpu"

    class Run:
        device = Device()

    class Fellow:
        run = Run()

    monkeypatch.setattr(pack, "Together", Fake)
    monkeypatch.setattr(pack, "together", lambda some: list(some))
    monkeypatch.setattr(pack, "solo_speed", lambda run: speeds[0])
    fellows: Any = [Fellow()] * 8
    if wanted == 1:
        monkeypatch.setattr(Fake, "speed", lambda self, seconds: 99.0)
    assert pack.knee(fellows) == wanted


def test_an_optimizer_that_cannot_be_folded_says_why(root: Path, tmp_path: Path) -> None:
    node = {"variant": "adafactor"}
    some = members(root, tmp_path, [{"optimizer": node, "train__seed": i} for i in range(2)])
    one = Together([Course(member, lambda m, how: None) for member in some], exact=True)
    with pytest.raises(ValueError, match=r"wte.weight: adafactor's step"):
        Table(one.fold, [member.run for member in some])


def test_runs_that_cannot_be_updated_together_go_on_alone(root: Path, tmp_path: Path) -> None:
    """Their weights have been moved by then, and their own optimizers follow."""
    every = [{"optimizer": {"variant": "adafactor"}, "train__seed": i} for i in range(3)]
    assert together(root, tmp_path / "pack", every) == dict.fromkeys(range(3), "done")
    for i, changes in enumerate(every):
        alone = runs.make(tmp_path / "alone" / str(i), *runs.read(root, **{**SIZES, **changes}))
        assert runs.drive(alone) == "done"
        assert runs.saved_bytes(alone.folder) == runs.saved_bytes(tmp_path / "pack" / str(i))


def test_an_update_that_breaks_off_leaves_its_runs_to_their_checkpoints(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights have moved by then, and the runs are made anew and go on alone."""
    every = [{"train__seed": i} for i in range(3)]

    def broken(*args: Any) -> None:
        args[0].values.zero_()
        raise RuntimeError("no update today")

    monkeypatch.setattr(Table, "_elements", broken)
    assert together(root, tmp_path / "pack", every) == dict.fromkeys(range(3), "done")
    for i, changes in enumerate(every):
        alone = runs.make(tmp_path / "alone" / str(i), *runs.read(root, **{**SIZES, **changes}))
        assert runs.drive(alone) == "done"
        assert runs.saved_bytes(alone.folder) == runs.saved_bytes(tmp_path / "pack" / str(i))


def test_what_fails_before_that_is_harmless(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no forward pass today")

    monkeypatch.setattr(Together, "forward", broken)
    told = together(root, tmp_path, [{"train__seed": i} for i in range(3)])
    assert told == dict.fromkeys(range(3), "done")
