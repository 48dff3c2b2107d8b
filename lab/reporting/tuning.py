"""Every variant at its own best value of the tuned keys, so that none loses by a learning rate that suits another.

Taking the best of many values is a choice made on the same seeds that are then compared: it flatters, and more so where
more values were tried. So the best value is shown beside how many were tried, and a best at the edge of what was tried is
said to be no best yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lab.reporting.cells import Board, Cell, ranked
from lab.reporting.numbers import brief, clean, last_words, short, told
from lab.stats import finite

TRIED = ("done", "diverged", "pruned")  # a run that failed or has not ended says nothing about its value


@dataclass(frozen=True)
class Tuned:
    """A variant: the cells that differ in tuned keys alone.

    `cell` is the best of them (None while none has finished) under the variant's name and compared with the other
    variants' best; `origin` is that cell's own name, `values` its tuned keys, `tried` how many values of them have a
    finished, diverged or pruned run. `warnings` say why the value may not be the best one.
    """

    name: str
    cell: Cell | None
    origin: str
    values: Mapping[str, Any]
    tried: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Tuning:
    """All variants, best first: `board` holds the best cell of each. `keys` are the tuned ones."""

    keys: tuple[str, ...]
    board: Board
    variants: tuple[Tuned, ...]

    @property
    def chosen(self) -> bool:
        """Whether some variant's best value was chosen among several on the very seeds that are compared."""
        return any(one.tried > 1 and one.cell is not None and not one.cell.fresh for one in self.variants)


def variant(cell: Cell, keys: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What a cell is but for the tuned keys."""
    return tuple((key, told(value)) for key, value in cell.changed.items() if key not in keys)


def tuning(board: Board, keys: Sequence[str]) -> Tuning:
    """The variants of a board. Its cells stand best first, so the first of a variant is its best."""
    groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in board.cells:
        groups.setdefault(variant(cell, keys), []).append(cell)
    names = _names(groups)
    bests = {}
    for ident, cells in groups.items():
        if cells[0].estimate:
            bare = replace(cells[0], difference=None, paired=None, corrected=None, adjusted=None, behind=None)
            bests[ident] = replace(bare, name=names[ident], baseline=any(c.baseline for c in cells), mark="unknown")
    compared = ranked(board.name, list(bests.values()), board.metric, board.mode)
    by_name = {cell.name: cell for cell in compared.cells}
    made = [_tuned(names[ident], by_name.get(names[ident]), cells, keys) for ident, cells in groups.items()]
    made.sort(key=lambda one: one.cell.rank or 0 if one.cell else len(made) + 1)
    return Tuning(tuple(keys), compared, tuple(made))


def _names(groups: Mapping[tuple[tuple[str, str], ...], list[Cell]]) -> dict[tuple[tuple[str, str], ...], str]:
    """Variants in words as cells are: the case, then each other key by its last word. Different ones never share a name."""
    words = last_words(list(dict.fromkeys(key for ident in groups for key, _ in ident)))
    made: dict[tuple[tuple[str, str], ...], str] = {}
    for ident, cells in groups.items():
        parts = [
            clean(value) if key == "case" else f"{words[key]}={brief(cells[0].changed[key])}" for key, value in ident
        ]
        name = ", ".join(parts) or "default"
        made[ident] = f"{name} ({len(made) + 1})" if name in made.values() else name
    return made


def _tuned(name: str, best: Cell | None, cells: Sequence[Cell], keys: Sequence[str]) -> Tuned:
    origin = cells[0]
    tried = [cell for cell in cells if any(run.status in TRIED for run in cell.runs)]
    values = {key: origin.changed[key] for key in keys if key in origin.changed}
    warnings: list[str] = []
    if best is not None:
        for key in keys:
            warnings += _edge(key, values.get(key), [cell.changed.get(key) for cell in tried])
        if any(cell.open for cell in cells):
            warnings.append("so far: not every value has finished")
    return Tuned(name, best, origin.name if best else "", values if best else {}, len(tried), tuple(warnings))


def _edge(key: str, value: Any, tried: Sequence[Any]) -> list[str]:
    """Why a value may not be the best of its key: it was the only one, or the smallest or largest number tried."""
    word = short(key.rsplit(".", 1)[-1], 40)
    if len({told(other) for other in tried}) < 2:
        return [f"only one value of {word} was tried"]
    numbers = [number for other in tried if (number := finite(other)) is not None]
    at = finite(value)
    if at is None or len(set(numbers)) < 2 or min(numbers) < at < max(numbers):
        return []
    side = "smallest" if at == min(numbers) else "largest"
    return [f"{word} {brief(value)} is the {side} tried, so the best may lie beyond it"]
