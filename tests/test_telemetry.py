"""What is recorded of every slice: when, by hand, at no cost to the training, and where it goes."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_tracking import inspect, offline_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from engine.loop import Run

COLUMN = "slices/{address}/{name}"
NAMES = ("weight_norm", "grad_norm", "update_ratio")
RULES = {
    "k": {"match": "h.*.attn.qkv[k]", "frozen": True},
    "proj": {"match": "h.0.attn.proj", "frozen": True},
    "v": {"match": "h.*.attn.qkv[v]", "lr_scale": 0.5, "optimizer": "muon"},
}
ADAPTED = {"adapt": {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 2}}, "base": {"match": "**", "frozen": True}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("telemetry"))


def make(root: Path, folder: Path, interval: int | None = 1, **changes: Any) -> Run:
    return runs.make(folder, *runs.read(root, tracking__slice_interval=interval, **changes))


def told(run: Run) -> dict[str, dict[str, float]]:
    assert run.telemetry is not None
    return run.told_slices(run.telemetry)


def test_records_come_at_the_interval_and_leave_frozen_slices_out(root: Path, tmp_path: Path) -> None:
    run = make(root, tmp_path, 3, slices=RULES, model__bias=False)
    assert runs.drive(run) == "done"
    records = runs.records(tmp_path, "slices")
    assert [record["iter"] for record in records] == [3, 6]
    trained = [row.slice.address for row in run.rows if not row.settings.frozen]
    assert "h.1.attn.proj.weight" in trained and "h.0.attn.qkv.weight[v]" in trained
    for record in records:
        assert list(record) == ["kind", "iter", "tokens", "slices"] and record["tokens"] == record["iter"] * 64
        assert list(record["slices"]) == trained
        assert not any("[k]" in address or address == "h.0.attn.proj.weight" for address in record["slices"])
        for values in record["slices"].values():
            assert tuple(values) == NAMES and all(v > 0 and math.isfinite(v) for v in values.values())


def test_without_an_interval_nothing_is_recorded(root: Path, tmp_path: Path) -> None:
    run = make(root, tmp_path, None)
    assert runs.drive(run) == "done" and not runs.records(tmp_path, "slices")


def by_hand(run: Run) -> dict[str, Tensor]:
    """The slices of every parameter's tensors by address, cut out by hand: q, k and v are 16 rows each, PKL's a and b lead."""
    made: dict[str, Tensor] = {}
    for name, parameter in run.plain.named_parameters():
        stack = {f"{x}.": t for x, t in zip("ab", parameter, strict=True)} if parameter.dim() == 3 else {"": parameter}
        for number, tensor in stack.items():
            if ".qkv." in name:
                made |= {f"{name}[{number}{x}]": tensor[16 * i : 16 * i + 16] for i, x in enumerate("qkv")}
            else:
                made[f"{name}[{number[:-1]}]" if number else name] = tensor
    return made


def gradients(run: Run) -> dict[str, Tensor]:
    """The mean loss's gradient over the update's micro-batches, by another way: one graph, differentiated once."""
    train_ = run.config.train
    count = train_.gradient_accumulation_steps
    micro = [run.batches(run.state.iter * count + j) for j in range(count)]
    loss = torch.stack([run.plain(x, y)[1] for x, y in micro]).mean()
    found = torch.autograd.grad(loss, list(run.plain.parameters()))
    before = [p.data for p in run.plain.parameters()]
    for parameter, grad in zip(run.plain.parameters(), found, strict=True):
        parameter.data = grad
    made = {address: t.detach().clone() for address, t in by_hand(run).items()}
    for parameter, value in zip(run.plain.parameters(), before, strict=True):
        parameter.data = value
    return made


def norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum().sqrt())


@pytest.mark.parametrize("tree", [{}, {"model__linear": "pkl", "train__gradient_accumulation_steps": 2}])
def test_the_values_are_those_computed_by_hand(tree: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """The weight before the update, the gradient before it is clipped (here to a tenth and less), |dw| / |w|.

    Norms in float32 of up to 1024 elements against float64: 1e-5 is some 100 roundings. Gradients are sums in another order. An
    update is a difference of weights, so 2^-24 |w| off in each element, which is 1e-4 of an update of a thousandth of it.
    """
    run = make(root, tmp_path, 2, train__grad_clip=0.01, **tree)
    for _ in range(3):
        run.telemetry = None
        run.update()
    assert run.telemetry is None, "the third update is not recorded"
    grads, before = gradients(run), {a: t.detach().clone() for a, t in by_hand(run).items()}
    run.update()
    after, measured = by_hand(run), told(run)
    assert list(measured) == list(before)
    assert math.hypot(*(norm(g) for g in grads.values())) > 0.1
    for address, values in measured.items():
        assert values["weight_norm"] == pytest.approx(norm(before[address]), rel=1e-5), address
        assert values["grad_norm"] == pytest.approx(norm(grads[address]), rel=1e-4), address
        change = norm(after[address].double() - before[address].double()) / norm(before[address])
        assert values["update_ratio"] == pytest.approx(change, rel=1e-4), address


def test_gradients_are_told_unscaled(root: Path, tmp_path: Path) -> None:
    """A scale that is a power of two changes no bit of what is unscaled."""
    measured = []
    for scale in (1.0, 1024.0):
        run = make(root, tmp_path / str(scale))
        run.state.grad_scale = scale
        run.update()
        measured.append(told(run))
    assert measured[0] == measured[1]


def test_what_begins_at_zero_has_no_ratio_yet(root: Path, tmp_path: Path) -> None:
    """B of an adapter is zero before the first update, and A has no gradient; JSON has no infinity."""
    run = make(root, tmp_path, slices=ADAPTED, train__max_iters=2)
    assert runs.drive(run) == "done"
    first, second = (record["slices"] for record in runs.records(tmp_path, "slices"))
    assert list(first) == [f"h.{i}.attn.qkv[{p}].lora_{x}" for i in "01" for p in "qv" for x in "ab"]
    b, a = (first[f"h.0.attn.qkv[q].lora_{x}"] for x in "ba")
    assert b["weight_norm"] == 0 and b["grad_norm"] > 0 and b["update_ratio"] is None
    assert a["weight_norm"] > 0 and a["grad_norm"] == 0
    assert second["h.0.attn.qkv[q].lora_b"]["update_ratio"] > 0


@pytest.mark.parametrize("slices", [{}, RULES, ADAPTED])
def test_recording_changes_no_bit_of_the_training(slices: dict[str, Any], root: Path, tmp_path: Path) -> None:
    for interval in (None, 1):
        assert runs.drive(make(root, tmp_path / str(interval), interval, slices=slices, model__dropout=0.1)) == "done"
    plain, watched = tmp_path / "None", tmp_path / "1"
    assert runs.saved_bytes(plain) == runs.saved_bytes(watched)
    assert runs.records(plain) == [r for r in runs.records(watched) if r["kind"] != "slices"]
    assert len(runs.records(watched, "slices")) == 8


def test_a_resumed_run_has_every_record_once(root: Path, tmp_path: Path) -> None:
    stops = iter([False] * 5 + [True])
    assert runs.drive(make(root, tmp_path / "parts", 2), lambda: next(stops)) == "stopped"
    for name in ("parts", "whole"):
        assert runs.drive(make(root, tmp_path / name, 2)) == "done"
    assert runs.records(tmp_path / "parts") == runs.records(tmp_path / "whole")


# What it costs ----------------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


def reads(run: Run) -> tuple[Counter[str], int]:
    """How often an update and its record hand values to the host, and how many slices there are."""
    called: Counter[str] = Counter()

    def counting(name: str) -> Any:
        real = getattr(Tensor, name)

        def read(self: Tensor, *given: Any) -> Any:
            called[name] += 1
            return real(self, *given)

        return read

    run.update()
    with Operations() as seen, pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
            patch.setattr(Tensor, name, counting(name))
        run.update()
        measured = told(run)
    called["dense"] = seen.found["aten::_local_scalar_dense"]
    return called, len(measured)


def test_no_value_is_read_for_each_slice(root: Path, tmp_path: Path) -> None:
    """The host reads one tensor with everything, however many slices, layers and rules there are."""
    few, n = reads(make(root, tmp_path / "few", model__n_layer=1))
    many, m = reads(make(root, tmp_path / "many", model__n_layer=5, slices=RULES))
    numbers, _ = reads(make(root, tmp_path / "pkl", model__n_layer=3, model__linear="pkl"))
    assert m > 3 * n
    assert few == many == numbers and few["tolist"] == 1 and few["dense"] == 0


# Where it goes ----------------------------------------------------------------------------------------------------------------


def test_wandb_has_a_column_for_each_number_of_each_slice(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    changes = {
        "tracking__slice_interval": 4,
        "runner__root": str(tmp_path / "runs"),
        "tracking__wandb__mode": "offline",
    }
    assert train.main(["--config", str(runs.write(tmp_path / "w.yaml", runs.tree(root, **changes)))]) == 0
    (folder,) = (p.parent for p in tmp_path.glob("runs/*/*/result.json"))
    rows = {row["iter"]: row for row in inspect(offline_folder(folder))["history"]}
    records = runs.records(folder, "slices")
    assert [record["iter"] for record in records] == [4, 8]
    for record in records:
        found = {key: value for key, value in rows[record["iter"]].items() if key.startswith("slices")}
        told = {(a, n): value for a, values in record["slices"].items() for n, value in values.items()}
        assert found == {COLUMN.format(address=a, name=n): value for (a, n), value in told.items()}
        assert "train_loss" in rows[record["iter"]], "it is the row of the iteration's other records"
    assert not [key for i in (2, 6) for key in rows[i] if key.startswith("slices")]
