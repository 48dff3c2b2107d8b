"""A family of Hugging Face models: how its config.json and ours say the same, and which of its weights are which of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convert.huggingface.keys import Keys
from convert.huggingface.ours import Ours, differences
from convert.mapping import Rule, Rules, rule
from convert.steps import Add, Agree, Join, Relayout, Step
from core.options import Reader
from gpt_conf import ModelConfig
from variations import CATALOGUE

LEAVES = ("weight", "bias")
HEAD = "lm_head.weight"


class Book:
    """Rules in the making, from their weights to ours, and only for weights that our model has. Layouts are those it declares.

    prefix: what their names begin with, but the head's. names: those of a folder, where a family has several forms; else empty.
    """

    def __init__(self, ours: Ours, prefix: str, names: Collection[str] = (), zero_centred: bool = False) -> None:
        self.ours, self.names, self.zero_centred = ours, names, zero_centred
        bare = bool(names) and not any(name.startswith(prefix) for name in names)
        self.prefix = "" if bare else prefix
        self.rules: list[Rule] = []

    def add(self, theirs: str | Sequence[str], own: str, *steps: Step) -> None:
        """A rule, where our model has such a weight."""
        if self.ours.named(own):
            some = (theirs,) if isinstance(theirs, str) else theirs
            self.rules.append(rule([self.prefix + name for name in some], own, *steps))

    def plain(self, theirs: str, own: str, *steps: Step) -> None:
        """A module's weight and bias as they are; `steps` are the weight's."""
        for leaf in LEAVES:
            self.add(f"{theirs}.{leaf}", f"{own}.{leaf}", *(steps if leaf == "weight" else ()))

    def norm(self, theirs: str, own: str) -> None:
        """A norm, whose gain is g on one side and may be stored as g - 1 on the other."""
        found = {
            name: self.ours.option(name.rpartition(".")[0], "zero_centred", False)
            for name in self.ours.named(f"{own}.*")
        }
        if len(set(found.values())) > 1:
            raise ValueError(f"One rule is for all of {own}, and zero_centred differs: {found}.")
        centred = any(found.values())
        shift = Add(float(self.zero_centred) - float(centred))
        self.plain(theirs, own, *([shift] if shift.value else []))

    def parts(self, theirs: Mapping[str, str], own: str) -> None:
        """Their separate linear maps, by the name of the part that each is of ours."""
        for leaf in LEAVES:
            if self.ours.named(f"{own}.{leaf}"):
                layout = self.ours.layout(f"{own}.{leaf}")
                self.add([f"{theirs[part]}.{leaf}" for part, _ in layout.parts], f"{own}.{leaf}", Join(layout))

    def fused(self, theirs: str, own: str, order: Sequence[str], *steps: Step) -> None:
        """Their linear map of several parts, in their order; `steps` come before for the weight."""
        for leaf in LEAVES:
            if not self.ours.named(f"{own}.{leaf}"):
                continue
            layout = self.ours.layout(f"{own}.{leaf}")
            sizes = dict(layout.parts)
            source = replace(layout, parts=tuple((part, sizes[part]) for part in order))
            before = steps if leaf == "weight" else ()
            self.add(
                f"{theirs}.{leaf}", f"{own}.{leaf}", *before, *([Relayout(source, layout)] if source != layout else [])
            )

    def ends(self, embedding: str, norm: str) -> None:
        """Embedding, final norm and head. A tied head is not in their files, or is there as a copy."""
        self.norm(norm, "ln_f")
        if self.ours.config.tie_weights and HEAD in self.names:
            self.rules.append(rule([self.prefix + embedding, HEAD], "wte.weight", Agree(2)))
            return
        self.add(embedding, "wte.weight")
        self.rules += [rule(HEAD, "head.weight")] if self.ours.named("head.weight") else []

    def made(self, *dropped: str) -> Rules:
        """dropped: names of theirs that are no weights, such as tables."""
        return Rules(tuple(self.rules), tuple(self.prefix + name for name in dropped))


@dataclass(frozen=True)
class Family:
    """One `model_type`. reading: their keys -> our model node; writing: our model -> their keys; mapping: the rules.

    prefix: what weights' names begin with, but the head's. zero_centred: whether norms store their gain less one. unsaid: sizes
    of ours that the family's configuration does not say.
    """

    name: str
    architecture: str
    prefix: str
    reading: Callable[[Keys], dict[str, Any]]
    writing: Callable[[Ours], dict[str, Any]]
    mapping: Callable[[Book], Rules]
    zero_centred: bool = False
    unsaid: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The `model` node of ours, as a file would say it. Raises ValueError that names every key that our models have not."""
        keys = Keys(config, self.name)
        node = self.reading(keys)
        keys.finish()
        return node

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """What config.json says of a model of ours. Raises ValueError that names everything that the family does not have."""
        return self.said(Ours(model))

    def said(self, ours: Ours) -> dict[str, Any]:
        """`write` of a model that has been looked at."""
        config = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,  # else the family's own defaults
            **self.writing(ours),
        }
        # Whatever was not said comes back as something else: nothing can be forgotten here.
        if wrong := differences(ours, Ours(configured(self.read(config))), self.unsaid):
            raise ValueError("\n".join(wrong))
        return config

    def rules(self, model: ModelConfig, names: Collection[str] = ()) -> Rules:
        """From their weights to ours. names: a folder's, where there are several forms; without them, the form that is written."""
        return self.mapping(Book(Ours(model), self.prefix, names, self.zero_centred))


def configured(node: Mapping[str, Any]) -> ModelConfig:
    """A model node, read. Raises ValueError with every mistake."""
    reader = Reader(CATALOGUE)
    made: ModelConfig | None = reader.read(ModelConfig, node)
    if made is None:
        raise ValueError("\n".join(m.sentence(None) for m in reader.mistakes))
    return made
