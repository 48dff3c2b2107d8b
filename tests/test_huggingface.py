"""Hugging Face folders without the library: what is read, what is refused, and which row becomes which, by indices."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import cases, scramble, sentence
from models import config as model_config
from safetensors.torch import save_file
from torch import Tensor

from convert.files import Folder
from convert.huggingface import FAMILIES, mapped, model_node, pick_family, write
from convert.huggingface.family import configured
from convert.huggingface.ours import Ours, differences
from convert.mapping import Mismatch, fill
from core.weights import weights
from gpt_conf import KINDS
from model import GPT, build

C, H, K, D, F, V, T, E = 12, 3, 1, 4, 5, 7, 6, 2
SIZES: dict[str, Any] = {
    "hidden_size": C,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "intermediate_size": F,
    "vocab_size": V,
    "max_position_embeddings": T,
}
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 3},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 3, "attention_factor": 1.25, "truncate": False},
    "longrope": {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 3},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": C, "n_layer": 2, "n_head": H, "vocab_size": V, "n_positions": T},
    "llama": LLAMA,
    **{f"llama-{kind}": {**LLAMA, "rope_parameters": {"rope_type": kind, **more}} for kind, more in ROPES.items()},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 6},
    "phi3": {"model_type": "phi3", **SIZES, "sliding_window": 3, "partial_rotary_factor": 0.5},
    "gemma": {"model_type": "gemma", **SIZES, "head_dim": 6},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": E},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "mamba2": {
        "model_type": "mamba2",
        "hidden_size": C,
        "num_hidden_layers": 2,
        "vocab_size": V,
        "num_heads": 4,
        "head_dim": 6,
        "state_size": 3,
        "n_groups": 2,
        "conv_kernel": 3,
    },
    "bamba": {
        "model_type": "bamba",
        **SIZES,
        "mamba_n_heads": 4,
        "mamba_d_state": 3,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
    },
}


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, path / "model.safetensors")
    return path


def family(config: dict[str, Any]) -> Any:
    return FAMILIES[config["model_type"]]


def counted(*shape: int) -> Tensor:
    """Numbers that are all different, also from those of every other tensor."""
    counted.first += 100_000  # type: ignore[attr-defined]
    made = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return (made + counted.first).double()  # type: ignore[attr-defined]


counted.first = 0  # type: ignore[attr-defined]


def taken(path: Path) -> dict[str, Tensor]:
    """The weights of our model, filled from a folder."""
    config = configured(model_node(path))
    made = build(config, 0).double()
    fill(weights(made), mapped(path, config))
    return weights(made)


def llama(layers: int = 2) -> dict[str, Tensor]:
    """The tensors of `LLAMA`."""
    made = {
        "model.embed_tokens.weight": counted(V, C),
        "model.norm.weight": counted(C),
        "lm_head.weight": counted(V, C),
    }
    for i in range(layers):
        for name, rows in (("q", H * D), ("k", K * D), ("v", K * D)):
            made[f"model.layers.{i}.self_attn.{name}_proj.weight"] = counted(rows, C)
        made[f"model.layers.{i}.self_attn.o_proj.weight"] = counted(C, H * D)
        for name in ("gate", "up"):
            made[f"model.layers.{i}.mlp.{name}_proj.weight"] = counted(F, C)
        made[f"model.layers.{i}.mlp.down_proj.weight"] = counted(C, F)
        for name in ("input", "post_attention"):
            made[f"model.layers.{i}.{name}_layernorm.weight"] = counted(C)
    return made


# Configurations -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_comes_back_as_the_same_model(case: str) -> None:
    made = family(CONFIGS[case])
    first = configured(made.read(CONFIGS[case]))
    said = made.write(first)
    assert said["model_type"] == made.name and said["architectures"] == [made.architecture]
    assert json.loads(json.dumps(said)) == said
    second = configured(made.read(said))
    assert not differences(Ours(first), Ours(second), ())
    assert made.write(second) == said


def test_what_a_configuration_says_is_our_model_node() -> None:
    node = FAMILIES["llama"].read({**LLAMA, "rope_theta": 500.0, "attention_bias": True, "tie_word_embeddings": True})
    assert node == {
        "n_layer": 2,
        "n_head": H,
        "n_kv_head": K,
        "n_embd": C,
        "head_dim": D,
        "block_size": T,
        "vocab_size": V,
        "bias": False,
        "tie_weights": True,
        "norm": {"variant": "rmsnorm", "eps": 1e-6},
        "activation": "silu",
        "position": {"variant": "rope", "base": 500.0},
        "attention": {"variant": "causal", "qkv_bias": True, "proj_bias": True},
        "mlp": {"variant": "gated", "width": F},
    }


@pytest.mark.parametrize("kind", ROPES)
def test_former_names_of_rope_mean_the_same(kind: str) -> None:
    today = {**LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}}
    former = {**LLAMA, "rope_theta": 500.0, "rope_scaling": {"type": kind, **ROPES[kind]}}
    assert FAMILIES["llama"].read(today) == FAMILIES["llama"].read(former)


@pytest.mark.parametrize("former", ["su", "yarn"])
def test_former_words_of_phi3_for_its_scaling(former: str) -> None:
    said = {**CONFIGS["phi3"], "partial_rotary_factor": 1.0, "original_max_position_embeddings": 3}
    numbers = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    node = FAMILIES["phi3"].read({**said, "rope_scaling": {"type": former, **numbers}})
    assert node == FAMILIES["phi3"].read({**said, "rope_scaling": {"type": "longrope", **numbers}})
    assert node["position"] == {
        "variant": "longrope",
        "base": 1e4,
        "original_length": 3,
        "factor": 2.0,
        "short_factors": [1.0, 2.0],
        "long_factors": [3.0, 4.0],
    }


def test_windows_of_some_layers() -> None:
    made = FAMILIES["qwen3"]
    said = {**CONFIGS["qwen3"], "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 3}
    for more, wanted in (({"max_window_layers": 1}, [None, 3, 3, 3]), ({"max_window_layers": 0}, [3] * 4)):
        ours = Ours(configured(made.read({**said, **more})))
        assert [ours.option(f"h.{i}.attn", "window") for i in range(4)] == wanted
    types = ["sliding_attention", "full_attention"] * 2
    ours = Ours(configured(made.read({**said, "layer_types": types})))
    assert [ours.option(f"h.{i}.attn", "window") for i in range(4)] == [3, None] * 2
    assert made.write(ours.config)["layer_types"] == types


REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True,
        "activation_function": "mish",
        "attn_pdrop": 0.2,
        "n_head": "three",
        "tie_word_embeddings": 1,
        "a_new_key": 3,
    },
    "llama": {
        "attention_dropout": 0.1,
        "hidden_act": "mish",
        "vocab_size": None,
        "rope_scaling": {"rope_type": "dynamic"},
    },
    "qwen3": {"layer_types": ["full_attention", "chunked_attention"], "partial_rotary_factor": 0.5},
    "phi3": {"embd_pdrop": 0.1, "head_dim": 5, "rope_parameters": {"beta": 3.0}},
    "gemma": {"use_bidirectional_attention": True, "final_logit_softcapping": 30.0},
    "mixtral": {"router_jitter_noise": 0.1, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
    "qwen3_moe": {"num_experts_per_tok": 0, "shared_expert_intermediate_size": 4},
    "mamba2": {"time_step_limit": [0.0, 3.0], "hidden_act": "gelu", "head_dim": 5},
    "bamba": {"mamba_d_head": 7, "time_step_limit": [0.1, float("inf")]},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_that_cannot_be_represented_is_named_at_once(name: str) -> None:
    given = {**CONFIGS[name], **REFUSED[name]}
    told = sentence(lambda: FAMILIES[name].read(given)).split("\n")
    for key in REFUSED[name]:
        spelled = {"rope_scaling": "rope_parameters", "embd_pdrop": "resid_pdrop", "attn_pdrop": "resid_pdrop"}.get(
            key, key
        )
        assert any(line.startswith(spelled) for line in told), (key, told)
    assert len(told) == len(REFUSED[name])


def test_numbers_that_a_scaling_needs_are_asked_for() -> None:
    told = sentence(lambda: FAMILIES["llama"].read({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}))
    assert "rope_parameters.low_freq_factor is missing" in told and "high_freq_factor" in told


def test_what_is_off_or_about_other_things_is_no_obstacle() -> None:
    harmless = {
        "rope_scaling": None,
        "some_day": None,
        "lists": [],
        "use_it": False,
        "eos_token_id": [1, 2],
        "dtype": "bfloat16",
    }
    assert FAMILIES["llama"].read({**LLAMA, **harmless}) == FAMILIES["llama"].read(LLAMA)


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    assert "config.json cannot be read" in sentence(lambda: model_node(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in sentence(lambda: model_node(tmp_path))
    told = sentence(lambda: model_node(folder(tmp_path, {"model_type": "qwen4"})))
    assert "model_type is 'qwen4'. Did you mean 'qwen3'?" in told
    told = sentence(lambda: model_node(folder(tmp_path, {**LLAMA, "mlp_biass": True})))
    assert told.startswith(f"{tmp_path}/config.json: mlp_biass is True")
    with pytest.raises(ValueError, match="neither model"):
        mapped(folder(tmp_path, LLAMA), configured(model_node(folder(tmp_path, LLAMA))))


# What a family does not have ------------------------------------------------------------------------------------------------

MODERN: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 6,
    "vocab_size": V,
    "bias": False,
    "tie_weights": False,
    "norm": "rmsnorm",
    "position": "rope",
    "activation": "silu",
    "mlp": {"variant": "gated", "width": 8},
}
UNLIKE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"norm": {"variant": "rmsnorm", "gain": False}}, ["h.0.ln_1.weight", "this weight"]),
    ("llama", {"attention": {"variant": "causal", "qk_norm": True}}, ["h.0.attn.q_norm", "norm is 'rmsnorm'"]),
    ("llama", {"attention": {"variant": "causal", "qkv_bias": True}}, ["h.0.attn.proj.bias", "this weight"]),
    ("llama", {"attention": {"variant": "causal", "gate": True}}, ["gate of the attention is True"]),
    ("llama", {"attention": {"variant": "causal", "softcap": 5.0}}, ["softcap of the attention is 5.0"]),
    ("llama", {"attention": {"variant": "causal", "scale": 1.0}}, ["scale of the attention is 1.0"]),
    ("llama", {"attention": {"variant": "causal", "window": 3}}, ["window of the attention is 3"]),
    ("llama", {"position": {"variant": "rope", "fraction": 0.5}}, ["partial_rotary_factor is 0.5"]),
    ("llama", {"position": "learned"}, ["wpe.weight", "position is 'learned'"]),
    ("llama", {"attention": "delta"}, ["attention is 'delta'", "h.0.attn.A_log"]),
    ("llama", {"embedding_scale": 2.0}, ["embedding_factor", "it is 2.0, and the family would have None"]),
    ("llama", {"logit_softcap": 2.0}, ["logit_softcap"]),
    ("llama", {"embedding": {"variant": "ngram", "rows": 5}}, ["embedding is 'ngram'", "wte.tables"]),
    ("llama", {"n_head": 3, "head_dim": 4}, ["n_embd 8 is not divisible by n_head 3"]),
    ("llama", {"sites": {"one": {"match": "h.1.ln_1", "norm": {"variant": "rmsnorm", "eps": 0.1}}}}, ["h.1.ln_1: eps"]),
    ("llama", {"sites": {"one": {"match": "h.1.mlp", "mlp": {"variant": "gated", "width": 3}}}}, ["h.1.mlp.gate_up"]),
    ("gemma", {}, ["embedding_factor", "the family would have 2.82"]),
    ("gpt2", {"position": "rope"}, ["norm is 'rmsnorm'", "position is 'rope'", "h.0.mlp.gate_up"]),
    ("mixtral", {"mlp": {"variant": "moe", "experts": 3, "renormalise": False}}, ["renormalise of the mlp is False"]),
    ("mixtral", {"mlp": {"variant": "moe", "experts": 3, "shared_experts": 1}}, ["shared_experts of the mlp is 1"]),
    ("mixtral", {"mlp": {"variant": "moe", "experts": 3, "bias_rate": 0.1}}, ["h.0.mlp.balance", "bias_rate"]),
    ("mixtral", {"mlp": {"variant": "moe", "experts": 3, "score": "sigmoid"}}, ["score of the mlp is sigmoid"]),
]


@pytest.mark.parametrize(("name", "tree", "words"), UNLIKE, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(UNLIKE)])
def test_what_a_family_cannot_represent_is_named(name: str, tree: dict[str, Any], words: list[str]) -> None:
    told = sentence(lambda: FAMILIES[name].write(configured({**MODERN, **tree})))
    assert all(word in told for word in words), told


def test_a_softmax_over_the_chosen_experts_is_mixtrals() -> None:
    mlp = {"variant": "moe", "experts": 3, "normalise": "after", "renormalise": False, "width": 8, "load_balance": 0.5}
    said = FAMILIES["mixtral"].write(configured({**MODERN, "mlp": mlp}))
    assert (
        said["num_local_experts"] == 3 and said["router_aux_loss_coef"] == 0.5 and said["output_router_logits"] is True
    )


def test_a_model_finds_its_family_or_hears_why_not() -> None:
    assert pick_family(configured(MODERN)) == "llama"
    told = sentence(lambda: pick_family(configured({**MODERN, "attention": "delta"}))).split("\n")
    assert [line.split(":")[0] for line in told[1:]] == list(FAMILIES)


def test_every_variation_is_taken_or_refused_with_a_sentence() -> None:
    count = 0
    for case in cases(tuple(kind for kind in KINDS if kind != "init")):
        try:
            count += pick_family(model_config(**{**case.trees()[1], "n_layer": 1})) in FAMILIES
        except ValueError as error:
            assert str(error), case
    assert count > 10


# Rows by their indices ------------------------------------------------------------------------------------------------------


def test_separate_parts_are_rows_one_after_another(tmp_path: Path) -> None:
    theirs = llama()
    own = taken(folder(tmp_path, LLAMA, theirs))
    for i in (0, 1):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for row in range((H + 2 * K) * D):
            part, at = (
                ("q", row) if row < H * D else ("k", row - H * D) if row < (H + K) * D else ("v", row - (H + K) * D)
            )
            assert torch.equal(own[f"h.{i}.attn.qkv.weight"][row], theirs[f"{attention}.{part}_proj.weight"][at])
        for row in range(2 * F):
            part, at = ("gate", row) if row < F else ("up", row - F)
            assert torch.equal(own[f"h.{i}.mlp.gate_up.weight"][row], theirs[f"{mlp}.{part}_proj.weight"][at])
        assert torch.equal(own[f"h.{i}.attn.proj.weight"], theirs[f"{attention}.o_proj.weight"])
        assert torch.equal(own[f"h.{i}.mlp.down.weight"], theirs[f"{mlp}.down_proj.weight"])
        assert torch.equal(own[f"h.{i}.ln_1.weight"], theirs[f"model.layers.{i}.input_layernorm.weight"])
        assert torch.equal(own[f"h.{i}.ln_2.weight"], theirs[f"model.layers.{i}.post_attention_layernorm.weight"])
    assert torch.equal(own["wte.weight"], theirs["model.embed_tokens.weight"])
    assert torch.equal(own["head.weight"], theirs["lm_head.weight"])
    assert torch.equal(own["ln_f.weight"], theirs["model.norm.weight"])


def gpt2() -> dict[str, Tensor]:
    made = {"wte.weight": counted(V, C), "wpe.weight": counted(T, C)}
    shapes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for i in (0, 1):
        for name, shape in shapes.items():
            made[f"h.{i}.{name}.weight"], made[f"h.{i}.{name}.bias"] = counted(*shape), counted(shape[1])
    for name in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"):
        made[f"{name}.weight"], made[f"{name}.bias"] = counted(C), counted(C)
    return made


def test_gpt2_is_transposed_whether_or_not_names_have_a_prefix(tmp_path: Path) -> None:
    theirs = gpt2()
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, T, T) for i in (0, 1) for name in ("bias", "masked_bias")}
    bare = taken(folder(tmp_path / "bare", CONFIGS["gpt2"], {**theirs, **masks}))
    named = {f"transformer.{name}": t for name, t in theirs.items()}
    for own in (bare, taken(folder(tmp_path / "named", CONFIGS["gpt2"], named))):
        for row in range(3 * C):
            for column in range(C):
                assert own["h.1.attn.qkv.weight"][row, column] == theirs["h.1.attn.c_attn.weight"][column, row]
            assert own["h.1.attn.qkv.bias"][row] == theirs["h.1.attn.c_attn.bias"][row]
        pairs = (("attn.proj", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj"))
        for ours, their in pairs:
            for (row, column), value in zip(
                itertools.product(*map(range, own[f"h.0.{ours}.weight"].shape)),
                own[f"h.0.{ours}.weight"].flatten().tolist(),
                strict=True,
            ):
                assert value == theirs[f"h.0.{their}.weight"][column, row]
        assert torch.equal(own["wpe.weight"], theirs["wpe.weight"])


def test_experts_of_a_layer_become_one_stack(tmp_path: Path) -> None:
    theirs = {name: t for name, t in llama().items() if ".mlp." not in name}
    for i in (0, 1):
        place = f"model.layers.{i}.block_sparse_moe"
        theirs[f"{place}.gate.weight"] = counted(E, C)
        for e in range(E):
            theirs |= {f"{place}.experts.{e}.w{n}.weight": counted(*((C, F) if n == 2 else (F, C))) for n in (1, 2, 3)}
    own = taken(folder(tmp_path / "each", CONFIGS["mixtral"], theirs))
    for i, e, row in itertools.product(range(2), range(E), range(F)):
        expert = f"model.layers.{i}.block_sparse_moe.experts.{e}"
        assert torch.equal(own[f"h.{i}.mlp.gate_up.weight"][e, row], theirs[f"{expert}.w1.weight"][row])
        assert torch.equal(own[f"h.{i}.mlp.gate_up.weight"][e, F + row], theirs[f"{expert}.w3.weight"][row])
        assert torch.equal(own[f"h.{i}.mlp.down.weight"][e, :, row], theirs[f"{expert}.w2.weight"][:, row])
    stacked = {name.replace("block_sparse_moe", "mlp"): t for name, t in theirs.items() if ".experts." not in name}
    for i in (0, 1):
        stacked[f"model.layers.{i}.mlp.experts.gate_up_proj"] = own[f"h.{i}.mlp.gate_up.weight"].clone()
        stacked[f"model.layers.{i}.mlp.experts.down_proj"] = own[f"h.{i}.mlp.down.weight"].clone()
    again = taken(folder(tmp_path / "stacked", CONFIGS["mixtral"], stacked))
    assert all(torch.equal(own[name], t) for name, t in again.items())


def test_a_copy_of_a_tied_head_must_be_one(tmp_path: Path) -> None:
    config, theirs = {**LLAMA, "tie_word_embeddings": True}, llama()
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
    assert "head.weight" not in taken(folder(tmp_path / "same", config, theirs))
    theirs["lm_head.weight"][3, 2] += 1
    with pytest.raises(Mismatch, match=r"lm_head\.weight to wte\.weight: copy 1 differs from the first in 1 of 84"):
        taken(folder(tmp_path / "other", config, theirs))


def test_tensors_that_do_not_fit_are_all_named_before_any_is_read(tmp_path: Path) -> None:
    theirs = llama()
    del theirs["model.layers.0.self_attn.k_proj.weight"]
    theirs["model.norm.weight"] = counted(C + 1)
    theirs["model.layers.2.input_layernorm.weight"] = counted(C)
    theirs["model.layers.0.mlp.odd.weight"] = counted(C)
    path = folder(tmp_path, LLAMA, theirs)
    with pytest.raises(Mismatch) as caught:
        mapped(path, configured(model_node(path)))
    told = str(caught.value)
    for part in ("h.0.attn.qkv.weight", "k_proj", "ln_f.weight would be [13]", "h.2.ln_1.weight", "mlp.odd.weight"):
        assert part in told, told


# Written --------------------------------------------------------------------------------------------------------------------


def small() -> GPT:
    return scramble(build(configured({**MODERN, "vocab_size": 11}), 1))


@pytest.mark.parametrize("case", CONFIGS)
def test_both_round_trips_change_no_bit(case: str, tmp_path: Path) -> None:
    config = configured(family(CONFIGS[case]).read(CONFIGS[case]))
    ours = scramble(build(config, 1))
    before = {name: t.clone() for name, t in weights(ours).items()}
    assert write(ours, family(CONFIGS[case]).name, tmp_path / "first") == []
    again = build(configured(model_node(tmp_path / "first")), 2)
    assert fill(weights(again), mapped(tmp_path / "first", again.config)) == {}
    assert before.keys() == weights(again).keys()
    assert all(
        torch.equal(before[n], t) and torch.equal(weights(ours)[n], before[n]) for n, t in weights(again).items()
    )
    write(again, family(CONFIGS[case]).name, tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_another_dtype_is_told_and_what_is_written_is_no_view(tmp_path: Path) -> None:
    ours = small()
    assert write(ours, "llama", tmp_path / "low", torch.bfloat16) == ["float32 is written as bfloat16"]
    assert json.loads((tmp_path / "low/config.json").read_text())["dtype"] == "bfloat16"
    low = Folder(tmp_path / "low")
    assert {low.meta(name).dtype for name in low.names()} == {torch.bfloat16}
    assert torch.equal(low.get("model.norm.weight"), ours.ln_f.weight.to(torch.bfloat16))  # type: ignore[arg-type]


def test_dropout_that_a_family_does_not_know_is_told(tmp_path: Path) -> None:
    ours = build(configured({**MODERN, "dropout": 0.25}), 1)
    (note,) = write(ours, "llama", tmp_path / "made")
    assert note.startswith("dropout 0.25 is left out")
    like_phi3 = build(configured({**MODERN, "dropout": 0.25}), 1)
    assert write(like_phi3, "phi3", tmp_path / "phi3") == []
    assert model_node(tmp_path / "phi3")["dropout"] == 0.25


def test_an_export_that_is_interrupted_or_refused_leaves_nothing(tmp_path: Path) -> None:
    seen = []

    def stop(name: str, done: int, whole: int) -> None:
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(small(), "llama", tmp_path / "made", told=stop)
    assert len(seen) == 3
    with pytest.raises(ValueError, match="norm is 'rmsnorm'"):
        write(small(), "gpt2", tmp_path / "made")
    with pytest.raises(ValueError, match=r"no family 'lama'\. Did you mean 'llama'"):
        write(small(), "lama", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
    write(small(), "llama", tmp_path / "made")
    with pytest.raises(ValueError, match="is there already"):
        write(small(), "llama", tmp_path / "made")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["config.json", "model.safetensors"]
