"""Every entry of the catalogue has every property, a plugin's entry too, and the properties catch what lacks them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Case, cases, config, scrambled, sentence, tokens
from properties import CHECKS, logits
from torch import Tensor, nn

from core.options import NoOptions, options_of
from core.slices import Declaration
from gpt_conf import KINDS
from variations import CATALOGUE
from variations.activation import ACTIVATIONS
from variations.linear.standard import Linear
from variations.site import Site

MODELS = list(cases())


@pytest.mark.parametrize("case", MODELS, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_every_variation_has_every_property(check: str, case: Case) -> None:
    CHECKS[check](case)


@pytest.mark.parametrize("case", [c for c in cases(("optimizer", "schedule")) if not c.options], ids=str)
def test_optimizers_and_schedules_are_documented(case: Case) -> None:
    CHECKS["documented"](case)


def test_every_kind_is_covered() -> None:
    """Each dictionary is one of the kinds of a model, an optimizer, a schedule or an adapter, and each entry is tried."""
    assert set(CATALOGUE) == {*KINDS, "optimizer", "schedule", "lora"}
    assert {(c.kind, c.name) for c in MODELS} == {(kind, name) for kind in KINDS for name in CATALOGUE[kind]}


@pytest.mark.parametrize("case", [c for c in MODELS if not c.options], ids=str)
def test_a_name_alone_composes_like_its_mapping(case: Case) -> None:
    tree = case.trees()[0]
    short, long = config(**{**tree, case.kind: case.name}), config(**{**tree, case.kind: {"variant": case.name}})
    assert short == long and getattr(short, case.kind).name == case.name
    assert isinstance(getattr(short, case.kind).options, options_of(CATALOGUE[case.kind][case.name]))


# Plugins ------------------------------------------------------------------------------------------------------------------------

PLUGIN = '''
"""Variations of a user."""
from dataclasses import dataclass
import torch
from torch import nn
from core.options import NoOptions, opt
from core.slices import Declaration, Layout, declare
from variations.activation import ACTIVATIONS
from variations.mlp import MLPS
from variations.norm import NORMS
from variations.init.distributions import ONES

class Divided(nn.Module):
    """Formula: y = g x / (1 + strength |x|)
    Source: this test.
    Shapes: any -> the same.
    """
    @dataclass(frozen=True)
    class Options:
        """Options of this norm."""
        strength: float = opt(0.5, "How strongly large values are divided.", ge=0.0)
        signed: bool = opt(False, "Whether the sign is kept out of the divisor.")
    def __init__(self, options, site, *, width):
        super().__init__()
        self.options = options
        declare(self, "weight", (width,), Declaration(Layout(), "vector", ONES))
    def forward(self, x):
        below = x if self.options.signed else x.abs()
        return self.weight * x / (1 + self.options.strength * below.square().sqrt())

class Sine(nn.Module):
    """Formula: y = x + sin(x)
    Source: this test.
    Shapes: any -> the same.
    """
    def __init__(self, options, site):
        super().__init__()
    def forward(self, x):
        return x + x.sin()

class Twice(nn.Module):
    """Formula: y = W_out act(W_mid act(W_in x))
    Source: this test.
    Shapes: [B, T, C] -> the same.
    """
    Options = NoOptions
    def __init__(self, options, site):
        super().__init__()
        c = site.config.n_embd
        self.first = site.make("linear", "first", in_features=c, out_features=c)
        self.mid = site.make("linear", "mid", in_features=c, out_features=c, parts=(("even", c // 2), ("odd", c // 2)))
        self.last = site.make("linear", "last", in_features=c, out_features=c, residual=True)
        self.act = site.make("activation", "act")
    def forward(self, x):
        return self.last(self.act(self.mid(self.act(self.first(x)))))

NORMS["divided"], ACTIVATIONS["sine"], MLPS["twice"] = Divided, Sine, Twice
'''


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test adds to the dictionaries is gone after it."""
    before = {kind: dict(known) for kind, known in CATALOGUE.items()}
    yield
    for kind, known in CATALOGUE.items():
        assert isinstance(known, dict)
        known.clear()
        known.update(before[kind])


def test_a_plugins_classes_are_picked_and_checked_like_our_own(
    catalogue: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)
    spec.loader.exec_module(module)
    added = [c for c in cases() if c not in MODELS]
    assert [str(c) for c in added] == ["norm=divided", "norm=divided,signed=True", "activation=sine", "mlp=twice"]
    for case in added:
        for check in CHECKS.values():
            check(case)
    chosen = config(norm={"variant": "divided", "strength": 2}, sites={"one": {"match": "h.0.**", "mlp": "twice"}})
    assert chosen.norm.options.strength == 2.0
    text = sentence(lambda: config(norm={"variant": "divided", "strength": -1}))
    assert "norm.strength" in text and "-1.0 is not >= 0.0" in text
    assert "Did you mean 'divided'" in sentence(lambda: config(norm="divide"))


class OverTime(nn.Module):
    """A norm that subtracts the mean over time, and so sees the future."""

    def __init__(self, options: Any, site: Site, *, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-2, keepdim=True)


class Undeclared(nn.Module):
    """A norm with a weight that no slice lists."""

    def __init__(self, options: Any, site: Site, *, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Detached(nn.Module):
    """An activation that stops gradients."""

    def __init__(self, options: Any, site: Site) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Noisy(Detached):
    """An activation that draws noise."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Forgetful(Detached):
    """An activation that looks one position back and does not remember it between calls."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.pad(x, (0, 0, 1, 0))[:, :-1]


class Persistent(Detached):
    """An activation with a number in its checkpoint."""

    strength: Tensor

    def __init__(self, options: Any, site: Site) -> None:
        super().__init__(options, site)
        self.register_buffer("strength", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.strength


class Global:
    """An init that draws from torch's own stream."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape)


class Unscaled(Linear):
    """A linear that forgets the residual gain."""

    def declare_weight(self, options: Any, shape: tuple[int, ...], what: Declaration) -> None:
        super().declare_weight(options, shape, replace(what, residual=1.0))


@pytest.mark.parametrize(
    ("kind", "cls", "check"),
    [
        ("norm", OverTime, "causal"),
        ("norm", Undeclared, "covered"),
        ("norm", Undeclared, "documented"),
        ("activation", Detached, "gradients"),
        ("activation", Noisy, "evaluation"),
        ("activation", Forgetful, "cached"),
        ("activation", Persistent, "state_dict"),
        ("init", Global, "initial"),
        ("linear", Unscaled, "spread"),
    ],
)
def test_the_properties_catch_what_lacks_them(catalogue: None, kind: str, cls: type, check: str) -> None:
    known: Any = CATALOGUE[kind]
    known["broken"] = cls
    with pytest.raises(AssertionError):
        CHECKS[check](Case(kind, "broken"))


def test_options_that_have_none_refuse_any() -> None:
    assert "unknown key" in sentence(lambda: config(activation={"variant": "relu", "slope": 1.0}))
    assert options_of(ACTIVATIONS["relu"]) is NoOptions


def test_tokens_and_nothing_else_matter() -> None:
    """Rows of a batch do not see one another."""
    model = scrambled()
    x = tokens(model, 3, 8)
    other = torch.cat((x[:1], tokens(model, 2, 8, seed=9)))
    assert torch.equal(logits(model, x)[0], logits(model, other)[0])
