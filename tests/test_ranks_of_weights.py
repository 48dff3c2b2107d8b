"""Models in a file for each rank: what is in which, and full weights again, whatever the sizes."""

from __future__ import annotations

import json
import random
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.choice import choose
from convert.files import Folder, write_folder
from convert.kinds import Sizes, Weight
from convert.mapping import Mismatch, Tensors
from convert.ranks import Naming, Rank, Sharding, Whole, known, reshard, whole, write
from core.layout import Layout
from core.weights import weights

MOE = {"variant": "moe", "experts": 4, "width": 8, "shared_experts": 1, "bias_rate": 0.1}
SSM = {"variant": "mamba2", "head_dim": 4, "d_state": 3, "groups": 2}
MODELS: dict[str, dict[str, Any]] = {
    "a GPT-2": {"n_layer": 4},
    "a Llama": {**models.MODERN, "n_layer": 3},
    "experts": {"mlp": MOE, "tie_weights": False, "n_kv_head": 4},
    "numbers that are sums": {"linear": "pkl", "mlp": MOE, "embedding": "pkl", "head": "pkl"},
    "a hybrid": {"layer_pattern": ["mamba2", "causal"], "attention": SSM, "n_layer": 4},
}
SIZES = (
    Sizes(),
    Sizes(tensor=2),
    Sizes(pipeline=2, tensor=2, expert=2),
    Sizes(tensor=4, expert=2, expert_tensor=1),
    Sizes(expert=4, expert_tensor=2),
    Sizes(tensor=2, expert=2, expert_tensor=4),
)


def full(name: str) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    model = models.scrambled(**MODELS[name])
    return choose(model), weights(model)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def everything(source: Any) -> dict[str, Tensor]:
    return {name: source.get(name) for name in source.names()}


def sized(name: str, sizes: Sizes) -> Sizes:
    """Three layers among two stages are one and two."""
    return replace(sizes, layers=(1, 2)) if name == "a Llama" and sizes.pipeline == 2 else sizes


@pytest.mark.parametrize("name", MODELS)
def test_from_any_sizes_to_any_others(tmp_path: Path, name: str) -> None:
    """Every way around the sizes: full weights are the same bits after each, and files those that the full weights give."""
    plan, own = full(name)
    straight: list[dict[str, bytes]] = []
    for i, sizes in enumerate(sized(name, each) for each in SIZES):
        sharding = Sharding(plan, sizes)
        write(Tensors(own), sharding, tmp_path / f"{i}")
        straight.append(files(tmp_path / f"{i}"))
        assert len(straight[-1]) == sizes.count + 1
        assert same(everything(whole(tmp_path / f"{i}")), own)
        # In memory as in files, and from the other end.
        ranks = [everything(Rank(sharding, Tensors(own), rank)) for rank in range(sizes.count)]
        for rank, held in enumerate(ranks):
            assert same(load_file(tmp_path / f"{i}" / f"rank-{rank:05}-of-{sizes.count:05}.safetensors"), held)
            assert all(Rank(sharding, Tensors(own), rank).meta(n).shape == t.shape for n, t in held.items())
        together = Whole(sharding, [Tensors(held) for held in ranks])
        assert same(everything(together), own)
        assert all(same(everything(Rank(sharding, together, rank)), held) for rank, held in enumerate(ranks))
    order = list(range(len(SIZES)))
    random.Random(name).shuffle(order)
    for old, new in zip(order, order[1:] + order[:1], strict=True):
        reshard(tmp_path / f"{old}", sized(name, SIZES[new]), tmp_path / f"{old}-{new}")
        assert files(tmp_path / f"{old}-{new}") == straight[new]


