"""Adapters in the real `peft`, over the real `transformers`: loaded strictly, and computed in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import doubled
from models import tokens
from test_peft import CASES, GPT2, LLAMA, MIXTRAL, Adapter, L, adapted, logits, made, opened, same
from torch import Tensor

from convert.huggingface import FAMILIES
from convert.huggingface import write as write_base
from convert.peft import bare, load, write, write_stack
from convert.peft import read as read_adapter
from core.addresses import is_adapter
from core.lora import merge
from core.weights import weights

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: adapters of PEFT are not tested"
)
peft = pytest.importorskip("peft", reason="peft is not installed: adapters of PEFT are not tested")
pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("default"),  # the libraries' own warnings are not ours
]
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}  # which take float64
SCANNED = 1e-6  # chunks of other sizes multiply many decays
EXACT = 1e-10  # a few hundred products in another order; a wrong row or scale is off by more than 1e-2
WRONG = 1e-2


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def hugging(model: Any, family: str, folder: Path) -> Any:
    """The model as the library has it, read from its folder, which is written if it is not there. Its adapters are left out."""
    if not folder.exists():
        write_base(bare(model), family, folder)
    made, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype="auto", **PLAIN
    )
    assert not any(told.values()), told
    return made.eval()


def loaded(base: Any, folder: Path) -> Any:
    """An adapter over a model of theirs: what is in the file is in the model, all of it, and nothing else."""
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    inside, file = peft.get_peft_model_state_dict(model, save_embedding_layers=False), opened(folder).tensors
    assert inside.keys() == file.keys(), inside.keys() ^ file.keys()
    assert all(torch.equal(t, file[name]) for name, t in inside.items())
    return model


@torch.no_grad()
def theirs(model: Any, ours: Any) -> Tensor:
    made: Tensor = model(tokens(ours, 2, 12)).logits
    return made


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_what_we_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, tree, rules = CASES[name]
    bound = SCANNED if family == "mamba2" else EXACT
    with doubled(monkeypatch):
        model, rows = made(rules, **tree)
        write(model, rows, FAMILIES[family], tmp_path / "adapter", base=str(tmp_path / "base"))
        base = hugging(model, family, tmp_path / "base")
        plain = theirs(base, model)
        assert plain.dtype == torch.float64 and apart(logits(bare(model)), plain) < bound
        found, ours = loaded(base, tmp_path / "adapter"), logits(model)
        assert apart(theirs(found, model), ours) < bound
        assert apart(plain, ours) > WRONG, "the adapters do something"
        merged = found.merge_and_unload().state_dict()
        merge(model)
        other = hugging(model, family, tmp_path / "merged").state_dict()
        assert merged.keys() == other.keys()
        for weight, tensor in merged.items():
            torch.testing.assert_close(tensor, other[weight], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["whole over separate", "fused", "[in, out], dora", "experts"])
def test_in_float32_logits_agree_to_its_roundings(name: str, tmp_path: Path) -> None:
    family, tree, rules = CASES[name]
    model, rows = made(rules, **tree)
    write(model, rows, FAMILIES[family], tmp_path / "adapter")
    found = loaded(hugging(model, family, tmp_path / "base"), tmp_path / "adapter")
    assert apart(theirs(found, model), logits(model)) < 1e-5


# Wrong ones -----------------------------------------------------------------------------------------------------------------


def swapped(adapter: Adapter, matrix: str, one: str, other: str) -> None:
    """Exchanges a matrix of two modules."""
    for name in [n for n in adapter.tensors if one in n and matrix in n]:
        there = name.replace(one, other)
        adapter.tensors[name], adapter.tensors[there] = adapter.tensors[there].clone(), adapter.tensors[name].clone()


def parts_exchanged(adapter: Adapter, count: int) -> None:
    """The columns of B in another order: those of the second part for those of the first."""
    for name in [n for n in adapter.tensors if "lora_B" in n]:
        adapter.tensors[name] = torch.cat(adapter.tensors[name].chunk(count, 1)[::-1], 1)


def ranks_fastest(adapter: Adapter, experts: int) -> None:
    """B of stacks with ranks beside each other instead of experts."""
    for name in [n for n in adapter.tensors if "experts" in n and "lora_B" in n]:
        b = adapter.tensors[name]
        adapter.tensors[name] = b.unflatten(1, (-1, experts)).transpose(1, 2).flatten(1).contiguous()


QKV = {"qv": {"match": "h.*.attn.qkv[q,v]", "lora": L}}
EQUAL: dict[str, Any] = {"n_kv_head": 4}  # q and v of one shape
STACK = {"a": {"match": "h.*.mlp.*", "lora": L, "except": "h.*.mlp.router"}}
CONTROLS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "A of q and v": ("llama", LLAMA | EQUAL, QKV, lambda a: swapped(a, "lora_A", "q_proj", "v_proj")),
    "B of q and v": ("llama", LLAMA | EQUAL, QKV, lambda a: swapped(a, "lora_B", "q_proj", "v_proj")),
    "blocks": ("phi3", LLAMA | EQUAL, QKV, lambda a: parts_exchanged(a, 2)),
    "[in, out]": ("gpt2", GPT2, QKV, lambda a: parts_exchanged(a, 2)),
    "alpha": ("phi3", LLAMA, QKV, lambda a: a.config.update(lora_alpha=8)),
    "rslora": ("phi3", LLAMA, QKV, lambda a: a.config.update(use_rslora=True)),
    "ranks and experts": ("mixtral", MIXTRAL, STACK, lambda a: ranks_fastest(a, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROLS)
def test_a_wrong_order_is_not_overlooked(name: str, tmp_path: Path) -> None:
    family, tree, rules, spoil = CONTROLS[name]
    model, rows = made(rules, **tree)
    write(model, rows, FAMILIES[family], tmp_path / "right")
    adapter = opened(tmp_path / "right")
    spoil(adapter)
    wrong = adapter.put(tmp_path / "wrong")
    for folder, agrees in ((tmp_path / "right", True), (wrong, False)):
        found = loaded(hugging(model, family, tmp_path / "base"), folder)
        assert (apart(theirs(found, model), logits(model)) < 1e-5) == agrees
        assert (apart(theirs(found, model), logits(model)) > WRONG) != agrees


# Theirs ---------------------------------------------------------------------------------------------------------------------

STACKS = ["gate_up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj", "o_proj"]
MADE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "separate": ("llama", LLAMA, {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 9}}),
    "rslora": ("llama", LLAMA, {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", LLAMA, {"target_modules": ATTENTION, "use_dora": True}),
    "all linear": ("llama", LLAMA, {"target_modules": "all-linear"}),
    "one layer, and the head": ("llama", LLAMA, {"target_modules": r".*1\..*(k_proj|up_proj)|lm_head"}),
    "fused": ("phi3", LLAMA, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "[in, out]": ("gpt2", GPT2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "[in, out], dora": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "experts": ("mixtral", MIXTRAL, {"target_modules": ["q_proj"], "target_parameters": [*STACKS, "gate.weight"]}),
    "down alone": ("mixtral", MIXTRAL, {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]}),
    "experts one by one": ("mixtral", MIXTRAL, {"target_modules": ["w1", "w2", "w3"], "r": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_what_peft_has_saved_computes_the_same_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B is random as well, and so are magnitudes."""
    family, tree, options = MADE[name]
    with doubled(monkeypatch):
        base, _ = made({}, **tree)
        config = peft.LoraConfig(
            **{"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7, "init_lora_weights": False, **options}
        )
        other = peft.get_peft_model(hugging(base, family, tmp_path / "base"), config).eval()
        draw = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in (p for n, p in other.named_parameters() if "lora_" in n):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        other.save_pretrained(tmp_path / "adapter")
        imported = read_adapter(tmp_path / "adapter", base, FAMILIES[family])
        model, rows = load(base, imported)
        assert apart(logits(model), theirs(other, model)) < EXACT
        assert apart(logits(base), theirs(other, model)) > WRONG
        write(model, rows, FAMILIES[family], tmp_path / "again")
        again = loaded(hugging(base, family, tmp_path / "base"), tmp_path / "again")
        assert apart(theirs(again, model), theirs(other, model)) < EXACT
        assert same(model, adapted(base, tmp_path / "again", FAMILIES[family]))


def test_many_adapters_over_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs over one frozen base, in one model of theirs, of which one is chosen at a time."""
    runs = []
    with doubled(monkeypatch):
        for seed, (match, rank) in enumerate([("h.*.attn.qkv[q,v]", 4), ("h.*.mlp.down", 2), ("h.1.attn.*", 3)]):
            model, rows = made({"a": {"match": match, "lora": {"rank": rank, "alpha": 5.0}}}, seed=seed, **LLAMA)
            runs.append((f"run{seed}", model, rows))
        with torch.no_grad():
            for _, model, _ in runs[1:]:
                own = weights(model)
                for name, t in weights(runs[0][1]).items():
                    if not is_adapter(name):
                        own[name].copy_(t)
        write_stack(runs, FAMILIES["llama"], tmp_path / "stack")
        base = hugging(runs[0][1], "llama", tmp_path / "base")
        plain = theirs(base, runs[0][1])
        found = peft.PeftModel.from_pretrained(base, tmp_path / "stack" / "run0", adapter_name="run0").eval()
        for name in ("run1", "run2"):
            found.load_adapter(tmp_path / "stack" / name, adapter_name=name)
        for name, model, _ in runs:
            found.set_adapter(name)
            assert apart(theirs(found, model), logits(model)) < EXACT
            assert apart(plain, logits(model)) > WRONG
