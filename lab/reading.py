"""Reading configurations once with every mistake told, and the identity of a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

from core.options import (
    EMPTY,
    MISSING,
    Catalogue,
    Invalid,
    Mistake,
    Path,
    Reader,
    Variant,
    differences,
    fields_of,
    hints,
    is_off,
    key_of,
    nearest,
    options_of,
)
from core.references import has_references, resolve
from core.resolve import Resolver
from core.rules import RuleMistakes, SliceRule
from core.slices import slices
from core.trees import get, merge, names_variant
from core.yaml_files import ConfigError, shown
from engine.hf_tokenizer import is_checkpoint
from gpt_conf import KINDS, ModelConfig
from lab.base import Base, Bases
from model import GPT, assemble
from train_args import CONFIG_VERSION, Config, DataConfig, TrainConfig, with_vocabulary


@dataclass
class ConfigReader:
    """Reads many trees of one sweep. Sections that trees share are read once; each distinct model is built once, without memory.

    `corpora(data)` gives the corpus of a data section: vocabulary, number of tokens, content hash. `build(model)` raises ValueError
    for a model that cannot be. `bases` finds what training starts from; without it that is not looked at.
    """

    catalogue: Catalogue
    corpora: Callable[[DataConfig], Any]
    build: Callable[[ModelConfig], object]
    plugins: dict[str, str] = field(default_factory=dict)
    bases: Bases | None = None

    def __post_init__(self) -> None:
        if self.plugins:
            _check_catalogue(self.catalogue, ", ".join(shown(path) for path in self.plugins))
        self.reader = Reader(self.catalogue)
        self._built: dict[Any, list[Mistake]] = {}
        self._checked: dict[tuple[int, int], tuple[ModelConfig, list[Mistake]]] = {}
        self._corpora: dict[DataConfig, Any] = {}
        self._made: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._resolvers: dict[Any, Resolver] = {}

    def read(self, tree: Mapping[str, Any]) -> tuple[Config | None, list[Mistake]]:
        """The configuration that a tree says, and every mistake in it."""
        given = tree
        broken: list[Mistake] = []
        if self.refers(tree):
            tree, broken = resolve(tree, lambda path: default_value(self.catalogue, given, path))
        tree = self._fill_rules(self._fill_sites(tree))
        self.reader.mistakes = found = []
        config = self.reader.read(Config, tree)
        found += self._check(config, tree)
        found = [_rule_meant(m, given) for m in found]
        found += self._check_base(None if found or broken else config, tree)
        # Where a reference failed there is null now, which is not the user's mistake.
        found = [m for m in found if not (broken and has_references(get(given, m.path)))]
        if config is None or found or broken:
            return None, broken + found
        if is_checkpoint(config.data.tokenizer):
            config = replace(config, data=self._once("named", config.data, self._named))
        if base := self.base(config):
            config = replace(config, train=replace(config.train, init_from=f"{base.prefix}{base.path}"))
        return config, []

    def refers(self, tree: Mapping[str, Any]) -> bool:
        """Whether a tree has references. Sections are shared by many trees and looked through once."""
        return any(self._once("refers", section, has_references) for section in tree.values())

    def _once(self, what: str, value: Any, make: Callable[[Any], Any]) -> Any:
        """`make(value)`, computed once for one object; the object is kept, so its id stays its own."""
        key = (what, id(value))
        if key not in self._made:
            self._made[key] = (value, make(value))
        return self._made[key][1]

    def _fill_sites(self, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """A site's mapping without a variant is about the model's own variant of that kind."""
        model = tree.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("sites"), Mapping):
            return tree
        return {**tree, "model": self._once("sites", model, _filled)}

    def _fill_rules(self, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """A rule's mapping without a variant is about the run's own optimizer, or the model's own init."""
        rules, optimizer, model = (tree.get(name) for name in ("slices", "optimizer", "model"))
        if not isinstance(rules, Mapping) or not self._once("unnamed", rules, _unnamed):
            return tree
        key = ("rules", id(rules), id(optimizer), id(model))
        if key not in self._made:
            own = {"optimizer": optimizer, "init": model.get("init") if isinstance(model, Mapping) else None}
            self._made[key] = ((rules, optimizer, model), {name: _owned(rule, own) for name, rule in rules.items()})
        return {**tree, "slices": self._made[key][1]}

    def corpus(self, data: DataConfig) -> Any:
        """The corpus of a data section. Raises ValueError or OSError where there is none."""
        if data not in self._corpora:
            try:
                self._corpora[data] = self.corpora(data)
            except (ValueError, OSError) as error:
                self._corpora[data] = error
        if isinstance(self._corpora[data], Exception):
            raise self._corpora[data]
        return self._corpora[data]

    def _named(self, data: DataConfig) -> DataConfig:
        """A data section with the tokenizer's own name in place of the folder that holds it; the corpus is the same."""
        corpus = self.corpus(data)
        named = replace(data, tokenizer=corpus.folder.name)
        self._corpora.setdefault(named, corpus)
        return named

    def _check(self, config: Config | None, tree: Mapping[str, Any]) -> list[Mistake]:
        """What only the data and the assembled model can tell. Sections are checked also where others hold mistakes."""
        model, data = (
            self.reader.known(cls, tree.get(name, EMPTY))
            for name, cls in (("model", ModelConfig), ("data", DataConfig))
        )
        if data is None:
            return []
        try:
            corpus = self.corpus(data)
        except (ValueError, OSError) as error:
            said = re.match(r"(data)\.(\w+): (.*)", str(error), re.DOTALL)
            path, text = (said.group(1, 2), said.group(3)) if said else (("data", "dataset"), str(error))
            return [_split(path, text)]
        if config is not None and config.train.dtype == "float16" and config.train.device == "cpu":
            return [Mistake(("train", "dtype"), "float16 needs a CUDA device; use bfloat16 or float32")]
        if model is None:
            return []
        key = (id(model), id(corpus))
        if key not in self._checked:
            self._checked[key] = (model, _fits(model, data.dataset, corpus) or self._build(model, corpus))
        if self._checked[key][1] or not tree.get("slices"):
            return self._checked[key][1]
        of = (tree["slices"], tree.get("optimizer"), model, corpus)
        seen = ("resolved", *map(id, of))
        if seen not in self._made:
            self._made[seen] = (of, self._resolve(tree, model, corpus))
        found: list[Mistake] = self._made[seen][1]
        return found

    def _resolve(self, tree: Mapping[str, Any], model: ModelConfig, corpus: Any) -> list[Mistake]:
        """What rules say that cannot hold of the model; nothing where a rule or the optimizer could not be read."""
        given = tree["slices"]
        if not isinstance(given, Mapping):
            return []
        read = {name: self.reader.known(SliceRule, rule) for name, rule in given.items()}
        rules = {name: rule for name, rule in read.items() if rule is not None}
        trial, spec = Reader(self.catalogue), fields_of(Config)["optimizer"]
        node = trial.variant("optimizer", tree.get("optimizer", spec.default), ("optimizer",), spec.default)
        if node is None:
            return []
        model = model if model.vocab_size else replace(model, vocab_size=corpus.meta.vocab_size)
        try:
            if any(rule.lora is not None for rule in rules.values()):
                _, rows = assemble(model, rules, node)
            else:
                key = key_of(model)
                if key not in self._resolvers:
                    self._resolvers[key] = Resolver(slices(GPT(model)), self.catalogue)
                complete = len(rules) == len(read)  # one that could not be read may be the one that gives adapters
                rows, wrong = self._resolvers[key].table(rules, node, complete=complete)
                if wrong:
                    return wrong
        except RuleMistakes as error:
            return error.mistakes
        frozen = all(row.settings.frozen for row in rows)
        return [Mistake(("slices",), "every slice is frozen, so that nothing would train")] if frozen else []

    def base(self, config: Config) -> Base | None:
        """What a run starts from, if not from scratch. Raises Unusable where that is nowhere."""
        named = config.train.init_from
        return None if named is None or self.bases is None else self.bases.find(named)

    def _check_base(self, config: Config | None, tree: Mapping[str, Any]) -> list[Mistake]:
        """Whether what training starts from is there and, where the rest is free of mistakes, fits the model."""
        train = self.reader.known(TrainConfig, tree.get("train", EMPTY))
        if self.bases is None or train is None or train.init_from is None:
            return []
        if config is not None:
            config = with_vocabulary(config, self.corpus(config.data).meta.vocab_size)
        return self.bases.mistakes(train.init_from, config.model if config else None)

    def _build(self, model: ModelConfig, corpus: Any) -> list[Mistake]:
        model = model if model.vocab_size else replace(model, vocab_size=corpus.meta.vocab_size)
        key = key_of(model)
        if key not in self._built:
            self._built[key] = self._trial(model)
        return self._built[key]

    def _trial(self, model: ModelConfig) -> list[Mistake]:
        """What building a model says. Torch raises RuntimeError for sizes that overflow; plugins raise anything."""
        try:
            self.build(model)
        except Invalid as error:
            return [_split(("model", *filter(None, name.split("."))), text) for name, text in error.wrong]
        except ValueError as error:
            return [_split(("model",), str(error))]
        except Exception as error:
            if not self.plugins and not isinstance(error, (RuntimeError, OverflowError, MemoryError)):
                raise
            text = f"the model cannot be built: {type(error).__name__}: {' '.join(str(error).split())}"
            return [Mistake(("model",), text.rstrip("."))]
        return []

    def identity(self, config: Config) -> tuple[str, str]:
        """Hashes of the run and of its cell (the run without its seed): ten hexadecimal digits each."""
        parts = {
            name: self._once(f"difference {name}", getattr(config, name), partial(_difference, spec))
            for name, spec in fields_of(Config).items()
            if spec.metadata["identity"] and name != "train"
        }
        content = {"data": self.corpus(config.data).meta.content_hash, "plugins": sorted(self.plugins.values())}
        if base := self.base(config):
            content["init_from"] = base.content
        train = differences(config.train)
        seed = train.pop("seed", None)
        said = {
            name: text for name, text in parts.items() if text
        }  # a section at its defaults may not have existed then
        cell = json.dumps({"version": CONFIG_VERSION, "content": content, "train": train, **said}, sort_keys=True)
        return _digest(f"{cell} seed {seed}"), _digest(cell)


