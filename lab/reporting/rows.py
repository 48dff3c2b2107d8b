"""The rows of the page's tables. A cell of a row is the key that it sorts and is filtered by, and its HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lab.reporting.cells import ALPHA, STATUSES, Board, Cell, Run
from lab.reporting.charts import text
from lab.reporting.numbers import brief, chance, clean, decimal, duration, interval, last_words, magnitude, short, told
from lab.reporting.tables import notes
from lab.reporting.tuning import Tuning
from lab.stats import finite

TAIL_LINES, TAIL_CHARACTERS = 12, 1200
Column = tuple[str, str, str]  # its head, its title and its class
Entry = tuple[object, str]
Row = tuple[str, int | None, list[Entry]]  # its class, the number of its cell, its entries
MARKS = {"best": "best", "same": "not distinguishable", "likely": "likely worse", "worse": "worse", "unknown": "?"}
ORDER = ("best", "same", "unknown", "likely", "worse")
RUN_COLUMNS: tuple[Column, ...] = (
    ("run", "", "word long"),
    ("cell", "", "word long"),
    ("seed", "", ""),
    ("phase", "grid; search: chosen by a search; confirm: a chosen one again, with a fresh seed", "word"),
    ("status", "", "word"),
    ("metric", "Metric of a run that is done; in brackets: how far another one came", ""),
    ("iterations", "Completed updates", ""),
    ("time", "Training time over all attempts", ""),
    ("attempts", "How often it was started", ""),
    ("pack", "Runs that were trained in its process", ""),
    ("error", "The end of the error text", "word"),
)
FAILURE_COLUMNS: tuple[Column, ...] = (
    ("run", "", "word long"),
    ("status", "", "word"),
    ("cause", "exception, oom (out of memory) or killed", "word"),
    ("iterations", "Completed updates", ""),
    ("attempts", "How often it was started", ""),
    ("reason", "The end of the error text", "word"),
)
CAUSES = {"oom": "out of memory"}


def columns(board: Board) -> list[Column]:
    """Of the table of cells; the swept keys come last."""
    against: list[Column] = [
        ("to baseline", "Paired difference on common seeds", ""),
        ("95% interval", "Of that difference", ""),
        ("p", "Two-sided, paired t test", ""),
        ("p (Holm)", "The same, allowing for all comparisons with the baseline", ""),
    ]
    words = last_words(board.keys)
    return [
        ("#", "Rank by mean", ""),
        ("cell", "Runs that differ in nothing but the seed", "word long stay"),
        (clean(board.metric), "Mean over finished seeds", ""),
        ("±", "Half of its 95% t interval", ""),
        ("sd", "Standard deviation between seeds (n - 1)", ""),
        ("n", "Finished seeds", ""),
        ("status", "", "word"),
        ("against the best", "Paired t test on common seeds", "word"),
        *(against if board.reference else []),
        ("params", "Parameters", ""),
        ("FLOPs/token", "Per token of training", ""),
        ("tokens/s", "Mean over finished seeds", ""),
        ("time", "Mean over finished seeds", ""),
        ("remarks", "", "word"),
        *((words[key], key, "word") for key in board.keys),
    ]


def cell_rows(board: Board, numbers: Mapping[str, int], limit: int) -> Iterator[Row]:
    """The best cells, and the reference in any case."""
    shown = list(board.cells[:limit])
    if board.reference and board.reference not in shown:
        shown.append(board.reference)
    for cell in shown:
        yield _kind(cell), numbers[cell.name], _cell_row(board, cell)


def _kind(cell: Cell) -> str:
    return "baseline" if cell.baseline else "open" if cell.rank is None else ""


def _cell_row(board: Board, cell: Cell) -> list[Entry]:
    found = cell.estimate
    return [
        (cell.rank, str(cell.rank or "")),
        (cell.name, text(cell.name)),
        (found and found.mean, decimal(found.mean) if found else "&ndash;"),
        (found and found.half, decimal(found.half) if found else ""),
        (found and found.sd, decimal(found.sd) if found else ""),
        (len(cell.values), str(len(cell.values))),
        _status(cell),
        (ORDER.index(cell.mark), MARKS[cell.mark]) if found else (None, ""),
        *(_against(board, cell) if board.reference else []),
        *(
            (value, magnitude(value))
            for value in map(cell.mean, ("parameters", "flops_per_token", "tokens_per_second"))
        ),
        (cell.mean("seconds"), duration(cell.mean("seconds"))),
        ("; ".join(cell.remarks) or None, text("; ".join(cell.remarks))),
        *(swept(cell, key) for key in board.keys),
    ]


def _status(cell: Cell) -> Entry:
    bad = "diverged" if cell.count("diverged", "failed") else "done" if cell.status == "done" else ""
    return cell.status, f'<span class="{bad}">{text(cell.status)}</span>'


def _against(board: Board, cell: Cell) -> list[Entry]:
    """The entries about the baseline. Better and worse are coloured only where all comparisons are allowed for."""
    if cell is board.reference:
        return [(0.0, "baseline"), (None, ""), (None, ""), (None, "")]
    paired = cell.paired
    if paired is None:
        shown = decimal(cell.difference, True) + (" (unpaired)" if cell.estimate else "")
        return [(cell.difference, shown), (None, ""), (None, ""), (None, "")]
    few = f" (n = {paired.n})" if paired.n < len(cell.values) else ""
    if paired.low is None:
        return [(paired.mean, decimal(paired.mean, True) + few), (None, ""), (None, ""), (None, "")]
    better = (paired.mean < 0) == (board.mode == "min")
    kind = ("good" if better else "bad") if cell.adjusted is not None and cell.adjusted < ALPHA else ""
    return [
        (paired.mean, f'<span class="{kind}">{decimal(paired.mean, True)}</span>{few}'),
        (paired.low, interval(paired)),
        (paired.p, text(chance(paired.p))),
        (cell.adjusted, f'<span class="{kind}">{text(chance(cell.adjusted))}</span>'),
    ]


def swept(cell: Cell, key: str) -> Entry:
    """A swept key's value."""
    if key not in cell.changed:
        return None, ""
    value: Any = cell.changed[key]
    shown = f'<span title="{text(told(value))}">{text(short(brief(value), 48))}</span>'
    return (value if finite(value) is not None else told(value)), shown


