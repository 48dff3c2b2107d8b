"""Against nanoGPT on tiny Shakespeare: `python bench/vs_nanogpt.py --nanogpt DIR [--only step|loss|quick]`.

DIR is a checkout of nanoGPT, which is read and never changed. The data is data/shakespeare_char/char, prepared before.
  step   one training step of nanoGPT README's CPU configuration, in one process, alternating
  loss   presets/shakespeare_cpu over three seeds: loss on the whole validation split in windows of 64
  quick  presets/quick against nanoGPT's own training as processes, start-up and evaluations included
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import alternate, machine, process_seconds, ratio, seconds, write  # noqa: E402
from engine.data import gather, open_corpus, windows  # noqa: E402
from engine.loop import Run  # noqa: E402
from lab.listing import open_listing  # noqa: E402
from train_args import with_vocabulary  # noqa: E402

BLOCK, BATCH, STEPS = 64, 12, 2000
PRESETS = REPOSITORY / "explorations" / "presets"
README_FLAGS = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", f"--block_size={BLOCK}"),
    *(f"--batch_size={BATCH}", "--n_layer=4", "--n_head=4", "--n_embd=128", f"--max_iters={STEPS}"),
    *(f"--lr_decay_iters={STEPS}", "--dropout=0.0"),
]


def peer_module(folder: Path) -> Any:
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_step(folder: Path, tokens: Path) -> Callable[[], None]:
    """One iteration as nanoGPT's train.py does it on a CPU: batch, forward, backward, clip, AdamW."""
    peer = peer_module(folder)
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": BLOCK, "vocab_size": 65}
    model = peer.GPT(peer.GPTConfig(**sizes, bias=False, dropout=0.0))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step() -> None:
        data = np.memmap(tokens, dtype=np.uint16, mode="r")  # reopened each time, as the peer does
        starts = torch.randint(len(data) - BLOCK, (BATCH,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(data[i + k : i + k + BLOCK].astype(np.int64)) for i in starts])
            for k in (0, 1)
        )
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def our_step(folder: Path) -> Callable[[], None]:
    listing = open_listing(PRESETS / "shakespeare_cpu.yaml", [])
    config, corpus = listing.runs[0].config, open_corpus("shakespeare_char", "char")
    run = Run(with_vocabulary(config, corpus.meta.vocab_size), corpus, folder, torch.device("cpu"))

    def step() -> None:
        run.update()
        run.flush()

    return step


def compare_steps(nanogpt: Path, rounds: int, block: int) -> dict[str, Any]:
    """Blocks of steps, alternating; the ratio of each pair of blocks."""
    corpus = open_corpus("shakespeare_char", "char")
    with tempfile.TemporaryDirectory() as folder:
        steps = {"nanogpt": peer_step(nanogpt, corpus.folder / "train.bin"), "slicewise": our_step(Path(folder))}
        for step in steps.values():
            seconds(lambda s=step: [s() for _ in range(block)])  # type: ignore[misc]
        sides = {name: (lambda s=step: seconds(lambda: [s() for _ in range(block)])) for name, step in steps.items()}
        times = alternate(sides, rounds)
    milliseconds = {name: round(1000 * statistics.median(t) / block, 3) for name, t in times.items()}
    return {"step_ms_median": milliseconds, "step_ratio": ratio(times["slicewise"], times["nanogpt"])}


def run_ours(preset: str, root: Path, *words: str) -> dict[str, Any]:
    """Trains a preset as a process; its result."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(PRESETS / f"{preset}.yaml")]
    process_seconds([*command, f"runner.root={root}", "tracking.wandb.mode=off", *words])
    found: list[Path] = sorted(root.glob("*/*/result.json"), key=lambda p: p.stat().st_mtime)
    return dict(json.loads(found[-1].read_text()))


def losses(preset: str, seeds: int) -> dict[str, Any]:
    """The preset's loss on the whole validation split, over seeds."""
    with tempfile.TemporaryDirectory() as folder:
        results = [run_ours(preset, Path(folder), f"train.seed={1337 + i}") for i in range(seeds)]
    values = [round(r["val_loss"], 4) for r in results]
    return {
        "full_val_loss": values,
        "mean": round(statistics.mean(values), 4),
        "seconds": [r["seconds"] for r in results],
    }


def peer_copy(nanogpt: Path, folder: Path) -> Path:
    """nanoGPT in a folder of its own, with the data where it looks for it."""
    copy, corpus = folder / "nanogpt", open_corpus("shakespeare_char", "char")
    shutil.copytree(nanogpt, copy, ignore=shutil.ignore_patterns(".git"))
    place = copy / "data" / "shakespeare_char"
    for split in ("train", "val"):
        shutil.copy(corpus.folder / f"{split}.bin", place / f"{split}.bin")
    (place / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": corpus.meta.vocab_size}))  # the peer's own format
    return copy


def peer_words(*extra: str) -> list[str]:
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", *README_FLAGS, *extra]


@torch.no_grad()
def peer_loss(copy: Path) -> float:
    """The loss of nanoGPT's final checkpoint on the whole validation split in windows of 64."""
    process_seconds(peer_words("--always_save_checkpoint=True", "--out_dir=out-final"), cwd=copy)
    saved = torch.load(copy / "out-final" / "ckpt.pt", weights_only=True)
    peer = peer_module(copy)
    model = peer.GPT(peer.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    tokens = open_corpus("shakespeare_char", "char").val
    starts = windows(tokens, block_size=BLOCK, count=None, seed=0)
    total = 0.0
    for first in range(0, len(starts), 64):
        x, y = gather(tokens, starts[first : first + 64], BLOCK)
        total += model(x, y)[1].item() * len(x)
    return total / len(starts)


def compare_quick(nanogpt: Path, rounds: int) -> dict[str, Any]:
    """Whole processes: nanoGPT's README command against presets/quick, alternating."""
    values: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = peer_copy(nanogpt, folder)

        def quick() -> float:
            root = folder / f"quick{len(values)}"
            taken = seconds(
                lambda: values.append(run_ours("quick", root, f"train.seed={1337 + len(values)}")["val_loss"])
            )
            return taken

        times = alternate({"nanogpt": lambda: process_seconds(peer_words(), cwd=copy), "quick": quick}, rounds)
        final = peer_loss(copy)
    return {
        "wall_seconds": {name: [round(x, 2) for x in t] for name, t in times.items()},
        "wall_ratio": ratio(times["quick"], times["nanogpt"]),
        "quick_full_val_loss": [round(v, 4) for v in values],
        "nanogpt_full_val_loss": round(final, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--only", choices=("step", "loss", "quick"), help="one part")
    parser.add_argument("--rounds", type=int, default=20, help="alternating blocks of steps")
    parser.add_argument("--block", type=int, default=40, help="steps in a block")
    parser.add_argument("--processes", type=int, default=3, help="alternating runs of whole processes")
    given = parser.parse_args()
    print(machine())
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: compare_steps(given.nanogpt, given.rounds, given.block),
        "loss": lambda: losses("shakespeare_cpu", 3),
        "quick": lambda: compare_quick(given.nanogpt, given.processes),
    }
    for part, measure in parts.items():
        if given.only in (None, part):
            figures = measure()
            print(json.dumps(figures, indent=2))
            print(write(f"vs_nanogpt_{part}", figures))


if __name__ == "__main__":
    main()
