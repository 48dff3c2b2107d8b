"""A site is a place in the model: its path, the configuration, and the variations that `model.sites` chooses there.

Every variation is built as `Class(options, site, **shape)` and makes its own parts with `site.make(kind, name, **shape)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from core.addresses import select
from core.options import Catalogue, Invalid, Variant, nearest, options_of
from core.slices import Initialiser
from gpt_conf import ModelConfig


@dataclass(frozen=True)
class Site:
    """Where a variation is built. `asked` remembers, for all sites of a model, which places looked up which kinds."""

    config: ModelConfig
    catalogue: Catalogue
    path: str = ""
    asked: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def at(self, name: str) -> Site:
        """The site one segment below."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def node(self, kind: str, fallback: str | None = None) -> Variant:
        """The variation of `kind` here: the last site rule that matches, else the model's. A rule about the `fallback` kind
        counts as one about `kind` (a head is also a linear)."""
        chosen: Variant = self.patterned() if kind == "attention" else getattr(self.config, kind)
        hits = {k: self.asked.setdefault((k, self.path), []) for k in (kind, fallback) if k}
        for name, rule in self.config.sites.items():
            nodes = rule.nodes()
            said = next((k for k in hits if k in nodes), None)
            if said and select(rule.patterns, rule.exceptions, lambda p: p.matches_module(self.path)):
                chosen = nodes[said]
                hits[said].append(name)
        return chosen

    def patterned(self) -> Variant:
        """The attention of this layer by the model's pattern: with the options of `attention` where it has that name."""
        pattern, usual, known = self.config.layer_pattern, self.config.attention, self.catalogue["attention"]
        layer = re.match(r"h\.(\d+)\.", self.path)
        if not pattern or layer is None:
            return usual
        for name in pattern:
            if name not in known:
                raise Invalid(("layer_pattern", f"no variant '{name}'. {nearest(name, known)}"))
        name = pattern[int(layer.group(1)) % len(pattern)]
        return usual if name == usual.name else Variant(name, options_of(known[name])())

    def find(self, kind: str, fallback: str | None = None) -> tuple[Any, Any]:
        """The class of the variation of `kind` here, and its options."""
        chosen = self.node(kind, fallback)
        known: Mapping[str, Any] = self.catalogue[kind]
        return known[chosen.name], chosen.options

    def make(self, kind: str, name: str, *, fallback: str | None = None, **shape: Any) -> nn.Module:
        """Builds the variation of `kind` at the place `name` below. Its ValueErrors are told with the place."""
        below = self.at(name)
        cls, options = below.find(kind, fallback)
        try:
            module: nn.Module = cls(options, below, **shape)
        except Invalid:
            raise
        except ValueError as error:
            raise Invalid((kind, f"at '{below.path}': {error}")) from error
        return module

    def initialiser(self) -> Initialiser:
        """What fills the matrices made here."""
        cls, options = self.find("init")
        made: Initialiser = cls(options)
        return made

    def residual_gain(self) -> float:
        """The multiplier of a projection onto the residual stream: 1/sqrt(2 n_layer) as in GPT-2."""
        return 1 / math.sqrt(2 * self.config.n_layer)

    def unused(self) -> list[tuple[str, str]]:
        """What site rules chose and no place took, each with a sentence. Meaningful once the model is built."""
        hit = {(kind, name) for (kind, _), names in self.asked.items() for name in names}
        wrong = []
        for name, rule in self.config.sites.items():
            for kind in rule.nodes():
                if (kind, name) not in hit and not rule.optional:
                    places = sorted({path for asked, path in self.asked if asked == kind})
                    patterns = " and ".join(repr(p) for p in rule.patterns)
                    text = f"{patterns} matches no place where the {kind} is chosen"
                    wrong.append((f"sites.{name}", f"{text}. {nearest(rule.patterns[0], places)}"))
        return wrong
