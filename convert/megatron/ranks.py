"""What each rank of megatron-core holds, as folders `mp_rank_*` of safetensors: put together, and divided anew for other sizes.

Full weights have the names of core that one rank alone would have. Source: checkpoints of Megatron-LM; tensor-parallel layers of
megatron-core 0.16. The interleaved rows of `linear_qkv` are divided as they lie. Of `linear_fc1` each rank has a share of the gate
and a share of what is gated, so that the rows of all ranks one after another are not those of the whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from convert.files import Folder, Told, new_folder
from convert.kinds import Sizes, Weight
from convert.mapping import Mapped, Rules, Source, rule
from convert.megatron.names import EMBEDDING, OUTPUT
from convert.ranks import Move, Naming, Sharding, Sheet, Whole, put
from convert.steps import Cut
from core.layout import Layout

NAMING = Naming("decoder.layers", ("decoder.final_layernorm.**", "decoder.final_norm.**", OUTPUT), {EMBEDDING: OUTPUT})
FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
FILE = "model.safetensors"
EXPERT = re.compile(r"(.+\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)(.*)")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
COLUMN = re.compile(rf"{re.escape(EMBEDDING)}|{re.escape(OUTPUT)}|.+\.(linear_qkv|linear_fc1)\.(weight|bias)\d*")
ROW = re.compile(r".+\.(linear_proj|linear_fc2|out_proj)\.weight\d*")
HEADS = re.compile(r".+\.mixer\.(A_log|D|dt_bias|norm\.weight)")
MIXED = re.compile(r"(.+\.mixer\.)(in_proj\.weight|in_proj\.bias|conv1d\.weight|conv1d\.bias)")
REPLICATED = re.compile(
    r".+norm[._](weight|bias)|.+\.linear_(proj|fc2)\.bias\d*|.+\.out_proj\.bias|.+\.router\..+|.+\.gate_weight"
    r"|embedding\.position_embeddings\.weight|.+\.norm\.(weight|bias)"
)


def weights_of(metas: Mapping[str, Tensor], multiple: int | None = None) -> dict[str, Weight]:
    """How each full weight of core is divided, by its name. Raises ValueError for names that are not known.

    multiple: rows of the vocabulary are filled up to a multiple of it on each rank; None divides them as they are.
    """
    made, unknown = dict[str, Weight](), list[str]()
    for name, meta in metas.items():
        kind, layout = "replicated", None
        if (mixed := MIXED.fullmatch(name)) is not None:
            kind, layout = "column", _mixed(metas, mixed[1], mixed[2])
        elif HEADS.fullmatch(name):
            kind = "column"
        elif ROW.fullmatch(name):
            kind = "row"
        elif COLUMN.fullmatch(name):
            kind = "vocabulary" if multiple is not None and name in (EMBEDDING, OUTPUT) else "column"
            layout = _gated(metas, name) if "linear_fc1." in name else None
        elif not REPLICATED.fullmatch(name):
            unknown.append(name)
        made[name] = Weight(
            tuple(meta.shape), kind, meta.dtype, layout, expert=_expert(metas, name), multiple=multiple or 1
        )
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise ValueError(f"How megatron-core divides these is not known here: {', '.join(unknown[:8])}{more}.")
    return made


def _gated(metas: Mapping[str, Tensor], name: str) -> Layout | None:
    """Gate and up of a first linear map, where it has twice the rows that the second has columns."""
    second = metas.get(re.sub(r"linear_fc1\.(weight|bias)", "linear_fc2.weight", name))
    if second is None:
        return None
    rows, width, dim = metas[name].shape[0], second.shape[-1], -metas[name].dim()
    return Layout((("gate", width), ("up", width)), dim) if rows == 2 * width else None


def _mixed(metas: Mapping[str, Tensor], at: str, name: str) -> Layout:
    """The parts of a state space mixer's input, or of its convolution."""
    heads, inner = metas[f"{at}A_log"].shape[0], metas[f"{at}out_proj.weight"].shape[-1]
    shared = (metas[f"{at}in_proj.weight"].shape[0] - 2 * inner - heads) // 2
    parts = (("x", inner), ("B", shared), ("C", shared))
    if name.startswith("in_proj"):
        parts = (("z", inner), *parts, ("dt", heads))  # type: ignore[assignment]
    return Layout(parts, -metas[at + name].dim())


