"""Layouts against an index oracle, address patterns case by case, and what initialisation promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make, sentence
from reference import layout_index
from torch import Tensor, nn

from core.addresses import Labels, Pattern, select
from core.slices import (
    Declaration,
    Layout,
    Slice,
    declare,
    declared,
    generator_for,
    initialise,
    materialise,
    slices,
)
from variations.init.distributions import ONES, ZEROS

NOTHING: Labels = ()
RANDOM = settings(derandomize=True, deadline=None, max_examples=60)


def meant_by(pattern: Pattern, part: Slice) -> bool:
    return pattern.matches(part.parameter, part.labels)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    """A random layout and a shape that it fits."""
    dim = draw(st.sampled_from([-1, -2, -3]))
    count, groups = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    parts = tuple((f"p{i}", draw(st.integers(1, 4))) for i in range(count))
    stack = tuple(
        tuple(f"s{axis}_{i}" for i in range(draw(st.integers(1, 3)))) for axis in range(draw(st.integers(0, 2)))
    )
    inner = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(-dim, 3)))]
    if parts:
        inner[dim] = groups * sum(size for _, size in parts)
    return Layout(parts, dim, groups, stack), (*(len(axis) for axis in stack), *inner)


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape)


def expected(layout: Layout, whole: Tensor, labels: Labels) -> Tensor:
    """A slice by indices alone: the stack axes one by one, then the rows that the oracle lists."""
    for axis, label in zip(layout.stack, labels, strict=False):
        whole = whole[axis.index(label)]
    if not layout.parts:
        return whole
    rows = layout_index(list(layout.parts), layout.groups, labels[-1])
    return torch.stack([whole.select(layout.dim, row) for row in rows], dim=whole.dim() + layout.dim)


# Layout ------------------------------------------------------------------------------------------------------------------------


@RANDOM
@given(layouts())
def test_a_layout_splits_as_the_oracle_says_and_joins_again(given_: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = given_
    whole = numbered(shape)
    parts = layout.split(whole)
    assert list(parts) == layout.labels()
    for labels, part in parts.items():
        assert torch.equal(part, expected(layout, whole, labels))
        assert part.shape == layout.shape(shape, labels)
    assert torch.equal(layout.join(parts), whole)
    everything = torch.cat([part.flatten() for part in parts.values()])
    assert torch.equal(everything.sort().values, torch.arange(whole.numel()))


@RANDOM
@given(layouts())
def test_labels_come_in_the_order_in_which_slices_lie(given_: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = given_
    whole = numbered(shape)
    firsts = [int(layout.view(whole, labels).min()) for labels in layout.labels()]
    assert firsts == sorted(firsts)
    names: list[Labels] = [(name,) for name, _ in layout.parts] or [()]
    assert layout.labels() == [(*a, *b) for a in itertools.product(*layout.stack) for b in names]


@RANDOM
@given(layouts())
def test_views_write_through_and_nowhere_else(given_: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = given_
    for labels in layout.labels():
        whole = numbered(shape)
        layout.view(whole, labels).fill_(-1)
        assert (whole == -1).sum() == math.prod(layout.shape(shape, labels))
        assert (expected(layout, whole, labels) == -1).all()


@RANDOM
@given(layouts())
def test_ranges_cover_every_row_once(given_: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = given_
    seen: list[int] = []
    for name, _ in layout.parts:
        ranges = layout.ranges(name)
        rows = [row for begin, end in ranges for row in range(begin, end)]
        assert rows == layout_index(list(layout.parts), layout.groups, name)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "neighbours are merged"
        seen += rows
    if layout.parts:
        assert sorted(seen) == list(range(shape[layout.dim]))


def test_megatrons_interleaved_heads() -> None:
    """Two groups of [q q k v] rows: by hand."""
    layout = Layout((("q", 2), ("k", 1), ("v", 1)), dim=-2, groups=2)
    rows = {labels[0]: part.flatten().tolist() for labels, part in layout.split(torch.arange(8.0).view(8, 1)).items()}
    assert rows == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    assert layout.ranges("q") == [(0, 2), (4, 6)] and Layout((("q", 4),), groups=2).ranges("q") == [(0, 8)]


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Layout((("q", 2), ("q", 2))), "'q' stands twice"),
        (lambda: Layout((("a", 2),), stack=(("a", "b"),)), "'a' stands twice"),
        (lambda: Layout(stack=(("a", "b"), ("b",))), "'b' stands twice"),
        (lambda: Layout((("q", 0),)), "part 'q' has 0 rows"),
        (lambda: Layout((("q", -1),)), "part 'q' has -1 rows"),
        (lambda: Layout(stack=(NOTHING,)), "has no labels"),
        (lambda: Layout((("q", 1),), groups=0), "at least one group"),
        (lambda: Layout((("q", 1),), dim=0), "from the right"),
        (lambda: Layout((("a.b", 1),)), "'a.b'"),
        (lambda: Layout(stack=(("x,y",),)), "'x,y'"),
        (lambda: Layout((("", 1),)), "''"),
        (lambda: Layout((("q", 2), ("k", 3)), dim=-2).check((6, 4)), "q 2 + k 3"),
        (lambda: Layout((("q", 2),), dim=-2, groups=2).check((5, 4)), "do not add up to 5"),
        (lambda: Layout((("q", 2),), dim=-2).check((2,)), "do not fit the shape (2,)"),
        (lambda: Layout(stack=(("a", "b"),)).check((3, 4)), "do not fit the shape (3, 4)"),
        (lambda: Layout(dim=-2, stack=(("a", "b"),)).check((2, 4)), "do not fit"),
        (lambda: Layout().check((0, 4)), "no elements"),
        (lambda: Layout((("q", 2), ("k", 2))).split(torch.zeros(3)), "do not add up to 3"),
        (lambda: Layout((("q", 2), ("k", 2))).join({("q",): torch.zeros(2)}), "not the slices"),
        (lambda: Layout((("q", 2), ("k", 2))).join({("q",): torch.zeros(2), ("k",): torch.zeros(3)}), "slice 'k'"),
        (
            lambda: Layout((("q", 2), ("k", 4)), -2).join({("q",): torch.zeros(2, 4), ("k",): torch.zeros(2, 8)}),
            "slice 'k' is [2, 8], not [4, 4]",
        ),
    ],
)
def test_mistakes_in_layouts_are_sentences(make_it: Any, words: str) -> None:
    assert words in sentence(make_it)


# Patterns ------------------------------------------------------------------------------------------------------------------


def named(address: str) -> Slice:
    """A slice of which only the address matters."""
    parameter, _, bracket = address.partition("[")
    labels = tuple(bracket.rstrip("]").split(".")) if bracket else ()
    return Slice(address, parameter, labels, (1,), Declaration(Layout(), "matrix", ZEROS))


PLACES = [
    "wte.weight",
    "head.weight",
    "h.0.ln_1.weight",
    "h.0.attn.qkv.weight[q]",
    "h.0.attn.qkv.weight[k]",
    "h.0.attn.qkv.weight[v]",
    "h.0.attn.qkv.bias[q]",
    "h.0.attn.qkv.bias[k]",
    "h.0.attn.qkv.bias[v]",
    "h.0.attn.proj.weight",
    "h.1.attn.qkv.weight[a.q]",
    "h.1.attn.qkv.weight[b.q]",
    "h.1.attn.qkv.weight[b.k]",
    "h.1.moe.gate_up.weight[5.gate]",
    "h.1.moe.gate_up.weight[5.up]",
    "h.1.moe.gate_up.weight[15.gate]",
    "h.2.ssm.A_log",
    "h.10.mlp.up.weight",
    "h.10.mlp.up.bias",
]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        # without .weight or .bias it is the weight, and a star stays inside a segment
        ("h.*.attn.qkv", "h.0.attn.qkv.weight[q] h.0.attn.qkv.weight[k] h.0.attn.qkv.weight[v] h.1.attn.qkv.weight[a.q] "
                         "h.1.attn.qkv.weight[b.q] h.1.attn.qkv.weight[b.k]"),
        ("h.0.attn.qkv.bias", "h.0.attn.qkv.bias[q] h.0.attn.qkv.bias[k] h.0.attn.qkv.bias[v]"),
        ("h.0.attn.qkv.bias[k]", "h.0.attn.qkv.bias[k]"),
        ("h.0.attn.*.weight", "h.0.attn.qkv.weight[q] h.0.attn.qkv.weight[k] h.0.attn.qkv.weight[v] h.0.attn.proj.weight"),
        ("h.0.attn.p*", "h.0.attn.proj.weight"),
        ("h.1*.mlp.up", "h.10.mlp.up.weight"),
        ("*", "wte.weight head.weight"),
        ("h.*.proj", ""),
        ("h.0.attn", ""),
        ("qkv", ""),
        # everything below
        ("h.10.**", "h.10.mlp.up.weight h.10.mlp.up.bias"),
        ("h.2.**", "h.2.ssm.A_log"),
        ("head.**", "head.weight"),
        ("**", " ".join(PLACES)),
        # across segments, also none
        ("**.qkv.bias", "h.0.attn.qkv.bias[q] h.0.attn.qkv.bias[k] h.0.attn.qkv.bias[v]"),
        ("h.**.proj", "h.0.attn.proj.weight"),
        ("h.0.**.attn.**.proj", "h.0.attn.proj.weight"),
        ("h.0.**.**.proj", "h.0.attn.proj.weight"),
        ("**.wte", "wte.weight"),
        ("**.up", "h.10.mlp.up.weight"),
        ("h.**p", "h.10.mlp.up.weight h.1.moe.gate_up.weight[5.gate] h.1.moe.gate_up.weight[5.up] "
                  "h.1.moe.gate_up.weight[15.gate]"),
        # numbers
        ("h.{0..9}.attn.proj", "h.0.attn.proj.weight"),
        ("h.{1..10}.mlp.up", "h.10.mlp.up.weight"),
        ("h.{1..9}.mlp.up", ""),
        ("h.{10..10}.mlp.*.bias", "h.10.mlp.up.bias"),
        # a parameter that is neither weight nor bias goes by its own name
        ("h.2.ssm.A_log", "h.2.ssm.A_log"),
        ("h.2.ssm", ""),
        # brackets: names of parts at any depth
        ("h.*.attn.qkv[q]", "h.0.attn.qkv.weight[q] h.1.attn.qkv.weight[a.q] h.1.attn.qkv.weight[b.q]"),
        ("h.*.attn.qkv[a.q]", "h.1.attn.qkv.weight[a.q]"),
        ("h.*.attn.qkv[b]", "h.1.attn.qkv.weight[b.q] h.1.attn.qkv.weight[b.k]"),
        ("h.*.attn.qkv[q,v]", "h.0.attn.qkv.weight[q] h.0.attn.qkv.weight[v] h.1.attn.qkv.weight[a.q] h.1.attn.qkv.weight[b.q]"),
        ("h.*.attn.qkv[ k , v ]", "h.0.attn.qkv.weight[k] h.0.attn.qkv.weight[v] h.1.attn.qkv.weight[b.k]"),
        ("h.*.moe.gate_up[gate]", "h.1.moe.gate_up.weight[5.gate] h.1.moe.gate_up.weight[15.gate]"),
        ("h.*.moe.gate_up[5.gate]", "h.1.moe.gate_up.weight[5.gate]"),
        ("h.*.moe.gate_up[5]", "h.1.moe.gate_up.weight[5.gate] h.1.moe.gate_up.weight[5.up]"),
        ("h.*.moe.gate_up[{0..5}.gate]", "h.1.moe.gate_up.weight[5.gate]"),
        ("h.*.moe.gate_up[{6..20}]", "h.1.moe.gate_up.weight[15.gate]"),
        ("h.*.moe.gate_up[gate.5]", ""),
        ("h.0.attn.qkv[qk]", ""),
        ("h.0.attn.qkv[q*]", "h.0.attn.qkv.weight[q]"),
        ("h.0.attn.qkv[^q]", ""),
        ("h.0.attn.proj[q]", ""),
        ("**[q]", "h.0.attn.qkv.weight[q] h.0.attn.qkv.bias[q] h.1.attn.qkv.weight[a.q] h.1.attn.qkv.weight[b.q]"),
        ("h.0.**[k]", "h.0.attn.qkv.weight[k] h.0.attn.qkv.bias[k]"),
        # nothing else is special
        ("h.0.attn.(qkv|proj)", ""),
        ("h.0?attn.proj", ""),
        ("h.0.attn.pro.", ""),
    ],
)  # fmt: skip
def test_what_a_pattern_means(pattern: str, wanted: str) -> None:
    assert [p for p in PLACES if meant_by(Pattern(pattern), named(p))] == [p for p in PLACES if p in wanted.split()]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("h.*.attn.qkv[k", "bracket"),
        ("h.*.attn.qkv]k", "bracket"),
        ("h.*.attn.qkv[k]]", "bracket"),
        ("h.[0,1].attn.qkv", "bracket"),
        ("h.*.attn.qkv[q][k]", "bracket"),
        ("h.*.attn.qkv[]", "without a name"),
        ("h.*.attn.qkv[q,]", "without a name"),
        ("h.*.attn.qkv[q..k]", "without a name"),
        ("[q]", "names no place"),
        ("", "names no place"),
        ("h.{0..5.attn", "brace"),
        ("h.}0..5{.attn", "range of numbers"),
        ("h.{5..0}.attn", "range of numbers"),
        ("h.{a,b}.attn", "range of numbers"),
        ("h.{}.attn", "range of numbers"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(pattern: str, words: str) -> None:
    text = sentence(lambda: Pattern(pattern))
    assert words in text and pattern in text


def test_select_takes_any_pattern_and_no_exception() -> None:
    def chosen(patterns: list[str], excepted: list[str]) -> list[str]:
        parts = {place: named(place) for place in PLACES}
        return [place for place, part in parts.items() if meant(patterns, excepted, part)]

    def meant(patterns: list[str], excepted: list[str], part: Slice) -> bool:
        return select(patterns, excepted, lambda pattern: meant_by(pattern, part))

    assert chosen(["wte", "head"], []) == ["wte.weight", "head.weight"]
    assert chosen(["wte", "head"], ["h*"]) == ["wte.weight"]
    assert chosen([], []) == [] and chosen(["**"], ["**"]) == []
    assert "'h['" in sentence(lambda: chosen(["**"], ["h[", "**"]))


# Models ------------------------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """One grouped weight, one stacked, one vector."""

    a: nn.Parameter
    c: nn.Parameter

    def __init__(self, init: Any) -> None:
        super().__init__()
        declare(self, "a", (8, 3), Declaration(Layout((("q", 2), ("k", 1), ("v", 1)), -2, 2), "matrix", init, gain=2.0))
        declare(
            self, "b", (2, 4, 3), Declaration(Layout((("gate", 2), ("up", 2)), -2, stack=(("0", "1"),)), "matrix", init)
        )
        declare(self, "c", (5,), Declaration(Layout(), "vector", ONES))


class Counting:
    """An init whose values tell their element's number, and which remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        self.asked.append((shape, generator.initial_seed()))
        return 1.0 + numbered(shape)


