"""Layouts against positions that an oracle lists: random parts, groups, stacks and dimensions, and parts lying otherwise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import sentence
from reference_slices import flat_indices
from torch import Tensor

from core.addresses import Labels
from core.layout import Layout, Range, merged, relayout

RANDOM = settings(derandomize=True, deadline=None, max_examples=60)
Given = tuple[Layout, tuple[int, ...]]


@st.composite
def layouts(draw: st.DrawFn, parted: bool = False, deepest: int = -3) -> Given:
    """A random layout and a shape that it fits, sizes odd as often as even."""
    dim = draw(st.integers(deepest, -1))
    groups = draw(st.integers(1, 3))
    parts = tuple((f"p{i}", draw(st.integers(1, 5))) for i in range(draw(st.integers(int(parted), 3))))
    axes = draw(st.lists(st.integers(1, 3), max_size=2))
    stack = tuple(tuple(f"s{axis}_{i}" for i in range(size)) for axis, size in enumerate(axes))
    inner = draw(st.lists(st.integers(1, 3), min_size=-dim, max_size=max(-dim, 2)))
    if parts:
        inner[dim] = groups * sum(size for _, size in parts)
    return Layout(parts, dim, groups, stack), (*axes, *inner)


@st.composite
def regrouped(draw: st.DrawFn) -> tuple[Layout, Layout, tuple[int, ...]]:
    """Two layouts of the same parts: other groups, the parts and the labels of each stack axis in another order."""
    old, shape = draw(layouts(parted=True))
    groups = draw(
        st.sampled_from([n for n in (1, 2, 3, old.groups) if all(old.groups * s % n == 0 for _, s in old.parts)])
    )
    parts = [(name, old.groups * size // groups) for name, size in draw(st.permutations(old.parts))]
    stack = tuple(tuple(draw(st.permutations(axis))) for axis in old.stack)
    return old, Layout(tuple(parts), old.dim, groups, stack), shape


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Every element is its own position in memory."""
    return torch.arange(math.prod(shape)).view(shape)


def oracle(layout: Layout, shape: tuple[int, ...]) -> dict[Labels, list[int]]:
    return flat_indices(shape, layout.parts, layout.dim, layout.groups, layout.stack)


def rows_of(ranges: list[Range]) -> list[int]:
    return [row for begin, end in ranges for row in range(begin, end)]


# Splitting and joining --------------------------------------------------------------------------------------------------------


@RANDOM
@given(layouts())
def test_each_slice_holds_the_positions_that_the_oracle_lists(case: Given) -> None:
    layout, shape = case
    found = {labels: part.flatten().tolist() for labels, part in layout.split(numbered(shape)).items()}
    assert found == oracle(layout, shape) and list(found) == layout.labels()
    assert sorted(itertools.chain(*found.values())) == list(range(math.prod(shape))), "each is in exactly one"
    assert all(math.prod(layout.shape(shape, labels)) == len(positions) for labels, positions in found.items())


@RANDOM
@given(layouts(), st.booleans())
def test_what_is_split_and_joined_is_as_before(case: Given, strided: bool) -> None:
    """Also where the tensor does not lie in its own order in memory."""
    layout, shape = case
    whole = numbered(shape[::-1]).permute(*reversed(range(len(shape)))) if strided else numbered(shape)
    parts = layout.split(whole)
    assert torch.equal(layout.join(parts), whole)
    assert torch.equal(layout.join(dict(reversed(parts.items()))), whole), "in whatever order the slices come"
    for labels in layout.labels():
        assert torch.equal(layout.view(whole, labels).reshape(layout.shape(shape, labels)), parts[labels])


@RANDOM
@given(layouts())
def test_a_view_writes_its_own_positions(case: Given) -> None:
    layout, shape = case
    for labels, positions in oracle(layout, shape).items():
        whole = torch.zeros(shape)
        layout.view(whole, labels).fill_(1.0)
        assert whole.flatten().nonzero().flatten().tolist() == sorted(positions)


