"""What a stack of experts costs: `python bench/grouped.py [--only layer|linear] [--device cuda] [--quick]`.

layer   forward and backward of the MLP 'moe' against the usual loop over experts with weights of their own, with one router
linear  of its first linear map alone, grouped, against a product for each expert, and against one batched product of padded groups
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import alternate, machine, ratio, seconds, write  # noqa: E402
from core.options import Reader  # noqa: E402
from core.slices import initialise, materialise  # noqa: E402
from engine.device import autocast, claim, pick, synchronise  # noqa: E402
from gpt_conf import ModelConfig  # noqa: E402
from variations import CATALOGUE  # noqa: E402
from variations.grouped import grouped_linear  # noqa: E402
from variations.site import Site  # noqa: E402

Shape = tuple[int, int, int, int]  # experts, n_embd, width of an expert, tokens
TOP_K = 2
QUICK: list[Shape] = [(8, 32, 64, 128), (64, 32, 32, 128)]
CPU: list[Shape] = [(8, 64, 128, 768), (8, 128, 256, 2048), (64, 64, 64, 768), (64, 128, 128, 2048)]
CUDA: list[Shape] = [(8, 1024, 2816, 16384), (64, 1024, 512, 16384)]


class Usual(nn.Module):
    """Gated experts with weights of their own, one after another: its tokens are looked for, its outputs added to theirs."""

    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.router = moe.router
        self.gate_up = nn.ParameterList(nn.Parameter(w.clone()) for w in moe.gate_up.weight.detach())
        self.down = nn.ParameterList(nn.Parameter(w.clone()) for w in moe.down.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scores, chosen = self.router(tokens).softmax(-1).topk(TOP_K)
        scores = scores / scores.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for e, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            rows, place = torch.where(chosen == e)
            gate, up = F.linear(tokens[rows], gate_up).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, down) * scores[rows, place, None]
            out.index_add_(0, rows, y.to(out.dtype))
        return out.view_as(x)


def experts(shape: Shape, device: torch.device) -> Any:
    """The MLP, with the load that its initial values give."""
    count, width, inner, _ = shape
    tree = {"n_embd": width, "n_head": 1, "vocab_size": 8, "bias": False, "activation": "silu"}
    node = {"variant": "moe", "experts": count, "top_k": TOP_K, "width": inner}
    config = Reader(CATALOGUE).read(ModelConfig, {**tree, "mlp": node})
    made = Site(config, CATALOGUE).make("mlp", "mlp")
    materialise(made, device)
    initialise(made, 0)
    return made


def compared(acts: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each side, and the ratio of the first to each other, alternating."""

    def once(act: Callable[[], object]) -> float:
        def whole() -> None:
            act()
            synchronise(device)

        synchronise(device)
        return seconds(whole)

    for act in acts.values():
        once(act)
    times = alternate({name: partial(once, act) for name, act in acts.items()}, rounds)
    ours, *others = acts
    each = {name: round(1000 * statistics.median(t), 3) for name, t in times.items()}
    return {"ms_median": each, **{f"ratio to {other}": ratio(times[ours], times[other]) for other in others}}


def compare_layer(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    moe = experts(shape, device)
    sides: dict[str, nn.Module] = {"moe": moe, "usual loop": Usual(moe).to(device)}
    x = torch.randn(8, shape[3] // 8, shape[1], device=device, requires_grad=True)
    gradient = torch.randn(x.shape, device=device)

    def step(side: nn.Module) -> None:
        x.grad = None
        side.zero_grad()
        with autocast(device, "bfloat16" if device.type == "cuda" else "float32"):
            y = side(x)
        y.backward(gradient.to(y.dtype))

    return compared({name: partial(step, side) for name, side in sides.items()}, rounds, device)


def each_alone(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.cat([F.linear(*pair) for pair in zip(x.split(counts.tolist()), weight.unbind(0), strict=True)])


def padded(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Every group filled up to the largest."""
    most, index = int(counts.max()), torch.arange(len(x), device=x.device)
    group = torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=len(x))
    place = group * most + index - (counts.cumsum(0) - counts)[group]
    full = x.new_zeros(len(counts) * most, x.shape[1]).index_copy(0, place, x)
    return torch.bmm(full.view(len(counts), most, -1), weight.mT).flatten(0, 1)[place]


def compare_linear(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    moe, tokens = experts(shape, device), shape[3]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = moe.gate_up.weight.detach().to(dtype).requires_grad_()
    chosen = moe.router(torch.randn(tokens, shape[1], device=device)).topk(TOP_K).indices
    counts = torch.bincount(chosen.flatten(), minlength=shape[0])
    x = torch.randn(tokens * TOP_K, shape[1], device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(len(x), weight.shape[1], device=device, dtype=dtype)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "grouped": lambda x, weight, counts: grouped_linear(x, weight, None, counts),
        "a product each": each_alone,
        "padded": padded,
    }

    def step(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        x.grad = weight.grad = None
        way(x, weight, counts).backward(gradient)

    return compared({name: partial(step, way) for name, way in ways.items()}, rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("layer", "linear"), help="one part, in a file of its own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, help="alternating calls of each side")
    parser.add_argument("--quick", action="store_true", help="see in seconds that it works; nothing is written")
    given = parser.parse_args()
    print(machine())
    device = pick(given.device)
    claim(device)
    shapes = QUICK if given.quick else CUDA if device.type == "cuda" else CPU
    rounds = given.rounds or (3 if given.quick else 20)
    figures: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads(), "top_k": TOP_K}
    for part, measure in {"layer": compare_layer, "linear": compare_linear}.items():
        if given.only in (None, part):
            figures[part] = {
                "experts {}, n_embd {}, width {}, tokens {}".format(*shape): measure(shape, rounds, device)
                for shape in shapes
            }
            print(json.dumps({part: figures[part]}, indent=2))
    if not given.quick:
        print(write(f"grouped_{given.only}" if given.only else "grouped", figures))


if __name__ == "__main__":
    main()
