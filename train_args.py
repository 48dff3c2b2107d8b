"""The whole configuration: its tree, reading it once with every mistake told, and the identity of a run."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path as File
from typing import Any, Literal

from core.compose import get
from core.options import (
    Catalogue,
    Invalid,
    Mistake,
    Path,
    Reader,
    Variant,
    differences,
    fields_of,
    hints,
    key_of,
    nearest,
    node,
    opt,
    options_of,
    variant,
)
from core.yaml_files import ConfigError
from gpt_conf import KINDS, ModelConfig

CONFIG_VERSION = 1  # raised when a default's meaning changes: old and new runs then have different identities
DEFAULT_ITERS = 2000


@dataclass(frozen=True)
class DataConfig:
    """Which tokens."""

    dataset: str = opt("stdlib", "A corpus: a folder below data/ with a prepare.py, or one prepared there.")
    tokenizer: str | None = opt(
        None, "How the corpus was cut into tokens (byte, char, ...); null means its own default."
    )
    root: str | None = opt(None, "Folder of the corpora; null means data/ beside train.py.", identity=False)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Iterations are optimizer updates."""

    max_iters: int | None = opt(
        None, "Length of the run in iterations; null means max_tokens, or 2000 without either.", ge=1
    )
    max_tokens: int | None = opt(None, "Length of the run in training tokens, rounded up to whole iterations.", ge=1)
    batch_size: int = opt(12, "Sequences of one forward pass.", ge=1)
    gradient_accumulation_steps: int = opt(1, "Forward passes of one iteration.", ge=1)
    grad_clip: float | None = opt(1.0, "Largest norm of the whole gradient; null means no clipping.", gt=0.0)
    eval_interval: int = opt(250, "Iterations between evaluations; the last iteration is always evaluated.", ge=1)
    eval_iters: int | Literal["full"] = opt(
        20, "Batches of an evaluation, or 'full' for the whole validation split.", ge=1
    )
    eval_batch_size: int = opt(
        64, "Windows of an evaluation batch; not the training batch, so that losses compare.", ge=1
    )
    final_eval_iters: int | Literal["full"] | None = opt(
        None, "Batches of the last evaluation, or 'full'; null means eval_iters.", ge=1
    )
    log_interval: int = opt(10, "Iterations between records of the training loss.", ge=1, identity=False)
    checkpoint_interval: int | None = opt(
        None, "Iterations between checkpoints; null means eval_interval.", ge=1, identity=False
    )
    seed: int = opt(1337, "Moves initial values, data order and dropout.", ge=0)
    init_seed: int | None = opt(None, "Pins the initial values; null means seed.", ge=0)
    data_seed: int | None = opt(None, "Pins the data order; null means seed.", ge=0)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N.", identity=False)
    dtype: Literal["float32", "bfloat16", "float16"] = opt(
        "float32", "Precision of the forward pass; weights stay float32."
    )
    matmul_precision: Literal["highest", "high", "medium"] = opt(
        "highest", "Internal precision of float32 matrix products."
    )
    compile: bool = opt(False, "Whether torch.compile is used.")
    init_from: str | None = opt(None, "A run folder, hf:FOLDER or FILE.yaml whose weights the run starts from.")

    def __post_init__(self) -> None:
        wrong = []
        if self.max_iters is not None and self.max_tokens is not None:
            wrong.append(("max_tokens", "max_iters is given too; set one of them to null"))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            wrong.append(("device", f"'{self.device}' is not auto, cpu, cuda or cuda:N"))
        if self.init_from is not None:
            wrong.append(("init_from", "starting from other weights is not available yet"))
        if wrong:
            raise Invalid(*wrong)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "off"] = opt(
        "auto", "auto is online with a key and a network, else offline."
    )
    project: str = opt("slicewise", "Project.")
    entity: str | None = opt(None, "User or team; null means the key's own.")
    tags: tuple[str, ...] = opt((), "Tags besides those made from what differs.")


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = node(WandbConfig, "Weights & Biases.")


