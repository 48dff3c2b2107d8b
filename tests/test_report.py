"""The report of a sweep: numbers by hand, what diverged or is missing, and the words about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from report_runs import PNG, Page, Sweep, evals, known_sweep

from lab import stats
from lab.report import Listed
from lab.reporting import cells, drawing, numbers, plots, reading

T2, T1 = 4.302652729749464, 12.706204736174694  # Student's t, 97.5%, for 2 and 1 degrees of freedom (tables)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep whose pictures are drawn, small."""
    monkeypatch.setattr(plots, "DPI", 40)
    return Sweep(tmp_path / "sweep")


@pytest.fixture
def sweep(drawn: Sweep, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep without pictures, which keeps the boards that would have been drawn."""
    monkeypatch.setattr(plots, "pictures", drawn.keep)
    return drawn


# Statistics


@pytest.mark.parametrize(
    ("degrees", "known"),
    [(1, T1), (2, T2), (3, 3.182446), (4, 2.776445), (5, 2.570582), (9, 2.262157), (30, 2.042272), (1000, 1.962339)],
)
def test_t_quantile_agrees_with_tables(degrees: int, known: float) -> None:
    assert stats.t_quantile(0.95, degrees) == pytest.approx(known, rel=1e-6)  # the tables' own digits


def test_t_quantile_at_other_levels() -> None:
    assert stats.t_quantile(0.99, 4) == pytest.approx(4.604095, rel=1e-6)
    assert stats.t_quantile(0.5, 1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="degrees >= 1"):
        stats.t_quantile(0.95, 0)


def test_estimate_of_one_value_has_no_spread() -> None:
    assert stats.estimate([1.5]) == stats.Estimate(1, 1.5, None, None, None)
    assert stats.estimate([]) is None


# The leaderboard


def test_leaderboard_by_hand(sweep: Sweep) -> None:
    known_sweep(sweep)
    summary = sweep.write()
    best, base = sweep.table()
    assert (best["rank"], best["cell"], best["n"], best["status"], best["baseline"]) == (
        "1",
        "other",
        "3",
        "done",
        "no",
    )
    assert (base["rank"], base["cell"], base["baseline"]) == ("2", "base", "yes")
    assert float(best["mean"]) == pytest.approx(1.9) and float(best["sd"]) == pytest.approx(0.1)
    half = T2 * 0.1 / math.sqrt(3)
    assert [float(best["low"]), float(best["high"])] == pytest.approx([1.9 - half, 1.9 + half])
    assert float(best["difference"]) == pytest.approx(-0.2)
    # differences by seed: -0.1, -0.2, -0.3, whose sd is 0.1
    assert float(best["paired_difference"]) == pytest.approx(-0.2) and best["paired_n"] == "3"
    assert [float(best["paired_low"]), float(best["paired_high"])] == pytest.approx([-0.2 - half, -0.2 + half])
    assert base["difference"] == "0.0" and base["paired_difference"] == ""
    assert best["parameters"] == "1000" and best["seconds"] == "10.0" and best["tokens_per_second"] == ""
    assert (best["model.norm"], best["optimizer.learning_rate"]) == ("rmsnorm", "0.001")
    assert (base["model.norm"], base["optimizer.learning_rate"]) == ("layernorm", "")
    assert "train.seed" not in best
    assert (summary.best_cell, summary.cells, summary.counts["done"]) == ("other", 2, 6)
    assert summary.best_mean == pytest.approx(1.9)


def test_leaderboard_keeps_full_precision(sweep: Sweep) -> None:
    sweep.add("a", 1, 0.1 + 0.2, changed={"x.y": 1 / 3, "x.z": {"b": [1, None], "a": True}})
    sweep.write()
    (row,) = sweep.table()
    assert float(row["mean"]) == 0.1 + 0.2 and float(row["x.y"]) == 1 / 3
    assert json.loads(row["x.z"]) == {"a": True, "b": [1, None]}


def test_swept_key_named_like_a_column(sweep: Sweep) -> None:
    sweep.add("a", 1, 1.0, changed={"rank": 7})
    sweep.write()
    assert sweep.table()[0]["rank"] == "1" and sweep.table()[0]["changed.rank"] == "7"


def test_paired_difference_uses_common_seeds_alone(sweep: Sweep) -> None:
    for seed, loss in ((1, 2.0), (2, 2.4), (3, 9.0)):
        sweep.add("base", seed, loss, baseline=True)
    for seed, loss in ((1, 1.9), (2, 2.2), (4, 0.1)):
        sweep.add("other", seed, loss)
    sweep.write()
    row = sweep.table()[0]
    assert row["paired_n"] == "2" and float(row["paired_difference"]) == pytest.approx(-0.15)
    half = T1 * (0.1 / math.sqrt(2)) / math.sqrt(2)  # differences -0.1 and -0.2
    assert float(row["paired_high"]) == pytest.approx(-0.15 + half)
    assert float(row["difference"]) == pytest.approx(4.2 / 3 - 13.4 / 3)


def test_best_of_several_baselines_is_the_reference(sweep: Sweep) -> None:
    sweep.add("base lr=1", 1, 2.0, baseline=True)
    sweep.add("base lr=2", 1, 1.8, baseline=True)
    sweep.add("other", 1, 1.7)
    summary = sweep.write()
    assert [float(row["difference"]) for row in sweep.table()] == [pytest.approx(-0.1), 0.0, pytest.approx(0.2)]
    assert "'base lr=2' (the best of 2 baseline cells)" in summary.text


def test_mode_max_and_another_metric(sweep: Sweep) -> None:
    for cell, speed in (("slow", 10.0), ("fast", 30.0), ("middle", 20.0)):
        sweep.add(cell, 1, 1.0, tokens_per_second=speed, baseline=cell == "middle")
    summary = sweep.write(metric="tokens_per_second", mode="max")
    assert [row["cell"] for row in sweep.table()] == ["fast", "middle", "slow"]
    assert [row["difference"] for row in sweep.table()] == ["10.0", "0.0", "-10.0"]
    assert summary.best_mean == 30.0 and "highest mean tokens_per_second" in summary.text


def test_ties_keep_the_order_of_the_listing(sweep: Sweep) -> None:
    for cell in "cab":
        sweep.add(cell, 1, 1.0)
    sweep.write()
    assert [row["cell"] for row in sweep.table()] == ["c", "a", "b"]


# What did not finish


def test_diverged_is_counted_and_never_averaged(sweep: Sweep) -> None:
    sweep.add("half", 1, 1.0)
    sweep.add("half", 2, None, "diverged")
    sweep.add("half", 3, 7.0, "diverged")  # a loss on the way out is no result
    sweep.add("fine", 1, 2.0)
    sweep.add("gone", 1, None, "diverged", changed={"a.b": 1})
    summary = sweep.write()
    half, fine, gone = sweep.table()
    assert (half["cell"], half["mean"], half["n"], half["diverged"]) == ("half", "1.0", "1", "2")
    assert half["status"] == "1 done, 2 diverged" and half["sd"] == ""
    assert fine["rank"] == "2"
    assert (gone["rank"], gone["mean"], gone["diverged"], gone["status"]) == ("", "", "1", "1 diverged")
    assert summary.counts == {"done": 2, "diverged": 3, "failed": 0, "pruned": 0, "started": 0, "pending": 0}
    assert "over its finished seeds alone (1 done, 2 diverged)" in summary.text
    assert "nan" not in (sweep.folder / "leaderboard.csv").read_text().lower()
    assert "1 diverged" in Page(sweep.html()).text


def test_every_other_end_is_counted(sweep: Sweep) -> None:
    sweep.add("a", 1, None, "failed", error="Traceback\nOutOfMemoryError: too big")
    sweep.add("a", 2, 3.0, "pruned")
    sweep.add("a", 3, None, None)
    sweep.add("a", 4, None, None, metrics=evals(3.0))
    sweep.add("a", 5, None, "done")
    (sweep.add("a", 6, None, None) / "result.json").write_text('{"status": "do')
    (sweep.add("a", 7, None, None) / "result.json").write_text('{"status": "exploded"}')
    summary = sweep.write()
    (row,) = sweep.table()
    assert row["status"] == "1 done, 3 failed, 1 pruned, 1 started, 1 pending, 1 without the metric"
    assert (row["failed"], row["pruned"], row["unfinished"], row["n"], row["rank"]) == ("3", "1", "2", "0", "")
    assert summary.best_cell is None and summary.best_mean is None and "No run has finished yet." in summary.text
    shown = Page(sweep.html()).text
    assert "OutOfMemoryError: too big" in shown and "unknown status: 'exploded'" in shown and "cannot be read" in shown


def test_nan_and_booleans_are_no_metric(sweep: Sweep) -> None:
    sweep.add("a", 1, math.nan)
    sweep.add("a", 2, True)
    sweep.add("a", 3, 1.5)
    sweep.write()
    assert (sweep.table()[0]["mean"], sweep.table()[0]["n"]) == ("1.5", "1")


def test_no_run_at_all_and_no_run_finished(drawn: Sweep) -> None:
    assert "The sweep lists no runs." in drawn.write().text
    drawn.add("a", 1, None, None, baseline=True)
    summary = drawn.write()
    assert summary.counts["pending"] == 1 and "No run has finished yet." in summary.text
    assert drawn.table()[0]["status"] == "1 pending"
    assert (drawn.folder / "plots/comparison.png").read_bytes().startswith(PNG)


def test_unknown_metric_and_mode_are_refused(sweep: Sweep) -> None:
    sweep.add("a", 1, 1.0)
    with pytest.raises(ValueError, match=r"no result has a field 'val_los'\. Did you mean 'val_loss'"):
        sweep.write(metric="val_los")
    with pytest.raises(ValueError, match=r"sweep\.objective\.mode: 'lowest' is not allowed"):
        sweep.write(mode="lowest")


# Metrics files


def test_torn_lines_nulls_and_repeated_iterations(sweep: Sweep) -> None:
    again = b'{"kind":"eval","iter":200,"tokens":6400,"val_loss":2.5}\n'
    torn = b'{"kind":"eval","iter":500,"val_lo\xc3'
    sweep.add("a", 1, None, None, metrics=evals(3.0, 2.6, None) + again + b'[1, "eval"]\n\n' + torn)
    sweep.write()
    (curve,) = reading.curves(sweep.board.cells).values()
    assert curve == (reading.Point(100, 3200, 3.0, 1.0), reading.Point(200, 6400, 2.5))


def test_curves_are_means_over_finished_seeds() -> None:
    read: dict[str, tuple[reading.Point, ...]] = {}

    def run(seed: int, value: float | None, *losses: float) -> cells.Run:
        read[str(seed)] = tuple(reading.Point(i, i * 10, loss, i * seed) for i, loss in enumerate(losses, 1))
        status = "done" if value else "diverged"
        listed = Listed(str(seed), "a", seed, {}, Path(), False)
        return cells.Run(listed, status, value, {"flops_per_token": 6})

    board = cells.board("s", [run(1, 2.0, 3.0, 2.0), run(2, 1.0, 4.0, 1.0), run(3, None, 99.0)], "val_loss", "min")
    line = drawing.line(board.cells[0], read)
    assert line and (line.mean, line.low, line.high) == ((3.5, 1.5), (3.0, 1.0), (4.0, 2.0))
    assert line.x == {"iters": (1, 2), "tokens": (10, 20), "flops": (60, 120), "seconds": (1.5, 3.0)}
    lost = cells.board("s", [run(1, None, 3.0, 9.0), run(2, None, 5.0)], "val_loss", "min")
    line = drawing.line(lost.cells[0], read)
    assert line and (line.x["iters"], line.mean, line.ended) == ((1,), (4.0,), "diverged")


# Words


def test_one_seed_claims_nothing(sweep: Sweep) -> None:
    sweep.add("base", 1, 2.0, baseline=True)
    sweep.add("other", 1, 1.0)
    text = sweep.write().text
    assert "1 seed, so no spread is known" in text and "cannot be told from the noise between seeds" in text
    assert "can be distinguished" not in text and "±" not in text


def test_verdict_by_interval(sweep: Sweep) -> None:
    known_sweep(sweep)
    text = sweep.write().text  # -0.2 with half 0.248
    assert "cannot be distinguished from the baseline" in text and "[-0.4484, +0.0484]" in text


def test_clear_and_weak_evidence(sweep: Sweep) -> None:
    for seed, base, other in ((1, 2.0, 1.9), (2, 2.2, 2.09), (3, 2.1, 1.98)):
        sweep.add("base", seed, base, baseline=True)
        sweep.add("other", seed, other)
    assert "It can be distinguished from the baseline" in sweep.write().text
    for i in range(40):  # the same difference, now the best of 41
        sweep.add(f"more{i}", 1, 3.0)
    text = sweep.write().text
    assert "evidence for a difference is weak" in text and "41 comparisons" in text


def test_baseline_wins_and_baseline_missing(sweep: Sweep) -> None:
    sweep.add("base", 1, None, "diverged", baseline=True)
    sweep.add("other", 1, 3.0)
    assert "No baseline run has finished" in sweep.write().text
    assert sweep.table()[0]["difference"] == ""
    sweep.add("base", 2, 2.0, baseline=True)
    assert "The baseline 'base' has the lowest mean" in sweep.write().text


def test_without_baseline(sweep: Sweep) -> None:
    sweep.add("a", 1, 2.0)
    sweep.add("b", 1, 1.0)
    summary = sweep.write()
    assert "'b' has the lowest mean" in summary.text and "names no baseline" in summary.text
    assert "to baseline" not in summary.text and "to baseline" not in sweep.html()
    assert sweep.table()[0]["difference"] == ""


def test_terminal_table_is_aligned_and_short(sweep: Sweep) -> None:
    sweep.add("base", 1, 50.0, baseline=True, tokens_per_second=26_000.0)
    for i in range(14):
        sweep.add("x" * (3 * i + 1), 1, 1.0 + i)
    lines = sweep.write().text.splitlines()
    assert len(lines[0]) and lines[0].split()[:3] == ["#", "cell", "val_loss"]
    end = lines[0].index("val_loss") + len("val_loss")
    assert [line[end - 6 : end] for line in lines[1:4]] == ["1.0000", "2.0000", "3.0000"]
    assert lines[11].split()[:3] == ["15", "base", "50.0000"] and "baseline" in lines[11] and "26.0k" in lines[11]
    assert lines[12] == "... and 4 more cells in leaderboard.csv"
    assert "sd" not in lines[0]  # one seed each


def test_provenance_says_where_runs_differ(sweep: Sweep) -> None:
    for seed, commit in ((1, "abc"), (2, "abc"), (3, "def")):
        kept = {"commit": commit, "dirty": False, "versions": {"torch": "2.13"}, "device": "cpu"}
        sweep.add("a", seed, 1.0, provenance=kept)
    assert "differ in where they come from (commit)" in sweep.write().text
    rows = Page(sweep.html()).rows
    assert ["abc (2 runs)def (1 run)"] in rows
    assert ["2.13"] in rows and ["cpu"] in rows and ["false"] in rows


def test_different_training_lengths_are_told(sweep: Sweep) -> None:
    sweep.add("a", 1, 1.0, tokens=1_000_000)
    sweep.add("b", 1, 1.0, tokens=4_000_000)
    assert "different numbers of training tokens, 1.00M to 4.00M" in sweep.write().text


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (1.46971, "1.4697"),
        (-0.02, "\N{MINUS SIGN}0.0200"),
        (0.0, "0.0000"),
        (-0.0, "0.0000"),
        (1e-5, "1e-05"),
        (12345.6, "12,346"),
        (913.0, "913.00"),
        (2e9, "2e+09"),
    ],
)
def test_decimal(number: float, shown: str) -> None:
    assert numbers.decimal(number) == shown


def test_magnitude_and_duration() -> None:
    counts = (123_587_000, 999_960, 11_000_000, 28_000, 12, 1.5e12)
    assert [numbers.magnitude(n) for n in counts] == ["124M", "1.00M", "11.0M", "28.0k", "12", "1.50T"]
    assert [numbers.duration(s) for s in (8.25, 99.96, 845, 12_000)] == [
        "8.2 s",
        "1 min 40 s",
        "14 min 05 s",
        "3 h 20 min",
    ]
