"""Rules over named slices, resolved once into a table: a row per slice, its settings, and which rules said so.

Each rule is a name, patterns and settings. `lr_scale` multiplies over all rules that match; of everything else the last
rule's word counts. The default treatment is made of rules too, which come before the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.addresses import Pattern, Rule, is_adapter, pattern, spelled
from core.options import Catalogue, Invalid, Mistake, Variant, nearest, opt, options_of, said
from core.slices import Initialiser, Slice

LAYER = re.compile(r"\.(\d+)\.")


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

    lr_scale: float | Depth | None = said("Multiplier of the learning rate; all that match multiply.", ge=0.0)
    learning_rate: float | Depth | None = said("Peak learning rate instead of the optimizer's.", ge=0.0)
    weight_decay: float | Depth | None = said("Weight decay instead of the optimizer's.", ge=0.0)
    optimizer: Variant | None = said("The optimizer of these slices.", kind="optimizer")
    betas: tuple[float, ...] | None = said("Betas instead of the optimizer's.", ge=0.0, lt=1.0)
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


FIELDS = ("lr_scale", "learning_rate", "weight_decay", "optimizer", "betas", "init", "lora", "frozen")


@dataclass(frozen=True)
class Settings:
    """What holds of a slice. `optimizer` has its betas; learning rate and weight decay are beside it, as slices differ in them.

    learning_rate: the peak, `lr_scale` not yet multiplied. init: None is the declaration's own. origins: by field, the rules
    that made its value. lora_rule, lora_whole: which rule gave the adapter, and whether it is one for the whole weight.
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

    def same_as(self, other: Settings) -> list[str]:
        """The fields in which two settings differ."""
        names = ("lr_scale", "learning_rate", "weight_decay", "optimizer", "lora", "frozen")
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        return differing + (["init"] if str(self.init) != str(other.init) else [])


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


@dataclass(frozen=True)
class Hit:
    """A rule that holds of a slice: under which of the parameter's names, and whether a bracket chose the part."""

    name: str
    rule: SliceRule
    under: frozenset[str]
    bracket: bool


