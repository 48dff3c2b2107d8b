"""Models of the real `transformers`: theirs read, ours written, and both computed in float64 to the last digits that count.

A wrong order of parts can be its own inverse, so round trips prove little by themselves: logits are compared with the library's,
and wrong mappings are shown to fail.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import doubled
from models import cases, scramble
from models import config as model_config
from torch import Tensor

from convert.files import INDEX, Folder
from convert.huggingface import FAMILIES, mapped, model_node, pick_family, write
from convert.huggingface.family import configured
from convert.mapping import Mapped, Rule, Rules, Tensors, fill
from convert.steps import TRANSPOSE, Chain, Relayout, Step
from core.layout import Layout
from core.options import Reader, Variant
from core.rules import SliceRule
from core.weights import weights
from gpt_conf import KINDS
from model import GPT, assemble, build
from model import fill as fill_model
from variations import CATALOGUE
from variations.lora import LORAS

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: Hugging Face models are not tested"
)
pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("default"),  # the library's own warnings are not ours
]
NOBODY = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
VOCABULARY = 61
SIZES = {
    **NOBODY,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
}
GPT2 = {**NOBODY, "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
MIXER = {
    **NOBODY,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 1,
    "chunk_size": 8,
}
HYBRID = {
    **SIZES,
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
FACTORS = {"short_factor": [1.0, 1.1], "long_factor": [1.5, 4.0]}
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}  # which take float64
EXPERTS = {**SIZES, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **numbers}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 50, "activation_function": "relu"}),
    "gpt2-unscaled": ("gpt2", {**GPT2, "scale_attn_weights": False, "layer_norm_epsilon": 1e-3}),
    "llama": ("llama", {**SIZES, "head_dim": 10, "rms_norm_eps": 1e-4}),
    "llama-biases": (
        "llama",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, **LLAMA3},
    ),
    "llama-attention-biases": ("llama", {**SIZES, "attention_bias": True, **rope("linear", factor=2.5)}),
    "llama-mlp-biases": ("llama", {**SIZES, "mlp_bias": True, "num_key_value_heads": 4, "hidden_act": "gelu"}),
    "llama-yarn": ("llama", {**SIZES, **rope("yarn", factor=3.0, original_max_position_embeddings=16)}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 12}),
    "qwen3-windows": (
        "qwen3",
        {**SIZES, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3-window": (
        "qwen3",
        {
            **SIZES,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
        },
    ),
    "phi3": ("phi3", {**SIZES, **rope("default", partial_rotary_factor=0.5), "sliding_window": 6}),
    "phi3-longrope": (
        "phi3",
        {
            **SIZES,
            **rope("longrope", partial_rotary_factor=0.5, **FACTORS),
            "original_max_position_embeddings": 16,
        },
    ),
    "phi3-short": (
        "phi3",
        {
            **SIZES,
            **rope("longrope", partial_rotary_factor=0.5, **FACTORS),
            "original_max_position_embeddings": 32,
        },
    ),
    "gemma": ("gemma", {**SIZES, "head_dim": 12}),
    "gemma-biases": ("gemma", {**SIZES, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4}),
    "mixtral-window": ("mixtral", {**SIZES, "num_local_experts": 3, "sliding_window": 5, "head_dim": 6}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe-mixed": ("qwen3_moe", {**EXPERTS, "num_hidden_layers": 3, "mlp_only_layers": [0]}),
    "qwen3_moe-step": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2, "num_experts": 3}),
    "mamba2": ("mamba2", MIXER),
    "mamba2-groups": ("mamba2", {**MIXER, "n_groups": 2, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3}),
    "bamba": ("bamba", HYBRID),
    "bamba-groups": (
        "bamba",
        {**HYBRID, "mamba_n_groups": 2, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
    ),
}
SCANNED = ("mamba2", "bamba")
FIRST = ("gpt2", "llama", "qwen3", "phi3", "gemma", "mixtral", "qwen3_moe", "mamba2", "bamba")
every = pytest.mark.parametrize("case", CASES)
each_family = pytest.mark.parametrize("case", FIRST)


def theirs(case: str, **more: Any) -> Any:
    """A model of theirs whose parameters are all far from special values such as 0 and 1."""
    family, options = CASES[case]
    return random_model(family, {**options, **more})


def random_model(family: str, options: Mapping[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(family, **options)
    made = transformers.AutoModelForCausalLM.from_config(config, **PLAIN).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return made


@functools.cache
def saved(case: str, root: Path) -> tuple[Any, Path]:
    made = theirs(case)
    made.save_pretrained(root / case)
    return made, root / case


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("theirs")


def read(folder: Path) -> GPT:
    """A folder as a model of ours."""
    config = configured(model_node(folder))
    made = build(config, 0).eval()
    assert fill(weights(made), mapped(folder, config)) == {}
    return made


def tokens(length: int = 23) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    made = model(tokens())
    out: Tensor = made[0] if isinstance(made, tuple) else made.logits
    return out


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A folder as the library reads it: nothing missing, nothing left over."""
    made, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=dtype or "auto", **PLAIN
    )
    assert not any(told.values()), told
    return made.eval()