@RANDOM
@given(layouts(parted=True), st.integers(0, 2))
def test_a_bias_lies_as_the_rows_of_its_weight(case: Given, columns: int) -> None:
    """A vector along dimension -1 and the matrix of the same parts along -2 are split alike, row by row."""
    layout, _ = case
    layout = replace(layout, stack=(), dim=-1)
    rows = layout.groups * layout.span
    bias = layout.split(torch.arange(rows))
    weight = replace(layout, dim=-2).split(torch.arange(rows).unsqueeze(1).expand(rows, 1 + columns))
    assert {labels: part.tolist() for labels, part in bias.items()} == oracle(layout, (rows,))
    assert all(
        torch.equal(weight[labels], part.unsqueeze(1).expand_as(weight[labels])) for labels, part in bias.items()
    )


# Ranges and runs --------------------------------------------------------------------------------------------------------------


@RANDOM
@given(layouts(parted=True), st.data())
def test_ranges_are_the_rows_of_all_named_parts_with_neighbours_merged(case: Given, data: st.DataObject) -> None:
    layout, shape = case
    names = data.draw(st.lists(st.sampled_from([name for name, _ in layout.parts]), unique=True))
    rows = flat_indices((shape[layout.dim],), layout.parts, -1, layout.groups)
    ranges = layout.ranges(*names)
    assert rows_of(ranges) == sorted(itertools.chain(*(rows[name,] for name in names))), "in order, each once"
    assert all(a < b for a, b in ranges) and all(b < c for (_, b), (c, _) in itertools.pairwise(ranges))
    assert layout.ranges(*reversed(names)) == ranges
    assert layout.ranges(*(name for name, _ in layout.parts)) == [(0, shape[layout.dim])], "all parts are one range"


def test_ranges_by_hand() -> None:
    layout = Layout((("q", 2), ("k", 1), ("v", 3)), dim=-2, groups=2)
    assert layout.ranges("q", "k") == [(0, 3), (6, 9)]
    assert layout.ranges("q", "v") == [(0, 2), (3, 8), (9, 12)], "v of one group touches q of the next"
    assert layout.ranges() == []
    with pytest.raises(KeyError, match="x"):
        layout.ranges("q", "x")


@RANDOM
@given(st.sets(st.integers(0, 30)), st.randoms())
def test_merged_ranges_hold_the_same_rows_in_fewest_pieces(rows: set[int], random: Any) -> None:
    pieces = [(row, row + 1) for row in rows]
    random.shuffle(pieces)
    made = merged(pieces)
    assert rows_of(made) == sorted(rows)
    assert len(made) == sum(row - 1 not in rows for row in rows), "one for each row without a neighbour before it"


@RANDOM
@given(layouts())
def test_runs_are_a_slices_positions_in_memory(case: Given) -> None:
    """Or None, where the parts do not lie along the first dimension after the stack axes."""
    layout, shape = case
    rowwise = not layout.parts or len(shape) + layout.dim == len(layout.stack)
    for labels, positions in oracle(layout, shape).items():
        runs = layout.runs(shape, labels)
        assert (runs is not None) == rowwise
        if runs is not None:
            taken = torch.cat([numbered(shape).flatten()[a:b] for a, b in runs])
            assert taken.tolist() == positions, "in the slice's own order"
            assert all(b < c for (_, b), (c, _) in itertools.pairwise(runs))


# The same parts lying otherwise -----------------------------------------------------------------------------------------------


@RANDOM
@given(regrouped())
def test_relayout_moves_every_element_to_where_the_other_layout_has_it(
    case: tuple[Layout, Layout, tuple[int, ...]],
) -> None:
    old, new, shape = case
    moved = relayout(numbered(shape), old, new)
    assert moved.shape == shape
    before, after = oracle(old, shape), oracle(new, shape)
    assert {labels: moved.flatten()[at].tolist() for labels, at in after.items()} == before
    assert torch.equal(relayout(moved, new, old), numbered(shape)), "there and back"


