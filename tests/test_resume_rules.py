"""Optimizer state that comes back: under the same rules to the bit, and under other rules as separate parameters would go on.

The reference keeps every part as a parameter with an optimizer of its own, whose settings may change from one update to the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import reference_slices as ref
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from models import read, sentence
from reference_slices import SeparateGPT
from torch import Tensor, nn

from core.resolve import Resolver
from core.rules import SliceRule
from core.slices import Declaration, Layout, declare, initialise, materialise, slices
from core.weights import load_weights, weights
from core.yaml_files import ConfigError
from engine import checkpoint
from engine.data import Corpus
from engine.loop import Run
from engine.optim import Optimizers
from train_args import Config
from variations import CATALOGUE
from variations.init.distributions import Normal, Spread

FEW = limits(derandomize=True, deadline=None, max_examples=20)
SIZE = {
    "n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "head_dim": 8, "vocab_size": 11, "block_size": 6,
    "mlp": {"variant": "gated", "width": 8},
}  # fmt: skip
RATES = {  # learning rate and weight decay
    "adamw": (0.01, 0.1), "sgd": (0.3, 0.01), "lion": (0.002, 0.2), "muon": (0.02, 0.1), "adafactor": (0.01, 0.1),
}  # fmt: skip
CLIP = 0.3
PARTS = [f"h.0.attn.qkv.{x}[{part}]" for x in ("weight", "bias") for part in "qkv"] + [
    f"h.0.mlp.gate_up.{x}[{part}]" for x in ("weight", "bias") for part in ("gate", "up")
]
Rules = dict[str, dict[str, Any]]
Phase = dict[str, dict[str, Any]]  # by address, what is said of it


def start(name: str, rules: Mapping[str, Any], folder: Path = Path("nowhere"), **more: Any) -> Run:
    """A run over random tokens, continued where the folder has a checkpoint."""
    rate, decay = RATES[name]
    tree = {
        "model": {**SIZE, **more.pop("model", {})},
        "optimizer": {"variant": name, "learning_rate": rate, "weight_decay": decay, **more},
        "slices": dict(rules),
        "train": {"max_iters": 30, "batch_size": 2, "grad_clip": CLIP},
        "schedule": {"variant": "cosine", "warmup_iters": 0},
    }
    tokens = np.random.default_rng(0).integers(0, 11, 500).astype("<u2")
    return Run(read(Config, tree), Corpus(folder, cast(Any, None), tokens, tokens), folder, torch.device("cpu"))


def follow(before: Run, run: Run) -> Run:
    """Lets a new run continue from another's tensors."""
    run.state.iter = before.state.iter
    load_weights(run.plain, weights(before.plain))
    run.optimizers.load({key: tensor.clone() for key, tensor in before.optimizers.state().items()})
    return run


def updated(run: Run, steps: int) -> Run:
    for _ in range(steps):
        run.update()
    return run


def values(held: Optimizers) -> dict[str, Tensor]:
    """The slices by address, each a tensor of its own."""
    parts = ((row.slice, held.parameters[row.slice.parameter].detach()) for row in held.rows)
    return {part.address: part.view(whole).reshape(part.shape).clone() for part, whole in parts}


def differing(run: Run | Optimizers, wanted: Mapping[str, Tensor]) -> list[str]:
    """The addresses whose bits are not those of a reference."""
    got = values(run.optimizers if isinstance(run, Run) else run)
    assert list(got) == list(wanted)
    return [address for address, tensor in got.items() if not torch.equal(tensor, wanted[address])]


def entries(optimizers: Optimizers, parameter: str) -> list[tuple[str, ...]]:
    """Which slices of a parameter are updated together."""
    held = [entry for member in optimizers.members.values() for group in member.groups for entry in group.entries]
    found = [tuple(part.address for part in entry.covers) for entry in held if entry.covers[0].parameter == parameter]
    return sorted(found)


def rules_of(phase: Phase) -> Rules:
    return {f"r{i}": {"match": address, **said} for i, (address, said) in enumerate(phase.items())}