def _check_catalogue(catalogue: Catalogue, names: str) -> None:
    """Refuses entries that could not be read: not a class, options without defaults."""
    for kind, entries in catalogue.items():
        for name, cls in entries.items():
            options = options_of(cls)
            wrong = "is not a class" if not isinstance(cls, type) else ""
            if not wrong and not (isinstance(options, type) and is_dataclass(options)):
                wrong = "has Options that are not a dataclass"
            if not wrong:
                bare = [f.name for f in fields(options) if f.default is REQUIRED and f.default_factory is REQUIRED]
                wrong = f"has an option '{bare[0]}' without a default" if bare else ""
            if not wrong:
                try:
                    hints(options)
                except Exception as error:
                    wrong = f"has Options whose types cannot be read: {error}"
            if wrong:
                raise ConfigError(f"plugins: the {kind} '{name}' {wrong} ({names}).")


def _rule_meant(mistake: Mistake, tree: Mapping[str, Any]) -> Mistake:
    """A rule without a pattern may be another's name misspelt, by an axis or on the command line."""
    if mistake.path[:1] != ("slices",) or mistake.path[2:] != ("match",) or "needs a pattern" not in mistake.text:
        return mistake
    rules = tree["slices"]
    others = [n for n, rule in rules.items() if isinstance(rule, Mapping) and rule.get("match")]
    return replace(mistake, advice=nearest(mistake.path[1], others)) if others else mistake


