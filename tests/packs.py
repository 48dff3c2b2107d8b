"""Runs alone and together, for tests that compare what these leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs

from engine import pack
from engine.data import Corpus
from engine.loop import Run
from engine.pack import Member
from engine.state import Anew, Paused, Stopped
from engine.together import Together
from engine.tracking import Metrics
from train_args import Config

# Widths are multiples of 64, which kernels take without a rest, and of no number of rows: 5 of each run.
WIDE: dict[str, Any] = {
    "model__n_layer": 1, "model__n_head": 4, "model__n_embd": 64, "model__vocab_size": 64, "train__batch_size": 5,
    "train__max_iters": 6, "train__checkpoint_interval": 2,
}  # fmt: skip
NUMBERS: list[dict[str, Any]] = [
    {"optimizer__learning_rate": 0.02, "train__max_iters": 7, "train__grad_clip": 0.1},
    {"train__seed": 3, "optimizer__weight_decay": 0.5, "train__gradient_accumulation_steps": 2},
    {"train__init_seed": 4, "train__max_iters": 5, "schedule__warmup_iters": 3},
    {"train__data_seed": 5, "train__gradient_accumulation_steps": 3, "train__grad_clip": None},
    {"train__seed": 6, "train__grad_clip": 0.5, "train__eval_interval": 3},
]
MOE = {"variant": "moe", "experts": 4, "width": 64}
Changes = Sequence[dict[str, Any]]


def read(root: Path, changes: Changes, **common: Any) -> list[tuple[Config, Corpus]]:
    """Configurations over the corpus below `root`, of widths that are folded exactly."""
    return [runs.read(root, **{**WIDE, **common, **change}) for change in changes]


class Pack:
    """The runs of configurations below a folder, alone and together. `at`: each run stops at its iteration. `judges`: of each run
    where they are together. `made`: the runs in the order in which they were made, some anew."""

    def __init__(self, folder: Path, configs: Sequence[tuple[Config, Corpus]]) -> None:
        self.folder, self.configs = folder, list(configs)
        self.judges: Sequence[pack.Judge | None] = [None] * len(self.configs)
        self.made: list[int] = []
        self.members: dict[int, Member] = {}

    def solo(self, at: Sequence[int | None] | None = None) -> list[str]:
        told = []
        for i, config in enumerate(self.configs):
            run = runs.make(self.folder / f"solo{i}", *config)
            told.append(runs.drive(run, self.stop(run, at[i] if at else None)))
        return told

    def stop(self, run: Run, at: int | None) -> Callable[[], bool]:
        return lambda: run.state.iter == at

    def together(
        self, at: Sequence[int | None] | None = None, mend: Callable[[int, Member], Member] = lambda i, m: m, **how: Any
    ) -> list[str | Exception]:
        place, files, told = dict[Member, int](), dict[int, Metrics](), dict[int, str | Exception]()

        def make(i: int) -> Member:
            run = runs.make(self.folder / f"pack{i}", *self.configs[i])
            tracker: Any = Metrics(run.folder / "metrics.jsonl", keep_to=run.state.iter or None)
            stop = self.stop(run, at[i] if at else None)
            files[i] = tracker
            member = mend(i, Member(run, tracker, lambda state, evaluated: None, stop, self.judges[i]))
            place[member] = i
            self.made.append(i)
            return member

        def ended(member: Member, how: str | Exception) -> None:
            i = place.pop(member)
            files[i].close()
            if not isinstance(how, Anew):
                assert i not in told, "told once"
                told[i] = str(how) if isinstance(how, Paused) else "stopped" if isinstance(how, Stopped) else how
                self.members[i] = member

        how = {"fold": True, "exact": True, **how}
        try:
            pack.train([partial(make, i) for i in range(len(self.configs))], ended, **how)
        finally:
            for file in files.values():
                file.close()
        assert not place and len(told) == len(self.configs)
        return [told[i] for i in range(len(told))]

    def equal(self, some: Sequence[int] | None = None, evaluated: Collection[int] = ()) -> None:
        """Both have left the same. `evaluated`: where the second were evaluated once more."""
        for i in range(len(self.configs)) if some is None else some:
            a, b = self.folder / f"solo{i}", self.folder / f"pack{i}"
            more = [one for one in runs.records(b) if one["kind"] == "eval" and one["iter"] in evaluated]
            kept = [one for one in runs.records(b) if one not in more or one in runs.records(a)]
            assert runs.records(a) == kept, f"records of run {i}"
            assert [one["iter"] for one in more] == sorted(evaluated)
            assert len(list(a.glob("checkpoint/*"))) == len(list(b.glob("checkpoint/*")))
            if (a / "checkpoint").exists():
                assert runs.saved_bytes(a) == runs.saved_bytes(b), f"checkpoint of run {i}"


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs each folded model has that is made from now on."""
    seen: list[int] = []

    class Watched(Together):
        def __init__(self, courses: Any, *rest: Any) -> None:
            seen.append(len(courses))
            super().__init__(courses, *rest)

    monkeypatch.setattr(pack, "Together", Watched)
    return seen
