"""What named slices cost: `python bench/slices.py [--only step|optimizer|table|lora] [--device cuda] [--quick]`.

step       a training step of a 10M-parameter model with six rules against none, two runs in one process, alternating
optimizer  the optimizer's step alone on the same gradients, for adamw and muon
table      six rules resolved for 24 layers of 64 experts
lora       forward and backward of adapters on q and v of a fused qkv against separate linears with adapters
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import alternate, machine, ratio, seconds, write  # noqa: E402
from core.addresses import spelled  # noqa: E402
from core.options import Reader  # noqa: E402
from core.resolve import Resolver  # noqa: E402
from core.rules import SliceRule  # noqa: E402
from core.slices import Declaration, Layout, Slice  # noqa: E402
from engine.corpus import ByteTokenizer, write_corpus  # noqa: E402
from engine.device import pick, synchronise  # noqa: E402
from engine.loop import Run  # noqa: E402
from engine.optim import Optimizers  # noqa: E402
from gpt_conf import ModelConfig  # noqa: E402
from lab.listing import open_listing  # noqa: E402
from model import assemble, fill  # noqa: E402
from train_args import with_vocabulary  # noqa: E402
from variations import CATALOGUE  # noqa: E402
from variations.init.distributions import ONES, ZEROS  # noqa: E402

RULES: dict[str, Any] = {
    "calm_keys": {"match": "h.*.attn.qkv[k]", "lr_scale": 0.3, "weight_decay": 0.0},
    "values": {"match": "h.*.attn.qkv[v]", "lr_scale": 1.5},
    "deep": {"match": "h.**", "lr_scale": {"depth": [1.0, 0.3]}},
    "gates": {"match": ["h.*.mlp.up", "h.*.moe.gate_up[gate]"], "optional": True, "lr_scale": 2.0},
    "written": {"match": ["h.*.attn.proj", "h.*.*.down"], "weight_decay": 0.05},
    "norms": {"match": ["h.*.ln_*", "ln_f"], "learning_rate": 3e-4},
}
# Without the rule by depth, which gives each layer a learning rate of its own and so makes many groups.
LEVEL = {name: rule for name, rule in RULES.items() if name != "deep"}
LEVEL["queries"] = {"match": "h.*.attn.qkv[q]", "lr_scale": 0.5}
RANK, ALPHA = 8, 16.0


@dataclass(frozen=True)
class Sizes:
    """How large and how often. `block`: steps of a block of the alternation."""

    model: dict[str, int]
    batch: int
    rounds: int
    block: int
    updates: int
    tokens: tuple[int, int]
    widths: tuple[int, ...]


FULL = Sizes({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 4, 20, 3, 20, (128, 64), (384, 768))
QUICK = Sizes({"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}, 4, 3, 2, 2, (4, 8), (64,))


def told(times: Mapping[str, list[float]], ours: str, theirs: str, count: int) -> dict[str, Any]:
    """Milliseconds of each side, and their ratio."""
    each = {name: round(1000 * statistics.median(t) / count, 3) for name, t in times.items()}
    return {"ms_median": each, "ratio": ratio(times[ours], times[theirs])}


def compared(acts: Mapping[str, Callable[[], object]], rounds: int, count: int, device: torch.device) -> dict[str, Any]:
    """Blocks of `count` calls of each of two sides, alternating; the first side against the second."""

    def block(act: Callable[[], object]) -> float:
        def some() -> None:
            for _ in range(count):
                act()
            synchronise(device)

        synchronise(device)
        return seconds(some)

    for act in acts.values():
        block(act)
    ours, theirs = acts
    return told(alternate({name: partial(block, act) for name, act in acts.items()}, rounds), ours, theirs, count)


# Steps ------------------------------------------------------------------------------------------------------------------------


def runs(root: Path, sizes: Sizes, batch: int, device: torch.device) -> dict[str, Run]:
    """Two runs over random bytes, with rules and without."""
    ids = np.random.default_rng(0).integers(0, 256, 200_000).astype("<u2")
    chunks = [("train", ids[:190_000]), ("val", ids[190_000:])]
    write_corpus(root / "noise" / "byte", chunks, dataset="noise", tokenizer=ByteTokenizer(), source="Random bytes.")
    made = {}
    for name, rules in (("rules", RULES), ("none", {})):
        tree = {
            "model": sizes.model,
            "data": {"dataset": "noise", "root": str(root)},
            "train": {"max_iters": 100_000, "batch_size": batch, "device": str(device)},
            "slices": rules,
            "tracking": {"wandb": {"mode": "off"}},
        }
        file = root / f"{name}.yaml"
        file.write_text(json.dumps(tree))
        listing = open_listing(file, [])
        corpus = listing.reader.corpus(listing.runs[0].config.data)
        config = with_vocabulary(listing.runs[0].config, corpus.meta.vocab_size)
        made[name] = Run(config, corpus, root / name, device)
    return made


def compare_steps(sizes: Sizes, batch: int, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        made = runs(Path(folder), sizes, batch, device)

        def step(run: Run) -> None:
            run.update()
            if device.type == "cpu":  # elsewhere losses are read where they are logged
                run.flush()

        figures = compared({n: partial(step, run) for n, run in made.items()}, sizes.rounds, sizes.block, device)
    parameters = made["none"].result()["parameters"]
    return {"parameters": parameters, "batch": batch, **figures}


def optimizers(name: str, rules: Mapping[str, Any], sizes: Sizes, device: torch.device) -> Optimizers:
    """The optimizers of a model with random gradients, the same for any rules."""
    reader = Reader(CATALOGUE)
    config = reader.read(ModelConfig, {**sizes.model, "vocab_size": 256})
    optimizer = reader.variant("optimizer", {"variant": name, "learning_rate": 1e-4}, ())
    assert config is not None and optimizer is not None
    model, rows = assemble(config, {n: reader.read(SliceRule, rule) for n, rule in rules.items()}, optimizer)
    fill(model, rows, 0, device)
    made, draw = Optimizers(model, rows), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(device) * 1e-3
    return made


def compare_optimizers(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    figures = {}
    for name, updates in (("adamw", sizes.updates), ("muon", max(1, sizes.updates // 10))):
        for what, rules in (("", RULES), (", no rule by depth", LEVEL)):
            sides = {n: optimizers(name, r, sizes, device) for n, r in (("rules", rules), ("none", {}))}
            acts = {n: partial(side.step, 1.0) for n, side in sides.items()}
            made = compared(acts, sizes.rounds, updates, device)
            groups = {n: sum(len(m.groups) for m in side.members.values()) for n, side in sides.items()}
            figures[f"{name}{what}"] = {**made, "groups": groups}
    return figures


# The table ----------------------------------------------------------------------------------------------------------------------


def experts(layers: int, count: int, width: int = 64) -> list[Slice]:
    """The slices of a model of experts, by hand: attention, norms, and a stack of gated experts in each layer."""
    stack = (tuple(str(i) for i in range(count)),)
    shapes: dict[str, tuple[tuple[int, ...], Declaration]] = {}

    def add(
        name: str, shape: tuple[int, ...], role: str, parts: tuple[tuple[str, int], ...] = (), **about: Any
    ) -> None:
        layout = Layout(parts, dim=-2 if role != "vector" else -1, **about)
        shapes[name] = (shape, Declaration(layout, role, ONES if role == "vector" else ZEROS))

    add("wte.weight", (256, width), "embedding")
    for i in range(layers):
        add(f"h.{i}.ln_1.weight", (width,), "vector")
        add(f"h.{i}.attn.qkv.weight", (3 * width, width), "matrix", (("q", width), ("k", width), ("v", width)))
        add(f"h.{i}.attn.proj.weight", (width, width), "matrix")
        add(f"h.{i}.ln_2.weight", (width,), "vector")
        parts = (("gate", 2 * width), ("up", 2 * width))
        add(f"h.{i}.moe.gate_up.weight", (count, 4 * width, width), "matrix", parts, stack=stack)
        add(f"h.{i}.moe.down.weight", (count, width, 2 * width), "matrix", stack=stack)
    add("ln_f.weight", (width,), "vector")
    return [
        Slice(spelled(name, labels)[2], name, labels, what.layout.shape(shape, labels), what)
        for name, (shape, what) in shapes.items()
        for labels in what.layout.labels()
    ]


def resolve_table(quick: bool) -> dict[str, Any]:
    layers, count = (3, 4) if quick else (24, 64)
    listed, reader = experts(layers, count), Reader(CATALOGUE)
    rules = {name: reader.read(SliceRule, rule) for name, rule in RULES.items()}
    optimizer = reader.variant("optimizer", {"variant": "muon"}, ())
    assert optimizer is not None and not reader.mistakes
    times = [seconds(lambda: Resolver(listed, CATALOGUE).resolve(rules, optimizer)) for _ in range(5)]
    spread = {"first": times[0], "median": statistics.median(times), "max": max(times)}
    return {"layers": layers, "experts": count, "slices": len(listed), "rules": len(rules),
            "seconds": {name: round(t, 4) for name, t in spread.items()}}  # fmt: skip


# Adapters -------------------------------------------------------------------------------------------------------------------------


class Separate(nn.Module):
    """q, k and v as linears of their own, LoRA on q and v; the base does not train."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width, bias).requires_grad_(False) for _ in "qkv")
        self.a = nn.ParameterList(nn.Parameter(torch.randn(RANK, width) / width**0.5) for _ in "qv")
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(width, RANK)) for _ in "qv")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (linear(x) for linear in self.linears)
        added = [(ALPHA / RANK) * F.linear(F.linear(x, a), b) for a, b in zip(self.a, self.b, strict=True)]
        return q + added[0], k, v + added[1]


