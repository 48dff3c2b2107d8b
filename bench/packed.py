"""Runs trained together: `python bench/packed.py [--device cuda] [--only gpu|adapters|loop|processes] [--rounds N] [--quick]`.

gpu        tokens a second of packs against runs one after another, the best way to train one alone, and concurrent processes
adapters   16 and 64 LoRA adapters of two ranks over one frozen model, together against one after another
loop       a pack's loop on a CPU against the same runs one after another
processes  16 runs of a second each through the command line on a CPU, a process each against one pack

Tokens are random. With --quick and no GPU, `gpu` runs on the CPU, where nothing is captured; its figures mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import (  # noqa: E402
    Pool,
    Side,
    Silent,
    Size,
    alternate,
    best,
    configs,
    course,
    freed,
    kept,
    machine,
    member,
    on_end,
    peaks,
    process_seconds,
    random_corpus,
    ratio,
    seconds,
    serve,
    shown,
    tried,
    write,
)
from engine import pack  # noqa: E402
from engine.course import Course  # noqa: E402
from engine.device import Replay, autocast, claim, pick  # noqa: E402
from engine.loop import Run  # noqa: E402
from engine.together import Together  # noqa: E402

COMMAND = "python bench/packed.py --device cuda"
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
MOST = 64  # runs of a pack
PROCESSES = (2, 4, 8, 16)
WAYS = ("eager", "compiled", "graph", "compiled graph")  # to train one run
POOLED = ("eager", "graph")  # those that processes go; to compile in each would take minutes
PARTS = ("gpu", "adapters", "loop", "processes")
HOW = (
    "The ceiling is the time of a token in the other's steps over the larger of flops / matmul peak (in the precision of the "
    "forward pass) and bytes / copy peak. flops: GPT.flops_per_token. bytes: what autograd keeps of a plain model for its "
    "backward pass, written and read once, and 32 a parameter: weight, gradient and two moments in float32, each read and "
    "written once. Runs share neither, so it is the same for any number. A compiler that computes again what it does not keep "
    "may move fewer bytes."
)
GPU = {
    "0.1M parameters, 2,048 tokens": Size(2, 4, 64, 64, 32),
    "0.8M parameters, 1,024 tokens": Size(4, 4, 128, 64, 16),
    "0.8M parameters, 4,096 tokens": Size(4, 4, 128, 64, 64),
    "10M parameters, 16,384 tokens": Size(6, 6, 384, 256, 64),
}
QUICK = Size(1, 2, 32, 16, 20)
# A number, or None for half of the ceiling. Beside these a pack is never to be slower than 0.98 of the best way to train one.
TARGETS: dict[str, dict[str, float | None]] = {
    "0.1M parameters, 2,048 tokens": {"A1": 30.0, "A2": 6.0, "B": 5.0},
    "0.8M parameters, 1,024 tokens": {"A1": None, "A2": None},
    "0.8M parameters, 4,096 tokens": {"A1": None, "A2": None},
    "10M parameters, 16,384 tokens": {"A2": 1.0},
}
NEVER_BELOW = 0.98
# Of the small presets' batch.
LOOP = {"0.1M parameters": Size(2, 4, 64, 64, 12), "0.8M parameters": Size(4, 4, 128, 64, 12)}


# Runs ------------------------------------------------------------------------------------------------------------------------


def tree(root: Path, size: Size, device: torch.device, **train: Any) -> dict[str, Any]:
    """A configuration for a YAML file; `train` is what differs in that section."""
    model = {
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_embd": size.width,
        "block_size": size.block,
        "bias": False,
    }
    usual = {"max_iters": 1_000_000, "eval_interval": 1_000_000, "batch_size": size.batch}
    return {
        "model": model,
        "data": {"dataset": "random", "root": str(root)},
        "train": {**usual, "device": device.type, "dtype": DTYPES[device.type], **train},
        "optimizer": {"variant": "adamw", "learning_rate": 1e-3},
        "tracking": {"wandb": {"mode": "off"}},
    }


def swept(count: int) -> dict[str, Any]:
    return {"grid": {"optimizer.learning_rate": [round(1e-4 * (i + 1), 5) for i in range(count)]}}


def together(courses: Sequence[Course], period: float) -> tuple[Together, Side]:
    """Those of the courses that can be folded, from the first on. Raises ValueError where these are fewer than two."""
    some = pack.together(courses)
    if not some:
        raise ValueError("so many rows cannot be told from the model's own sizes, nor can fewer")
    made, run, every = Together(some, exact=False), some[0].run, range(len(some))
    return made, Side(len(some) * run.config.tokens_per_iter, lambda: made.update(every), run.device, period)


# One run alone ---------------------------------------------------------------------------------------------------------------


class Whole:
    """A run's plain model, whose whole step, finding its batch and torch's fused AdamW included, is one CUDA graph."""

    def __init__(self, run: Run, compiled: bool) -> None:
        self.run, self.i, self.options = run, 0, run.config.optimizer.options
        device, train = run.device, run.config.train
        self.net: Any = torch.compile(run.plain) if compiled else run.plain
        self.rate = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(
            run.plain.parameters(),
            lr=self.rate,
            betas=self.options.betas,
            eps=self.options.eps,
            weight_decay=self.options.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.tokens = torch.from_numpy(run.corpus.train.astype(np.int32)).to(device)
        self.starts = torch.zeros(train.batch_size, dtype=torch.int64, device=device)
        self.places = torch.arange(run.config.model.block_size + 1, device=device)
        self.replay = Replay(self.compute, device)

    def compute(self) -> None:
        train = self.run.config.train
        self.optimizer.zero_grad(set_to_none=True)
        found = self.tokens[self.starts[:, None] + self.places].long()
        with autocast(self.run.device, train.dtype):
            _, loss = self.net(found[:, :-1], found[:, 1:])
        loss.backward()
        if train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.run.plain.parameters(), train.grad_clip)
        self.optimizer.step()

    def step(self) -> None:
        self.starts.copy_(torch.from_numpy(self.run.batches.starts(self.i)), non_blocking=True)
        self.rate.fill_(self.options.learning_rate * self.run.schedule.multiplier(self.i))
        self.replay()
        self.i += 1


def alone(way: str, root: Path, size: Size, device: torch.device, period: float) -> Side:
    """A way to train one run, of WAYS."""
    (config, *_), data = configs(tree(root, size, device))
    compiled = way.startswith("compiled")
    if way.endswith("graph"):
        return Side(size.tokens, Whole(Run(config, data, Path("nowhere"), device), compiled).step, device, period)
    return Side(size.tokens, course(config, data, device, compiled).alone, device, period)


# Parts -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What every part is given."""

    device: torch.device
    rounds: int
    quick: bool
    root: Path
    peaks: dict[str, float]

    @property
    def period(self) -> float:
        return 0.05 if self.quick else 0.5

    def gpu(self) -> dict[str, Any]:
        if self.device.type != "cuda" and not self.quick:
            return {"missing": f"These figures are missing because no CUDA device was at hand. `{COMMAND}` makes them."}
        torch._dynamo.config.automatic_dynamic_shapes = False  # each side would be compiled in a process of its own
        words = ["--worker", str(self.root), "--device", str(self.device), "--period", str(self.period)]
        pool = Pool(2 if self.quick else PROCESSES[-1], [sys.executable, __file__, *words])
        made: dict[str, Any] = {"dtype": DTYPES[self.device.type], "how": HOW}
        try:
            for name, size in {"quick": QUICK}.items() if self.quick else GPU.items():
                told, started = made.setdefault(name, {}), time.perf_counter()
                try:
                    self.size(name, size, pool, told)
                except Exception as error:  # what other sizes give is kept
                    traceback.print_exc()
                    told["failed"] = shown(error)
                told["seconds"] = round(time.perf_counter() - started)
                freed()
                print(json.dumps({name: told}, indent=2), flush=True)
        finally:
            pool.close()
        return made

    def size(self, name: str, size: Size, pool: Pool, told: dict[str, Any]) -> None:
        """The best of each kind, found one by one, and then these alternating."""
        torch._dynamo.reset()
        rates = told.setdefault("tokens_per_second", {})
        solo = {way: alone(way, self.root, size, self.device, self.period) for way in WAYS}
        rates["alone"] = tried({way: side.rate for way, side in solo.items()})
        everyone = len(pool.workers)
        pool.ask(everyone, size=asdict(size))
        many = {f"{n} {way}": partial(pool.rate, way, n) for way in POOLED for n in PROCESSES if n <= everyone}
        rates["processes"] = tried(many)
        pool.ask(everyone, size=asdict(size))  # lets them give back their memory
        every, data = configs(tree(self.root, size, self.device) | {"sweep": swept(4 if self.quick else MOST)})
        courses = [course(config, data, self.device) for config in every]
        told["floor_seconds_per_token"] = floor = self.floor(courses[0].run)
        rates["packs"] = self.table(courses)
        told["knee"] = count = pack.knee(courses)
        freed()
        packs = {"eager, alone": solo["eager"]}
        if count > 1:
            own = [course(config, data, self.device, compiled=True) for config in every[:count]]
            packs = {"graph": together(courses[:count], self.period)[1]}
            packs["compiled graph"] = together(own, self.period)[1]
        rates["at the knee"] = tried({way: side.rate for way, side in packs.items()})
        sides: dict[str, Callable[[], float]] = {"A1": solo["eager"], "A2": solo[best(rates["alone"])]}
        both = many[best(rates["processes"])]
        sides |= {"B": lambda: 1 / both(), "C": packs[best(rates["at the knee"])]}
        both()  # they are made again
        told.update(verdict(name, alternate(sides, self.rounds), max(floor.values())))

    def table(self, courses: Sequence[Course]) -> dict[str, Any]:
        """Tokens a second by number of runs."""
        made: dict[str, Any] = {}
        count = 2
        while count <= len(courses):
            try:
                packed, side = together(courses[:count], self.period)
                made[str(packed.count)] = round(side.rate())
                packed.leave()
            except (RuntimeError, ValueError) as error:
                made[str(count)] = shown(error)
            packed = side = None  # type: ignore[assignment]
            freed()
            count *= 2
        return made

    def floor(self, run: Run) -> dict[str, float]:
        """Seconds that a token takes at least, by arithmetic and by memory."""
        flops = run.plain.flops_per_token() / self.peaks[f"{run.config.train.dtype}_tflops"] / 1e12
        parameters = sum(p.numel() for p in run.plain.parameters())
        moved = 2 * kept(run) + 32 * parameters
        return {"flops": flops, "bytes": moved / run.config.tokens_per_iter / self.peaks["copy_gb_per_second"] / 1e9}

    def adapters(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        size = QUICK if self.quick else Size(4, 4, 128, 64, 20) if cuda else Size(2, 4, 64, 16, 20)
        made: dict[str, Any] = {"tokens_of_a_step": size.tokens}
        for count in (4,) if self.quick else (16, 64):
            content = tree(self.root, size, self.device, init_seed=1)  # one base for all
            content["slices"] = {"base": {"match": "**", "frozen": True}}
            content["slices"]["adapt"] = {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 4, "alpha": 8}}
            sweep = swept(count // 2)
            sweep["grid"] = {"slices.adapt.lora.rank": [4, 8], **sweep["grid"]}
            every, data = configs(content | {"sweep": sweep})
            one, other = (course(config, data, self.device) for config in (every[0], every[-1]))  # of both ranks
            turns = Side(2 * size.tokens, lambda a=one, b=other: (a.alone(), b.alone()), self.device, self.period)  # type: ignore[misc]
            packed, side = together([course(config, data, self.device) for config in every], self.period)
            times = alternate({"together": side, "one after another": turns}, self.rounds)
            made[f"{count} adapters"] = {
                "folded": packed.count,
                "times_as_fast": ratio(times["one after another"], times["together"]),
                "tokens_per_second": {side: round(1 / statistics.median(t)) for side, t in times.items()},
            }
        return made

    def loop(self) -> dict[str, Any]:
        cpu, made = torch.device("cpu"), dict[str, Any]()
        claim(cpu)
        for name, size in {"quick": QUICK}.items() if self.quick else LOOP.items():
            iters = 4 if self.quick else 100 if size.width < 128 else 30
            often = {"max_iters": iters, "eval_interval": min(50, iters // 2), "eval_batch_size": 12}
            every, data = configs(tree(self.root, size, cpu, **often) | {"sweep": swept(4)})

            def side(act: Callable[[list[Run]], object], every: Any = every, data: Any = data) -> float:
                with tempfile.TemporaryDirectory(dir=self.root) as folder:
                    places = [Path(folder) / str(i) for i in range(len(every))]
                    made = [Run(config, data, place, cpu) for config, place in zip(every, places, strict=True)]
                    return seconds(lambda: act(made))

            sides = {"pack": partial(side, in_turns), "alone": partial(side, one_by_one)}
            times = alternate(sides, self.rounds)
            told = ratio(times["pack"], times["alone"])
            told |= {"target": 1.02, "reached": told["median"] <= 1.02}
            median = {side: round(statistics.median(t), 3) for side, t in times.items()}
            made[name] = {"ratio": told, "seconds": median, "iterations": iters}
        return made

    def processes(self) -> dict[str, Any]:
        """Whole commands: one slot with all cores for both."""
        size, cpu = LOOP["0.1M parameters"], torch.device("cpu")
        count, iters = (2, 2) if self.quick else (16, 100)
        file = self.root / "processes.yaml"
        often = {"max_iters": iters, "eval_interval": iters, "eval_batch_size": 12}
        file.write_text(json.dumps(tree(self.root, size, cpu, **often) | {"sweep": swept(count)}))

        def side(packed: str) -> float:
            with tempfile.TemporaryDirectory(dir=self.root) as folder:
                options = {"root": folder, "pack": packed, "per_device": 1, "devices": "cpu"}
                words = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(file)]
                taken = process_seconds([*words, *(f"runner.{k}={v}" for k, v in options.items())], cwd=folder)
                results = [json.loads(path.read_text()) for path in Path(folder).glob("*/*/result.json")]
                assert [r["status"] for r in results] == ["done"] * count, results
                training.append(statistics.median(r["seconds"] for r in results))
            return taken

        training: list[float] = []
        sides = {"pack": partial(side, str(count)), "processes": partial(side, "off")}
        times = alternate(sides, 1 if self.quick else min(self.rounds, 2))
        wall = {name: [round(t, 2) for t in each] for name, each in times.items()}
        told = {"runs": count, "seconds_of_a_run": round(statistics.median(training), 2), "wall_seconds": wall}
        return {**told, "times_as_fast": ratio(times["processes"], times["pack"])}


def verdict(name: str, times: Mapping[str, Sequence[float]], floor: float) -> dict[str, Any]:
    """How many times as fast as each other a pack is, with ceilings and targets beside it; `floor` seconds of a token."""
    made: dict[str, Any] = {}
    for other in ("A1", "A2", "B"):
        made[f"C/{other}"] = told = dict[str, Any](ratio(times[other], times["C"]))
        told["ceiling"] = round(statistics.median(times[other]) / floor, 2)
        if other in TARGETS.get(name, {}):
            told["target"] = TARGETS[name][other] or round(told["ceiling"] / 2, 2)
            told["reached"] = told["median"] >= told["target"]
    made["never_below_best_solo"] = {"target": NEVER_BELOW, "reached": made["C/A2"]["median"] >= NEVER_BELOW}
    return made


def in_turns(runs: list[Run]) -> None:
    pack.train([partial(member, run) for run in runs], on_end, fold=False)


def one_by_one(runs: list[Run]) -> None:
    for run in runs:
        on_end(member(run), run.run(Silent(), lambda state, evaluated: None, lambda: False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part, in a file of its own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; loop and processes are about the CPU")
    parser.add_argument("--rounds", type=int, help="alternating calls of each side")
    parser.add_argument("--quick", action="store_true", help="see in a minute that it works; nothing is written")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--period", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = pick(given.device)
    if given.worker:
        claim(device)
        serve(lambda size, way: alone(way, given.worker, size, device, given.period))
        return
    print(machine())
    claim(device)
    found = peaks(device, given.quick)
    print(json.dumps(found))
    figures: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads(), "peaks": found}
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(device, given.rounds or (2 if given.quick else 6), given.quick, Path(root), found)
        random_corpus(bench.root, 200_000)
        for part in PARTS if given.only is None else (given.only,):
            taken = seconds(lambda part=part: figures.update({part: getattr(bench, part)()}))  # type: ignore[misc]
            print(json.dumps({part: figures[part], "seconds": round(taken)}, indent=2), flush=True)
    if not given.quick:
        print(write(f"packed_{given.only}" if given.only else "packed", figures))


if __name__ == "__main__":
    main()
