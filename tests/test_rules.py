"""GRAMMAR, section 2: patterns against a slow matcher, and how rules resolve over the slices of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from conftest import Desk
from hypothesis import given, settings
from hypothesis import strategies as st
from models import config, read, sentence
from torch import nn

from core.addresses import pattern
from core.layout import Layout
from core.options import Reader, Variant, plain
from core.resolve import Resolver
from core.rules import Row, RuleMistakes, SliceRule
from core.slices import Declaration, Slice, declare, slices
from core.yaml_files import dump
from model import assemble
from variations import CATALOGUE
from variations.init.distributions import ZEROS

Front = Callable[..., tuple[int, str, str]]
Place = tuple[str, tuple[str, ...], bool]  # path, labels, whether an adapter adds it
RANDOM = settings(derandomize=True, deadline=None)

# A slow matcher: tokens one by one, every cut tried ---------------------------------------------------------------------


def tokenised(text: str) -> list[tuple[str, Any]]:
    made: list[tuple[str, Any]] = []
    i = 0
    while i < len(text):
        if text.startswith("**.", i) and (i == 0 or text[i - 1] == "."):
            made.append(("segments", None))
            i += 3
        elif text.startswith("**", i):
            made.append(("anything", None))
            i += 2
        elif text[i] == "*":
            made.append(("inside", None))
            i += 1
        elif text[i] == "{":
            end = text.index("}", i)
            low, high = text[i + 1 : end].split("..")
            made.append(("number", range(int(low), int(high) + 1)))
            i = end + 1
        else:
            made.append(("letter", text[i]))
            i += 1
    return made


def fits(tokens: list[tuple[str, Any]], text: str) -> bool:
    if not tokens:
        return not text
    (kind, what), rest = tokens[0], tokens[1:]
    if kind == "letter":
        return text[:1] == what and fits(rest, text[1:])
    if kind == "number":
        return any(text.startswith(str(n)) and fits(rest, text[len(str(n)) :]) for n in what)
    cuts = range(len(text) + 1)
    if kind == "inside":
        return any(fits(rest, text[i:]) for i in cuts if "." not in text[:i])
    if kind == "segments":
        return any(fits(rest, text[i:]) for i in cuts if i == 0 or text[i - 1] == ".")
    return any(fits(rest, text[i:]) for i in cuts)


def listed_parts(bracket: str) -> list[list[str]]:
    """The entries of a bracket, each as its labels: a dot separates unless it is in a range of numbers."""
    items: list[list[str]] = [[""]]
    deep = 0
    for letter in bracket:
        deep += {"{": 1, "}": -1}.get(letter, 0)
        if letter == ",":
            items.append([""])
        elif letter == "." and not deep:
            items[-1].append("")
        elif letter != " ":
            items[-1][-1] += letter
    return items


def somewhere(item: list[str], labels: tuple[str, ...]) -> bool:
    """Whether labels hold the item's, in their order, at any depth."""
    if not item:
        return True
    here = [i for i, label in enumerate(labels) if fits(tokenised(item[0]), label)]
    return any(somewhere(item[1:], labels[i + 1 :]) for i in here)


def meant(text: str, place: Place) -> bool:
    path, labels, adapter = place
    outside, _, after = text.partition("[")
    bracket, _, tail = after.partition("]")
    wanted = outside + tail
    if adapter != wanted.split(".")[-1].startswith("lora_"):
        return False
    owner, _, last = path.rpartition(".")
    explicit = wanted.endswith(("**", ".weight", ".bias"))
    if last in ("weight", "bias") and not explicit:
        hit = last == "weight" and fits(tokenised(wanted), owner)
    else:
        hit = fits(tokenised(wanted), path)
    return hit and (not after or any(somewhere(item, labels) for item in listed_parts(bracket)))


def spelt(place: Place) -> tuple[str, tuple[str, ...]]:
    """The parameter's name in the state dict and the labels of its layout, as the program has them."""
    path, labels, adapter = place
    if not adapter:
        return path, labels
    owner, _, leaf = path.rpartition(".")
    bracket = f"[{'.'.join(labels)}]" if labels else ""
    return f"{owner}.adapter{bracket}.{leaf}", ()


PLACES: list[Place] = [
    *((f"{name}.weight", (), False) for name in ("wte", "wpe", "head", "ln_f", "h.0.ln_1", "h.10.attn.proj", "h.3.ssm.conv")),
    *((f"h.{i}.attn.qkv.{leaf}", (x,), False) for i in (0, 3, 12) for leaf in ("weight", "bias") for x in "qkv"),
    *((f"h.{i}.mlp.gate_up.weight", (n, x), False) for i in (1, 3) for n in "ab" for x in ("gate", "up")),
    *(("h.3.moe.gate_up.weight", (str(e), x), False) for e in (0, 5, 11) for x in ("gate", "up")),
    *(("h.3.moe.gate_up.weight", (n, str(e), "gate"), False) for n in "ab" for e in (0, 5)),
    *((f"h.3.attn.qkv.lora_{n}", (x,), True) for n in "ab" for x in "qv"),
    *((f"h.3.mlp.up.lora_{n}", (), True) for n in ("a", "b", "magnitude")),
    ("h.3.ssm.A_log", (), False), ("wte.bias", (), False), ("h.0.bias.weight", (), False),
]  # fmt: skip


@st.composite
def patterns(draw: st.DrawFn, places: list[Place]) -> str:
    """A pattern that grew out of an address: segments cut, widened or replaced, parts listed or not."""
    path, labels, adapter = draw(st.sampled_from(places))
    segments = path.split(".")
    if segments[-1] in ("weight", "bias") and draw(st.booleans()):
        segments.pop()
    made = [draw(widened(segment)) for segment in segments]
    if adapter and draw(st.integers(0, 3)):
        made[-1] = segments[-1] if draw(st.booleans()) else "lora_*"
    if draw(st.integers(0, 2)) == 0:
        a, b = sorted((draw(st.integers(0, len(made))), draw(st.integers(0, len(made)))))
        made[a:b] = ["**"]
    text = ".".join(made)
    if draw(st.booleans()) or not labels:
        return text
    known = [place[1] for place in places if place[1]]
    items = []
    for some in [labels, *draw(st.lists(st.sampled_from(known), max_size=1))]:
        kept = [draw(widened(x)) for x in some if draw(st.integers(0, 2))] or [some[-1]]
        items.append(".".join(kept))
    head, _, leaf = text.rpartition(".")
    if leaf.startswith("lora_") and head and draw(st.booleans()):
        return f"{head}[{', '.join(items)}].{leaf}"
    return f"{text}[{','.join(items)}]"


