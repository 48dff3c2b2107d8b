"""megatron-core itself: models of one and of two ranks with weights of ours, and checkpoints that each side writes for the other.

Two processes on a CPU do everything once; tests read what they found. Weights are random everywhere, biases and gains too, so that
no two tensors can be taken for one another.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert import huggingface
from convert.kinds import Sizes
from convert.mapping import Source, Tensors, copies, fill
from convert.megatron import checkpoint, names, ranks
from convert.ranks import Rank
from core.options import Reader
from core.weights import weights
from gpt_conf import ModelConfig
from model import GPT, build
from variations import CATALOGUE

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        find_spec("megatron") is None,
        reason="megatron-core is not installed (requirements-system.lock): NOTHING IS TESTED",
    ),
]

VOCABULARY, LENGTH, RANKS = 61, 12, 2
LLAMA: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "head_dim": 8, "block_size": LENGTH, "bias": True,
    "vocab_size": VOCABULARY, "tie_weights": False, "norm": {"variant": "rmsnorm", "eps": 1e-6}, "activation": "silu",
    "position": "rope", "mlp": {"variant": "gated", "width": 48},
}  # fmt: skip
CORE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48, "kv_channels": 8,
    "normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": True, "layernorm_epsilon": 1e-6,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True, "perform_initialization": False,
    "masked_softmax_fusion": False, "bias_activation_fusion": False, "bias_dropout_fusion": False, "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}  # fmt: skip
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "allgather",
}
# What differs from the above, ours and theirs.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "one group": ({"n_kv_head": 1}, {"num_query_groups": 1}),  # fewer groups than ranks
    "gate and norms": (
        {"bias": False, "attention": {"variant": "causal", "gate": True, "qk_norm": True, "qkv_bias": True}},
        {"add_bias_linear": False, "add_qkv_bias": True, "attention_output_gate": True, "qk_layernorm": True},
    ),
    "gpt-2": (
        {
            "norm": {"variant": "layernorm", "eps": 1e-6}, "activation": "gelu", "position": "learned", "tie_weights": True,
            "n_kv_head": 4, "mlp": {"variant": "standard", "width": 48},
        },
        {"normalization": "LayerNorm", "gated_linear_unit": False, "num_query_groups": 4},
    ),
    "experts": (
        {
            "bias": False,
            "mlp": {"variant": "moe", "experts": 4, "width": 24, "bias_rate": 0.1, "score": "sigmoid", "shared_experts": 2},
        },
        {
            **EXPERTS, "add_bias_linear": False, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid",
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
}  # fmt: skip


def configured(changes: dict[str, Any]) -> ModelConfig:
    reader = Reader(CATALOGUE)
    made: ModelConfig | None = reader.read(ModelConfig, LLAMA | changes)
    assert made is not None, [str(m) for m in reader.mistakes]
    return made


@torch.no_grad()
def random_model(changes: dict[str, Any]) -> GPT:
    model = build(configured(changes), 0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights(model).items():
        matrix = tensor.dim() > 1
        tensor.copy_(
            torch.randn(tensor.shape, generator=generator) * (0.2 if matrix else 0.3)
            + (not matrix and "bias" not in name)
        )
    return model.eval()


# In the processes ----------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """What makes megatron-core run without a GPU."""
    random: Any = import_module("megatron.core.tensor_parallel.random")
    moe_utils: Any = import_module("megatron.core.transformer.moe.moe_utils")
    grouped_gemm_util: Any = import_module("megatron.core.transformer.moe.grouped_gemm_util")

    class Tracker:
        @contextlib.contextmanager
        def fork(self, name: str = "") -> Iterator[None]:
            yield

    device: Any = lambda: torch.device("cpu")  # noqa: E731
    nothing: Any = lambda *given: None  # noqa: E731
    torch.cuda.current_device, torch.cuda.synchronize = device, nothing
    moe_utils.te_general_gemm = None
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = Tracker(), True
    grouped_gemm_util.assert_grouped_gemm_is_available = nothing


def core_model(ours: GPT, changes: dict[str, Any], ranks_of_tensors: int, flat: bool = False) -> Any:
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    given = CORE | changes
    given["activation_func"] = F.silu if given["gated_linear_unit"] else F.gelu
    given |= {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True} if flat else {}
    config = import_module("megatron.core.transformer.transformer_config").TransformerConfig(
        tensor_model_parallel_size=ranks_of_tensors, **given
    )
    spec = specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
        moe_grouped_gemm=flat,
        moe_use_legacy_grouped_gemm=flat,
    )
    return (
        import_module("megatron.core.models.gpt")
        .GPTModel(
            config,
            spec,
            vocab_size=names.padded(VOCABULARY, 16, ranks_of_tensors),
            max_sequence_length=LENGTH,
            position_embedding_type="learned_absolute" if ours.wpe is not None else "rope",
            share_embeddings_and_output_weights=ours.config.tie_weights,
            parallel_output=False,
        )
        .eval()
    )


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    made: Tensor = model(tokens, torch.arange(length).expand_as(tokens), hidden)
    return made[..., :VOCABULARY]


def load(model: Any, tensors: dict[str, Tensor]) -> None:
    """Strictly, but for states beside the weights."""
    wrong = model.load_state_dict(tensors, strict=False)
    odd = [n for n in wrong.missing_keys if not n.endswith("_extra_state")] + wrong.unexpected_keys
    assert not odd, odd


def state(model: Any) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def spread(full: Source, tensor: int, rank: int) -> dict[str, Tensor]:
    """What one of the tensor-parallel ranks has of full weights."""
    plan = ranks.plan({name: full.meta(name) for name in full.names()}, Sizes(tensor))
    return copies(Rank(plan, full, rank % tensor))


def equal(model: GPT, source: Any, form: names.Form | None = None) -> bool:
    """Whether a checkpoint of core has, under our names, the bits of the model."""
    made = copies(names.mapped(source, model, form))
    return all(torch.equal(tensor, made[name]) for name, tensor in weights(model).items())


def check(case: str, tensor: int, rank: int, folder: Path) -> dict[str, Any]:
    """All that is checked of one case with so many tensor-parallel ranks."""
    dist_checkpointing: Any = import_module("megatron.core.dist_checkpointing")
    changes, theirs = CASES[case]
    ours = random_model(changes)
    if case == "llama":
        fill(weights(ours), Tensors(load_file(folder / "ours.safetensors")))
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % VOCABULARY
    with torch.no_grad():
        wanted = ours(tokens)[0]
    if case == "llama":
        wanted = load_file(folder / "logits.safetensors")["logits"]
    form = names.Form("local", "each", parts=False, vocabulary=names.padded(VOCABULARY, 16, tensor))
    full = names.exported(Tensors(weights(ours)), ours, form)
    made = core_model(ours, theirs, tensor)
    load(made, spread(full, tensor, rank))
    found: dict[str, Any] = {"logits": float((logits_of(made, tokens) - wanted).abs().max())}

    # Files of ranks, as core's state dicts are.
    held = folder / f"{case} held {tensor}"
    if rank < tensor:
        (own := held / f"mp_rank_{rank:02}").mkdir(parents=True)
        save_file(state(made), own / "model.safetensors")
    torch.distributed.barrier()
    found["ranks"] = equal(ours, ranks.read(held))

    # Distributed checkpoints: of core here, of ours there.
    for single in (False, True):
        about = {"singleton_local_shards": single}
        path = folder / f"{case} core {tensor} {single}"
        if rank == 0:
            path.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(made.sharded_state_dict(metadata=about), str(path))
        source = checkpoint.Checkpoint(path)
        found[f"read {single}"] = equal(ours, source)
        back = folder / f"{case} ours {tensor} {single}"
        if rank == 0:
            checkpoint.write(names.exported(Tensors(weights(ours)), ours, names.recognised(source)), back, single)
        torch.distributed.barrier()
        other = core_model(ours, theirs, tensor)
        load(other, {name: torch.zeros_like(tensor) for name, tensor in state(other).items()})
        loaded = dist_checkpointing.load(other.sharded_state_dict(metadata=about), str(back))
        assert loaded["content_metadata"]["singleton_local_shards"] is single
        load(other, {name: tensor for name, tensor in loaded.items() if "." in name})
        found[f"written {single}"] = float((logits_of(other, tokens) - wanted).abs().max())
    found["controls"] = controls(made, ours, full, tensor, rank, tokens, wanted) if case == "llama" else {}
    return found


def controls(
    made: Any, ours: GPT, full: Any, tensor: int, rank: int, tokens: Tensor, wanted: Tensor
) -> dict[str, float]:
    """How far logits are off with weights in another order."""
    right, own = copies(full), weights(ours)
    wrong: dict[str, dict[str, Tensor]] = {"heads": {}, "halves": {}, "shards": {}}
    for i in range(2):
        for leaf in ("weight", "bias"):
            wrong["heads"][f"decoder.layers.{i}.self_attention.linear_qkv.{leaf}"] = own[f"h.{i}.attn.qkv.{leaf}"]
            first = f"decoder.layers.{i}.mlp.linear_fc1.{leaf}"
            wrong["halves"][first] = torch.cat(right[first].chunk(2)[::-1])
            # The rows of all ranks one after another, taken for those of the whole.
            wrong["shards"][first] = torch.cat(
                [x for pair in zip(*(h.chunk(RANKS) for h in right[first].chunk(2)), strict=True) for x in pair]
            )
    off = {}
    for name, changed in wrong.items():
        load(made, spread(Tensors(right | changed), tensor, rank))
        off[name] = float((logits_of(made, tokens) - wanted).abs().max())
    return off


def flat(tensor: int, rank: int, folder: Path) -> bool:
    """Experts in one matrix: what core makes of it for a checkpoint is what we make of it."""
    dist_checkpointing: Any = import_module("megatron.core.dist_checkpointing")
    changes, theirs = CASES["experts"]
    ours = random_model(changes)
    form = names.Form("local", "flat", parts=False, vocabulary=names.padded(VOCABULARY, 16, tensor))
    made = core_model(ours, theirs, tensor, flat=True)
    load(made, copies(names.exported(Tensors(weights(ours)), ours, form)))
    path = folder / "flat"
    if rank == 0:
        path.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(made.sharded_state_dict(), str(path))
    return equal(ours, checkpoint.Checkpoint(path))


def process(rank: int, folder: Path) -> None:
    """One of the two."""
    found: dict[str, Any] = {}
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            import_module("megatron.core.models.gpt")
        except ImportError as error:
            found["absent"] = str(error)
            return
        prepare()
        parallel_state: Any = import_module("megatron.core.parallel_state")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
        )
        for tensor in (1, RANKS):
            parallel_state.initialize_model_parallel(tensor)
            found |= {f"{case} {tensor}": check(case, tensor, rank, folder) for case in CASES}
            if tensor == 1:
                found["flat"] = flat(tensor, rank, folder)
            parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    except BaseException:
        found["error"] = traceback.format_exc()
        raise
    finally:
        (folder / f"{rank}.json").write_text(json.dumps(found))


# Here ----------------------------------------------------------------------------------------------------------------------


def llama(folder: Path) -> None:
    """A Llama of transformers with random weights: its logits, and its weights as ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: NOTHING IS TESTED")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) * (0.2 if tensor.dim() > 1 else 0.3) + ("norm" in name))
        tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % VOCABULARY
        save_file({"logits": model(tokens).logits}, folder / "logits.safetensors")
    model.save_pretrained(folder / "llama")
    save_file(copies(huggingface.mapped(folder / "llama", configured({}))), folder / "ours.safetensors")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("megatron")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama(folder)
    started = [
        multiprocessing.get_context("spawn").Process(target=process, args=(rank, folder)) for rank in range(RANKS)
    ]
    for each in started:
        each.start()
    for each in started:
        each.join(240)
    made = []
    for rank, each in enumerate(started):
        if each.is_alive():
            each.kill()
        text = folder / f"{rank}.json"
        assert text.is_file(), f"process {rank} ended with {each.exitcode} and said nothing"
        made.append(json.loads(text.read_text()))
    for one in made:
        if "absent" in one:
            pytest.skip(f"megatron-core cannot be imported: NOTHING IS TESTED: {one['absent']}")
        assert "error" not in one, one["error"]
    return made