def test_names_of_ranks_are_local_in_layers_and_global_in_experts() -> None:
    plan, own = full("experts")
    sharding = Sharding(plan, Sizes(pipeline=2, expert=2))
    held = [set(rank) for rank in sharding.ranks]
    for stage, rank in enumerate([0, 2]):
        for expert, number in enumerate([rank, rank + 1]):
            experts = {f"h.0.mlp.down.weight.{e}" for e in (2 * expert, 2 * expert + 1)}
            assert {name for name in held[number] if ".mlp.down.weight" in name} == experts
            for e in (2 * expert, 2 * expert + 1):
                values = Rank(sharding, Tensors(own), number).get(f"h.0.mlp.down.weight.{e}")
                assert torch.equal(values, own[f"h.{stage}.mlp.down.weight"][e])
            assert ("wte.weight" in held[number]) == ("wpe.weight" in held[number]) == (stage == 0)
            assert ("head.weight" in held[number]) == ("ln_f.weight" in held[number]) == (stage == 1)
            assert not any(name.startswith("h.1.") for name in held[number])
    assert sharding.origin[3]["h.0.mlp.down.weight.3"][0] == "h.1.mlp.down.weight"
    stacks = Sharding(plan, Sizes(expert=2), apart=False)
    assert torch.equal(Rank(stacks, Tensors(own), 1).get("h.1.mlp.gate_up.weight"), own["h.1.mlp.gate_up.weight"][2:])
    assert same(everything(Whole(stacks, [Rank(stacks, Tensors(own), rank) for rank in range(2)])), own)


def test_stages_may_have_other_numbers_of_layers_or_none() -> None:
    plan, own = full("a Llama")
    sharding = Sharding(plan, Sizes(pipeline=4, layers=(0, 2, 1, 0)))
    layers = [sorted({name.split(".")[1] for name in rank if name.startswith("h.")}) for rank in sharding.ranks]
    assert layers == [[], ["0", "1"], ["0"], []]
    assert sharding.origin[2]["h.0.mlp.down.weight"] == ("h.2.mlp.down.weight", 0)
    assert sorted(sharding.ranks[3]) == ["head.weight", "ln_f.weight"]
    assert same(everything(Whole(sharding, [Rank(sharding, Tensors(own), rank) for rank in range(4)])), own)


def test_a_tied_weight_is_on_the_first_stage_and_the_last() -> None:
    plan, own = full("a GPT-2")
    padded = {name: replace(weight, multiple=8 if "wte" in name else 1) for name, weight in plan.items()}
    sharding = Sharding(padded, Sizes(pipeline=4, tensor=2))
    assert [("wte.weight" in rank, "head.weight" in rank) for rank in sharding.ranks] == [
        *[(True, False)] * 2,
        *[(False, False)] * 4,
        *[(False, True)] * 2,
    ]
    ranks = [everything(Rank(sharding, Tensors(own), rank)) for rank in range(8)]
    assert torch.equal(ranks[1]["wte.weight"], ranks[7]["head.weight"])
    assert torch.equal(ranks[7]["head.weight"][:3], own["wte.weight"][16:]) and not ranks[7]["head.weight"][3:].any()
    assert same(everything(Whole(sharding, [Tensors(held) for held in ranks])), own)
    ranks[6]["head.weight"] = ranks[6]["head.weight"] + 1
    changed = Whole(sharding, [Tensors(held) for held in ranks])
    with pytest.raises(Mismatch, match=r"wte\.weight, which is on ranks 0, 1, 6, 7: copy 1 differs"):
        changed.get("wte.weight")
    assert "head.weight" not in Sharding(padded, Sizes(tensor=2)).ranks[0]


