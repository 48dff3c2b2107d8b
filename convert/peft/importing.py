"""A folder of PEFT as adapters of a model of ours: the rules that ask for them, and what is in them.

Where each rank of a fused map serves one part alone, the parts get adapters of their own again; where several maps have the same
A, they are one adapter over all of them. Everything else becomes an adapter of the parts that it adds something to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convert.files import Folder
from convert.huggingface.family import Family
from convert.huggingface.ours import Multiplied, Ours
from convert.mapping import Mapped
from convert.peft.export import CONFIG, TENSORS, matrices
from convert.peft.groups import Group, Linear, grouped, rules_for
from convert.peft.names import PREFIX, WRAPPED, at, module
from convert.peft.pieces import Piece, Scale
from convert.peft.places import WEIGHT, Place, Places
from core.addresses import is_adapter
from core.lora import adapted
from core.options import Reader
from core.rules import Row, SliceRule
from core.slices import declared
from core.weights import weights
from gpt_conf import ModelConfig
from model import GPT, assemble, fill
from variations import CATALOGUE

NAME = re.compile(rf"^{re.escape(PREFIX)}(.+)\.lora_(?:(A|B)\.weight|(magnitude)_vector(?:\.weight)?)$")
PATTERNS = ("rank_pattern", "alpha_pattern")
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_parameters", *PATTERNS}
# About loading, training or places that the names of tensors say again.
SILENT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "velora_config"),
}  # fmt: skip
NUMBER = (int, float)
KINDS: dict[str, Any] = dict.fromkeys(PATTERNS, dict) | {"target_parameters": list}
KINDS |= dict.fromkeys(("lora_alpha", "lora_dropout"), NUMBER)
BEGUN = (True, None, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it is


@dataclass
class Imported:
    """What a folder says: `rules` for the node `slices` of a configuration, and the adapters that they ask for."""

    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)  # by name of their weight, ours


def load(model: Any, imported: Imported, config: ModelConfig | None = None) -> tuple[GPT, list[Row]]:
    """A copy of the model with the imported adapters, and its table. Raises ValueError where they cannot be, such as ranks that
    exceed what they adapt."""
    reader = Reader(CATALOGUE)
    optimizer = reader.variant("optimizer", {"variant": "adamw"}, ())
    rules = {name: reader.read(SliceRule, rule) for name, rule in imported.rules.items()}
    if reader.mistakes:
        raise ValueError("\n".join(mistake.sentence(None) for mistake in reader.mistakes))
    assert optimizer is not None
    made, rows = assemble(config or model.config, {n: r for n, r in rules.items() if r is not None}, optimizer)
    fill(made, rows, 0)
    own = {name: t for name, t in weights(model).items() if not is_adapter(name)}
    for name, parameter in made.named_parameters():
        parameter.data = own[name].clone() if name in own else parameter.data.to(model.wte.weight.dtype)
    for name, tensor in made.named_buffers():
        if name in own:
            tensor.copy_(own[name])
    put(made, imported)
    return made.eval(), rows


@torch.no_grad()
def put(model: GPT, imported: Imported) -> None:
    """Fills the adapters of a model that was assembled with the imported rules."""
    left = list(imported.groups)
    paths = {linear: path for path, linear in model.named_modules()}
    for linear, some in adapted(model):
        every = [str(e) for e in range(linear.experts)]
        for adapter in some:
            experts = tuple(every if adapter.places is None else (every[i] for i in adapter.places))
            here = (g for g in left if g.linear.path == paths[linear] and g.experts == experts)
            group = next((g for g in here if g.ranges == adapter.ranges), None)
            assert group is not None, (paths[linear], experts, adapter.ranges)
            left.remove(group)
            for name, own in (("lora_a", "a"), ("lora_b", "b"), ("lora_magnitude", "magnitudes")):
                values = [getattr(piece, own) for piece in group.pieces]
                if values[0] is not None:
                    getattr(adapter, name).copy_(torch.stack(values) if experts else values[0])
    assert not left, left


# Read ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(folder: Path, model: GPT, family: Family) -> Imported:
    """The adapters in a folder, as those of a model without adapters and with separate layers. Nothing in it is executed.

    family: whose names and layouts it has. Raises ValueError with everything that cannot be represented: other methods than LoRA,
    rsLoRA and DoRA, adapters of embeddings, trained biases, whole modules.
    """
    if adapted(model):
        raise ValueError("The model has adapters already. Merge them first, or import into the model without them.")
    config = _config(folder / CONFIG)
    places = Places(model, family)
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} has no {TENSORS}. Files of other kinds may hold code and are not read.")
    source = Folder(folder / TENSORS)
    imported, wrong = Imported(), list(_unread(config))
    copies, tensors = _copies(source, model, places)
    wrong += [f"{name} is a weight of the base, and not that of this model." for name in copies]
    pieces: list[Piece] = []
    for name, some in _modules(tensors, config, places, wrong).items():
        place = places.of(name)
        if place is None:
            wrong.append(f"{name} is not made of rows of one weight of ours, so its adapter is none of ours.")
            continue
        owners = places.numbered.owners(place.rows)
        imported.sources[name] = ", ".join(owners)
        if lacking := [own for own in owners if not hasattr(_owner(model, own), "op")]:
            wrong.append(f"{name} is {lacking[0]}, which is no linear map alone, and an adapter needs one.")
        elif (text := _shape(some, place)) != "":
            wrong.append(f"{name}: {text}.")
        else:
            pieces += _pieces(some, place, _scale(config, name, some, place))
    if wrong:
        raise ValueError("\n".join(f"{folder}: {text}" for text in dict.fromkeys(wrong)))
    by_weight: dict[str, list[Piece]] = {}
    for piece in pieces:
        for own in places.numbered.owners(piece.rows):
            span = places.numbered.weight_rows(own)
            inside = ((piece.rows >= span.start) & (piece.rows < span.stop)).nonzero()[:, 0]
            by_weight.setdefault(own, []).append(piece.of_rows(inside))
    linears, norms = _linears(model, places), _norms(model, places)
    imported.groups = [g for x in linears for g in grouped(x, by_weight.get(f"{x.path}{WEIGHT}", ()), norms)]
    imported.rules = rules_for(imported.groups, linears, float(config.get("lora_dropout") or 0.0))
    return imported


def _linears(model: GPT, places: Places) -> list[Linear]:
    made = []
    for name, _, what in declared(model):
        path, _, leaf = name.rpartition(".")
        linear: Any = model.get_submodule(path)
        if leaf == "weight" and hasattr(linear, "op"):
            first = places.numbered.weight_rows(name).start
            made.append(Linear(path, what.layout, first, linear.out_features, linear.experts))
    return made


def _owner(model: GPT, weight: str) -> nn.Module:
    return model.get_submodule(weight.removesuffix(WEIGHT))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path}: peft_type is {found!r}, and adapters of ours are those of 'LORA'.")
    for name, kind in KINDS.items():
        if (value := config.get(name)) is not None and not isinstance(value, kind):
            raise ValueError(f"{path}: {name} is {value!r}, which it cannot be.")
    return config


def _unread(config: Mapping[str, Any]) -> Iterator[str]:
    """What of a configuration stands for something that adapters of ours do not have."""
    for name, value in config.items():
        if name == "init_lora_weights":
            if value not in BEGUN and value is not False:
                yield f"init_lora_weights is {value!r}, which changes the base that the adapter is for."
        elif name == "bias":
            if value != "none":
                yield f"bias is {value!r}: trained biases are no adapters of ours."
        elif name not in READ | SILENT and value:
            yield f"{name} is {value!r}, which adapters of ours do not have."


def _copies(source: Folder, model: GPT, places: Places) -> tuple[list[str], dict[str, Tensor]]:
    """PEFT saves embedding and head as they are beside an adapter of one of them: which of these copies are other weights than the
    model's, and the tensors without them."""
    base = Mapped(Multiplied(model, Ours(model.config)), places.rules)
    wrong, rest = [], {}
    for name in source.names():
        own = name.removeprefix(PREFIX).replace(f"{WRAPPED}{WEIGHT}", WEIGHT)
        if own not in base.moves:
            rest[name] = source.get(name)
        elif not torch.equal(source.get(name).to(base.meta(own).dtype), base.get(own)):
            wrong.append(name)
    return wrong, rest


