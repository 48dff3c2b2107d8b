"""The report's statistics against references by hand: p-values, corrections, marks, tuning, phases, pruning, effects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from report_runs import Page, Sweep, evals

from lab import stats
from lab.report import Listed
from lab.reporting import cells, plots
from lab.reporting.cells import Board, Run
from lab.reporting.effects import Effects, effects, heat
from lab.reporting.numbers import chance, percent
from lab.reporting.tuning import tuning

T2 = 4.302652729749464  # Student's t, 97.5%, for 2 degrees of freedom (tables)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep without pictures."""
    made = Sweep(tmp_path / "sweep")
    monkeypatch.setattr(plots, "pictures", made.keep)
    return made


# p-values


def density(t: float, degrees: int) -> float:
    logarithm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    return math.exp(logarithm - (degrees + 1) / 2 * math.log1p(t * t / degrees))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 29, 100])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.0, 2.5, 4.0])
def test_t_tail_is_the_integral_of_the_density(t: float, degrees: int) -> None:
    steps = 2000  # Simpson's rule from 0 to t
    weights = [1, *([4, 2] * (steps // 2 - 1)), 4, 1]
    inside = sum(w * density(t * i / steps, degrees) for i, w in enumerate(weights)) * t / steps / 3
    assert stats.t_tail(t, degrees) == pytest.approx(1 - 2 * inside, abs=1e-9)


@pytest.mark.parametrize("t", [0.5, 3.0, 1e2, 1e6, 1e8])
def test_t_tail_is_exact_where_it_is_tiny(t: float) -> None:
    one, two = 2 / math.pi * math.atan(1 / t), 2 / ((t * t + 2) * (1 + t / math.sqrt(t * t + 2)))
    assert stats.t_tail(t, 1) == pytest.approx(one, rel=1e-12)
    assert stats.t_tail(t, 2) == pytest.approx(two, rel=1e-12)


def test_t_tail_undoes_the_quantile_and_refuses_nonsense() -> None:
    for degrees in (1, 2, 7, 40):
        for level in (0.5, 0.9, 0.95, 0.9999):
            assert stats.t_tail(stats.t_quantile(level, degrees), degrees) == pytest.approx(1 - level, rel=1e-9)
    assert stats.t_tail(math.inf, 3) == 0.0 and stats.t_tail(0, 3) == 1.0
    for t, degrees in ((-1.0, 3), (math.nan, 3), (1.0, 0)):
        with pytest.raises(ValueError, match="t_tail needs"):
            stats.t_tail(t, degrees)


def test_p_of_differences() -> None:
    found = stats.estimate([-0.1, -0.2, -0.3])  # t = 0.2 / (0.1 / sqrt(3)) = sqrt(12), with 2 degrees
    assert found and found.p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14), rel=1e-9)
    single, same, none = (stats.estimate(v) for v in ([0.3], [0.5, 0.5], [0.0, 0.0]))
    assert single and same and none and (single.p, same.p, none.p) == (None, 0.0, 1.0)


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, None, 0.03], 3) == [0.03, 0.06, None, 0.06]  # 3 * 0.01; 2 * 0.03; max(0.06, 0.04)
    assert stats.holm([0.5, 0.9], 2) == [1.0, 1.0] and stats.holm([], 0) == []
    assert stats.holm([0.01], 5) == [0.05]  # four more comparisons that could not be tested


def test_chances_and_shares_as_text() -> None:
    assert [chance(p) for p in (0.5, 0.0312, 2e-7, 0.0, None)] == ["0.50", "0.031", "2e-07", "< 1e-15", ""]
    assert [percent(x) for x in (1.0, 0.431, 0.004, 1e-5, 0.0)] == ["100%", "43%", "0.4%", "< 0.1%", "0%"]