class Separate:
    """A run whose every part is a parameter with an optimizer of its own; a part that is frozen loses it."""

    def __init__(self, run: Run, name: str) -> None:
        m = run.config.model
        self.run, self.name, self.step = run, name, 0
        self.net = SeparateGPT(values(run.optimizers), m.n_layer, m.n_head, m.kv_heads, m.head_width, gated=True)
        self.own: dict[str, Any] = {}

    def update(self, phase: Phase, steps: int, betas: tuple[float, float] = (0.9, 0.99)) -> dict[str, Tensor]:
        """Some updates under what a phase says. Returns the parameters by address."""
        for _ in range(steps):
            trained = {a: p for a, p in self.net.p.items() if not phase.get(a, {}).get("frozen")}
            for address, p in self.net.p.items():
                p.grad = None
                p.requires_grad_(address in trained)
            self.net.loss(*self.run.batches(self.step)).backward()
            grads = [cast(Tensor, p.grad) for p in trained.values()]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
            torch._foreach_mul_(grads, (CLIP / (norm + 1e-6)).clamp(max=1.0))
            self.own = {address: self.own.get(address) or self.fresh(p) for address, p in trained.items()}
            for address, p in trained.items():
                said = phase.get(address, {})
                rate, decay = RATES[self.name]
                decay = said.get("weight_decay", 0.0 if ".bias" in address or "ln_" in address else decay)
                self.move(
                    address, p, rate * said.get("lr_scale", 1.0) * self.run.schedule.multiplier(self.step), decay, betas
                )
            self.step += 1
        return {address: p.detach() for address, p in self.net.p.items()}

    def fresh(self, p: nn.Parameter) -> Any:
        if self.name == "adamw":
            return torch.optim.AdamW([p], eps=1e-8, fused=True)
        return torch.optim.SGD([p], momentum=0.9, fused=True) if self.name == "sgd" else [torch.zeros_like(p)]

    def move(self, address: str, p: nn.Parameter, rate: float, decay: float, betas: tuple[float, float]) -> None:
        own = self.own[address]
        if isinstance(own, torch.optim.Optimizer):
            own.param_groups[0] |= {"lr": rate, "weight_decay": decay, "betas": betas}
            own.step()
        else:
            with torch.no_grad():
                new, own[0] = ref.lion_update(p, cast(Tensor, p.grad), own[0], rate, decay, betas)
                p.copy_(new)


@st.composite
def phases(draw: st.DrawFn) -> Phase:
    """Random settings of some parts."""
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "lr_scale": st.sampled_from([0.0, 0.3, 2.0]),
        "weight_decay": st.sampled_from([0.0, 0.5]),
        "frozen": st.booleans(),
    }
    said = st.fixed_dictionaries({}, optional=kinds).filter(bool)
    return draw(st.dictionaries(st.sampled_from(PARTS), said, max_size=6))


# The same rules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATES)
@limits(FEW, max_examples=6)
@given(phase=phases())
def test_under_the_same_rules_nothing_tells_that_a_run_was_interrupted(name: str, phase: Phase) -> None:
    whole = updated(start(name, rules_of(phase)), 2)
    again = follow(whole, start(name, rules_of(phase)))
    assert again.optimizers.state().keys() == whole.optimizers.state().keys()
    for _ in range(3):
        updated(whole, 1)
        updated(again, 1)
        assert torch.equal(cast(Tensor, whole.grad_norm), cast(Tensor, again.grad_norm))
    assert differing(again, values(whole.optimizers)) == []
    one, other = whole.optimizers.state(), again.optimizers.state()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# Other rules ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
@FEW
@given(told=st.lists(st.tuples(phases(), st.integers(1, 3)), min_size=2, max_size=4))
def test_rules_may_change_at_every_resumption(name: str, told: list[tuple[Phase, int]]) -> None:
    """Parts come together and go apart, freeze and thaw; after each phase every bit is that of separate parameters."""
    run = start(name, rules_of(told[0][0]))
    apart = Separate(run, name)
    for i, (phase, steps) in enumerate(told):
        run = updated(follow(run, start(name, rules_of(phase))) if i else run, steps)
        assert differing(run, apart.update(phase, steps)) == [], i


