"""Names and layouts of megatron-core's GPTModel, and of its MambaModel for models with state space mixers, against ours.

Source: megatron-core 0.16, whole tensors as one rank alone would hold them. `linear_qkv` has the rows of each key-value head
together with those of its queries; `linear_fc1` is [gate; up]. What tensor-parallel ranks hold is in `ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from convert.mapping import Mapped, Rule, Rules, Source, rule
from convert.steps import Add, Agree, Batched, Chain, Cut, Join, Numbers, Permute, Relayout, Reshape, Stack, Step
from core.layout import Layout
from core.slices import declared
from core.weights import weights
from model import GPT
from variations.attention.causal import CausalAttention
from variations.attention.mamba2 import Mamba2
from variations.mlp.gated import GatedMLP
from variations.mlp.moe import MoE
from variations.mlp.standard import MLP

# What beside a model's weights is in checkpoints: states of quantisation, of optimizers, tables of rotations.
DROPPED = ("**._extra_state", "optimizer.**", "chained_*.**", "**.inv_freq")
LAYER, OURS = "decoder.layers.{}.", "h.{}."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FIRST, SECOND = "linear_fc1", "linear_fc2"
ORDER = ("q", "z", "k", "v")  # of parts in each group of heads; z is the output gate
EXPERTS = {
    "stacked": "experts.experts.{linear}.{leaf}",
    "single": "experts.experts.{expert}.{linear}.{leaf}",
    "each": "experts.local_experts.{expert}.{linear}.{leaf}",
    "grouped": "experts.{linear}.{leaf}{expert}",
}
FLAT = {FIRST: "experts.weight1", SECOND: "experts.weight2"}


@dataclass(frozen=True)
class Form:
    """Which of core's ways of writing a model down.

    norms: 'fused' names them after the linears behind them where these are dense, as Transformer Engine does; 'local' names all by
    themselves, as state dicts of the layers without it; 'mapped' names all after linears, as distributed checkpoints of these.
    experts: 'stacked' [E, ...] in one tensor; 'single' (`experts.5.`) each by itself; in state dicts 'each' (`local_experts.5.`),
    'grouped' (`weight5`) or 'flat' (`weight1`, of the older grouped product). halves: gate and up as tensors of their own (`_w`,
    `_v`). parts: each part of a state space mixer's input and convolution as one. zero_centred: gains are stored without their 1
    (`layernorm_zero_centered_gamma`). vocabulary: rows of the padded embedding; None pads nothing. copied: whether a tied head is
    written as well, as by several pipeline stages.
    """

    norms: Literal["fused", "local", "mapped"] = "fused"
    experts: Literal["stacked", "single", "each", "grouped", "flat"] = "stacked"
    halves: bool = False
    parts: bool = True
    zero_centred: bool = False
    vocabulary: int | None = None
    copied: bool = False


def recognised(source: Source, zero_centred: bool = False) -> Form:
    """The form of a checkpoint by its names; that gains are zero-centred, none of them says. Raises ValueError where there is no
    embedding."""
    names = source.names()
    if EMBEDDING not in names:
        raise ValueError(f"There is no '{EMBEDDING}': these are not the weights of a GPTModel of megatron-core.")

    def has(*pieces: str) -> bool:
        return any(all(piece in name for piece in pieces) for name in names)

    experts: Any = "each"
    if has(".experts.experts."):
        experts = "stacked" if has(".experts.experts.linear_fc1.") else "single"
    elif has(".experts.weight1"):
        experts = "flat"
    elif has(".experts.linear_fc1.weight"):
        experts = "grouped"
    layers_with_router = {
        name.removesuffix("mlp.router.weight") for name in names if name.endswith("mlp.router.weight")
    }
    norms: Any = "local"
    if any(f"{layer}mlp.linear_fc1.layer_norm_weight" in names for layer in layers_with_router):
        norms = "mapped"
    elif has(".layer_norm_weight"):
        norms = "fused"
    return Form(
        norms=norms,
        experts=experts,
        halves=has(".linear_fc1.weight_w"),
        parts=has(".in_proj.weight."),
        zero_centred=zero_centred,
        vocabulary=source.meta(EMBEDDING).shape[0],
        copied=OUTPUT in names,
    )


def padded(size: int, multiple: int = 128, ranks: int = 1) -> int:
    """Rows of an embedding of `size` tokens as core pads it (make_vocab_size_divisible_by)."""
    return -(-size // (multiple * ranks)) * multiple * ranks


def rules(model: GPT, form: Form, share: float = 0.0) -> Rules:
    """From core's weights to ours; `.inverse` for the way out. share: of a PKL weight that b takes on import.

    The model may be empty; its layers are not stacked. Raises ValueError that names everything that core has no place for.
    """
    table = _Table(model, form, share)
    table.fill()
    if table.wrong:
        raise ValueError("\n".join(table.wrong))
    return Rules(tuple(table.rules()), dropped=DROPPED)


def mapped(source: Source, model: GPT, form: Form | None = None, share: float = 0.0) -> Mapped:
    """A checkpoint's tensors under our names, planned and checked against the model. Raises Mismatch and ValueError."""
    wanted = {name: tensor.shape for name, tensor in weights(model).items()}
    return Mapped(source, rules(model, form or recognised(source), share), wanted)


