"""Stacked layers against separate ones: time of a step and of the optimizer, of compilation, and of decoding a token.

python bench/stacks.py [--quick] [--device cpu|cuda] [--only step|compile|decode]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import alternate, ratio, seconds, write
from core.options import Reader
from engine.device import claim
from engine.optim import Optimizers
from gpt_conf import ModelConfig
from model import GPT, assemble, fill
from train_args import Config
from variations import CATALOGUE
from variations.cache import Cache

SIZES = {"n_embd": 256, "n_head": 8, "block_size": 128, "vocab_size": 256, "bias": False}
SMALL = {"n_embd": 64, "n_head": 4, "block_size": 32, "vocab_size": 65, "bias": False}


def made(stacked: bool, layers: int, device: str, sizes: dict[str, Any]) -> tuple[GPT, Optimizers]:
    config = Reader(CATALOGUE).read(ModelConfig, {**sizes, "n_layer": layers, "stack_layers": stacked})
    optimizer = Reader(CATALOGUE).read(Config, {}).optimizer
    model, rows = assemble(config, {}, optimizer)
    fill(model, rows, 1, device)
    return model, Optimizers(model, rows)


def batch(model: GPT, rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    assert model.config.vocab_size is not None
    x = torch.randint(model.config.vocab_size, (rows, model.config.block_size + 1), device=device)
    return x[:, :-1], x[:, 1:]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def steps(layers: int, rows: int, device: str, sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A whole training step, and the optimizer's part of it alone."""
    both = {name: made(stacked, layers, device, sizes) for name, stacked in (("stacked", True), ("separate", False))}
    whole: dict[str, Callable[[], float]] = {}
    alone: dict[str, Callable[[], float]] = {}
    for name, (model, optimizers) in both.items():
        x, y = batch(model, rows, device)

        def step(model: GPT = model, optimizers: Optimizers = optimizers, x: Any = x, y: Any = y) -> None:
            optimizers.zero_grad()
            model(x, y)[1].backward()  # type: ignore[union-attr]
            optimizers.norms(lambda p: p.grad)
            optimizers.step(1.0)
            wait(device)

        def update(optimizers: Optimizers = optimizers) -> None:
            for _ in range(5):
                optimizers.step(1e-6)
            wait(device)

        step()
        whole[name] = lambda step=step: seconds(step)  # type: ignore[misc]
        alone[name] = lambda update=update: seconds(update)  # type: ignore[misc]
    told: dict[str, Any] = {}
    for what, sides in (("step", whole), ("optimizer", alone)):
        times = alternate(sides, rounds)
        median = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
        told[what] = {"ratio": ratio(times["stacked"], times["separate"]), "seconds": median}
    return told


def decoding(layers: int, device: str, sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A token after another with a cache."""
    sides: dict[str, Callable[[], float]] = {}
    for name, stacked in (("stacked", True), ("separate", False)):
        model = made(stacked, layers, device, sizes)[0].eval()
        x, _ = batch(model, 1, device)

        @torch.no_grad()
        def tokens(model: GPT = model, x: Any = x) -> None:
            cache = Cache()
            for i in range(x.shape[1]):
                model(x[:, i : i + 1], cache=cache)
            wait(device)

        tokens()
        sides[name] = lambda tokens=tokens: seconds(tokens)  # type: ignore[misc]
    times = alternate(sides, rounds)
    return {"ratio": ratio(times["stacked"], times["separate"]), "tokens": sizes["block_size"]}


def compile_once(layers: int, stacked: bool, device: str, sizes: dict[str, Any]) -> None:
    """Prints the seconds of the first compiled forward and backward pass. A process of its own, with an empty cache."""
    model, _ = made(stacked, layers, device, sizes)
    x, y = batch(model, 2, device)
    warm = torch.compile(lambda t: (t * 2).sum())
    warm(torch.ones(4, device=device, requires_grad=True)).backward()  # the compiler's own start
    compiled = model.compiled()
    start = time.perf_counter()
    compiled(x, y)[1].backward()
    wait(device)
    print(time.perf_counter() - start)


def compiling(device: str, rounds: int, deep: int) -> dict[str, Any]:
    def side(layers: int, stacked: bool) -> Callable[[], float]:
        def run() -> float:
            words = [sys.executable, __file__, "--compile-once", str(layers), str(int(stacked)), "--device", device]
            with tempfile.TemporaryDirectory() as cache:
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
            return float(done.stdout.split()[-1])

        return run

    sides = {"deep": side(deep, True), "shallow": side(2, True), "deep_separate": side(deep, False)}
    times = alternate(sides, rounds)
    return {
        "layers": [deep, 2],
        "stacked_deep_to_shallow": ratio(times["deep"], times["shallow"]),
        "separate_deep_to_stacked_shallow": ratio(times["deep_separate"], times["shallow"]),
        "seconds": {k: [round(t, 2) for t in v] for k, v in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run that writes nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("step", "compile", "decode"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile-once", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile_once:
        compile_once(given.compile_once[0], bool(given.compile_once[1]), given.device, SMALL)
        return
    rounds, layers, sizes = (2, 3, SMALL) if given.quick else (given.rounds, 12, SIZES)
    told: dict[str, Any] = {}
    claim(torch.device(given.device))
    if given.only in (None, "step"):
        for rows in (2,) if given.quick else (4, 16):
            told[f"training, {rows * sizes['block_size']} tokens a step"] = steps(
                layers, rows, given.device, sizes, rounds
            )
    if given.only in (None, "decode"):
        told["decoding"] = decoding(layers, given.device, sizes, rounds)
    if given.only in (None, "compile"):
        told["compiling"] = compiling(given.device, 1 if given.quick else 3, 3 if given.quick else 24)
    print(told)
    if not given.quick:
        print(write("stacks" if given.only is None else f"stacks_{given.only}", told))


if __name__ == "__main__":
    main()
