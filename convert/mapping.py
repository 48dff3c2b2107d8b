"""Which weights of one model are which of another, and what is done to them on the way: rules, planned before anything is read.

A rule names weights of the source and of the target by patterns: `*` stands for something inside one dotted segment, `**` for one
or more segments. The first wildcard of one pattern is the first of every other, whatever kind each is. `Mapped` is a source
itself, so mappings are composed by mapping what is mapped, and tensors are made one at a time, when they are asked for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from convert.steps import Chain, Step, Unfit, shape

WILDCARD = re.compile(r"\*\*|\*")
LISTED = 8  # names in one message


class Source(Protocol):
    """Named tensors: known by `meta`, which has shape and dtype alone, and read when they are asked for."""

    def names(self) -> list[str]: ...

    def meta(self, name: str) -> Tensor: ...

    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Tensors:
    """A source that is in memory."""

    tensors: Mapping[str, Tensor]

    def names(self) -> list[str]:
        return list(self.tensors)

    def meta(self, name: str) -> Tensor:
        return self.tensors[name].detach().to("meta")

    def get(self, name: str) -> Tensor:
        return self.tensors[name].detach()


class Mismatch(ValueError):
    """A mapping does not fit. `mistakes` are all of them, as sentences."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = list(mistakes)


# Patterns ------------------------------------------------------------------------------------------------------------------


def matches(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the wildcards of a pattern stand for in a name, or None where it is another name."""
    found = _compiled(pattern).fullmatch(name)
    return None if found is None else found.groups()


@functools.cache  # every name is held against every rule, and there may be many thousand experts
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = WILDCARD.split(pattern)
    kinds = [r"([^.]*)" if found == "*" else r"(.+)" for found in WILDCARD.findall(pattern)]
    text = "".join(re.escape(piece) + kind for piece, kind in zip(pieces, [*kinds, ""], strict=True))
    return re.compile(text, re.DOTALL)


def filled(pattern: str, words: Sequence[str]) -> str:
    """The name that a pattern stands for with these words for its wildcards. Raises ValueError where a `*` would be several
    segments."""
    rest = iter(words)

    def put(found: re.Match[str]) -> str:
        word = next(rest)
        if found[0] == "*" and "." in word:
            raise ValueError(f"'{word}' is several segments, and the '*' of '{pattern}' stands for one")
        return word

    return WILDCARD.sub(put, pattern)


@dataclass(frozen=True)
class Rule:
    """Weights of the source into weights of the target, for each thing that the wildcards may stand for.

    optional: whether there may be none. Raises ValueError where patterns have not equally many wildcards.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    step: Step = Chain()
    optional: bool = False

    def __post_init__(self) -> None:
        counts = {pattern: len(WILDCARD.findall(pattern)) for pattern in (*self.source, *self.target)}
        if not self.source or not self.target:
            raise ValueError(f"a rule has weights on both sides: {self.source} and {self.target}")
        first, many = next(iter(counts.items()))
        for pattern, count in counts.items():
            if count != many:
                raise ValueError(f"'{pattern}' has {count} wildcards and '{first}' has {many}; they must agree")

    @property
    def inverse(self) -> Rule:
        return Rule(self.target, self.source, self.step.inverse, self.optional)


def rule(source: str | Iterable[str], target: str | Iterable[str], *steps: Step, optional: bool = False) -> Rule:
    """A rule in short."""
    sides = [(side,) if isinstance(side, str) else tuple(side) for side in (source, target)]
    return Rule(sides[0], sides[1], steps[0] if len(steps) == 1 else Chain(steps), optional)


@dataclass(frozen=True)
class Rules:
    """A mapping: its rules, and names on either side that it leaves out on purpose."""

    rules: tuple[Rule, ...]
    dropped: tuple[str, ...] = ()  # of the source
    missing: tuple[str, ...] = ()  # of the target

    @property
    def inverse(self) -> Rules:
        return Rules(tuple(rule.inverse for rule in self.rules), self.missing, self.dropped)


# Carried out ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """One use of a rule: the names of what it reads and of what it makes."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    step: Step


class Mapped:
    """A source through a mapping: the target's tensors, each made when it is asked for.

    wanted: the target's tensors, which are then all that there may be, and of these shapes. Raises Mismatch, with everything that
    is left over, missing, used twice, filled twice or of another shape; nothing has been read then.
    """

    def __init__(self, source: Source, rules: Rules, wanted: Mapping[str, Sequence[int]] | None = None) -> None:
        self.source, self.wrong = source, list[str]()
        self.moves: dict[str, Move] = {}  # by name of what is made
        self.metas: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}  # what was made together with what was asked for
        known = source.names()
        used: dict[str, Move] = {}
        for each in rules.rules:
            for move in self._moves(each, known):
                for name in move.source:
                    if name in used:
                        self.wrong.append(
                            f"{name} is used twice, for {_listed(used[name].target)} and {_listed(move.target)}."
                        )
                    used[name] = move
                self._plan(move)
        left = [n for n in known if n not in used and not any(matches(p, n) is not None for p in rules.dropped)]
        if left:
            self.wrong.append(f"Left over, as no rule takes them: {_listed(left)}.")
        if wanted is not None:
            self._compare(wanted, rules.missing)
        if self.wrong:
            raise Mismatch(self.wrong)

    def _moves(self, each: Rule, known: Sequence[str]) -> Iterator[Move]:
        there, count = set(known), 0
        for name in known:
            words = matches(each.source[0], name)
            if words is None:
                continue
            count += 1
            try:
                source, target = (tuple(filled(p, words) for p in side) for side in (each.source, each.target))
            except ValueError as error:
                self.wrong.append(f"{name}: {error}.")
                continue
            lacking = [other for other in source if other not in there]
            if lacking:
                self.wrong.append(f"{name} belongs together with {_listed(lacking)}, which there is not.")
            else:
                yield Move(source, target, each.step)
        if not count and not each.optional:
            self.wrong.append(f"There is no '{each.source[0]}' to make {_listed(each.target)} of.")

    def _plan(self, move: Move) -> None:
        """Carries a move out without memory."""
        try:
            made = move.step([self.source.meta(name) for name in move.source])
            if len(made) != len(move.target):
                raise Unfit(f"{len(made)} tensors are made, and {len(move.target)} are named")
        except Unfit as error:
            self.wrong.append(f"{_listed(move.source)} to {_listed(move.target)}: {error}.")
            made = []
        for name in move.target:
            if name in self.moves:
                self.wrong.append(
                    f"{name} is filled twice, from {_listed(self.moves[name].source)} and {_listed(move.source)}."
                )
            self.moves[name] = move
        self.metas |= dict(zip(move.target, made, strict=False))

    def _compare(self, wanted: Mapping[str, Sequence[int]], missing: Sequence[str]) -> None:
        lacking = [n for n in wanted if n not in self.moves and not any(matches(p, n) is not None for p in missing)]
        if lacking:
            self.wrong.append(f"Missing, as no rule fills them: {_listed(lacking)}.")
        more = [n for n in self.moves if n not in wanted]
        if more:
            self.wrong.append(f"Left over, as the target has no such weights: {_listed(more)}.")
        for name, meta in self.metas.items():
            if name in wanted and shape(meta) != list(wanted[name]):
                self.wrong.append(
                    f"{name} would be {shape(meta)}, made of {_listed(self.moves[name].source)}; it is {list(wanted[name])}."
                )

    def names(self) -> list[str]:
        return list(self.moves)

    def meta(self, name: str) -> Tensor:
        return self.metas[name]

    def get(self, name: str) -> Tensor:
        """What is made together with it is kept until it is asked for too, as views of the same memory where they can be."""
        if name in self.kept:
            return self.kept.pop(name)
        move = self.moves[name]
        try:
            made = move.step([self.source.get(each) for each in move.source])
        except Unfit as error:
            raise Mismatch([f"{_listed(move.source)} to {_listed(move.target)}: {error}."]) from None
        self.kept |= dict(zip(move.target, made, strict=True))
        return self.kept.pop(name)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"