def test_relayout_of_heads_by_hand() -> None:
    """Two heads of [q q k v] each, to all q, all k, all v."""
    heads = Layout((("q", 2), ("k", 1), ("v", 1)), groups=2)
    plain = Layout((("v", 2), ("q", 4), ("k", 2)))
    assert relayout(torch.arange(8), heads, plain).tolist() == [3, 7, 0, 1, 4, 5, 2, 6]
    assert relayout(torch.tensor([3, 7, 0, 1, 4, 5, 2, 6]), plain, heads).tolist() == list(range(8))


# Mistakes ---------------------------------------------------------------------------------------------------------------------

QKV = Layout((("q", 4), ("k", 2), ("v", 2)), dim=-2)


@pytest.mark.parametrize(
    ("layout", "rows", "words"),
    [
        (QKV, 7, "part 'v' would end at row 8"),
        (QKV, 5, "part 'k' would end at row 6"),
        (QKV, 1, "part 'q' would end at row 4"),
        (QKV, 11, "rows 8 to 11 after part 'v' belong to none"),
        (replace(QKV, groups=2), 14, "part 'v' of group 1 would end at row 16"),
        (replace(QKV, groups=2), 9, "part 'q' of group 1 would end at row 12"),
        (replace(QKV, groups=2), 8, "part 'q' of group 1 would end at row 12"),
        (replace(QKV, groups=3), 6, "part 'v' of group 0 would end at row 8"),
        (replace(QKV, groups=2), 24, "rows 16 to 24 after part 'v' belong to none"),
    ],
)
def test_parts_that_do_not_add_up_are_named_with_the_row(layout: Layout, rows: int, words: str) -> None:
    told = sentence(lambda: layout.check((rows, 3)))
    assert words in told and f"q 4 + k 2 + v 2) x {layout.groups} do not add up to {rows}" in told


@RANDOM
@given(layouts(parted=True), st.integers(1, 20))
def test_only_the_shape_that_the_parts_fill_is_taken(case: Given, rows: int) -> None:
    layout, shape = case
    other = list(shape)
    other[layout.dim] = rows
    layout.check(shape)
    if rows != shape[layout.dim]:
        told = sentence(lambda: layout.check(other))
        short = rows < shape[layout.dim]
        assert ("would end at row" in told) == short and ("belong to none" in told) != short


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: Layout((("a", 1),), stack=(("b", "c"), ("d", "b"))), "the name 'b' stands twice in one layout"),
        (lambda: Layout((("a", 1), ("b", 1)), stack=(("b", "c"),)), "the name 'b' stands twice in one layout"),
        (lambda: Layout((("a", 1),), dim=1), "counts dimensions from the right"),
        (lambda: Layout(dim=0), "counts dimensions from the right"),
        (lambda: Layout(groups=-1), "at least one group"),
        (lambda: QKV.check((8,)), "dimension -2 do not fit the shape (8,)"),
        (lambda: Layout(dim=-1, stack=(("a", "b"),)).check((2,)), "stack axes (2,) and dimension -1 do not fit"),
        (lambda: QKV.join({("q",): torch.zeros(4, 1), ("k",): torch.zeros(2, 1)}), "are not the slices of this layout"),
        (
            lambda: relayout(torch.zeros(8, 1), QKV, Layout((("q", 8),), -2)),
            "['k', 'q', 'v'] along dimension -2, ['q']",
        ),
        (lambda: relayout(torch.zeros(8, 8), QKV, replace(QKV, dim=-1)), "layouts of other parts"),
        (
            lambda: relayout(torch.zeros(8, 1), QKV, Layout((("q", 2), ("k", 2), ("v", 4)), -2)),
            "part 'q' has 4 rows in one layout and 2 in the other",
        ),
        (lambda: relayout(torch.zeros(8, 1), QKV, replace(QKV, groups=2)), "part 'q' has 4 rows in one layout and 8"),
        (lambda: relayout(torch.zeros(7, 1), QKV, QKV), "part 'v' would end at row 8"),
        (
            lambda: relayout(torch.zeros(1, 2), Layout(stack=(("a",),)), Layout(stack=(("b",),))),
            "two layouts of other parts: ['a'] along dimension -1, ['b']",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused_in_a_sentence(act: Any, words: str) -> None:
    assert words in sentence(act)