def _unnamed(rules: Mapping[str, Any]) -> bool:
    """Whether a rule has a mapping about an optimizer or an init that it does not name."""
    nodes = [rule.get(kind) for rule in rules.values() if isinstance(rule, Mapping) for kind in ("optimizer", "init")]
    return any(isinstance(node, Mapping) and "variant" not in node for node in nodes)


def _owned(rule: Any, own: Mapping[str, Any]) -> Any:
    """A rule in which such mappings are laid on the run's own node."""
    if not isinstance(rule, Mapping):
        return rule
    made = dict(rule)
    for kind, base in own.items():
        if isinstance(node := rule.get(kind), Mapping) and "variant" not in node:
            usual = fields_of(Config if kind == "optimizer" else ModelConfig)[kind].default.name
            base = {"variant": usual, **(base or {})} if base is None or isinstance(base, Mapping) else base
            made[kind] = merge(base, node)
    return made


def _filled(model: Mapping[str, Any]) -> Mapping[str, Any]:
    def site(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        made = dict(given)
        for kind in KINDS:
            if isinstance(node := given.get(kind), Mapping) and not names_variant(node):
                default = fields_of(ModelConfig)[kind].default.name
                base = model.get(kind, {"variant": default})
                if isinstance(base, Mapping) and not names_variant(base):
                    base = {"variant": default, **base}
                made[kind] = merge(base, node)
        return made

    return {**model, "sites": {name: site(given) for name, given in model["sites"].items()}}


def _split(path: Path, said: str) -> Mistake:
    """A sentence of others as a mistake: what is wrong, then the advice that follows it."""
    text, _, advice = said.partition(". ")
    return Mistake(path, text.rstrip("."), advice)


def _fits(model: ModelConfig, dataset: str, corpus: Any) -> list[Mistake]:
    """Whether the data has enough tokens and no others than the model."""
    wrong = []
    longest = min(len(corpus.train), len(corpus.val)) - 1
    if model.block_size > longest:
        text = f"{model.block_size} is longer than the data: '{dataset}' allows at most {longest}"
        wrong.append(Mistake(("model", "block_size"), text))
    if model.vocab_size is not None and model.vocab_size < corpus.meta.vocab_size:
        text = f"{model.vocab_size} is smaller than the data's vocabulary of {corpus.meta.vocab_size}"
        wrong.append(Mistake(("model", "vocab_size"), text))
    return wrong


def _difference(spec: Any, section: Any) -> str:
    """How a section differs from its default, as text; nothing where it does not."""
    if isinstance(section, Variant):
        changed: Any = {"variant": section.name, **differences(section.options)}
        changed = {} if changed == {"variant": spec.default.name} else changed
    elif is_dataclass(section):
        changed = differences(section)
    else:
        changed = [[k, differences(v)] for k, v in section.items()]  # a list: in a named table the order counts
    return json.dumps(changed, sort_keys=True) if changed else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def default_value(catalogue: Catalogue, tree: Any, path: Path) -> Any:
    """What a key holds where `tree` does not set it: its option's default, a variation's name for a node, or MISSING."""
    cls: Any = Config
    for i, key in enumerate(path):
        spec = fields_of(cls).get(key)
        if spec is None:
            return MISSING
        rest, kind = path[i + 1 :], spec.metadata.get("kind")
        if kind is None:
            cls = hints(cls)[spec.name]
            if not rest and not is_dataclass(cls):
                made = spec.default if spec.default_factory is REQUIRED else spec.default_factory()
                return list(made) if isinstance(made, tuple) else made
            if not is_dataclass(cls):
                return MISSING
            continue
        name: Any = get(tree, path[: i + 1], MISSING)
        name = name.get("variant", MISSING) if isinstance(name, Mapping) else name
        if name is MISSING:
            name = spec.default.name if isinstance(spec.default, Variant) else None
        elif is_off(name) and "none" in catalogue[kind]:
            name = "none"
        if rest in ((), ("variant",)):
            return name
        if not isinstance(name, str) or name not in catalogue[kind]:
            return MISSING
        cls = options_of(catalogue[kind][name])
    return MISSING


def sentences(mistakes: list[Mistake], place: Callable[[Path], str | None]) -> list[str]:
    """Each mistake as a sentence with its place, once. One without a path is of another file, and has its place."""
    placed = ((m, m.at or m.path) for m in mistakes)
    return list(dict.fromkeys(m.sentence(place(path) if path else None) for m, path in placed))