class Resolver:
    """Resolves rules over the slices of one model. What a pattern hits is looked up once.

    optimizers, inits: the catalogue's classes. An optimizer's `roles` are those it takes by default (None: all), `takes` those it
    can take when a rule names it; the others go to the optimizer in its option `rest`.
    """

    def __init__(self, listed: Sequence[Slice], catalogue: Catalogue) -> None:
        self.listed, self.catalogue = list(listed), catalogue
        self._found: dict[str, dict[int, frozenset[str]]] = {}
        self._chosen: dict[tuple[Any, ...], dict[int, tuple[frozenset[str], bool]]] = {}
        self._vains: dict[tuple[Any, ...], list[Mistake]] = {}
        places = [LAYER.search(part.parameter) for part in self.listed]
        self.layers = [None if found is None else int(found.group(1)) for found in places]

    def resolve(self, rules: Mapping[str, SliceRule], optimizer: Variant, *, complete: bool = True) -> list[Row]:
        """A row for every slice. Raises RuleMistakes.

        complete: whether adapters are listed already; until then, rules about them may find nothing.
        """
        wrong: list[Mistake] = []
        hits: dict[int, list[Hit]] = {}
        spans: dict[str, tuple[int, int]] = {}
        for name, rule in rules.items():
            wrong += [] if rule.optional else self._in_vain(name, rule, complete)
            chosen = self._hits(rule)
            for index, (under, bracket) in chosen.items():
                hits.setdefault(index, []).append(Hit(name, rule, under, bracket))
            layers = [layer for index in chosen if (layer := self.layers[index]) is not None]
            spans[name] = (min(layers, default=0), max(layers, default=0))
        work = _Work(self.catalogue, optimizer, spans)
        rows = [Row(part, work.settings(part, hits.get(i, []), self.layers[i])) for i, part in enumerate(self.listed)]
        wrong += [*work.mistakes.values(), *work.useless(rules, hits)]
        if wrong:
            raise RuleMistakes(wrong)
        return rows

    def _hits(self, rule: SliceRule) -> dict[int, tuple[frozenset[str], bool]]:
        """The slices that a rule matches: under which names, and whether by a bracket."""
        key = (rule.match, rule.excepted)
        if key not in self._chosen:
            out: dict[int, frozenset[str]] = {}
            for text in rule.exceptions:
                for index, names in self._matches(text).items():
                    out[index] = out.get(index, frozenset()) | names
            made: dict[int, tuple[frozenset[str], bool]] = {}
            for text in rule.patterns:
                for index, names in self._matches(text).items():
                    if left := names - out.get(index, frozenset()):
                        before, bracket = made.get(index, (frozenset(), False))
                        made[index] = (before | left, bracket or pattern(text).about_parts)
            self._chosen[key] = made
        return self._chosen[key]

    def _matches(self, text: str) -> dict[int, frozenset[str]]:
        """The slices that a pattern matches, each with the names of its parameter under which it does."""
        if text not in self._found:
            made, compiled, known = {}, pattern(text), dict[str, frozenset[str]]()
            for index, part in enumerate(self.listed):
                if part.parameter not in known:
                    names = (part.parameter, *part.aliases)
                    known[part.parameter] = frozenset(n for n in names if compiled.matches_parameter(n))
                under = known[part.parameter]
                if under and compiled.matches_labels(spelled(part.parameter, part.labels)[1]):
                    made[index] = under
            self._found[text] = made
        return self._found[text]

    # What a rule says in vain -----------------------------------------------------------------------------------------------

    def _in_vain(self, name: str, rule: SliceRule, complete: bool) -> list[Mistake]:
        key = (name, rule.match, rule.excepted, complete)
        if key not in self._vains:
            self._vains[key] = list(self._vain(name, rule, complete))
        return self._vains[key]

    def _vain(self, name: str, rule: SliceRule, complete: bool) -> Iterator[Mistake]:
        texts = [("match", text) for text in rule.patterns] + [("except", text) for text in rule.exceptions]
        for key, text in texts:
            made = pattern(text)
            if made.about_adapters and not complete:
                continue
            found = {part.parameter for part in self.listed if self._named(made, part)}
            if not found:
                yield Mistake(("slices", name, key), f"'{text}' matches nothing", self._advice(made))
            for i, item in enumerate(made.items):
                labels = [spelled(p.parameter, p.labels)[1] for p in self.listed if p.parameter in found]
                if found and not any(made.item_matches(i, x) for x in labels):
                    parts = list(dict.fromkeys(".".join(x) for x in labels if x))
                    told = f"'{text}': there is no part '{item}' there"
                    yield Mistake(("slices", name, key), told, nearest(item, parts) if parts else "It has no parts.")
        waiting = not complete and any(pattern(text).about_adapters for text in rule.patterns)
        if not waiting and not self._hits(rule) and all(self._matches(text) for _, text in texts):
            yield Mistake(("slices", name, "except"), "nothing is left of what 'match' finds")

    def _named(self, made: Pattern, part: Slice) -> bool:
        return any(made.matches_parameter(name) for name in (part.parameter, *part.aliases))

    def _advice(self, made: Pattern) -> str:
        """The nearest addresses as patterns that would match, layers and parts together."""
        if made.about_adapters:
            known = [part for part in self.listed if is_adapter(part.parameter)]
            if not known:
                return "No rule gives a weight an adapter; say lora in one."
        else:
            known = [part for part in self.listed if not is_adapter(part.parameter)]
        parts: dict[str, list[str]] = {}
        for part in known:
            for name in (part.parameter, *part.aliases):
                path, labels, _ = spelled(name, part.labels)
                path = re.sub(r"\.\d+(?=\.)", ".*", path).removesuffix(".weight")
                into = parts.setdefault(path, [])
                into += [label for label in labels[-1:] if label not in into]
        return nearest(made.text, [f"{path}[{','.join(names)}]" if names else path for path, names in parts.items()])


