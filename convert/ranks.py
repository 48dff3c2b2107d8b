"""Models divided among ranks: a plan for every weight, sources in both directions, and folders with a file for each rank.

The names that a rank has are local where its stage begins to count layers anew, and global where experts are numbered. The plan,
which is plain data, is kept beside the files: full weights are put together again, or divided anew, without the model.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from convert.base import Step, shape
from convert.files import ALIGNED, DTYPES, METADATA, NAMES, Folder, Told, new_folder
from convert.kinds import Sizes, Weight, owners, shards, unstacked
from convert.mapping import Mismatch, Source, matches
from convert.steps import Batched, Chain, Copies, Transposed
from core.layout import Layout

PLAN = "ranks.json"


@dataclass(frozen=True)
class Naming:
    """Which weights are of which stage, by their names.

    layers: what is before a layer's number. last: patterns of what is on the last stage; all else without a layer is on the first.
    tied: weights of the first stage that the last holds too, and under which name, unless there is a weight of that name.
    """

    layers: str = "h"
    last: tuple[str, ...] = ("ln_f.**", "head.**")
    tied: Mapping[str, str] = field(default_factory=lambda: {"wte.weight": "head.weight"})

    def layer(self, name: str) -> tuple[int, str] | None:
        """A layer's number and the name inside it; None for what is in no layer."""
        found = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", name)
        return None if found is None else (int(found.group(1)), found.group(2))


@dataclass(frozen=True)
class Move:
    """One weight's way: the step from the full tensor to several, and of each of these the rank and the name there."""

    name: str
    step: Step
    places: tuple[tuple[int, str], ...]