def legend(board: Board) -> str:
    """How to read the table of cells."""
    said = ["Means are over finished seeds alone: diverged, failed and unfinished runs are counted, never averaged."]
    if board.reference:
        said.append(
            f"Differences are to '{text(short(board.reference.name, 60))}', seed by seed on common seeds, and coloured "
            "where p is below 0.05 after Holm's correction for all these comparisons."
        )
    said.append(
        "Against the best: 'not distinguishable' where the 95% t interval of the paired difference on common seeds includes "
        "zero, 'worse' where p is below 0.05 also after Holm's correction, 'likely worse' between the two, '?' where fewer "
        "than two seeds are in common, which says nothing."
    )
    said.append("Full precision: leaderboard.csv.")
    return " ".join(said)


# Variants -------------------------------------------------------------------------------------------------------------------


def variant_columns(tuning: Tuning) -> list[Column]:
    words = last_words(tuning.keys)
    return [
        ("#", "Rank by mean", ""),
        ("variant", "Cells that differ in the tuned keys alone", "word long stay"),
        *((f"best {words[key]}", key, "") for key in tuning.keys),
        (clean(tuning.board.metric), "Mean at that value", ""),
        ("±", "Half of its 95% t interval", ""),
        ("n", "Finished seeds", ""),
        ("against the best", "Paired t test on common seeds", "word"),
        ("to baseline", "Paired difference, best against best, on common seeds", ""),
        ("95% interval", "Of that difference", ""),
        ("p", "Two-sided, paired t test", ""),
        ("p (Holm)", "The same, allowing for all comparisons with the baseline", ""),
        ("tried", "Values of the tuned keys that were tried", ""),
        ("warnings", "", "word long"),
    ]