def widened(word: str) -> st.SearchStrategy[str]:
    same = [word, word, word, "*", f"{word[:1]}*", f"*{word[-1:]}", f"{word}*"]
    if word.isdigit():
        n = int(word)
        same += [f"{{{max(0, n - 2)}..{n + 2}}}", f"{{0..{n}}}", f"{{{n + 1}..{n + 9}}}"]
    return st.sampled_from(same)


@settings(RANDOM, max_examples=400)
@given(patterns(PLACES))
def test_patterns_mean_what_a_slow_matcher_says(text: str) -> None:
    compiled = pattern(text)
    found = [place for place in PLACES if compiled.matches(*spelt(place))]
    assert found == [place for place in PLACES if meant(text, place)]


def test_the_slow_matcher_is_not_asked_about_nothing() -> None:
    """The strategy makes patterns that match some places and not all."""
    counts = []

    @settings(RANDOM, max_examples=150, database=None)
    @given(patterns(PLACES))
    def look(text: str) -> None:
        counts.append(sum(meant(text, place) for place in PLACES))

    look()
    some = [n for n in counts if 0 < n < len(PLACES)]
    assert len(some) > len(counts) / 2 and len(set(some)) > 5


# What patterns mean, by hand --------------------------------------------------------------------------------------------


def optimizer(node: Any) -> Variant:
    made = Reader(CATALOGUE).variant("optimizer", node, ())
    assert made is not None
    return made


def tell(rules: dict[str, Any], chosen: Any = "adamw", **model: Any) -> dict[str, Row]:
    """The table that rules make, by address. A rule may be a pattern, which then multiplies the learning rate by 2."""
    trees = {n: {"match": tree, "lr_scale": 2.0} if isinstance(tree, str) else tree for n, tree in rules.items()}
    made = {name: read(SliceRule, tree) for name, tree in trees.items()}
    _, rows = assemble(config(**model), made, optimizer(chosen))
    return {row.slice.address: row for row in rows}


def doubled(text: str, **model: Any) -> list[str]:
    return [address for address, row in tell({"x": text}, **model).items() if row.settings.lr_scale == 2.0]


GATED = {"linear": "pkl", "mlp": "gated", "norm": "rmsnorm", "bias": False, "tie_weights": False}


@pytest.mark.parametrize(
    ("text", "model", "addresses"),
    [
        ("h.1.attn.qkv[k]", {}, ["h.1.attn.qkv.weight[k]"]),
        ("h.1.attn.qkv", {}, [f"h.1.attn.qkv.weight[{x}]" for x in "qkv"]),
        ("h.1.attn.qkv.weight[ v , q ]", {}, [f"h.1.attn.qkv.weight[{x}]" for x in "qv"]),
        ("h.1.attn.qkv.bias", {}, [f"h.1.attn.qkv.bias[{x}]" for x in "qkv"]),
        ("h.1.attn.*", {}, [*(f"h.1.attn.qkv.weight[{x}]" for x in "qkv"), "h.1.attn.proj.weight"]),
        ("h.1.mlp.**", {}, [f"h.1.mlp.{x}.{y}" for x in ("up", "down") for y in ("weight", "bias")]),
        ("h.{1..9}.ln_1", {}, ["h.1.ln_1.weight"]),
        ("h.{0..1}.ln_*.bias", {}, [f"h.{i}.ln_{n}.bias" for i in (0, 1) for n in (1, 2)]),
        ("*", {}, ["wte.weight", "wpe.weight", "ln_f.weight"]),
        ("**.proj", {}, ["h.0.attn.proj.weight", "h.1.attn.proj.weight"]),
        ("**[k]", {}, [f"h.{i}.attn.qkv.{x}[k]" for i in (0, 1) for x in ("weight", "bias")]),
        ("h.0.attn.qkv[q]", GATED, ["h.0.attn.qkv.weight[a.q]", "h.0.attn.qkv.weight[b.q]"]),
        ("h.0.attn.qkv[a.q]", GATED, ["h.0.attn.qkv.weight[a.q]"]),
        ("h.0.attn.qkv[b]", GATED, [f"h.0.attn.qkv.weight[b.{x}]" for x in "qkv"]),
        ("h.0.mlp.gate_up[gate]", GATED, ["h.0.mlp.gate_up.weight[a.gate]", "h.0.mlp.gate_up.weight[b.gate]"]),
        ("h.0.mlp.gate_up[a.gate, b.up]", GATED, ["h.0.mlp.gate_up.weight[a.gate]", "h.0.mlp.gate_up.weight[b.up]"]),
        ("head", {"tie_weights": False}, ["head.weight"]),
        ("head", {}, ["wte.weight"]),
        ("wte", {}, ["wte.weight"]),
    ],
)
def test_patterns_over_models_by_hand(text: str, model: dict[str, Any], addresses: list[str]) -> None:
    assert doubled(text, **model) == addresses


