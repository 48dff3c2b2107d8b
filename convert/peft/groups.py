"""Pieces that were read, as adapters that our rules can ask for: each of one weight, of some of its parts and experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convert.peft.pieces import Piece, Scale, blocks, joined
from core.layout import Layout

CLOSE = 1e-6  # of norms, relative: those of another program
Norms = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """A linear map of ours: its path, the layout of its weight, the number of its first row, its rows, and its experts or 0."""

    path: str
    layout: Layout
    first: int
    rows: int
    experts: int

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.layout.parts)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(str(e) for e in range(self.experts))

    def part_of(self) -> Tensor:
        """The index of each row's part."""
        made = torch.zeros(self.rows, dtype=torch.long)
        for index, name in enumerate(self.parts):
            for a, b in self.layout.ranges(name):
                made[a:b] = index
        return made

    def ranges(self, parts: Sequence[str]) -> tuple[tuple[int, int], ...]:
        return tuple(self.layout.ranges(*parts)) if self.parts else ((0, self.rows),)


@dataclass(frozen=True)
class Group:
    """An adapter of ours to be: of a linear map, some of its parts and some of its experts, with the pieces of these."""

    linear: Linear
    parts: tuple[str, ...]
    experts: tuple[str, ...]
    scale: Scale
    pieces: tuple[Piece, ...]

    @property
    def dora(self) -> bool:
        return self.pieces[0].magnitudes is not None

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return self.linear.ranges(self.parts)


def grouped(linear: Linear, pieces: Iterable[Piece], norms: Norms) -> list[Group]:
    """The adapters that pieces of rows of one linear map are. norms: of rows, by their numbers; for DoRA alone."""
    by_expert: dict[int, list[Piece]] = {}
    for piece in pieces:
        expert = (piece.rows - linear.first) // linear.rows
        for e in expert.unique().tolist():
            by_expert.setdefault(e, []).append(piece.of_rows((expert == e).nonzero()[:, 0]))
    alike: dict[tuple[tuple[str, ...], Scale], dict[str, Piece]] = {}
    for e, some in sorted(by_expert.items()):
        first = linear.first + e * linear.rows
        for parts, piece in _of_matrix(some, linear.part_of(), first, norms):
            names = tuple(linear.parts[i] for i in parts) if linear.parts else ()
            alike.setdefault((names, piece.scale), {})[str(e)] = piece
    return [
        Group(linear, parts, tuple(made) if linear.experts else (), scale, tuple(made.values()))
        for (parts, scale), made in alike.items()
    ]


def _of_matrix(
    pieces: Sequence[Piece], part_of: Tensor, first: int, norms: Norms
) -> Iterator[tuple[tuple[int, ...], Piece]]:
    """The adapters of one matrix: their parts, all rows of these in their order."""
    apart = [made for piece in pieces for made in _apart(piece, part_of[piece.rows - first], norms)]
    merged: list[Piece] = []
    for piece in apart:
        i = next((i for i, x in enumerate(merged) if x.scale == piece.scale and torch.equal(x.a, piece.a)), None)
        if i is None:
            merged.append(piece)
        else:
            merged[i] = _beside(merged[i], piece)
    sets = [({*part_of[piece.rows - first].tolist()}, [piece]) for piece in merged]
    while overlap := next(((x, y) for i, x in enumerate(sets) for y in sets[i + 1 :] if x[0] & y[0]), None):
        x, y = overlap
        sets = [(x[0] | y[0], x[1] + y[1]) if z is x else z for z in sets if z is not y]
    for parts, some in sets:
        rows = torch.isin(part_of, torch.tensor(sorted(parts))).nonzero()[:, 0] + first
        yield tuple(sorted(parts)), _whole(some, rows, norms)


def _apart(piece: Piece, parts: Tensor, norms: Norms) -> list[Piece]:
    """`blocks`, unless a part to which nothing is added has magnitudes that are not the norms it had."""
    if piece.magnitudes is None:
        return blocks(piece, parts)
    made = blocks(piece, parts)
    left = ~torch.isin(piece.rows, torch.cat([x.rows for x in made]))
    if left.any() and not torch.allclose(
        piece.magnitudes[left], norms(piece.rows[left]).to(piece.a.dtype), rtol=CLOSE, atol=0.0
    ):
        return [piece]
    return made