K = "h.0.attn.qkv.weight[k]"
QKV = "h.0.attn.qkv.weight"


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_a_rate_that_changes_at_the_third_step(name: str) -> None:
    """From one weight updated as a whole to parts, and back."""
    whole = start(name, {})
    apart = Separate(whole, name)
    assert entries(whole.optimizers, QKV) == [tuple(f"{QKV}[{x}]" for x in "qkv")]
    split = updated(follow(updated(whole, 3), start(name, rules_of({K: {"lr_scale": 0.2}}))), 3)
    assert entries(split.optimizers, QKV) == [(K,), (f"{QKV}[q]",), (f"{QKV}[v]",)]
    apart.update({}, 3)
    assert differing(split, apart.update({K: {"lr_scale": 0.2}}, 3)) == []
    merged = updated(follow(split, start(name, {})), 3)
    assert entries(merged.optimizers, QKV) == entries(whole.optimizers, QKV)
    assert differing(merged, apart.update({}, 3)) == []
    kept = updated(follow(split, start(name, rules_of({K: {"lr_scale": 0.2}}))), 3)
    assert K in differing(kept, values(merged.optimizers)), "and the rate counts"


def test_a_thawed_part_starts_as_new_and_keeps_its_own_count() -> None:
    frozen = {K: {"frozen": True}}
    run = updated(start("adamw", rules_of(frozen)), 4)
    thawed = follow(run, start("adamw", {}))
    state = thawed.optimizers.state()
    assert state[f"steps/{QKV}"].tolist() == [4, 0, 4]
    assert not any(state[f"adamw.{kind}/{QKV}"][16:24].any() for kind in ("exp_avg", "exp_avg_sq"))
    assert (state[f"adamw.exp_avg_sq/{QKV}"][:16] != 0).all(), "q goes on"
    assert entries(thawed.optimizers, QKV) == [(K,), (f"{QKV}[q]",), (f"{QKV}[v]",)], "other counts do not mix"
    apart = Separate(start("adamw", rules_of(frozen)), "adamw")
    apart.update(frozen, 4)
    expected = {}
    for steps in (1, 4):
        expected = apart.update({}, steps)
        assert differing(updated(thawed, steps), expected) == []
    assert thawed.optimizers.state()[f"steps/{QKV}"].tolist() == [9, 5, 9]
    again = updated(follow(thawed, start("adamw", {})), 2)
    assert differing(again, apart.update({}, 2)) == [], "nor after one more resumption"


def test_a_part_frozen_later_keeps_still_and_loses_its_state() -> None:
    run = updated(start("adamw", {}), 3)
    kept = values(run.optimizers)
    frozen = updated(follow(run, start("adamw", rules_of({K: {"frozen": True}}))), 3)
    assert [a for a, tensor in values(frozen.optimizers).items() if torch.equal(tensor, kept[a])] == [K]
    state = frozen.optimizers.state()
    assert state[f"steps/{QKV}"].tolist() == [6, -1, 6] and not state[f"adamw.exp_avg/{QKV}"][16:24].any()
    thawed = follow(frozen, start("adamw", {}))
    assert thawed.optimizers.state()[f"steps/{QKV}"].tolist() == [6, 0, 6]


def test_betas_may_change() -> None:
    whole = start("adamw", {})
    apart = Separate(whole, "adamw")
    run = follow(updated(whole, 3), start("adamw", {"all": {"match": "**", "betas": [0.5, 0.8]}}))
    apart.update({}, 3)
    assert differing(updated(run, 3), apart.update({}, 3, betas=(0.5, 0.8))) == []


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_rate_changes_where_each_part_is_a_matrix(name: str) -> None:
    """Against a run that was never interrupted, whose rate is changed in place."""
    whole = updated(start(name, rules_of({K: {"lr_scale": 0.5}})), 3)
    run = follow(whole, start(name, rules_of({K: {"lr_scale": 0.2}, f"{QKV}[v]": {"frozen": True}})))
    held = whole.optimizers.state()
    assert all(torch.equal(t, held[key]) for key, t in run.optimizers.state().items() if QKV not in key)
    updated(run, 1)
    (group,) = [g for member in whole.optimizers.members.values() for g in member.groups
                if [part.address for entry in g.entries for part in entry.covers] == [K]]  # fmt: skip
    group.learning_rate = RATES[name][0] * 0.2
    value = next(row for row in whole.rows if row.slice.address == f"{QKV}[v]")
    whole.optimizers.trained.remove(value)  # its gradient does not count any more
    updated(whole, 1)
    assert [a for a in differing(run, values(whole.optimizers)) if a != f"{QKV}[v]"] == []