# Their models become ours ---------------------------------------------------------------------------------------------------


@every
def test_their_folder_gives_their_logits(case: str, root: Path) -> None:
    made, folder = saved(case, root)
    assert apart(logits(read(folder)), logits(made)) < 1e-5  # roundings of float32


@every
def test_logits_and_every_gradient_agree_in_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sums in another order lose some thousand units in the last place; scans in chunks of other sizes multiply many decays.
    with doubled(monkeypatch):
        agree(CASES[case][0], theirs(case), 1e-6 if case.startswith(SCANNED) else 1e-8)


def agree(name: str, made: Any, bound: float) -> None:
    """Takes a model of theirs from memory and compares logits and the gradient of every parameter."""
    family = FAMILIES[name]
    config = configured(family.read(made.config.to_dict()))
    ours = build(config, 0).eval()
    own = dict(made.named_parameters())  # experts are one stack for all in memory
    rules = family.rules(config, own)
    shapes = {name: t.shape for name, t in weights(ours).items()}
    fill(weights(ours), Mapped(Tensors(own), rules, shapes))
    wanted, got = made(tokens()).logits, ours(tokens())[0]
    assert got.dtype == torch.float64
    assert apart(got.detach(), wanted.detach()) < bound, config
    pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (wanted * pull).sum().backward()
    (got * pull).sum().backward()
    carried = Mapped(Tensors({name: p.grad for name, p in own.items()}), rules, shapes)
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert grads.keys() == shapes.keys()
    for name, grad in grads.items():
        assert float(grad.abs().max()) > 0, name
        assert apart(grad, carried.get(name)) < bound, (name, config)


