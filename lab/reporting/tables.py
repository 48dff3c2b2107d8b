"""The tables that are files or go to a terminal: leaderboard.csv, runs.csv, leaderboard.md and the best cells in print."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lab.reporting.cells import Board, Cell, Mark, Run
from lab.reporting.numbers import (
    brief,
    chance,
    clean,
    decimal,
    duration,
    interval,
    last_words,
    magnitude,
    many,
    short,
    told,
)
from lab.reporting.tuning import Tuned, Tuning
from lab.stats import finite

AVERAGED = ("parameters", "flops_per_token", "tokens_per_second", "seconds", "tokens", "iters")
COLUMNS = (
    *("rank", "cell", "status", "baseline", "n", "mean", "sd", "low", "high"),
    *("difference", "paired_n", "paired_difference", "paired_low", "paired_high"),
    *AVERAGED,
    *("diverged", "failed", "pruned", "unfinished"),
    *("p", "p_holm", "against_best", "fresh_seeds", "remarks"),
)
RUN_COLUMNS = (
    *("run", "cell", "seed", "phase", "status", "value", "iters", "tokens", "seconds", "device", "attempt", "pack"),
    *("cause", "error"),
)
MARKS: dict[Mark, str] = {
    "best": "best",
    "same": "not distinguishable",
    "likely": "likely worse",
    "worse": "worse",
    "unknown": "unknown",
}
TOP, MARKDOWN_ROWS = 10, 100
NONE: Mapping[str, str] = {}


def leaderboard_csv(board: Board, sweeps: Mapping[str, str] = NONE) -> str:
    """The cells as CSV, numbers in full precision. A swept key named like a column gets 'changed.' before it.

    sweeps: by cell, which sweeps it is in, where there are several; then the last column.
    """
    heads = [*COLUMNS, *(f"changed.{key}" if key in COLUMNS else key for key in board.keys)]
    rows = []
    for cell in board.cells:
        swept = (told(cell.changed[key]) if key in cell.changed else "" for key in board.keys)
        rows.append([*_row(cell), *swept, *([sweeps[cell.name]] if sweeps else [])])
    return _csv([*heads, *(["sweeps"] if sweeps else [])], rows)


def runs_csv(board: Board) -> str:
    """Every run as CSV, in the order of the cells; of an error its last line."""
    return _csv(RUN_COLUMNS, (_run(run, board.metric) for run in board.runs))


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return out.getvalue()


def _row(cell: Cell) -> list[Any]:
    """The values of COLUMNS; None becomes an empty field."""
    mean, paired = cell.estimate, cell.paired
    return [
        *(cell.rank, cell.name, cell.status, "yes" if cell.baseline else "no", len(cell.values)),
        *((mean.mean, mean.sd, mean.low, mean.high) if mean else (None,) * 4),
        cell.difference,
        *((paired.n, paired.mean, paired.low, paired.high) if paired else (None,) * 4),
        *(cell.mean(field) for field in AVERAGED),
        *(cell.count("diverged"), cell.count("failed"), cell.count("pruned"), cell.count("started", "pending")),
        *(paired.p if paired else None, cell.adjusted, MARKS[cell.mark] if mean else None),
        *("yes" if cell.fresh else "no", "; ".join(cell.remarks)),
    ]


def _run(run: Run, metric: str) -> list[Any]:
    told_ = run.result.get("provenance")
    device = told_.get("device") if isinstance(told_, dict) else None
    seen = run.value if run.value is not None else finite(run.result.get(metric))
    return [
        *(run.listed.run_id, run.listed.cell, run.listed.seed, run.listed.phase, run.status, seen),
        *(run.iters, run.number("tokens"), run.number("seconds"), device, run.number("attempt"), run.number("pack")),
        *(run.cause, last_line(run.error)),
    ]


def last_line(error: str) -> str:
    """The last line of an error's text, cleaned: where Python says what was wrong."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    return clean(lines[-1].strip()) if lines else ""


# Markdown -------------------------------------------------------------------------------------------------------------------


def leaderboard_md(board: Board, sentences: Sequence[str], tuning: Tuning | None) -> str:
    """The best cells as a Markdown table for papers and threads, with the sentences; names cannot leave their field."""
    parts = [f"# {plain(board.name)}", "", plain(" ".join(sentences)), ""]
    if tuning:
        parts += ["## Each variant at its own best", "", *variants_md(tuning), "", "## All cells", ""]
    parts += cells_md(board)
    return "\n".join(parts) + "\n"


def cells_md(board: Board, more: str = "leaderboard.csv", sweeps: Mapping[str, str] = NONE) -> list[str]:
    """The lines of the table of cells. more: where the cells are that it leaves out; sweeps: as in `leaderboard_csv`."""
    shown = list(board.cells[:MARKDOWN_ROWS])
    if board.reference and board.reference not in shown:
        shown.append(board.reference)
    against = ["to baseline", "95% interval", "p", "p (Holm)"] if board.reference else []
    heads = ["#", "cell", board.metric, "±", "sd", "n", *against, "against the best", "params", "time"]
    heads += [*(["sweeps"] if sweeps else []), "remarks"]
    lines = [_md(heads), _md(["---:" if head not in ("cell", "sweeps", "remarks") else "---" for head in heads], False)]
    for cell in shown:
        mean = cell.estimate
        lines.append(
            _md(
                [
                    *(str(cell.rank or ""), cell.name, decimal(mean.mean) if mean else ""),
                    *(decimal(mean.half) if mean else "", decimal(mean.sd) if mean else "", str(len(cell.values))),
                    *(_versus(cell, board.reference) if board.reference else ()),
                    *(MARKS[cell.mark] if mean else "", magnitude(cell.mean("parameters"))),
                    duration(cell.mean("seconds")),
                    *([sweeps[cell.name]] if sweeps else []),
                    "; ".join(notes(cell)),
                ]
            )
        )
    if len(board.cells) > len(shown):
        lines += ["", f"{many(len(board.cells) - len(shown), 'more cell')}: {more}."]
    return lines