@torch.no_grad()
def fill(own: Mapping[str, Tensor], source: Source) -> dict[str, int]:
    """Copies every tensor of a source into that of the same name. Returns how many changed their dtype, by 'from to into'.

    The source must not be made of the same memory. Raises Mismatch that lists what is missing, left over, or of another shape,
    before anything is changed.
    """
    same = Mapped(source, Rules((Rule(("**",), ("**",)),)), {name: t.shape for name, t in own.items()})
    told: dict[str, int] = {}
    done: set[str] = set()
    for name in same.names():  # in the source's order: what it makes together is asked for together
        if name in done:
            continue
        made = [name]
        if isinstance(source, Mapped) and _placed(source.moves[name], source.source, own):
            made = list(source.moves[name].target)
        else:
            own[name].copy_(same.get(name))
        done.update(made)
        for each in made:
            if (words := _cast(source.meta(each), own[each])) is not None:
                told[words] = told.get(words, 0) + 1
    return told


def _placed(move: Move, source: Source, own: Mapping[str, Tensor]) -> bool:
    """Copies what a move reads to where it belongs, and makes nothing between, where its step only moves values: undone on the
    target, it then gives views that have each value once. Returns whether it could."""
    target = [own[name] for name in move.target]
    try:
        views = move.step.inverse(target)
    except Unfit:
        return False
    memory = {t.untyped_storage().data_ptr() for t in target}
    if any(view.untyped_storage().data_ptr() not in memory for view in views):
        return False
    if sum(view.numel() for view in views) != sum(t.numel() for t in target) or len(views) != len(move.source):
        return False
    if len({view.data_ptr() for view in views}) != len(views):
        return False  # what is there twice begins twice at one place, however it is divided, and what is padded is not there
    if any(view.shape != source.meta(name).shape for view, name in zip(views, move.source, strict=True)):
        return False
    for view, name in zip(views, move.source, strict=True):
        view.copy_(source.get(name))
    return True


def _cast(made: Tensor, into: Tensor) -> str | None:
    """Of which dtype a tensor was and is, where it was another."""
    return f"{made.dtype} to {into.dtype}".replace("torch.", "") if made.dtype != into.dtype else None


@torch.no_grad()
def copies(source: Source) -> dict[str, Tensor]:
    """Every tensor of a source in memory of its own; what a source gives may be a view of a model's parameters."""
    return {name: source.get(name).clone(memory_format=torch.contiguous_format) for name in source.names()}