def test_slices_of_a_model_have_addresses_shapes_and_values() -> None:
    init = Counting()
    fused = Fused(init)
    model = nn.ModuleDict({"m": fused})
    listed = {s.address: s.shape for s in slices(model)}
    assert listed == {
        "m.a[q]": (4, 3), "m.a[k]": (2, 3), "m.a[v]": (2, 3),
        "m.b[0.gate]": (2, 3), "m.b[0.up]": (2, 3), "m.b[1.gate]": (2, 3), "m.b[1.up]": (2, 3), "m.c": (5,),
    }  # fmt: skip
    assert all(p.is_meta for p in model.parameters())
    materialise(model, "cpu")
    initialise(model, seed=4)
    assert init.asked == [(shape, generator_for(4, a).initial_seed()) for a, shape in listed.items() if a != "m.c"]
    q = fused.a[[0, 1, 4, 5]].flatten()
    assert q.tolist() == [2.0 * (1 + i) for i in range(12)], "all groups of a part are one matrix, times the gain"
    assert torch.equal(fused.c, torch.ones(5))


def test_generators_differ_by_seed_and_address_and_repeat() -> None:
    seeds = {generator_for(s, a).initial_seed() for s in range(20) for a in ("x", "y", "x[q]", "1:x")}
    assert len(seeds) == 80
    assert generator_for(1, "1:x").initial_seed() != generator_for(11, "x").initial_seed()
    assert torch.equal(torch.rand(3, generator=generator_for(1, "x")), torch.rand(3, generator=generator_for(1, "x")))


