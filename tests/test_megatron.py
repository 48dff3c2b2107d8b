"""Names and layouts of megatron-core by hand: every row is numbered, and where it should be is counted out in loops.

Nothing here knows the library; `test_megatron_system` holds the same against it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load, load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_all
from torch.distributed.checkpoint.state_dict_saver import save as save_all

from convert import megatron
from convert.kinds import Sizes
from convert.mapping import Mismatch, Source, Tensors, copies
from convert.megatron import checkpoint, plain, ranks
from convert.megatron.metadata import FILE, stored
from convert.megatron.names import Form, exported, mapped, padded, recognised, rules
from core.options import Reader
from core.weights import weights
from gpt_conf import ModelConfig
from model import GPT, assemble, build
from train_args import Config
from variations import CATALOGUE

STATE = Form("local", "each", parts=False)  # a state dict without Transformer Engine
LAYER = "decoder.layers.0."


def numbered(**changes: Any) -> GPT:
    """A model in which every number of a tensor is another one, and matrices have 100 times the row plus the column; and an eighth
    more in every further layer."""
    base = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 10, "norm": "rmsnorm", "position": "rope",
            "tie_weights": False, "mlp": {"variant": "gated", "width": 8}}  # fmt: skip
    reader = Reader(CATALOGUE)
    config: ModelConfig | None = reader.read(ModelConfig, base | changes)
    assert config is not None, [str(m) for m in reader.mistakes]
    model = build(config, 0)
    with torch.no_grad():
        for name, tensor in weights(model).items():
            layer = int(name.split(".")[1]) / 8 if name.startswith("h.") else 0.0
            columns = torch.arange(tensor.shape[-1]) + layer
            rows = torch.arange(tensor.numel() // len(columns) if tensor.dim() > 1 else 1)
            tensor.copy_((100 * rows[:, None] + columns).view(tensor.shape))
    return model


def theirs(model: GPT, form: Form = STATE) -> dict[str, Tensor]:
    return copies(exported(Tensors(weights(model)), model, form))


def back(model: GPT, made: dict[str, Tensor], form: Form | None = None) -> None:
    """Core's tensors come back as the model's, bit for bit."""
    found = copies(mapped(Tensors(made), model, form))
    for name, tensor in weights(model).items():
        assert torch.equal(found[name], tensor), name


# Layouts -------------------------------------------------------------------------------------------------------------------


@given(some.integers(1, 3), some.integers(1, 3), some.sampled_from([2, 4]), some.booleans(), some.booleans())
@settings(max_examples=25, deadline=None)
def test_the_rows_of_each_group_of_heads_are_together(
    groups: int, queries: int, width: int, gate: bool, bias: bool
) -> None:
    attention = {"variant": "causal", "gate": gate, "qkv_bias": bias}
    heads = groups * queries
    model = numbered(n_head=heads, n_kv_head=groups, head_dim=width, bias=False, attention=attention)
    rows = []  # of ours: [q; k; v; z]
    q, k = heads * width, groups * width
    for group in range(groups):
        own = [head * width + d for head in range(group * queries, (group + 1) * queries) for d in range(width)]
        rows += own
        rows += [q + 2 * k + row for row in own] if gate else []
        rows += [q + group * width + d for d in range(width)]
        rows += [q + k + group * width + d for d in range(width)]
    made = theirs(model)
    assert made[f"{LAYER}self_attention.linear_qkv.weight"][:, 0].tolist() == [100 * row for row in rows]
    name = f"{LAYER}self_attention.linear_qkv.bias"
    assert (name in made) == bias and (not bias or made[name].tolist() == rows)
    back(model, made)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_rank_has_its_share_of_gate_and_of_up(count: int, tmp_path: Path) -> None:
    model = numbered(n_head=4, n_kv_head=2, bias=True)  # 2 groups, which 4 ranks cut through
    ranks.write(exported(Tensors(weights(model)), model, STATE), Sizes(count), tmp_path / "x", multiple=4)
    held = [load_file(tmp_path / "x" / f"mp_rank_{rank:02}" / "model.safetensors") for rank in range(count)]
    whole, width = theirs(model), 8 // count
    for rank, own in enumerate(held):
        half = [rank * width + i for i in range(width)]
        first = half + [8 + row for row in half]
        assert own[f"{LAYER}mlp.linear_fc1.weight"][:, 0].tolist() == [100 * row for row in first]
        assert own[f"{LAYER}mlp.linear_fc1.bias"].tolist() == first
        for name, size in (("self_attention.linear_proj", 8), ("mlp.linear_fc2", 8)):
            columns = [rank * size // count + i for i in range(size // count)]
            assert own[f"{LAYER}{name}.weight"][0].tolist() == columns
            assert own[f"{LAYER}{name}.bias"].tolist() == list(range(8))  # the sum of all ranks has it once
        rows = 16 // count
        assert own[f"{LAYER}self_attention.linear_qkv.bias"].tolist() == (
            whole[f"{LAYER}self_attention.linear_qkv.bias"][rank * rows : (rank + 1) * rows].tolist()
        )
        size = padded(10, 4, count)
        tokens = [rank * size // count + i for i in range(size // count)]
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert own[name][:, 1].tolist() == [100 * token + 1 if token < 10 else 0 for token in tokens]
        for name in ("input_layernorm.weight", "pre_mlp_layernorm.weight"):
            assert own[f"{LAYER}{name}"].tolist() == list(range(8))
    back(model, copies(megatron.opened(tmp_path / "x")))


def test_the_state_dict_of_a_model_without_transformer_engine() -> None:
    model = numbered(bias=True, norm="layernorm", attention={"variant": "causal", "qk_norm": True}, position="learned")
    at, inner = f"{LAYER}self_attention.", f"{LAYER}mlp."
    wanted = {
        *("embedding.word_embeddings.weight", "embedding.position_embeddings.weight", "output_layer.weight"),
        *(f"{at}{linear}.{leaf}" for linear in ("linear_qkv", "linear_proj") for leaf in ("weight", "bias")),
        *(f"{at}{norm}.{leaf}" for norm in ("q_layernorm", "k_layernorm") for leaf in ("weight", "bias")),
        *(f"{inner}{linear}.{leaf}" for linear in ("linear_fc1", "linear_fc2") for leaf in ("weight", "bias")),
        *(f"{LAYER}{norm}.{leaf}" for norm in ("input_layernorm", "pre_mlp_layernorm") for leaf in ("weight", "bias")),
        *(f"decoder.final_layernorm.{leaf}" for leaf in ("weight", "bias")),
    }
    assert set(theirs(model)) == wanted
    fused = set(theirs(model, replace(STATE, norms="fused")))
    norms = {f"{at}linear_qkv.layer_norm_{leaf}" for leaf in ("weight", "bias")}
    norms |= {f"{inner}linear_fc1.layer_norm_{leaf}" for leaf in ("weight", "bias")}
    assert fused - wanted == norms and len(wanted - fused) == 4
    for form in (STATE, replace(STATE, norms="fused")):
        back(model, theirs(model, form))


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_gains_around_zero_and_around_one(ours: bool, core: bool) -> None:
    attention = {"variant": "causal", "qk_norm": True}
    model = numbered(norm={"variant": "rmsnorm", "zero_centred": ours}, attention=attention, bias=False)
    made = theirs(model, replace(STATE, zero_centred=core))
    for name in (
        "decoder.final_layernorm",
        f"{LAYER}input_layernorm",
        f"{LAYER}pre_mlp_layernorm",
        f"{LAYER}self_attention.q_layernorm",
    ):
        tensor = made[f"{name}.weight"]
        gains = torch.arange(len(tensor)) + ours  # what multiplies
        assert torch.equal(tensor + core, gains.float())
    back(model, made, recognised(Tensors(made), core))


def test_a_vocabulary_is_filled_up_with_zeros_and_cut_back() -> None:
    assert [padded(50257), padded(50257, 128, 2), padded(128)] == [50304, 50432, 128]
    model = numbered()
    made = theirs(model, replace(STATE, vocabulary=16))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert made[name].shape == (16, 8) and not made[name][10:].any() and made[name][9, 0] == 900
    back(model, made)
    with pytest.raises(Mismatch, match=r"wte\.weight would be \[9, 8\].*it is \[10, 8\]"):
        mapped(Tensors({**made, "embedding.word_embeddings.weight": torch.zeros(9, 8)}), model)


def test_a_tied_head_is_in_the_last_stage_as_a_copy() -> None:
    model = numbered(tie_weights=True)
    assert "output_layer.weight" not in theirs(model)
    made = theirs(model, replace(STATE, copied=True))
    assert torch.equal(made["output_layer.weight"], made["embedding.word_embeddings.weight"])
    back(model, made)
    made["output_layer.weight"][3, 3] = 0
    with pytest.raises(Mismatch, match=r"wte\.weight.*differs"):
        copies(mapped(Tensors(made), model))


EXPERTS = {
    "n_layer": 2,
    "bias": False,
    "mlp": {"variant": "moe", "experts": 3, "width": 4, "bias_rate": 0.1, "shared_experts": 1},
}


@pytest.mark.parametrize("form", ["stacked", "single", "each", "grouped", "flat"])
def test_experts_in_every_form(form: Any) -> None:
    """Of expert e the gate has rows 8 e to 8 e + 4 of ours, up the four after, and down has rows 8 e to 8 e + 8."""
    model = numbered(**EXPERTS)
    made = theirs(model, Form("local", form, halves=form == "single"))
    at = f"{LAYER}mlp."
    for e in range(3):
        first = [100.0 * (8 * e + row) for row in range(8)]
        down = [100.0 * (8 * e + row) for row in range(8)]
        if form == "stacked":
            own = [made[f"{at}experts.experts.{linear}.weight"][e] for linear in ("linear_fc1", "linear_fc2")]
        elif form == "single":
            gate, up, second = (
                made[f"{at}experts.experts.{e}.{x}"]
                for x in ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight")
            )
            own = [torch.cat((gate, up)), second]
        elif form == "each":
            own = [made[f"{at}experts.local_experts.{e}.{linear}.weight"] for linear in ("linear_fc1", "linear_fc2")]
        elif form == "grouped":
            own = [made[f"{at}experts.{linear}.weight{e}"] for linear in ("linear_fc1", "linear_fc2")]
        else:  # the memory of [E, in, out]
            assert made[f"{at}experts.weight1"].shape == (8, 24) and made[f"{at}experts.weight2"].shape == (12, 8)
            memory = [made[f"{at}experts.weight{i}"].flatten().tolist() for i in (1, 2)]
            own = [
                torch.tensor([[memory[0][e * 64 + column * 8 + row] for column in range(8)] for row in range(8)]),
                torch.tensor([[memory[1][e * 32 + column * 8 + row] for column in range(4)] for row in range(8)]),
            ]
        assert own[0][:, 0].tolist() == first and own[0][0].tolist() == [first[0] + i for i in range(8)]
        assert own[1][:, 0].tolist() == down and own[1][0].tolist() == [down[0] + i for i in range(4)]
    assert made[f"{at}router.weight"].shape == (3, 8) and made[f"{at}router.expert_bias"].tolist() == [0, 1, 2]
    assert f"{at}shared_experts.linear_fc2.weight" in made and f"{LAYER}pre_mlp_layernorm.weight" in made
    back(model, made)


def test_norms_before_experts_have_three_names() -> None:
    model = numbered(**EXPERTS)
    for norms, name in {
        "local": "pre_mlp_layernorm.weight",
        "fused": "pre_mlp_layernorm.weight",
        "mapped": "mlp.linear_fc1.layer_norm_weight",
    }.items():
        made = theirs(model, Form(norms))  # type: ignore[arg-type]
        assert f"{LAYER}{name}" in made
        assert (f"{LAYER}input_layernorm.weight" in made) == (norms == "local")
        back(model, made)


def test_a_model_with_state_space_mixers_counts_mixers_and_networks() -> None:
    mamba = {"variant": "mamba2", "head_dim": 4, "d_state": 3}
    sites = {"alone": {"match": "h.1.mlp", "mlp": "none"}}
    model = numbered(n_layer=3, bias=False, attention=mamba, layer_pattern=["mamba2", "mamba2", "causal"], sites=sites)
    for form in (STATE, Form()):
        made = theirs(model, form)
        kinds = {
            int(name.split(".")[2]): name.split(".")[3]
            for name in made
            if name.startswith("decoder.layers.") and "norm" not in name.split(".")[3]
        }
        assert kinds == {0: "mixer", 1: "mlp", 2: "mixer", 3: "self_attention", 4: "mlp"}
        assert "decoder.final_norm.weight" in made
        back(model, made)
    at, inner, state, heads = f"{LAYER}mixer.", 16, 3, 4
    made = theirs(model)
    assert made[f"{at}in_proj.weight"].shape == (2 * inner + 2 * state + heads, 8)
    assert made[f"{at}conv1d.weight"].shape == (inner + 2 * state, 1, 4)
    apart = theirs(model, Form())
    begins = {"z": 0, "x": inner, "B": 2 * inner, "C": 2 * inner + state, "dt": 2 * inner + 2 * state}
    assert {part: apart[f"{at}in_proj.weight.{part}"][0, 0].item() / 100 for part in begins} == begins
    begins = {"x": 0, "B": inner, "C": inner + state}
    assert {part: apart[f"{at}conv1d.weight.{part}"][0, 0, 0].item() / 100 for part in begins} == begins
    assert {part: apart[f"{at}conv1d.bias.{part}"][0].item() for part in begins} == begins


def test_a_sum_of_two_numbers_goes_out_as_what_multiplies() -> None:
    model = numbered(linear={"variant": "pkl", "scale": 0.5}, bias=False)
    own = weights(model)
    made = theirs(model)
    whole = own["h.0.mlp.down.weight"]
    assert torch.equal(made[f"{LAYER}mlp.linear_fc2.weight"], whole[0] + 0.5 * whole[1])
    found = copies(mapped(Tensors(made), model))["h.0.mlp.down.weight"]
    assert torch.equal(found[0], made[f"{LAYER}mlp.linear_fc2.weight"]) and not found[1].any()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention": "memory"}, r"no place for h\.0\.attn\.memory, h\.0\.attn\.kv"),
        ({"attention": "delta"}, r"h\.0\.attn is a DeltaRule, and megatron-core has causal attention and Mamba-2"),
        ({"embedding": "ngram", "tie_weights": False}, r"no place for wte"),
        (
            {"n_embd": 16, "attention": {"variant": "mamba2", "groups": 2, "head_dim": 4}},
            r"in as many as share B and C, 2",
        ),
    ],
)
def test_what_core_has_no_place_for_is_said(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rules(numbered(bias=False, **changes), STATE)


def test_adapters_are_to_be_merged() -> None:
    reader = Reader(CATALOGUE)
    tree = {"model": {"vocab_size": 10}, "slices": {"x": {"match": "h.*.attn.qkv[q]", "lora": {"rank": 2}}}}
    config: Config | None = reader.read(Config, tree)
    assert config is not None
    model, _ = assemble(config.model, config.slices, config.optimizer)
    with pytest.raises(ValueError, match=r"no place for h\.0\.attn\.qkv.*merge adapters first"):
        rules(model, STATE)


def test_weights_of_another_model_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"no 'embedding\.word_embeddings\.weight'"):
        mapped(Tensors({"model.embed_tokens.weight": torch.zeros(2)}), numbered())
    made = theirs(numbered(n_layer=2))
    with pytest.raises(Mismatch, match=r"Left over, as the target has no such weights: h\.1"):
        mapped(Tensors(made), numbered(n_layer=1))


# Ranks ---------------------------------------------------------------------------------------------------------------------


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("experts", ["each", "grouped"])
def test_divided_anew_it_is_as_if_divided_so_at_first(experts: Any, tmp_path: Path) -> None:
    model = numbered(
        **EXPERTS | {"tie_weights": True, "mlp": {"variant": "moe", "experts": 4, "width": 4}}, n_head=4, n_kv_head=1
    )
    full = exported(Tensors(weights(model)), model, Form("local", experts, parts=False))
    wanted = {}
    several = [Sizes(), Sizes(2), Sizes(4), Sizes(1, 2), Sizes(2, 2, 2), Sizes(1, 1, 4), Sizes(1, 2, layers=(2, 0))]
    for i, sizes in enumerate(several):
        ranks.write(full, sizes, tmp_path / str(i), 4)
        wanted[i] = bytes_of(tmp_path / str(i))
        back(model, copies(ranks.read(tmp_path / str(i))))
    for i in (1, 4, 5):
        for j, sizes in enumerate(several):
            ranks.reshard(tmp_path / str(i), sizes, tmp_path / f"{i} {j}", vocabulary=10, multiple=4)
            made = bytes_of(tmp_path / f"{i} {j}")
            assert made.keys() == wanted[j].keys()
            assert [n for n in made if tensors(made[n]) != tensors(wanted[j][n])] == []


def tensors(data: bytes) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load(data).items()}


def test_ranks_are_named_as_megatron_names_them(tmp_path: Path) -> None:
    model = numbered(**EXPERTS | {"mlp": {"variant": "moe", "experts": 4, "width": 4}})
    full = exported(Tensors(weights(model)), model, STATE)
    ranks.write(full, Sizes(2, 2, 2), tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        f"mp_rank_{t:02}_{p:03}_{e:03}" for t in range(2) for p in range(2) for e in range(2)
    ]
    own = load_file(tmp_path / "x" / "mp_rank_01_001_001" / "model.safetensors")
    # The second layer and the third expert, counted from 0 again, and of its gate and up the second halves.
    first = own["decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight"]
    assert first[:, 0].tolist() == [100.0 * (8 * 2 + row) + 1 / 8 for row in (2, 3, 6, 7)]
    assert "output_layer.weight" in own and "embedding.word_embeddings.weight" not in own
    assert not any(".local_experts.2." in name for name in own)


def test_ranks_that_are_missing_or_do_not_divide_are_said(tmp_path: Path) -> None:
    model = numbered(n_head=4)
    full = exported(Tensors(weights(model)), model, STATE)
    with pytest.raises(Mismatch, match=r"linear_proj\.weight \[8, 8\], of kind row.*3 ranks"):
        ranks.write(full, Sizes(3), tmp_path / "x")
    with pytest.raises(ValueError, match="expert_tensor"):
        ranks.write(full, Sizes(2, expert_tensor=1), tmp_path / "x")
    assert not list(tmp_path.iterdir())
    ranks.write(full, Sizes(2), tmp_path / "x")
    (tmp_path / "x" / "mp_rank_00" / "model.safetensors").unlink()
    (tmp_path / "x" / "mp_rank_00").rmdir()
    with pytest.raises(ValueError, match=r"lacks the ranks .* \(0, 0, 0\)"):
        megatron.opened(tmp_path / "x")
    with pytest.raises(ValueError, match=r"not known here: decoder\.layers\.0\.odd"):
        ranks.weights_of({"decoder.layers.0.odd": torch.zeros(2)})


# Distributed checkpoints ---------------------------------------------------------------------------------------------------


def test_layers_that_are_alike_are_one_tensor_for_torch(tmp_path: Path) -> None:
    """What torch's own reader makes of the folder."""
    model = numbered(n_layer=3, bias=False)
    megatron.export(Tensors(weights(model)), model, tmp_path / "x", multiple=16)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "metadata.json",
    ]
    known = {name: what.shape for name, what in stored(tmp_path / "x").items()}
    assert known["embedding.word_embeddings.weight"] == (16, 8)
    assert known["decoder.layers.mlp.linear_fc1.layer_norm_weight"] == (3, 8)
    read = {name: torch.empty(size) for name, size in known.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        load_all(read, checkpoint_id=tmp_path / "x", no_dist=True)
    made = theirs(model, Form(vocabulary=16))
    for name, tensor in made.items():
        _, _, rest = name.partition("decoder.layers.")
        i, _, rest = rest.partition(".")
        found = read[f"decoder.layers.{rest}"][int(i)] if rest else read[name]
        assert torch.equal(found, tensor), name
    back(model, copies(megatron.opened(tmp_path / "x")))


def test_a_tensor_of_several_pieces_is_put_together(tmp_path: Path) -> None:
    model = numbered(n_layer=3, bias=False)
    megatron.export(Tensors(weights(model)), model, tmp_path / "x")
    source, name = checkpoint.Checkpoint(tmp_path / "x"), "decoder.layers.mlp.linear_fc2.weight"
    source.places["all"] = checkpoint.Where(name)
    down = torch.stack([weights(model)[f"h.{i}.mlp.down.weight"] for i in range(3)])
    assert torch.equal(source.get("all"), down)
    known = source.stored[name]
    source.stored[name] = replace(known, boxes=dict(list(known.boxes.items())[1:]))
    with pytest.raises(ValueError, match="does not have all of all"):
        source.get("all")
    assert torch.equal(source.get("decoder.layers.1.mlp.linear_fc2.weight"), down[1])


def test_states_that_core_asks_for_are_there_and_empty(tmp_path: Path) -> None:
    """Their names were read in a checkpoint of core; those for Transformer Engine are more."""
    model = numbered(**EXPERTS)
    megatron.export(Tensors(weights(model)), model, tmp_path / "x", norms="local")
    known = set(pickle.loads((tmp_path / "x" / FILE).read_bytes()).state_dict_metadata)
    for i in range(2):
        linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
        shared = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
        assert known >= {f"decoder.layers.{name}._extra_state/shard_{i}_2" for name in (*linears, *shared)}
        of = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
        assert known >= {f"decoder.layers.{name}._extra_state/shard_{i}.{e}_2.3" for name in of for e in range(3)}
    form = Form(experts="single", halves=True)
    checkpoint.write(exported(Tensors(weights(model)), model, form), tmp_path / "y")
    known = set(pickle.loads((tmp_path / "y" / FILE).read_bytes()).state_dict_metadata)
    assert "decoder.layers.1.mlp.experts.experts.2.linear_fc1._extra_state/shard_0_1" in known


def test_what_torch_writes_is_read_layer_by_layer(tmp_path: Path) -> None:
    """All layers in one piece, of which each is a part."""
    model = numbered(n_layer=3, bias=False)
    made = theirs(model, Form())
    held: dict[str, Tensor] = {}
    for name, tensor in made.items():
        _, _, rest = name.partition("decoder.layers.")
        key = f"decoder.layers.{rest.partition('.')[2]}" if rest else name
        held[key] = torch.cat((held[key], tensor[None])) if key in held else tensor[None] if rest else tensor
    held["optimizer.state.exp_avg"] = torch.zeros(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_all(
            {**held, "rng_state": {"object": "of any kind"}}, checkpoint_id=tmp_path / "iter_0000012", no_dist=True
        )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    source = megatron.opened(tmp_path)
    assert {n for n in source.names() if not n.startswith("optimizer")} == set(made)
    back(model, copies(source) | {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(1)})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    with pytest.raises(ValueError, match="is not the number of an iteration"):
        megatron.opened(tmp_path)


def test_layers_that_differ_have_numbers(tmp_path: Path) -> None:
    model = numbered(n_layer=2, bias=False, sites={"x": {"match": "h.1.mlp", "mlp": {"variant": "gated", "width": 16}}})
    megatron.export(Tensors(weights(model)), model, tmp_path / "x")
    assert "decoder.layers.1.mlp.linear_fc1.weight" in stored(tmp_path / "x")
    back(model, copies(megatron.opened(tmp_path / "x")))


class Watched:
    """A source that makes tensors of its own and counts those that are alive when the next one is asked for."""

    def __init__(self, source: Source, at_most: int = 1000) -> None:
        self.source, self.alive, self.most, self.left = source, list[Any](), 0, at_most

    def names(self) -> list[str]:
        return self.source.names()

    def meta(self, name: str) -> Tensor:
        return self.source.meta(name)

    def get(self, name: str) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.most = max(self.most, sum(each() is not None for each in self.alive))
        made = self.source.get(name).clone()
        self.alive.append(weakref.ref(made))
        return made


@pytest.mark.parametrize("sizes", [None, Sizes(2)])
def test_tensors_are_asked_for_one_after_another(sizes: Sizes | None, tmp_path: Path) -> None:
    model = numbered(n_layer=4, bias=False)
    told: list[tuple[str, int, int]] = []
    watched = Watched(Tensors(weights(model)))
    megatron.export(watched, model, tmp_path / "x", sizes, told=lambda *each: told.append(each))
    assert watched.most <= 1  # that which is written while the next one is made
    assert len(told) == 3 + 4 * 6 and told[-1][1] == told[-1][2]


@pytest.mark.parametrize("sizes", [None, Sizes(2)])
def test_of_an_interrupted_export_nothing_stays(sizes: Sizes | None, tmp_path: Path) -> None:
    model = numbered(bias=False)
    with pytest.raises((KeyboardInterrupt, CheckpointException)):
        megatron.export(Watched(Tensors(weights(model)), 5), model, tmp_path / "x", sizes)
    assert not list(tmp_path.iterdir())


# Nothing on disk is executed -----------------------------------------------------------------------------------------------


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path, act: Any = os.mkdir) -> None:
        self.path, self.act = path, act

    def __reduce__(self) -> tuple[Any, ...]:
        return self.act, (str(self.path),)


@pytest.mark.parametrize("act", [os.mkdir, eval, exec, getattr, os.system, __import__, torch.load, type])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_that_would_run_something_is_refused_by_name(act: Any, protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps({"a": [1, Evil(tmp_path / "made", act)]}, protocol)
    (tmp_path / FILE).write_bytes(data)
    name = {os.mkdir: "posix.mkdir", os.system: "posix.system"}.get(act, act.__name__)
    with pytest.raises(ValueError, match=rf"is refused: it would import .*{name}, which is not admitted"):
        stored(tmp_path)
    assert not (tmp_path / "made").exists()
    if act is os.mkdir:
        pickle.loads(data)  # it would have
        assert (tmp_path / "made").exists()


def test_a_tensor_that_would_run_something_is_refused(tmp_path: Path) -> None:
    model = numbered(bias=False)
    megatron.export(Tensors(weights(model)), model, tmp_path / "x")
    torch.save(Evil(tmp_path / "made"), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    source = checkpoint.Checkpoint(tmp_path / "x")
    (piece,) = source.stored["embedding.word_embeddings.weight"].boxes.values()
    file = tmp_path / "x" / piece.relative_path
    data = file.read_bytes()
    assert len(evil) <= piece.length
    rest = data[piece.offset + len(evil) : piece.offset + piece.length]
    for put in (evil + rest, bytes(piece.length - len(evil)) + evil, b""):
        file.write_bytes(data[: piece.offset] + put + (data[piece.offset + piece.length :] if put else b""))
        with pytest.raises(ValueError, match=r"embedding\.word_embeddings\.weight cannot be read"):
            source.get("embedding.word_embeddings.weight")
    assert not (tmp_path / "made").exists()


def test_damaged_and_odd_metadata_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        megatron.opened(tmp_path)
    model = numbered(bias=False)
    megatron.export(Tensors(weights(model)), model, tmp_path / "x")
    good = (tmp_path / "x" / FILE).read_bytes()
    for data in (
        b"",
        b"no pickle",
        good[: len(good) // 2],
        good[:-1],
        pickle.dumps([1]),
        pickle.dumps({"a": 1}, 0),
        pickle.dumps(None),
    ):
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(ValueError, match=r"is refused|is not what torch\.distributed\.checkpoint writes"):
            stored(tmp_path)
    assert good.count(b"__0_0.distcp") == 1
    (tmp_path / FILE).write_bytes(good.replace(b"__0_0.distcp", b"../../x.dist"))
    with pytest.raises(ValueError, match="names a file elsewhere"):
        stored(tmp_path)


leaves = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text() | some.binary()
keys = some.integers() | some.text()
trees = some.recursive(
    leaves | some.sets(some.integers()) | some.frozensets(some.text()),
    lambda x: some.lists(x) | some.dictionaries(keys, x) | some.lists(x, max_size=5).map(tuple),
    max_leaves=30,
)


@given(trees, some.integers(4, 5))
@settings(max_examples=150, deadline=None)
def test_plain_data_is_read_as_python_reads_it(tree: Any, protocol: int) -> None:
    twice = [tree]
    found = plain.read(pickle.dumps([twice, twice, (twice,)], protocol), lambda name: False)
    assert found == [twice, twice, (twice,)] and found[0] is found[1] is found[2][0]


@given(some.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_bytes_of_any_kind_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(plain.Refused):
        plain.read(b"\x80\x04" + data, lambda name: True)
