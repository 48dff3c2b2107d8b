"""Rules over named slices, and the table they make: a row per slice, its settings, and which rules said so.

Each rule is a name, patterns and settings. `lr_scale` multiplies over all rules that match; of everything else the last
rule's word counts. core/resolve.py makes the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.addresses import Rule
from core.options import Invalid, Mistake, Variant, opt, said
from core.slices import Initialiser, Slice


class RuleMistakes(ValueError):
    """Rules that cannot hold of a model. `mistakes` have paths that begin with 'slices'."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__(" ".join(m.sentence(None) for m in mistakes))
        self.mistakes = list(mistakes)


@dataclass(frozen=True)
class Depth:
    """A number that changes geometrically from the first layer that a rule matches to the last."""

    depth: tuple[float, ...] = opt((), "Its value at the first and at the last layer.")

    def __post_init__(self) -> None:
        if len(self.depth) != 2 or min(self.depth) <= 0:
            raise Invalid(
                ("depth", f"{list(self.depth)} is not two numbers above 0: at the first layer and at the last")
            )

    def at(self, layer: int, first: int, last: int) -> float:
        a, b = self.depth
        if layer in (first, last):
            return a if layer == first else b
        ratio: float = (b / a) ** ((layer - first) / (last - first))
        return a * ratio


@dataclass(frozen=True)
class SliceRule(Rule):
    """Settings of the slices whose address matches."""

    lr_scale: float | Depth | None = said(
        "Multiplier of the learning rate; all that match multiply.", ge=0.0, knob=True
    )
    learning_rate: float | Depth | None = said("Peak learning rate instead of the optimizer's.", ge=0.0, knob=True)
    weight_decay: float | Depth | None = said("Weight decay instead of the optimizer's.", ge=0.0, knob=True)
    optimizer: Variant | None = said("The optimizer of these slices.", kind="optimizer")
    betas: tuple[float, ...] | None = said("Betas instead of the optimizer's.", ge=0.0, lt=1.0, knob=True)
    init: Variant | None = said("Initial values; of a PKL weight the effective ones.", kind="init")
    lora: Variant | None = said("An adapter on these rows; null for none.", kind="lora", usual="lora")
    frozen: bool | None = said("Whether they stay as they are; adapters on them train.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.settings():
            raise Invalid(("", f"the rule sets nothing; it may set {', '.join(FIELDS)}"))
        if self.betas is not None and len(self.betas) != 2:
            raise Invalid(("betas", f"{list(self.betas)} is not two numbers"))

    def settings(self) -> dict[str, Any]:
        """What the rule says."""
        return {name: value for name in FIELDS if (value := getattr(self, name)) is not None}


Origins = dict[str, tuple[str, ...]]
FIELDS = ("lr_scale", "learning_rate", "weight_decay", "optimizer", "betas", "init", "lora", "frozen")


@dataclass(frozen=True)
class Settings:
    """What holds of a slice. `optimizer` has its betas; learning rate and weight decay are beside it, as slices differ in them.

    learning_rate: the peak, `lr_scale` not yet multiplied. init: None is the declaration's own. origins: by field, the rules
    that made its value. lora_whole: whether the adapter is one for the whole weight, since no bracket named parts.
    """

    optimizer: Variant
    learning_rate: float
    lr_scale: float
    weight_decay: float
    init: Initialiser | None
    lora: Variant | None
    frozen: bool
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lora_whole: bool = False


@dataclass(frozen=True)
class Row:
    """One slice and its settings."""

    slice: Slice
    settings: Settings

    @property
    def learning_rate(self) -> float:
        """The peak, multiplied."""
        return self.settings.learning_rate * self.settings.lr_scale

    @property
    def init(self) -> Initialiser:
        return self.settings.init or self.slice.declaration.init

    @property
    def rules(self) -> tuple[str, ...]:
        """Every rule that made a value of this row, in the order of the fields."""
        return tuple(dict.fromkeys(name for names in self.settings.origins.values() for name in names))