class Sharding:
    """A plan for the weights of a model on the ranks of given sizes.

    apart: whether a stack of experts becomes a tensor for each, its name followed by the expert's number among all; else each rank
    has the stack of its own. Raises Mismatch, with every weight that cannot be divided; nothing has been read then.
    """

    def __init__(
        self, weights: Mapping[str, Weight], sizes: Sizes, naming: Naming | None = None, apart: bool = True
    ) -> None:
        self.weights, self.sizes, self.apart = dict(weights), sizes, apart
        self.naming = naming or Naming()
        self.wrong = list[str]()
        self.begins = self._stages()
        self.moves: dict[str, Move] = {}
        self.ranks: list[dict[str, Tensor]] = [{} for _ in range(sizes.count)]  # by name there: without memory
        self.origin: list[dict[str, tuple[str, int]]] = [
            {} for _ in range(sizes.count)
        ]  # its weight, and which of the tensors
        if not self.wrong:
            for name, weight in weights.items():
                self._plan(name, weight)
        if self.wrong:
            raise Mismatch(self.wrong)

    def _stages(self) -> list[int]:
        """The first layer of each stage, and the number of layers."""
        stages = self.sizes.pipeline
        numbers = {found[0] for name in self.weights if (found := self.naming.layer(name)) is not None}
        count = max(numbers, default=-1) + 1
        if lacking := sorted(set(range(count)) - numbers):
            self.wrong.append(f"Of the {count} layers, there are no weights of {', '.join(map(str, lacking[:8]))}.")
        if self.sizes.layers and sum(self.sizes.layers) != count:
            self.wrong.append(f"The stages have {list(self.sizes.layers)} layers, and there are {count}.")
        if not self.sizes.layers and count % stages:
            self.wrong.append(
                f"{count} layers cannot be divided evenly among {stages} pipeline stages; say how many each has."
            )
        each = self.sizes.layers or (count // stages,) * stages
        return [sum(each[:i]) for i in range(stages + 1)]

    def _plan(self, name: str, weight: Weight) -> None:
        """Carries one weight's way out without memory."""
        try:
            move = self.move_of(name, weight)
            made = move.step([weight.meta])
        except ValueError as error:
            self.wrong.append(f"{name} {list(weight.shape)}, of kind {weight.kind}: {error}.")
            return
        assert len(made) == len(move.places), name
        self.moves[name] = move
        for i, ((rank, local), meta) in enumerate(zip(move.places, made, strict=True)):
            if local in self.ranks[rank]:
                self.wrong.append(f"Rank {rank} would have two tensors named {local}, of {name} and of another weight.")
            self.ranks[rank][local], self.origin[rank][local] = meta, (name, i)

    def move_of(self, name: str, weight: Weight) -> Move:
        steps, inner = [shards(weight, self.sizes)], owners(weight, self.sizes)
        found, names = self.naming.layer(name), [(0, name)]
        if found is not None:
            stage = next(i for i, end in enumerate(self.begins[1:]) if found[0] < end)
            names = [(stage, f"{self.naming.layers}.{found[0] - self.begins[stage]}.{found[1]}")]
        elif any(matches(pattern, name) is not None for pattern in self.naming.last):
            names = [(self.sizes.pipeline - 1, name)]
        elif name in self.naming.tied and self.naming.tied[name] not in self.weights and self.sizes.pipeline > 1:
            names.append((self.sizes.pipeline - 1, self.naming.tied[name]))
        held = [(i, "") for i in inner]
        if self.apart and weight.experts is not None:
            steps += unstacked(weight, self.sizes)
            each = weight.shape[weight.experts] // self.sizes.expert
            held = [(i, f".{self.sizes.place(i).expert * each + e}") for i in inner for e in range(each)]
        if len(names) > 1:
            steps += [Batched(1, Copies(2), 2), Transposed(len(held), 2)]
        places = [(stage * self.sizes.inner + i, local + more) for stage, local in names for i, more in held]
        return Move(name, Chain(tuple(steps)), tuple(places))

    def tree(self) -> dict[str, Any]:
        """Plain data that says all of it."""
        listed = {name: _written(weight) for name, weight in self.weights.items()}
        return {"sizes": asdict(self.sizes), "naming": asdict(self.naming), "apart": self.apart, "weights": listed}

    @staticmethod
    def read(tree: Mapping[str, Any]) -> Sharding:
        """Of what `tree` gave. Raises ValueError for anything else."""
        try:
            sizes, naming = dict(tree["sizes"]), dict(tree["naming"])
            sizes["layers"], naming["last"] = tuple(sizes["layers"]), tuple(naming["last"])
            weights = {name: _weight(one) for name, one in tree["weights"].items()}
            return Sharding(weights, Sizes(**sizes), Naming(**naming), bool(tree["apart"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this does not say how weights lie on ranks: {error!r}") from None

    def digest(self) -> str:
        """The same for the same plan."""
        return hashlib.sha256(json.dumps(self.tree(), sort_keys=True).encode()).hexdigest()


def _written(weight: Weight) -> dict[str, Any]:
    made = {**asdict(weight), "dtype": NAMES[weight.dtype]}
    if weight.layout is not None:
        made["layout"] = {"parts": weight.layout.parts, "dim": weight.layout.dim, "groups": weight.layout.groups}
    return made


def _weight(tree: Mapping[str, Any]) -> Weight:
    made = dict(tree)
    made["shape"], made["shared"], made["dtype"] = tuple(made["shape"]), tuple(made["shared"]), DTYPES[made["dtype"]]
    made["expert"] = made["expert"] and tuple(made["expert"])
    if (layout := made["layout"]) is not None:
        made["layout"] = Layout(tuple((n, r) for n, r in layout["parts"]), layout["dim"], layout["groups"])
    return Weight(**made)


def known(weights: Mapping[str, Weight], source: Source) -> dict[str, Weight]:
    """The weights as a source has them, in its dtypes. Raises Mismatch for what it lacks, has too many of, or in another shape."""
    there, wrong = set(source.names()), list[str]()
    wrong += [f"The source has no {name}." for name in weights if name not in there]
    wrong += [f"{name} of the source is no weight that is divided." for name in sorted(there - weights.keys())]
    made = {}
    for name in (name for name in weights if name in there):
        meta = source.meta(name)
        if tuple(meta.shape) != weights[name].shape:
            wrong.append(f"{name} of the source is {shape(meta)}, not {list(weights[name].shape)}.")
        made[name] = replace(weights[name], dtype=meta.dtype)
    if wrong:
        raise Mismatch(wrong)
    return made


# Sources -------------------------------------------------------------------------------------------------------------------


class Rank:
    """What one rank holds, made of full weights when it is asked for. Raises Mismatch for a source of other weights."""

    def __init__(self, sharding: Sharding, source: Source, rank: int) -> None:
        self.sharding, self.source, self.rank = sharding, source, rank
        weights = known(sharding.weights, source)
        self.dtypes = {name: weight.dtype for name, weight in weights.items()}
        self.kept: tuple[str, list[Tensor]] = (
            "",
            [],
        )  # the last weight's tensors: of one stack there are often several

    def names(self) -> list[str]:
        return list(self.sharding.ranks[self.rank])

    def meta(self, name: str) -> Tensor:
        return self.sharding.ranks[self.rank][name].to(self.dtypes[self.sharding.origin[self.rank][name][0]])

    def get(self, name: str) -> Tensor:
        whole, i = self.sharding.origin[self.rank][name]
        if self.kept[0] != whole:
            self.kept = (whole, self.sharding.moves[whole].step([self.source.get(whole)]))
        return self.kept[1][i]


class Whole:
    """Full weights, put together of what each rank holds when they are asked for; what several hold is compared.

    Raises Mismatch, before anything is read, for ranks that lack a tensor, have others, or of other shapes or dtypes.
    """

    def __init__(self, sharding: Sharding, sources: Sequence[Source]) -> None:
        self.sharding, self.sources = sharding, sources
        if len(sources) != sharding.sizes.count:
            raise Mismatch([f"There are {len(sources)} ranks, and the weights lie on {sharding.sizes.count}."])
        wrong = [line for rank, source in enumerate(sources) for line in unlike(sharding, rank, source)]
        self.metas = {}
        for name, move in sharding.moves.items() if not wrong else ():
            dtypes = {sources[rank].meta(local).dtype for rank, local in move.places}
            if len(dtypes) > 1:
                wrong.append(f"{name} has several dtypes: {', '.join(sorted(map(str, dtypes)))}.")
            self.metas[name] = sharding.weights[name].meta.to(dtypes.pop())
        if wrong:
            raise Mismatch(wrong)

    def names(self) -> list[str]:
        return list(self.metas)

    def meta(self, name: str) -> Tensor:
        return self.metas[name]

    def get(self, name: str) -> Tensor:
        move = self.sharding.moves[name]
        held = [self.sources[rank].get(local) for rank, local in move.places]
        return joined(move, held)


def joined(move: Move, held: Sequence[Tensor]) -> Tensor:
    """The full weight of what the ranks hold. Raises Mismatch where copies differ, and names the ranks."""
    try:
        (made,) = move.step.inverse(held)
    except ValueError as error:
        ranks = ", ".join(map(str, dict.fromkeys(rank for rank, _ in move.places)))
        raise Mismatch([f"{move.name}, which is on ranks {ranks}: {error}."]) from None
    return made


def unlike(sharding: Sharding, rank: int, source: Source) -> list[str]:
    """How a rank's tensors differ from those it should have, in sentences."""
    wanted, there = sharding.ranks[rank], set(source.names())
    wrong = [f"Rank {rank} has no {name}." for name in wanted if name not in there]
    wrong += [f"Rank {rank} has {name}, which should not be there." for name in sorted(there - wanted.keys())]
    for name, meta in wanted.items():
        if name in there and source.meta(name).shape != meta.shape:
            wrong.append(f"{name} of rank {rank} is {shape(source.meta(name))}, not {shape(meta)}.")
    return wrong


# Files ---------------------------------------------------------------------------------------------------------------------


def file_of(rank: int, count: int) -> str:
    return f"rank-{rank:05}-of-{count:05}.safetensors"


def write(source: Source, sharding: Sharding, folder: Path, told: Told | None = None) -> None:
    """Writes a new folder: a file for each rank, which says where it belongs, and the plan. All of it or nothing.

    Each full weight is read once; in memory there are one and its shards. Raises Mismatch for a source of other weights, ValueError
    where the folder is there already.
    """
    sharding = Sharding(known(sharding.weights, source), sharding.sizes, sharding.naming, sharding.apart)
    total = sum(_bytes(t) for held in sharding.ranks for t in held.values())
    done = 0
    with new_folder(folder) as made:
        ranks, digest = sharding.sizes.count, sharding.digest()
        sheets = [Sheet(made / file_of(rank, ranks), sharding, rank, digest) for rank in range(ranks)]
        for move in sharding.moves.values():
            done += put(move, source, sheets)
            if told is not None:
                told(move.name, done, total)
        (made / PLAN).write_text(json.dumps(sharding.tree(), indent=1) + "\n", encoding="utf-8")


def put(move: Move, source: Source, sheets: Sequence[Sheet]) -> int:
    """Writes one weight's tensors, of which nothing stays in memory. Returns their bytes."""
    made = move.step([source.get(move.name)])
    for (rank, local), tensor in zip(move.places, made, strict=True):
        sheets[rank].put(local, tensor)
    return sum(map(_bytes, made))


class Sheet:
    """A file of one rank, whose tensors are put in their places in any order."""

    def __init__(self, path: Path, sharding: Sharding, rank: int, plan: str) -> None:
        self.path = path
        place = {"rank": rank, **asdict(sharding.sizes.place(rank))}
        about = {"format": "pt", "plan": plan, **{name: str(number) for name, number in place.items()}}
        header: dict[str, Any] = {METADATA: about}
        self.starts, self.size = dict[str, int](), 0
        metas = sharding.ranks[rank]
        # Larger elements first: every tensor then begins where its elements may.
        for name in sorted(metas, key=lambda name: -metas[name].element_size()):
            begin, self.size = self.size, self.size + _bytes(metas[name])
            header[name] = {
                "dtype": NAMES[metas[name].dtype],
                "shape": shape(metas[name]),
                "data_offsets": [begin, self.size],
            }
            self.starts[name] = begin
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNED)
        self.begin = 8 + len(text)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(self.begin + self.size)

    def put(self, name: str, tensor: Tensor) -> None:
        values: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self.path.open("r+b") as file:
            file.seek(self.begin + self.starts[name])
            file.write(values)


def whole(folder: Path) -> Whole:
    """The full weights of a folder that `write` made. Raises ValueError where files are missing, damaged or of another plan."""
    try:
        tree = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no {PLAN} that says how weights lie on ranks: {error}.") from None
    sharding, sources = Sharding.read(tree), []
    digest = sharding.digest()
    for rank in range(sharding.sizes.count):
        path = folder / file_of(rank, sharding.sizes.count)
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
        sources.append(Folder(path))
        with safe_open(path, "pt") as opened:
            about = opened.metadata() or {}
        if about.get("rank") != str(rank) or about.get("plan") != digest:
            told = f"{path} is of rank {about.get('rank')} and of {'this' if about.get('plan') == digest else 'another'} plan"
            raise ValueError(f"{told}; the files of a folder are written together.")
    return Whole(sharding, sources)


def reshard(folder: Path, sizes: Sizes, target: Path, told: Told | None = None) -> None:
    """Divides what is in a folder anew, for other sizes. Raises Mismatch before anything is written where it cannot be."""
    source = whole(folder)
    old = source.sharding
    write(source, Sharding(old.weights, sizes, old.naming, old.apart), target, told)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