class Experts(nn.Module):
    """Stacked experts, plain and of two numbers each."""

    def __init__(self) -> None:
        super().__init__()
        experts, parts = tuple(str(i) for i in range(12)), (("gate", 2), ("up", 2))
        one = Declaration(Layout(parts, -2, stack=(experts,)), "matrix", ZEROS)
        two = Declaration(Layout(parts, -2, stack=(("a", "b"), experts)), "matrix", ZEROS)
        declare(self, "plain", (12, 4, 3), one)
        declare(self, "pkl", (2, 12, 4, 3), two)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("moe.plain[gate]", 12), ("moe.plain[5.gate]", 1), ("moe.plain[5]", 2), ("moe.plain[{0..5}.gate]", 6),
        ("moe.pkl[gate]", 24), ("moe.pkl[5.gate]", 2), ("moe.pkl[a.gate]", 12), ("moe.pkl[a.5]", 2), ("moe.pkl[b.5.up]", 1),
        ("moe.pkl[1*.up]", 6), ("moe.*[1.gate,2.up]", 6), ("moe.**", 72), ("moe.pkl[gate.a]", 0), ("moe.pkl[5.a]", 0),
    ],
)  # fmt: skip
def test_brackets_list_parts_at_any_depth_of_nesting(text: str, count: int) -> None:
    found = slices(nn.ModuleDict({"moe": Experts()}))
    hits = [part for part in found if pattern(text).matches(part.parameter, part.labels)]
    assert len(found) == 72 and len(hits) == count
    assert hits == [part for part in found if meant(text, (part.parameter, part.labels, False))]


@cache
def known(which: str) -> tuple[list[Slice], Resolver]:
    """The slices of a model, one of them with adapters, and what resolves rules over them."""
    trees: dict[str, dict[str, Any]] = {"plain": {}, "gated": GATED, "adapted": {"n_layer": 3}}
    lora = {"match": ["h.*.attn.qkv[q,v]", "h.{1..2}.mlp.*"], "lora": {"rank": 2}}
    rules = {"l": read(SliceRule, lora)} if which == "adapted" else {}
    model, _ = assemble(config(**trees[which]), rules, optimizer("sgd"))
    return slices(model), Resolver(slices(model), CATALOGUE)


def names_of(part: Slice) -> list[Place]:
    """A slice under each name of its parameter."""
    owner, found, rest = part.parameter.partition(".adapter")
    if not found:
        return [(name, part.labels, False) for name in (part.parameter, *part.aliases)]
    bracket, _, leaf = rest.rpartition(".")
    labels = tuple(bracket[1:-1].split(".")) if bracket else ()
    return [(f"{owner}.{leaf}", labels, True)]


@pytest.mark.parametrize("which", ["plain", "gated", "adapted"])
def test_rules_hit_the_slices_that_a_slow_matcher_says(which: str) -> None:
    listed, resolver = known(which)
    places = [place for part in listed for place in names_of(part)]
    node = optimizer("sgd")

    @settings(RANDOM, max_examples=60, database=None)
    @given(st.lists(patterns(places), min_size=1, max_size=2), st.lists(patterns(places), max_size=1))
    def look(match: list[str], excepted: list[str]) -> None:
        rule = read(SliceRule, {"match": match, "except": excepted, "optional": True, "lr_scale": 3.0})
        rows = resolver.resolve({"x": rule}, node)
        hit = [row.slice.address for row in rows if row.settings.lr_scale == 3.0]
        assert hit == [
            part.address for part in listed
            if any(any(meant(t, p) for t in match) and not any(meant(t, p) for t in excepted) for p in names_of(part))
        ]  # fmt: skip
        assert all(("x" in row.rules) == (row.slice.address in hit) for row in rows)

    look()


def test_adapters_have_the_addresses_of_the_grammar_and_patterns_reach_them_by_name_only() -> None:
    lora = {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 2}}
    whole = {"match": "h.1.mlp.up", "lora": {"variant": "dora", "rank": 3}}
    rules = {"lora": lora, "whole": whole, "all": "**", "a": "h.1.attn.qkv[q].lora_a", "b": "h.*.**.lora_b"}
    rows = tell(rules)
    added = {address: row for address, row in rows.items() if "lora_" in address}
    parts = [f"h.{i}.attn.qkv[{x}].lora_{n}" for i in (0, 1) for x in "qv" for n in "ab"]
    assert list(added) == [*parts, *(f"h.1.mlp.up.lora_{n}" for n in ("a", "b", "magnitude"))]
    scales = {address: row.settings.lr_scale for address, row in added.items()}
    assert {address for address, scale in scales.items() if scale == 2.0} == {
        "h.1.attn.qkv[q].lora_a", *(address for address in added if address.endswith("lora_b"))
    }  # fmt: skip
    assert set(scales.values()) == {1.0, 2.0}, "'**' passes adapters by"
    assert all(row.settings.lr_scale == 2.0 for address, row in rows.items() if address not in added)
    assert added["h.0.attn.qkv[q].lora_a"].slice.shape == (2, 16) and added["h.1.mlp.up.lora_b"].slice.shape == (64, 3)


# Resolution -------------------------------------------------------------------------------------------------------------

Q = "h.0.attn.qkv.weight[q]"


def test_lr_scale_multiplies_and_of_everything_else_the_later_rule_counts() -> None:
    rules = {
        "a": {
            "match": "h.**",
            "lr_scale": 0.5,
            "weight_decay": 0.3,
            "learning_rate": 0.1,
            "init": "zeros",
            "frozen": True,
        },
        "b": {"match": "h.*.attn.qkv[q,k]", "lr_scale": 0.3, "weight_decay": 0.0, "betas": [0.8, 0.9], "frozen": False},
        "c": {"match": "h.0.**", "lr_scale": 4.0, "learning_rate": 0.2, "init": {"variant": "normal", "std": 0.5}},
        "d": {"match": "h.0.attn.qkv[q]", "betas": [0.7, 0.99]},
    }
    row = tell(rules)[Q]
    s = row.settings
    assert s.lr_scale == pytest.approx(0.5 * 0.3 * 4.0)
    assert (s.learning_rate, s.weight_decay, s.frozen) == (0.2, 0.0, False)
    assert row.learning_rate == pytest.approx(0.2 * 0.6), "an absolute rate is a base that lr_scale multiplies"
    assert s.optimizer.options.betas == (0.7, 0.99) and str(row.init) == "normal(std=0.5)"
    assert s.origins == {
        "lr_scale": ("a", "b", "c"), "learning_rate": ("c",), "weight_decay": ("b",), "frozen": ("b",), "betas": ("d",),
        "init": ("c",),
    }  # fmt: skip
    assert sorted(row.rules) == ["a", "b", "c", "d"]
    other = tell(dict(reversed(rules.items())))[Q].settings
    assert other.lr_scale == pytest.approx(0.6) and other.origins["lr_scale"] == ("c", "b", "a")
    assert (other.learning_rate, other.weight_decay, other.frozen) == (0.1, 0.3, True)
    assert other.optimizer.options.betas == (0.8, 0.9) and str(other.init or "") == "zeros"