REQUIRED = {
    "vocab_size": 40_000,
    "hidden_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "intermediate_size": 5000,
}
BARE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, REQUIRED) for name in FAMILIES if name not in ("gpt2", "mamba2")},
    "gpt2": ("gpt2", {"vocab_size": 40_000, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "mamba2": ("mamba2", {"vocab_size": 40_000, "hidden_size": 4096, "num_hidden_layers": 2}),
    "qwen3 windows": ("qwen3", {**REQUIRED, "use_sliding_window": True}),
    "qwen3_moe windows": ("qwen3_moe", {**REQUIRED, "use_sliding_window": True}),
    "gemma before hidden_act was true": ("gemma", {**REQUIRED, "hidden_act": "gelu"}),
    "rope_theta": ("mixtral", {**REQUIRED, "rope_theta": 77.0}),
    "rope_scaling": ("llama", {**REQUIRED, "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "yarn of the longest context": ("llama", {**REQUIRED, "rope_scaling": {"rope_type": "yarn", "factor": 3.0}}),
    "yarn with scales": (
        "llama",
        {**REQUIRED, "rope_scaling": {"rope_type": "yarn", "factor": 3.0, "mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "longrope": (
        "phi3",
        {
            **REQUIRED,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 2048,
            "rope_theta": 77.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
        },
    ),
    "half of a head": ("bamba", {**REQUIRED, "partial_rotary_factor": 0.5, "rope_theta": 77.0}),
}


@pytest.mark.parametrize("case", BARE)
def test_what_is_left_out_or_said_in_former_words_is_what_the_library_takes_it_for(case: str) -> None:
    family, said = BARE[case]
    full = transformers.AutoConfig.for_model(family, **said).to_dict()
    assert len(full) > len(said)
    read = FAMILIES[family].read
    assert configured(read({"model_type": family, **said})) == configured(read(full))


# Ours become theirs ---------------------------------------------------------------------------------------------------------


@every
def test_our_model_is_loaded_strictly_and_gives_our_logits(case: str, root: Path, tmp_path: Path) -> None:
    config = configured(model_node(saved(case, root)[1]))
    ours = scramble(build(config, 3)).eval()
    before = {name: t.clone() for name, t in weights(ours).items()}
    assert write(ours, CASES[case][0], tmp_path / "made") == []
    assert apart(logits(load(tmp_path / "made")), logits(ours)) < 1e-5
    back = read(tmp_path / "made")
    for name, tensor in weights(back).items():
        assert torch.equal(tensor, before[name]) and torch.equal(weights(ours)[name], before[name]), name


@every
def test_their_folder_comes_back_bit_for_bit(case: str, root: Path, tmp_path: Path) -> None:
    _, folder = saved(case, root)
    write(read(folder), CASES[case][0], tmp_path / "made")
    first, second = Folder(folder), Folder(tmp_path / "made")
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        assert torch.equal(first.get(name), second.get(name)), name


@each_family
def test_the_family_is_found_again(case: str, root: Path) -> None:
    found = pick_family(configured(model_node(saved(case, root)[1])))
    assert found == {"phi3": "phi3"}.get(case, case)


# Forms of folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_several_files_and_an_index(tmp_path: Path, root: Path) -> None:
    made, _ = saved("mixtral", root)
    made.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / INDEX).is_file() and len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert apart(logits(read(tmp_path / "parts")), logits(made)) < 1e-5


def test_stored_in_bfloat16_and_read_into_float32(tmp_path: Path, root: Path) -> None:
    made, _ = saved("llama", root)
    load(saved("llama", root)[1], torch.bfloat16).save_pretrained(tmp_path / "low")
    config = configured(model_node(tmp_path / "low"))
    ours = build(config, 0).eval()
    assert fill(weights(ours), mapped(tmp_path / "low", config)) == {"bfloat16 to float32": len(weights(ours))}
    assert apart(logits(ours), logits(load(tmp_path / "low", torch.float32))) < 1e-5
    assert apart(logits(ours), logits(made)) > 1e-4
    write(ours, "llama", tmp_path / "again", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path / "again").dtype == torch.bfloat16
    assert apart(logits(load(tmp_path / "again", torch.float32)), logits(ours)) < 1e-5


def test_a_folder_with_one_stack_for_all_experts(tmp_path: Path, root: Path) -> None:
    for case in ("mixtral", "qwen3_moe"):
        made, _ = saved(case, root)
        made.save_pretrained(tmp_path / case, save_original_format=False)  # as they are in memory
        assert any(name.endswith("experts.gate_up_proj") for name in Folder(tmp_path / case).names())
        assert apart(logits(read(tmp_path / case)), logits(made)) < 1e-5


# Any model of ours ----------------------------------------------------------------------------------------------------------


def random_sizes(seed: int) -> dict[str, Any]:
    """Any number of heads, groups of them, widths and biases."""
    draw = random.Random(seed)
    groups, each, width = draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([2, 4, 6])
    return {
        **SIZES,
        "num_attention_heads": groups * each,
        "num_key_value_heads": groups,
        "head_dim": width,
        "hidden_size": groups * each * width,
        "intermediate_size": draw.randrange(3, 20),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "num_hidden_layers": draw.randrange(1, 4),
    }


def adapted_to(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    if family == "gpt2":
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        return {**GPT2, "n_embd": width, "n_head": heads, "n_inner": sizes["intermediate_size"]}
    without = {"phi3": ("head_dim", "attention_bias", "mlp_bias"), "gemma": ("mlp_bias",)}.get(family, ())
    return {name: value for name, value in sizes.items() if name not in without}


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "gemma"])
def test_any_sizes_give_the_same_logits_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with doubled(monkeypatch):
        for seed in range(12):
            agree(family, random_model(family, adapted_to(family, random_sizes(seed))), 1e-8)


def test_whatever_is_said_to_be_representable_is(tmp_path: Path) -> None:
    """Every variation and option of the catalogue, in models like GPT-2 and like Llama: refused, or the same in the library."""
    taken: dict[str, int] = {}
    for number, case in enumerate(cases(tuple(kind for kind in KINDS if kind != "init"))):
        for base, tree in enumerate(case.trees()[:2]):
            try:
                heads = 2 if base else None
                config = model_config(
                    **{**tree, "n_kv_head": heads, "vocab_size": VOCABULARY, "block_size": 40, "n_layer": 1}
                )
                family = pick_family(config)
            except ValueError:
                continue
            ours = scramble(build(config, 3)).eval()
            folder = tmp_path / f"{number}-{base}"
            write(ours, family, folder)
            assert apart(logits(load(folder)), logits(ours)) < 1e-5, (str(case), tree, family)
            taken[family] = taken.get(family, 0) + 1
    assert taken["gpt2"] > 9 and taken["qwen3"] > 15 and taken["qwen3_moe"] > 1, taken


LLAMA_LIKE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "block_size": 40,
    "vocab_size": VOCABULARY,
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": {"variant": "gated", "width": 24},
    "activation": "silu",
    "bias": False,
    "tie_weights": False,
}


@pytest.mark.parametrize("stacked", [False, True], ids=["separate", "stacked"])
def test_numbers_and_adapters_are_written_as_what_multiplies(stacked: bool, tmp_path: Path) -> None:
    pkl = {"variant": "pkl", "scale": 0.7}
    tree = {**LLAMA_LIKE, "linear": pkl, "head": pkl, "embedding": pkl, "stack_layers": stacked}
    rules = {
        "some": SliceRule(match="h.*.attn.qkv[q,v]", lora=Variant("lora", LORAS["lora"].Options(rank=3))),  # type: ignore[attr-defined]
    }
    adamw = Reader(CATALOGUE).variant("optimizer", {"variant": "adamw"}, ())
    assert adamw is not None
    ours, rows = assemble(configured(tree), rules, adamw)
    fill_model(ours, rows, 1)
    scramble(ours).eval()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    adapters, numbers = write(ours, "llama", tmp_path / "made")
    assert adapters == "2 weights have their adapters merged into them"
    assert numbers == "10 weights are written as what multiplies, a + scale * b"
    assert apart(logits(load(tmp_path / "made")), logits(ours)) < 1e-5
    after = ours.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_gains_of_plain_norms_become_gemmas_and_back(root: Path, tmp_path: Path) -> None:
    made, folder = saved("gemma", root)
    node = model_node(folder)
    node["norm"].pop("zero_centred")
    config = configured(node)
    ours = build(config, 0).eval()
    fill(weights(ours), mapped(folder, config))
    norm = weights(ours)["h.1.ln_2.weight"]
    assert torch.equal(norm, Folder(folder).get("model.layers.1.post_attention_layernorm.weight") + 1)
    assert apart(logits(ours), logits(made)) < 1e-5
    write(ours, "gemma", tmp_path / "made")
    assert apart(logits(load(tmp_path / "made")), logits(ours)) < 1e-5
    with torch.no_grad():
        norm.sub_(1)  # as if nothing had been added
    assert apart(logits(ours), logits(made)) > 1e-2


# Wrong mappings fail --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    """What a right rule does, and then something wrong with the same shapes that comes back to itself."""

    right: Step
    wrong: Step

    def rule(self, rule: Rule) -> Rule:
        return replace(rule, step=Chain((self.right, self.wrong)))


def order(sizes: Mapping[str, int], names: str, dim: int = -2, **more: Any) -> Layout:
    return Layout(tuple((name, sizes[name]) for name in names.split()), dim, **more)


HEADS = {"q": 32, "k": 32, "v": 32}
GROUPS = {"q": 16, "k": 8, "v": 8}
FUSED = {"q": 32, "k": 16, "v": 16}
GATED = {"gate": 40, "up": 40}
MIXED = {"z": 64, "x": 64, "B": 16, "C": 16, "dt": 8}
QKV, GATE_UP = "h.*.attn.qkv.weight", "h.*.mlp.gate_up.weight"


def relabelled(sizes: Mapping[str, int], one: str, other: str) -> Step:
    """Two parts of one size in each other's place."""
    names = list(sizes)
    swapped = [{one: other, other: one}.get(name, name) for name in names]
    return Relayout(order(sizes, " ".join(names)), order(sizes, " ".join(swapped)))


WRONG: dict[str, tuple[str, dict[str, Any], str, Step]] = {
    "queries and keys": ("llama", {"num_key_value_heads": 4, "head_dim": 8}, QKV, relabelled(HEADS, "q", "k")),
    "keys and values": ("phi3", {}, QKV, relabelled(FUSED, "k", "v")),
    "gate and up": ("llama", {}, GATE_UP, relabelled(GATED, "gate", "up")),
    "groups": ("phi3", {}, QKV, Relayout(order(GROUPS, "q k v", groups=2), order(FUSED, "q k v"))),
    "not transposed": ("gpt2", {}, "h.*.attn.proj.weight", TRANSPOSE),
    "B and C": ("mamba2", {}, "h.*.attn.in_proj.weight", relabelled(MIXED, "B", "C")),
    "z and x": ("mamba2", {}, "h.*.attn.in_proj.weight", relabelled(MIXED, "z", "x")),
    "gates of experts": (
        "mixtral",
        {},
        GATE_UP,
        Relayout(order(GATED, "gate up", stack=(tuple("0123"),)), order(GATED, "up gate", stack=(tuple("0123"),))),
    ),
    "experts": (
        "mixtral",
        {},
        "h.*.mlp.down.weight",
        Relayout(Layout(stack=(tuple("0123"),)), Layout(stack=(tuple("3210"),))),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_order_is_seen_in_the_logits(mistake: str) -> None:
    case, options, target, wrong = WRONG[mistake]
    made = theirs(case, **options)
    family = FAMILIES[CASES[case][0]]
    config = configured(family.read(made.config.to_dict()))
    own = dict(made.named_parameters())
    right = family.rules(config, own)
    found = [rule for rule in right.rules if rule.target == (target,)]
    assert len(found) == 1
    bad = Rules(tuple(Both(r.step, wrong).rule(r) if r in found else r for r in right.rules))
    ours = build(config, 0).eval()
    shapes = {name: t.shape for name, t in weights(ours).items()}
    for rules, agrees in ((right, True), (bad, False)):
        fill(weights(ours), Mapped(Tensors(own), rules, shapes))
        difference = apart(logits(ours), logits(made))
        assert difference < 1e-5 if agrees else difference > 1e-2
        back = Mapped(Tensors(weights(ours)), rules.inverse, {name: t.shape for name, t in own.items()})
        assert all(torch.equal(back.get(name), t) for name, t in own.items())  # a round trip sees nothing