# State of other shapes --------------------------------------------------------------------------------------------------------


class Lines(nn.Module):
    """Parts with a single row or column, whose averages over columns or rows have the part's own shape."""

    def __init__(self) -> None:
        super().__init__()
        layouts = {"rows": Layout((("a", 4), ("b", 1)), -2), "columns": Layout((("a", 1), ("b", 3)), -1),
                   "stack": Layout((("a", 2), ("b", 1)), -2, stack=(("x", "y"),)),
                   "groups": Layout((("a", 1), ("b", 2)), -2, groups=2)}  # fmt: skip
        shapes = {"rows": (5, 3), "columns": (5, 4), "stack": (2, 3, 4), "groups": (6, 3)}
        for name, layout in layouts.items():
            declare(self, name, shapes[name], Declaration(layout, "matrix", Normal(Spread(std=0.5))))


def lines(rules: Mapping[str, Any]) -> Optimizers:
    module = Lines()
    told = {name: read(SliceRule, rule) for name, rule in rules.items()}
    optimizer = read(Config, {"optimizer": {"variant": "adafactor", "learning_rate": 0.01}}).optimizer
    rows = Resolver(slices(module), CATALOGUE).resolve(told, optimizer)
    materialise(module, "cpu")
    initialise(module, 4)
    return Optimizers(module, rows)


def drive(optimizers: Optimizers, steps: range) -> None:
    """Updates by random gradients that depend on the step and the address alone."""
    for step in steps:
        for row in optimizers.rows:
            whole = optimizers.parameters[row.slice.parameter]
            whole.grad = torch.zeros_like(whole) if whole.grad is None else whole.grad
            view = row.slice.view(whole.grad)
            view.copy_(ref.initial_normal(step, row.slice.address, row.slice.shape, 0.2).reshape(view.shape))
        optimizers.step(1.0)


def test_adafactors_averages_are_each_slices_own() -> None:
    """Rules change and a part thaws; torch's own class on separate parameters does the same, to the bit."""
    first, second = {"s": {"match": "*[b]", "lr_scale": 0.5}}, {"s": {"match": "rows[a]", "lr_scale": 0.3}}
    first["still"] = {"match": "groups[b]", "frozen": True}
    whole = lines(first)
    apart = {address: nn.Parameter(tensor) for address, tensor in values(whole).items()}
    theirs = {address: torch.optim.Adafactor([p], foreach=False) for address, p in apart.items()}
    drive(whole, range(3))
    saved = {key: tensor.clone() for key, tensor in whole.state().items()}
    again = lines(second)
    for name, p in again.parameters.items():
        p.data.copy_(whole.parameters[name].data)
    again.load(saved)
    held = again.state()
    assert all(torch.equal(tensor, held[key]) for key, tensor in saved.items() if "groups" not in key)
    drive(again, range(3, 6))
    for step in range(6):
        for address, own in theirs.items():
            if step < 3:
                scale = 0.0 if address == "groups[b]" else 0.5 if "b]" in address else 1.0
            else:
                scale = 0.3 if address == "rows[a]" else 1.0
            if scale:
                own.param_groups[0]["lr"] = 0.01 * scale
                apart[address].grad = ref.initial_normal(step, address, tuple(apart[address].shape), 0.2)
                own.step()
    assert differing(again, {address: p.detach() for address, p in apart.items()}) == []


# Refusals ---------------------------------------------------------------------------------------------------------------------

MUON = {"keys": {"match": "h.*.attn.qkv[k]", "optimizer": {"variant": "muon", "learning_rate": 0.02}}}


def test_state_of_another_optimizer_is_refused_with_the_slice() -> None:
    run = updated(start("adamw", {}), 2)
    told = sentence(lambda: follow(run, start("adamw", MUON)))
    assert told.startswith(f"{K} was trained by adamw and is now to be trained by muon, which cannot continue")
    told = sentence(lambda: follow(updated(start("adamw", MUON), 1), start("adamw", {})))
    assert told.startswith(f"{K} was trained by muon and is now to be trained by adamw")
    assert "wte.weight was trained by adamw and is now to be trained by sgd" in sentence(
        lambda: follow(run, start("sgd", {}))
    )