def _beside(one: Piece, other: Piece) -> Piece:
    """Two pieces with the same A as one."""
    m = None if one.magnitudes is None or other.magnitudes is None else torch.cat((one.magnitudes, other.magnitudes))
    return replace(one, b=torch.cat((one.b, other.b)), rows=torch.cat((one.rows, other.rows)), magnitudes=m)


def _whole(pieces: Sequence[Piece], rows: Tensor, norms: Norms) -> Piece:
    """Pieces as one for all these rows."""
    magnitudes = None
    if pieces[0].magnitudes is not None:
        magnitudes = norms(rows).to(pieces[0].a.dtype)
        for piece in pieces:
            assert piece.magnitudes is not None
            magnitudes[torch.searchsorted(rows, piece.rows)] = piece.magnitudes
    if len(pieces) == 1 and len(pieces[0].rows) == len(rows):
        order = pieces[0].rows.argsort()
        return replace(pieces[0].of_rows(order), magnitudes=magnitudes)
    return replace(joined(pieces, rows, pieces[0].scale.rslora), magnitudes=magnitudes)


# The rules that ask for them -----------------------------------------------------------------------------------------------


def rules_for(groups: Sequence[Group], linears: Iterable[Linear], dropout: float) -> dict[str, dict[str, Any]]:
    """Entries of `slices`: adapters with the same options share one, and layers that are alike one pattern."""
    by_rule: dict[Any, list[Group]] = {}
    for group in groups:
        lora = (("variant", "dora" if group.dora else "lora"), ("rank", group.scale.rank), ("alpha", group.scale.alpha))
        options = (*lora, ("rslora", group.scale.rslora), ("dropout", dropout))
        by_rule.setdefault((options, _except(group)), []).append(group)
    known = [linear.path for linear in linears]
    made: dict[str, dict[str, Any]] = {}
    for (options, excepted), some in by_rule.items():
        labels: dict[str, list[str]] = {}
        for group in some:
            labels.setdefault(group.linear.path, []).extend(_bracket(group))
        texts = {path: f"{path}[{','.join(inside)}]" if inside else path for path, inside in labels.items()}
        match = _layers(texts, known)
        rule: dict[str, Any] = {
            "match": match[0] if len(match) == 1 else match,
            "lora": {k: v for k, v in options if v},
        }
        if excepted:
            rule["except"] = [e for path in labels for e in (f"{path}[{x}]" for x in excepted)]
            rule["except"] = _layers(
                {e: e for e in rule["except"]}, [f"{path}[{x}]" for path in known for x in excepted]
            )
        made[f"adapter{f'_{len(made) + 1}' if made else ''}"] = rule
    return made


def _except(group: Group) -> tuple[str, ...]:
    """What an adapter of several parts leaves out: it is one for them all, which a bracket would not say."""
    if len(group.parts) < 2:
        return ()
    parts = [name for name in group.linear.parts if name not in group.parts]
    return (*parts, *(e for e in group.linear.labels if e not in group.experts))


def _bracket(group: Group) -> list[str]:
    every = group.experts == group.linear.labels
    if len(group.parts) > 1 or (every and not group.parts):
        return []
    part = group.parts[0] if group.parts and len(group.linear.parts) > 1 else ""
    if every:
        return [part] if part else []
    return [f"{e}.{part}" if part else e for e in group.experts]


def _layers(texts: Mapping[str, str], known: Sequence[str]) -> list[str]:
    """Texts about paths, with `*` for the number of a layer where all layers have the same."""
    alike: dict[str, list[str]] = {}
    for path, text in texts.items():
        alike.setdefault(_star(text), []).append(path)
    made: list[str] = []
    for star, paths in alike.items():
        every = [path for path in known if _star(path) == _star(paths[0])]
        made += [star] if len(every) == len(paths) else [texts[path] for path in paths]
    return made


def _star(text: str) -> str:
    return re.sub(r"^(\w+)\.\d+\.", r"\1.*.", text)
