"""The report's page and pictures: self-contained, safe with hostile names, and what a reader must see in them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, MINUS, PNG, Page, Sweep, evals, known_sweep

from lab.report import Summary
from lab.reporting import cells, drawing, page, plots
from lab.reporting.script import SCRIPT


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


# The page


def test_page_needs_nothing_else_and_allows_its_own_script_alone(sweep: Sweep) -> None:
    known_sweep(sweep)
    sweep.write()
    source = sweep.html()
    found = Page(source)
    assert not re.search(r"https?://|//cdn|@import|url\(", source)
    assert not {"link", "iframe", "object", "img", "foreignobject"} & {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") or name == "style" for _, attrs in found.tags for name in attrs)
    policy = next(attrs["content"] or "" for tag, attrs in found.tags if "http-equiv" in attrs)
    for tag in ("script", "style"):
        content = source.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def named(sweep: Sweep, name: str) -> Sweep:
    """A sweep in which every text that a user or a run can set is `name`."""
    changed = {name: name, "a.b": 1}
    sweep.add(name, 1, 1.0, baseline=True, changed=changed, metrics=evals(2.0, 1.0))
    sweep.add(name, 2, 1.2, baseline=True, changed=changed, metrics=evals(2.0, 1.0))
    error = f"</pre></table>{name}\n" * 40
    sweep.add('=cmd|"x"\n', 1, None, "failed", error=error, cause=name, metrics=evals(2.0))
    other = {name: "other", "a.b": 2}
    provenance = {name: name, "device": name}
    sweep.add("漢字 \N{GRINNING FACE}", 1, 2.0, changed=other, metrics=evals(2.0, 1.0), provenance=provenance)
    sweep.add("漢字 \N{GRINNING FACE}", 2, 2.1, changed=other, metrics=evals(2.0, 1.0))
    sweep.runs[0] = replace(sweep.runs[0], run_id=name, phase=name)
    return sweep


@pytest.mark.parametrize("tuned", [False, True])
def test_hostile_names_are_shown_and_not_run(sweep: Sweep, tmp_path: Path, tuned: bool) -> None:
    def write(sweep: Sweep, name: str) -> Summary:
        return named(sweep, name).write(name=name, tune=(name,) if tuned else (), stop=name)

    summary, harmless = write(sweep, HOSTILE), Sweep(tmp_path / "harmless")
    write(harmless, "word")
    found, usual = Page(sweep.html()), Page(harmless.html())
    assert Counter(tag for tag, _ in found.tags) == Counter(tag for tag, _ in usual.tags)
    assert {a for _, attrs in found.tags for a in attrs} == {a for _, attrs in usual.tags for a in attrs}
    assert "<script>alert(1)</script>\"'&" in found.text and "$\\frac{1}{0}$" in found.text
    for shown in (sweep.html(), summary.text, (sweep.folder / "leaderboard.md").read_text(encoding="utf-8")):
        assert "\u202e" not in shown and "\x1b" not in shown
    names = [row["cell"] for row in sweep.table()]
    assert names == [HOSTILE.replace("\ud800", "\\ud800"), "漢字 \N{GRINNING FACE}", '=cmd|"x"\n']


def test_hostile_names_can_be_drawn(drawn: Sweep) -> None:
    named(drawn, HOSTILE).write(name=HOSTILE)
    assert len(list((drawn.folder / "plots").glob("*.svg"))) == 4
    assert not any("<script" in path.read_text() for path in (drawn.folder / "plots").glob("*.svg"))


def test_markdown_cannot_leave_its_field(sweep: Sweep) -> None:
    sweep.add("a | b\n| `c` *d* <img src=x> [e](f) \\", 1, 1.0)
    sweep.add("plain", 1, 2.0)
    sweep.write()
    lines = (sweep.folder / "leaderboard.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 4 and "<img" not in "".join(lines)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", rows[0])) for row in rows)
    assert r"a \| b \| \`c\` \*d\* &lt;img src=x&gt; \[e\](f) \\" in rows[2]


def test_error_tail_is_short(sweep: Sweep) -> None:
    sweep.add("a", 1, None, "failed", error="\n".join(f"line {i}" for i in range(500)))
    sweep.write()
    assert "line 499" in sweep.html() and "line 400" not in sweep.html()


def test_page_rows_stand_in_the_order_of_the_leaderboard(sweep: Sweep) -> None:
    known_sweep(sweep)
    sweep.add("lost", 1, None, "diverged")
    sweep.write()
    rows = table(sweep, "cells")
    assert [row[1] for row in rows] == ["other", "base", "lost"]
    assert rows[0][2:8] == ["1.9000", "0.2484", "0.1000", "3", "done", "best"]
    assert rows[0][8:12] == [f"{MINUS}0.2000", f"[{MINUS}0.4484, +0.0484]", "0.074", "0.074"]
    assert rows[1][7:9] == ["not distinguishable", "baseline"] and rows[2][6:8] == ["1 diverged", ""]


def table(sweep: Sweep, name: str) -> list[list[str]]:
    """The rows of one of the page's tables."""
    source = sweep.html()
    body = source[source.index(f'id="{name}"') :].split("</table>")[0]
    return [row for row in Page(f"<table {body}").rows if row]


