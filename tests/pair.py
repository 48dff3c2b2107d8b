"""Runs trained by the processes that torchrun would start, several in each pair of processes: `python pair.py DATA FOLDER CASES`.

The first process leaves in FOLDER/CASE what `keep` watches of a run, and metrics.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import runs
import torch
from safetensors.torch import save_file

from core.weights import weights
from engine.course import Member
from engine.loop import Run
from engine.ranks import Ranks, join
from engine.state import Paused
from engine.tracking import Metrics
from lab.listing import open_listing
from lab.process import leave
from lab.several import train
from train_args import with_vocabulary


def keep(run: Run) -> dict[str, torch.Tensor]:
    """The gradients of the first update as the optimizers find them, and once that was made the weights at first."""
    kept = {f"before/{name}": t.clone() for name, t in weights(run.plain).items()}
    step = run.step

    def spy() -> None:
        if run.state.iter == 0:
            found = run.plain.named_parameters()
            kept.update({f"gradient/{name}": p.grad.clone() for name, p in found if p.grad is not None})
        step()

    run.step = spy  # type: ignore[method-assign]
    return kept


def main(data: str, folder: str, cases: str) -> None:
    torch.set_num_threads(1)
    ranks = join()
    for name, changes in json.loads(cases).items():
        place = Path(folder) / name
        file = runs.write(place / f"of-{ranks.rank}.yaml", runs.tree(Path(data), **changes))
        listing = open_listing(file, [])
        corpus = listing.reader.corpus(listing.runs[0].config.data)
        config = with_vocabulary(listing.runs[0].config, corpus.meta.vocab_size)
        run = Run(config, corpus, place, torch.device("cpu"), ranks)
        kept = keep(run)
        tracker: Any = runs.Silent() if ranks.rank else Metrics(place / "metrics.jsonl")
        judge = Judge() if name == "rungs" and not ranks.rank else None
        how = train(ranks, Member(run, tracker, lambda state, evaluated: None, lambda: False, judge))
        if isinstance(how, Exception) and not isinstance(how, Paused):
            raise how
        ranks.alike(run.state.iter, run.optimizers.state().values())  # also what moves the weights
        if not ranks.rank:
            kept |= {f"after/{n}": t.clone() for n, t in weights(run.plain).items()}
            save_file(kept, place / "kept.safetensors")
            (place / "how").write_text(how if isinstance(how, str) else type(how).__name__)
    lacking(ranks)
    try:
        ranks.alike(7, [torch.ones(3), torch.tensor([ranks.rank == 1])])
    except RuntimeError as error:
        assert "process 2: iteration 7, checksum" in str(error)
    else:
        raise AssertionError("one process has another value")


class Judge:
    """Lets a run go on at one rung, and pause at the next."""

    rungs = (2, 5)

    def record(self, iteration: int, loss: float) -> None: ...

    def verdict(self, iteration: int) -> str:
        return "go" if iteration == 2 else "pause"


def lacking(ranks: Ranks) -> None:
    """Sums of gradients of which one process, or each, has none."""
    large = 2**18 + 3
    every = [torch.nn.Parameter(torch.zeros(n)) for n in (3, large, 2, large, 5)]
    for here in ([0, 1, 2, 3], [0, 1], [0, 1, 2, 3]):
        for i, p in enumerate(every):
            there = i in here if ranks.rank else i < 2
            p.grad = torch.full_like(p, ranks.rank + 1.0) if there else None
        loss = ranks.reduce(every, torch.tensor(ranks.rank + 0.25))
        assert loss.shape == () and loss.item() == 1.5
        sums = [None if p.grad is None else p.grad.unique().tolist() for p in every]
        assert sums == [[3.0], [3.0], *([[2.0], [2.0]] if len(here) == 4 else [None, None]), None], sums


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)  # as trials do: taking apart what gloo's threads still use ends some processes with an abort