@pytest.mark.parametrize("tensor", [1, RANKS])
@pytest.mark.parametrize("case", CASES)
def test_a_model_of_core_with_our_weights_has_the_same_logits(
    found: list[dict[str, Any]], case: str, tensor: int
) -> None:
    """Of the Llama, those of transformers. Logits are of size 1 to 10, of which single precision leaves 3e-6."""
    for one in found:
        assert one[f"{case} {tensor}"]["logits"] <= 1e-5


@pytest.mark.parametrize("tensor", [1, RANKS])
@pytest.mark.parametrize("case", CASES)
def test_what_core_writes_is_read_bit_for_bit(found: list[dict[str, Any]], case: str, tensor: int) -> None:
    for one in found:
        told = one[f"{case} {tensor}"]
        assert told["ranks"] and told["read False"] and told["read True"]


@pytest.mark.parametrize("tensor", [1, RANKS])
@pytest.mark.parametrize("case", CASES)
def test_core_loads_what_we_write(found: list[dict[str, Any]], case: str, tensor: int) -> None:
    for one in found:
        told = one[f"{case} {tensor}"]
        assert told["written False"] <= 1e-5 and told["written True"] <= 1e-5


@pytest.mark.parametrize("tensor", [1, RANKS])
def test_another_order_of_rows_is_seen(found: list[dict[str, Any]], tensor: int) -> None:
    for one in found:
        off = one[f"llama {tensor}"]["controls"]
        assert set(off) == {"heads", "halves", "shards"} and min(off.values()) > 0.1, off


def test_experts_in_one_matrix_are_read_as_core_reads_them(found: list[dict[str, Any]]) -> None:
    assert all(one["flat"] for one in found)