class _Work:
    """Settings of one slice after another. Slices of which the same rules hold in the same way share them."""

    def __init__(self, catalogue: Catalogue, optimizer: Variant, spans: Mapping[str, tuple[int, int]]) -> None:
        self.catalogue, self.optimizer, self.spans = catalogue, optimizer, spans
        self.mistakes: dict[Any, Mistake] = {}
        self.taken: set[tuple[str, str]] = set()  # fields of rules that some slice could take
        self.shared: dict[Any, Settings] = {}
        self.inits: dict[str, Initialiser] = {}

    def wrong(self, rule: str, name: str, text: str, advice: str = "") -> None:
        self.mistakes.setdefault((rule, name), Mistake(("slices", rule, name), text, advice))

    def settings(self, part: Slice, hits: list[Hit], layer: int | None) -> Settings:
        deep = any(isinstance(value, Depth) for hit in hits for value in hit.rule.settings().values())
        what = part.declaration
        ways = ((hit.name, hit.bracket, hit.under if part.aliases else None) for hit in hits)
        key = (what.role, what.step, layer if deep else None, *ways)
        if key not in self.shared:
            self.shared[key] = self._tied(part, hits, layer) if part.aliases else self._of(part, hits, layer)
        return self.shared[key]

    def _tied(self, part: Slice, hits: list[Hit], layer: int | None) -> Settings:
        """Resolved under each name that a rule singles out; what is said under two of them must agree."""
        names = (part.parameter, *part.aliases)
        singled = [n for n in names if any(n in hit.under and len(hit.under) < len(names) for hit in hits)]
        first, *others = [[hit for hit in hits if name in hit.under] for name in singled or names[:1]]
        made = self._of(part, first, layer)
        for hits_there in others:
            there = self._of(part, hits_there, layer)
            new = [hit for hit in hits_there if hit not in first]
            taken = []
            for name in made.same_as(there):
                said = [hit.name for hit in new if name in hit.rule.settings()]
                rivals = [hit.name for hit in first if hit not in hits_there and name in hit.rule.settings()]
                if said and rivals:
                    text = f"{' and '.join(names)} are one tied weight, and rule '{rivals[-1]}' gives it another {name}"
                    self.wrong(said[-1], name, text, "Say it under one of the names, or set model.tie_weights: false.")
                elif said or (not rivals and any(hit.rule.optimizer for hit in new)):
                    taken.append(name)
            origins = {**made.origins, **{n: there.origins[n] for n in taken if n in there.origins}}
            whole = there.lora_whole if "lora" in taken else made.lora_whole
            values = {name: getattr(there, name) for name in taken}
            made = replace(made, origins=origins, lora_whole=whole, **values)
        return made

    def _of(self, part: Slice, hits: list[Hit], layer: int | None) -> Settings:
        origins: dict[str, tuple[str, ...]] = {}
        node = self._optimizer(part, hits, origins)
        values: dict[str, Any] = {
            "learning_rate": node.options.learning_rate,
            "weight_decay": node.options.weight_decay,
            "betas": getattr(node.options, "betas", None),
        }
        scale = part.declaration.step
        if scale != 1.0:
            origins["lr_scale"] = ("default.pkl_step",)
        if part.declaration.role == "vector" and values["weight_decay"]:
            values["weight_decay"] = 0.0
            origins["weight_decay"] = ("default.no_decay_on_vectors",)
        bracket = False
        for hit in hits:
            for name, given in hit.rule.settings().items():
                value = self._at(given, hit.name, name, part, layer)
                if name == "lr_scale":
                    scale *= value
                    origins[name] = (*origins.get(name, ()), hit.name)
                elif name != "optimizer" and (name != "betas" or values["betas"] is not None):
                    values[name] = value
                    origins[name] = (hit.name,)
                    bracket = hit.bracket if name == "lora" else bracket
                    self.taken.add((hit.name, name))
        if values["betas"] is not None:
            node = Variant(node.name, replace(node.options, betas=values["betas"]))
        self._masked(part, hits, node, values)
        init, lora = values.get("init"), values.get("lora")
        return Settings(
            node, values["learning_rate"], scale, values["weight_decay"], None if init is None else self._init(init),
            None if lora is None or lora.name == "none" else lora, values.get("frozen", False), origins, not bracket,
        )  # fmt: skip

    def _optimizer(self, part: Slice, hits: list[Hit], origins: dict[str, tuple[str, ...]]) -> Variant:
        """The optimizer that takes the slice: the last rule's, else the run's, or what these leave the rest to."""
        said = next((hit for hit in reversed(hits) if hit.rule.optimizer is not None), None)
        node = self.optimizer if said is None or said.rule.optimizer is None else said.rule.optimizer
        classes, role = self.catalogue["optimizer"], part.declaration.role
        roles = getattr(classes[node.name], "roles" if said is None else "takes", None)
        names: tuple[str, ...] = () if said is None else (said.name,)
        if said is not None and (roles is None or role in roles):
            self.taken.add((said.name, "optimizer"))
        while roles is not None and role not in roles:
            node = node.options.rest
            roles = getattr(classes[node.name], "roles", None)
            names = (*names, "default.rest") if "default.rest" not in names else names
        if names:
            origins["optimizer"] = names
        return node

    def _at(self, given: Any, rule: str, name: str, part: Slice, layer: int | None) -> Any:
        if not isinstance(given, Depth):
            return given
        if layer is None:
            advice = "Match layers alone, such as 'h.**'."
            self.wrong(rule, name, f"it depends on the depth, and {part.address} lies in no layer", advice)
            return given.depth[0]
        return given.at(layer, *self.spans[rule])

    def _masked(self, part: Slice, hits: list[Hit], node: Variant, values: Mapping[str, Any]) -> None:
        """An optimizer that a rule names with a number of its own, over which an earlier rule's would win unseen."""
        for i, hit in enumerate(hits):
            chosen = hit.rule.optimizer
            if chosen is None or chosen.name != node.name or any(h.rule.optimizer is not None for h in hits[i + 1 :]):
                continue
            usual = options_of(self.catalogue["optimizer"][chosen.name])()
            for name in ("learning_rate", "weight_decay", "betas"):
                own = getattr(chosen.options, name, None)
                earlier = [h.name for h in hits[:i] if name in h.rule.settings()]
                later = any(name in h.rule.settings() for h in hits[i:])
                if earlier and not later and own != getattr(usual, name, None) and own != values[name]:
                    text = (
                        f"rule '{earlier[-1]}' has set {name} of {part.address}, so the optimizer's own would not count"
                    )
                    self.wrong(hit.name, "optimizer", text, f"Say {name} in this rule, beside the optimizer.")

    def _init(self, node: Variant) -> Initialiser:
        key = repr(node)
        if key not in self.inits:
            made: Any = self.catalogue["init"][node.name]
            self.inits[key] = made(node.options)
        return self.inits[key]

    def useless(self, rules: Mapping[str, SliceRule], hits: Mapping[int, list[Hit]]) -> Iterator[Mistake]:
        """Settings that no slice could take of those that the rule matched."""
        matched = {hit.name for found in hits.values() for hit in found}
        for name, rule in rules.items():
            said = rule.settings()
            if name in matched and "optimizer" in said and (name, "optimizer") not in self.taken:
                overruled = any(hit.name != name and hit.rule.optimizer for found in hits.values() for hit in found)
                if not overruled:
                    text = f"{said['optimizer'].name} can take none of what the rule matches"
                    yield Mistake(("slices", name, "optimizer"), text, "It takes matrices.")
            if name in matched and "betas" in said and (name, "betas") not in self.taken:
                yield Mistake(("slices", name, "betas"), "the optimizer of what the rule matches has no betas")