def variant_rows(tuning: Tuning, limit: int) -> Iterator[Row]:
    board = tuning.board
    for one in tuning.variants[:limit]:
        cell = one.cell
        mean = cell.estimate if cell else None
        against: list[Entry] = _against(board, cell) if cell and board.reference else [(None, "")] * 4
        warnings = "; ".join([*one.warnings, *(notes(cell) if cell else [])])
        entries: list[Entry] = [
            (cell.rank, str(cell.rank)) if cell else (None, ""),
            (one.name, text(one.name)),
            *(
                (one.values[k], text(short(brief(one.values[k]), 48))) if k in one.values else (None, "")
                for k in tuning.keys
            ),
            (mean.mean, decimal(mean.mean)) if mean else (None, "&ndash;"),
            (mean.half, decimal(mean.half)) if mean else (None, ""),
            (mean.n, str(mean.n)) if mean else (0, "0"),
            (ORDER.index(cell.mark), MARKS[cell.mark]) if cell else (None, ""),
            *against,
            (one.tried, str(one.tried)),
            (warnings or None, f'<span class="bad">{text(warnings)}</span>'),
        ]
        yield _kind(cell) if cell else "open", None, entries


# Runs -----------------------------------------------------------------------------------------------------------------------


def run_rows(board: Board, runs: Sequence[Run], numbers: Mapping[str, int]) -> Iterator[Row]:
    for run in runs:
        loss = run.value
        reached = None if loss is not None else run.number(board.metric)
        shown = decimal(loss) or (f"({decimal(reached)})" if reached is not None else "")
        entries: list[Entry] = [
            (run.listed.run_id, text(run.listed.run_id)),
            (run.listed.cell, text(run.listed.cell)),
            (run.listed.seed, str(run.listed.seed)),
            (run.listed.phase, text(run.listed.phase)),
            (STATUSES.index(run.status), f'<span class="{run.status}">{run.status}</span>'),
            (loss if loss is not None else reached, shown),
            _iterations(run),
            (run.number("seconds"), duration(run.number("seconds"))),
            (run.number("attempt"), magnitude(run.number("attempt"))),
            (run.number("pack"), magnitude(run.number("pack"))),
            ("1" if run.error else None, f"<pre>{_tail(run.error)}</pre>" if run.error else ""),
        ]
        yield "", numbers[run.listed.cell], entries


def _iterations(run: Run) -> Entry:
    return run.iters, "" if run.iters is None else f"{run.iters:,}"


def failure_rows(runs: Sequence[Run], numbers: Mapping[str, int]) -> Iterator[Row]:
    """Runs that failed, diverged or were pruned, and why."""
    for run in runs:
        reason = run.error or {"diverged": "its loss is not finite", "pruned": "stopped early"}.get(run.status, "")
        attempt = run.number("attempt")
        entries: list[Entry] = [
            (run.listed.run_id, text(run.listed.run_id)),
            (STATUSES.index(run.status), f'<span class="{run.status}">{run.status}</span>'),
            (run.cause or None, text(CAUSES.get(run.cause, run.cause))),
            _iterations(run),
            (attempt, magnitude(attempt)),
            (reason[-40:] or None, f"<pre>{_tail(reason)}</pre>"),
        ]
        yield "", numbers[run.listed.cell], entries


def _tail(error: str) -> str:
    lines = [clean(line) for line in error.strip().split("\n")]
    kept = "\n".join(lines[-TAIL_LINES:])
    cut = len(lines) > TAIL_LINES or len(kept) > TAIL_CHARACTERS
    return ("…\n" if cut else "") + escape(kept[-TAIL_CHARACTERS:], quote=True)
