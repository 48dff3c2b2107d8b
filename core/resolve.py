"""Rules resolved over the slices of a model, once, into the table that owns every setting and its origin.

The default treatment (no decay on vectors, what an optimizer leaves to another, PKL's step) is made of rules too, which come
before the user's and have names that begin with 'default.'.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.addresses import Pattern, is_adapter, pattern, spelled
from core.options import Catalogue, Mistake, Variant, nearest, options_of
from core.rules import FIELDS, Depth, Origins, Row, RuleMistakes, Settings, SliceRule
from core.slices import Initialiser, Slice

LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Hit:
    """A rule that holds of a slice: under which of the parameter's names, and whether a bracket chose the part."""

    name: str
    rule: SliceRule
    under: frozenset[str]
    bracket: bool


class Resolver:
    """Resolves rules over the slices of one model. What a pattern hits is looked up once.

    An optimizer of the catalogue has `roles`, those it takes by default (None: all), and `takes`, those it can take when a rule
    names it; the others go to the optimizer in its option `rest`.
    """

    def __init__(self, listed: Sequence[Slice], catalogue: Catalogue) -> None:
        self.listed, self.catalogue = list(listed), catalogue
        self._found: dict[str, dict[int, frozenset[str]]] = {}
        self._chosen: dict[tuple[Any, ...], dict[int, tuple[frozenset[str], bool]]] = {}
        self._vains: dict[tuple[Any, ...], list[Mistake]] = {}
        places = [LAYER.search(part.parameter) for part in self.listed]
        self.layers = [None if found is None else int(found.group(1)) for found in places]

    def resolve(self, rules: Mapping[str, SliceRule], optimizer: Variant) -> list[Row]:
        """A row for every slice. Raises RuleMistakes."""
        rows, wrong = self.table(rules, optimizer)
        if wrong:
            raise RuleMistakes(wrong)
        return rows

    def table(
        self, rules: Mapping[str, SliceRule], optimizer: Variant, *, complete: bool = True
    ) -> tuple[list[Row], list[Mistake]]:
        """A row for every slice, and every mistake in the rules.

        complete: whether adapters are listed already; until then, rules about them may find nothing.
        """
        wrong: list[Mistake] = []
        hits: dict[int, list[Hit]] = {}
        spans: dict[str, tuple[int, int]] = {}
        for name, rule in rules.items():
            if not name or name.startswith("default."):
                wrong.append(Mistake(("slices", name), f"'{name}' cannot be a rule's name", "Take another word."))
            wrong += [] if rule.optional else self._in_vain(name, rule, complete)
            chosen = self._hits(rule)
            for index, (under, bracket) in chosen.items():
                hits.setdefault(index, []).append(Hit(name, rule, under, bracket))
            layers = [layer for index in chosen if (layer := self.layers[index]) is not None]
            spans[name] = (min(layers, default=0), max(layers, default=0))
        work = _Work(self.catalogue, optimizer, spans)
        rows = [Row(part, work.settings(part, hits.get(i, []), self.layers[i])) for i, part in enumerate(self.listed)]
        for row in rows:
            if row.settings.lora is not None and is_adapter(row.slice.parameter):
                about = row.settings.origins["lora"][-1]
                work.wrong(about, "lora", f"{row.slice.address} is an adapter itself, and has none")
        return rows, [*wrong, *work.mistakes.values(), *work.useless(rules, hits)]

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
                into = parts.setdefault(re.sub(r"\.\d+(?=\.)", ".*", path).removesuffix(".weight"), [])
                into += [label for label in labels[-1:] if label not in into]
        shown = {path: f"{path}[{','.join(names)}]" if names else path for path, names in parts.items()}
        given = re.sub(r"\.(\d+|\{[^}]*\})(?=\.)", ".*", made.path).removesuffix(".weight")
        owner, _, last = given.rpartition(".")
        close = [f"{path}[{last}]" for path, names in parts.items() if last in names and path.startswith(owner)]
        close = close or [shown[path] for path in difflib.get_close_matches(given, shown, n=1, cutoff=0.5)]
        if made.items and close and all(x in parts.get(close[0].partition("[")[0], ()) for x in made.items):
            close = [f"{close[0].partition('[')[0]}[{','.join(made.items)}]"]
        last_layer = max((layer for layer in self.layers if layer is not None), default=0)
        beyond = [n for n in re.findall(r"(?<=\.)\d+(?=\.|$)", made.path) if int(n) > last_layer]
        hint = f"The layers are 0 to {last_layer}. " if beyond else f"Did you mean '{close[0]}'? " if close else ""
        return hint + nearest(given, shown.values()).rpartition("? ")[2]


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
            self.shared[key] = self._of(part, hits, layer)
        return self.shared[key]

    def _of(self, part: Slice, hits: list[Hit], layer: int | None) -> Settings:
        values, origins = self._tied(part, hits, layer) if part.aliases else self._values(part, hits, layer)
        node: Variant = values["optimizer"]
        for name in ("learning_rate", "weight_decay", "betas"):
            values.setdefault(name, getattr(node.options, name, None))
        if part.declaration.role == "vector" and "weight_decay" not in origins and values["weight_decay"]:
            values["weight_decay"] = 0.0
            origins["weight_decay"] = ("default.no_decay_on_vectors",)
        self._masked(part, hits, values)
        if hasattr(node.options, "betas"):
            node = Variant(node.name, replace(node.options, betas=values["betas"]))
        else:
            origins.pop("betas", None)
        init, lora = values.get("init"), values.get("lora")
        whole = not any(hit.bracket for hit in hits if hit.name in origins.get("lora", ()))
        return Settings(
            node, values["learning_rate"], values["lr_scale"], values["weight_decay"],
            None if init is None else self._init(init), None if lora is None or lora.name == "none" else lora,
            values.get("frozen", False), origins, whole,
        )  # fmt: skip

    def _tied(self, part: Slice, hits: list[Hit], layer: int | None) -> tuple[dict[str, Any], Origins]:
        """Resolved under each name that a rule singles out; what is said under two of them must agree."""
        names = (part.parameter, *part.aliases)
        singled = [n for n in names if any(n in hit.under and len(hit.under) < len(names) for hit in hits)]
        first, *others = [[hit for hit in hits if name in hit.under] for name in singled or names[:1]]
        values, origins = self._values(part, first, layer)
        for there in others:
            given, made = self._values(part, there, layer)
            new, old = [h for h in there if h not in first], [h for h in first if h not in there]
            for name in FIELDS:
                said = [hit.name for hit in new if name in hit.rule.settings()]
                rivals = [hit.name for hit in old if name in hit.rule.settings()]
                if said and rivals and given.get(name) != values.get(name):
                    text = (
                        f"{' and '.join(names)} are one tied weight, and rule '{rivals[-1]}' says another {name} for it"
                    )
                    self.wrong(said[-1], name, text, "Say it under one of the names, or set model.tie_weights: false.")
                elif said and name in given:
                    values[name], origins[name] = given[name], made.get(name, ())
        return values, origins

    def _values(self, part: Slice, hits: list[Hit], layer: int | None) -> tuple[dict[str, Any], Origins]:
        """What the rules say of a slice, by field, and which said it."""
        origins: Origins = {}
        values: dict[str, Any] = {"optimizer": self._optimizer(part, hits, origins), "lr_scale": part.declaration.step}
        if part.declaration.step != 1.0:
            origins["lr_scale"] = ("default.pkl_step",)
        for hit in hits:
            for name, given in hit.rule.settings().items():
                value = self._at(given, hit.name, name, part, layer)
                if name == "lr_scale":
                    values[name] *= value
                    origins[name] = (*origins.get(name, ()), hit.name)
                elif name != "optimizer":
                    values[name], origins[name] = value, (hit.name,)
                    if name != "betas" or hasattr(values["optimizer"].options, "betas"):
                        self.taken.add((hit.name, name))
        return values, origins

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

    def _masked(self, part: Slice, hits: list[Hit], values: Mapping[str, Any]) -> None:
        """An optimizer that a rule names with a number of its own, over which an earlier rule's would win unseen."""
        at = next((i for i in reversed(range(len(hits))) if hits[i].rule.optimizer is not None), None)
        node = None if at is None else hits[at].rule.optimizer
        if at is None or node is None or node.name != values["optimizer"].name:
            return
        own_run = node.name == self.optimizer.name
        usual = self.optimizer.options if own_run else options_of(self.catalogue["optimizer"][node.name])()
        for name in ("learning_rate", "weight_decay", "betas"):
            own = getattr(node.options, name, None)
            earlier = [hit.name for hit in hits[:at] if name in hit.rule.settings()]
            later = any(name in hit.rule.settings() for hit in hits[at:])
            # Another optimizer's learning rate is of another size, so that even its default is not left to an earlier rule.
            meant = own != getattr(usual, name, None) or (name == "learning_rate" and not own_run)
            if earlier and not later and meant and own != values[name]:
                text = f"rule '{earlier[-1]}' has set {name} of {part.address}, so the optimizer's own would not count"
                self.wrong(hits[at].name, "optimizer", text, f"Say {name} in this rule, beside the optimizer.")

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
                    kind = said["optimizer"].name
                    takes = " or ".join(getattr(self.catalogue["optimizer"][kind], "takes", None) or ())
                    text = f"{kind} can take none of what the rule matches"
                    yield Mistake(("slices", name, "optimizer"), text, f"It takes what is declared as {takes}.")
            if name in matched and "betas" in said and (name, "betas") not in self.taken:
                yield Mistake(("slices", name, "betas"), "the optimizer of what the rule matches has no betas")