def variants_md(tuning: Tuning) -> list[str]:
    """The lines of the table of variants, each at its own best value."""
    heads = ["#", "variant", *tuning.keys, tuning.board.metric, "n", "to baseline", "p", "tried", "warnings"]
    lines = [_md(heads), _md(["---"] * len(heads), False)]
    for one in tuning.variants[:MARKDOWN_ROWS]:
        lines.append(_md(_variant(one, tuning)))
    return lines


def _variant(one: Tuned, tuning: Tuning) -> list[str]:
    cell = one.cell
    mean = cell.estimate if cell else None
    versus = _versus(cell, tuning.board.reference) if cell else ["", "", "", ""]
    return [
        *(str(cell.rank) if cell else "", one.name),
        *(brief(one.values[key]) if key in one.values else "" for key in tuning.keys),
        *(decimal(mean.mean) if mean else "", str(mean.n) if mean else ""),
        *(versus[0], versus[2], str(one.tried), "; ".join(one.warnings)),
    ]


def notes(cell: Cell) -> list[str]:
    """The status where it is not plainly done, and the remarks."""
    return [*([] if cell.status == "done" else [cell.status]), *(r for r in cell.remarks if r != "not finished")]


def _versus(cell: Cell, reference: Cell | None) -> list[str]:
    """The paired difference, its interval, its p-value and that after Holm's correction."""
    if reference is None:
        return [""] * 4
    if cell.rank is not None and cell.rank == reference.rank:
        return ["baseline", "", "", ""]
    paired = cell.paired
    if paired is None:
        shown = decimal(cell.difference, True)
        return [f"{shown} (unpaired)" if shown else "", "", "", ""]
    known = interval(paired) if paired.low is not None else ""
    return [decimal(paired.mean, True), known, chance(paired.p), chance(cell.adjusted)]


def _md(fields: Sequence[str], escaped: bool = True) -> str:
    return "| " + " | ".join(plain(field) if escaped else field for field in fields) + " |"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: on one line, every sign with a meaning escaped."""
    kept = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", kept)


# The terminal ---------------------------------------------------------------------------------------------------------------


def terminal(board: Board, more: str = "leaderboard.csv", sweeps: Mapping[str, str] = NONE, top: int = TOP) -> str:
    """The best cells for a terminal, and the reference if it is not among them. sweeps: as in `leaderboard_csv`."""
    shown = list(board.cells[:top])
    if board.reference and board.reference.name not in {cell.name for cell in shown}:
        shown.append(board.reference)
    heads = ("#", "cell", board.metric, "sd", "n", "to baseline", "p", "params", "tok/s", "time", "sweeps", "")
    rows = [heads, *(_line(cell, board, sweeps.get(cell.name, "")) for cell in shown)]
    hidden = len(board.cells) - len(shown)
    return aligned(rows, (1, 10, 11)) + (f"\n... and {many(hidden, 'more cell')} in {more}" if hidden > 0 else "")


def aligned(rows: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    """Rows under their heads, the first of them, without empty columns; columns in `words` are flush left."""
    rows = [[clean(field) for field in row] for row in rows]
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    lines = (
        "  ".join(row[i].ljust(widths[i]) if i in words else row[i].rjust(widths[i]) for i in used) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _line(cell: Cell, board: Board, sweeps: str) -> tuple[str, ...]:
    mean = cell.estimate
    against = cell.paired.mean if cell.paired else cell.difference
    is_reference = board.reference is not None and cell.rank is not None and cell.rank == board.reference.rank
    best = ["not distinguishable from the best"] if cell.mark == "same" else []
    return (
        str(cell.rank or "-"),
        short(cell.name, 64),
        decimal(mean.mean) if mean else "",
        decimal(mean.sd) if mean else "",
        str(len(cell.values)),
        "baseline" if is_reference else decimal(against, True),
        chance(cell.paired.p) if cell.paired else "",
        magnitude(cell.mean("parameters")),
        magnitude(cell.mean("tokens_per_second")),
        duration(cell.mean("seconds")),
        short(sweeps, 40),
        "; ".join([*notes(cell), *best]),
    )


def variants_terminal(tuning: Tuning) -> str:
    """Each variant at its own best value, for a terminal."""
    words = last_words(tuning.keys)
    heads = [
        "#",
        "variant",
        *(words[key] for key in tuning.keys),
        tuning.board.metric,
        "n",
        "to baseline",
        "p",
        "tried",
        "",
    ]
    rows = [heads, *(_variant(one, tuning) for one in tuning.variants[:TOP])]
    short_rows = [[row[0], short(row[1], 64), *row[2:-1], short(row[-1], 80)] for row in rows]
    return aligned(short_rows, (1, len(heads) - 1))