def test_long_tables_are_cut_and_say_so(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CELLS", 5), ("RUNS", 4), ("FAILURES", 2)):
        monkeypatch.setattr(page, name, value)
    for i in range(9):
        sweep.add(f"c{i}", 1, 1.0 + i, baseline=i == 8)
        sweep.add(f"d{i}", 1, None, "failed", error="no")
    sweep.write()
    assert [row[1] for row in table(sweep, "cells")] == ["c0", "c1", "c2", "c3", "c4", "c8"]
    assert len(table(sweep, "runs")) == 4 and len(table(sweep, "failures")) == 2
    text = Page(sweep.html()).text
    assert "The first 5 of 18 cells are listed; leaderboard.csv has all." in text
    assert "The first 4 of 18 runs are listed; runs.csv has all." in text
    assert len((sweep.folder / "runs.csv").read_text().splitlines()) == 19


def test_the_page_of_a_running_sweep_renews_itself_and_draws_no_pictures(drawn: Sweep) -> None:
    known_sweep(drawn)
    drawn.add("later", 1, None, None)
    drawn.write(live=True)
    assert 'data-live="30"' in drawn.html() and 'http-equiv="refresh"' in drawn.html()
    assert "The sweep is not over" in drawn.html() and not (drawn.folder / "plots").exists()
    drawn.write()
    assert "data-live=" not in drawn.html() and "refresh" not in drawn.html().split("</head>")[0]
    assert (drawn.folder / "plots" / "comparison.svg").exists()


def test_failures_and_cost(sweep: Sweep) -> None:
    gpu, cpu = {"device": "cuda:0: H200"}, {"device": "cpu: x86"}
    sweep.add("a", 1, 1.0, seconds=3600.0, provenance=gpu)
    sweep.add("a", 2, None, "failed", seconds=1800.0, provenance=gpu, cause="oom", error="T\nOutOfMemoryError: big")
    sweep.add("b", 1, None, "diverged", seconds=900.0, provenance=cpu, attempt=3, iters=70)
    sweep.add("b", 2, 2.0, "pruned", seconds=900.0, provenance=cpu, iters=50)
    sweep.write(stop="median")
    rows = {row[1]: row for row in table(sweep, "failures")}
    assert rows["failed"][2] == "out of memory" and "OutOfMemoryError: big" in rows["failed"][5]
    assert rows["diverged"][3:6] == ["70", "3", "its loss is not finite"] and rows["pruned"][3] == "50"
    text = Page(sweep.html()).text
    assert "2 h 00 min (7,200 s)" in text and "GPU hours1.5" in text.replace("\n", "") and "CPU hours0.5" in text
    assert "60 min 00 s (50%)" in text and "more than one attempt1" in text


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
def axes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The axes of every picture by its name, drawn but not written."""
    from matplotlib.figure import Figure

    seen: dict[str, list[Any]] = {}

    def keep(picture: plots.Picture) -> list[tuple[str, bytes]]:
        figure = Figure(figsize=(picture.width, picture.height))
        picture.draw(figure)
        seen[picture.name] = figure.axes
        return []

    monkeypatch.setattr(plots, "files", keep)
    return seen


def words(axes: Any) -> str:
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return " | ".join(
        [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel(), *labels, *(t.get_text() for t in axes.texts)]
    )


def test_pictures_of_an_ordinary_sweep(drawn: Sweep) -> None:
    for lr in (0.1, 0.2):
        for width in (1, 2):
            for seed in (1, 2):
                more: dict[str, Any] = {
                    "changed": {"o.lr": lr, "m.width": width},
                    "parameters": 100 * width,
                    "flops_per_token": 6,
                }
                loss = 1.5 + seed / 10 + lr + width / 7
                drawn.add(f"{lr} {width}", seed, loss, baseline=lr == 0.1, metrics=evals(3.0, 2.0, loss), **more)
    drawn.write()
    names = ("loss_curves", "loss_by_flops", "loss_by_time", "comparison", "effects", "heat_map", "scaling")
    kept = {path.name for path in (drawn.folder / "plots").iterdir()}
    assert kept == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        picture = (drawn.folder / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(PNG) and len(picture) > 2_000
        assert b"<svg" in (drawn.folder / "plots" / f"{name}.svg").read_bytes()


def test_axes_are_labelled_and_the_outlier_is_off_scale(drawn: Sweep, axes: dict[str, list[Any]]) -> None:
    for i, loss in enumerate((1.50, 1.51, 1.52, 1.53, 40.0)):
        for seed in (1, 2):
            drawn.add(f"c{i}", seed, loss + seed / 1000, baseline=i == 1, metrics=evals(60.0, 2.0, *[loss] * 8))
    drawn.add("lost", 1, None, "diverged", metrics=evals(4.0, 50.0, None))
    drawn.write()
    (curves,), (dots,) = axes["loss_curves"], axes["comparison"]
    assert curves.get_ylim()[1] < 3 and curves.get_ylim()[0] > 1.3
    assert curves.get_xlabel() == "Training tokens (thousands)" and "nats per token" in curves.get_ylabel()
    assert "40.0000 (off scale)  c4" in words(curves) and "diverged  lost" in words(curves)
    low, high = dots.get_xlim()
    assert 1.45 < low < 1.501 and 1.53 < high < 1.6
    assert "lower is better" in dots.get_xlabel()
    assert "off scale" in words(dots) and "1 diverged" in words(dots) and "c1 (baseline)" in words(dots)
    dashed = [line for line in dots.lines if list(line.get_xdata()) == pytest.approx([1.5115] * 2)]
    assert len(dashed) == 1 and dashed[0].get_linestyle() == "--"


def test_iterations_stand_in_where_tokens_are_missing(drawn: Sweep, axes: dict[str, list[Any]]) -> None:
    drawn.add(
        "a", 1, 1.0, metrics=b'{"kind":"eval","iter":10,"val_loss":2.0}\n{"kind":"eval","iter":20,"val_loss":1.0}\n'
    )
    drawn.write()
    (curves,), (dots,) = axes["loss_curves"], axes["comparison"]
    assert curves.get_xlabel() == "Updates"
    assert "One finished seed each" in words(curves) and "no spread is known" in words(dots)


def test_of_many_cells_the_best_and_the_baseline_are_told_apart(drawn: Sweep, axes: dict[str, list[Any]]) -> None:
    for i in range(60):
        drawn.add(f"c{i:02d}", 1, 1.0 + i / 100, baseline=i == 55, metrics=evals(3.0, 1.0 + i / 100))
    drawn.write()
    (curves,), (dots,) = axes["loss_curves"], axes["comparison"]
    assert [f"c{i:02d}" for i in range(60) if f"c{i:02d}" in words(curves)] == [*(f"c{i:02d}" for i in range(8)), "c55"]
    assert "51 other cells" in words(curves)
    assert len(dots.get_yticks()) == drawing.ROWS and "c55" in words(dots) and "20 more cells" in words(dots)


def test_of_very_many_cells_some_hundred_curves_are_drawn(drawn: Sweep, axes: dict[str, list[Any]]) -> None:
    for i in range(300):
        drawn.add(f"c{i:03d}", 1, 1.0 + i / 100, metrics=evals(3.0, 1.0 + i / 100), seconds=1.0 + i)
    drawn.write()
    assert len(axes["loss_curves"][0].lines) < 200 and "192 more not drawn" in words(axes["loss_curves"][0])
    assert "192 more are not drawn" in drawn.html()


def test_cells_differ_in_more_than_colour(drawn: Sweep) -> None:
    for i in range(12):
        drawn.add(f"c{i}", 1, 1.0 + i, baseline=i == 0)
    board = cells.board("s", [cells.Run(run, "done", 1.0, {}) for run in drawn.runs], "val_loss", "min")
    prepared = drawing.prepare(board, None)
    looks = [plots.look(prepared, cell) for cell in board.cells]
    assert len({look.marker for look in looks}) == 12
    assert len({(look.colour, look.dash) for look in looks}) == 12


def test_effects_heat_map_and_scaling_show_their_numbers(drawn: Sweep, axes: dict[str, list[Any]]) -> None:
    for lr in (0.001, 0.01, 0.1):
        for norm in ("layernorm", "rmsnorm"):
            loss = 2 + 100 * (lr - 0.01) ** 2 + (norm == "rmsnorm") / 100
            more: dict[str, Any] = {
                "changed": {"o.lr": lr, "m.norm": norm},
                "parameters": 10 if norm == "rmsnorm" else 20,
            }
            drawn.add(f"{lr} {norm}", 1, loss, **more)
    drawn.write()
    first, second = axes["effects"]
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("o.lr", "m.norm")
    assert first.get_xscale() == "log" and "explains 100%" in words(first)
    heat = axes["heat_map"][0]
    assert [t.get_text() for t in heat.texts if "." in t.get_text()][:3] == ["2.0081", "2.0000", "2.8100"]
    (parameters,) = axes["scaling"]
    front = next(line for line in parameters.lines if line.get_linestyle() == "--")
    assert list(front.get_xdata()) == [10, 20] and list(front.get_ydata()) == pytest.approx([2.01, 2.0])


def test_inliers_and_spread() -> None:
    assert drawing.inliers([1.0, 1.1, 1.2, 1.3]) == 4
    assert drawing.inliers([1.0, 1.1, 1.2, 9.0, 10.0]) == 3
    assert drawing.inliers([1.0, 9.0]) == 2 and drawing.inliers([1.0, 1.0, 1.5]) == 3 and drawing.inliers([]) == 0
    assert plots.spread([0.2, 0.8], 0.1, 0, 1) == [0.2, 0.8]
    assert plots.spread([0.5, 0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.4, 0.5, 0.6])
    assert plots.spread([0.98, 1.01], 0.1, 0, 1) == pytest.approx([0.9, 1.0])
    assert plots.spread([0.0, 0.0], 0.1, 0.02, 1) == pytest.approx([0.02, 0.12])


# In a browser: system tests, slow and with a program that not every machine has


FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
browser = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")


def browse(
    sweep: Sweep, script: str, monkeypatch: pytest.MonkeyPatch, width: int = 1200, **more: Any
) -> dict[str, Any]:
    """What a script in the report's page finds, which it puts into `found`."""
    told = "document.body.dataset.found = JSON.stringify(found);"
    monkeypatch.setattr(page, "SCRIPT", f"{SCRIPT}\n{{ const found = {{}};\n{script}\n{told} }}")
    sweep.write(live=True, **more)
    frame = sweep.folder / "frame.html"  # a window cannot be as narrow as a phone
    copy = "document.body.dataset.found = document.querySelector('iframe').contentDocument.body.dataset.found"
    frame.write_text(f'<iframe src="report.html" width="{width}" height="800" onload="{copy}"></iframe>')
    flags = [*FLAGS, "--allow-file-access-from-files", f"--user-data-dir={sweep.folder / 'profile'}"]
    command = ["chromium", *flags, "--window-size=1400,900", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    body = next(attrs for tag, attrs in Page(done.stdout.decode()).tags if tag == "body")
    made: dict[str, Any] = json.loads(body["data-found"] or "")
    return made


def browsed(sweep: Sweep) -> None:
    """Three hostile cells of two seeds, with curves."""
    for i, cell in enumerate((HOSTILE, "b", "c")):
        for seed in (1, 2):
            more: dict[str, Any] = {
                "tokens_per_second": (5.0, 40.0, 30.0)[i],
                "changed": {"a.b": i, HOSTILE: f"{HOSTILE}{i % 2}"},
            }
            loss = None if cell == "c" else 1.0 + i + seed / 10
            sweep.add(cell, seed, loss, "done" if loss else "diverged", metrics=evals(3.0, loss), **more)


@pytest.mark.system
@browser
def test_tables_sort_and_filter_in_a_browser(drawn: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    browsed(drawn)
    script = """
      const word = form.querySelector("input"), told = form.querySelector("output");
      const column = i => all("#cells tbody tr").filter(row => !row.hidden).map(row => row.cells[i].dataset.v);
      const set = (field, value) => { field.value = value; form.dispatchEvent(new Event("input")); };
      const speed = all("#cells th button").find(b => b.textContent === "tokens/s");
      speed.click(); speed.click();
      found.sorted = column(10);
      set(word, "2 DIVERGED");
      found.word = column(10);
      found.runs = all("#runs tbody tr").filter(row => !row.hidden).length;
      found.off = all("svg .off").length > 0;
      set(word, "");
      const keyed = all("select", form)[1];
      set(keyed, keyed.options[1].value);
      found.key = column(10);
      found.told = told.textContent;
      keyed.value = ""; form.dispatchEvent(new Event("input"));
      found.all = column(10).length;
    """
    found = browse(drawn, script, monkeypatch)
    assert found["sorted"] == ["40.0", "30.0", "5.0"]
    assert (found["word"], found["runs"], found["off"]) == (["30.0"], 2, True)
    assert (found["key"], found["told"], found["all"]) == (["30.0", "5.0"], "2 of 3 listed cells", 3)


@pytest.mark.system
@browser
def test_charts_tell_their_numbers_by_pointer_and_keys(drawn: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    browsed(drawn)
    script = """
      const chart = document.querySelector("svg[tabindex]"), mark = chart.querySelector("[data-tip]");
      const send = (to, event) => to.dispatchEvent(event);
      send(mark, new PointerEvent("pointermove", { bubbles: true, clientX: 9, clientY: 9 }));
      found.pointer = tip.textContent;
      send(document.body, new PointerEvent("pointermove", { bubbles: true }));
      found.away = tip.hidden;
      chart.focus();
      send(chart, new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
      send(chart, new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
      found.keys = tip.textContent;
      found.inside = tip.getBoundingClientRect().right <= innerWidth;
      send(chart, new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
      found.escaped = tip.hidden;
      found.elements = tip.children.length;
      found.tabs = all(".tabs button").map(b => b.textContent);
      all(".tabs button")[1].click();
      found.shown = all("[data-tab]").map(part => part.hidden);
    """
    found = browse(drawn, script, monkeypatch)
    assert "<script>alert(1)</script>" in found["pointer"] and "1.1500 ± " in found["pointer"]
    assert found["keys"].startswith("b\n") and found["inside"] and found["elements"] == 0
    assert found["away"] and found["escaped"]
    assert found["tabs"] == ["Training tokens", "Training time (seconds)"] and found["shown"] == [True, False]


@pytest.mark.system
@browser
def test_a_phone_reads_the_page_without_scrolling_it_sideways(drawn: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    named(drawn, HOSTILE)
    drawn.add("x" * 400, 1, 1.0, metrics=evals(3.0, 1.0))
    script = """
      found.width = innerWidth;
      found.page = document.documentElement.scrollWidth;
      all("details").forEach(part => part.open = true);
      found.opened = document.documentElement.scrollWidth;
      found.font = parseFloat(getComputedStyle(document.body).fontSize);
    """
    found = browse(drawn, script, monkeypatch, width=390, name=HOSTILE * 3)
    assert found["width"] == 390 and found["page"] <= 390 and found["opened"] <= 390 and found["font"] >= 16