def _expert(metas: Mapping[str, Tensor], name: str) -> tuple[int, int] | None:
    found = EXPERT.fullmatch(name)
    if found is None:
        return None
    return int(found[2]), _count(metas, found)


def _count(names: Container[str], found: re.Match[str]) -> int:
    """How many experts have such a weight."""
    return next(i for i in itertools.count() if f"{found[1]}{i}{found[3]}" not in names)


class Divided(Sharding):
    """A plan with core's names: on each expert-parallel rank experts are counted from 0."""

    def move_of(self, name: str, weight: Weight) -> Move:
        move = super().move_of(name, weight)
        if weight.expert is None:
            return move
        number, count = weight.expert
        own = number % (count // self.sizes.expert)
        places = tuple((rank, EXPERT.sub(rf"\g<1>{own}\g<3>", local)) for rank, local in move.places)
        return replace(move, places=places)


def plan(metas: Mapping[str, Tensor], sizes: Sizes, multiple: int | None = None) -> Divided:
    """How full weights lie on ranks. Raises Mismatch and ValueError with everything that cannot be."""
    if sizes.within != sizes.tensor:
        raise ValueError(
            "Folders mp_rank_* have no place for experts that other ranks share than the rest (expert_tensor)."
        )
    return Divided(weights_of(metas, multiple), sizes, NAMING)


# Folders -------------------------------------------------------------------------------------------------------------------


def folder_of(sizes: Sizes, rank: int) -> str:
    place = sizes.place(rank)
    stage = f"_{place.pipeline:03}" if sizes.pipeline > 1 else ""
    return f"mp_rank_{place.tensor:02}{stage}" + (f"_{place.expert:03}" if sizes.expert > 1 else "")


def read(folder: Path) -> Whole:
    """The full weights of a folder with mp_rank_*/model.safetensors. Raises ValueError where ranks are missing or do not fit."""
    places = {found: path for path in sorted(folder.iterdir()) if (found := _place(path.name)) is not None}
    if not places:
        raise ValueError(f"{folder} has no folders mp_rank_*.")
    sources = {place: _Weights(Folder(path)) for place, path in places.items()}
    several = max(len(place) for place in places)
    if several == 2 and all(EMBEDDING in source.names() for source in sources.values()):
        # Two numbers: without stages, each rank has an embedding, and the second number is the experts'.
        sources = {(tensor, 0, *rest): source for (tensor, *rest), source in sources.items()}
    full = {(*place, 0, 0)[:3]: source for place, source in sources.items()}
    tensor, pipeline, expert = (max(place[i] for place in full) + 1 for i in range(3))
    lacking = [
        (t, p, e) for p in range(pipeline) for e in range(expert) for t in range(tensor) if (t, p, e) not in full
    ]
    if lacking:
        raise ValueError(f"{folder} lacks the ranks (tensor, pipeline, expert) {', '.join(map(str, lacking[:8]))}.")
    stages = [full[0, p, 0].layers() for p in range(pipeline)]
    sizes = Sizes(tensor, pipeline, expert, layers=tuple(stages) if pipeline > 1 else ())
    metas: dict[str, Tensor] = {}
    for (t, p, e), source in sorted(full.items(), key=lambda each: (each[0][1], each[0][2])):
        if t == 0:
            metas |= _whole(source, sum(stages[:p]), e, sizes)
    order = [sizes.place(rank) for rank in range(sizes.count)]
    return Whole(plan(metas, sizes), [full[at.tensor, at.pipeline, at.expert] for at in order])


def _place(name: str) -> tuple[int, ...] | None:
    found = FOLDER.fullmatch(name)
    return None if found is None else tuple(int(number) for number in found.groups() if number is not None)


class _Weights:
    """The weights of one rank's files, without what else core keeps in them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.own = [n for n in source.names() if not n.endswith("._extra_state")]

    def names(self) -> list[str]:
        return self.own

    def meta(self, name: str) -> Tensor:
        return self.source.meta(name)

    def get(self, name: str) -> Tensor:
        return self.source.get(name)

    def layers(self) -> int:
        return max((int(found[1]) + 1 for name in self.own if (found := LAYER.fullmatch(name))), default=0)


def _whole(source: _Weights, first: int, expert: int, sizes: Sizes) -> dict[str, Tensor]:
    """The full weights that a rank has a share of, without memory: their names, and their shapes."""
    names, made = set(source.names()), dict[str, Tensor]()
    for name in source.names():
        size, dim = list(source.meta(name).shape), None
        if COLUMN.fullmatch(name) or MIXED.fullmatch(name) or HEADS.fullmatch(name):
            dim = 0
        elif ROW.fullmatch(name):
            dim = -1
        if dim is not None:
            size[dim] *= sizes.tensor
        whole = name
        if (layer := LAYER.fullmatch(name)) is not None:
            whole = f"decoder.layers.{int(layer[1]) + first}.{layer[2]}"
        if (found := EXPERT.fullmatch(whole)) is not None:
            local = EXPERT.fullmatch(name)
            assert local is not None
            whole = f"{found[1]}{int(found[2]) + expert * _count(names, local)}{found[3]}"
        made[whole] = torch.empty(size, dtype=source.meta(name).dtype, device="meta")
    return made


def write(source: Source, sizes: Sizes, folder: Path, multiple: int | None = None, told: Told | None = None) -> None:
    """Writes full weights into a new folder mp_rank_*/model.safetensors for each rank; each weight is read once.

    multiple: rows of the vocabulary are filled up to a multiple of it on each rank (make_vocab_size_divisible_by). Raises Mismatch
    and ValueError, before anything is written, where the sizes do not divide the weights.
    """
    sharding = plan({name: source.meta(name) for name in source.names()}, sizes, multiple)
    total = sum(t.numel() * t.element_size() for held in sharding.ranks for t in held.values())
    done = 0
    with new_folder(folder) as made:
        sheets, digest = [], sharding.digest()
        for rank in range(sizes.count):
            path = made / folder_of(sizes, rank)
            path.mkdir()
            sheets.append(Sheet(path / FILE, sharding, rank, digest))
        for move in sharding.moves.values():
            done += put(move, source, sheets)
            if told is not None:
                told(move.name, done, total)


def reshard(
    folder: Path,
    sizes: Sizes,
    target: Path,
    vocabulary: int | None = None,
    multiple: int = 128,
    told: Told | None = None,
) -> None:
    """Divides the weights of a folder anew, one full weight at a time.

    vocabulary: the number of tokens; the rows that fill it up are then cut off, and others added as the new sizes want it. Without
    it the rows are divided as they are. Raises Mismatch and ValueError before anything is written where they cannot be.
    """
    whole = read(folder)
    rules = [
        rule("decoder.**", "decoder.**"),
        *(rule(p, p, optional=True) for p in ("embedding.position_embeddings.**",)),
    ]
    dropped: tuple[str, ...] = ()
    if whole.sharding.sizes.pipeline > 1 and sizes.pipeline == 1 and _tied(whole):
        dropped = (OUTPUT,)  # the last stage's copy of the embedding, which a single stage does not have
    for name in (name for name in (EMBEDDING, OUTPUT) if name in whole.names() and name not in dropped):
        rows = whole.meta(name).shape[0]
        steps = [Cut(-2, vocabulary, rows)] if vocabulary is not None and rows > vocabulary else []
        rules.append(rule(name, name, *steps))
    source = Mapped(whole, Rules(tuple(rules), dropped))
    write(source, sizes, target, multiple if vocabulary is not None else None, told)


def _tied(source: Source) -> bool:
    if OUTPUT not in source.names():
        return False
    return torch.equal(source.get(EMBEDDING), source.get(OUTPUT))
