"""Mappings: which weight is which by patterns, planned before anything is read, made one at a time, and never of shared memory."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convert.mapping
from convert.mapping import Mapped, Mismatch, Rule, Rules, Source, Tensors, copies, fill, filled, matches, rule
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
    Numbers,
    Pad,
    Permute,
    Relayout,
    Split,
    Stack,
    Step,
    Transposed,
    Unstack,
)
from core.layout import Layout
from core.weights import weights

RANDOM = settings(derandomize=True, deadline=None, max_examples=60)


def numbered(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Tensors by name, no number of which is twice in any."""
    made, start = dict[str, Tensor](), 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        made[name] = torch.arange(start, start + size, dtype=torch.float32).reshape(tuple(shape))
        start += size
    return made


class Watched:
    """A source that counts what is read and what of it is alive."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.tensors = numbered(shapes)
        self.read: list[str] = []
        self.alive: dict[int, int] = {}
        self.peak = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def meta(self, name: str) -> Tensor:
        return self.tensors[name].to("meta")

    def get(self, name: str) -> Tensor:
        self.read.append(name)
        made = self.tensors[name].clone()
        storage, number = made.untyped_storage(), len(self.read)
        self.alive[number] = storage.nbytes()
        weakref.finalize(storage, self.alive.pop, number)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


class Unreadable(Watched):
    def get(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")


def mistakes(
    shapes: Mapping[str, Sequence[int]], rules: Rules, wanted: Mapping[str, Sequence[int]] | None = None
) -> list[str]:
    """What a plan says is wrong; nothing may be read for it."""
    with pytest.raises(Mismatch) as caught:
        Mapped(Unreadable(shapes), rules, wanted)
    assert str(caught.value) == "\n".join(caught.value.mistakes)
    assert all(each.endswith(".") for each in caught.value.mistakes)
    return caught.value.mistakes


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def everything(source: Source) -> dict[str, Tensor]:
    return {name: source.get(name) for name in source.names()}


# Patterns ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "words"),
    [
        ("h.*.attn.**", "h.3.attn.q.weight", ("3", "q.weight")),
        ("**.h.*.weight", "model.decoder.h.12.weight", ("model.decoder", "12")),
        ("*.**.*", "a.b.c.d", ("a", "b.c", "d")),
        ("**.*", "a.b.c", ("a.b", "c")),
        ("*.**", "a.b.c", ("a", "b.c")),
        ("h.*.w*", "h.0.w1", ("0", "1")),
        ("h.*.x", "h.0.1.x", None),
        ("h.*", "h.0.x", None),
        ("h.**.x", "h.x", None),
        ("**", "with\nlines.and [brackets]", ("with\nlines.and [brackets]",)),
        ("h.*", "hx0", None),  # a dot is a dot
        ("a+(b)[c].*", "a+(b)[c].0", ("0",)),
        ("h.*.q", "prefix.h.0.q", None),
        ("h.*.q", "h.0.q.weight", None),
        ("wte", "wte", ()),
    ],
)
def test_wildcards_stand_for_segments(pattern: str, name: str, words: tuple[str, ...] | None) -> None:
    assert matches(pattern, name) == words
    if words is not None:
        assert filled(pattern, words) == name


segments = st.text("abc019_", min_size=1, max_size=3)


@RANDOM
@given(
    st.lists(
        st.tuples(st.sampled_from(["*", "**"]), st.lists(segments, min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    st.randoms(use_true_random=False),
)
def test_the_first_wildcard_of_one_side_is_the_first_of_the_other(
    kinds: list[tuple[str, list[str]]], random: object
) -> None:
    """Whatever kinds they are and in whatever order; the words are told apart by what stands between them."""
    words = [".".join(word if kind == "**" else word[:1]) for kind, word in kinds]
    source = ".".join(f"X{i}X.{kind}" for i, (kind, _) in enumerate(kinds))
    target = ".".join(f"{kind}.Y{i}Y" for i, (kind, _) in enumerate(kinds))
    theirs = ".".join(f"X{i}X.{word}" for i, word in enumerate(words))
    ours = ".".join(f"{word}.Y{i}Y" for i, word in enumerate(words))
    rules = Rules((rule(source, target),))
    assert Mapped(Tensors({theirs: torch.ones(1)}), rules).names() == [ours]
    assert Mapped(Tensors({ours: torch.ones(1)}), rules.inverse).names() == [theirs]


def test_a_star_and_two_stars_may_change_places() -> None:
    """Those before and behind each other, in both orders, and one kind for the other where the words allow it."""
    given = numbered({"model.layers.4.self_attn.q.weight": (1,)})
    rules = Rules((rule("model.*.*.**", "**.of.*.in.*"),))
    with pytest.raises(Mismatch, match=r"'q\.weight'|several segments"):
        Mapped(Tensors(given), rules)
    rules = Rules((rule("model.layers.*.**", "h.**.at.*"),))
    with pytest.raises(
        Mismatch, match=r"'self_attn\.q\.weight' is several segments, and the '\*' of 'h\.\*\*\.at\.\*'"
    ):
        Mapped(Tensors(given), rules)
    rules = Rules((rule("model.layers.*.**", "h.*.**"),))
    assert Mapped(Tensors(given), rules).names() == ["h.4.self_attn.q.weight"]


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("h.*.q", "h.q", ["'h.q' has 0 wildcards", "'h.*.q' has 1"]),
        (("h.*.q", "h.*.*"), "x.*", ["'h.*.*' has 2", "'h.*.q' has 1"]),
        ("a.**", ("b.**", "c"), ["'c' has 0"]),
        ("a.***", "b.*", ["'a.***' has 2"]),
        ((), "b", ["both sides"]),
        ("a", (), ["both sides"]),
    ],
)
def test_patterns_of_a_rule_have_equally_many_wildcards(
    source: str | tuple[str, ...], target: str | tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        rule(source, target)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# What is wrong with a plan ---------------------------------------------------------------------------------------------------

QKV = ("h.*.q", "h.*.k", "h.*.v")
FUSE = rule(QKV, "h.*.qkv", Concatenate(-1, (1, 1, 1)))


def test_a_rule_that_matches_nothing_is_told_unless_it_may() -> None:
    assert mistakes({"a": (1,)}, Rules((rule("a", "b"), FUSE))) == ["There is no 'h.*.q' to make h.*.qkv of."]
    optional = rule(QKV, "h.*.qkv", Concatenate(-1, (1, 1, 1)), optional=True)
    mapped = Mapped(Unreadable({"a": (1,)}), Rules((rule("a", "b"), optional)))
    assert mapped.names() == ["b"]
    back = Rules((rule("a", "b"), optional)).inverse  # may be missing on the way back too
    assert Mapped(Unreadable({"b": (1,)}), back).names() == ["a"]


@pytest.mark.parametrize("optional", [False, True])
def test_siblings_that_are_missing_are_told(optional: bool) -> None:
    fuse = rule(QKV, "h.*.qkv", Concatenate(-1, (1, 1, 1)), optional=optional)
    shapes = {f"h.{i}.{n}": (1,) for i in (0, 1) for n in "qkv"}
    del shapes["h.1.k"], shapes["h.1.v"]
    wrong = mistakes(shapes, Rules((fuse,)), {"h.0.qkv": (3,), "h.1.qkv": (3,)})
    assert wrong == [
        "h.1.q belongs together with h.1.k, h.1.v, which there is not.",
        "Left over, as no rule takes them: h.1.q.",
        "Missing, as no rule fills them: h.1.qkv.",
    ]
    del shapes["h.1.q"]
    shapes["h.1.v"] = (1,)
    assert mistakes(shapes, Rules((fuse,))) == ["Left over, as no rule takes them: h.1.v."]


def test_what_is_left_over_used_twice_filled_twice_and_missing_is_all_told_at_once() -> None:
    shapes = {"a": (1,), "b": (1,), "c": (1,), "d": (1,)}
    rules = Rules((rule("a", "x"), rule("a", "y"), rule("b", "x"), rule("c", ("z", "z"), Copies(2))))
    assert mistakes(shapes, rules, {"x": (1,), "y": (1,), "w": (1,)}) == [
        "a is used twice, for x and y.",
        "x is filled twice, from a and b.",
        "z is filled twice, from c and c.",
        "Left over, as no rule takes them: d.",
        "Missing, as no rule fills them: w.",
        "Left over, as the target has no such weights: z.",
    ]
    assert mistakes({"a": (1,)}, Rules((rule(("a", "a"), "x", Concatenate(-1, (1, 1))),))) == [
        "a is used twice, for x and x."
    ]
    many = mistakes({f"n{i:02}": (1,) for i in range(11)}, Rules(()))
    assert many == ["Left over, as no rule takes them: n00, n01, n02, n03, n04, n05, n06, n07 and 3 more."]


def test_shapes_are_told_with_the_weights_names_and_both_shapes() -> None:
    wrong = mistakes({"h.0.q": (1,), "h.0.k": (1,), "h.0.v": (2,)}, Rules((FUSE,)))
    assert wrong == ["h.0.q, h.0.k, h.0.v to h.0.qkv: it is [2], not [1]."]
    wrong = mistakes(
        {"a": (2, 3), "b": (1,)}, Rules((rule("a", "x", TRANSPOSE), rule("b", "y"))), {"x": (2, 3), "y": (1,)}
    )
    assert wrong == ["x would be [3, 2], made of a; it is [2, 3]."]
    wrong = mistakes({"a": (3,)}, Rules((rule("a", ("x", "y"), Split(-1, (1, 1, 1))),)))
    assert wrong == ["a to x, y: 3 tensors are made, and 2 are named."]
    wrong = mistakes({"a": (3,)}, Rules((rule("a", ("x", "y"), Chain()),)))
    assert wrong == ["a to x, y: 1 tensors are made, and 2 are named."]
    # A dimension of 1 is one: nothing is spread or squeezed to fit.
    assert mistakes({"a": (1,)}, Rules((rule("a", "x"),)), {"x": (4,)}) == ["x would be [1], made of a; it is [4]."]
    assert mistakes({"a": (1, 4)}, Rules((rule("a", "x"),)), {"x": (4,)})
    assert mistakes({"a": ()}, Rules((rule("a", "x"),)), {"x": (1,)})


def test_what_is_left_out_on_purpose_is_so_on_both_sides() -> None:
    rules = Rules((rule("h.*.w", "l.*.w"),), dropped=("**.inv_freq",), missing=("mask", "l.*.scale"))
    shapes = {"h.0.w": (1,), "h.0.rotary.inv_freq": (2,)}
    wanted = {"l.0.w": (1,), "l.0.scale": (1,), "mask": (1,)}
    assert Mapped(Unreadable(shapes), rules, wanted).names() == ["l.0.w"]
    assert mistakes(shapes | {"inv_freq": (1,)}, rules, wanted) == ["Left over, as no rule takes them: inv_freq."]
    assert Mapped(Unreadable(wanted), rules.inverse, {"h.0.w": (1,), "h.0.rotary.inv_freq": (2,)}).names() == ["h.0.w"]
    assert rules.inverse.inverse == rules


def test_copies_that_differ_are_told_when_they_are_read() -> None:
    given = {"r.0.bias": torch.zeros(2), "r.1.bias": torch.tensor([0.0, 1.0])}
    mapped = Mapped(Tensors(given), Rules((rule(("r.0.bias", "r.1.bias"), "bias", Agree(2)),)))
    with pytest.raises(
        Mismatch, match=r"^r\.0\.bias, r\.1\.bias to bias: copy 1 differs from the first in 1 of 2 values\.$"
    ):
        mapped.get("bias")


# What is made ---------------------------------------------------------------------------------------------------------------------

RULES = Rules(
    (
        rule("**.c_attn.weight", ("**.q", "**.k", "**.v"), TRANSPOSE, Split(-2, (2, 1, 1))),
        rule("wte", "embed.weight", Pad(-2, 3, 4)),
        rule(("e.*.gate", "e.*.up"), "moe.*.gate_up", Concatenate(-2, (2, 2))),
        rule("norms", ("n.0.weight", "n.1.weight"), Unstack(2)),
        rule("bias", ("rank.0.bias", "rank.1.bias"), Copies(2)),
        rule("x.*.**", "y.**.z.*", optional=True),
    )
)
SHAPES = {
    "h.0.c_attn.weight": (3, 4),
    "wte": (3, 2),
    "h.1.c_attn.weight": (3, 4),
    "e.0.gate": (2, 2),
    "e.1.gate": (2, 2),
    "e.1.up": (2, 2),
    "e.0.up": (2, 2),
    "norms": (2, 3),
    "bias": (1,),
}


def test_a_mapping_and_its_inverse_by_hand() -> None:
    given = numbered(SHAPES)
    mapped = Mapped(Tensors(given), RULES)
    made = everything(mapped)
    for h in (0, 1):
        theirs = given[f"h.{h}.c_attn.weight"]
        for name, begin, rows in (("q", 0, 2), ("k", 2, 1), ("v", 3, 1)):
            ours = made[f"h.{h}.{name}"]
            assert ours.tolist() == [[theirs[i, begin + o].item() for i in range(3)] for o in range(rows)]
    assert made["embed.weight"].tolist() == [*given["wte"].tolist(), [0.0, 0.0]]
    for e in (0, 1):
        assert made[f"moe.{e}.gate_up"].tolist() == given[f"e.{e}.gate"].tolist() + given[f"e.{e}.up"].tolist()
    assert made["n.1.weight"].tolist() == given["norms"].tolist()[1]
    assert made["rank.0.bias"].tolist() == made["rank.1.bias"].tolist() == given["bias"].tolist()
    assert len(made) == 13 == len(mapped.names())
    for name, t in made.items():
        assert mapped.meta(name).is_meta and mapped.meta(name).shape == t.shape and mapped.meta(name).dtype == t.dtype
    back = Mapped(Tensors(made), RULES.inverse, SHAPES)
    assert same(everything(back), given)
    assert same(everything(Mapped(back, RULES)), made)


def test_what_is_mapped_twice_is_what_one_mapping_of_both_makes() -> None:
    given = numbered({f"h.{i}.{n}": (2, 3) for i in range(3) for n in "qkv"})
    first = Rules((rule(QKV, "l.*.qkv", Concatenate(-2, (2, 2, 2))),))
    second = Rules((rule([f"l.{i}.qkv" for i in range(3)], "qkv", Each(TRANSPOSE), Stack(3)),))
    names = [f"h.{i}.{n}" for i in range(3) for n in "qkv"]
    both = rule(names, "qkv", Batched(3, Concatenate(-2, (2, 2, 2))), Each(TRANSPOSE), Stack(3))
    direct = Mapped(Tensors(given), Rules((both,)))
    composed = Mapped(Mapped(Tensors(given), first), second)
    assert same(everything(composed), everything(direct))
    assert composed.meta("qkv").shape == direct.meta("qkv").shape == (3, 3, 6)
    back = Mapped(Mapped(Tensors(everything(direct)), second.inverse), first.inverse)
    assert same(everything(back), given)


def test_names_may_be_asked_for_in_any_order_and_more_than_once() -> None:
    mapped = Mapped(Tensors(numbered(SHAPES)), RULES)
    right = everything(Mapped(Tensors(numbered(SHAPES)), RULES))
    for name in [*reversed(mapped.names()), "h.0.k", "h.0.k", "h.0.q", "rank.1.bias", *mapped.names()]:
        assert torch.equal(mapped.get(name), right[name]), name


# Memory ---------------------------------------------------------------------------------------------------------------------------


def walked(source: Source) -> None:
    """Every tensor once, none of which is kept."""
    for name in source.names():
        source.get(name)


LAYERS, NUMBER = 4, 4  # bytes of a float32


@pytest.mark.parametrize(
    ("shapes", "rules", "most"),
    [
        ({f"a.{i}": (100,) for i in range(9)}, Rules((rule("a.*", "b.*"),)), 100),
        (
            {f"h.{i}.{n}": (100,) for i in range(9) for n in "qkv"},
            Rules((rule(QKV, "x.*", Concatenate(-1, (100,) * 3)),)),
            300,
        ),
        ({f"a.{i}": (3, 100) for i in range(9)}, Rules((rule("a.*", ("q.*", "k.*", "v.*"), Unstack(3)),)), 300),
        (
            dict.fromkeys("abcdef", (LAYERS, 100)),
            Rules(tuple(rule(n, [f"h.{i}.{n}" for i in range(LAYERS)], Unstack(LAYERS)) for n in "abcdef")),
            LAYERS * 100,
        ),
    ],
    ids=["alone", "fused", "split", "layers"],
)
@pytest.mark.parametrize("way", ["walk", "fill", "copies"])
def test_tensors_of_one_move_are_alive_at_a_time(
    shapes: Mapping[str, Sequence[int]], rules: Rules, most: int, way: str
) -> None:
    """Each is read once, when it is asked for, in whatever order the filled model has its weights."""
    gc.collect()
    source = Watched(shapes)
    mapped = Mapped(source, rules)
    assert not source.read
    own = {name: torch.zeros(mapped.meta(name).shape) for name in sorted(mapped.names())}
    if way == "fill":
        fill(own, mapped)
    elif way == "copies":
        own = copies(mapped)
    else:
        walked(mapped)
    assert sorted(source.read) == sorted(shapes), "each is read once"
    largest = max(math.prod(size) for size in shapes.values())
    assert source.peak == (largest if way == "fill" else most) * NUMBER, "what is filled is filled in its place"
    assert not source.alive
    if way != "walk":
        assert same(own, everything(Mapped(source, rules)))


def test_composition_reads_each_once_too() -> None:
    source = Watched(dict.fromkeys("qkv", (LAYERS, 10)))
    layers = Rules(tuple(rule(n, [f"h.{i}.{n}" for i in range(LAYERS)], Unstack(LAYERS)) for n in "qkv"))
    walked(Mapped(Mapped(source, layers), Rules((rule(QKV, "h.*.qkv", Concatenate(-1, (10,) * 3)),))))
    assert sorted(source.read) == ["k", "q", "v"] and source.peak == 3 * LAYERS * 10 * NUMBER and not source.alive


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3)
        self.head.weight = self.wte.weight


def test_copies_share_no_memory_with_what_they_are_made_of() -> None:
    """What a source gives may be views of parameters, which is what streams are for; copies may be kept and changed."""
    model = Tied()
    before = {name: t.clone() for name, t in weights(model).items()}
    rules = Rules((rule("wte.weight", ("embed", "lm_head"), Copies(2)), rule("head.bias", "bias")))
    mapped = Mapped(Tensors(dict(model.named_parameters())), rules)
    view, *_ = (mapped.get(name) for name in mapped.names())
    assert view.data_ptr() == model.wte.weight.data_ptr() and not view.requires_grad
    owned = copies(Mapped(Tensors(dict(model.named_parameters())), rules))
    memory = [t.untyped_storage().data_ptr() for t in (*owned.values(), *model.parameters())]
    assert len(set(memory)) == len(memory) == 5
    for t in owned.values():
        assert t.is_contiguous() and t._base is None and not t.requires_grad
        t.zero_()
    assert same(weights(model), before)
    turned = copies(Mapped(Tensors({"a": torch.ones(2, 3)}), Rules((rule("a", "b", Permute((1, 0))),))))["b"]
    assert turned.is_contiguous() and turned.untyped_storage().nbytes() == 6 * NUMBER


# Filling a model ------------------------------------------------------------------------------------------------------------------


def test_filling_copies_into_the_parameters_and_tells_changed_dtypes() -> None:
    model = Tied()
    own = weights(model)
    pointers = {name: t.data_ptr() for name, t in own.items()}
    source = {"wte.weight": torch.randn(3, 2, dtype=torch.float64), "head.bias": torch.randn(3).bfloat16()}
    kept = {name: t.clone() for name, t in source.items()}
    assert fill(own, Tensors(source)) == {"float64 to float32": 1, "bfloat16 to float32": 1}
    assert torch.equal(model.head.weight, source["wte.weight"].float())
    assert torch.equal(model.head.bias, source["head.bias"].float())
    assert {name: t.data_ptr() for name, t in weights(model).items()} == pointers and same(source, kept)
    assert model.head.weight.requires_grad and model.head.weight._version
    model.head.bias.data.zero_()
    assert same(source, kept), "they are not one memory now"
    assert fill(own, Tensors({name: t.float() for name, t in source.items()})) == {}
    parameters = dict(model.named_parameters())
    assert fill(parameters, Tensors(source)) and torch.equal(parameters["head.bias"], source["head.bias"].float())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"wte.weight": None}, "Missing, as no rule fills them: wte.weight."),
        ({"wte.weight": (2, 3)}, "wte.weight would be [2, 3], made of wte.weight; it is [3, 2]."),
        ({"head.bias": (1,)}, "head.bias would be [1], made of head.bias; it is [3]."),
        ({"more": (1,)}, "Left over, as the target has no such weights: more."),
    ],
)
def test_filling_changes_nothing_where_the_plan_is_wrong(change: dict[str, tuple[int, ...] | None], word: str) -> None:
    shapes = {k: v for k, v in ({"wte.weight": (3, 2), "head.bias": (3,)} | change).items() if v is not None}
    model = Tied()
    before = {name: t.clone() for name, t in weights(model).items()}
    with pytest.raises(Mismatch) as caught:
        fill(weights(model), Unreadable(shapes))
    assert caught.value.mistakes == [word]
    assert same(weights(model), before)


def test_names_of_any_kind_are_kept() -> None:
    odd = ["with space", "Grüße", "a/b\\c", "line\nbreak", "quote'\"", "st*r", "**", "a..b", ".", "{0}", "\\1", "%s"]
    given = {name: torch.full((1,), float(i)) for i, name in enumerate(odd)}
    own = {name: torch.zeros(1) for name in odd}
    fill(own, Tensors(given))
    assert same(own, given)


# Anything ------------------------------------------------------------------------------------------------------------------------


@st.composite
def mappings(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], Rules]:
    """Rules of a few kinds over layers, in any order, on sources in any order."""
    layers = draw(st.integers(1, 3))
    kinds: list[tuple[list[str], list[str], Step, list[tuple[int, ...]]]] = [
        (["h.*.a"], ["l.*.a"], TRANSPOSE, [(2, 3)]),
        (["h.*.b", "h.*.c"], ["l.*.bc"], Concatenate(-1, (1, 2)), [(2, 1), (2, 2)]),
        (["h.*.d"], ["l.*.e", "l.*.f"], Split(-2, (1, 2)), [(3, 1)]),
        (["h.*.g"], ["r.0.*", "r.1.*"], Copies(2), [(1,)]),
        (
            ["h.*.s", "h.*.t", "h.*.u", "h.*.v"],
            ["x.*", "y.*"],
            Chain((Transposed(2, 2), Batched(2, Stack(2)))),
            [(1,)] * 4,
        ),
    ]
    rules, shapes = [], dict[str, tuple[int, ...]]()
    for source, target, step, sizes in draw(st.permutations(kinds))[: draw(st.integers(1, len(kinds)))]:
        rules.append(rule(source, target, step))
        for i in range(layers):
            shapes |= {pattern.replace("*", str(i)): size for pattern, size in zip(source, sizes, strict=True)}
    names = draw(st.permutations(list(shapes)))
    return {name: shapes[name] for name in names}, Rules(tuple(draw(st.permutations(rules))))


@RANDOM
@given(mappings())
def test_every_mapping_is_undone_from_both_ends(case: tuple[dict[str, tuple[int, ...]], Rules]) -> None:
    shapes, rules = case
    source = Tensors(numbered(shapes))
    there = Mapped(source, rules)
    made = copies(there)
    wanted = {name: there.meta(name).shape for name in there.names()}
    assert same(everything(Mapped(Tensors(made), rules.inverse, shapes)), source.tensors)
    assert same(everything(Mapped(Mapped(Tensors(made), rules.inverse), rules, wanted)), made)


# In place -------------------------------------------------------------------------------------------------------------------


def at_random(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {name: torch.randn(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "each", "placed"),
    [
        ({"a": (4, 6), "b": (2, 6)}, rule(["a", "b"], "y", Concatenate(-2, (4, 2))), True),
        ({"a": (4, 6), "b": (4, 6)}, rule(["a", "b"], "y", Stack(2)), True),
        ({"a": (6, 4)}, rule("a", "y", TRANSPOSE), True),
        ({"a": (2, 3, 4)}, rule("a", ["y", "z"], Unstack(2)), False),
        (
            {"a": (12, 4)},
            rule("a", "y", Relayout(Layout((("q", 2), ("k", 1)), -2, 4), Layout((("q", 8), ("k", 4)), -2))),
            False,
        ),
        ({"a": (4,)}, rule("a", "y", Add(1.0)), False),
        ({"a": (5, 4)}, rule("a", "y", Cut(-2, 3, 5)), False),
        ({"a": (3, 4)}, rule("a", "y", Pad(-2, 3, 5)), False),
        ({"a": (3, 4), "b": (3, 4)}, rule(["a", "b"], "y", Agree(2)), False),
        ({"a": (3, 4)}, rule("a", "y", Numbers(1.25)), False),
        ({"a": (3, 2), "b": (3, 2)}, rule(["a", "b"], "y", Agree(2), Pad(-1, 2, 4)), False),
        ({"a": (4,)}, rule("a", ["y", "z"], Copies(2), Each(Cut(-1, 2, 4))), False),
    ],
    ids=[
        "concatenated",
        "stacked",
        "transposed",
        "unstacked",
        "interleaved",
        "added",
        "cut",
        "padded",
        "copied",
        "numbers",
        "copied and padded",
        "copied and cut",
    ],
)
def test_what_is_filled_in_its_place_is_what_would_be_made(
    shapes: dict[str, tuple[int, ...]], each: Rule, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only steps that move values and lose none are undone on the target; all others are carried out."""
    tensors = at_random(shapes)
    if "b" in tensors and not placed:
        tensors["b"] = tensors["a"].clone()
    mapped = Mapped(Tensors(tensors), Rules((each,)))
    wanted = copies(mapped)
    own = {name: torch.full_like(t, torch.nan) for name, t in wanted.items()}
    seen: list[bool] = []
    was = convert.mapping._placed

    def watched(*given: Any) -> bool:
        seen.append(was(*given))
        return seen[-1]

    monkeypatch.setattr(convert.mapping, "_placed", watched)
    fill(own, mapped)
    assert set(seen) == {placed}
    assert all(torch.equal(own[name], t) for name, t in wanted.items())