def test_the_later_optimizer_counts_and_brings_its_own_numbers_where_no_rule_says_them() -> None:
    rules = {
        "a": {"match": "**", "optimizer": {"variant": "lion", "learning_rate": 0.3}},
        "b": {"match": "h.**", "optimizer": {"variant": "sgd", "weight_decay": 0.4, "learning_rate": 0.7}},
        "c": {"match": "h.1.**", "learning_rate": 0.2},
    }
    rows = tell(rules)
    told = {n: (row.settings.optimizer.name, row.learning_rate, row.settings.weight_decay) for n, row in rows.items()}
    assert told["wte.weight"] == ("lion", 0.3, 0.1) and told[Q] == ("sgd", 0.7, 0.4)
    assert told["h.1.mlp.up.weight"] == ("sgd", 0.2, 0.4) and rows["h.1.mlp.up.weight"].rules == ("b", "c")
    assert rows[Q].rules == ("b",) and rows["wte.weight"].rules == ("a",)


def test_a_row_names_no_rule_whose_word_did_not_count() -> None:
    rules = {"a": {"match": "**", "weight_decay": 0.3}, "b": {"match": "h.**", "weight_decay": 0.2}, "c": "h.1.**"}
    rows = tell(rules)
    assert rows[Q].rules == ("b",) and rows["wte.weight"].rules == ("a",)
    assert sorted(rows["h.1.ln_1.bias"].rules) == ["b", "c"], "the default is overridden, and not named"


def test_without_rules_the_default_treatment_is_named() -> None:
    rows = tell({}, {"variant": "adamw", "weight_decay": 0.2})
    for row in rows.values():
        vector = len(row.slice.shape) == 1
        assert row.settings.weight_decay == (0.0 if vector else 0.2)
        assert row.rules == (("default.no_decay_on_vectors",) if vector else ())
        assert (row.settings.lr_scale, row.settings.frozen, row.settings.lora) == (1.0, False, None)
        assert row.init is row.slice.declaration.init


def test_the_default_treatment_of_muon_is_named_and_overridden() -> None:
    muon = {"variant": "muon", "learning_rate": 0.03, "rest": {"variant": "sgd", "learning_rate": 0.5}}
    rows = tell({"head": {"match": "wte", "optimizer": "muon"}, "v": {"match": Q[:-3], "optimizer": "lion"}}, muon)
    told = {address: row.settings.optimizer.name for address, row in rows.items()}
    assert {a for a, name in told.items() if name == "muon"} == {
        "wte.weight", *(a for a, row in rows.items() if row.slice.declaration.role == "matrix" and not a.startswith(Q[:-3]))
    }  # fmt: skip
    assert {a for a, name in told.items() if name == "lion"} == {f"{Q[:-3]}[{x}]" for x in "qkv"}
    assert rows["wpe.weight"].rules == ("default.rest",) and rows["wpe.weight"].learning_rate == 0.5
    assert rows["h.0.ln_1.bias"].settings.origins["optimizer"] == ("default.rest",)
    assert rows["h.0.mlp.up.weight"].rules == () and rows["h.0.mlp.up.weight"].learning_rate == 0.03
    assert rows["wte.weight"].rules == ("head",) and rows["wte.weight"].learning_rate == 0.02, "muon's own default"


def test_pkls_step_is_a_default_rule_that_multiplies_with_the_users() -> None:
    model = {**GATED, "linear": {"variant": "pkl", "scale": -3.0, "compensate_step": True}}
    rows = tell({"k": {"match": "h.0.attn.qkv[k]", "lr_scale": 0.5}, "b": {"match": "**[b]", "lr_scale": 8.0}}, **model)
    k = {x: rows[f"h.0.attn.qkv.weight[{x}.k]"] for x in "ab"}
    assert (k["a"].settings.lr_scale, k["b"].settings.lr_scale) == (0.125, 1.0)
    assert k["a"].rules == ("default.pkl_step", "k") and k["b"].rules == ("default.pkl_step", "k", "b")
    assert rows["wte.weight"].settings.lr_scale == 1.0
    assert tell({}, **GATED)["h.0.attn.qkv.weight[a.k]"].rules == ()


def test_decay_on_vectors_is_a_users_choice() -> None:
    rows = tell({"all": {"match": "**", "weight_decay": 0.4}})
    assert {row.settings.weight_decay for row in rows.values()} == {0.4} and rows["ln_f.bias"].rules == ("all",)


@pytest.mark.parametrize("match", ["wte", "wpe", "h.*.mlp.up"])
def test_muon_takes_embeddings_when_a_rule_says_so(match: str) -> None:
    rows = tell({"x": {"match": match, "optimizer": {"variant": "muon", "learning_rate": 0.04}}})
    hit = [row for row in rows.values() if row.settings.optimizer.name == "muon"]
    assert hit and all(row.rules == ("x",) and row.learning_rate == 0.04 for row in hit)


def test_muon_over_a_whole_block_leaves_vectors_to_its_rest() -> None:
    muon = {"variant": "muon", "rest": {"variant": "lion", "learning_rate": 0.007}}
    rows = tell({"x": {"match": "h.**", "optimizer": muon}})
    for address, row in rows.items():
        s = row.settings
        if not address.startswith("h."):
            assert s.optimizer.name == "adamw" and "optimizer" not in s.origins
        elif row.slice.declaration.role == "vector":
            assert (s.optimizer.name, row.learning_rate, s.origins["optimizer"]) == (
                "lion",
                0.007,
                ("x", "default.rest"),
            )
        else:
            assert (s.optimizer.name, row.learning_rate, s.origins["optimizer"]) == ("muon", 0.02, ("x",))
    assert "muon can take none of what the rule matches" in sentence(
        lambda: tell({"x": {"match": "**.bias", "optimizer": "muon"}})
    )


