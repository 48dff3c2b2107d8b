"""Adapters as folders of PEFT: against index oracles by hand, and there and back. The real library is in test_peft_system.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config, read, scramble, sentence, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert.peft.export
from convert.huggingface import FAMILIES
from convert.huggingface.ours import Multiplied, Ours
from convert.mapping import Mapped, Rules, rule
from convert.peft import bare, load, write, write_stack
from convert.peft import read as read_adapter
from convert.peft.names import at, shortest
from convert.peft.places import Places
from convert.steps import TRANSPOSE, Join, Pad, Relayout
from core.addresses import is_adapter
from core.layout import Layout
from core.lora import adapter_weights
from core.options import Reader
from core.rules import Row, SliceRule
from core.weights import weights
from gpt_conf import ModelConfig
from model import assemble, fill
from variations import CATALOGUE

ADAMW = Reader(CATALOGUE).variant("optimizer", {"variant": "adamw"}, ())
GPT2: dict[str, Any] = {"n_kv_head": 4, "activation": "gelu_tanh"}
LLAMA: dict[str, Any] = {
    "norm": "rmsnorm", "position": "rope", "mlp": "gated", "activation": "silu", "bias": False, "tie_weights": False,
}  # fmt: skip
MIXTRAL = LLAMA | {"mlp": {"variant": "moe", "experts": 4, "top_k": 2, "width": 24, "load_balance": None}}
QWEN = MIXTRAL | {"attention": {"variant": "causal", "qk_norm": True}}
SOME_DENSE = QWEN | {"sites": {"dense": {"match": "h.0.mlp", "mlp": {"variant": "gated", "width": 40}}}}
L: dict[str, Any] = {"rank": 4, "alpha": 8.0}
SMALL: dict[str, Any] = {"rank": 2, "alpha": 4.0}  # another rank of the same scale
DORA = L | {"variant": "dora"}


def adapted(base: Any, folder: Path, family: Any) -> Any:
    """The base with a folder's adapters."""
    return load(base, read_adapter(folder, base, family))[0]


def made(slices: dict[str, Any], seed: int = 3, **tree: Any) -> tuple[Any, list[Row]]:
    """A model with adapters, none of whose parameters is special, B included; and its table."""
    assert ADAMW is not None
    model, rows = assemble(config(**tree), {n: read(SliceRule, r) for n, r in slices.items()}, ADAMW)
    fill(model, rows, seed)
    return scramble(model, seed).eval(), rows


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(tokens(model, 2, 12))[0]
    return out


@dataclass
class Adapter:
    """A folder's content."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"base_model.model.{name}"]

    def put(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "adapter_model.safetensors")
        return folder


def opened(folder: Path) -> Adapter:
    return Adapter(
        json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    )


def exported(family: str, slices: dict[str, Any], folder: Path, **tree: Any) -> tuple[Any, Adapter]:
    model, rows = made(slices, **tree)
    write(model, rows, FAMILIES[family], folder / "adapter")
    return model, opened(folder / "adapter")


# Where rows are from --------------------------------------------------------------------------------------------------------


def numbers(model: Any, weight: str) -> int:
    """The number of a weight's first row: all rows of all weights before it."""
    count = 0
    for name, t in weights(model).items():
        if name == weight:
            return count
        count += 0 if is_adapter(name) else t.numel() // t.shape[-1]
    raise AssertionError(weight)


def test_places_are_those_that_counting_gives() -> None:
    """16 rows of q, 8 of k, 8 of v; gate and up of the second layer; everything but columns and rows is in no way special."""
    model, _ = made({}, **LLAMA)
    places = Places(model, FAMILIES["llama"])
    width = model.h[1].mlp.gate_up.weight.shape[0] // 2
    qkv, gate_up = numbers(model, "h.1.attn.qkv.weight"), numbers(model, "h.1.mlp.gate_up.weight")
    expected = {
        "model.layers.1.self_attn.q_proj.weight": range(qkv, qkv + 16),
        "model.layers.1.self_attn.k_proj.weight": range(qkv + 16, qkv + 24),
        "model.layers.1.self_attn.v_proj.weight": range(qkv + 24, qkv + 32),
        "model.layers.1.mlp.gate_proj.weight": range(gate_up, gate_up + width),
        "model.layers.1.mlp.up_proj.weight": range(gate_up + width, gate_up + 2 * width),
        "lm_head.weight": range(numbers(model, "head.weight"), numbers(model, "head.weight") + 19),
    }
    for name, rows in expected.items():
        place = places.of(name)
        assert place is not None and place.rows.tolist() == list(rows) and not place.transposed
        assert place.columns.tolist() == list(range(16))
    assert places.of("model.norm.weight") is None


def test_places_of_transposed_weights_and_of_stacks() -> None:
    model, _ = made({}, **GPT2)
    place = Places(model, FAMILIES["gpt2"]).of("transformer.h.0.attn.c_attn.weight")
    first = numbers(model, "h.0.attn.qkv.weight")
    assert place is not None and place.transposed and place.rows.tolist() == list(range(first, first + 48))
    assert place.columns.tolist() == list(range(16))
    model, _ = made({}, **MIXTRAL)
    places = Places(model, FAMILIES["mixtral"])
    first = numbers(model, "h.0.mlp.gate_up.weight")
    stack = places.of("model.layers.0.mlp.experts.gate_up_proj")
    one = places.of("model.layers.0.block_sparse_moe.experts.2.w3.weight")
    assert stack is not None and one is not None
    assert stack.rows.tolist() == [[first + e * 48 + o for o in range(48)] for e in range(4)] and not stack.transposed
    assert one.rows.tolist() == list(range(first + 2 * 48 + 24, first + 3 * 48))