@dataclass(frozen=True)
class RunnerConfig:
    """How the runs of a sweep are carried out. Nothing here changes a result."""

    executor: Literal["local"] = opt("local", "Where trials run.")
    devices: str | tuple[str, ...] = opt(
        "auto", "Devices of the trials: auto, cpu, or a list such as [cuda:0, cuda:1]."
    )
    per_device: int | Literal["auto"] = opt(
        "auto", "Trials at a time on one device; auto is one a GPU, and one a core on a CPU.", ge=1
    )
    threads: int | None = opt(None, "CPU threads of a trial; null divides the cores among the trials.", ge=1)
    root: str = opt("runs", "Folder of the run folders.")


@dataclass(frozen=True)
class RunInfo:
    """What a run's own config.yaml says of its place in a sweep."""

    run_id: str = opt("", "Label and hash.")
    cell: str = opt("", "The run without its seed.")
    changed: dict[str, Any] = opt({}, "What the sweep set.")
    content: dict[str, str] = opt({}, "Hashes of the data and plugins that the run was made with.")
    wandb: str = opt("off", "The tracking mode that the sweep resolved.")


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    name: str = opt("default", "Name of the sweep; without it, the file's own.", identity=False)
    plugins: tuple[str, ...] = opt((), "Python files that add variations.", identity=False)
    model: ModelConfig = node(ModelConfig, "The model.")
    data: DataConfig = node(DataConfig, "The data.")
    train: TrainConfig = node(TrainConfig, "The training.")
    optimizer: Variant = variant("optimizer", "adamw", "The optimizer.")
    schedule: Variant = variant("schedule", "cosine", "The learning-rate schedule.")
    slices: dict[str, Any] = opt({}, "Rules over named slices.")
    tracking: TrackingConfig = node(TrackingConfig, "Tracking.", identity=False)
    runner: RunnerConfig = node(RunnerConfig, "The runner.", identity=False)
    run: RunInfo = node(RunInfo, "Written by the runner, ignored in files.", identity=False)

    def __post_init__(self) -> None:
        wrong = []
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", self.name):
            wrong.append(
                (
                    "name",
                    f"{self.name!r} is not made of letters, digits, '-', '_' and '.' (at most 100, no leading dot)",
                )
            )
        if self.slices:
            wrong.append(("slices", "rules over slices are not available yet"))
        if self.train.batch_size * self.train.gradient_accumulation_steps * self.model.block_size > 2**40:
            wrong.append(("train", "one iteration has more than 2^40 tokens"))
        if wrong:
            raise Invalid(*wrong)

    @property
    def tokens_per_iter(self) -> int:
        return self.train.batch_size * self.train.gradient_accumulation_steps * self.model.block_size

    @property
    def iterations(self) -> int:
        """The number of optimizer updates of the run."""
        if self.train.max_tokens is not None:
            return -(-self.train.max_tokens // self.tokens_per_iter)
        return self.train.max_iters or DEFAULT_ITERS

    @property
    def seeds(self) -> tuple[int, int]:
        """Seeds of the initial values and of the data order."""
        t = self.train
        return (t.seed if t.init_seed is None else t.init_seed, t.seed if t.data_seed is None else t.data_seed)


# Interpolation --------------------------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


def resolve(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mistake]]:
    """The tree with every `${a.b}` (or `${.b}`, beside it) replaced by what it names, and what could not be.

    A value that is one reference takes the other's type; inside text it is written out. Resolvers (`${name:...}`) are refused.
    """
    mistakes: list[Mistake] = []

    def lookup(reference: str, path: Path, trail: tuple[Path, ...]) -> Any:
        dots = len(reference) - len(reference.lstrip("."))
        base = path[: len(path) - dots] if dots else ()
        target = (*base, *reference[dots:].split("."))
        if ":" in reference:
            raise ValueError(f"'${{{reference}}}' is not allowed: only keys of the configuration can be referred to")
        if target in trail:
            raise ValueError(f"'${{{reference}}}' refers to itself")
        value: Any = tree
        for i, key in enumerate(target):
            if isinstance(value, str) and key == "variant":
                continue
            if not isinstance(value, Mapping) or key not in value:
                known = [".".join((*target[:i], str(k))) for k in value] if isinstance(value, Mapping) else []
                raise ValueError(
                    f"'${{{reference}}}' names nothing that the files set. {nearest('.'.join(target), known)}".rstrip(
                        "."
                    )
                )
            value = value[key]
        return walk(value, target, (*trail, target))

    def text(value: str, path: Path, trail: tuple[Path, ...]) -> Any:
        whole = _REFERENCE.fullmatch(value)
        try:
            if whole:
                return lookup(whole.group(1), path, trail)
            made = _REFERENCE.sub(lambda m: str(lookup(m.group(1), path, trail)), value)
            if "${" in made:
                raise ValueError(f"{value!r} has a reference that does not close")
            return made
        except (ValueError, RecursionError) as error:
            mistakes.append(Mistake(path, str(error)))
            return None

    def walk(value: Any, path: Path, trail: tuple[Path, ...]) -> Any:
        if isinstance(value, str):
            return text(value, path, trail) if "${" in value else value
        if isinstance(value, Mapping):
            made = {k: walk(v, (*path, k), trail) for k, v in value.items()}
            return value if all(made[k] is value[k] for k in value) else made
        if isinstance(value, list):
            items = [walk(v, (*path, str(i)), trail) for i, v in enumerate(value)]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        return value

    return walk(tree, (), ()), mistakes


