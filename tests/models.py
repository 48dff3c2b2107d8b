"""Small models, made from configuration as files make them, for the tests."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.options import Invalid, Reader, fields_of, hints, options_of
from gpt_conf import KINDS, ModelConfig
from model import GPT, build
from variations import CATALOGUE

SIZES = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 19}
MODERN = {
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "gated",
    "activation": "silu",
    "attention": {"variant": "causal", "qk_norm": True},
    "bias": False,
    "tie_weights": False,
}


@dataclass(frozen=True)
class Case:
    """One entry of one dictionary, with options that differ from its defaults."""

    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join([f"{self.kind}={self.name}", *(f"{k}={v}" for k, v in self.options.items())])

    def node(self) -> dict[str, Any]:
        return {"variant": self.name, **self.options}

    def trees(self) -> list[dict[str, Any]]:
        """The configurations to try it in: a GPT-2, a Llama, and this one stacked. One side of a tied pair cannot be another
        variation."""
        untied = {"tie_weights": False} if self.kind in ("embedding", "head") else {}
        return [{**base, self.kind: self.node(), **untied} for base in ({}, MODERN, {**MODERN, "stack_layers": True})]


def cases(kinds: tuple[str, ...] = KINDS) -> Iterator[Case]:
    """Every entry with its defaults, and once more for every other value of each option that is a switch or a choice."""
    for kind in kinds:
        for name, cls in CATALOGUE[kind].items():
            yield Case(kind, name)
            for option, spec in fields_of(options_of(cls)).items():
                for value in switches(hints(options_of(cls))[spec.name]):
                    if "kind" not in spec.metadata and value != spec.default:
                        yield Case(kind, name, {option: value})


def switches(tp: Any) -> list[Any]:
    """The values of a type that has few of them."""
    if tp is bool:
        return [True, False]
    if typing.get_origin(tp) is typing.Literal:
        return list(typing.get_args(tp))
    return [x for arm in typing.get_args(tp) for x in switches(arm)]


def read(cls: type, tree: dict[str, Any]) -> Any:
    """Options from a tree. Raises Invalid with every mistake."""
    reader = Reader(CATALOGUE)
    made = reader.read(cls, tree)
    if reader.mistakes:
        raise Invalid(*((".".join(m.path), f"{m.text} {m.advice}") for m in reader.mistakes))
    return made


def config(**tree: Any) -> ModelConfig:
    """The model's configuration, tiny where the tree says nothing."""
    made: ModelConfig = read(ModelConfig, {**SIZES, **tree})
    return made


def make(seed: int = 1, **tree: Any) -> Any:
    """A GPT with initial values. (Any: the type checker does not know what variations it is made of.)"""
    return build(config(**tree), seed)


def scrambled(seed: int = 1, std: float = 0.3, **tree: Any) -> Any:
    """A GPT whose parameters are all far from special values such as 0 and 1."""
    return scramble(make(seed, **tree), seed, std)


def scramble(model: GPT, seed: int = 1, std: float = 0.3) -> GPT:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return model


def tokens(model: GPT, b: int, t: int, seed: int = 0) -> Tensor:
    assert model.config.vocab_size is not None
    return torch.randint(model.config.vocab_size, (b, t), generator=torch.Generator().manual_seed(seed))


def losses(model: GPT, b: int = 2) -> Tensor:
    """The loss of a full context of random tokens."""
    x = tokens(model, b, model.config.block_size + 1)
    loss = model(x[:, :-1], x[:, 1:])[1]
    assert isinstance(loss, Tensor)
    return loss


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sentence(act: Callable[[], object]) -> str:
    """What the ValueError says that `act` must raise."""
    try:
        act()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")