def test_an_undeclared_parameter_is_our_mistake() -> None:
    model = Fused(ZEROS)
    model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    with pytest.raises(AssertionError, match="extra"):
        slices(model)


def test_a_declaration_must_fit_its_shape() -> None:
    what = Declaration(Layout((("q", 2), ("k", 2)), -2), "matrix", ZEROS)
    assert "do not add up to 5" in sentence(lambda: declare(nn.Module(), "weight", (5, 2), what))


def test_tied_weights_are_one_set_of_slices_under_the_first_name() -> None:
    tied, untied = (make(tie_weights=flag) for flag in (True, False))
    assert tied.head.weight is tied.wte.weight
    names = [name for name, _, _ in declared(tied)]
    assert names.count("wte.weight") == 1 and "head.weight" not in names
    assert {s.address for s in slices(untied)} - {s.address for s in slices(tied)} == {"head.weight"}


def test_materialise_keeps_what_is_shared_and_what_is_frozen() -> None:
    x, y = Fused(ZEROS), Fused(ZEROS)
    y.a = x.a
    x.c.requires_grad_(False)
    shared = torch.ones(())
    for module in (x, y):
        module.register_buffer("n", shared)
    model = nn.ModuleDict({"x": x, "y": y})
    materialise(model, "cpu")
    assert y.a is x.a and y.n is x.n
    materialise(model, "meta")
    assert y.a is x.a and y.n is x.n is not shared and x.n.is_meta
    assert not x.c.requires_grad and y.c.requires_grad
