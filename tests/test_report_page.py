"""The report's page and pictures: self-contained, safe with hostile names, and what a reader must see in them."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, MINUS, PNG, Page, Sweep, evals, known_sweep

from lab import page, plots, stats
from lab.report import Listed


@pytest.fixture
def drawn(tmp_path: Path) -> Sweep:
    """A sweep whose pictures are drawn."""
    return Sweep(tmp_path / "sweep")


@pytest.fixture
def sweep(drawn: Sweep, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep without pictures, which keeps the boards that would have been drawn."""
    monkeypatch.setattr(plots, "loss_curves", drawn.keep)
    monkeypatch.setattr(plots, "comparison", lambda board: PNG)
    return drawn


# The page


def test_page_needs_nothing_else_and_allows_its_own_script_alone(sweep: Sweep) -> None:
    known_sweep(sweep)
    sweep.write()
    source = sweep.html()
    found = Page(source)
    assert not re.search(r"https?://|//cdn|@import|url\(", source)
    links = [attrs for tag, attrs in found.tags if tag in ("link", "iframe", "object")]
    assert not links and not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    images = [attrs for tag, attrs in found.tags if tag == "img"]
    assert [image["alt"] for image in images] == list(page.ALTS.values())
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in images)
    policy = next(attrs["content"] or "" for tag, attrs in found.tags if "http-equiv" in attrs)
    script = source.split("<script>")[1].split("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_hostile_names_are_shown_and_not_run(drawn: Sweep) -> None:
    drawn.add(HOSTILE, 1, 1.0, baseline=True, changed={HOSTILE: HOSTILE})
    drawn.add('=cmd|"x"\n', 1, None, "failed", error=f"</pre></table>{HOSTILE}\n" * 40, metrics=evals(2.0))
    drawn.add("漢字 \N{GRINNING FACE}", 1, 2.0, metrics=evals(2.0, 1.0), provenance={HOSTILE: HOSTILE})
    drawn.runs[0] = Listed(
        HOSTILE, *(getattr(drawn.runs[0], f) for f in ("cell", "seed", "changed", "folder", "baseline"))
    )
    summary = drawn.write(name=HOSTILE)
    found = Page(drawn.html())
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 1 and tags.count("table") == 3 and tags.count("pre") == 1
    assert "<script>alert(1)</script>\"'&" in found.text and "$\\frac{1}{0}$" in found.text
    assert "\u202e" not in drawn.html() and "\x1b" not in drawn.html()
    assert "\x1b" not in summary.text and "\u202e" not in summary.text
    names = [row["cell"] for row in drawn.table()]
    assert names == [HOSTILE.replace("\ud800", "\\ud800"), "漢字 \N{GRINNING FACE}", '=cmd|"x"\n']


def test_error_tail_is_short(sweep: Sweep) -> None:
    sweep.add("a", 1, None, "failed", error="\n".join(f"line {i}" for i in range(500)))
    sweep.write()
    assert "line 499" in sweep.html() and "line 400" not in sweep.html()


def test_page_rows_stand_in_the_order_of_the_leaderboard(sweep: Sweep) -> None:
    known_sweep(sweep)
    sweep.add("lost", 1, None, "diverged")
    sweep.write()
    rows = [row for row in Page(sweep.html()).rows if len(row) > 8]
    assert [row[1] for row in rows[:3]] == ["other", "base", "lost"]
    assert rows[0][2:8] == ["1.9000", "0.1000", "3", "done", f"{MINUS}0.2000", f"[{MINUS}0.4484, +0.0484]"]
    assert rows[1][6:8] == ["baseline", ""] and rows[2][5] == "1 diverged"


def test_a_report_is_replaced_whole_or_not_at_all(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    known_sweep(sweep)
    sweep.write()
    before = {path: path.read_bytes() for path in sweep.folder.rglob("*") if path.is_file()}

    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="the disk is full"):
        sweep.write()
    assert {path: path.read_bytes() for path in sweep.folder.rglob("*") if path.is_file()} == before


# The pictures


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every picture, drawn but not written."""
    from matplotlib.figure import Figure

    seen: list[Any] = []

    def keep(width: float, height: float, draw: Any) -> bytes:
        figure = Figure(figsize=(width, height))
        seen.append(figure.add_subplot())
        draw(figure, seen[-1])
        return PNG

    monkeypatch.setattr(plots, "_picture", keep)
    return seen


def words(axes: Any) -> str:
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return " | ".join(
        [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel(), *labels, *(t.get_text() for t in axes.texts)]
    )


def test_pictures_of_an_ordinary_sweep(drawn: Sweep) -> None:
    for cell in ("base", "other"):
        for seed in (1, 2):
            drawn.add(cell, seed, 1.5 + seed / 10, baseline=cell == "base", metrics=evals(3.0, 2.0, 1.5 + seed / 10))
    drawn.write()
    for name in ("loss_curves", "comparison"):
        picture = (drawn.folder / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(PNG) and len(picture) > 10_000
        assert base64.b64encode(picture).decode() in drawn.html()


def test_axes_are_labelled_and_the_outlier_is_off_scale(drawn: Sweep, axes: list[Any]) -> None:
    for i, loss in enumerate((1.50, 1.51, 1.52, 1.53, 40.0)):
        for seed in (1, 2):
            drawn.add(f"c{i}", seed, loss + seed / 1000, baseline=i == 1, metrics=evals(60.0, 2.0, *[loss] * 8))
    drawn.add("lost", 1, None, "diverged", metrics=evals(4.0, 50.0, None))
    drawn.write()
    curves, dots = axes
    assert curves.get_ylim()[1] < 3 and curves.get_ylim()[0] > 1.3
    assert curves.get_xlabel() == "Training tokens (thousands)" and "nats per token" in curves.get_ylabel()
    assert "40.0000 (off scale)  c4" in words(curves) and "diverged  lost" in words(curves)
    low, high = dots.get_xlim()
    assert 1.45 < low < 1.501 and 1.53 < high < 1.6
    assert "lower is better" in dots.get_xlabel()
    assert "off scale" in words(dots) and "1 diverged" in words(dots) and "c1 (baseline)" in words(dots)
    dashed = [line for line in dots.lines if list(line.get_xdata()) == pytest.approx([1.5115] * 2)]
    assert len(dashed) == 1 and dashed[0].get_linestyle() == "--"


def test_iterations_stand_in_where_tokens_are_missing(drawn: Sweep, axes: list[Any]) -> None:
    drawn.add(
        "a", 1, 1.0, metrics=b'{"kind":"eval","iter":10,"val_loss":2.0}\n{"kind":"eval","iter":20,"val_loss":1.0}\n'
    )
    drawn.write()
    assert axes[0].get_xlabel() == "Updates"
    assert "One finished seed each" in words(axes[0]) and "no spread is known" in words(axes[1])


def test_of_many_cells_the_best_and_the_baseline_are_told_apart(drawn: Sweep, axes: list[Any]) -> None:
    for i in range(60):
        drawn.add(f"c{i:02d}", 1, 1.0 + i / 100, baseline=i == 55, metrics=evals(3.0, 1.0 + i / 100))
    drawn.write()
    curves, dots = axes
    assert [f"c{i:02d}" for i in range(60) if f"c{i:02d}" in words(curves)] == [*(f"c{i:02d}" for i in range(8)), "c55"]
    assert "51 other cells" in words(curves)
    assert len(dots.get_yticks()) == plots.ROWS and "c55" in words(dots) and "20 more cells" in words(dots)


def test_cells_differ_in_more_than_colour(drawn: Sweep) -> None:
    for i in range(12):
        drawn.add(f"c{i}", 1, 1.0 + i, baseline=i == 0)
    board = stats.board("s", [stats.Run(run, "done", 1.0, {}) for run in drawn.runs], "val_loss", "min")
    looks = plots.looks(board)
    assert len({look.marker for look in looks.values()}) == 12
    assert len({(look.colour, look.dash) for look in looks.values()}) == 12


def test_inliers_and_spread() -> None:
    assert plots.inliers([1.0, 1.1, 1.2, 1.3]) == 4
    assert plots.inliers([1.0, 1.1, 1.2, 9.0, 10.0]) == 3
    assert plots.inliers([1.0, 9.0]) == 2 and plots.inliers([1.0, 1.0, 1.5]) == 3 and plots.inliers([]) == 0
    assert plots.spread([0.2, 0.8], 0.1, 0, 1) == [0.2, 0.8]
    assert plots.spread([0.5, 0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.4, 0.5, 0.6])
    assert plots.spread([0.98, 1.01], 0.1, 0, 1) == pytest.approx([0.9, 1.0])
    assert plots.spread([0.0, 0.0], 0.1, 0.02, 1) == pytest.approx([0.02, 0.12])


# In a browser: a system test, slow and with a program that not every machine has


@pytest.mark.system
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_the_table_sorts_in_a_browser(drawn: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cell, loss, speed in ((HOSTILE, 1.0, 5.0), ("b", 2.0, 40.0), ("c", None, 30.0)):
        drawn.add(cell, 1, loss, "done" if loss else "diverged", tokens_per_second=speed)
    click = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'tokens/s').click();"
    monkeypatch.setattr(page, "SCRIPT", f"{page.SCRIPT}\n{click}\n{click}")
    drawn.write()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", (drawn.folder / "report.html").as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    rows = [row for row in Page(done.stdout.decode()).rows if len(row) > 8]
    assert [row[8] for row in rows[:3]] == ["40", "30", "5"]