def test_p_values_stand_in_the_table(sweep: Sweep) -> None:
    for seed, base, near, far in ((1, 2.0, 1.9, 1.0), (2, 2.2, 2.0, 1.21), (3, 2.1, 1.8, 1.12)):
        for cell, loss in (("base", base), ("near", near), ("far", far)):
            sweep.add(cell, seed, loss, baseline=cell == "base")
    text = sweep.write().text
    lowest, middle, highest = sweep.table()
    p = 1 - math.sqrt(12) / math.sqrt(14)
    assert float(middle["p"]) == pytest.approx(p) and float(middle["p_holm"]) == pytest.approx(p)
    t = 0.99 / (0.01 / math.sqrt(3))  # differences to the baseline: -1.00, -0.99, -0.98
    assert float(lowest["p"]) == pytest.approx(1 - t / math.sqrt(t * t + 2)) and highest["p"] == ""
    assert float(lowest["p_holm"]) == pytest.approx(2 * float(lowest["p"]))
    assert f"p = {chance(float(lowest['p']))}" in text


# Against the best


def marked(sweep: Sweep) -> dict[str, str]:
    sweep.write()
    return {row["cell"]: row["against_best"] for row in sweep.table()}


def test_what_cannot_be_told_from_the_best(sweep: Sweep) -> None:
    wobble = (0.0, 0.01, -0.01)
    for seed in (1, 2, 3):
        sweep.add("best", seed, 1.0)
        sweep.add("same", seed, (1.1, 1.0, 0.95)[seed - 1])
        sweep.add("worse", seed, 3.0 + wobble[seed - 1])
        sweep.add("likely", seed, 1.05 + wobble[seed - 1])  # t = 0.05 / (0.01 / sqrt(3)) = 8.7, p = 0.013
    sweep.add("single", 1, 4.0)
    sweep.add("other seeds", 7, 1.5)
    sweep.add("other seeds", 8, 1.6)
    sweep.add("gone", 1, None, "diverged")
    assert marked(sweep) == {
        "best": "best",
        "same": "not distinguishable",
        "likely": "likely worse",
        "worse": "worse",
        "single": "unknown",
        "other seeds": "unknown",
        "gone": "",
    }
    text = sweep.write().text
    assert "1 other cell cannot be distinguished from the best" in text and "Of 2 cells nothing can be said" in text
    assert "1 other cell looks worse than the best, but not after Holm's correction for 5 comparisons" in text


def test_one_seed_says_nothing_against_the_best(sweep: Sweep) -> None:
    sweep.add("a", 1, 1.0)
    sweep.add("b", 1, 9.0)
    assert marked(sweep) == {"a": "best", "b": "unknown"}


# Tuned keys


def lr(sweep: Sweep, norm: str, values: Mapping[float, float | None], seeds: int = 2, **more: Any) -> None:
    for rate, loss in values.items():
        for seed in range(seeds):
            changed = {"model.norm": norm, "optimizer.learning_rate": rate}
            value = None if loss is None else loss + seed / 100
            sweep.add(f"norm={norm}, lr={rate}", seed, value, "done" if loss else "diverged", changed=changed, **more)


def test_each_variant_at_its_own_best(sweep: Sweep) -> None:
    lr(sweep, "layernorm", {0.001: 2.0, 0.01: 1.5, 0.1: 1.8}, baseline=True)
    lr(sweep, "rmsnorm", {0.001: 1.9, 0.01: 1.45, 0.1: 1.4})
    lr(sweep, "none", {0.001: 1.7, 0.01: None})
    summary = sweep.write(tune=("optimizer.learning_rate",))
    assert (summary.best_cell, summary.cells) == ("norm=rmsnorm", 8) and summary.best_mean == pytest.approx(1.405)
    assert (
        "'norm=rmsnorm' has the lowest mean" in summary.text and "below the baseline 'norm=layernorm'" in summary.text
    )
    assert "chosen on the same seeds that are compared, the mean is optimistic" in summary.text
    assert "Variants were tried at 2 to 3 values" in summary.text
    assert "not tuned to the end: 'norm=rmsnorm': learning_rate 0.1 is the largest tried" in summary.text
    rows = {row["cell"]: row for row in sweep.table()}  # all cells are compared with the baseline at its best
    assert float(rows["norm=layernorm, lr=0.01"]["difference"]) == 0.0
    assert float(rows["norm=rmsnorm, lr=0.1"]["paired_difference"]) == pytest.approx(-0.1)
    markdown = (sweep.folder / "leaderboard.md").read_text()
    assert "| 1 | norm=rmsnorm | 0.1 | 1.4050 | 2 | −0.1000 |" in markdown
    assert "Each variant at its own best" in Page(sweep.html()).text