# Reading --------------------------------------------------------------------------------------------------------------------


def has_references(value: Any) -> bool:
    """Whether any text in a tree refers to another key."""
    if isinstance(value, Mapping):
        return any(has_references(v) for v in value.values())
    return (
        any(has_references(v) for v in value) if isinstance(value, list) else isinstance(value, str) and "${" in value
    )


def load_plugins(files: tuple[str, ...] | list[str], folder: File) -> dict[str, str]:
    """Runs each Python file (relative to `folder`), which adds entries to the catalogue's dictionaries; returns content hashes.

    Raises ConfigError where a file is missing or fails.
    """
    made = {}
    for name in files:
        path = (folder / name).resolve()
        if not path.is_file() or path.suffix != ".py":
            raise ConfigError(f"plugins: '{name}' is no Python file below {folder}.")
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        module = f"slicewise_plugin_{content}"
        made[str(path)] = content
        if module in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[module])
        except Exception as error:
            del sys.modules[module]
            raise ConfigError(f"plugins: '{name}' failed: {type(error).__name__}: {error}.") from error
    return made


@dataclass
class ConfigReader:
    """Reads many trees of one sweep. Sections that trees share are read once; each distinct model is built once, without memory.

    `corpora(data)` gives the corpus of a data section: vocabulary, number of tokens, content hash. `build(model)` raises ValueError
    for a model that cannot be.
    """

    catalogue: Catalogue
    corpora: Callable[[DataConfig], Any]
    build: Callable[[ModelConfig], object]
    plugins: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reader = Reader(self.catalogue)
        self._built: dict[Any, list[Mistake]] = {}
        self._corpora: dict[DataConfig, Any] = {}
        self._parts: dict[int, tuple[Any, Any]] = {}

    def read(self, tree: Mapping[str, Any]) -> tuple[Config | None, list[Mistake]]:
        """The configuration that a tree says, and every mistake in it."""
        tree, mistakes = resolve(tree) if has_references(tree) else (dict(tree), [])
        tree = self._fill_sites(tree)
        self.reader.mistakes = mistakes
        config = self.reader.read(Config, tree)
        if config is None or mistakes:
            return None, self.reader.mistakes
        wrong = self._check(config)
        return (None if wrong else config), wrong

    def _fill_sites(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A site's mapping without a variant is about the model's own variant of that kind."""
        model = tree.get("model")
        sites = model.get("sites") if isinstance(model, Mapping) else None
        if not isinstance(model, Mapping) or not isinstance(sites, Mapping):
            return tree
        known = self._parts.get(id(model))
        if known is None:
            made = {name: self._filled(site, model) for name, site in sites.items()}
            known = self._parts[id(model)] = (model, {**model, "sites": made})
        return {**tree, "model": known[1]}

    def _filled(self, site: Any, model: Mapping[str, Any]) -> Any:
        if not isinstance(site, Mapping):
            return site
        made = dict(site)
        for kind in KINDS:
            if isinstance(given := site.get(kind), Mapping) and "variant" not in given:
                base = model.get(kind, ModelConfig.__dataclass_fields__[kind].default.name)
                made[kind] = {"variant": base, **given} if isinstance(base, str) else {**base, **given}
        return made

    def corpus(self, data: DataConfig) -> Any:
        if data not in self._corpora:
            self._corpora[data] = self.corpora(data)
        return self._corpora[data]

    def _check(self, config: Config) -> list[Mistake]:
        """What only the data and the assembled model can tell."""
        try:
            corpus = self.corpus(config.data)
        except ValueError as error:
            return [Mistake(("data", "dataset"), str(error).rstrip("."))]
        wrong = []
        longest = min(len(corpus.train), len(corpus.val)) - 1
        if config.model.block_size > longest:
            text = (
                f"{config.model.block_size} is longer than the data: '{config.data.dataset}' allows at most {longest}"
            )
            wrong.append(Mistake(("model", "block_size"), text))
        vocabulary = config.model.vocab_size
        if vocabulary is not None and vocabulary < corpus.meta.vocab_size:
            text = f"{vocabulary} is smaller than the data's vocabulary of {corpus.meta.vocab_size}"
            wrong.append(Mistake(("model", "vocab_size"), text))
        if config.train.dtype == "float16" and config.train.device == "cpu":
            wrong.append(Mistake(("train", "dtype"), "float16 needs a CUDA device; use bfloat16 or float32"))
        return wrong or self._build(with_vocabulary(config, corpus.meta.vocab_size).model)

    def _build(self, model: ModelConfig) -> list[Mistake]:
        key = key_of(model)
        if key not in self._built:
            self._built[key] = []
            try:
                self.build(model)
            except Invalid as error:
                self._built[key] = [
                    Mistake(("model", *name.split(".")), text.rstrip(".")) for name, text in error.wrong
                ]
            except ValueError as error:
                self._built[key] = [Mistake(("model",), str(error).rstrip("."))]
        return self._built[key]

    def identity(self, config: Config) -> tuple[str, str]:
        """Hashes of the run and of its cell (the run without its seed): ten hexadecimal digits each."""
        parts = {name: self._difference(getattr(config, name)) for name in ("model", "data", "optimizer", "schedule")}
        content = {"data": self.corpus(config.data).meta.content_hash, "plugins": sorted(self.plugins.values())}
        train = differences(config.train)
        seed = train.pop("seed", None)
        cell = json.dumps({"version": CONFIG_VERSION, "content": content, "train": train, **parts}, sort_keys=True)
        return _digest(f"{cell} seed {seed}"), _digest(cell)

    def _difference(self, section: Any) -> str:
        known = self._parts.get(id(section))
        if known is None:
            changed = (
                differences(section.options) | {"variant": section.name}
                if isinstance(section, Variant)
                else differences(section)
            )
            known = self._parts[id(section)] = (section, json.dumps(changed, sort_keys=True))
        return str(known[1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def with_vocabulary(config: Config, size: int) -> Config:
    """The configuration with the data's vocabulary where the file named none."""
    return config if config.model.vocab_size else replace(config, model=replace(config.model, vocab_size=size))


def default_value(catalogue: Catalogue, tree: Any, path: Path) -> Any:
    """What a key holds where `tree` does not set it: its option's default, a variation's name for a node; None if unknown."""
    cls: Any = Config
    for i, key in enumerate(path):
        spec = fields_of(cls).get(key)
        if spec is None:
            return None
        rest, kind = path[i + 1 :], spec.metadata.get("kind")
        if kind is None and not rest:
            return spec.default
        if kind is None:
            cls = hints(cls)[spec.name]
            if not is_dataclass(cls):
                return None
            continue
        given = get(tree, path[: i + 1])
        named = given.get("variant") if isinstance(given, Mapping) else given
        name: Any = named or (spec.default.name if isinstance(spec.default, Variant) else None)
        if rest in ((), ("variant",)) or name not in catalogue[kind]:
            return name
        cls = options_of(catalogue[kind][name])
    return None


def sentences(mistakes: list[Mistake], place: Callable[[Path], str | None]) -> list[str]:
    """Each mistake as a sentence with its place, once."""
    return list(dict.fromkeys(m.sentence(place(m.at or m.path)) for m in mistakes))