def test_betas_go_to_the_optimizers_that_have_them() -> None:
    rows = tell({"x": {"match": "h.**", "betas": [0.5, 0.6]}}, "muon")
    assert rows["h.0.ln_1.bias"].settings.optimizer.options.betas == (0.5, 0.6) and "x" in rows["h.0.ln_1.bias"].rules
    assert rows["h.0.mlp.up.weight"].rules == () and rows["wte.weight"].settings.optimizer.options.betas == (0.9, 0.99)
    assert "has no betas" in sentence(lambda: tell({"x": {"match": "**", "betas": [0.5, 0.6]}}, "sgd"))


def test_except_and_lists_of_patterns() -> None:
    rows = tell({"x": {"match": ["h.**", "wte"], "except": ["h.0.**", "**.ln_*", "**[k,v]"], "lr_scale": 2.0}})
    assert [a for a, row in rows.items() if row.settings.lr_scale == 2.0 and a.endswith(("weight", "]"))] == [
        "wte.weight", "h.1.attn.qkv.weight[q]", "h.1.attn.qkv.bias[q]", "h.1.attn.proj.weight", "h.1.mlp.up.weight",
        "h.1.mlp.down.weight",
    ]  # fmt: skip


def test_a_rule_may_match_nothing_if_it_says_so() -> None:
    rule = {"match": "h.*.moe.gate_up[gate]", "except": "h.9.**", "lr_scale": {"depth": [1.0, 2.0]}}
    with_it, without = (tell(rules) for rules in ({"x": {**rule, "optional": True}}, {}))
    assert all(row.settings == without[address].settings for address, row in with_it.items())
    told = sentence(lambda: tell({"x": rule, "y": "h.*.attn.qkv[q,z]"}))
    assert "slices.x.match: 'h.*.moe.gate_up[gate]' matches nothing" in told
    assert "slices.y.match: 'h.*.attn.qkv[q,z]': there is no part 'z' there. Known: k, q, v." in told


# Depth ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "ends", "expected"),
    [
        ("h.**", [1.0, 0.0625], [1.0, 0.5, 0.25, 0.125, 0.0625]),
        ("h.**", [0.01, 100.0], [0.01, 0.1, 1.0, 10.0, 100.0]),
        (["h.1.**", "h.2.**", "h.4.**"], [1.0, 0.125], [None, 1.0, 0.5, None, 0.125]),
        (["h.0.**", "h.3.**"], [3.0, 5.0], [3.0, None, None, 5.0, None]),
        (["h.0.**", "h.1.**", "h.4.**"], [16.0, 1.0], [16.0, 8.0, None, None, 1.0]),
        ("h.2.**", [0.7, 0.1], [None, None, 0.7, None, None]),
        ("h.{2..3}.attn.qkv[q]", [0.7, 0.1], [None, None, 0.7, 0.1, None]),
        ("h.**", [0.3, 0.3], [0.3] * 5),
    ],
)
@pytest.mark.parametrize("name", ["lr_scale", "learning_rate", "weight_decay"])
def test_depth_is_geometric_from_the_first_matched_layer_to_the_last(
    name: str, match: Any, ends: list[float], expected: list[float | None]
) -> None:
    rows = tell({"x": {"match": match, name: {"depth": ends}}}, n_layer=5)
    usual = {"lr_scale": 1.0, "learning_rate": 1e-3, "weight_decay": 0.1}[name]
    got = [getattr(rows[f"h.{i}.attn.qkv.weight[q]"].settings, name) for i in range(5)]
    # A power and a product each round once.
    assert got == pytest.approx([usual if x is None else x for x in expected], rel=1e-14)
    hit = [i for i, x in enumerate(expected) if x is not None]
    assert got[hit[0]] == ends[0] and (len(hit) == 1 or got[hit[-1]] == ends[1]), "the ends are exact"


def test_depth_counts_what_is_left_after_the_exceptions_and_multiplies() -> None:
    rules = {"d": {"match": "h.**", "except": ["h.0.**", "h.4.**"], "lr_scale": {"depth": [1.0, 0.25]}}, "x": "h.2.**"}
    rows = tell(rules, n_layer=5)
    assert [rows[f"h.{i}.mlp.up.bias"].settings.lr_scale for i in range(5)] == [1.0, 1.0, 1.0, 0.25, 1.0]
    assert rows["h.2.mlp.up.bias"].settings.origins["lr_scale"] == ("d", "x")


def test_depth_is_for_layers_alone() -> None:
    told = sentence(lambda: tell({"x": {"match": ["h.**", "ln_f"], "lr_scale": {"depth": [1.0, 2.0]}}}))
    assert told == (
        "slices.x.lr_scale: it depends on the depth, and ln_f.weight lies in no layer. Match layers alone, such as 'h.**'."
    )


def test_depth_over_adapters_is_by_the_layer_they_are_in() -> None:
    lora = {"match": "h.*.attn.qkv[v]", "lora": {"rank": 1}}
    rows = tell({"l": lora, "x": {"match": "**.lora_*", "lr_scale": {"depth": [1.0, 9.0]}}}, n_layer=3)
    got = [rows[f"h.{i}.attn.qkv[v].lora_a"].settings.lr_scale for i in range(3)]
    assert got == pytest.approx([1.0, 3.0, 9.0], rel=1e-14)


# Tied weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wte", "head", "*.weight", "{0..1}*", "wte.weight"])
def test_tied_weights_are_one_set_of_slices_under_either_name(name: str) -> None:
    if name.startswith("{"):
        assert "matches nothing" in sentence(lambda: tell({"x": name}))
        return
    row = tell({"x": {"match": name, "lr_scale": 0.5, "init": "ones", "weight_decay": 0.7}})["wte.weight"]
    assert (row.settings.lr_scale, row.settings.weight_decay, str(row.init)) == (0.5, 0.7, "ones")
    assert set(row.rules) == {"x"}