def edges(sweep: Sweep, key: str = "optimizer.learning_rate") -> dict[str, tuple[str, ...]]:
    sweep.write()
    return {one.name: one.warnings for one in tuning(sweep.board, (key,)).variants}


def test_edges_of_an_axis(sweep: Sweep) -> None:
    lr(sweep, "inside", {0.001: 2.0, 0.01: 1.5, 0.1: 1.8})
    lr(sweep, "smallest", {0.001: 1.0, 0.01: 1.5})
    lr(sweep, "bracketed", {0.01: 1.5, 0.1: None})  # one below it was not tried; the largest diverged
    lr(sweep, "alone", {0.01: 1.5})
    found = edges(sweep)
    assert found["norm=inside"] == ()
    assert found["norm=smallest"] == ("learning_rate 0.001 is the smallest tried, so the best may lie beyond it",)
    assert found["norm=bracketed"] == ("learning_rate 0.01 is the smallest tried, so the best may lie beyond it",)
    assert found["norm=alone"] == ("only one value of learning_rate was tried",)


def test_edges_while_the_sweep_runs_and_of_words(sweep: Sweep) -> None:
    lr(sweep, "open", {0.001: 2.0, 0.01: 1.5})
    sweep.add("waiting", 0, None, None, changed={"model.norm": "open", "optimizer.learning_rate": 0.1})
    largest, so_far = edges(sweep)["norm=open"]
    assert "largest" in largest and "not every value has finished" in so_far
    lr(sweep, "other", {0.001: 2.0})
    assert edges(sweep, "model.norm")["learning_rate=0.001"] == ()


def test_a_tuned_key_must_be_swept(sweep: Sweep) -> None:
    lr(sweep, "a", {0.001: 2.0})
    with pytest.raises(ValueError, match=r"sweep\.tune: no axis sweeps 'optimizer\.lr'\. Did you mean"):
        sweep.write(tune=("optimizer.lr",))


# Phases and early stopping


def test_confirmed_cells_stand_on_fresh_seeds_alone(sweep: Sweep) -> None:
    for seed, loss in ((1, 1.0), (2, 1.0)):
        sweep.add("lucky", seed, loss, phase="search")
        sweep.add("found", seed, loss + 0.1, phase="search")
        sweep.add("steady", seed, loss + 0.9)
    for seed, loss in ((11, 1.5), (12, 1.7)):
        sweep.add("found", seed, loss, phase="confirm")
    text = sweep.write().text
    found, steady, lucky = sweep.table()  # what a search only selected comes last
    assert (found["cell"], found["mean"], found["n"], found["fresh_seeds"]) == ("found", "1.6", "2", "yes")
    assert (steady["cell"], lucky["cell"]) == ("steady", "lucky")
    assert lucky["remarks"] == "selected by a search, not confirmed" and steady["remarks"] == ""
    assert "1 cell chosen by a search is judged by fresh seeds alone." in text and "over 2 fresh seeds" in text
    assert "its mean is optimistic and ranked after all others" in text
    assert found["against_best"] == "best" and steady["against_best"] == "unknown"


def test_unconfirmed_search_is_optimistic_until_a_confirming_run_ends(sweep: Sweep) -> None:
    sweep.add("found", 1, 1.0, phase="search")
    sweep.add("found", 11, None, None, phase="confirm")
    text = sweep.write().text
    (row,) = sweep.table()
    assert (row["mean"], row["status"]) == ("1.0", "done, not confirmed yet") and "their means are" not in text
    assert "not confirmed with fresh seeds: its mean is optimistic." in text
    sweep.add("found", 12, None, "diverged", phase="confirm")
    sweep.write()
    (row,) = sweep.table()
    assert (row["mean"], row["n"], row["fresh_seeds"], row["diverged"]) == ("", "0", "yes", "1")


def test_survivors_of_pruning_are_marked_and_pruned_runs_not_averaged(sweep: Sweep) -> None:
    sweep.add("partly", 1, 1.0)
    sweep.add("partly", 2, 5.0, "pruned")
    sweep.add("whole", 1, 1.5)
    sweep.add("whole", 2, 1.6)
    text = sweep.write(stop="halving").text
    partly, whole = sweep.table()
    assert (partly["mean"], partly["n"], whole["remarks"]) == ("1.0", "1", "")
    assert partly["remarks"] == "mean of survivors: seeds were pruned"
    assert "Successive halving ended 1 run early. Runs were compared at equal iterations" in text
    assert "Of 1 cell some seeds were pruned: its mean is over the seeds that survived" in text