class Fused(nn.Module):
    """The same as the model has it: one qkv with adapters on two of its parts."""

    def __init__(self, width: int, bias: bool, device: torch.device) -> None:
        super().__init__()
        reader = Reader(CATALOGUE)
        config = reader.read(ModelConfig, {"n_layer": 1, "n_head": width // 64, "n_embd": width, "bias": bias,
                                           "block_size": 8, "vocab_size": 8})  # fmt: skip
        lora = {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": RANK, "alpha": ALPHA}}
        rules = {"adapt": reader.read(SliceRule, lora), "base": reader.read(SliceRule, {"match": "**", "frozen": True})}
        optimizer = reader.variant("optimizer", {"variant": "adamw"}, ())
        assert config is not None and optimizer is not None
        model, rows = assemble(config, rules, optimizer)
        fill(model, rows, 0, device)
        Optimizers(model, rows)  # says which parameters have gradients
        self.qkv: nn.Module = model.get_submodule("h.0.attn.qkv")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y: Tensor = self.qkv(x)
        return y.chunk(3, dim=-1)


def compare_lora(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    figures = {}
    for width in sizes.widths:
        for bias in (False, True):
            sides = {"fused": Fused(width, bias, device), "separate": Separate(width, bias).to(device)}
            x = torch.randn(*sizes.tokens, width, device=device, requires_grad=True)
            gradient = tuple(torch.randn(*sizes.tokens, width, device=device) for _ in "qkv")

            def step(side: nn.Module, x: Tensor = x, gradient: tuple[Tensor, ...] = gradient) -> None:
                x.grad = None
                side.zero_grad()
                torch.autograd.backward(side(x), gradient)

            acts = {n: partial(step, side) for n, side in sides.items()}
            name = f"n_embd {width}, {'with' if bias else 'without'} bias"
            figures[name] = compared(acts, sizes.rounds, sizes.block, device)
    return {"tokens": sizes.tokens, "rank": RANK, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("step", "optimizer", "table", "lora"), help="one part, in a file of its own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--batch", type=int, help="windows of 256 tokens in a training step")
    parser.add_argument("--rounds", type=int, help="alternating blocks")
    parser.add_argument("--quick", action="store_true", help="see in seconds that it works; nothing is written")
    given = parser.parse_args()
    print(machine())
    device = pick(given.device)
    made = QUICK if given.quick else FULL
    sizes = Sizes(**{**vars(made), "rounds": given.rounds or made.rounds})
    batch = given.batch or (sizes.batch if device.type == "cpu" or given.quick else 64)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: compare_steps(sizes, batch, device),
        "optimizer": lambda: compare_optimizers(sizes, device),
        "table": lambda: resolve_table(given.quick),
        "lora": lambda: compare_lora(sizes, device),
    }
    figures: dict[str, Any] = {"device": str(device)}
    for part, measure in parts.items():
        if given.only in (None, part):
            figures[part] = measure()
            print(json.dumps({part: figures[part]}, indent=2))
    if not given.quick:
        print(write(f"slices_{given.only}" if given.only else "slices", figures))


if __name__ == "__main__":
    main()
