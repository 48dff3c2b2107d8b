"""A model of ours as others have to take it: what stands at which place, the weights that multiply, and where two models differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convert.mapping import matches
from core.addresses import is_adapter
from core.layout import Layout
from core.lora import adapted, effective
from core.options import Variant, options_of, plain
from core.slices import declared
from core.weights import weights
from gpt_conf import KINDS, ModelConfig, SiteRule
from model import GPT
from variations import CATALOGUE
from variations.linear.quantised import QuantisedLinear
from variations.site import Site

# Of one weight that multiplies, whatever it is made of.
MADE = {"linear": ("pkl", "quantised"), "embedding": ("pkl",), "head": ("pkl", "quantised")}
# What does not change what a model computes in evaluation, and what shapes or rules say.
SILENT = {
    "attention": ("kernel", "chunk", "dt_min", "dt_max", "qkv_bias", "proj_bias", "conv_bias"),
    "mlp": ("expansion", "width", "load_balance", "z_loss", "capacity_factor"),
    "norm": ("zero_centred", "gain", "bias"),
}
SIZES = (
    *("n_layer", "n_head", "kv_heads", "head_width", "n_embd", "block_size", "vocab_size", "tie_weights"),
    *("embedding_factor", "logit_softcap"),
)


class Ours:
    """A model without memory, with every weight as what multiplies: `nodes` are the variations by place, `shapes` those of the
    weights, by name. Layers are separate. Raises Invalid for a model that cannot be."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = plainly(config)
        model = GPT(replace(self.config, block_size=1))  # without the tables of rotary positions, which are large
        if model.wpe is not None:
            model = GPT(self.config)
        self.shapes = {name: tuple(t.shape) for name, t in weights(model).items()}
        self.layouts = {name: what.layout for name, _, what in declared(model)}
        self.nodes: dict[str, tuple[str, Variant]] = {}
        for path, module in model.named_modules():
            kind = "head" if path == "head" else _kind(type(module))
            if kind is not None:
                fallback = "linear" if kind == "head" else None
                self.nodes[path] = kind, self._settled(Site(self.config, CATALOGUE, path).node(kind, fallback))

    def _settled(self, node: Variant) -> Variant:
        """A variation in the one form of several that say the same."""
        c, o = self.config, node.options
        if getattr(o, "normalise", "") == "after":  # a softmax over the chosen is that over all, divided by their sum
            o = replace(o, normalise="before", renormalise=True)
        if getattr(o, "qk_norm", None) is not None and o.scale == c.head_width**-0.5:
            o = replace(o, scale=None)
        if hasattr(o, "short_factors"):
            ones = (1.0,) * (int(c.head_width * o.fraction) // 2)
            factor = o.factor or c.block_size / o.original_length
            o = replace(o, factor=factor, short_factors=o.short_factors or ones, long_factors=o.long_factors or ones)
        if node.name == "mamba2" and o.head_dim is None:
            o = replace(o, head_dim=math.gcd(o.expand * c.n_embd, 64))
        return replace(node, options=o)

    def option(self, path: str, name: str, default: Any = None) -> Any:
        """An option of what stands at a place; the default where there is no such place or option."""
        _, node = self.nodes.get(path, ("", Variant("")))
        return getattr(node.options, name, default)

    def name(self, path: str) -> str:
        """The variation at a place; empty where there is no such place."""
        return self.nodes[path][1].name if path in self.nodes else ""

    def named(self, pattern: str) -> list[str]:
        """The weights that a pattern stands for."""
        return [name for name in self.shapes if matches(pattern, name) is not None]

    def shape(self, pattern: str, default: tuple[int, ...] = (1, 1)) -> tuple[int, ...]:
        """The shape of the first weight that a pattern stands for."""
        found = self.named(pattern)
        return self.shapes[found[0]] if found else default

    def layout(self, pattern: str) -> Layout:
        """How the parts lie in the weights that a pattern stands for. Raises ValueError where they lie in several ways."""
        found = {self.layouts[name]: name for name in self.named(pattern)}
        if len(found) > 1:
            told = "; ".join(f"{name} has {', '.join(f'{p} {n}' for p, n in x.parts)}" for x, name in found.items())
            raise ValueError(f"One rule is for all of {pattern}, and they are made differently: {told}.")
        return next(iter(found))


def _kind(cls: type) -> str | None:
    return next((kind for kind in KINDS if kind != "head" and cls in CATALOGUE[kind].values()), None)


def plainly(config: ModelConfig) -> ModelConfig:
    """The configuration of the same model with plain weights in the place of those that are made of others, and separate layers."""

    def made(kind: str, node: Variant | None) -> Variant | None:
        if node is None or node.name not in MADE.get(kind, ()):
            return node
        return Variant("standard", options_of(CATALOGUE[kind]["standard"])())

    def plain_site(rule: SiteRule) -> SiteRule:
        chosen: dict[str, Any] = {kind: made(kind, getattr(rule, kind)) for kind in MADE}
        return replace(rule, **chosen)

    sites = {name: plain_site(rule) for name, rule in config.sites.items()}
    nodes: dict[str, Any] = {kind: made(kind, getattr(config, kind)) for kind in MADE}
    return replace(config, sites=sites, stack_layers=False, **nodes)


class Multiplied:
    """The weights of a model as they multiply, adapters merged, under the names of separate layers: each made when it is asked for.
    The model is not changed. `notes` say what was made of several."""

    def __init__(self, model: GPT, ours: Ours) -> None:
        self.own = {name: t for name, t in weights(model).items() if not is_adapter(name)}
        self.shapes, self.modules = ours.shapes, dict(model.named_modules())
        self.notes = [f"{n} weights have their adapters merged into them" for n in [len(adapted(model))] if n]
        made = [n for n, t in self.own.items() if tuple(t.shape) != self.shapes.get(n)]
        self.notes += [f"{len(made)} weights are written as what multiplies, a + scale * b"] if made else []
        rounded = sum(isinstance(module, QuantisedLinear) for module in self.modules.values())
        self.notes += [f"{rounded} weights are written rounded, as they multiply"] if rounded else []

    def names(self) -> list[str]:
        return list(self.own)

    def meta(self, name: str) -> Tensor:
        own = self.own[name]
        return torch.empty(self.shapes.get(name, own.shape), dtype=own.dtype, device="meta")

    @torch.no_grad()
    def get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module: Any = self.modules.get(path)
        made: Tensor = effective(module) if leaf == "weight" and hasattr(module, "effective") else self.own[name]
        return made.detach()


# Differences ---------------------------------------------------------------------------------------------------------------


def differences(given: Ours, back: Ours, unsaid: tuple[str, ...]) -> list[str]:
    """What of one model another does not have, each as a sentence. unsaid: options of the model that need not agree."""
    found: dict[str, list[str]] = {}
    for place, text in _differences(given, back, unsaid):
        found.setdefault(text, []).append(place)
    told = []
    for text, places in found.items():
        some = ", ".join(p for p in places[:3] if p) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        told.append(f"{some}: {text}." if some else f"{text}.")
    return told


def _differences(given: Ours, back: Ours, unsaid: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in SIZES:
        mine, theirs = (getattr(x.config, name) for x in (given, back))
        if mine != theirs and name not in unsaid:
            yield f"model.{name}", f"it is {mine}, and the family would have {theirs}"
    for path, (kind, node) in given.nodes.items():
        other = back.nodes.get(path, ("", Variant("")))[1]
        if node.name != other.name:
            told = f"'{other.name}' there" if other.name else "nothing there"
            yield path, f"the {kind} is '{node.name}', and the family has {told}"
            continue
        mine, theirs = _spoken(kind, node), _spoken(kind, other)
        for option in {**mine, **theirs}:
            if mine.get(option) != theirs.get(option):
                yield (
                    path,
                    f"{option} of the {kind} is {mine.get(option)}, and the family would have {theirs.get(option)}",
                )
    for path, (kind, node) in back.nodes.items():
        if path not in given.nodes and node.name not in ("none", "identity"):
            yield path, f"the family has the {kind} '{node.name}' there"
    for name, shape in given.shapes.items():
        if name not in back.shapes:
            yield name, "the family has no such weight"
        elif shape != back.shapes[name]:
            yield name, f"it is {list(shape)}, and the family would have {list(back.shapes[name])}"
    for name in back.shapes:
        if name not in given.shapes:
            yield name, "the family has this weight, and the model does not"


def _spoken(kind: str, node: Variant) -> dict[str, Any]:
    options: Mapping[str, Any] = plain(node.options)
    return {name: value for name, value in options.items() if name not in SILENT.get(kind, ())}
