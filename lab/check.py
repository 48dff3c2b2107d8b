"""`python -m lab check FILE`: builds every distinct model of a file, runs two steps, and says what it costs and what differs.

Nothing is written into the folder of the sweep.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.options import plain
from lab.likeness import Case, differences
from lab.plan import Slot, slots
from lab.process import cores
from lab.reporting.numbers import duration, magnitude, many, short

ABOUT = "build every model of a file, run two steps, and say what differs"
MOST = 64  # models that are measured unless all are asked for
PROFILES = 64  # cells with one graph whose initial values are looked at
START = 2.0  # seconds in which a process begins and imports torch
NAMED = 8  # cells of a broken model that are named
HEADS = ("model", "cells", "parameters", "trained", "FLOPs/token", "memory", "a step", "a run", "at a time")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a YAML file, as for train.py --config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, in Hydra's grammar")
    parser.add_argument("--all", action="store_true", help=f"every model, also where there are more than {MOST}")
    parser.add_argument("--json", action="store_true", help="as JSON")


def act(given: argparse.Namespace) -> int:
    """Returns 1 where a model is broken. Raises ConfigError with every mistake in the file."""
    from lab.listing import open_listing

    listing = open_listing(given.file, given.overrides)
    checked = Check(listing, math.inf if given.all else MOST)
    checked.measure()
    print(json.dumps(checked.as_json(), indent=2) if given.json else "\n".join(checked.told()), flush=True)
    return 1 if any(model.error for model in checked.models) else 0


@dataclass
class Model:
    """Runs that share a graph. `cost` is what lab/measure.py found for the first, empty where it broke with `error`."""

    runs: list[Any]
    cost: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    traceback: str = ""

    @property
    def cells(self) -> list[str]:
        return list(dict.fromkeys(run.cell for run in self.runs))

    @property
    def fits(self) -> int:
        """How many runs at a time the device's memory holds."""
        return int(self.cost["free_memory_bytes"] // max(1, self.cost["process_memory_bytes"]))


class Check:
    """The distinct models of a listing, of which at most `most` are measured."""

    def __init__(self, listing: Any, most: float) -> None:
        from lab.packing import key

        self.listing = listing
        alike: dict[str, Model] = {}
        for run in listing.runs:
            alike.setdefault(key(run.config, listing.content(run)), Model([])).runs.append(run)
        every = list(alike.values())
        self.models = every[: int(min(most, len(every)))]
        self.left = every[len(self.models) :]
        self.cases: list[Case] = []
        self.unseen = 0  # cells whose profile was not made
        self.slots: list[Slot] = []

    def measure(self) -> None:
        """Measures every model, each in a process of its own. Raises ValueError for devices that are not there."""
        from lab import runner
        from lab.measure import apart

        config = self.listing.runs[0].config
        found = apart(lambda: runner.devices(config))  # a process that has asked CUDA cannot be forked
        if "made" not in found:
            raise ValueError(found["error"])
        runners, count = config.runner, len(self.listing.runs)
        each = (runners.per_device, runners.threads, cores(), count, runners.devices_per_trial)
        self.slots = slots(found["made"], *each)
        for i, model in enumerate(self.models):
            if sys.stderr.isatty():
                print(
                    f"\r\x1b[K{i + 1}/{len(self.models)} {short(model.cells[0], 60)}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
            self._one(model)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _one(self, model: Model) -> None:
        from lab import measure

        first, slot = self._ready(model.runs[0]), self.slots[0]
        corpus = self.listing.reader.corpus(first.data)
        device = slot.device.partition(",")[0]
        found = measure.apart(lambda: measure.measure(first, corpus, device, slot.threads))
        if "made" not in found:
            model.error, model.traceback = found["error"], found["traceback"]
            return
        model.cost = found["made"]
        cells = {run.cell: run for run in reversed(model.runs)}
        alike: dict[str, list[Any]] = {}
        for run in reversed(cells.values()):
            alike.setdefault(_treatment(run.config), []).append(run)
        some = [self._ready(runs[0]) for runs in alike.values()][:PROFILES]
        profiles = measure.apart(lambda: measure.profiles(some)).get("made", [])
        for i, runs in enumerate(alike.values()):
            made = profiles[i] if i < len(profiles) else None
            if made is None:
                self.unseen += len(runs)
                continue
            for run in runs:
                changed = {k: v for k, v in plain(run.changed).items() if k != "train.seed"}
                self.cases.append(Case(run.cell, changed, run.baseline, made))

    def _ready(self, run: Any) -> Any:
        from train_args import with_vocabulary

        return with_vocabulary(run.config, self.listing.reader.corpus(run.config.data).meta.vocab_size)

    # Time -------------------------------------------------------------------------------------------------------------------

    def seconds(self, model: Model, run: Any) -> float:
        """A run's training and evaluations, without the start of a process."""
        config, cost = run.config, model.cost
        train, total = config.train, config.iterations
        times = total // train.eval_interval + 1  # the one before the first update too
        batches = times * self._batches(config, train.eval_iters)
        if total % train.eval_interval or train.final_eval_iters:
            batches += self._batches(config, train.final_eval_iters or train.eval_iters)
        steps: float = total * cost["seconds_per_step"]
        return steps + batches * float(cost["seconds_per_evaluation_batch"])

    def _batches(self, config: Any, iters: int | str) -> int:
        if iters != "full":
            return int(iters)
        tokens = len(self.listing.reader.corpus(config.data).val)
        return math.ceil((tokens - 1) // config.model.block_size / config.train.eval_batch_size)

    def total(self) -> float | None:
        """Seconds of what is left of the sweep, packed as it would be, trial after trial in the next free slot. None where models
        were not measured."""
        from engine.rehearsal import small
        from lab import packing, runner
        from variations import CATALOGUE

        if self.left or any(model.error for model in self.models):
            return None
        model_of = {run.hash: model for model in self.models for run in model.runs}

        def most(run: Any) -> int:
            return packing.fitting(model_of[run.hash].cost["parameters"], runner.memory(), len(self.slots))

        def is_small(run: Any) -> bool:
            return small(run.config, model_of[run.hash].cost["parameters"])

        pending, settings = self.listing.pending(), self.listing.runs[0].config.runner
        how, warm = packing.wanted(settings, self.slots), settings.warm
        trials = packing.groups(pending, how, self.slots, self.listing.content, CATALOGUE, most, is_small)
        ends = [START if warm else 0.0] * len(self.slots)
        for trial in trials:
            seconds = sum(self.seconds(model_of[run.hash], run) for run in trial)
            heapq.heapreplace(ends, ends[0] + seconds + (0.0 if warm else START))
        return max(ends) if trials else 0.0

    # Telling ----------------------------------------------------------------------------------------------------------------

    def differences(self) -> list[str]:
        """In what cells differ beyond what was asked."""
        places = {run.cell: i for i, run in reversed(list(enumerate(self.listing.runs)))}
        return differences(sorted(self.cases, key=lambda case: places[case.cell]))

    def notes(self) -> Iterator[str]:
        """What was left out, and the estimate of the whole."""
        if self.left:
            cells = sum(len(model.cells) for model in self.left)
            yield f"Left out: {many(len(self.left), 'model')} of {many(cells, 'cell')}. --all measures them too."
        if self.unseen:
            yield f"Initial values were not compared in {many(self.unseen, 'cell')}, for time."
        if self.listing.expansion.sweep.search is not None:
            yield "What a search will choose is not known yet and not in this."
        total, pending = self.total(), len(self.listing.pending())
        if not pending:
            yield "Every run has ended, so there is nothing left to do."
        elif total is not None:
            place = f"{many(len(self.slots), 'slot')} ({self.slots[0].device}, {many(self.slots[0].threads, 'thread')} each)"
            folded = " Packs on a GPU take less." if "cuda" in self.slots[0].device else ""
            yield f"An estimate: {many(pending, 'run')} on {place} take about {duration(total)}.{folded}"

    def told(self) -> Iterator[str]:
        """The table and the sentences."""
        measured = [model for model in self.models if not model.error]
        if measured:
            yield from _table([HEADS, *(self._line(model) for model in measured)])
            yield ""
        for model in self.models:
            if model.error:
                yield f"broken: {_named(model.cells)}: {model.error}"
        yield from self.differences() or (["No cell differs beyond what was asked."] if len(self.cases) > 1 else [])
        yield from self.notes()

    def _line(self, model: Model) -> tuple[str, ...]:
        cost = model.cost
        trained = (
            "all" if cost["trainable_parameters"] == cost["parameters"] else magnitude(cost["trainable_parameters"])
        )
        longest = max(self.seconds(model, run) for run in model.runs)
        return (
            short(model.cells[0], 48),
            f"{len(model.cells):,}",
            magnitude(cost["parameters"]),
            trained,
            magnitude(cost["flops_per_token"]),
            f"{cost['peak_memory_bytes'] / 2**20:,.0f} MiB",
            _step(cost["seconds_per_step"]),
            duration(longest),
            f"fits {model.fits:,}",
        )

    def as_json(self) -> dict[str, Any]:
        """All of it. Times in seconds, memory in bytes."""
        models = [
            {
                "cells": model.cells,
                "runs": len(model.runs),
                "error": model.error or None,
                "traceback": model.traceback or None,
                **model.cost,
                **({"fits": model.fits, "seconds": self.seconds(model, model.runs[0])} if model.cost else {}),
            }
            for model in self.models
        ]
        return {
            "models": models,
            "left_out": len(self.left),
            "differences": self.differences(),
            "notes": list(self.notes()),
            "seconds": self.total(),
            "slots": [{"device": slot.device, "threads": slot.threads} for slot in self.slots],
        }


def _treatment(config: Any) -> str:
    """Equal for cells whose profile is: the model, its initial values and optimizers; rates do not matter."""

    def without(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: without(v) for k, v in node.items() if k not in ("learning_rate", "lr_scale", "betas")}
        return [without(x) for x in node] if isinstance(node, (list, tuple)) else node

    parts = [plain(config.model), {name: plain(rule) for name, rule in config.slices.items()}, plain(config.optimizer)]
    return json.dumps(without(parts), sort_keys=True, default=str)


def _step(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else duration(seconds)


def _named(cells: Sequence[str]) -> str:
    more = f" and {many(len(cells) - NAMED, 'more cell')}" if len(cells) > NAMED else ""
    return ", ".join(f"'{short(cell, 60)}'" for cell in cells[:NAMED]) + more


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