AGREE: list[dict[str, Any]] = [
    {"a": {"match": "wte", "weight_decay": 0.3}, "b": {"match": "head", "weight_decay": 0.3}},
    {"a": {"match": "wte", "lr_scale": 0.3}, "b": {"match": "head", "weight_decay": 0.3}},
    {"a": {"match": "head", "weight_decay": 0.3}, "b": {"match": "wte", "lr_scale": 0.3}},
    {"a": {"match": "**", "weight_decay": 0.9, "lr_scale": 0.3}, "b": {"match": "wte", "weight_decay": 0.3}},
    {"a": {"match": "head", "weight_decay": 0.5, "lr_scale": 0.3}, "b": {"match": "**", "weight_decay": 0.3}},
    {"a": {"match": "wte", "weight_decay": 0.5}, "b": {"match": "head", "lr_scale": 0.3},
     "c": {"match": ["wte", "head"], "weight_decay": 0.3}},
]  # fmt: skip


@pytest.mark.parametrize("rules", AGREE)
def test_rules_that_agree_through_different_names_hold(rules: dict[str, Any]) -> None:
    s = tell(rules)["wte.weight"].settings
    said = {name for rule in rules.values() for name in rule if name != "match"}
    assert s.weight_decay == 0.3 and s.lr_scale == (0.3 if "lr_scale" in said else 1.0)


def test_the_same_factor_through_both_names_is_said_once() -> None:
    rows = tell({"a": {"match": "wte", "lr_scale": 0.5}, "b": {"match": "head", "lr_scale": 0.5}})
    assert rows["wte.weight"].settings.lr_scale == 0.5


DISAGREE: list[tuple[str, Any, Any]] = [
    ("lr_scale", 0.5, 0.1), ("learning_rate", 0.5, 0.1), ("weight_decay", 0.5, 0.1), ("frozen", True, False),
    ("init", "zeros", "ones"), ("init", {"variant": "normal", "std": 0.1}, {"variant": "normal", "std": 0.2}),
    ("optimizer", "sgd", "lion"), ("optimizer", {"variant": "sgd", "momentum": 0.1}, {"variant": "sgd", "momentum": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "one", "two"), DISAGREE)
@pytest.mark.parametrize("order", [("wte", "head"), ("head", "wte")])
def test_rules_that_disagree_through_different_names_are_an_error(
    name: str, one: Any, two: Any, order: tuple[str, str]
) -> None:
    rules = {"first": {"match": order[0], name: one}, "second": {"match": order[1], name: two}}
    with pytest.raises(RuleMistakes) as caught:
        tell(rules)
    (told,) = caught.value.mistakes
    assert told.path[0] == "slices" and {told.path[1], *(x for x in rules if f"'{x}'" in told.text)} == {
        "first",
        "second",
    }
    assert told.path[2] == name and "wte.weight and head.weight are one tied weight" in told.text
    assert "model.tie_weights: false" in told.advice
    rows = tell(rules, tie_weights=False)
    assert rows["wte.weight"].settings != rows["head.weight"].settings, "untied they are two weights"


def test_parts_of_a_tied_weight_are_compared_one_by_one() -> None:
    pkl = {"embedding": "pkl", "head": "pkl"}
    rows = tell({"a": {"match": "wte[a]", "lr_scale": 0.5}, "b": {"match": "head[b]", "lr_scale": 0.1}}, **pkl)
    assert [rows[f"wte.weight[{x}]"].settings.lr_scale for x in "ab"] == [0.5, 0.1]
    told = sentence(
        lambda: tell({"a": {"match": "wte", "lr_scale": 0.5}, "b": {"match": "head[b]", "lr_scale": 0.1}}, **pkl)
    )
    assert "one tied weight" in told


# LoRA and init by rules -------------------------------------------------------------------------------------------------


def test_lora_null_turns_an_earlier_rules_lora_off() -> None:
    lora = {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 2}}
    rows = tell({"on": lora, "off": {"match": ["h.0.**", "**[q]"], "lora": None}})
    assert [a for a in rows if "lora_" in a] == ["h.1.attn.qkv[v].lora_a", "h.1.attn.qkv[v].lora_b"]
    assert rows[Q].settings.lora is None and rows[Q].rules == ("off",)
    again = tell({"off": {"match": "**", "lora": None}, "on": lora})
    assert sum("lora_" in a for a in again) == 8, "the later rule counts"


def test_the_later_lora_counts_and_keeps_nothing_of_the_earlier() -> None:
    one = {"match": "h.0.mlp.*", "lora": {"rank": 4, "alpha": 99.0}}
    rows = tell({"one": one, "two": {"match": "h.0.mlp.up", "lora": {"variant": "dora", "rank": 1}}})
    up, down = (rows[f"h.0.mlp.{x}.weight"].settings.lora for x in ("up", "down"))
    assert up is not None and down is not None
    assert (up.name, up.options.rank, up.options.alpha) == ("dora", 1, 16.0) and down.options.alpha == 99.0
    assert rows["h.0.mlp.up.lora_a"].slice.shape == (1, 16) and rows["h.0.mlp.down.lora_b"].slice.shape == (16, 4)


def test_frozen_is_about_the_base() -> None:
    rows = tell({"f": {"match": "**", "frozen": True}, "l": {"match": "h.0.mlp.up", "lora": {"rank": 2}}})
    assert [a for a, row in rows.items() if not row.settings.frozen] == ["h.0.mlp.up.lora_a", "h.0.mlp.up.lora_b"]


# Through files ----------------------------------------------------------------------------------------------------------

TINY = "model: {n_layer: 2, n_embd: 16, n_head: 2}\n"


def table(front: Front, desk: Desk, text: str, *words: str) -> dict[str, dict[str, Any]]:
    """What --slices says of a file."""
    code, out, told = front("--config", str(desk.write(text)), "--slices", "--json", *words)
    assert (code, told) == (0, "")
    return {row["address"]: row for row in json.loads(out)}