def test_a_part_that_was_frozen_may_go_to_another_optimizer() -> None:
    """It has no state that could not be continued."""
    run = updated(start("adamw", rules_of({K: {"frozen": True}})), 2)
    later = follow(run, start("adamw", MUON))
    state = later.optimizers.state()
    assert state[f"steps/{QKV}"].tolist() == [2, 0, 2] and state[f"muon.steps/{QKV}"].tolist() == [-1, 0, -1]
    before = values(later.optimizers)[K]
    assert not torch.equal(values(updated(later, 1).optimizers)[K], before)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"n_layer": 2}, r"state is of another model: it differs in h\.1\."),
        ({"tie_weights": False}, r"state is of another model: it differs in head\.weight"),
        ({"bias": False}, r"state is of another model: it differs in h\.0\.attn\.proj\.bias"),
        ({"mlp": {"variant": "standard", "width": 8}}, r"state is of another model: it differs in h\.0\.mlp\.gate_up"),
        ({"linear": "pkl"}, r"state is of another model: it differs in h\.0\.attn"),
        ({"vocab_size": 12}, r"state exp_avg\w* of wte\.weight is \[11, 16\], not \[12, 16\]"),
        ({"n_kv_head": 2}, r"state exp_avg\w* of h\.0\.attn\.qkv\.(weight|bias) is \[32(, 16)?\], not \[48(, 16)?\]"),
    ],
)
def test_the_state_of_another_model_is_refused(model: dict[str, Any], words: str) -> None:
    saved = updated(start("adamw", {}), 1).optimizers.state()
    assert re.search(words, sentence(lambda: start("adamw", {}, model=model).optimizers.load(saved)))


@pytest.mark.parametrize(("name", "kind"), [("adamw", "exp_avg_sq"), ("sgd", "momentum_buffer"), ("lion", "exp_avg")])
def test_state_that_lacks_a_tensor_is_refused(name: str, kind: str) -> None:
    run = updated(start(name, {}), 1)
    saved = run.optimizers.state()
    del saved[f"{name}.{kind}/{QKV}"]
    assert f"state {kind} of {QKV} is missing" in sentence(lambda: start(name, {}).optimizers.load(saved))


# Checkpoints ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATES)
def test_state_comes_back_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    phase: Phase = {
        K: {"lr_scale": 0.3},
        f"{QKV}[v]": {"frozen": True},
        "h.0.mlp.gate_up.bias[up]": {"weight_decay": 0.1},
    }
    run = updated(start(name, rules_of(phase)), 2)
    state = run.optimizers.state()
    checkpoint.save(tmp_path, 2, weights(run.plain), state, {"iter": 2})
    found = checkpoint.latest(tmp_path)
    assert found is not None
    read_back = found.optimizer()
    assert read_back.keys() == state.keys()
    assert all(
        torch.equal(tensor, read_back[key]) and tensor.dtype == read_back[key].dtype for key, tensor in state.items()
    )
    again = start(name, rules_of(phase))
    again.optimizers.load(read_back)
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.optimizers.state().items())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_goes_on_under_other_rules_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    told: list[Phase] = [
        {K: {"frozen": True}},
        {K: {"lr_scale": 0.3, "weight_decay": 0.5}, "h.0.attn.qkv.bias[q]": {"frozen": True}},
        {},
    ]
    apart = Separate(start(name, {}), name)
    for i, phase in enumerate(told):
        run = start(name, rules_of(phase), tmp_path)
        assert run.state.iter == 3 * i
        assert differing(updated(run, 3), apart.update(phase, 3)) == []
        run.save()


def test_a_run_that_cannot_go_on_says_what_to_do(tmp_path: Path) -> None:
    updated(start("adamw", {}, tmp_path), 1).save()
    with pytest.raises(ConfigError) as error:
        start("adamw", MUON, tmp_path)
    told = str(error.value)
    assert f"{K} was trained by adamw and is now to be trained by muon" in told
    assert f"Remove {tmp_path / 'checkpoint'} to start the run anew." in told