def _modules(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], places: Places, wrong: list[str]
) -> dict[str, dict[str, Tensor]]:
    """By name of their weight, its A, B and magnitudes."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.match(name)
        if match is None:
            what = "an adapter of an embedding" if "lora_embedding" in name else "no A, B or magnitude of a linear map"
            wrong.append(f"{name} is {what}, which adapters of ours do not have.")
        else:
            found.setdefault(match[1], {})[(match[2] or match[3]).lower()] = tensor
    made: dict[str, dict[str, Tensor]] = {}
    for path, some in found.items():
        name = _weight(path, found, config, places)
        if not places.known(name):
            wrong.append(f"{path} has an adapter, and the model has no such weight.")
        elif not {"a", "b"} <= set(some) or bool(config.get("use_dora")) != ("magnitude" in some):
            wrong.append(
                f"{path} has {', '.join(sorted(some))}, and not A and B"
                + (" and magnitudes." if config.get("use_dora") else ".")
            )
        else:
            made[name] = some
    return made


def _weight(path: str, found: Iterable[str], config: Mapping[str, Any], places: Places) -> str:
    """The weight that a wrapped module's adapter is of. Of several parameters the last is outermost."""
    owner = re.sub(rf"({re.escape(WRAPPED)})*$", "", path)
    depth = (len(path) - len(owner)) // len(WRAPPED)
    inside = [n for n in places.names() if module(n) == owner]
    some = [n for n in inside if _targeted(config, n)]
    count = sum(re.sub(rf"({re.escape(WRAPPED)})*$", "", other) == owner for other in found)
    if some:
        return some[len(some) - 1 - depth] if depth < len(some) == count else f"{path}?"
    return f"{path}{WEIGHT}"