def exported(source: Source, model: GPT, form: Form) -> Mapped:
    """A source of our weights under core's names, of the model's sizes. Raises Mismatch and ValueError."""
    return Mapped(source, rules(model, form).inverse)


def interleaved(layout: Layout, groups: int) -> Layout:
    """[q; k; v] as core has it: the queries (and their gates) of each group of heads beside its key and value."""
    sizes = dict(layout.parts)
    assert set(sizes) <= set(ORDER), sizes
    return replace(layout, parts=tuple((name, sizes[name] // groups) for name in ORDER if name in sizes), groups=groups)


@dataclass(frozen=True)
class _Entry:
    """What becomes one weight of ours; `{}` in its names is the number of a layer."""

    theirs: tuple[str, ...]
    ours: str
    step: Step


class _Table:
    """All entries of a model, and what is wrong with it."""

    def __init__(self, model: GPT, form: Form, share: float) -> None:
        self.model, self.form, self.share = model, form, share
        self.layouts = {name: what for name, _, what in declared(model)}
        self.shapes = {name: tensor.shape for name, tensor in weights(model).items()}
        self.found: dict[_Entry, list[tuple[int, int]]] = {}  # with their number of the layer, and ours
        self.covered: set[str] = set()
        self.wrong: list[str] = []
        self.place = (0, 0)

    def add(self, theirs: str | Sequence[str], ours: str, *steps: Step) -> None:
        """Notes an entry, where the model has such a weight."""
        name = ours.format(self.place[1])
        if name not in self.shapes:
            return
        what = self.layouts.get(name)
        if what is not None and what.summed:
            scale = float(self.model.get_submodule(name.rpartition(".")[0]).scale)  # type: ignore[arg-type]
            steps = (*steps, Numbers(scale, self.share))
        step = steps[0] if len(steps) == 1 else Chain(steps)
        entry = _Entry((theirs,) if isinstance(theirs, str) else tuple(theirs), ours, step)
        self.found.setdefault(entry, []).append(self.place)
        self.covered.add(name)

    def layout(self, ours: str) -> Layout | None:
        """Of the weight that multiplies, where the model has one of this name."""
        what = self.layouts.get(ours.format(self.place[1]))
        if what is None:
            return None
        return replace(what.layout, stack=tuple(axis for axis in what.layout.stack if axis != what.summed))

    # The model ---------------------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        blocks: list[Any] = list(self.model.h)
        # A MambaModel counts mixers and networks one by one; a GPTModel counts blocks that have one of each.
        single = any(isinstance(block.attn, Mamba2) or self.network(block) is None for block in blocks)
        number = 0
        for i, block in enumerate(blocks):
            self.place = (number, i)
            self.mixer(block)
            number += single
            if self.network(block) is not None:
                self.place = (number, i)
                self.perceptron(block)
                number += single
            number += not single
        self.place = (0, 0)
        self.ends("decoder.final_norm." if single else "decoder.final_layernorm.")
        if left := [name for name in self.shapes if name not in self.covered]:
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            advice = "; merge adapters first" if any("lora" in name for name in left) else ""
            self.wrong.append(f"megatron-core has no place for {', '.join(left[:8])}{more}{advice}.")

    @staticmethod
    def network(block: Any) -> nn.Module | None:
        return None if getattr(block.mlp, "absent", False) else block.mlp

    def ends(self, final: str) -> None:
        """What is before and after the layers."""
        self.norm(self.model.ln_f, final, "ln_f.")
        self.add("embedding.position_embeddings.weight", "wpe.weight")
        size = self.model.config.vocab_size or 0
        whole = self.form.vocabulary or size
        cut = () if whole <= size else (Cut(-2, size, whole),)  # fewer rows than tokens: the shapes say so later
        if "head.weight" not in self.shapes and self.form.copied:
            self.add((EMBEDDING, OUTPUT), "wte.weight", Agree(2), *cut)
        else:
            self.add(EMBEDDING, "wte.weight", *cut)
        self.add(OUTPUT, "head.weight", *cut)

    def norm(self, module: nn.Module | None, theirs: str, ours: str) -> None:
        own = bool(getattr(module, "offset", 0.0))
        self.add(
            f"{theirs}weight", f"{ours}weight", *(() if own == self.form.zero_centred else (Add(-1.0 if own else 1.0),))
        )
        self.add(f"{theirs}bias", f"{ours}bias")

    def linear(self, theirs: str, ours: str, *steps: Step) -> None:
        for leaf in ("weight", "bias"):
            self.add(f"{theirs}.{leaf}", f"{ours}.{leaf}", *steps)

    def mixer(self, block: Any) -> None:
        mixer = block.attn
        if isinstance(mixer, Mamba2):
            self.state_space(block, mixer)
        elif isinstance(mixer, CausalAttention):
            self.attention(block, mixer)
        else:
            self.wrong.append(
                f"h.{self.place[1]}.attn is a {type(mixer).__name__}, and megatron-core has causal attention and Mamba-2."
            )
            self.covered |= {name for name in self.shapes if name.startswith(f"h.{self.place[1]}.attn.")}

    def attention(self, block: Any, mixer: CausalAttention) -> None:
        at, ours = f"{LAYER}self_attention.", f"{OURS}attn."
        local = self.form.norms == "local"
        self.norm(block.ln_1, f"{LAYER}input_layernorm." if local else f"{at}linear_qkv.layer_norm_", f"{OURS}ln_1.")
        for leaf in ("weight", "bias"):
            layout = self.layout(f"{ours}qkv.{leaf}")
            if layout is not None:
                step = Relayout(interleaved(layout, mixer.kv_heads), layout)
                self.add(f"{at}linear_qkv.{leaf}", f"{ours}qkv.{leaf}", step)
        self.linear(f"{at}linear_proj", f"{ours}proj")
        self.norm(mixer.q_norm, f"{at}q_layernorm.", f"{ours}q_norm.")
        self.norm(mixer.k_norm, f"{at}k_layernorm.", f"{ours}k_norm.")

    def state_space(self, block: Any, mixer: Mamba2) -> None:
        at, ours = f"{LAYER}mixer.", f"{OURS}attn."
        local = self.form.norms == "local"
        self.norm(block.ln_1, f"{LAYER}norm." if local else f"{at}in_proj.layer_norm_", f"{OURS}ln_1.")
        for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias"):
            layout = self.layout(f"{ours}{name}")
            if layout is None:
                continue
            rows, window = (
                self.shapes[f"{ours}{name}".format(self.place[1])][-2:] if name == "conv1d.weight" else (0, 0)
            )
            theirs = [f"{at}{name}.{part}" for part, _ in layout.parts] if self.form.parts else [f"{at}{name}"]
            steps: list[Step] = []
            if self.form.parts:
                steps.append(Join(replace(layout, dim=layout.dim - 1) if rows else layout))
            if rows:
                steps.append(Reshape((rows, 1, window), (rows, window)))
            self.add(theirs, f"{ours}{name}", *steps)
        for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"):
            self.add(f"{at}{name}", f"{ours}{name}")
        groups = getattr(mixer, "norm_groups", 1)
        if mixer.groups != groups:
            self.wrong.append(
                f"h.{self.place[1]}.attn normalises its output in {groups} groups, and megatron-core in as many as share B and C,"
                f" {mixer.groups}."
            )

    def perceptron(self, block: Any) -> None:
        at, ours, inner = f"{LAYER}mlp.", f"{OURS}mlp.", block.mlp
        dense = not isinstance(inner, MoE)
        fused = {"fused": dense, "local": False, "mapped": True}[self.form.norms]
        self.norm(block.ln_2, f"{at}{FIRST}.layer_norm_" if fused else f"{LAYER}pre_mlp_layernorm.", f"{OURS}ln_2.")
        if isinstance(inner, MoE):
            self.add(f"{at}router.weight", f"{ours}router.weight")
            self.add(f"{at}router.expert_bias", f"{ours}balance")
            self.experts(at, f"{ours}{inner.first}", FIRST)
            self.experts(at, f"{ours}down", SECOND)
            if inner.shared is not None:
                self.dense(f"{at}shared_experts.", f"{ours}shared.", inner.shared)
        elif isinstance(inner, (GatedMLP, MLP)):
            self.dense(at, ours, inner)
        else:
            self.wrong.append(f"h.{self.place[1]}.mlp is a {type(inner).__name__}, which megatron-core does not have.")

    def dense(self, at: str, ours: str, inner: nn.Module) -> None:
        first = "gate_up" if isinstance(inner, GatedMLP) else "up"
        for leaf in ("weight", "bias"):
            layout = self.layout(f"{ours}{first}.{leaf}")
            if layout is not None and layout.parts and self.form.halves:
                halves = [f"{at}{FIRST}.{leaf}_{half}" for half in "wv"]
                self.add(halves, f"{ours}{first}.{leaf}", Join(layout))
            else:
                self.add(f"{at}{FIRST}.{leaf}", f"{ours}{first}.{leaf}")
        self.linear(f"{at}{SECOND}", f"{ours}down")

    def experts(self, at: str, ours: str, linear: str) -> None:
        for leaf in ("weight", "bias"):
            layout = self.layout(f"{ours}.{leaf}")
            if layout is None:
                continue
            form, count = self.form.experts, len(layout.stack[-1])
            if form == "flat":
                self.flat(at, f"{ours}.{leaf}", linear, count)
                continue
            if form == "stacked":
                self.add(at + EXPERTS[form].format(linear=linear, leaf=leaf), f"{ours}.{leaf}")
                continue
            names = [EXPERTS[form].replace("{expert}", str(e)).format(linear=linear, leaf=leaf) for e in range(count)]
            steps: list[Step] = []
            if layout.parts and self.form.halves:
                names = [f"{name}_{half}" for name in names for half in "wv"]
                steps = [Batched(2, Join(replace(layout, stack=())))]
            self.add([at + name for name in names], f"{ours}.{leaf}", *steps, Stack(count))

    def flat(self, at: str, ours: str, linear: str, count: int) -> None:
        """The memory of [E, in, out], as a matrix [in, E out] before and [E in, out] after the nonlinearity."""
        name = ours.format(self.place[1])
        if name.endswith("bias"):
            self.wrong.append(f"{name} has no place among experts in one matrix.")
            return
        out, size = self.shapes[name][-2:]
        matrix = (size, count * out) if linear == FIRST else (count * size, out)
        self.add(at + FLAT[linear], ours, Reshape(matrix, (count, size, out)), Permute((0, 2, 1)))

    # Rules -------------------------------------------------------------------------------------------------------------------

    def rules(self) -> list[Rule]:
        """One rule for all layers where they are alike under the same numbers; else one for each."""
        users: dict[str, int] = {}
        for entry in self.found:
            for name in {*entry.theirs, entry.ours}:
                users[name] = users.get(name, 0) + 1
        made = []
        for entry, places in self.found.items():
            names = (*entry.theirs, entry.ours)
            if "{}" in entry.ours and all(a == b for a, b in places) and all(users[name] == 1 for name in names):
                made.append(rule([n.format("*") for n in entry.theirs], entry.ours.format("*"), entry.step))
                continue
            for theirs, ours in places:
                made.append(rule([n.format(theirs) for n in entry.theirs], entry.ours.format(ours), entry.step))
        return made
