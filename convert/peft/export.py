"""Adapters of a model as a folder that PEFT loads over the same model of Hugging Face.

Where their linear map is one part of ours, the part's adapter is its own. Where it is several, A of all parts are put one below
another and B in blocks, which is exact. An adapter of ours over several of their maps becomes one for each, with the same A.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.files import new_folder, write_file
from convert.huggingface.family import Family
from convert.mapping import Tensors
from convert.peft.names import config_of, key
from convert.peft.pieces import Piece, Scale, joined, shares
from convert.peft.places import WEIGHT, Place, Places
from core.addresses import is_adapter
from core.lora import adapted, effective, plan
from core.rules import Row
from core.weights import load_weights, weights
from model import GPT, build

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MAMBA = {"mamba2": ("out_proj", "conv1d")}  # what PEFT refuses to adapt, by family


@dataclass
class Written:
    """What an export did: by name of their weight, the adapters of ours it is made of and its rank; and what is to be said."""

    targets: dict[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Own:
    """An adapter of ours with its options: a piece for each of its experts, or the only one. dora: whether it has magnitudes."""

    address: str
    weight: str
    pieces: list[Piece]
    options: Any
    dora: bool


def bare(model: GPT) -> GPT:
    """A copy of the model without its adapters: the base that they are for."""
    made = build(model.config, 0)
    kinds = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        parameter.data = parameter.data.to(kinds[name].dtype)
    load_weights(made, {name: t for name, t in weights(model).items() if not is_adapter(name)})
    return made.eval()


def write(model: GPT, rows: Sequence[Row], family: Family, folder: Path, base: str | None = None) -> Written:
    """Writes the adapters of a model with separate layers into a new folder, which is there when all of it is.

    rows: the table of its slices, which says the adapters' options. family: whose names and layouts they get. base: where PEFT
    finds the model that they are for, which is `bare(model)`, exported. Raises ValueError, with every reason, for what has no
    adapter and what PEFT cannot represent; nothing is written then.
    """
    tensors, config, written = convert(model, rows, family)
    with new_folder(folder) as inside:
        _save(inside, tensors, {**config, "base_model_name_or_path": base})
    return written


def write_stack(
    runs: Iterable[tuple[str, GPT, Sequence[Row]]], family: Family, folder: Path, base: str | None = None
) -> dict[str, Written]:
    """Writes the adapters of several runs over one frozen base, a folder for each below a new one, all of them or none.

    Raises ValueError where a run has another base than the first: its adapters alone would not be that run.
    """
    made: dict[str, Written] = {}
    first: dict[str, Tensor] = {}
    with new_folder(folder) as outer:
        for name, model, rows in runs:
            own = {n: t for n, t in weights(model).items() if not is_adapter(n)}
            if not first:
                first, begun = own, name
            if other := next((n for n in first if n not in own or not torch.equal(own[n], first[n])), None):
                raise ValueError(f"{other} of '{name}' is not that of '{begun}': these adapters have no base in common. "
                                 "Export each run with a base of its own.")  # fmt: skip
            tensors, config, made[name] = convert(model, rows, family)
            inside = outer / name
            inside.mkdir()
            _save(inside, tensors, {**config, "base_model_name_or_path": base})
    return made


def _save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    write_file(Tensors(tensors), folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def convert(model: GPT, rows: Sequence[Row], family: Family) -> tuple[dict[str, Tensor], dict[str, Any], Written]:
    """The tensors of an adapter by PEFT's names, its configuration, and what was done. Raises ValueError."""
    places = Places(model, family)
    own = owned(model, rows, places)
    if not own:
        raise ValueError("The model has no adapters.")
    rslora, dora = all(x.options.rslora for x in own), any(x.dora for x in own)
    names = list(places.touching({x.weight for x in own}))
    if wrong := [text for name in names for text in _refused(name, places, dora)]:
        raise ValueError("\n".join(dict.fromkeys(wrong)))
    magnitudes = _magnitudes(model, own, places) if dora else None
    made, written = dict[str, Adapted](), Written()
    for name in names:
        place = places.of(name)
        assert place is not None
        there = set(places.numbered.owners(place.rows))
        pieces = [(x.address, piece) for x in own if x.weight in there for piece in x.pieces]
        if some := [(address, piece) for address, piece in pieces if shares(piece, matrices(place))]:
            made[name] = _matrix([piece for _, piece in some], place, rslora, magnitudes)
            written.targets[name] = tuple(dict.fromkeys(address for address, _ in some)), made[name].scale.rank
    if dora and not all(x.dora for x in own):
        written.notes.append(
            "Adapters without magnitudes were given those that leave them as they are: PEFT has DoRA for all."
        )
    dropout = _dropout(own, any(places.is_parameter(name) for name in made), written)
    tensors = {k: t for name, adapter in made.items() for k, t in adapter.tensors(key(name, list(made))).items()}
    scales = {name: adapter.scale for name, adapter in made.items()}
    transposed = any(adapter.place.transposed for adapter in made.values())
    config = config_of(scales, places, rslora=rslora, dora=dora, dropout=dropout, transposed=transposed)
    return tensors, config, written


