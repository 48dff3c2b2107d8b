"""How weights lie on ranks: every layout against rows counted by hand, and the kinds that models' weights are given."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from convert import choice, kinds
from convert.base import Step, Unfit
from convert.choice import choose, register
from convert.kinds import Sizes, Weight, shards
from convert.mapping import Tensors
from convert.ranks import Rank, Sharding
from core.layout import Layout
from core.options import Reader
from core.rules import SliceRule
from core.slices import Declaration, declare
from core.weights import weights
from model import GPT, assemble
from variations import CATALOGUE
from variations.init.distributions import ZEROS

# By hand -------------------------------------------------------------------------------------------------------------------
# A row is (part, block, row of the block). An order of rows is written down for the full weight and for each rank.

Row = tuple[str, int, int]


def block(part: str, number: int, rows: int) -> list[Row]:
    return [(part, number, i) for i in range(rows)]


def blocks(part: str, numbers: Any, rows: int) -> list[Row]:
    made: list[Row] = []
    for number in numbers:
        made += block(part, number, rows)
    return made


@dataclass
class Case:
    """A weight, the order of its rows, and what each of `count` ranks should have; None where it cannot."""

    weight: Weight
    full: list[Row]
    ranks: list[list[Row]] | None
    count: int


def heads_of(rank: int, heads: int, count: int) -> range:
    return range(rank * heads // count, (rank + 1) * heads // count)


def groups_of(rank: int, heads: int, groups: int, count: int) -> list[int]:
    """The key and value heads that a rank's query heads read."""
    return sorted({head * groups // heads for head in heads_of(rank, heads, count)})


def plain_qkv(heads: int, groups: int, width: int, count: int, gate: bool) -> Case:
    parts = [("q", heads * width), ("k", groups * width), ("v", groups * width)]
    full = blocks("q", range(heads), width) + blocks("k", range(groups), width) + blocks("v", range(groups), width)
    if gate:
        parts, full = [*parts, ("z", heads * width)], full + blocks("z", range(heads), width)
    units = {name: width for name, _ in parts}
    weight = Weight((len(full), 3), "column", layout=Layout(tuple(parts), -2), units=units, shared=("k", "v"))
    fits = heads % count == 0 and (groups % count == 0 or count % groups == 0)
    ranks = []
    for rank in range(count if fits else 0):
        mine, shared = heads_of(rank, heads, count), groups_of(rank, heads, groups, count)
        own = blocks("q", mine, width) + blocks("k", shared, width) + blocks("v", shared, width)
        ranks.append(own + (blocks("z", mine, width) if gate else []))
    return Case(weight, full, ranks or None, count)


def grouped_qkv(heads: int, groups: int, width: int, count: int, gate: bool) -> Case:
    """Megatron's: for each key and value head its queries, then itself."""
    each = heads // groups

    def group(number: int, mine: list[int]) -> list[Row]:
        made = blocks("q", mine, width) + (blocks("z", mine, width) if gate else [])
        return made + block("k", number, width) + block("v", number, width)

    full: list[Row] = []
    for number in range(groups):
        full += group(number, list(range(number * each, (number + 1) * each)))
    parts = [("q", each * width), ("k", width), ("v", width)]
    if gate:
        parts.insert(1, ("z", each * width))
    layout = Layout(tuple(parts), -2, groups)
    weight = Weight((len(full), 3), "column", layout=layout, units=dict.fromkeys("qzkv", width), shared=("k", "v"))
    ranks = []
    if heads % count == 0 and (groups % count == 0 or count % groups == 0):
        for rank in range(count):
            own: list[Row] = []
            for number in groups_of(rank, heads, groups, count):
                own += group(number, [h for h in heads_of(rank, heads, count) if h // each == number])
            ranks.append(own)
    return Case(weight, full, ranks or None, count)


def kv(heads: int, groups: int, width: int, count: int, gate: bool) -> Case:
    """Megatron's of cross attention: each key head, then its value head."""
    full: list[Row] = []
    for number in range(groups):
        full += block("k", number, width) + block("v", number, width)
    layout = Layout((("k", width), ("v", width)), -2, groups)
    weight = Weight((len(full), 3), "column", layout=layout, units={"k": width, "v": width}, shared=("k", "v"))
    if groups % count and count % groups:
        return Case(weight, full, None, count)
    ranks = []
    for rank in range(count):
        own: list[Row] = []
        for number in range(groups):
            if number * count // groups == rank or rank * groups // count == number:
                own += block("k", number, width) + block("v", number, width)
        ranks.append(own)
    return Case(weight, full, ranks, count)


def vision(heads: int, groups: int, width: int, count: int, gate: bool) -> Case:
    """[3, heads, width] in one dimension, or (gate) three of each head."""
    full: list[Row] = []
    if gate:
        for head in range(heads):
            full += block("q", head, width) + block("k", head, width) + block("v", head, width)
    else:
        full = blocks("q", range(heads), width) + blocks("k", range(heads), width) + blocks("v", range(heads), width)
    size, repeated = (width, heads) if gate else (heads * width, 1)
    layout = Layout((("q", size), ("k", size), ("v", size)), -2, repeated)
    weight = Weight((len(full), 3), "column", layout=layout, units=dict.fromkeys("qkv", width))
    ranks = []
    for rank in range(count if heads % count == 0 else 0):
        mine = set(heads_of(rank, heads, count))
        ranks.append([row for row in full if row[1] in mine])
    return Case(weight, full, ranks or None, count)


def gated(heads: int, groups: int, width: int, count: int, gate: bool) -> Case:
    rows = heads * groups * width
    full = blocks("gate", range(rows), 1) + blocks("up", range(rows), 1)
    weight = Weight((len(full), 3), "column", layout=Layout((("gate", rows), ("up", rows)), -2))
    ranks = []
    for rank in range(count if rows % count == 0 else 0):
        mine = heads_of(rank, rows, count)
        ranks.append(blocks("gate", mine, 1) + blocks("up", mine, 1))
    return Case(weight, full, ranks or None, count)


def mamba(heads: int, groups: int, width: int, count: int, gate: bool) -> Case:
    """[z; x; B; C; dt]; B and C are of a group of heads, and have 5 numbers of state."""
    full = blocks("z", range(heads), width) + blocks("x", range(heads), width)
    full += blocks("B", range(groups), 5) + blocks("C", range(groups), 5) + blocks("dt", range(heads), 1)
    inner, state = heads * width, groups * 5
    layout = Layout((("z", inner), ("x", inner), ("B", state), ("C", state), ("dt", heads)), -2)
    units = {"z": width, "x": width, "B": 5, "C": 5}
    weight = Weight((len(full), 3), "column", layout=layout, units=units, shared=("B", "C"))
    ranks = []
    if heads % count == 0 and (groups % count == 0 or count % groups == 0):
        for rank in range(count):
            mine, shared = heads_of(rank, heads, count), groups_of(rank, heads, groups, count)
            own = blocks("z", mine, width) + blocks("x", mine, width)
            ranks.append(own + blocks("B", shared, 5) + blocks("C", shared, 5) + blocks("dt", mine, 1))
    return Case(weight, full, ranks or None, count)


MAKERS = (plain_qkv, grouped_qkv, kv, vision, gated, mamba)


def drawn(maker: Any) -> Iterator[Case]:
    """Random head counts, groups, widths, ranks: some fit, and some do not."""
    luck = random.Random(maker.__name__)
    for _ in range(40):
        groups = luck.choice([1, 2, 3, 4, 6])
        heads, width, count = groups * luck.choice([1, 2, 3, 4]), luck.choice([1, 2, 3]), luck.choice([1, 2, 3, 4])
        yield maker(heads, groups, width, count, luck.random() < 0.5)


def numbered(case: Case, shape: tuple[int, ...], dim: int) -> Tensor:
    """A full weight in which every number is another."""
    lay = list(shape)
    lay[dim] = len(case.full)
    return torch.arange(torch.Size(lay).numel(), dtype=torch.float64).reshape(lay)


def chosen(full: Tensor, dim: int, rows: list[int]) -> Tensor:
    return torch.stack([full.select(dim, row) for row in rows], dim)


def expected(case: Case, full: Tensor, dim: int) -> list[Tensor]:
    assert case.ranks is not None
    where = {row: i for i, row in enumerate(case.full)}
    return [chosen(full, dim, [where[row] for row in own]) for own in case.ranks]


def alike(ours: list[Tensor], others: list[Tensor]) -> bool:
    return len(ours) == len(others) and all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("maker", MAKERS)
def test_each_rank_has_the_rows_that_are_counted_by_hand(maker: Any) -> None:
    fitted = refused = 0
    for case in drawn(maker):
        # A matrix, its bias, and numbers that are sums of two; of each the rows are divided.
        for shape, dim in (((0, 3), -2), ((0,), -1), ((2, 0, 3), -2)):
            full = numbered(case, shape, dim)
            assert case.weight.layout is not None
            layout = replace(case.weight.layout, dim=dim)
            weight = replace(case.weight, shape=tuple(full.shape), layout=layout)
            if case.ranks is None:
                refused += 1
                with pytest.raises(Unfit):
                    kinds.KINDS["column"](weight, case.count)
                continue
            fitted += 1
            step, wanted = kinds.KINDS["column"](weight, case.count), expected(case, full, dim)
            assert alike(step([full]), wanted)
            # From both ends: what is put together of shards by hand, and those of the full weight again.
            assert alike(step.inverse(wanted), [full]) and alike(step.inverse.inverse([full]), wanted)
    assert fitted > 40 and (refused > 5 or maker in (gated,))


def test_inputs_are_divided_in_whole_heads() -> None:
    full = torch.arange(5 * 12.0).reshape(5, 12)
    step = kinds.KINDS["row"](Weight((5, 12), "row", units={"": 3}), 2)
    wanted = [chosen(full, -1, [0, 1, 2, 3, 4, 5]), chosen(full, -1, [6, 7, 8, 9, 10, 11])]
    assert alike(step([full]), wanted) and alike(step.inverse(wanted), [full])
    with pytest.raises(Unfit, match="it is 4 blocks of 3 rows, of which 3 ranks cannot have equally many"):
        kinds.KINDS["row"](Weight((5, 12), "row", units={"": 3}), 3)


@pytest.mark.parametrize("wrong", ["no parts", "another order", "groups for parts", "heads of another width"])
def test_a_wrong_layout_that_undoes_itself_has_other_rows(wrong: str) -> None:
    """Going there and back says nothing: each of these comes back, and none of them is right."""
    plain, grouped = plain_qkv(8, 4, 2, 2, False), grouped_qkv(8, 4, 2, 2, False)
    case = grouped if wrong == "groups for parts" else plain
    assert plain.weight.layout is not None and grouped.weight.layout is not None
    q, k, v = plain.weight.layout.parts
    layouts = {
        "no parts": Layout(dim=-2),
        "another order": Layout((k, q, v), -2),
        "groups for parts": plain.weight.layout,
        "heads of another width": grouped.weight.layout,
    }
    full = numbered(case, (0, 3), -2)
    step = kinds.KINDS["column"](replace(case.weight, layout=layouts[wrong]), 2)
    assert alike(step.inverse(step([full])), [full])
    assert not alike(step([full]), expected(case, full, -2))


def test_shards_of_a_gated_mlp_end_to_end_are_not_the_weight() -> None:
    case = gated(4, 2, 1, 4, False)
    full = numbered(case, (0, 3), -2)
    made = torch.cat(shards(case.weight, Sizes(tensor=4))([full]), -2)
    stored = [row for rank in range(4) for row in expected(case, full, -2)[rank]]
    assert torch.equal(made, torch.stack(stored)) and not torch.equal(made, full)


def test_vocabularies_are_filled_up_and_cut_back() -> None:
    full = torch.arange(1.0, 15).reshape(7, 2)
    for count, multiple, padded in ((1, 1, 7), (1, 4, 8), (2, 1, 8), (2, 4, 8), (2, 3, 12), (3, 4, 12)):
        made = shards(Weight((7, 2), "vocabulary", multiple=multiple), Sizes(tensor=count))([full])
        rows = padded // count
        for rank, shard in enumerate(made):
            assert shard.tolist() == [
                full[i].tolist() if i < 7 else [0, 0] for i in range(rank * rows, (rank + 1) * rows)
            ]
        back = shards(Weight((7, 2), "vocabulary", multiple=multiple), Sizes(tensor=count)).inverse(made)
        assert alike(back, [full])


# A stage -------------------------------------------------------------------------------------------------------------------


def test_ranks_are_numbered_as_megatron_numbers_them() -> None:
    """Megatron's order tp-ep-dp-pp, counted out: expert-tensor ranks first, then expert ranks, then replicas, then stages."""
    sizes = Sizes(tensor=4, pipeline=2, expert=2, expert_tensor=1)
    assert (sizes.inner, sizes.count) == (4, 8)
    rank = 0
    for stage in range(2):
        for replica in range(2):
            for expert in range(2):
                place = sizes.place(rank)
                assert (place.pipeline, place.expert, place.expert_tensor) == (stage, expert, 0)
                assert place.tensor == replica * 2 + expert
                rank += 1
    assert Sizes(tensor=2, expert=2).within == 2 and Sizes(tensor=2, expert=2).count == 4
    invalid: tuple[dict[str, Any], ...] = ({"tensor": 0}, {"expert_tensor": 0}, {"pipeline": 2, "layers": (1,)})
    for wrong in invalid:
        with pytest.raises(ValueError, match=r"at least 1|for each of 2 stages"):
            Sizes(**wrong)


def test_experts_are_divided_among_ranks_of_their_own() -> None:
    luck = random.Random(3)
    for _ in range(30):
        tensor, expert, within = (luck.choice([1, 2, 4]) for _ in range(3))
        experts, rows = expert * luck.choice([1, 3]), 4 * luck.choice([1, 2])
        sizes = Sizes(tensor=tensor, expert=expert, expert_tensor=within)
        full = torch.arange(experts * 2 * rows * 3.0).reshape(experts, 2 * rows, 3)
        layout = Layout((("gate", rows), ("up", rows)), -2)
        weight = Weight(tuple(full.shape), "column", layout=layout, experts=-3)
        made, each, share = shards(weight, sizes)([full]), experts // expert, rows // within
        wanted = []
        for rank in range(sizes.inner):
            own, number = sizes.place(rank).expert, sizes.place(rank).expert_tensor
            mine = list(range(number * share, (number + 1) * share))
            mine += [rows + row for row in mine]
            wanted.append(torch.stack([full[e][mine] for e in range(own * each, (own + 1) * each)]))
        assert alike(made, wanted)
        assert alike(shards(weight, sizes).inverse(wanted), [full])
        # One expert's own weight is with those ranks alone that have it.
        number = luck.randrange(experts)
        single = Weight((2 * rows, 3), "column", layout=layout, expert=(number, experts))
        owners = [rank for rank in range(sizes.inner) if sizes.place(rank).expert == number // each]
        assert kinds.owners(single, sizes) == owners
        assert alike(shards(single, sizes)([full[number]]), [wanted[rank][number % each] for rank in owners])
    with pytest.raises(Unfit, match="3 experts cannot be divided evenly among 2 expert-parallel ranks"):
        shards(Weight((3, 4, 2), "column", experts=-3), Sizes(expert=2))


# Which kind a weight is ----------------------------------------------------------------------------------------------------

MOE = {"variant": "moe", "experts": 4, "width": 8, "shared_experts": 1, "bias_rate": 0.1}
SSM = {"variant": "mamba2", "head_dim": 4, "d_state": 3, "groups": 2}
EVERY = {
    "wte.weight": "vocabulary -2",
    "head.weight": "vocabulary -2",
    "wpe.weight": "replicated",
    "ln_f.weight": "replicated",
    "ln_f.bias": "replicated",
    "ln_1.weight": "replicated",
    "ln_1.bias": "replicated",
    "ln_2.weight": "replicated",
    "ln_2.bias": "replicated",
}
CAUSAL = {
    "attn.qkv.weight": "column -2 q:4 k:4 v:4 shared k v",
    "attn.qkv.bias": "column -1 q:4 k:4 v:4 shared k v",
    "attn.proj.weight": "row -1 :4",
    "attn.proj.bias": "replicated",
    "attn.q_norm.weight": "replicated",
    "attn.k_norm.weight": "replicated",
}
PLAIN = {
    "mlp.up.weight": "column -2",
    "mlp.up.bias": "column -1",
    "mlp.down.weight": "row -1",
    "mlp.down.bias": "replicated",
}
GATED = {"mlp.gate_up.weight": "column -2 gate up", "mlp.gate_up.bias": "column -1 gate up", **PLAIN}
EXPERTS = {
    "mlp.router.weight": "replicated",
    "mlp.balance": "replicated",
    "mlp.gate_up.weight": "column -2 gate up experts -3",
    "mlp.gate_up.bias": "column -1 gate up experts -2",
    "mlp.down.weight": "row -1 experts -3",
    "mlp.down.bias": "replicated experts -2",
    "mlp.shared.gate_up.weight": "column -2 gate up",
    "mlp.shared.gate_up.bias": "column -1 gate up",
    "mlp.shared.down.weight": "row -1",
    "mlp.shared.down.bias": "replicated",
}
MAMBA = {
    "attn.in_proj.weight": "column -2 z:4 x:4 B:3 C:3 dt shared B C",
    "attn.conv1d.weight": "column -2 x:4 B:3 C:3 shared B C",
    "attn.conv1d.bias": "column -1 x:4 B:3 C:3 shared B C",
    "attn.A_log": "column -1",
    "attn.dt_bias": "column -1",
    "attn.D": "column -1",
    "attn.norm.weight": "column -1 :4",
    "attn.out_proj.weight": "row -1 :4",
}
DELTA = {
    "attn.in_proj.weight": "column -2 q:4 k:4 v:8 gate:8 beta alpha",
    "attn.conv1d.weight": "column -2 q:4 k:4 v:8",
    "attn.A_log": "column -1",
    "attn.dt_bias": "column -1",
    "attn.norm.weight": "replicated",
    "attn.out_proj.weight": "row -1 :8",
}
MEMORY = {
    "attn.memory": "replicated",
    "attn.kv.weight": "column -2 k:4 v:4 shared k v",
    "attn.kv.bias": "column -1 k:4 v:4 shared k v",
}
CHOICES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a GPT-2": ({}, {**CAUSAL, **PLAIN}),
    "a Llama": (models.MODERN, {**CAUSAL, **GATED}),
    "gated, biases": ({**models.MODERN, "bias": True}, {**CAUSAL, **GATED}),
    "experts": ({"mlp": MOE}, {**CAUSAL, **EXPERTS}),
    "numbers that are sums": ({"linear": "pkl", "mlp": MOE, "embedding": "pkl", "head": "pkl"}, {**CAUSAL, **EXPERTS}),
    "a state space": ({"attention": SSM}, {**MAMBA, **PLAIN}),
    "the delta rule": ({"attention": {"variant": "delta", "expand": 2}}, {**DELTA, **PLAIN}),
    "a memory": ({"attention": {"variant": "memory", "slots": 3}}, {**CAUSAL, **MEMORY, **PLAIN}),
    "n-grams": ({"embedding": "ngram", "tie_weights": False}, {**CAUSAL, **PLAIN, "wte.tables": "replicated"}),
    "stacked": ({**models.MODERN, "stack_layers": True}, {**CAUSAL, **GATED}),
}


def told(weight: Weight) -> str:
    """A weight in words."""
    if weight.kind == "replicated":
        return f"replicated{f' experts {weight.experts}' if weight.experts else ''}"
    layout = weight.along()
    parts = [name for name, _ in layout.parts] or [""]
    words = [f"{part}:{weight.units[part]}" if weight.units.get(part, 1) > 1 else part for part in parts]
    words += ["shared", *weight.shared] if weight.shared else []
    words += [f"experts {weight.experts}"] if weight.experts else []
    return " ".join([weight.kind, str(layout.dim), *(word for word in words if word)])


@pytest.mark.parametrize("name", CHOICES)
def test_every_weight_of_our_models_has_its_kind(name: str) -> None:
    tree, table = CHOICES[name]
    model = models.make(**tree)
    found = choose(model, multiple=8)
    assert found.keys() == weights(model).keys()
    for path, weight in found.items():
        short = path.split(".", 2)[2] if path.startswith("h.") else path
        assert told(weight) == {**EVERY, **table}[short], path
        assert weight.shape == weights(model)[path].shape and weight.multiple == (8 if "vocab" in weight.kind else 1)
        # What is fused is divided by the sizes that the module has.
        if weight.layout is not None:
            weight.layout.check(weight.shape)
            assert not weight.layout.stack


def test_every_variation_s_weights_have_a_kind_and_lie_on_two_ranks() -> None:
    """Without being listed: what a variation declares suffices."""
    for case in models.cases(("linear", "embedding", "head", "norm", "position", "attention", "mlp")):
        for tree in case.trees():
            config = models.config(**{**tree, "n_kv_head": 4, "n_embd": 64})
            model = GPT(config)
            sharding = Sharding(choose(model), Sizes(tensor=2))
            assert len({id(p) for p in model.parameters()}) <= len(sharding.moves), case
            sizes = [sum(meta.numel() for meta in rank.values()) for rank in sharding.ranks]
            assert sizes[0] == sizes[1] < sum(p.numel() for p in model.parameters()), case


class Attention(nn.Module):
    """As published models name and size it."""

    def __init__(self, head_dim: int | None) -> None:
        super().__init__()
        if head_dim is not None:
            self.head_dim = head_dim
        self.q_proj, self.k_proj = nn.Linear(12, 12), nn.Linear(12, 6, bias=False)
        self.o_proj = nn.Linear(12, 12)
        self.q_norm = nn.RMSNorm(3)


class OddLinear(nn.Linear):
    """One whose path says nothing."""


class ColumnParallelLinear(nn.Linear):
    """Known by its name."""


class TERowParallelLinear(nn.Linear):
    """Known by a part of its name."""


def others(head_dim: int | None = 3) -> nn.Module:
    made = nn.Module()
    made.embed_tokens, made.wpe = nn.Embedding(7, 12), nn.Embedding(5, 12)
    made.self_attn, made.up_proj, made.down_proj = Attention(head_dim), nn.Linear(12, 8), nn.Linear(8, 12)
    made.one, made.two = ColumnParallelLinear(12, 8), TERowParallelLinear(8, 12)
    made.marked = nn.Module()
    for name, dim, stride in (("across", 1, 1), ("down", 0, 1), ("fused", 0, 2), ("all", None, 1)):
        parameter: Any = nn.Parameter(torch.zeros(4, 6))
        parameter.tensor_model_parallel = dim is not None
        parameter.partition_dim, parameter.partition_stride = dim, stride
        made.marked.register_parameter(name, parameter)
    made.register_buffer("seen", torch.zeros(3))
    return made


def test_modules_of_others_are_known_by_what_they_say_of_themselves() -> None:
    found = {name: told(weight) for name, weight in choose(others()).items()}
    assert found == {
        "seen": "replicated",
        "embed_tokens.weight": "vocabulary -2",
        "wpe.weight": "replicated",
        "self_attn.q_proj.weight": "column -2 :3",
        "self_attn.q_proj.bias": "column -1 :3",
        "self_attn.k_proj.weight": "column -2 :3 shared",
        "self_attn.o_proj.weight": "row -1 :3",
        "self_attn.o_proj.bias": "replicated",
        "self_attn.q_norm.weight": "replicated",
        "up_proj.weight": "column -2",
        "up_proj.bias": "column -1",
        "down_proj.weight": "row -1",
        "down_proj.bias": "replicated",
        "one.weight": "column -2",
        "one.bias": "column -1",
        "two.weight": "row -1",
        "two.bias": "replicated",
        "marked.across": "row -1",
        "marked.down": "column -2",
        "marked.fused": "column -2 part0 part1",
        "marked.all": "replicated",
    }


def test_what_nothing_tells_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_REGISTERED", list(choice._REGISTERED))
    model = others(head_dim=None)
    model.qkv_proj, model.mystery, model.experts = nn.Linear(2, 6), OddLinear(2, 2, bias=False), nn.Linear(2, 2)
    text = models.sentence(lambda: choose(model))
    assert text.startswith("How these weights lie on ranks cannot be told.\n")
    for line in (
        "qkv_proj.weight [6, 2]: 'qkv_proj' is several weights in one, each to be divided by itself, and nothing tells",
        "mystery.weight [2, 2]: a linear map named 'mystery' may divide its outputs, its inputs or nothing.",
        "self_attn.k_proj.weight [6, 12]: heads stay whole, and what is around 'k_proj' has no attribute head_dim.",
        "experts.bias [2]: experts are divided among ranks of their own, and nothing tells how they lie.",
        "Say so with convert.choice.register(module class or pattern of names, kind or function that makes a Weight).",
    ):
        assert f"\n{line}" in text
    assert text.count("\n") == 10  # no other weight is in it

    register(OddLinear, "row")
    register("experts.**", "replicated")
    register("Attention", lambda name, module, tensor: Weight(tuple(tensor.shape), "column", units={"": len(name)}))
    register("**.k_proj.weight", lambda name, module, tensor: Weight((1,), "replicated"))
    register("**.q_proj.weight", lambda name, module, tensor: None)
    fused = Layout((("q", 2), ("k", 2), ("v", 2)), -2)
    register(
        "qkv_proj.*", lambda name, module, t: Weight(tuple(t.shape), "column", layout=replace(fused, dim=-t.dim()))
    )
    found = choose(model)
    assert told(found["mystery.weight"]) == "row -1" and told(found["experts.bias"]) == "replicated"
    assert told(found["qkv_proj.bias"]) == "column -1 q k v" and found["self_attn.k_proj.weight"].shape == (1,)
    assert told(found["self_attn.q_proj.weight"]) == f"column -2 :{len('q_proj.weight')}"  # the name inside the module
    with pytest.raises(ValueError, match="no kind 'colum'; known are column, replicated, row, vocabulary"):
        register("x.y", "colum")


def test_kinds_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_rows(weight: Weight, count: int) -> Step:
        return kinds.replicated(weight, count)

    monkeypatch.setattr(choice, "_REGISTERED", [])
    monkeypatch.setitem(kinds.KINDS, "mine", reversed_rows)
    register(nn.Linear, "mine")
    found = choose(nn.Sequential(nn.Linear(2, 3)))
    assert [weight.kind for weight in found.values()] == ["mine", "mine"]
    assert len(shards(found["0.weight"], Sizes(tensor=3))([torch.zeros(3, 2)])) == 3
    with pytest.raises(Unfit, match="there is no kind 'none'; known are column, mine"):
        shards(Weight((2,), "none"), Sizes())


def test_adapters_and_vectors_that_say_nothing_are_refused() -> None:
    rules = {"adapt": models.read(SliceRule, {"match": "h.0.attn.qkv[q]", "lora": {"rank": 2}})}
    optimizer: Any = Reader(CATALOGUE).variant("optimizer", {"variant": "adamw"}, ())
    model, _ = assemble(models.config(), rules, optimizer)
    declare(model.h[0], "sign", (3,), Declaration(Layout(), "vector", ZEROS))
    text = models.sentence(lambda: choose(model))
    assert "lora_a [2, 16]: it is an adapter's; merge adapters first." in text and text.count("adapter's") == 2
    assert "h.0.sign [3]: it is a vector of Block, and no weight beside it tells." in text


# What ranks compute ---------------------------------------------------------------------------------------------------------


def held(model: Any, sizes: Sizes, path: str) -> Iterator[dict[str, Tensor]]:
    """What each rank has of a module, by the names inside it."""
    sharding = Sharding(choose(model), sizes)
    for rank in range(sizes.count):
        source = Rank(sharding, Tensors(weights(model)), rank)
        yield {name[len(path) + 1 :]: source.get(name) for name in source.names() if name.startswith(f"{path}.")}


def summed(model: Any, small: dict[str, Any], count: int, path: str, last: str) -> tuple[Tensor, Tensor]:
    """The output of a module, and the sum of those of narrower modules which have what ranks hold of it."""
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    total = torch.zeros_like(x)
    for rank, own in enumerate(held(model, Sizes(tensor=count), path)):
        narrow: Any = models.make(**small).double().get_submodule(path)
        if hasattr(narrow, "norm"):
            narrow.norm, own = nn.Identity(), {n: t for n, t in own.items() if n != "norm.weight"}
        if rank and f"{last}.bias" in own:
            own[f"{last}.bias"] = torch.zeros_like(own[f"{last}.bias"])  # which all have, and one adds
        narrow.load_state_dict(own)
        total += narrow(x)
    whole = model.get_submodule(path)
    if hasattr(whole, "norm"):
        whole.norm = nn.Identity()
    return whole(x), total


@torch.no_grad()
@pytest.mark.parametrize(("count", "groups"), [(2, 2), (2, 4), (4, 2), (2, 1), (4, 4)])
def test_ranks_compute_together_what_the_attention_computes(count: int, groups: int) -> None:
    rope: dict[str, Any] = {"position": "rope", "n_head": 4, "n_kv_head": groups, "head_dim": 4, "n_layer": 1}
    model = models.scrambled(**rope).double()
    small = {**rope, "n_head": 4 // count, "n_kv_head": max(1, groups // count)}
    whole, total = summed(model, small, count, "h.0.attn", "proj")
    # float64: sums of 16 numbers near 1 in another order
    assert torch.allclose(whole, total, rtol=0, atol=1e-12) and whole.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("count", "groups"), [(2, 2), (4, 2), (2, 1), (4, 4)])
def test_ranks_compute_together_what_a_state_space_computes(count: int, groups: int) -> None:
    """Without its norm, which is over what all ranks have together."""
    mixer = {"variant": "mamba2", "head_dim": 4, "d_state": 3, "groups": groups}
    model = models.scrambled(attention=mixer, n_layer=1).double()
    few = {"n_layer": 1, "attention": {**mixer, "groups": max(1, groups // count)}}
    whole, total = narrowed(model, few, count)
    assert torch.allclose(whole, total, rtol=0, atol=1e-11) and whole.abs().max() > 0.1


def narrowed(model: Any, small: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """As `summed`. The inner width is a multiple of n_embd: a narrow mixer is one of fewer channels, until it has its weights."""
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    total = torch.zeros_like(x)
    for own in held(model, Sizes(tensor=count), "h.0.attn"):
        narrow: Any = models.make(**small, n_embd=16 // count, n_head=1, n_kv_head=1).double().get_submodule("h.0.attn")
        narrow.norm = nn.Identity()
        for name, tensor in own.items():
            if name != "norm.weight":
                path, _, leaf = name.rpartition(".")
                setattr(narrow.get_submodule(path), leaf, nn.Parameter(tensor))
        total += narrow(x)
    whole = model.get_submodule("h.0.attn")
    whole.norm = nn.Identity()
    return whole(x), total


@torch.no_grad()
@pytest.mark.parametrize("mlp", ["standard", "gated"])
def test_ranks_compute_together_what_an_mlp_computes(mlp: str) -> None:
    model = models.scrambled(mlp={"variant": mlp, "width": 12}, n_layer=1).double()
    whole, total = summed(model, {"mlp": {"variant": mlp, "width": 3}, "n_layer": 1}, 4, "h.0.mlp", "down")
    assert torch.allclose(whole, total, rtol=0, atol=1e-12) and whole.abs().max() > 0.1