def test_a_rule_that_a_later_file_redefines_moves_to_that_files_place(desk: Desk, front: Front) -> None:
    desk.preset("calm", "slices: {a: {match: '**', weight_decay: 0.5}, b: {match: '**', weight_decay: 0.6}}")
    text = "defaults: [presets/calm, _self_]\n" + TINY
    assert table(front, desk, text)[Q]["rules"] == ["b"]
    made = desk.config(text + "slices: {a: {lr_scale: 2}}")
    assert list(made.slices) == ["b", "a"]
    assert (made.slices["a"].match, made.slices["a"].weight_decay, made.slices["a"].lr_scale) == ("**", 0.5, 2.0)
    row = table(front, desk, text + "slices: {a: {lr_scale: 2}}")[Q]
    assert (row["weight_decay"], row["lr_scale"], row["rules"]) == (0.5, 2.0, ["a"])
    moved = desk.config(text + "slices: {c: {match: wte, frozen: true}, a: {match: wpe}}")
    assert list(moved.slices) == ["b", "c", "a"] and moved.slices["a"].match == "wpe"
    assert list(desk.config(text, "slices.a.weight_decay=0.7").slices) == ["a", "b"], "a single setting moves no rule"


def test_null_removes_a_rule(desk: Desk) -> None:
    desk.preset("calm", "slices: {a: {match: '**', weight_decay: 0.5}, b: {match: '**', weight_decay: 0.6}}")
    text = "defaults: [presets/calm, _self_]\n" + TINY
    bare = desk.listed(text.replace("presets/calm, ", "") + "slices: {a: {match: '**', weight_decay: 0.5}}").runs[0]
    for run in (
        desk.listed(text + "slices: {b: null}").runs[0],
        desk.listed(text, "slices.b=null").runs[0],
        desk.listed(text, "~slices.b").runs[0],
        desk.listed(text + "sweep: {cases: {x: {set: {slices.b: null}}}}").runs[0],
    ):
        assert list(run.config.slices) == ["a"] and run.hash == bare.hash
    none = desk.listed(text + "slices: {a: null, b: null}").runs[0]
    assert none.hash == desk.listed(TINY).runs[0].hash


def test_an_init_without_a_name_is_about_the_models_own(desk: Desk) -> None:
    rule = "slices: {v: {match: '**[v]', init: {std: 0.5}}}"
    for model, name in (
        ("", "normal"),
        (", init: uniform", "uniform"),
        (", init: {variant: mup, base_width: 8}", "mup"),
    ):
        chosen = desk.config(TINY.replace("}", f"{model}}}") + rule).slices["v"].init
        assert (chosen.name, chosen.options.std) == (name, 0.5)
    assert chosen.options.base_width == 8, "what the rule does not say stays"
    (told,) = desk.wrong(TINY.replace("}", ", init: zeros}") + rule)
    assert "slices.v.init.std: unknown key (x.yaml:2)" in told


def test_an_optimizer_without_a_name_is_about_the_runs_own(desk: Desk) -> None:
    rule = "slices: {v: {match: '**[v]', optimizer: {learning_rate: 0.5}}}\n"
    for own, name in (("{betas: [0.1, 0.2]}", "adamw"), ("lion", "lion"), ("{variant: muon, momentum: 0.1}", "muon")):
        chosen = desk.config(f"{TINY}{rule}optimizer: {own}").slices["v"].optimizer
        assert (chosen.name, chosen.options.learning_rate) == (name, 0.5)
    assert chosen.options.momentum == 0.1
    assert desk.config(TINY + rule).slices["v"].optimizer.options.betas == (0.9, 0.99)
    named = desk.config(
        TINY + rule.replace("{learning", "{variant: adamw, learning") + "optimizer: {betas: [0.1, 0.2]}"
    )
    assert named.slices["v"].optimizer.options.betas == (0.9, 0.99), "naming a variant begins anew"


def test_of_a_swept_optimizer_each_run_has_its_own(desk: Desk) -> None:
    text = (
        TINY
        + "slices: {v: {match: '**[v]', optimizer: {learning_rate: 0.5}}}\nsweep: {grid: {optimizer: [adamw, sgd]}}"
    )
    assert desk.values(text, "slices.v.optimizer") == ["adamw", "sgd"]


# The whole table of fields in one file: every one of them said by some rule.
EVERY = (
    TINY
    + """slices:
  a: {match: ["h.*.attn.qkv[q,v]", "h.{0..1}.mlp.up"], except: ["h.1.**[v]"], lora: {rank: 2, alpha: 3.5, dropout: 0.1}}
  b: {match: "h.**", lr_scale: {depth: [1.0, 0.3]}, weight_decay: {depth: [0.1, 0.2]}, learning_rate: {depth: [0.1, 0.3]}}
  c: {match: "h.*.moe.**", optional: true, lr_scale: 1e-3, frozen: true}
  d: {match: "**[k]", optimizer: {variant: adamw, eps: 0.1}, betas: [0.5, 0.25], init: {std: 0.5, scale_residual: false}}
  e: {match: "h.1.attn.**", lora: null, frozen: false}
  f: {match: "h.0.attn.proj", optimizer: {variant: muon, heads_apart: true, rest: sgd}, init: zeros, learning_rate: 0.0}
  g: {match: "**.lora_*", lr_scale: 16, weight_decay: 0}
"""
)


def test_a_config_written_and_read_again_is_the_same(desk: Desk) -> None:
    run = desk.listed(EVERY).runs[0]
    assert {name for rule in run.config.slices.values() for name in rule.settings()} == {
        "lr_scale", "learning_rate", "weight_decay", "optimizer", "betas", "init", "lora", "frozen"
    }  # fmt: skip
    again = desk.listed(dump(plain(run.config)), name="again.yaml").runs[0]
    assert again.config == run.config and again.hash == run.hash
    assert list(again.config.slices) == list("abcdefg")
    third = desk.listed(json.dumps(plain(again.config)), name="third.json").runs[0]
    assert third.config == run.config and third.hash == run.hash


