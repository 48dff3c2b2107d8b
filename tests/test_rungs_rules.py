"""Early stopping: the rules against the papers' algorithms by hand, and the judge that asks files."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from conftest import Desk

from lab.rungs import FileJudge, caveats, promotable, promote, promotions, recorded, rungs, worse_than_median
from lab.searching import Stop

Table = dict[str, tuple[float, ...]]
HALVING, MEDIAN = Stop("halving", 1, 2), Stop("median", 10)
NAN = math.nan


# The rules ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "length", "wanted"),
    [
        (Stop("halving", 100, 3), 1000, (100, 300, 900)),
        (Stop("halving", 100, 3), 900, (100, 300)),
        (Stop("halving", 100, 3), 100, ()),
        (Stop("halving", 1, 2), 9, (1, 2, 4, 8)),
        (Stop("median", 100), 301, (100, 200, 300)),
        (Stop("median", 100), 100, ()),
    ],
)
def test_the_rungs_of_a_run(stop: Stop, length: int, wanted: tuple[int, ...]) -> None:
    assert rungs(stop, length) == wanted


def test_one_in_eta_passes_a_rung() -> None:
    values = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0, "e": 2.0, "f": NAN, "g": math.inf}
    assert promotable(values, 3) == ["b", "c"], "two of seven; of equal ones the first by name"
    assert promotable(values, 3, mode="max") == ["d", "a"]
    assert promotable(values, 8) == [] and promotable(values, 8, last=True) == ["b"]
    assert promotable({"f": NAN, "g": -math.inf}, 2) == [] and promotable({"f": NAN}, 2, last=True) == []
    assert promotable({}, 2, last=True) == []
    assert promotable({"f": NAN, "a": 9.0}, 2) == ["a"], "what is not finite is worst, and counts"


def test_the_median_of_four_others_or_more() -> None:
    assert not worse_than_median(9.0, [1.0, 2.0, 3.0])
    assert worse_than_median(2.6, [1.0, 2.0, 3.0, 4.0]) and not worse_than_median(2.5, [1.0, 2.0, 3.0, 4.0])
    assert worse_than_median(2.4, [1.0, 2.0, 3.0, 4.0], mode="max") and not worse_than_median(
        2.5, [1.0, 2.0, 3.0, 4.0], mode="max"
    )
    assert worse_than_median(NAN, [1.0, 2.0, 3.0, 4.0]) and not worse_than_median(9.0, [1.0, 2.0, NAN, math.inf, NAN])
    assert not worse_than_median(NAN, [NAN] * 4), "nothing is worse than what all are"


# The judge against the algorithm of the paper --------------------------------------------------------------------------------

# Losses of eight configurations at 1, 2, 4 and at the end, 8 iterations.
TABLE: Table = {
    "a": (8, 7, 3, 1), "b": (5, 6, 6, 6), "c": (7, 5, 5, 5), "d": (1, 4, 2, 4),
    "e": (2, 1, 4, 2), "f": (6, 8, 7, 7), "g": (3, 3, 1, 3), "h": (4, 2, 8, 8),
}  # fmt: skip


def by_hand(table: Table, eta: int) -> list[tuple[str, int]]:
    """Algorithm 2 of the paper with one worker: the jobs (configuration, rung) in their order, until new ones have run out."""
    top = len(next(iter(table.values()))) - 1
    told: list[dict[str, float]] = [{} for _ in range(top + 1)]
    promoted: list[set[str]] = [set() for _ in range(top + 1)]
    fresh = list(table)
    jobs: list[tuple[str, int]] = []
    while True:
        for k in range(top - 1, -1, -1):
            candidates = sorted(told[k], key=lambda c: (told[k][c], c))[: len(told[k]) // eta]
            able = [c for c in candidates if c not in promoted[k]]
            if able:
                promoted[k].add(able[0])
                job = (able[0], k + 1)
                break
        else:
            if not fresh:
                return jobs
            job = (fresh.pop(0), 0)
        jobs.append(job)
        told[job[1]][job[0]] = table[job[0]][job[1]]


def by_judge(folder: Path, table: Table, stop: Stop) -> tuple[list[tuple[str, int]], set[str]]:
    """The same with the judge: one runner that continues what may go on before it begins anything new. Also who is left paused."""
    length = stop.min_iters * stop.eta ** (len(next(iter(table.values()))) - 1)
    fresh, at = list(table), dict.fromkeys(table, 0)
    jobs: list[tuple[str, int]] = []
    paused: list[str] = []
    while True:
        able = promotions(folder, paused, stop)
        if able:
            run = able[0]
            paused.remove(run)
            promote(folder, run)
        elif fresh:
            run = fresh.pop(0)
        else:
            return jobs, set(paused)
        judge = FileJudge(folder, run, stop, length)
        for rung in judge.rungs[max(0, at[run] - 1) :]:  # one that was paused comes to its rung again
            told = judge.rungs.index(rung)
            if told >= at[run]:
                jobs.append((run, told))
                at[run] += 1
            judge.record(rung, table[run][told])
            if judge.verdict(rung) == "pause":
                paused.append(run)
                break
        else:
            jobs.append((run, len(judge.rungs)))


def test_halving_is_the_algorithm_of_the_paper_on_a_table(tmp_path: Path) -> None:
    jobs, paused = by_judge(tmp_path, TABLE, HALVING)
    assert jobs == by_hand(TABLE, 2)
    assert jobs == [
        ("a", 0), ("b", 0), ("b", 1), ("c", 0), ("d", 0), ("d", 1), ("d", 2), ("e", 0), ("e", 1), ("e", 2), ("d", 3),
        ("f", 0), ("g", 0), ("g", 1), ("g", 2), ("g", 3), ("h", 0), ("h", 1), ("h", 2),
    ]  # fmt: skip
    assert paused == set(TABLE) - {"d", "g"}


@pytest.mark.parametrize("eta", [2, 3])
def test_halving_is_the_algorithm_of_the_paper_on_any_table(tmp_path: Path, eta: int) -> None:
    for seed in range(12):
        chance = random.Random(seed)
        names = [f"run-{i}" for i in range(chance.randint(1, 14))]
        table = {name: tuple(chance.randint(0, 20) + 0.0 for _ in range(3)) for name in names}
        (folder := tmp_path / str(seed)).mkdir()
        jobs, _ = by_judge(folder, table, Stop("halving", 5, eta))
        assert jobs == by_hand(table, eta), table


def test_when_nothing_else_is_left_the_best_passes_every_rung(tmp_path: Path) -> None:
    """Two runs with eta three: neither would ever pass."""
    stop = Stop("halving", 10, 3)
    for name, loss in (("a", 2.0), ("b", 1.0)):
        judge = FileJudge(tmp_path, name, stop, 100)
        judge.record(10, loss)
        assert judge.verdict(10) == "pause"
    assert promotions(tmp_path, ["a", "b"], stop) == []
    assert promotions(tmp_path, ["a", "b"], stop, last=True) == ["b"]
    promote(tmp_path, "b")
    judge = FileJudge(tmp_path, "b", stop, 100)
    assert judge.verdict(10) == "go"
    judge.record(30, 1.0)
    assert judge.verdict(30) == "pause" and promotions(tmp_path, ["a", "b"], stop, last=True) == ["b"]
    promote(tmp_path, "b")
    assert promotions(tmp_path, ["a"], stop, last=True) == [], "the rest is pruned"


# Files ----------------------------------------------------------------------------------------------------------------------


def test_what_passed_a_rung_passes_it_again(tmp_path: Path) -> None:
    """A run that is killed past a rung comes to it once more, when others may have done better."""
    first = FileJudge(tmp_path, "first", HALVING, 8)
    FileJudge(tmp_path, "second", HALVING, 8).record(1, 5.0)
    first.record(1, 4.0)
    assert first.verdict(1) == "go"
    for i in range(4):
        FileJudge(tmp_path, f"better-{i}", HALVING, 8).record(1, 1.0)
    assert FileJudge(tmp_path, "second", HALVING, 8).verdict(1) == "pause"
    again = FileJudge(tmp_path, "first", HALVING, 8)
    again.record(1, 4.0)
    assert again.verdict(1) == "go"
    assert set(recorded(tmp_path, 1)) == {"first", "second", *(f"better-{i}" for i in range(4))}


def test_the_last_rungs_and_the_best_go_first(tmp_path: Path) -> None:
    for name, losses in {"a": [1.0, 5.0], "b": [2.0, 4.0], "c": [3.0], "d": [4.0], "e": [5.0], "f": [6.0]}.items():
        for rung, loss in zip((1, 2), losses, strict=False):
            FileJudge(tmp_path, name, HALVING, 8).record(rung, loss)
    assert promotions(tmp_path, "fedcba", HALVING) == ["b", "c"], "of rung 1 the best three: a, b and c"
    assert promotions(tmp_path, ["c", "d"], HALVING, mode="max") == ["d"], "f, e and d, of which d waits"
    promote(tmp_path, "d")
    assert promotions(tmp_path, "fedcba", HALVING) == ["b", "c", "d"], "one that was let through and not started yet"
    assert promotions(tmp_path, [], HALVING) == [] and promotions(tmp_path, ["elsewhere"], HALVING) == []
    assert promotions(tmp_path, "fedcba", MEDIAN) == [], "nobody waits under the median rule"


def test_what_is_not_finite_never_passes_and_what_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    for name, loss in (("a", NAN), ("b", math.inf)):
        judge = FileJudge(tmp_path, name, HALVING, 8)
        judge.record(1, loss)
        assert judge.verdict(1) == "pause"
    assert promotions(tmp_path, ["a", "b"], HALVING, last=True) == []
    folder = tmp_path / "rungs" / "1"
    (folder / "half").write_text("0.5 0.")
    (folder / ".c-123").write_text("0.1 0.1 0.1")
    (tmp_path / "rungs" / "notes").write_text("not a rung")
    assert set(recorded(tmp_path, 1)) == {"a", "b"}
    assert recorded(tmp_path, 7) == {} and promotions(tmp_path, ["a"], HALVING) == []


def test_the_judge_of_the_median(tmp_path: Path) -> None:
    """Means of the others at 20: 4.0, 3.0, 2.0, 1.5; their median is 2.5."""
    for name, losses in {"a": (5.0, 3.0), "b": (3.0, 3.0), "c": (3.0, 1.0), "d": (2.0, 1.0)}.items():
        judge = FileJudge(tmp_path, name, MEDIAN, 30)
        for rung, loss in zip(judge.rungs, losses, strict=True):
            judge.record(rung, loss)
            judge.record(rung, loss)
            assert judge.verdict(rung) == "go", "there are not four others yet"
    assert [round(recorded(tmp_path, 20)[name].mean, 9) for name in "abcd"] == [4.0, 3.0, 2.0, 1.5]
    for name, losses, wanted in (("e", (2.4, 9.0), "go"), ("f", (9.0, 2.6), "prune")):
        judge = FileJudge(tmp_path, name, MEDIAN, 30)
        judge.record(10, losses[0])
        judge.record(20, losses[1])
        assert judge.verdict(20) == wanted, "its best counts, not its last"
        for rung in judge.rungs:
            (tmp_path / "rungs" / str(rung) / name).unlink()
    judge = FileJudge(tmp_path, "e", MEDIAN, 30, mode="max")
    judge.record(10, 2.6)
    judge.record(20, NAN)
    assert judge.verdict(20) == "go"
    judge.record(10, 2.4)
    judge.record(20, 2.4)
    assert judge.verdict(20) == "prune"


# What is said ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_that_stops_early_says_what_that_means(desk: Desk) -> None:
    def said(schedule: str, words: str = "seeds: 2, ") -> list[str]:
        text = f"train: {{max_iters: 100}}\nschedule: {schedule}\nsweep: {{{words}stop: {{method: halving, min_iters: 10}}}}"
        listing = desk.listed(text)
        return caveats(listing.expansion.sweep.stop, [run.config for run in listing.runs])

    first, seeds, annealed = said("cosine")
    assert "from iteration 10 on" in first and seeds.startswith("Seeds take part") and "annealed" in annealed
    assert said("constant", "") == [first]
    assert said("{variant: wsd, decay_iters: 5, decay_start: 0}", "grid: {train.batch_size: [1, 2]}, ") == [first]
    assert caveats(None, []) == []