def test_names_of_other_models() -> None:
    """As a model of another make may have them; two experts that are not stacked."""
    made = {
        "embed.weight": Weight((6, 4), "vocabulary"),
        "decoder.layers.0.mlp.weight0": Weight((4, 4), "column", expert=(0, 2)),
        "decoder.layers.0.mlp.weight1": Weight((4, 4), "column", expert=(1, 2)),
        "decoder.layers.1.norm": Weight((4,), "replicated", dtype=torch.bfloat16),
        "decoder.norm": Weight((4,), "replicated"),
    }
    naming = Naming("decoder.layers", ("decoder.norm",), {"embed.weight": "output.weight"})
    sharding = Sharding(made, Sizes(pipeline=2, tensor=2, expert=2, expert_tensor=1), naming)
    assert [sorted(rank) for rank in sharding.ranks] == [
        ["decoder.layers.0.mlp.weight0", "embed.weight"],
        ["decoder.layers.0.mlp.weight1", "embed.weight"],
        ["decoder.layers.0.norm", "decoder.norm", "output.weight"],
        ["decoder.layers.0.norm", "decoder.norm", "output.weight"],
    ]
    assert sharding.ranks[2]["decoder.layers.0.norm"].dtype == torch.bfloat16
    layout = Layout((("q", 2), ("k", 1)), -1, 2)
    made["embed.weight"] = Weight((8, 6), "column", layout=layout, units={"q": 1}, shared=("k",), multiple=3)
    tree = json.loads(json.dumps(Sharding(made, Sizes(tensor=2), naming).tree()))
    again = Sharding.read(tree)
    assert again.weights == made and again.naming == naming
    assert (
        json.loads(json.dumps(again.tree())) == tree
        and again.digest() == Sharding(made, Sizes(tensor=2), naming).digest()
    )
    for wrong in (
        {},
        {**tree, "sizes": {"tensor": 2}},
        {**tree, "weights": {"a": {"shape": [2]}}},
        {**tree, "sizes": 3},
    ):
        with pytest.raises(ValueError, match="does not say how weights lie on ranks"):
            Sharding.read(wrong)


# What is refused -----------------------------------------------------------------------------------------------------------


class Guarded(Tensors):
    """A source of which nothing may be read."""

    def get(self, name: str) -> Tensor:
        raise AssertionError(name)