def own_family(*changed: Any) -> Any:
    """Llama with other steps on the way of the first layer's qkv, which is fused in it."""
    family = FAMILIES["llama"]

    def rules(model: ModelConfig, names: Any = ()) -> Rules:
        kept = [
            rule([s.replace("*", "1") for s in r.source], [t.replace("*", "1") for t in r.target], r.step)
            if "qkv" in r.target[0] else r
            for r in family.rules(model).rules
        ]  # fmt: skip
        return Rules((*kept, rule("model.layers.0.odd.weight", "h.0.attn.qkv.weight", *changed)))

    class Family:
        name, prefix = "llama", "model."

    Family.rules = staticmethod(rules)  # type: ignore[attr-defined]
    return Family


def test_any_layout_is_found_out_by_asking(tmp_path: Path) -> None:
    """Two groups of half a q, half a k, half a v; columns the other way round in pairs; filled up to 40 rows; [in, out]."""
    parts = (("q", 16), ("k", 8), ("v", 8))
    groups = Layout(tuple((n, size // 2) for n, size in parts), groups=2, dim=-2)
    model, rows = made({"a": {"match": "h.0.attn.qkv[q,v]", "lora": L}}, **LLAMA)
    family = own_family(TRANSPOSE, Pad(-2, 32, 40).inverse, Relayout(groups, Layout(parts, -2)))
    place = Places(model, family).of("model.layers.0.odd.weight")
    first = numbers(model, "h.0.attn.qkv.weight")
    half = [[*range(8 * g, 8 * g + 8), *range(16 + 4 * g, 20 + 4 * g), *range(24 + 4 * g, 28 + 4 * g)] for g in (0, 1)]
    assert place is not None and place.transposed
    assert place.rows.tolist() == [first + row for row in (*half[0], *half[1])] + [-1] * 8
    write(model, rows, family, tmp_path / "adapter")
    b = opened(tmp_path / "adapter")["model.layers.0.odd.lora_B.weight"]
    q, v = (model.h[0].attn.qkv.get_submodule(f"adapter[{x}]").lora_b for x in "qv")
    expected = torch.zeros(40, 8)
    for at_row, row in enumerate((*half[0], *half[1])):
        if row < 16:
            expected[at_row, :4] = q[row]
        elif row >= 24:
            expected[at_row, 4:] = v[row - 24]
    assert torch.equal(b, expected)
    back = adapted(bare(model), tmp_path / "adapter", family)
    assert same(model, back)


def test_rows_of_one_part_may_have_another_order(tmp_path: Path) -> None:
    """[v; k; q], and one adapter for all of it."""
    model, rows = made({"a": {"match": "h.0.attn.qkv", "lora": L}}, **LLAMA)
    parts = (("q", 16), ("k", 8), ("v", 8))
    family = own_family(Relayout(Layout(parts[::-1], -2), Layout(parts, -2)))
    write(model, rows, family, tmp_path / "adapter")
    b = model.h[0].attn.qkv.adapter.lora_b
    assert torch.equal(
        opened(tmp_path / "adapter")["model.layers.0.odd.lora_B.weight"], torch.cat((b[24:], b[16:24], b[:16]))
    )
    assert same(model, adapted(bare(model), tmp_path / "adapter", family))


def test_columns_in_another_order_and_what_is_no_rows(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Turned:
        """Columns from the last to the first."""

        def __call__(self, tensors: Any) -> list[Tensor]:
            return [tensors[0].flip(-1)]

        @property
        def inverse(self) -> Any:
            return self

    @dataclass(frozen=True)
    class Diagonal(Turned):
        """Rows turned by their own number."""

        def __call__(self, tensors: Any) -> list[Tensor]:
            return [torch.stack([row.roll(i) for i, row in enumerate(tensors[0])])]

    model, rows = made({"a": {"match": "h.0.attn.qkv[q]", "lora": L}}, **LLAMA)
    write(model, rows, own_family(Turned()), tmp_path / "turned")
    a = opened(tmp_path / "turned")["model.layers.0.odd.lora_A.weight"]
    assert torch.equal(a, model.h[0].attn.qkv.get_submodule("adapter[q]").lora_a.flip(-1))
    assert same(model, adapted(bare(model), tmp_path / "turned", own_family(Turned())))
    with pytest.raises(ValueError, match=r"odd\.weight is not made of rows of one weight of ours"):
        write(model, rows, own_family(Diagonal()), tmp_path / "diagonal")
    assert not (tmp_path / "diagonal").exists()


# What is written ------------------------------------------------------------------------------------------------------------


def test_separate_maps_get_the_parts_adapters_as_they_are(tmp_path: Path) -> None:
    rules = {
        "qv": {"match": "h.*.attn.qkv[q,v]", "lora": L},
        "up": {"match": "h.1.mlp.gate_up", "lora": {"rank": 3, "alpha": 5.0}},
    }
    model, adapter = exported("llama", rules, tmp_path, **LLAMA)
    for layer in (0, 1):
        for part, module in (("q", "q_proj"), ("v", "v_proj")):
            own = model.h[layer].attn.qkv.get_submodule(f"adapter[{part}]")
            at_module = f"model.layers.{layer}.self_attn.{module}"
            assert torch.equal(adapter[f"{at_module}.lora_A.weight"], own.lora_a)
            assert torch.equal(adapter[f"{at_module}.lora_B.weight"], own.lora_b)
    whole, mlp = model.h[1].mlp.gate_up.adapter, "model.layers.1.mlp"
    width = len(whole.lora_b) // 2
    for i, module in enumerate(("gate_proj", "up_proj")):
        assert torch.equal(adapter[f"{mlp}.{module}.lora_A.weight"], whole.lora_a)
        assert torch.equal(adapter[f"{mlp}.{module}.lora_B.weight"], whole.lora_b[i * width : (i + 1) * width])
    assert len(adapter.tensors) == 12
    c = adapter.config
    assert (c["r"], c["lora_alpha"], c["use_rslora"], c["use_dora"], c["fan_in_fan_out"]) == (4, 8, False, False, False)
    assert c["target_modules"] == ["q_proj", "v_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"]
    assert c["rank_pattern"] == {r"layers\.1\.mlp\.gate_proj": 3, r"layers\.1\.mlp\.up_proj": 3}
    assert c["alpha_pattern"] == {r"layers\.1\.mlp\.gate_proj": 5, r"layers\.1\.mlp\.up_proj": 5}
    assert c["target_parameters"] is None and c["bias"] == "none" and c["peft_type"] == "LORA"


@pytest.mark.parametrize("rslora", [False, True])
def test_a_fused_map_gets_blocks(rslora: bool, tmp_path: Path) -> None:
    """[A_q; A_v], and B_q and B_v on a diagonal. The factor stays: 16 / 8 = 8 / 4, or 8 sqrt(2) / sqrt(8) = 8 / sqrt(4)."""
    lora = L | {"rslora": rslora}
    model, adapter = exported("gpt2", {"qv": {"match": "h.*.attn.qkv[q,v]", "lora": lora}}, tmp_path, **GPT2)
    q, v = (model.h[1].attn.qkv.get_submodule(f"adapter[{x}]") for x in "qv")
    a, b = (adapter[f"transformer.h.1.attn.c_attn.lora_{x}.weight"] for x in "AB")
    expected = torch.zeros(48, 8)
    expected[:16, :4], expected[32:, 4:] = q.lora_b, v.lora_b
    assert torch.equal(a, torch.cat((q.lora_a, v.lora_a))) and torch.equal(b, expected)
    c = adapter.config
    assert c["r"] == 8 and c["target_modules"] == ["c_attn"] and c["fan_in_fan_out"] and c["use_rslora"] == rslora
    assert c["lora_alpha"] == (pytest.approx(8 * 2**0.5, rel=1e-15) if rslora else 16)


def test_parts_of_other_scales_are_multiplied_into_b(tmp_path: Path) -> None:
    """q: 8 / 4 = 2; k: 3 / 2 = 1.5, three quarters of it, which is exact."""
    rules = {
        "q": {"match": "h.0.attn.qkv[q]", "lora": L},
        "k": {"match": "h.0.attn.qkv[k]", "lora": {"rank": 2, "alpha": 3.0}},
    }
    model, adapter = exported("phi3", rules, tmp_path, **LLAMA)
    b = adapter["model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    assert adapter.config["r"] == 6 and adapter.config["lora_alpha"] == 12
    assert torch.equal(b[16:24, 4:], 0.75 * model.h[0].attn.qkv.get_submodule("adapter[k]").lora_b)
    assert not b[24:].any() and not b[:16, 4:].any() and not b[16:, :4].any()


def test_a_stack_of_experts_by_its_indices(tmp_path: Path) -> None:
    """A [E r, in]: rank j of expert e is row e r + j. B [out, r E]: column j E + e."""
    rules = {
        "gate": {"match": "h.0.mlp.gate_up[gate,up]", "lora": SMALL},
        "down": {"match": "h.0.mlp.down", "lora": {"rank": 3, "alpha": 6.0}},
        "one": {"match": "h.1.mlp.gate_up[2.up]", "lora": SMALL},
        "router": {"match": "h.0.mlp.router", "lora": {"rank": 3, "alpha": 6.0}},
    }
    model, adapter = exported("mixtral", rules, tmp_path, **MIXTRAL)
    gate, up = (model.h[0].mlp.gate_up.get_submodule(f"adapter[{x}]") for x in ("gate", "up"))
    inner, outer = "model.layers.0.mlp.experts.base_layer", "model.layers.0.mlp.experts"
    a, b = (adapter[f"{inner}.lora_{x}.weight"] for x in "AB")
    assert a.shape == (4 * 4, 16) and b.shape == (48, 4 * 4)
    for e in range(4):
        for j in range(2):
            assert torch.equal(a[e * 4 + j], gate.lora_a[e, j]) and torch.equal(a[e * 4 + 2 + j], up.lora_a[e, j])
            assert torch.equal(b[:24, j * 4 + e], gate.lora_b[e, :, j]) and not b[24:, j * 4 + e].any()
            assert torch.equal(b[24:, (2 + j) * 4 + e], up.lora_b[e, :, j]) and not b[:24, (2 + j) * 4 + e].any()
    down = model.h[0].mlp.down.adapter
    for e in range(4):
        for j in range(3):
            assert torch.equal(adapter[f"{outer}.lora_A.weight"][e * 3 + j], down.lora_a[e, j])
            assert torch.equal(adapter[f"{outer}.lora_B.weight"][:, j * 4 + e], down.lora_b[e, :, j])
    alone = adapter["model.layers.1.mlp.experts.lora_A.weight"]
    assert torch.equal(alone[4:6], model.h[1].mlp.gate_up.get_submodule("adapter[up]").lora_a[0])
    assert alone.shape == (8, 16) and not alone[:4].any() and not alone[6:].any()
    assert torch.equal(adapter["model.layers.0.mlp.gate.lora_A.weight"], model.h[0].mlp.router.adapter.lora_a)
    c = adapter.config
    assert c["target_modules"] == []
    assert c["target_parameters"] == ["layers.0.mlp.gate.weight", "gate_up_proj", "layers.0.mlp.experts.down_proj"]


def test_magnitudes_of_rows_without_dora_are_their_norms(tmp_path: Path) -> None:
    rules = {"q": {"match": "h.0.attn.qkv[q]", "lora": DORA}, "v": {"match": "h.0.attn.qkv[v]", "lora": L}}
    model, rows = made(rules, **LLAMA)
    written = write(model, rows, FAMILIES["phi3"], tmp_path / "adapter")
    adapter = opened(tmp_path / "adapter")
    qkv = model.h[0].attn.qkv
    v = qkv.get_submodule("adapter[v]")
    found = adapter["model.layers.0.self_attn.qkv_proj.lora_magnitude_vector"]
    assert torch.equal(found[:16], qkv.get_submodule("adapter[q]").lora_magnitude)
    torch.testing.assert_close(found[16:24], qkv.weight[16:24].square().sum(1).sqrt(), rtol=1e-6, atol=0)
    merged = qkv.weight[24:] + 2.0 * v.lora_b @ v.lora_a
    torch.testing.assert_close(found[24:], merged.square().sum(1).sqrt(), rtol=1e-6, atol=0)
    assert adapter.config["use_dora"] and "without magnitudes" in written.notes[0]


# For every family: what PEFT adds is what we add ----------------------------------------------------------------------------

MAMBA: dict[str, Any] = {
    "norm": "rmsnorm", "position": "none", "mlp": "none", "bias": False, "activation": "silu", "tie_weights": True,
    "attention": {"variant": "mamba2", "norm_eps": 1e-6},  # theirs has one for all norms
}  # fmt: skip
TWO: dict[str, Any] = {"qv": {"match": "h.*.attn.qkv[q,v]", "lora": L}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "separate": ("llama", LLAMA, TWO | {"k": {"match": "h.1.attn.qkv[k]", "lora": SMALL}}),
    "whole over separate": ("llama", LLAMA, {"all": {"match": ["h.*.attn.*", "h.*.mlp.*", "head"], "lora": L}}),
    "all but one": ("llama", LLAMA, {"qv": {"match": "h.*.attn.qkv", "except": "h.*.attn.qkv[k]", "lora": L}}),
    "rslora": ("llama", LLAMA, {"qv": {"match": "h.*.attn.qkv[q,v]", "lora": L | {"rslora": True}}}),
    "dora": ("llama", LLAMA, {"qv": {"match": ["h.*.attn.qkv[q,v]", "h.*.mlp.down"], "lora": DORA}}),
    "fused": ("phi3", LLAMA, {"a": {"match": ["h.*.attn.qkv[q,k,v]", "h.*.mlp.gate_up[up]"], "lora": L}}),
    "fused, two ranks": ("phi3", LLAMA, TWO | {"v": {"match": "h.*.attn.qkv[v]", "lora": SMALL}}),
    "fused, whole": ("phi3", LLAMA, {"a": {"match": ["h.*.attn.qkv", "h.*.mlp.*"], "lora": L}}),
    "fused, rslora": ("phi3", LLAMA, {"a": {"match": "h.*.attn.qkv[q,k,v]", "lora": L | {"rslora": True}}}),
    "fused, dora": ("phi3", LLAMA, {"a": {"match": ["h.*.attn.qkv[q,v]", "h.*.mlp.gate_up"], "lora": DORA}}),
    "[in, out]": ("gpt2", GPT2, TWO | {"p": {"match": ["h.0.attn.proj", "h.*.mlp.*"], "lora": SMALL}}),
    "[in, out], dora": ("gpt2", GPT2, {"a": {"match": ["h.*.attn.qkv[q,v]", "h.1.mlp.up"], "lora": DORA}}),
    "experts": ("mixtral", MIXTRAL, {"a": {"match": ["h.*.mlp.*", "h.0.attn.qkv[v]"], "lora": L}}),
    "parts of experts": ("mixtral", MIXTRAL, {"a": {"match": "h.*.mlp.gate_up[gate,up]", "lora": L}}),
    "some experts": (
        "qwen3_moe",
        QWEN,
        {
            "one": {"match": ["h.*.mlp.gate_up[1.gate,3.up]", "h.1.mlp.down[2]"], "lora": SMALL},
            "two": {"match": "h.*.mlp.gate_up", "except": ["h.*.mlp.gate_up[1]", "h.*.mlp.gate_up[3]"], "lora": L},
        },
    ),
    "some layers of experts": ("qwen3_moe", SOME_DENSE, {"a": {"match": "h.*.mlp.**", "except": "h.1.mlp.router", "lora": L}}),
    "numbers": ("llama", LLAMA | {"linear": {"variant": "pkl", "scale": 0.5}}, {"a": {"match": "h.*.attn.qkv[q,v]", "lora": L}}),
    "mamba": ("mamba2", MAMBA, {"a": {"match": ["h.*.attn.in_proj[z,x]"], "lora": L}}),
}  # fmt: skip


def peft_delta(adapter: Adapter, name: str, base: Tensor) -> Tensor | None:
    """What PEFT would have in the place of a weight, by its formulas, written down by hand; None where it has no adapter."""
    module = name.removesuffix(".weight")
    if base.dim() == 3:
        owner, _, parameter = name.rpartition(".")
        both = f"base_model.model.{owner}.base_layer.lora_A.weight" in adapter.tensors
        targeted = [t for t in adapter.config["target_parameters"] or [] if name == t or name.endswith(f".{t}")]
        if not targeted:
            return None
        module = f"{owner}.base_layer" if both and parameter == "gate_up_proj" else owner
    if f"base_model.model.{module}.lora_A.weight" not in adapter.tensors:
        return None
    a, b = (adapter[f"{module}.lora_{x}.weight"].double() for x in "AB")
    experts = len(base) if base.dim() == 3 else 1
    rank, c = len(a) // experts, adapter.config
    told = any(name.endswith(t) for t in c["target_parameters"] or ())  # the parameter, and not its module
    label = name if told else module
    assert at(c["rank_pattern"], label, c["r"]) == rank
    scale = at(c["alpha_pattern"], label, c["lora_alpha"]) / (rank**0.5 if c["use_rslora"] else rank)
    if experts > 1:
        a, b = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts)
        return base + scale * torch.einsum("ore,eri->eoi", b, a)
    weight = (base.T if c["fan_in_fan_out"] and name != "lm_head.weight" else base) + scale * b @ a
    if c["use_dora"]:
        weight *= (adapter[f"{module}.lora_magnitude_vector"].double() / weight.norm(dim=1))[:, None]
    return weight.T if c["fan_in_fan_out"] and name != "lm_head.weight" else weight


@pytest.mark.parametrize("name", CASES)
def test_what_is_added_is_what_merging_adds(name: str, tmp_path: Path) -> None:
    """Every weight of theirs that is merged by hand, in float64, is the one that our merged model is mapped to: nothing of the way
    that adapters take is used. Roundings of 16 products are below 1e-12; a wrong row is off by 0.1."""
    family, tree, rules = CASES[name]
    model, rows = made(rules, **tree)
    model = model.double()
    before = {n: t.clone() for n, t in weights(model).items()}
    folder = tmp_path / "adapter"
    written = write(model, rows, FAMILIES[family], folder)
    adapter = opened(folder)
    stacked = [FAMILIES[family].prefix + "layers.0.mlp.experts.gate_up_proj"]
    ours, plain = Ours(model.config), bare(model)
    theirs = FAMILIES[family].rules(model.config, stacked).inverse
    merged, base = (Mapped(Multiplied(m, ours), theirs) for m in (model, plain))
    changed = set()
    for weight in merged.names():
        expected, own = merged.get(weight), base.get(weight)
        found = peft_delta(adapter, weight, own)
        if found is not None:
            changed.add(weight)
            assert not torch.equal(expected, own)
        torch.testing.assert_close(own if found is None else found, expected, rtol=0, atol=1e-12)
    assert changed == set(written.targets) and changed
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items()), "the model is as it was"


def same(model: Any, other: Any) -> bool:
    """Whether two models have the same adapters, bit for bit."""
    one, two = ({n: p for n, p in m.named_parameters() if is_adapter(n)} for m in (model, other))
    return one.keys() == two.keys() and all(torch.equal(p, two[n]) for n, p in one.items())


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_comes_back(name: str, tmp_path: Path) -> None:
    """The very adapters with their options; and where two adapters of one weight had other scales, the same logits: B times 0.75
    and such are rounded."""
    family, tree, rules = CASES[name]
    model, rows = made(rules, **tree)
    write(model, rows, FAMILIES[family], tmp_path / "adapter")
    base = bare(model)
    imported = read_adapter(tmp_path / "adapter", base, FAMILIES[family])
    back, table = load(base, imported)
    assert same(model, back)
    assert torch.equal(logits(back), logits(model)) and not torch.equal(logits(back), logits(base))
    assert torch.equal(logits(base), logits(bare(back)))
    options = {r.slice.address: r.settings.lora for r in rows if not is_adapter(r.slice.parameter)}
    again = {r.slice.address: r.settings.lora for r in table if not is_adapter(r.slice.parameter)}
    assert options == again
    write(back, table, FAMILIES[family], tmp_path / "again")
    one, two = opened(tmp_path / "adapter"), opened(tmp_path / "again")
    assert one.config == two.config and all(torch.equal(t, two.tensors[n]) for n, t in one.tensors.items())


def test_other_scales_and_mixed_kinds_come_back_as_the_same_function(tmp_path: Path) -> None:
    """B is multiplied by 3 / 8 and rounded to a float32 again: logits of size 1 to 10 then differ by some 1e-6."""
    rules = {
        "q": {"match": "h.*.attn.qkv[q]", "lora": L},
        "v": {"match": "h.*.attn.qkv[v]", "lora": {"rank": 3, "alpha": 2.0}},
    }
    dora = rules | {"d": {"match": "h.*.mlp.down", "lora": DORA}}
    for i, some in enumerate((rules, dora)):
        model, rows = made(some, **LLAMA)
        write(model, rows, FAMILIES["phi3"], tmp_path / str(i))
        back = adapted(bare(model), tmp_path / str(i), FAMILIES["phi3"])
        torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=2e-5)


# What others have written ---------------------------------------------------------------------------------------------------


def foreign(family: str, tensors: dict[str, Any], **config: Any) -> Adapter:
    """An adapter as PEFT saves it: all its keys, most of them empty. Shapes become tensors of random numbers."""
    draw = torch.Generator().manual_seed(5)
    full = {
        f"base_model.model.{n}": torch.randn(t, generator=draw) if isinstance(t, tuple) else t
        for n, t in tensors.items()
    }
    usual: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "inference_mode": True, "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.0, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "use_rslora": False,
        "modules_to_save": None, "loftq_config": {}, "init_lora_weights": True, "qalora_group_size": 16, "use_qalora": False,
        "target_modules": ["x"], "target_parameters": None, "megatron_core": "megatron.core", "lora_bias": False,
    }  # fmt: skip
    return Adapter(usual | config, full)


def test_a_dense_adapter_of_a_fused_map_is_one_for_the_whole(tmp_path: Path) -> None:
    base, _ = made({}, **GPT2)
    module = "transformer.h.1.attn.c_attn"
    adapter = foreign(
        "gpt2", {f"{module}.lora_A.weight": (4, 16), f"{module}.lora_B.weight": (48, 4)}, lora_dropout=0.1
    )
    imported = read_adapter(adapter.put(tmp_path / "a"), base, FAMILIES["gpt2"])
    lora = {"variant": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}
    assert imported.rules == {"adapter": {"match": "h.1.attn.qkv", "lora": lora}}
    model: Any = load(base, imported)[0]
    assert torch.equal(model.h[1].attn.qkv.adapter.lora_b, adapter[f"{module}.lora_B.weight"])
    adapter.tensors[f"base_model.model.{module}.lora_B.weight"][16:32] = 0.0  # nothing for k, one A for q and v
    imported = read_adapter(adapter.put(tmp_path / "b"), base, FAMILIES["gpt2"])
    assert imported.rules["adapter"]["match"] == "h.1.attn.qkv"
    assert imported.rules["adapter"]["except"] == ["h.1.attn.qkv[k]"]
    other: Any = load(base, imported)[0]
    assert other.h[1].attn.qkv.adapter.ranges == ((0, 16), (32, 48))
    adapter.tensors[f"base_model.model.{module}.lora_B.weight"].zero_()  # as it begins
    assert read_adapter(adapter.put(tmp_path / "c"), base, FAMILIES["gpt2"]).rules["adapter"] == {
        "match": "h.1.attn.qkv",
        "lora": lora,
    }


def test_ranks_without_a_part_stay_with_their_neighbours(tmp_path: Path) -> None:
    """Of q's two ranks the second is zero in B, and of v's the first: 1 and 2 belong to q, as they follow it; all of A is kept."""
    base, _ = made({}, **LLAMA)
    module = "model.layers.0.self_attn.qkv_proj"
    b = torch.zeros(32, 4)
    b[:16, 0], b[24:, 3] = 1.0, 1.0
    adapter = foreign("phi3", {f"{module}.lora_A.weight": (4, 16), f"{module}.lora_B.weight": b})
    model = adapted(base, adapter.put(tmp_path / "a"), FAMILIES["phi3"])
    q, v = (model.h[0].attn.qkv.get_submodule(f"adapter[{x}]") for x in "qv")
    assert q.lora_a.shape == (3, 16) and v.lora_a.shape == (1, 16) and float(q.scale) == float(v.scale) == 2.0
    assert torch.equal(torch.cat((q.lora_a, v.lora_a)), adapter[f"{module}.lora_A.weight"])


def test_experts_one_by_one_and_patterns(tmp_path: Path) -> None:
    """As they were before experts were stacked: a module for each expert's map."""
    base, _ = made({}, **MIXTRAL)
    moe = "model.layers.1.block_sparse_moe.experts"
    shapes = {f"{moe}.{e}.w1.lora_{x}.weight": shape for e in (0, 2) for x, shape in (("A", (2, 16)), ("B", (24, 2)))}
    adapter = foreign("mixtral", shapes, alpha_pattern={r"experts\.2\.w1": 3, "w1": 5})
    imported = read_adapter(adapter.put(tmp_path / "a"), base, FAMILIES["mixtral"])
    assert [(r["match"], r["lora"]["alpha"]) for r in imported.rules.values()] == [
        ("h.1.mlp.gate_up[0.gate]", 5.0),
        ("h.1.mlp.gate_up[2.gate]", 3.0),
    ]
    model: Any = load(base, imported)[0]
    for e in (0, 2):
        a, b = (adapter[f"{moe}.{e}.w1.lora_{x}.weight"] for x in "AB")
        delta = (5, 0, 3)[e] / 2 * b @ a
        weight = base.h[1].mlp.gate_up.weight[e, :24] + delta
        merged = Multiplied(model, Ours(model.config)).get("h.1.mlp.gate_up.weight")
        torch.testing.assert_close(merged[e, :24], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(merged[e, 24:], base.h[1].mlp.gate_up.weight[e, 24:])


def test_two_modules_of_one_part_become_its_one_adapter(tmp_path: Path) -> None:
    """Half of q each: A one below another, B in blocks; and a half alone adds nothing to the other one."""
    base, _ = made({}, **LLAMA)
    halves = Layout((("q1", 8), ("q2", 8), ("kv", 16)), -2)
    family = own_family()
    plain = family.rules

    def rules(model: ModelConfig, names: Any = ()) -> Rules:
        kept = tuple(r for r in plain(model).rules if "odd" not in r.source[0])
        source = [f"model.layers.0.{part}.weight" for part in ("q1", "q2", "kv")]
        return Rules((*kept, rule(source, "h.0.attn.qkv.weight", Join(halves))))

    family.rules = staticmethod(rules)
    shapes = {
        f"model.layers.0.{p}.lora_{x}.weight": s for p in ("q1", "q2") for x, s in (("A", (2, 16)), ("B", (8, 2)))
    }
    adapter = foreign("llama", shapes, r=2, lora_alpha=4)
    for i, tensors in enumerate((adapter.tensors, {n: t for n, t in adapter.tensors.items() if "q2" in n})):
        folder = replace(adapter, tensors=tensors).put(tmp_path / str(i))
        model = adapted(base, folder, family)
        (found,) = [m for n, m in model.h[0].attn.qkv.named_children()]
        expected = torch.zeros(16, 16)
        for part, first in (("q1", 0), ("q2", 8))[i:]:
            a, b = (adapter[f"model.layers.0.{part}.lora_{x}.weight"] for x in "AB")
            expected[first : first + 8] = 2.0 * b @ a
        torch.testing.assert_close(found.scale * found.lora_b @ found.lora_a, expected)
        assert found.ranges == ((0, 16),)


def test_magnitudes_that_were_trained_are_kept(tmp_path: Path) -> None:
    """Blocks of q and v, but k has other magnitudes than its norms: one adapter for all three."""
    model, rows = made({"a": {"match": "h.0.attn.qkv[q,v]", "lora": DORA}}, **LLAMA)
    write(model, rows, FAMILIES["phi3"], tmp_path / "a")
    adapter, name = opened(tmp_path / "a"), "base_model.model.model.layers.0.self_attn.qkv_proj.lora_magnitude_vector"
    adapter.tensors[name][20] *= 1.01
    base = bare(model)
    back = adapted(base, adapter.put(tmp_path / "b"), FAMILIES["phi3"])
    whole = back.h[0].attn.qkv.adapter
    assert torch.equal(whole.lora_magnitude, adapter.tensors[name]) and whole.ranges == ((0, 32),)


# What is refused ------------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
GOOD = {f"{Q}.lora_A.weight": (4, 16), f"{Q}.lora_B.weight": (16, 4)}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "method": ({}, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "bias": ({}, {"bias": "all"}, "bias is 'all'"),
    "modules": ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "tokens": ({}, {"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "replication": ({}, {"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
    "unknown": ({}, {"some_new_thing": {"x": 1}}, "some_new_thing is {'x': 1}"),
    "embedding": ({"model.embed_tokens.lora_embedding_A": (4, 19)}, {}, "lora_embedding_A is an adapter of an embedding"),
    "looked up": (
        {"model.embed_tokens.lora_A.weight": (4, 16), "model.embed_tokens.lora_B.weight": (19, 4)},
        {},
        "wte.weight, which is no linear map",
    ),
    "another base": ({"lm_head.base_layer.weight": (19, 16)}, {}, "lm_head.base_layer.weight is a weight of the base, and not"),
    "trained bias": ({f"{Q}.base_layer.bias": (16,)}, {}, "q_proj.base_layer.bias is no A, B or magnitude"),
    "bias of B": ({f"{Q}.lora_B.bias": (16,)}, {}, "lora_B.bias is no A, B or magnitude"),
    "saved module": ({"lm_head.modules_to_save.weight": (19, 16)}, {}, "lm_head.modules_to_save.weight is no A"),
    "nowhere": ({"model.layers.7.odd.lora_A.weight": (4, 16)}, {}, "layers.7.odd has an adapter, and the model has no"),
    "norm": ({"model.norm.lora_A.weight": (4, 16), "model.norm.lora_B.weight": (16, 4)}, {}, "norm.weight is not made of rows"),
    "B alone": ({"model.layers.1.self_attn.q_proj.lora_B.weight": (16, 4)}, {}, "self_attn.q_proj has b, and not A and B."),
    "no magnitude": ({}, {"use_dora": True}, "has a, b, and not A and B and magnitudes."),
    "magnitude": ({f"{Q}.lora_magnitude_vector": (16,)}, {}, "has a, b, magnitude, and not A and B."),
    "rows": ({f"{Q}.lora_B.weight": (15, 4)}, {}, "A is [4, 16] and B [15, 4], and the weight has [16] rows and 16 columns"),
    "ranks": ({f"{Q}.lora_B.weight": (16, 3)}, {}, "A is [4, 16] and B [16, 3]"),
    "columns": ({f"{Q}.lora_A.weight": (4, 12)}, {}, "A is [4, 12]"),
    "pattern": ({}, {"alpha_pattern": {"(": 3}}, "'(' is not a pattern"),
    "alpha": ({}, {"alpha_pattern": {"q_proj": "big"}}, "alpha of model.layers.0.self_attn.q_proj is 'big'"),
    "zero": ({}, {"lora_alpha": 0}, "is 0, and a number above 0"),
    "type": ({}, {"rank_pattern": [1]}, "rank_pattern is [1], which it cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    tensors, config, text = REFUSED[name]
    base, _ = made({}, **LLAMA)
    assert read_adapter(foreign("llama", GOOD).put(tmp_path / "good"), base, FAMILIES["llama"]).rules
    folder = foreign("llama", GOOD | tensors, **config).put(tmp_path / "bad")
    assert text in sentence(lambda: read_adapter(folder, base, FAMILIES["llama"]))


def test_every_mistake_is_told_at_once_and_files_that_may_hold_code_are_not_read(tmp_path: Path) -> None:
    base, _ = made({}, **LLAMA)
    bad = foreign("llama", GOOD | {"x.lora_A.weight": (4, 16)}, bias="all", modules_to_save=["head"]).put(
        tmp_path / "bad"
    )
    told = sentence(lambda: read_adapter(bad, base, FAMILIES["llama"]))
    assert all(text in told for text in ("bias is 'all'", "modules_to_save", "x has an adapter"))
    (bad / "adapter_model.safetensors").rename(bad / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in sentence(lambda: read_adapter(bad, base, FAMILIES["llama"]))
    (bad / "adapter_config.json").write_text("{")
    assert "cannot be read" in sentence(lambda: read_adapter(bad, base, FAMILIES["llama"]))
    (bad / "adapter_config.json").write_text("[]")
    assert "peft_type is None" in sentence(lambda: read_adapter(bad, base, FAMILIES["llama"]))
    good = foreign("llama", GOOD).put(tmp_path / "good")
    adapted, _ = made({"q": {"match": "h.0.attn.qkv", "lora": L}}, **LLAMA)
    assert "has adapters already" in sentence(lambda: read_adapter(good, adapted, FAMILIES["llama"]))
    wide = foreign("llama", {f"{Q}.lora_A.weight": (17, 16), f"{Q}.lora_B.weight": (16, 17)}).put(tmp_path / "wide")
    imported = read_adapter(wide, base, FAMILIES["llama"])
    assert "17 is more than 16" in sentence(lambda: load(base, imported))


def test_what_peft_does_not_have_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    def refused(family: str, rules: dict[str, Any], **tree: Any) -> str:
        model, rows = made(rules, **tree)
        told = sentence(lambda: write(model, rows, FAMILIES[family], tmp_path / "x"))
        assert not list(tmp_path.iterdir())
        return told

    whole = {"a": {"match": "h.*.mlp.down", "lora": DORA}}
    assert "mlp.experts.down_proj has DoRA" in refused("mixtral", whole, **MIXTRAL)
    mamba = {"a": {"match": "h.*.attn.out_proj", "lora": L}}
    assert "PEFT adapts no 'out_proj' of mamba2" in refused("mamba2", mamba, **MAMBA)
    assert refused("llama", {}, **LLAMA) == "The model has no adapters."
    qv = {"a": {"match": "h.*.attn.qkv[q]", "lora": L}}
    assert "layers of the model are stacked" in refused("llama", qv, **LLAMA, stack_layers=True)
    model, rows = made(qv, **LLAMA)
    plain, table = made({}, **LLAMA)
    assert "that the model does not have" in sentence(lambda: write(plain, rows, FAMILIES["llama"], tmp_path / "x"))
    assert (
        "that its table does not have" in sentence(lambda: write(model, table, FAMILIES["llama"], tmp_path / "x"))
        or not table
    )
    dropping = {"a": {"match": "h.*.mlp.down", "lora": L | {"dropout": 0.1}}}
    model, rows = made(dropping, **MIXTRAL)
    written = write(model, rows, FAMILIES["mixtral"], tmp_path / "dropping")
    assert "drops nothing before adapters of parameters" in written.notes[0]
    assert opened(tmp_path / "dropping").config["lora_dropout"] == 0.0
    model, rows = made(dropping, **LLAMA)
    assert not write(model, rows, FAMILIES["llama"], tmp_path / "kept").notes
    assert opened(tmp_path / "kept").config["lora_dropout"] == 0.1


# Folders --------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_there_when_all_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = made({"a": {"match": "h.*.attn.qkv[q]", "lora": L}}, **LLAMA)

    def broken(_: Any, path: Path) -> None:
        path.write_text("a part")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(convert.peft.export, "write_file", broken)
        with pytest.raises(OSError, match="full"):
            write(model, rows, FAMILIES["llama"], tmp_path / "a")
    assert not list(tmp_path.iterdir())
    write(model, rows, FAMILIES["llama"], tmp_path / "a", base="some/base")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert opened(tmp_path / "a").config["base_model_name_or_path"] == "some/base"
    assert "is there already" in sentence(lambda: write(model, rows, FAMILIES["llama"], tmp_path / "a"))


def test_a_stack_is_a_folder_for_each_run_over_one_base(tmp_path: Path) -> None:
    rules = {"a": {"match": "h.*.attn.qkv[q,v]", "lora": L}}
    other = {"a": {"match": "h.*.attn.qkv[q]", "lora": SMALL}, "d": {"match": "h.*.mlp.down", "lora": SMALL}}
    runs = [("one", *made(rules, 3, **LLAMA)), ("two", *made(other, 4, **LLAMA))]
    with torch.no_grad():
        own = weights(runs[1][1])
        for name, t in weights(runs[0][1]).items():
            if not is_adapter(name):
                own[name].copy_(t)
    family = FAMILIES["llama"]
    assert list(write_stack(runs, family, tmp_path / "stack", base="base")) == ["one", "two"]
    base = bare(runs[0][1])
    for name, model, _ in runs:
        assert opened(tmp_path / "stack" / name).config["base_model_name_or_path"] == "base"
        back = adapted(base, tmp_path / "stack" / name, family)
        assert torch.equal(logits(back), logits(model))
    assert adapter_weights(runs[0][1]).keys() != adapter_weights(runs[1][1]).keys()
    with torch.no_grad():
        runs[1][1].h[1].ln_1.weight[0] += 1.0
    told = sentence(lambda: write_stack(runs, family, tmp_path / "torn"))
    assert "h.1.ln_1.weight of 'two' is not that of 'one'" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stack"]


def test_names_are_as_short_as_they_may_be() -> None:
    every = [f"m.{i}.{x}" for i in range(12) for x in ("attn.proj", "mlp.proj", "mlp.up", "gate_up")]
    assert shortest([f"m.{i}.mlp.up" for i in range(12)], every) == ["mlp.up"] or shortest(["a.up"], ["a.up"]) == ["up"]
    assert shortest([f"m.{i}.mlp.proj" for i in range(12)], every) == ["mlp.proj"]
    assert shortest(["m.1.mlp.up"], every) == ["m.1.mlp.up"]
    assert shortest([n for n in every if n.endswith("proj")], every) == ["proj"]
    assert shortest(["head"], [*every, "head"]) == ["head"]
    patterns = {r"m\.1\.mlp\.up": 1, "up": 2}
    assert [at(patterns, n, 3) for n in ("m.1.mlp.up", "m.11.mlp.up", "x.m.1.mlp.up", "m.1.mlp.proj")] == [1, 2, 1, 3]
