"""report.html: one file that needs nothing else. Plots are inlined, the network is forbidden by its own content policy.

Every text that came from a user or a run (names, labels, values, errors) passes through `text`, and the policy allows
this file's own script alone: a name that looks like markup is shown, not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from lab.stats import STATUSES, Board, Cell, Run, clean, decimal, duration, finite, interval, magnitude, short, told

TAIL_LINES, TAIL_CHARACTERS = 12, 1200
ALTS = {
    "loss_curves": "Validation loss against training tokens, one line per cell with a band over its seeds.",
    "comparison": "Final metric by cell, best on top: seeds, mean and 95% interval; the baseline is a dashed line.",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2328; --soft: #5c6670; --line: #dfe3e7; --back: #fff; --card: #f6f7f9;
  --mark: #0b63a5; --good: #00734f; --bad: #b3380c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8eb; --soft: #a0abb5; --line: #343c43; --back: #14181c; --card: #1c2227;
    --mark: #6cb8ef; --good: #4cc79c; --bad: #f49166; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 3rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2, summary { font-size: 1.15rem; font-weight: 600; margin: 2.2rem 0 .6rem; }
summary { cursor: pointer; }
p { max-width: 48rem; margin: .6rem 0; }
.soft, .note { color: var(--soft); font-size: .87rem; }
.chips { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; padding: 0; list-style: none; }
.chips li { background: var(--card); border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .75rem;
  font-size: .87rem; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); background: var(--back); }
tbody tr:last-child > * { border-bottom: 0; }
th, tbody tr:hover > * { background: var(--card); }
th { font-weight: 600; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
th button::after { content: " \\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--mark); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--mark); }
.word { text-align: left; }
.long { white-space: normal; min-width: 15rem; max-width: 26rem; overflow-wrap: break-word; }
.stay { position: sticky; left: 0; border-right: 1px solid var(--line); }
tr.baseline td { font-weight: 600; }
tr.open td { color: var(--soft); }
.good, .done { color: var(--good); }
.bad, .diverged, .failed { color: var(--bad); }
figure { margin: 1.4rem 0; overflow-x: auto; }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: .5rem; }
pre { margin: 0; max-width: 44rem; max-height: 16rem; overflow: auto; white-space: pre-wrap; text-align: left;
  font-size: .8rem; }
@media (max-width: 40rem) {
  body { padding: 1.1rem .8rem 2rem; }
  h1 { font-size: 1.35rem; }
  th, td { padding: .38rem .5rem; }
  .long { min-width: 8rem; }
  img { min-width: 44rem; }
}
@media print { .box { overflow: visible; } }
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[i].dataset.v;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const numbers = isFinite(x) && isFinite(y);
      const order = numbers ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
});
"""


def text(value: object) -> str:
    """Any value as HTML text or attribute: cleaned and escaped."""
    return escape(clean(str(value)), quote=True)


