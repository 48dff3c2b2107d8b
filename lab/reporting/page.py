"""report.html: one file that needs nothing else. Charts are drawn in it, the network is forbidden by its own content policy.

Every text that came from a user or a run (names, labels, values, errors) passes through `text`, and the policy allows
this file's own script alone: a name that looks like markup is shown, not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from lab.reporting import charts, charts_more, drawing, rows
from lab.reporting.cells import Board
from lab.reporting.charts import text
from lab.reporting.drawing import Drawn
from lab.reporting.effects import caveats
from lab.reporting.numbers import last_words, many, percent, short, told
from lab.reporting.rows import Column, Row
from lab.reporting.script import SCRIPT
from lab.reporting.sentences import cost, provenance
from lab.reporting.style import STYLE

CELLS = RUNS = 500  # rows of a table; files hold the rest
FAILURES = 200
FILTERED, OPTIONS = 12, 60  # keys that have a filter, and values in it
EVERY = 30  # seconds between renewals of the page of a running sweep


def render(drawn: Drawn, sentences: Sequence[str], live: bool = False) -> str:
    """The page. live: the sweep is not over, so the page loads itself anew from time to time."""
    board = drawn.board
    numbers = {cell.name: i for i, cell in enumerate(board.cells)}
    parts = (
        *_head(board, live),
        _said(sentences),
        _chips(board),
        _filters(board),
        *_variants(drawn),
        "<h2>Cells</h2>",
        _table("cells", rows.columns(board), rows.cell_rows(board, numbers, CELLS)),
        f'<p class="note">{_more(len(board.cells), CELLS, "cells", "leaderboard.csv")}{rows.legend(board)}</p>',
        *_charts(drawn, numbers),
        *_failures(board, numbers),
        "<h2>Cost</h2>",
        _pairs([(name, value, "") for name, value in cost(board)]),
        f"<details>\n<summary>{many(len(board.runs), 'run')}</summary>",
        f'<p class="note">{_more(len(board.runs), RUNS, "runs", "runs.csv")}</p>',
        _table("runs", rows.RUN_COLUMNS, rows.run_rows(board, board.runs[:RUNS], numbers)),
        "</details>\n<h2>Provenance</h2>",
        _provenance(board),
        f'</main>\n<div id="tip" role="status" hidden></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n',
    )
    return "\n".join(part for part in parts if part)


def _head(board: Board, live: bool) -> Iterator[str]:
    policy = f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    better = "lower" if board.mode == "min" else "higher"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    renewed = f' data-live="{EVERY}"' if live else ""
    yield f'<!doctype html>\n<html lang="en"{renewed}>\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    if live:
        yield f'<noscript><meta http-equiv="refresh" content="{EVERY}"></noscript>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{text(board.name)}: sweep report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>"
    state = " The sweep is not over; this page renews itself." if live else ""
    yield f"<h1>{text(board.name)}</h1>"
    yield f'<p class="soft">Sweep report, {text(board.metric)}, {better} is better. {now}.{state}</p>'


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _said(sentences: Sequence[str]) -> str:
    lead = f'<p class="lead">{text(sentences[0])}</p>' if sentences else ""
    rest = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences[1:])
    return f'{lead}\n<ul class="said">{rest}</ul>' if rest else lead


def _chips(board: Board) -> str:
    counts = [(status, count) for status, count in board.counts().items() if count]
    chips = "".join(f'<li class="{status}">{count:,} {status}</li>' for status, count in counts)
    return f'<ul class="chips">{chips}</ul>' if chips else ""


def _more(count: int, limit: int, noun: str, file: str) -> str:
    return f"The first {limit:,} of {count:,} {noun} are listed; {file} has all. " if count > limit else ""


def _filters(board: Board) -> str:
    """A word for cells and runs, and a choice for every key with few values; the script shows the form."""
    if len(board.cells) < 2:
        return ""
    words = last_words(board.keys)
    fields: list[str] = []
    first = len(rows.columns(board)) - len(board.keys)
    for place, key in enumerate(board.keys):
        entries = dict.fromkeys(rows.swept(cell, key)[0] for cell in board.cells[:CELLS])
        if 1 < len(entries) <= OPTIONS and len(fields) < FILTERED:
            options = "".join(
                f'<option value="={text(told(value)) if value is not None else ""}">'
                f"{text(short(told(value), 40)) if value is not None else '(not set)'}</option>"
                for value in entries
            )
            choice = f'<select data-k="{first + place}"><option value="">any</option>{options}</select>'
            fields.append(f"<label>{text(short(words[key], 40))}{choice}</label>")
    word = '<label>Filter cells and runs<input type="search" placeholder="part of a name or status"></label>'
    return f'<form class="filters" hidden>{word}{"".join(fields)}<button type="reset">Clear</button><output></output></form>'


def _table(name: str, columns: Sequence[Column], body: Iterator[Row]) -> str:
    heads = "".join(
        f'<th scope="col" class="{kind}" title="{text(title)}"><button type="button">{text(head)}</button></th>'
        for head, title, kind in columns
    )
    lines = []
    for kind, number, entries in body:
        cells = "".join(
            f'<td class="{column[2]}" data-v="{"" if key is None else text(key)}">{html}</td>'
            for column, (key, html) in zip(columns, entries, strict=True)
        )
        own = "" if number is None else f' data-c="{number}"'
        lines.append(f'<tr class="{kind}"{own}>{cells}</tr>')
    table = f'<table class="sortable" id="{name}">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
    return f'<div class="box" tabindex="0">{table}{chr(10).join(lines)}\n</tbody>\n</table></div>'


def _variants(drawn: Drawn) -> Iterator[str]:
    if drawn.tuning:
        yield "<h2>Each variant at its own best</h2>"
        yield _table("variants", rows.variant_columns(drawn.tuning), rows.variant_rows(drawn.tuning, CELLS))
        said = _more(len(drawn.tuning.variants), CELLS, "variants", "leaderboard.csv")
        said += "A value at the edge of those tried may not be the best one; more values tried flatter a variant."
        yield f'<p class="note">{said}</p>'


def _charts(drawn: Drawn, numbers: dict[str, int]) -> Iterator[str]:
    board = drawn.board
    if made := charts.comparison(drawn, numbers):
        yield f"<h2>Comparison</h2>\n{made}"
        shown = sum(cell.estimate is not None for cell in board.cells)
        more = f" The best {drawing.ROWS} of {shown:,} cells." if shown > drawing.ROWS else ""
        yield f'<p class="note">Small: seeds. Large: mean and 95% t interval; hollow: not distinguishable from the best.{more}</p>'
    if made := charts.curves(drawn, numbers):
        yield f"<h2>Learning curves</h2>\n{made}"
    if made := charts_more.effects(drawn):
        yield f'<h2>What each key does</h2>\n<div class="panels">{made}</div>'
        noise = drawn.effects.noise
        said = [
            "Means over everything else; bars: 95% t interval between seeds where cells share them.",
            *caveats(drawn.effects),
        ]
        said += [f"Noise between seeds alone would explain about {percent(noise)}."] if noise is not None else []
        hidden = len(drawn.effects.several) - charts_more.PANELS
        said += [f"{many(hidden, 'less important key')} not drawn."] if hidden > 0 else []
        yield f'<p class="note">{text(" ".join(said))}</p>'
    if made := charts_more.heat_map(drawn):
        yield f"<h2>Two keys together</h2>\n{made}"
        yield '<p class="note">Mean of the cells with both values, over everything else; yellow is best.</p>'
    if made := charts.scatters(drawn, numbers):
        yield f'<h2>What the result costs</h2>\n<div class="panels">{made}</div>'
        few = len(board.finished) > drawing.DOTS
        more = " Of many cells some hundred are drawn, spread over the ranks." if few else ""
        yield f'<p class="note">Hollow, dashed: no cell is both cheaper and better (Pareto front).{more}</p>'
    yield '<p class="note">The folder plots holds these as PNG and SVG files, from the end of the sweep.</p>'


def _failures(board: Board, numbers: dict[str, int]) -> Iterator[str]:
    broken = [run for run in board.runs if run.status in ("failed", "diverged", "pruned")]
    if broken:
        broken.sort(key=lambda run: ("failed", "diverged", "pruned").index(run.status))
        yield "<h2>Runs that did not end well</h2>"
        yield _table("failures", rows.FAILURE_COLUMNS, rows.failure_rows(broken[:FAILURES], numbers))
        yield f'<p class="note">{_more(len(broken), FAILURES, "such runs", "runs.csv")}</p>'


def _pairs(found: Sequence[tuple[str, str, str]]) -> str:
    lines = [
        f'<tr><th scope="row" class="word">{text(name)}</th><td class="word long {kind}">{value}</td></tr>'
        for name, value, kind in found
    ]
    return '<div class="box" tabindex="0"><table>\n<tbody>\n' + "\n".join(lines) + "\n</tbody>\n</table></div>"


def _provenance(board: Board) -> str:
    found = provenance(board)
    if not found:
        return "<p>No run has ended yet, so nothing is known of where the results come from.</p>"
    pairs = []
    for field, values in found.items():
        several = len(values) > 1
        told_ = (
            text(short(value, 200)) + (f" ({many(count, 'run')})" if several else "") for value, count in values.items()
        )
        pairs.append((field, "<br>".join(told_), "bad" if several else ""))
    mixed = sum(len(values) > 1 for values in found.values())
    said = f"Runs differ in {mixed} of these fields." if mixed else "The same for every run that has ended."
    return f'<p class="note">{said}</p>\n{_pairs(pairs)}'