def owned(model: GPT, rows: Sequence[Row], places: Places) -> list[Own]:
    """The adapters of a model. Raises ValueError where the table is not that of the model."""
    found, known = [], dict(model.named_modules())
    for planned in plan(model, rows)[0]:
        adapter: Any = known.get(f"{planned.linear}.{planned.name}")
        if adapter is None or adapter.ranges != planned.ranges:
            raise ValueError(f"The table has an adapter at {planned.linear} that the model does not have.")
        options, weight = planned.node.options, f"{planned.linear}{WEIGHT}"
        scale = Scale(options.alpha, options.rank, options.rslora)
        assert math.isclose(scale.value, float(adapter.scale), rel_tol=1e-5), planned
        inside = [row for a, b in planned.ranges for row in range(a, b)]
        experts = planned.experts and [int(e) for e in planned.experts]
        pieces = []
        for i, expert in enumerate(experts or [None]):
            first = places.numbered.weight_rows(weight, expert).start
            a, b, m = (getattr(adapter, f"lora_{x}", None) for x in ("a", "b", "magnitude"))
            one = [None if t is None else (t[i] if experts else t).detach() for t in (a, b, m)]
            assert one[0] is not None and one[1] is not None
            pieces.append(Piece(one[0], one[1], torch.tensor([first + row for row in inside]), scale, one[2]))
        address = f"{planned.linear}{planned.name.partition('[')[1]}{planned.name.partition('[')[2]}"
        found.append(Own(address, weight, pieces, options, pieces[0].magnitudes is not None))
    if len(found) != sum(len(some) for _, some in adapted(model)):
        raise ValueError("The model has adapters that its table does not have.")
    return found


def _refused(name: str, places: Places, dora: bool) -> Iterable[str]:
    """Why a weight of theirs can have no adapter in PEFT."""
    module = name.removesuffix(WEIGHT)
    place = places.of(name)
    if place is None:
        yield f"{name} is not made of rows of one weight of ours, so no adapter of it is one of ours."
    elif place.transposed and place.rows.dim() == 2:
        yield f"{name} is stored as [E, in, out], which is not known of '{places.family}'."
    elif dora and (places.is_parameter(name) or (place.rows < 0).any()):
        yield f"{name} has DoRA, which PEFT has for modules that are linear maps alone, and not for parameters or padded rows."
    if module.rpartition(".")[2] in MAMBA.get(places.family, ()):
        yield f"{name}: PEFT adapts no '{module.rpartition('.')[2]}' of {places.family}. Merge this adapter, or leave it out."


def _magnitudes(model: GPT, own: Sequence[Own], places: Places) -> Tensor:
    """Of every row of ours by its number: DoRA's own, else the norm of the weight that multiplies, which changes nothing."""
    paths = {module: path for path, module in model.named_modules()}
    every = torch.ones(int(places.numbered.first[-1]), dtype=torch.float64)
    for linear in {paths[linear]: linear for linear, _ in adapted(model)}.values():
        norms = torch.linalg.vector_norm(effective(linear), dim=-1).flatten()
        span = places.numbered.weight_rows(f"{paths[linear]}{WEIGHT}")
        every[span.start : span.stop] = norms.double()
    for piece in (piece for x in own if x.dora for piece in x.pieces):
        assert piece.magnitudes is not None
        every[piece.rows] = piece.magnitudes.double()
    return every


@dataclass(frozen=True)
class Adapted:
    """What PEFT adds to one of their matrices or stacks: one piece, or one for each expert."""

    place: Place
    pieces: list[Piece]
    scale: Scale

    def tensors(self, module: str) -> dict[str, Tensor]:
        """By PEFT's names. Of a stack, A [E * rank, in] has experts one after another, B [out, rank * E] ranks."""
        stacked = self.place.rows.dim() == 2
        a, b = (torch.stack([getattr(piece, x) for piece in self.pieces]) for x in "ab")
        a = a.flatten(0, 1)
        b = b.permute(1, 2, 0).flatten(1) if stacked else b[0]
        made = {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
        if self.pieces[0].magnitudes is not None:
            made[f"{module}.lora_magnitude_vector"] = self.pieces[0].magnitudes
        return made


def _matrix(pieces: list[Piece], place: Place, rslora: bool, magnitudes: Tensor | None) -> Adapted:
    """Pieces of ours as what is added to a place of theirs; experts that have none, or less, are filled up with zeros."""
    rows = matrices(place)
    some: list[list[Piece]] = [[] for _ in rows]
    for each in pieces:
        for index in shares(each, rows):
            some[index].append(each)
    joins = [joined(found, of, rslora) if found else None for found, of in zip(some, rows, strict=True)]
    there = [piece for piece in joins if piece is not None]
    rank, width = max(len(piece.a) for piece in there), len(place.columns)
    scale = there[0].scale.of(rank, rslora)
    filled = []
    for index, of in enumerate(rows):
        a, b = there[0].a.new_zeros(rank, width), there[0].b.new_zeros(len(of), rank)
        if (piece := joins[index]) is not None:
            a[: len(piece.a)] = piece.a[:, place.columns]
            b[:, : len(piece.a)] = piece.b * (piece.scale.value / there[0].scale.value)
        own = None if magnitudes is None else magnitudes[of].to(a.dtype)
        filled.append(Piece(a, b, of, scale, own))
    return Adapted(place, filled, scale)


def matrices(place: Place) -> Tensor:
    """The rows of each matrix of a place, [E, out]; E is 1 where there is one."""
    return place.rows if place.rows.dim() == 2 else place.rows[None]


def _dropout(own: Sequence[Own], parameters: bool, written: Written) -> float:
    """What all adapters drop; 0 where they differ, and where PEFT cannot."""
    found = Counter(x.options.dropout for x in own)
    dropout = float(found.most_common(1)[0][0]) if len(found) == 1 and not parameters else 0.0
    if set(found) != {dropout}:
        why = (
            "PEFT drops nothing before adapters of parameters"
            if parameters
            else "PEFT has one for all, and they differ"
        )
        written.notes.append(f"The dropout of adapters was left out: {why}.")
    return dropout