def render(
    board: Board, sentences: Sequence[str], pictures: Mapping[str, bytes], provenance: Mapping[str, Mapping[str, int]]
) -> str:
    """The page. `pictures` are PNG bytes by the names of ALTS; `provenance` counts runs by field and value."""
    better = "lower" if board.mode == "min" else "higher"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'"
    )
    counts = [(status, count) for status, count in board.counts().items() if count]
    chips = "".join(f'<li class="{status}">{count:,} {status}</li>' for status, count in counts)
    parts = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(board.name)}: sweep report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{text(board.name)}</h1>",
        f'<p class="soft">Sweep report, {text(board.metric)}, {better} is better. {now}.</p>',
        f"<p>{' '.join(text(sentence) for sentence in sentences)}</p>",
        f'<ul class="chips">{chips}</ul>' if chips else "",
        "<h2>Cells</h2>",
        _table(_columns(board), _cell_rows(board)),
        f'<p class="note">{_legend(board)}</p>',
        "<h2>Plots</h2>",
        *(_figure(name, picture) for name, picture in pictures.items()),
        f"<details>\n<summary>All {len(board.runs):,} runs</summary>",
        _table(RUN_COLUMNS, (_run_row(board, run) for run in board.runs)),
        "</details>\n<h2>Provenance</h2>",
        _provenance(provenance),
        f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
    )
    return "\n".join(part for part in parts if part)


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _figure(name: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode("ascii")
    return f'<figure tabindex="0"><img src="data:image/png;base64,{data}" alt="{ALTS[name]}"></figure>'


# Tables: a column is its head, its title and its class; a cell of a row is the key it sorts by and its HTML

Column = tuple[str, str, str]
Entry = tuple[object, str]
RUN_COLUMNS: tuple[Column, ...] = (
    ("run", "", "word long"),
    ("cell", "", "word long"),
    ("seed", "", ""),
    ("status", "", "word"),
    ("metric", "Metric of a run that is done; in brackets: how far another one came", ""),
    ("iterations", "Completed updates", ""),
    ("time", "Training time over all attempts", ""),
    ("pack", "Runs that were trained in its process", ""),
    ("error", "The end of the error text", "word"),
)


def _table(columns: Sequence[Column], rows: Iterator[tuple[str, list[Entry]]]) -> str:
    heads = "".join(
        f'<th scope="col" class="{kind}" title="{text(title)}"><button type="button">{text(head)}</button></th>'
        for head, title, kind in columns
    )
    body = []
    for kind, entries in rows:
        cells = "".join(
            f'<td class="{column[2]}" data-v="{"" if key is None else text(key)}">{html}</td>'
            for column, (key, html) in zip(columns, entries, strict=True)
        )
        body.append(f'<tr class="{kind}">{cells}</tr>')
    table = f"<table class=sortable>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n"
    return f'<div class="box" tabindex="0">{table}{chr(10).join(body)}\n</tbody>\n</table></div>'


def _columns(board: Board) -> list[Column]:
    against: list[Column] = [
        ("to baseline", "Paired difference on common seeds", ""),
        ("95% interval", "Of that difference", ""),
    ]
    return [
        ("#", "Rank by mean", ""),
        ("cell", "Runs that differ in nothing but the seed", "word long stay"),
        (clean(board.metric), "Mean over finished seeds", ""),
        ("sd", "Standard deviation between seeds (n - 1)", ""),
        ("n", "Finished seeds", ""),
        ("status", "", "word"),
        *(against if board.reference else []),
        ("params", "Parameters", ""),
        ("FLOPs/token", "Per token of training", ""),
        ("tokens/s", "Mean over finished seeds", ""),
        ("time", "Mean over finished seeds", ""),
        *((_last(key, board.keys), key, "word") for key in board.keys),
    ]


def _last(key: str, keys: Sequence[str]) -> str:
    """The last word of a dotted key, or the key itself where another one ends alike."""
    end = key.rsplit(".", 1)[-1]
    return clean(key if sum(other.rsplit(".", 1)[-1] == end for other in keys) > 1 else end)


def _cell_rows(board: Board) -> Iterator[tuple[str, list[Entry]]]:
    for cell in board.cells:
        kind = "baseline" if cell.baseline else "open" if cell.rank is None else ""
        yield kind, _cell_row(board, cell)


def _cell_row(board: Board, cell: Cell) -> list[Entry]:
    found = cell.estimate
    numbers = [(field, magnitude) for field in ("parameters", "flops_per_token", "tokens_per_second")]
    bad = "diverged" if cell.count("diverged", "failed") else "done" if cell.status == "done" else ""
    return [
        (cell.rank, str(cell.rank or "")),
        (cell.name, text(cell.name)),
        (found and found.mean, decimal(found.mean) if found else "&ndash;"),
        (found and found.sd, decimal(found.sd) if found else ""),
        (len(cell.values), str(len(cell.values))),
        (cell.status, f'<span class="{bad}">{text(cell.status)}</span>'),
        *(_against(board, cell) if board.reference else []),
        *((value, told(value)) for value, told in ((cell.mean(field), told) for field, told in numbers)),
        (cell.mean("seconds"), duration(cell.mean("seconds"))),
        *(_swept(cell, key) for key in board.keys),
    ]


def _against(board: Board, cell: Cell) -> list[Entry]:
    """The two entries about the baseline. Better and worse are coloured only where the interval excludes zero."""
    if cell is board.reference:
        return [(0.0, "baseline"), (None, "")]
    paired = cell.paired
    if paired is None:
        return [
            (cell.difference, decimal(cell.difference, True) + (" (unpaired)" if cell.estimate else "")),
            (None, ""),
        ]
    few = f" (n = {paired.n})" if paired.n < len(cell.values) else ""
    if paired.low is None:
        return [(paired.mean, decimal(paired.mean, True) + few), (None, "")]
    better = (paired.mean < 0) == (board.mode == "min")
    kind = ("good" if better else "bad") if paired.excludes_zero() else ""
    return [
        (paired.mean, f'<span class="{kind}">{decimal(paired.mean, True)}</span>{few}'),
        (paired.low, interval(paired)),
    ]


def _swept(cell: Cell, key: str) -> Entry:
    if key not in cell.changed:
        return None, ""
    value: Any = cell.changed[key]
    shown = f"{value:g}" if isinstance(value, float) and finite(value) is not None else told(value)
    return (
        value if finite(value) is not None else told(value)
    ), f'<span title="{text(told(value))}">{text(short(shown, 48))}</span>'


def _legend(board: Board) -> str:
    said = ["Means are over finished seeds alone: diverged, failed and unfinished runs are counted, never averaged."]
    if board.reference:
        said.append(
            f"Differences are to '{text(short(board.reference.name, 60))}', seed by seed on common seeds, and coloured "
            "where their 95% t interval excludes zero; of many cells, some do so by chance."
        )
    said.append("Full precision: leaderboard.csv.")
    return " ".join(said)


def _run_row(board: Board, run: Run) -> tuple[str, list[Entry]]:
    loss = run.value
    reached = None if loss is not None else run.number(board.metric)
    shown = decimal(loss) or (f"({decimal(reached)})" if reached is not None else "")
    at = run.number("iters")
    if at is None and run.curve:
        at = run.curve[-1].iter
    entries: list[Entry] = [
        (run.listed.run_id, text(run.listed.run_id)),
        (run.listed.cell, text(run.listed.cell)),
        (run.listed.seed, str(run.listed.seed)),
        (STATUSES.index(run.status), f'<span class="{run.status}">{run.status}</span>'),
        (loss if loss is not None else reached, shown),
        (at, "" if at is None else f"{at:,.0f}"),
        (run.number("seconds"), duration(run.number("seconds"))),
        (run.number("pack"), magnitude(run.number("pack"))),
        ("1" if run.error else None, f"<pre>{_tail(run.error)}</pre>" if run.error else ""),
    ]
    return "", entries


def _tail(error: str) -> str:
    lines = [clean(line) for line in error.strip().split("\n")]
    kept = "\n".join(lines[-TAIL_LINES:])
    cut = len(lines) > TAIL_LINES or len(kept) > TAIL_CHARACTERS
    return ("…\n" if cut else "") + escape(kept[-TAIL_CHARACTERS:], quote=True)


def _provenance(provenance: Mapping[str, Mapping[str, int]]) -> str:
    if not provenance:
        return "<p>No run has ended yet, so nothing is known of where the results come from.</p>"
    rows = []
    for field, values in provenance.items():
        many = len(values) > 1
        found = (
            text(short(value, 200)) + (f" ({count:,} run{'' if count == 1 else 's'})" if many else "")
            for value, count in values.items()
        )
        kind = "word long bad" if many else "word long"
        rows.append(
            f'<tr><th scope="row" class="word">{text(field)}</th><td class="{kind}">{"<br>".join(found)}</td></tr>'
        )
    mixed = sum(len(values) > 1 for values in provenance.values())
    said = f"Runs differ in {mixed} of these fields." if mixed else "The same for every run that has ended."
    table = "<table>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"
    return f'<p class="note">{said}</p>\n<div class="box" tabindex="0">{table}</div>'
