"""Steps against positions that plain loops list: each of them, and every fused layout of the outside world."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convert.steps
from convert.steps import (
    TRANSPOSE,
    Add,
    Agree,
    Batched,
    Chain,
    Concatenate,
    Copies,
    Cut,
    Each,
    Join,
    Numbers,
    Pad,
    Parts,
    Permute,
    Relayout,
    Reshape,
    Split,
    Stack,
    Step,
    Sum,
    Transposed,
    Unfit,
    Unstack,
)
from core.layout import Layout
from variations.pkl import effective

RANDOM = settings(derandomize=True, deadline=None, max_examples=25)
ROUNDED = (Add, Numbers, Sum)  # steps that compute
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def by(shape: Sequence[int], element: Callable[..., Any]) -> Tensor:
    """A tensor, element by element."""
    return torch.tensor([element(*at) for at in itertools.product(*map(range, shape))]).reshape(tuple(shape))


def numbered(*shapes: Sequence[int], first: float = 0) -> list[Tensor]:
    """Tensors of these shapes, no number of which is twice in any."""
    made, start = [], first
    for shape in shapes:
        made.append(torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(tuple(shape)))
        start += math.prod(shape)
    return made


def alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """The same number of tensors, of the same shapes, dtypes and bits."""
    return len(ours) == len(theirs) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(BITS[a.element_size()]), b.contiguous().view(BITS[b.element_size()]))
        for a, b in zip(ours, theirs, strict=True)
    )


# Each step -------------------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """A step, what it is given, what a loop makes of that; and lists that it must not take, with words of what it says."""

    step: Step
    given: list[Tensor]
    made: list[Tensor]
    refused: list[tuple[list[Tensor], list[str]]] = field(default_factory=list)


def split_and_put_together() -> list[Example]:
    """Along the last but one dimension of a stack of experts, whose first dimension has as many; along the last of a bias."""
    (x,) = numbered((6, 6, 1))
    begins = (0, 1, 3)
    parts = [
        by((6, n, 1), lambda e, i, j, at=at: x[e, at + i, j].item()) for at, n in zip(begins, (1, 2, 3), strict=True)
    ]
    (bias,) = numbered((3,))
    sides = [by((n,), lambda i, at=at: bias[at + i].item()) for at, n in ((0, 1), (1, 2))]
    short = torch.zeros(6)
    return [
        Example(
            Split(-2, (1, 2, 3)),
            [x],
            parts,
            [
                ([torch.zeros(6, 7, 1)], ["[6, 7, 1]", "1 + 2 + 3 = 6", "dimension -2"]),
                ([short], ["[6]", "dimension -2"]),
                ([x, x], ["one tensor", "2"]),
            ],
        ),
        Example(
            Concatenate(-2, (1, 2, 3)),
            parts,
            [x],
            [
                (parts[:2], ["3 tensors", "there are 2"]),
                ([parts[0], parts[2], parts[1]], ["[6, 3, 1]", "[6, 2, 1]"]),
                ([parts[0], parts[1], torch.zeros(5, 3, 1)], ["[5, 3, 1]", "[6, 3, 1]"]),
                ([parts[0], parts[1], torch.zeros(3, 1)], ["[3, 1]", "[6, 3, 1]"]),
                ([short, short, short], ["[6]", "dimension -2"]),
                ([parts[0], parts[1], parts[2].double()], ["float32, float32, float64"]),
            ],
        ),
        Example(Split(-1, (1, 2)), [bias], sides, [([torch.tensor(1.0)], ["[]", "dimension -1"])]),
        Example(Concatenate(-1, (1, 2)), sides, [bias], [([torch.tensor(1.0), sides[1]], ["[]", "dimension -1"])]),
        Example(Split(-1, (3,)), [bias], [bias]),
    ]


def parts_and_joined() -> list[Example]:
    """Two groups of a part of one row and a part of two."""
    layout = Layout((("a", 1), ("b", 2)), -2, groups=2)
    (x,) = numbered((6, 2))
    a, b = by((2, 2), lambda i, j: x[3 * i, j].item()), by((4, 2), lambda i, j: x[3 * (i // 2) + 1 + i % 2, j].item())
    experts = Layout((("g", 1), ("u", 2)), -2, stack=(("0", "1"),))
    (y,) = numbered((2, 3, 1))
    four = [by((n, 1), lambda i, j, e=e, at=at: y[e, at + i, j].item()) for e in (0, 1) for at, n in ((0, 1), (1, 2))]
    plain = Layout((("b", 4), ("a", 2)), -2)
    turned = by((6, 2), lambda i, j: b[i, j].item() if i < 4 else a[i - 4, j].item())
    return [
        Example(
            Parts(layout),
            [x],
            [a, b],
            [([torch.zeros(7, 2)], ["[7, 2]", "a 1 + b 2", "x 2"]), ([x, x], ["one tensor"])],
        ),
        Example(
            Join(layout),
            [a, b],
            [x],
            [
                ([a], ["2 parts", "there are 1"]),
                ([a, a], ["[2, 2]", "[4, 2]"]),
                ([torch.zeros(2), torch.zeros(4)], ["[2]", "dimension -2"]),
                ([a, b.double()], ["float32, float64"]),
            ],
        ),
        Example(Parts(experts), [y], four, [([torch.zeros(3, 3, 1)], ["[3, 3, 1]", "(2,)"])]),
        Example(Join(experts), four, [y], [([*four[:2], torch.zeros(1, 2), four[3]], ["[1, 2]", "[1, 1]"])]),
        Example(
            Relayout(layout, plain),
            [x],
            [turned],
            [([torch.zeros(7, 2)], ["[7, 2]", "a 1 + b 2"]), ([x, x], ["one tensor"])],
        ),
    ]


def several() -> list[Example]:
    """Stacks, copies, other orders of the list."""
    three = numbered((1, 2), (1, 2), (1, 2))
    stacked = by((3, 1, 2), lambda e, i, j: three[e][i, j].item())
    six = numbered(*[(1,)] * 6)
    swapped = [six[i] for i in (0, 3, 1, 4, 2, 5)]
    other = three[0].clone()
    other[0, 1] += 1
    four = numbered((1,), (1,), (1,), (1,))
    return [
        Example(
            Stack(3),
            three,
            [stacked],
            [
                (three[:2], ["3 tensors", "there are 2"]),
                ([*three[:2], torch.zeros(2, 1)], ["[2, 1]", "[1, 2]"]),
                ([*three[:2], three[2].bfloat16()], ["bfloat16"]),
            ],
        ),
        Example(
            Unstack(3), [stacked], three, [([torch.zeros(2, 3)], ["[2, 3]", "3"]), ([torch.tensor(1.0)], ["[]", "3"])]
        ),
        Example(Unstack(1), [torch.ones(1, 1)], [torch.ones(1)]),
        Example(Copies(3), [three[0]], [three[0]] * 3, [(three, ["one tensor", "3"])]),
        Example(
            Agree(3),
            [three[0], three[0].clone(), three[0]],
            [three[0]],
            [
                ([three[0]] * 2, ["3 copies", "there are 2"]),
                ([three[0], three[0].T, three[0]], ["[2, 1]", "[1, 2]"]),
                ([three[0], three[0], other], ["copy 2", "1 of 2"]),
                ([three[0], three[0].double(), three[0]], ["float64"]),
            ],
        ),
        Example(Transposed(2, 3), six, swapped, [(six[:5], ["2 x 3", "there are 5"])]),
        Example(
            Batched(2, Stack(2)),
            four,
            [by((2, 1), lambda e, i, at=at: four[at + e][i].item()) for at in (0, 2)],
            [(four[:3], ["lists of 2", "3 tensors"])],
        ),
        Example(
            Batched(1, Split(-1, (1, 1)), 2),
            [torch.arange(2), torch.arange(2, 4)],
            [torch.tensor([i]) for i in range(4)],
        ),
        Example(Each(TRANSPOSE), [three[0], stacked[0].T], [by((2, 1), lambda i, j: three[0][j, i].item()), three[0]]),
        Example(Chain(), three, three),
        Example(
            Chain((Stack(3), Permute((1, 2, 0)), Reshape((1, 2, 3), (6,)))),
            three,
            [by((6,), lambda i: three[i % 3][0, i // 3].item())],
        ),
    ]


def alone() -> list[Example]:
    """Steps of one tensor. Axes in turn go another way than back: a swap would not show which way it is."""
    (x,) = numbered((2, 1, 3))
    (matrix,) = numbered((2, 3))
    return [
        Example(
            Permute((1, 2, 0)),
            [x],
            [by((1, 3, 2), lambda a, b, c: x[c, a, b].item())],
            [([matrix], ["[2, 3]", "(1, 2, 0)"]), ([x, x], ["one tensor"])],
        ),
        Example(Permute((3, 0, 2, 1)), [x[None]], [by((3, 1, 1, 2), lambda a, b, c, d: x[d, c, a].item())]),
        Example(TRANSPOSE, [matrix], [by((3, 2), lambda a, b: matrix[b, a].item())], [([x], ["[2, 1, 3]"])]),
        Example(
            Reshape((2, 1, 3), (3, 2, 1)),
            [x],
            [by((3, 2, 1), lambda a, b, c: float(2 * a + b))],
            [([matrix], ["[2, 3]", "[2, 1, 3]", "[3, 2, 1]"]), ([x, x], ["one tensor"])],
        ),
        Example(
            Pad(-2, 1, 3),
            [x + 1],
            [by((2, 3, 3), lambda a, b, c: x[a, 0, c].item() + 1 if b == 0 else 0.0)],
            [
                ([torch.zeros(2, 2, 3)], ["[2, 2, 3]", "dimension -2", "from 1 to 3"]),
                ([torch.zeros(1)], ["[1]", "dimension -2"]),
                ([x, x], ["one tensor"]),
            ],
        ),
        Example(
            Cut(-2, 1, 3),
            [torch.nn.functional.pad(x, (0, 0, 0, 2))],
            [x],
            [([x], ["[2, 1, 3]", "dimension -2", "3"]), ([torch.zeros(3)], ["[3]"]), ([x, x], ["one tensor"])],
        ),
        Example(Pad(-1, 3, 3), [x], [x]),
        Example(Add(1.0), [matrix], [by((2, 3), lambda a, b: 3.0 * a + b + 1)], [([x, x], ["one tensor"])]),
        Example(
            Numbers(0.5),
            [matrix],
            [by((2, 2, 3), lambda n, a, b: (3.0 * a + b) if n == 0 else 0.0)],
            [([x, x], ["one tensor"])],
        ),
        Example(
            Numbers(0.5, 0.25),  # a quarter of it is half of b, so b is half of it
            [matrix],
            [by((2, 2, 3), lambda n, a, b: (3.0 * a + b) * (0.75 if n == 0 else 0.5))],
        ),
        Example(
            Sum(0.5, 0.25),
            [by((2, 2, 3), lambda n, a, b: (3.0 * a + b) * (0.75 if n == 0 else 0.5))],
            [matrix],
            [([torch.zeros(3, 2)], ["[3, 2]", "[2, ...]"]), ([torch.tensor(1.0)], ["[]"]), ([x, x], ["one tensor"])],
        ),
    ]


EXAMPLES = [*split_and_put_together(), *parts_and_joined(), *several(), *alone()]
BOTH = [*EXAMPLES, *(Example(e.step.inverse, e.made, e.given) for e in EXAMPLES)]
every = pytest.mark.parametrize("example", BOTH, ids=lambda e: str(e.step))


def test_every_step_has_an_example_and_says_what_it_refuses() -> None:
    steps: set[Any] = {
        c
        for c in vars(convert.steps).values()
        if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == convert.steps.__name__
    }
    assert {type(e.step) for e in EXAMPLES} == steps
    assert {type(e.step) for e in EXAMPLES if e.refused} == steps - {Chain, Each}, "those take what theirs take"


@every
def test_a_step_makes_what_a_loop_makes_and_its_inverse_undoes_it(example: Example) -> None:
    """Bit for bit, from both ends; what it is given, it leaves."""
    before, versions = [t.clone() for t in example.given], [t._version for t in example.given]
    made = example.step(example.given)
    assert alike(made, example.made)
    assert alike(example.step.inverse(made), example.given)
    assert alike(example.given, before) and [t._version for t in example.given] == versions
    assert example.step.inverse.inverse == example.step


@every
def test_a_step_makes_the_same_of_tensors_that_lie_otherwise(example: Example) -> None:
    strided = [torch.empty(*t.shape, 2).select(-1, 1).to(t.dtype).copy_(t) if t.dim() else t for t in example.given]
    assert alike(example.step(strided), example.made)


@every
def test_shapes_and_dtypes_are_known_without_memory(example: Example) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = [t.to(dtype) for t in example.given]
        made, planned = example.step(given), example.step([t.to("meta") for t in given])
        assert all(t.is_meta for t in planned)
        assert [(t.shape, t.dtype) for t in planned] == [(t.shape, t.dtype) for t in made]
        assert {t.dtype for t in made} == {dtype}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool], ids=str)
def test_steps_that_move_keep_every_bit_of_every_dtype(example: Example, dtype: torch.dtype) -> None:
    """What is no number, and both zeros, included. `Cut` loses what it cuts off, which is given here as zero."""
    if isinstance(example.step, ROUNDED):
        return
    generator = torch.Generator().manual_seed(0)

    def drawn(t: Tensor) -> Tensor:
        noise = torch.randint(0, 256, (*t.shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        return (noise % 2 if dtype == torch.bool else noise).view(dtype).reshape(t.shape)

    given = [drawn(t) for t in example.given]
    given = given[:1] * len(given) if isinstance(example.step, Agree) else given
    given = example.step.inverse([drawn(t) for t in example.made]) if isinstance(example.step, Cut) else given
    if dtype == torch.float32 and not isinstance(example.step, Cut):
        given[0].reshape(-1)[0] = math.nan
    assert alike(example.step.inverse(example.step(given)), given)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.refused], ids=lambda e: str(e.step))
def test_what_a_step_is_not_for_is_refused_with_both_shapes_before_it_is_read(example: Example) -> None:
    for tensors, words in example.refused:
        with pytest.raises(Unfit) as caught:
            example.step(tensors)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        if not any(word.startswith("copy ") for word in words):  # which only values show
            with pytest.raises(Unfit):
                example.step([t.to("meta") for t in tensors])


@pytest.mark.parametrize(
    ("step", "shapes"),
    [
        (Split(0, (1, 2)), [(3,)]),  # from the left
        (Concatenate(0, (1, 2)), [(1,), (2,)]),
        (Pad(0, 1, 2), [(1,)]),
        (Pad(-1, 2, 1), [(2,)]),
        (Cut(0, 1, 2), [(2,)]),
        (Cut(-1, 2, 1), [(1,)]),
        (Permute((0, 0)), [(1, 2)]),
        (Permute((0, -1)), [(1, 2)]),
        (Reshape((2, 2), (-1,)), [(2, 2)]),
        (Reshape((2, 2), (-2, -2)), [(2, 2)]),
        (Reshape((2, 2), (3,)), [(2, 2)]),
        (Batched(1, Split(-1, (1, 1)), 3), [(2,), (2,)]),
        (Each(Split(-1, (1, 1))), [(2,)]),
        (Numbers(0.0, 0.5), [(2,)]),
        (Relayout(Layout((("a", 2),), -1), Layout((("b", 2),), -1)), [(2,)]),
        (Relayout(Layout((("a", 2), ("b", 2)), -1), Layout((("a", 1), ("b", 3)), -1)), [(4,)]),
        (Relayout(Layout((("a", 2),), -1), Layout((("a", 2),), -2)), [(2, 2)]),
    ],
    ids=str,
)
def test_steps_that_have_no_inverse_or_no_meaning_are_refused(step: Step, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(Unfit):
        step([torch.zeros(s) for s in shapes])


def test_constants_are_exact_up_to_one_rounding() -> None:
    """w and 1 + w have the same distance between neighbours where 1 + w is below 2, and there the way back is exact."""
    for dtype, digits in ((torch.float32, 23), (torch.bfloat16, 7)):
        gain = (1 + torch.arange(2**7, dtype=torch.float64) / 2**digits).to(dtype)
        assert alike(Add(1.0)(Add(-1.0)([gain])), [gain])
        small = torch.full((3,), 2.0 ** -(digits + 3), dtype=dtype)
        there_and_back = Add(-1.0)(Add(1.0)([small]))[0]
        assert (there_and_back - small).abs().max() <= 2.0 ** -(digits + 1) and there_and_back.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_sum_has_the_bits_of_the_model_and_a_division_is_undone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator).to(dtype)
    ours = Sum(0.3)([numbers])[0]
    assert alike([ours], [effective(numbers, torch.tensor(0.3))])
    digits = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7}[dtype]
    for share in (0.0, 0.5, 0.9):
        divided = Numbers(0.3, share)([ours])
        back = Sum(0.3, share)(divided)[0]
        # b is rounded once and is weighed with the same number both ways; a once, the sum once.
        assert (back - ours).abs().max() <= 2.0**-digits * ours.abs().max() * (share > 0)


# Fused layouts of the outside world: TARGETS row by row ------------------------------------------------------------------------
#
# Each function below lists, by loops alone, the rows of a fused weight as (name of what they come from, row of that).

Rows = list[tuple[str, int]]


def rows_one_after_another(sizes: dict[str, int]) -> Rows:
    return [(name, row) for name, size in sizes.items() for row in range(size)]


def rows_of_groups(heads: int, groups: int, size: int, gated: bool = False) -> Rows:
    """Megatron: of each group its queries' heads, their gates, its key, its value."""
    rows: Rows = []
    for group in range(groups):
        for name in ("q", "z") if gated else ("q",):
            for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
                for d in range(size):
                    rows.append((name, head * size + d))
        for name in ("k", "v"):
            for d in range(size):
                rows.append((name, group * size + d))
    return rows