def test_sizes_that_do_not_divide_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    plan, own = full("experts")
    with pytest.raises(Mismatch) as caught:
        Sharding(plan, Sizes(tensor=3, expert=3))
    mistakes = "\n".join(caught.value.mistakes)
    for told in (
        "h.1.attn.qkv.weight [48, 16], of kind column: part 'q' is 4 blocks of 4 rows, of which 3 ranks cannot have equally many.",
        "h.0.mlp.gate_up.weight [4, 16, 16], of kind column: 4 experts cannot be divided evenly among 3 expert-parallel ranks.",
        "h.0.attn.proj.weight [16, 16], of kind row: it is 4 blocks of 4 rows, of which 3 ranks cannot have equally many.",
    ):
        assert told in mistakes
    assert "wte" not in mistakes, "which is filled up"
    with pytest.raises(Mismatch) as caught:
        Sharding(plan, Sizes(pipeline=3))
    assert caught.value.mistakes == [
        "2 layers cannot be divided evenly among 3 pipeline stages; say how many each has."
    ]
    with pytest.raises(Mismatch, match=r"The stages have \[2, 2\] layers, and there are 2"):
        Sharding(plan, Sizes(pipeline=2, layers=(2, 2)))
    with pytest.raises(Mismatch, match="Of the 3 layers, there are no weights of 0, 1"):
        Sharding({"h.2.x": Weight((2,), "replicated")}, Sizes())
    two = {"a.0": Weight((2,), "replicated"), "a": Weight((1, 2), "replicated", experts=-2)}
    with pytest.raises(Mismatch, match=r"Rank 0 would have two tensors named a\.0, of a and of another weight"):
        Sharding(two, Sizes())

    llama, _ = full("a Llama")
    three = {**llama, "h.0.attn.qkv.weight": replace(llama["h.0.attn.qkv.weight"], shared=())}
    with pytest.raises(Mismatch, match="part 'k' is 2 blocks of 4 rows, of which 4 ranks cannot have equally many"):
        Sharding(three, Sizes(tensor=4))
    Sharding(llama, Sizes(tensor=4))  # which share them

    sharding = Sharding(plan, Sizes(tensor=2))
    short = {name: t for name, t in own.items() if name != "ln_f.weight"} | {"more": torch.zeros(1)}
    short["wpe.weight"] = torch.zeros(2, 16)
    for act in (lambda: write(Guarded(short), sharding, tmp_path / "new"), lambda: Rank(sharding, Guarded(short), 0)):
        with pytest.raises(Mismatch) as caught:
            act()
        assert caught.value.mistakes == [
            "The source has no ln_f.weight.",
            "more of the source is no weight that is divided.",
            "wpe.weight of the source is [2, 16], not [12, 16].",
        ]
    assert not list(tmp_path.iterdir())
    assert known(plan, Guarded(own)) == plan
    write(Tensors(own), sharding, tmp_path / "there")
    with pytest.raises(ValueError, match="is there already"):
        write(Guarded(own), sharding, tmp_path / "there")
    with pytest.raises(Mismatch, match="of which 3 ranks cannot have equally many"):
        reshard(tmp_path / "there", Sizes(tensor=3), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_ranks_that_are_not_those_of_the_plan(tmp_path: Path) -> None:
    plan, own = full("a GPT-2")
    sharding = Sharding(plan, Sizes(tensor=2))
    ranks = [everything(Rank(sharding, Tensors(own), rank)) for rank in range(2)]
    del ranks[0]["ln_f.bias"]
    ranks[1] |= {"more": torch.zeros(1), "wpe.weight": torch.zeros(2)}
    with pytest.raises(Mismatch) as caught:
        Whole(sharding, [Guarded(held) for held in ranks])
    assert caught.value.mistakes == [
        "Rank 0 has no ln_f.bias.",
        "Rank 1 has more, which should not be there.",
        "wpe.weight of rank 1 is [2], not [12, 16].",
    ]
    with pytest.raises(Mismatch, match="There are 1 ranks, and the weights lie on 2"):
        Whole(sharding, [Tensors(ranks[0])])
    ranks = [everything(Rank(sharding, Tensors(own), rank)) for rank in range(2)]
    ranks[1]["ln_f.bias"] = ranks[1]["ln_f.bias"].bfloat16()
    with pytest.raises(Mismatch, match=r"ln_f.bias has several dtypes: torch.bfloat16, torch.float32"):
        Whole(sharding, [Guarded(held) for held in ranks])


def test_folders_that_were_changed(tmp_path: Path) -> None:
    plan, own = full("a GPT-2")
    folder = tmp_path / "ranks"
    write(Tensors(own), Sharding(plan, Sizes(tensor=2)), folder)
    first, second = (folder / f"rank-0000{rank}-of-00002.safetensors" for rank in range(2))
    with safe_open(second, "pt") as opened:
        about = opened.metadata()
    place = {"rank": "1", "pipeline": "0", "tensor": "1", "expert": "0", "expert_tensor": "1", "format": "pt"}
    assert {name: value for name, value in about.items() if name != "plan"} == place

    bytes_of_first, bytes_of_second = first.read_bytes(), second.read_bytes()
    second.write_bytes(bytes_of_first)
    with pytest.raises(ValueError, match=r"rank-00001-of-00002\.safetensors is of rank 0 and of this plan; the files"):
        whole(folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"rank-00001-of-00002\.safetensors is missing"):
        whole(folder)
    save_file(load_file(first), second)
    with pytest.raises(ValueError, match="is of rank None and of another plan"):
        whole(folder)
    other = {
        name: replace(weight, multiple=2) if weight.kind == "vocabulary" else weight for name, weight in plan.items()
    }
    write(Tensors(own), Sharding(other, Sizes(tensor=2)), tmp_path / "other")
    second.write_bytes((tmp_path / "other" / second.name).read_bytes())
    with pytest.raises(
        ValueError, match=r"is of rank 1 and of another plan; the files of a folder are written together"
    ):
        whole(folder)
    second.write_bytes(bytes_of_second)
    assert same(everything(whole(folder)), own)
    values = load_file(second)
    values["ln_f.bias"][3] = float("nan")
    save_file(values, second, about)
    with pytest.raises(
        Mismatch, match=r"ln_f\.bias, which is on ranks 0, 1: copy 1 differs from the first in 1 of 16 values"
    ):
        whole(folder).get("ln_f.bias")
    (folder / "ranks.json").write_text("[")
    with pytest.raises(ValueError, match=r"has no ranks\.json that says how weights lie on ranks"):
        whole(folder)


# How it is done ------------------------------------------------------------------------------------------------------------


class Counted:
    """A source that counts its readings, and what of them is still in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.read, self.alive = tensors, list[str](), 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def meta(self, name: str) -> Tensor:
        return self.tensors[name].to("meta")

    def get(self, name: str) -> Tensor:
        assert not self.alive, "what was read before is gone"
        self.read.append(name)
        made = self.tensors[name].clone()
        self.alive += 1
        weakref.finalize(made.untyped_storage(), self._gone)
        return made

    def _gone(self) -> None:
        self.alive -= 1


def test_every_full_weight_is_read_once_and_let_go(tmp_path: Path) -> None:
    plan, own = full("experts")
    source, heard = Counted(own), list[tuple[str, int, int]]()
    write(source, Sharding(plan, Sizes(tensor=2, expert=2, pipeline=2)), tmp_path / "ranks", lambda *x: heard.append(x))
    assert sorted(source.read) == sorted(own)
    assert [name for name, _, _ in heard] == list(own)
    assert heard[-1][1] == heard[-1][2] and [done for _, done, _ in heard] == sorted({done for _, done, _ in heard})
    write_folder(whole(tmp_path / "ranks"), tmp_path)
    assert same(everything(Folder(tmp_path)), own)


def test_nothing_is_left_of_files_that_were_not_finished(tmp_path: Path) -> None:
    plan, own = full("a GPT-2")

    class Broken(Tensors):
        def get(self, name: str) -> Tensor:
            if name == "h.3.mlp.up.weight":
                raise OSError("the disk is gone")
            return super().get(name)

    with pytest.raises(OSError, match="the disk is gone"):
        write(Broken(own), Sharding(plan, Sizes(tensor=2)), tmp_path / "ranks")
    assert not list(tmp_path.iterdir())


def test_dtypes_are_those_of_the_source(tmp_path: Path) -> None:
    plan, own = full("a Llama")
    kinds = (torch.bfloat16, torch.float16, torch.float64, torch.int8)
    mixed = {name: t.to(kinds[i % 4]) for i, (name, t) in enumerate(own.items())}
    plan["odd"], mixed["odd"] = Weight((3,), "replicated"), torch.ones(3, dtype=torch.int8)
    write(Tensors(mixed), Sharding(plan, Sizes(tensor=2)), tmp_path / "ranks")
    for path in (tmp_path / "ranks").glob("rank-*"):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        sizes = {"BF16": 2, "F16": 2, "F64": 8, "I8": 1, "F32": 4}
        starts = [(t["dtype"], 8 + length + t["data_offsets"][0]) for n, t in header.items() if n != "__metadata__"]
        assert starts and all(start % sizes[dtype] == 0 for dtype, start in starts), "elements begin where they may"
    back = whole(tmp_path / "ranks")
    assert same(everything(back), mixed) and all(back.meta(n).dtype == t.dtype for n, t in mixed.items())
    source = Rank(Sharding(plan, Sizes(tensor=2)), Tensors(mixed), 1)
    assert all(source.meta(n).dtype == source.get(n).dtype for n in source.names())
    assert {asdict(w)["dtype"] for w in back.sharding.weights.values()} == set(kinds)