# Identity ---------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "match": "wpe", "except": "wpe", "optional": "true", "lr_scale": "0.25", "learning_rate": "0.5", "weight_decay": "0.1",
    "optimizer": "lion", "betas": "[0.9, 0.99]", "init": "normal", "lora": "null", "frozen": "false",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_identity_changes_with_every_setting(desk: Desk, name: str) -> None:
    """Also where the value said is what would hold anyway: what was asked for is another thing."""
    base = TINY + "slices: {a: {match: [wte, wpe], lr_scale: 0.5}}\n"
    changed = desk.listed(base, f"slices.a.{name}={SETTINGS[name]}").runs[0]
    assert changed.hash != desk.listed(base).runs[0].hash


def test_identity_changes_with_the_order_of_rules_and_their_names(desk: Desk) -> None:
    a, b = "a: {match: '**', weight_decay: 0.5}", "b: {match: wte, weight_decay: 0.6}"
    texts = [f"slices: {{{a}, {b}}}", f"slices: {{{b}, {a}}}", f"slices: {{{a}}}", "slices: {}"]
    hashes = [desk.listed(TINY + text).runs[0].hash for text in texts]
    assert len(set(hashes)) == 4 and hashes[3] == desk.listed(TINY).runs[0].hash
    keys = "slices: {a: {weight_decay: 0.50, match: '**'}, b: {weight_decay: 6e-1, match: 'wte'}}"
    assert desk.listed(TINY + keys).runs[0].hash == hashes[0], "the order of keys and how numbers are written do not"


# Sweeps -----------------------------------------------------------------------------------------------------------------

K = TINY + "slices: {k: {match: 'h.*.attn.qkv[k]', lr_scale: 1.0}}\n"


def test_sweeps_over_settings_of_a_rule(desk: Desk) -> None:
    assert desk.values(K + "sweep: {grid: {slices.k.lr_scale: [0.1, 0.3, 1.0]}}", "slices.k.lr_scale") == [
        0.1,
        0.3,
        1.0,
    ]
    inits = K + "sweep: {grid: {slices.k.init: [zeros, {variant: normal, std: 0.01}, {std: 0.5}]}}"
    assert [str(plain(v)) for v in (run.config.slices["k"].init for run in desk.listed(inits).runs)] == [
        "{'variant': 'zeros'}", "{'variant': 'normal', 'scale_residual': True, 'std': 0.01}",
        "{'variant': 'normal', 'scale_residual': True, 'std': 0.5}",
    ]  # fmt: skip
    deep = K + "sweep: {grid: {slices.k.lr_scale: [0.5, {depth: [1.0, 0.3]}]}}"
    one, two = desk.values(deep, "slices.k.lr_scale")
    assert one == 0.5 and two.depth == (1.0, 0.3)


@pytest.mark.parametrize("base", ["", ", lora: null", ", lora: {rank: 4, alpha: 3}"])
def test_sweeps_over_an_adapter(desk: Desk, base: str) -> None:
    text = (
        K.replace("1.0}", f"1.0{base}}}")
        + "sweep: {grid: {slices.k.lora: [null, {rank: 2}, {variant: dora, rank: 3}]}}"
    )
    listing = desk.listed(text)
    chosen: list[Any] = [run.config.slices["k"].lora for run in listing.runs]
    assert [node.name for node in chosen] == ["none", "lora", "dora"]
    assert [node.options.rank for node in chosen[1:]] == [2, 3]
    assert chosen[1].options.alpha == (3.0 if "alpha" in base else 16.0), "a mapping without a name merges"
    assert chosen[2].options.alpha == 16.0, "with one it replaces"
    assert len({run.hash for run in listing.runs}) == 3


def test_groups_that_set_several_fields_of_rules(desk: Desk) -> None:
    text = (
        K
        + """sweep:
  groups:
    keys:
      plain: {}
      calm: {slices.k.lr_scale: 0.3, slices.k.weight_decay: 0.0, slices.v.match: "**[v]", slices.v.init: {std: 0.01}}
  grid: {train.seed: [1, 2]}
"""
    )
    runs = [run for run in desk.listed(text).runs if run.config.train.seed == 1]
    assert [list(run.config.slices) for run in runs] == [["k"], ["k", "v"]]
    calm: Any = runs[1].config.slices
    assert (calm["k"].lr_scale, calm["k"].weight_decay, calm["v"].init.options.std) == (0.3, 0.0, 0.01)
    assert runs[0].config.slices["k"].weight_decay is None


def test_whole_rules_in_cases(desk: Desk) -> None:
    text = (
        K
        + """sweep:
  cases:
    base: {}
    less: {set: {slices.k: null}}
    more: {set: {slices: {v: {frozen: true}}}, grid: {slices.v.match: ["**[v]", "h.0.**[v]"]}}
"""
    )
    runs = desk.listed(text).runs
    assert [list(run.config.slices) for run in runs] == [["k"], [], ["k", "v"], ["k", "v"]]
    assert [run.config.slices["v"].match for run in runs[2:]] == ["**[v]", "h.0.**[v]"]


def test_rules_from_the_command_line(desk: Desk, front: Front) -> None:
    words = ['slices.x.match="h.*.attn.qkv[k]"', "slices.x.lr_scale=0.1,0.3"]
    listing = desk.listed(TINY, *words)
    assert [run.config.slices["x"].lr_scale for run in listing.runs] == [0.1, 0.3]
    assert {run.config.slices["x"].match for run in listing.runs} == {"h.*.attn.qkv[k]"}
    assert all("lr_scale=" in run.cell for run in listing.runs)
    rows = table(front, desk, TINY, *words)
    assert {a: row["lr_scale"] for a, row in rows.items() if row["rules"] == ["x"]} == {
        f"h.{i}.attn.qkv.weight[k]": 0.1 for i in (0, 1)
    }  # the table is the first run's
    code, _, told = front("slices.x.match=h.*.attn.qkv[k]", "slices.x.lr_scale=0.1")
    assert code == 2 and "quote text with special characters" in told


def test_depth_of_half_the_way_is_the_geometric_mean() -> None:
    rows = tell({"x": {"match": "h.**", "lr_scale": {"depth": [2.0, 3.0]}}}, n_layer=3)
    assert rows["h.1.attn.proj.weight"].settings.lr_scale == pytest.approx(math.sqrt(6.0), rel=1e-14)