def rows_of_heads(heads: int, size: int, names: Sequence[str]) -> Rows:
    """Of each head one name after another."""
    return [(name, head * size + d) for head in range(heads) for name in names for d in range(size)]


def rows_of_ranks(ranks: int, sizes: dict[str, int]) -> Rows:
    """What each rank holds of each part, in the order of ranks."""
    rows: Rows = []
    for rank in range(ranks):
        for name, size in sizes.items():
            share = size // ranks
            for row in range(share):
                rows.append((name, rank * share + row))
    return rows


def fused(rows: Rows, parts: dict[str, Tensor]) -> Tensor:
    """The rows along the last but one dimension, or the only one, element by element."""
    whole = [parts[name][row].tolist() for name, row in rows]
    return torch.tensor(whole)


def as_parts(sizes: dict[str, int], inner: tuple[int, ...]) -> dict[str, Tensor]:
    return dict(zip(sizes, numbered(*[(n, *inner) for n in sizes.values()]), strict=True))


def check(step: Step, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """Both ways, against what loops made."""
    assert alike(step(source), target), step
    assert alike(step.inverse(target), source), step


sizes = st.integers(1, 4)
inners = st.sampled_from([(), (1,), (3,)])  # a bias, and weights of so many inputs


@RANDOM
@given(sizes, sizes, sizes, inners, st.booleans())
def test_attention(groups: int, per_group: int, size: int, inner: tuple[int, ...], gated: bool) -> None:
    """Separate, one after another, and interleaved by group as Megatron has it, also with an output gate."""
    heads, dim = groups * per_group, -1 - len(inner)
    rows: dict[str, int] = {
        "q": heads * size,
        **({"z": heads * size} if gated else {}),
        "k": groups * size,
        "v": groups * size,
    }
    parts = as_parts(rows, inner)
    shares = {name: n // groups for name, n in rows.items()}
    plain, grouped = Layout(tuple(rows.items()), dim), Layout(tuple(shares.items()), dim, groups)
    whole = fused(rows_one_after_another(rows), parts)
    interleaved = fused(rows_of_groups(heads, groups, size, gated), parts)
    check(Join(plain), list(parts.values()), [whole])
    check(Concatenate(dim, tuple(rows.values())), list(parts.values()), [whole])
    check(Join(grouped), list(parts.values()), [interleaved])
    check(Relayout(plain, grouped), [whole], [interleaved])
    # GPT-2 has weights the other way round.
    if inner:
        theirs = by((*inner, len(whole)), lambda i, o: whole[o, i].item())
        check(Chain((TRANSPOSE, Relayout(plain, grouped))), [theirs], [interleaved])
    # Ours has the gate behind.
    ours: dict[str, int] = {name: rows[name] for name in ("q", "k", "v", "z") if name in rows}
    check(
        Relayout(grouped, Layout(tuple(ours.items()), dim)), [interleaved], [fused(rows_one_after_another(ours), parts)]
    )


@RANDOM
@given(sizes, sizes, inners)
def test_queries_and_gates_by_head(heads: int, size: int, inner: tuple[int, ...]) -> None:
    """As Hugging Face has them in one projection: of each head its query, then its gate."""
    rows = {"q": heads * size, "z": heads * size}
    parts, dim = as_parts(rows, inner), -1 - len(inner)
    by_head = Layout((("q", size), ("z", size)), dim, heads)
    check(Parts(by_head), [fused(rows_of_heads(heads, size, "qz"), parts)], list(parts.values()))


@RANDOM
@given(sizes, sizes, inners)
def test_keys_and_values(groups: int, size: int, inner: tuple[int, ...]) -> None:
    rows = {"k": groups * size, "v": groups * size}
    parts, dim = as_parts(rows, inner), -1 - len(inner)
    layouts = Layout(tuple(rows.items()), dim), Layout((("k", size), ("v", size)), dim, groups)
    check(
        Relayout(*layouts),
        [fused(rows_one_after_another(rows), parts)],
        [fused(rows_of_heads(groups, size, "kv"), parts)],
    )


@RANDOM
@given(sizes, sizes, st.integers(1, 3))
def test_vision(heads: int, size: int, inner: int) -> None:
    """[3, heads, size, in] into of each head its query, key and value; a pure order of axes says the same."""
    (theirs,) = numbered((3, heads, size, inner))
    ours = torch.tensor([theirs[n, h, d].tolist() for h in range(heads) for n in range(3) for d in range(size)])
    whole = (3 * heads * size, inner)
    names = "qkv"
    plain = Layout(tuple((n, heads * size) for n in names), -2)
    grouped = Layout(tuple((n, size) for n in names), -2, heads)
    check(Chain((Reshape((3, heads, size, inner), whole), Relayout(plain, grouped))), [theirs], [ours])
    check(Chain((Permute((1, 0, 2, 3)), Reshape((heads, 3, size, inner), whole))), [theirs], [ours])


@RANDOM
@given(st.sampled_from([1, 2, 4]), sizes, inners)
def test_gated_mlp(ranks: int, share: int, inner: tuple[int, ...]) -> None:
    """Whole, and as tensor-parallel ranks store it: their shards in a row are not [gate; up]."""
    rows, dim = {"gate": ranks * share, "up": ranks * share}, -1 - len(inner)
    parts = as_parts(rows, inner)
    plain = Layout(tuple(rows.items()), dim)
    stored = Layout((("gate", share), ("up", share)), dim, ranks)
    whole, row = fused(rows_one_after_another(rows), parts), fused(rows_of_ranks(ranks, rows), parts)
    shards = [row[2 * share * rank : 2 * share * (rank + 1)] for rank in range(ranks)]
    check(Relayout(plain, stored), [whole], [row])
    check(Chain((Relayout(plain, stored), Split(dim, (2 * share,) * ranks))), [whole], shards)
    # The same by lists: each part split among the ranks, then each rank's shares together.
    lists = Chain(
        (
            Parts(plain),
            Batched(1, Split(dim, (share,) * ranks), ranks),
            Transposed(2, ranks),
            Batched(2, Concatenate(dim, (share, share))),
        )
    )
    check(lists, [whole], shards)


@RANDOM
@given(sizes, sizes, st.integers(1, 3))
def test_experts(experts: int, width: int, inner: int) -> None:
    """[experts, gate and up, in] of weights of each expert; also first all gates, as some keep them."""
    gates, ups = (numbered(*[(width, inner)] * experts, first=first) for first in (0, 1000))
    stacked = by(
        (experts, 2 * width, inner),
        lambda e, i, j: (gates[e][i, j] if i < width else ups[e][i - width, j]).item(),
    )
    labels = tuple(f"e{i}" for i in range(experts))
    layout = Layout((("gate", width), ("up", width)), -2, stack=(labels,))
    by_expert = [t for pair in zip(gates, ups, strict=True) for t in pair]
    check(Join(layout), by_expert, [stacked])
    check(Chain((Transposed(2, experts), Join(layout))), [*gates, *ups], [stacked])
    pairs = Batched(2, Concatenate(-2, (width, width)))
    check(Chain((pairs, Stack(experts))), by_expert, [stacked])
    kinds = Chain((Batched(experts, Stack(experts)), Concatenate(-2, (width, width))))
    check(kinds, [*gates, *ups], [stacked])


@RANDOM
@given(st.sampled_from([1, 2, 3]), sizes, sizes, sizes, inners)
def test_mamba2(ranks: int, heads: int, groups: int, state: int, inner: tuple[int, ...]) -> None:
    """z, x, B, C, dt one after another, and each rank's shares of all five."""
    width, head = ranks * heads, 2
    rows = {"z": width * head, "x": width * head, "B": ranks * groups * state, "C": ranks * groups * state, "dt": width}
    parts, dim = as_parts(rows, inner), -1 - len(inner)
    plain = Layout(tuple(rows.items()), dim)
    stored = Layout(tuple((name, n // ranks) for name, n in rows.items()), dim, ranks)
    whole, row = fused(rows_one_after_another(rows), parts), fused(rows_of_ranks(ranks, rows), parts)
    check(Relayout(plain, stored), [whole], [row])
    share = len(row) // ranks
    shards = [row[rank * share : (rank + 1) * share] for rank in range(ranks)]
    check(Chain((Relayout(plain, stored), Split(dim, (share,) * ranks))), [whole], shards)
    check(Join(stored), list(parts.values()), [row])


def test_the_layouts_are_told_apart() -> None:
    """What is put together as if it were another layout is not what the loops list: none of the checks above is empty."""
    heads, groups, size = 4, 2, 2
    rows = {"q": 8, "k": 4, "v": 4}
    parts = as_parts(rows, (3,))
    right = fused(rows_of_groups(heads, groups, size), parts)
    names = list(rows)
    layouts = [Layout(tuple(rows.items()), -2)]
    layouts += [Layout(tuple((n, rows[n] // 2) for n in order), -2, 2) for order in itertools.permutations(names)]
    layouts += [Layout(tuple((n, rows[n] // 4) for n in names), -2, 4)]
    same = [torch.equal(layout.join({(n,): parts[n] for n in names}), right) for layout in layouts]
    assert same == [False, True, *[False] * 6]


# Anything after anything ------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[Chain, tuple[int, ...]]:
    """Steps in a row that fit what is there when they come."""
    first = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    here, steps = first, list[Step]()
    for _ in range(draw(st.integers(1, 5))):
        dim = -draw(st.integers(1, len(here)))
        kind = draw(st.sampled_from(["permute", "split", "pad", "flat", "stack"]))
        if kind == "permute":
            dims = tuple(draw(st.permutations(range(len(here)))))
            steps.append(Permute(dims))
            here = tuple(here[d] for d in dims)
        elif kind == "split" and here[dim] > 1:  # and the parts in the other order
            cut = draw(st.integers(1, here[dim] - 1))
            parts = (cut, here[dim] - cut)
            steps += [Split(dim, parts), Transposed(1, 2), Transposed(2, 1), Concatenate(dim, parts)]
        elif kind == "pad":
            more = here[dim] + draw(st.integers(0, 2))
            steps.append(Pad(dim, here[dim], more))
            here = tuple(more if i == len(here) + dim else n for i, n in enumerate(here))
        elif kind == "flat":
            steps.append(Reshape(here, (math.prod(here), 1)))
            here = (math.prod(here), 1)
        elif kind == "stack":
            steps += [Copies(2), Each(Reshape(here, here)), Stack(2), Unstack(2), Agree(2)]
    return Chain(tuple(steps)), first


@settings(RANDOM, max_examples=60)
@given(chains())
def test_chains_are_undone_in_the_other_order(case: tuple[Chain, tuple[int, ...]]) -> None:
    chain, first = case
    given = numbered(first, first=1)
    made = chain(given)
    assert alike(chain.inverse(made), given)
    assert [t.shape for t in chain([t.to("meta") for t in given])] == [t.shape for t in made]
    assert chain.inverse.inverse == chain