def test_early_stopping_is_spoken_of_where_it_was_on_or_has_pruned(sweep: Sweep) -> None:
    sweep.add("a", 1, 1.0)
    assert "equal iterations" not in sweep.write().text
    assert "Median stopping ended 0 runs early" in sweep.write(stop="median").text
    sweep.add("a", 2, 1.0, "pruned")
    assert "Early stopping ended 1 run early" in sweep.write().text


# Effects


def grid(values: Mapping[Any, list[float]], keys: tuple[str, ...] = ("a", "b")) -> Board:
    """A board of cells with a value for each seed."""
    runs = [
        Run(Listed(f"{at} {seed}", str(at), seed, dict(zip(keys, at, strict=True)), Path(), False), "done", value, {})
        for at, some in values.items()
        for seed, value in enumerate(some)
    ]
    return cells.board("s", runs, "val_loss", "min")


def means(found: Effects, key: str) -> dict[str, float]:
    return {lv.label: lv.estimate.mean for effect in found.several if effect.keys[0] == key for lv in effect.levels}


def test_importance_on_a_full_grid_by_hand() -> None:
    values = {(0, 1): 1, (0, 2): 2, (0, 4): 4, (1, 1): 3, (1, 2): 4, (1, 4): 9}
    found = effects(grid({at: [float(v)] for at, v in values.items()}))
    assert [effect.keys for effect in found.several] == [("b",), ("a",)] and all(e.full for e in found.several)
    assert means(found, "a") == pytest.approx({"0": 7 / 3, "1": 16 / 3})
    assert means(found, "b") == pytest.approx({"1": 2, "2": 3, "4": 6.5})
    variance = 127 / 6 - (23 / 6) ** 2
    b = ((2 - 23 / 6) ** 2 + (3 - 23 / 6) ** 2 + (6.5 - 23 / 6) ** 2) / 3
    assert [effect.share for effect in found.several] == pytest.approx([b / variance, 1.5**2 / variance])
    assert found.noise is None and found.several[0].levels[0].estimate.low is None


def test_a_missing_combination_does_not_mix_up_the_keys() -> None:
    truth = {(i, j): [a + b] for i, a in enumerate((0.0, 1.0)) for j, b in enumerate((0.0, 2.0, 5.0))}
    del truth[(1, 2)]
    found = effects(grid(truth))
    by_a, by_b = means(found, "a"), means(found, "b")
    assert by_a["1"] - by_a["0"] == pytest.approx(1.0)  # plain means would say 2 - 7 / 3 < 0
    assert [by_b["1"] - by_b["0"], by_b["2"] - by_b["0"]] == pytest.approx([2.0, 5.0])
    assert not any(effect.full for effect in found.several)
    # without a, the best fit has the means by b: 0.5, 2.5, 5 against 0, 1, 2, 3, 5
    spread = sum((y - 2.2) ** 2 for y in (0, 1, 2, 3, 5)) / 5
    assert next(e.share for e in found.several if e.keys == ("a",)) == pytest.approx(4 * 0.25 / 5 / spread)