def _shape(some: Mapping[str, Tensor], place: Place) -> str:
    """What does not fit, in words; empty where all does."""
    a, b = some["a"], some["b"]
    count, out = matrices(place).shape
    told = f"A is {list(a.shape)} and B {list(b.shape)}, and the weight has {list(place.rows.shape)} rows"
    told += f" and {len(place.columns)} columns"
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(a) % count:
        return told
    fits = a.shape[1] == len(place.columns) and len(b) == out and len(a) > 0
    return "" if fits and ("magnitude" not in some or some["magnitude"].shape == (out,)) else told


def _targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT was told the parameter, and not its module."""
    return any(name == t or name.endswith(f".{t}") for t in config.get("target_parameters") or ())


def _scale(config: Mapping[str, Any], name: str, some: Mapping[str, Tensor], place: Place) -> Scale:
    label = name if _targeted(config, name) else module(name)
    alpha = at(config.get("alpha_pattern") or {}, label, config.get("lora_alpha", 8))
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"{CONFIG}: alpha of {label} is {alpha!r}, and a number above 0 is expected.")
    return Scale(float(alpha), len(some["a"]) // len(matrices(place)), bool(config.get("use_rslora")))


def _pieces(some: Mapping[str, Tensor], place: Place, scale: Scale) -> Iterator[Piece]:
    """A piece for each matrix, with our columns; experts whose A and B are zero have none where others have one."""
    rows = matrices(place)
    a = some["a"].unflatten(0, (len(rows), scale.rank))
    b = some["b"].unflatten(1, (scale.rank, len(rows))).permute(2, 0, 1)
    live = [bool(x.any() or y.any()) for x, y in zip(a, b, strict=True)]
    for i, of in enumerate(rows):
        if live[i] or not any(live):
            own, real = torch.empty_like(a[i]), of >= 0
            own[:, place.columns] = a[i]
            magnitudes = some["magnitude"][real] if "magnitude" in some else None
            piece = Piece(own, b[i][real], of[real], scale, magnitudes)
            used = (own.any(1) | piece.b.any(0)).nonzero()
            # Experts have one rank for all in their files; what one of them was filled up with is taken off again.
            yield piece.of_ranks(range(int(used.max()) + 1)) if len(rows) > 1 and len(used) else piece


def _norms(model: GPT, places: Places) -> Callable[[Tensor], Tensor]:
    """The norms of our rows, by their numbers."""

    def of(rows: Tensor) -> Tensor:
        (name,) = places.numbered.owners(rows)
        linear: Any = _owner(model, name)
        every = torch.linalg.vector_norm(linear.effective(), dim=-1).flatten()
        made: Tensor = every[rows - places.numbered.weight_rows(name).start]
        return made

    return of