def test_keys_that_change_together_are_one_and_what_others_determine_is_unknown() -> None:
    zipped = grid({(w, w // 32, c): [w + c / 10.0] for w in (64, 128) for c in (0, 1)}, ("width", "heads", "c"))
    assert [effect.keys for effect in effects(zipped).several] == [("width", "heads"), ("c",)]
    nested = {
        (1, "x", 0): 1.0,
        (2, "x", 0): 2.0,
        (3, "y", 0): 5.0,
        (1, "x", 1): 1.5,
        (2, "x", 1): 2.5,
        (3, "y", 1): 5.5,
    }
    found = effects(grid({at: [v] for at, v in nested.items()}, ("a", "kind", "c")))
    shares = {effect.keys[0]: effect.share for effect in found.several}
    assert shares["kind"] is None and shares["a"] is not None and shares["a"] > 0.9


def test_conditional_keys_count_where_they_are_set() -> None:
    runs: list[tuple[str, dict[str, Any], float]] = [("plain", {"case": "plain"}, 2.0)]
    runs += [(f"pkl {s}", {"case": "pkl", "scale": s}, 1.0 + s) for s in (0.5, 1.0)]
    listed = [Listed(name, name, 1, changed, Path(), False) for name, changed, _ in runs]
    board = cells.board("s", [Run(x, "done", v, {}) for x, (_, _, v) in zip(listed, runs, strict=True)], "m", "min")
    found = {effect.keys[0]: effect for effect in effects(board).several}
    assert found["scale"].within == 2 and found["case"].within == 3
    assert means(effects(board), "scale") == pytest.approx({"0.5": 1.5, "1": 2.0})


def test_intervals_leave_out_what_a_seed_moves_everywhere() -> None:
    rows = {(0,): [1.0, 11.0, 21.0], (1,): [1.1, 11.2, 21.3]}  # differences 0.1, 0.2, 0.3
    (effect,) = effects(grid(rows, ("a",))).several
    half = T2 * (0.1 / math.sqrt(2)) / math.sqrt(3)
    for level, mean in zip(effect.levels, (11.0, 11.2), strict=True):
        assert [level.estimate.mean, level.estimate.half] == pytest.approx([mean, half])
    noise = effects(grid({(0,): [1.0, 1.2], (1,): [3.0, 3.2]}, ("a",))).noise
    assert noise == pytest.approx((0.02 / 2) / 2.0)  # variance 0.02 of each, over 2 seeds; that of 1.1 and 3.1 is 2


def test_many_numbers_are_grouped_and_lost_cells_counted(sweep: Sweep) -> None:
    for i in range(30):
        sweep.add(f"c{i}", 1, 1.0 + i, changed={"a": i / 10, "b": "x" if i % 2 else "y"})
    sweep.add("gone", 1, None, "diverged", changed={"a": 99.0, "b": "x"})
    sweep.write()
    found = {effect.keys[0]: effect for effect in effects(sweep.board).several}
    assert [level.label for level in found["a"].levels][:2] == ["0 to 0.4", "0.5 to 0.9"] and len(
        found["a"].levels
    ) == 6
    assert [(level.label, level.cells, level.lost) for level in found["b"].levels] == [("y", 15, 0), ("x", 15, 1)]


def test_no_spread_has_no_importance() -> None:
    found = effects(grid({(i, j): [0.1 + 0.2] for i in (0, 1) for j in (0, 1)}))
    assert [effect.share for effect in found.several] == [0.0, 0.0]
    assert effects(grid({})).several == () and heat(grid({}), effects(grid({}))) is None


def test_heat_map_is_of_the_two_most_important_keys() -> None:
    values = {(a, b, c): [10.0 * a + b + c / 100] for a in (0, 1) for b in (0, 1, 2) for c in (0, 1)}
    board = grid({at: v for at, v in values.items() if at[:2] != (1, 2)}, ("a", "b", "c"))
    found = heat(board, effects(board))
    assert found and (found.columns.keys, found.rows.keys) == (("a",), ("b",))
    assert found.means[0] == pytest.approx((0.005, 10.005)) and found.means[2][0] == pytest.approx(2.005)
    assert found.means[2][1] is None


# Curves and costs


def test_the_front_holds_what_nothing_cheaper_beats(sweep: Sweep) -> None:
    for cell, loss, size in (("small", 3.0, 10), ("wasteful", 3.5, 20), ("big", 2.0, 30), ("huge", 2.5, 40)):
        sweep.add(cell, 1, loss, parameters=size, flops_per_token=6 * size, tokens=100, metrics=evals(4.0, loss))
    sweep.write()
    drawn = sweep.drawn[-1]
    assert set(drawn.dots) == {"parameters", "flops"}  # seconds are equal
    assert {d.cell.name for d in drawn.dots["flops"] if d.front} == {"small", "big"}
    assert sorted(d.x for d in drawn.dots["flops"]) == [6000, 12000, 18000, 24000]
    assert drawn.measures == ["tokens", "flops", "seconds"]
    sweep.write(metric="val_loss", mode="max")
    assert {d.cell.name for d in sweep.drawn[-1].dots["parameters"] if d.front} == {"small", "wasteful"}
