"""The report of a sweep: a leaderboard, two plots and one page, from run folders alone, during the sweep and after it.

It is written so that it can be believed: a diverged or failed run is counted where its cell stands and never averaged,
one seed has no spread, a difference to the baseline is taken seed by seed, and the winner is told apart from it only if
the interval that allows for every comparison made says so.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.options import nearest
from lab import page, plots, stats
from lab.stats import Board, Cell, Listed, Point, Run, decimal, duration, interval, magnitude, short

__all__ = ["Listed", "Summary", "write_report"]

ENDED = ("done", "diverged", "failed", "pruned")
AVERAGED = ("parameters", "flops_per_token", "tokens_per_second", "seconds", "tokens", "iters")
COLUMNS = (
    *("rank", "cell", "status", "baseline", "n", "mean", "sd", "low", "high"),
    *("difference", "paired_n", "paired_difference", "paired_low", "paired_high"),
    *AVERAGED,
    *("diverged", "failed", "pruned", "unfinished"),
)
TOP = 10


@dataclass(frozen=True)
class Summary:
    """A sweep in short. `counts`: runs by status, every status a key; the best is None while no run is done."""

    name: str
    metric: str
    mode: str
    counts: dict[str, int]
    cells: int
    best_cell: str | None
    best_mean: float | None
    sentences: tuple[str, ...]
    text: str
    page: Path


def write_report(
    folder: Path, name: str, runs: Sequence[Listed], metric: str = "val_loss", mode: str = "min"
) -> Summary:
    """Writes leaderboard.csv, plots/ and report.html into `folder` from the folders of `runs`.

    `metric` is any numeric field of result.json, `mode` is 'min' or 'max'. A run without result.json has not ended.
    Raises: ValueError where the mode is neither, or runs are done and none of them has the metric.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"sweep.objective.mode: {mode!r} is not allowed. {nearest(str(mode), ('min', 'max'))}")
    read = [_read(run, metric) for run in runs]
    _refuse_unknown_metric(read, metric)
    board = stats.board(name, read, metric, mode)
    said = tuple(sentences(board))
    pictures = {"loss_curves": plots.loss_curves(board), "comparison": plots.comparison(board)}
    _write(folder / "leaderboard.csv", _leaderboard(board).encode("utf-8", "backslashreplace"))
    for title, picture in pictures.items():
        _write(folder / "plots" / f"{title}.png", picture)
    _write(folder / "report.html", page.render(board, said, pictures, provenance(board)).encode("utf-8", "replace"))
    best = board.finished[0] if board.finished else None
    mean = best.estimate.mean if best and best.estimate else None
    path = folder / "report.html"
    text = "\n".join((_table(board), *said, str(path))).replace("\N{MINUS SIGN}", "-")  # for terminals of any encoding
    return Summary(
        name, metric, mode, board.counts(), len(board.cells), best.name if best else None, mean, said, text, path
    )


def _write(path: Path, content: bytes) -> None:
    """Atomically, so that a reader of a running sweep's report never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's files are private, reports are shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(listed: Listed, metric: str) -> Run:
    curve = tuple(_curve(listed.folder / "metrics.jsonl"))
    try:
        result = json.loads((listed.folder / "result.json").read_bytes())
    except FileNotFoundError:
        begun = curve or any(listed.folder.glob("attempt-*.log")) or (listed.folder / "metrics.jsonl").exists()
        return Run(listed, "started" if begun else "pending", None, {}, curve)
    except (OSError, ValueError) as why:
        return Run(listed, "failed", None, {}, curve, f"result.json cannot be read: {why}")
    if not isinstance(result, dict) or result.get("status") not in ENDED:
        told = result.get("status") if isinstance(result, dict) else result
        return Run(listed, "failed", None, {}, curve, f"result.json has an unknown status: {told!r}")
    status, error = result["status"], result.get("error")
    value = stats.finite(result.get(metric)) if status == "done" else None
    return Run(listed, status, value, result, curve, str(error) if error else "")


def _curve(path: Path) -> Iterator[Point]:
    """The evaluations in a metrics file, by iteration. Lines that do not parse (a killed run's last one) are left out.

    An iteration told twice, by an attempt that was killed and by the one that repeated it, keeps the later word.
    """
    points: dict[int, Point] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        if b'"eval"' not in line:  # most lines are of training: not parsing them is most of the speed
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or record.get("kind") != "eval":
            continue
        at, tokens, loss = (stats.finite(record.get(key)) for key in ("iter", "tokens", "val_loss"))
        if at is not None and loss is not None:
            points[int(at)] = Point(int(at), None if tokens is None else int(tokens), loss)
    yield from (points[at] for at in sorted(points))


def _refuse_unknown_metric(runs: Sequence[Run], metric: str) -> None:
    done = [run.result for run in runs if run.status == "done"]
    if done and not any(metric in result for result in done):
        known = {key for result in done for key, value in result.items() if stats.finite(value) is not None}
        raise ValueError(f"sweep.objective.metric: no result has a field '{metric}'. {nearest(metric, known)}")


def _leaderboard(board: Board) -> str:
    """The table as CSV, numbers in full precision. A swept key named like a column gets 'changed.' before it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"changed.{key}" if key in COLUMNS else key for key in board.keys)])
    for cell in board.cells:
        writer.writerow(
            [*_row(cell), *(stats.told(cell.changed[key]) if key in cell.changed else "" for key in board.keys)]
        )
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
    ]


def sentences(board: Board) -> Iterator[str]:
    """The outcome in words: what won, whether that can be told from chance, what did not finish, what differs."""
    if not board.finished:
        yield "No run has finished yet." if board.runs else "The sweep lists no runs."
    else:
        yield from _winner(board)
    yield _progress(board)
    lossy = [cell for cell in board.finished[:1] if len(cell.values) < len(cell.runs)]
    for cell in lossy:
        yield f"The mean of '{short(cell.name, 60)}' is over its finished seeds alone ({cell.status})."
    tokens = [seen for cell in board.finished if (seen := cell.mean("tokens")) is not None]
    if tokens and min(tokens) < max(tokens):
        yield f"Cells saw different numbers of training tokens, {magnitude(min(tokens))} to {magnitude(max(tokens))}."
    packed = [size for run in board.runs if (size := run.number("pack") or 1) > 1]
    if packed:
        yield f"{_many(len(packed), 'run')} of {len(board.runs):,} shared a process with others, at most {max(packed):g} in one."
    mixed = [field for field, values in provenance(board).items() if len(values) > 1]
    if mixed:
        yield f"Runs differ in where they come from ({', '.join(mixed)}): see the provenance before comparing."


def _winner(board: Board) -> Iterator[str]:
    best, reference = board.finished[0], board.reference
    assert best.estimate
    found = f"{board.metric} {decimal(best.estimate.mean)} ({_spread(best)})"
    wanted = "lowest" if board.mode == "min" else "highest"
    if reference is None:
        of = _many(len(board.finished), "finished cell")
        yield f"'{short(best.name, 60)}' has the {wanted} mean {found} of {of}."
        if board.baselines:
            yield "No baseline run has finished, so nothing is compared with it."
        elif len(board.finished) > 1:
            yield "The sweep names no baseline, so no cell is tested against another."
        return
    one_of = f" (the best of {len(board.baselines)} baseline cells)" if len(board.baselines) > 1 else ""
    if best.name == reference.name:
        yield f"The baseline '{short(best.name, 60)}'{one_of} has the {wanted} mean {found}; no other cell beats it."
        return
    assert best.difference is not None
    side = "below" if board.mode == "min" else "above"
    yield (
        f"'{short(best.name, 60)}' has the {wanted} mean {found}, {decimal(abs(best.difference))} {side} "
        f"the baseline '{short(reference.name, 60)}'{one_of}."
    )
    yield _verdict(best, len(board.finished) - 1)


def _verdict(cell: Cell, comparisons: int) -> str:
    """Whether a cell can be told from the baseline. Having been picked as the best of many counts against it."""
    paired, wider = cell.paired, cell.corrected
    if paired is None or paired.low is None or wider is None:
        seeds = "only one finished seed" if paired else "no finished seed"
        return f"The two have {seeds} in common, so this cannot be told from the noise between seeds."
    told = (
        f"seed by seed the difference is {decimal(paired.mean, True)}, 95% interval {interval(paired)}, n = {paired.n}"
    )
    if not paired.excludes_zero():
        return f"It cannot be distinguished from the baseline: {told}."
    if comparisons < 2:
        return f"It can be distinguished from the baseline: {told}."
    allowed = f"allowing for {comparisons} comparisons (Bonferroni) the interval is {interval(wider)}"
    if not wider.excludes_zero():
        return f"The evidence for a difference is weak: {told}, but {allowed} and includes zero."
    return f"It can be distinguished from the baseline: {told}; {allowed} and still excludes zero."


def _spread(cell: Cell) -> str:
    assert cell.estimate
    if cell.estimate.sd is None:
        return "1 seed, so no spread is known"
    return f"sd {decimal(cell.estimate.sd)} over {cell.estimate.n} seeds"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _progress(board: Board) -> str:
    parts = [f"{count:,} {status}" for status, count in board.counts().items() if count or status == "done"]
    return f"{_many(len(board.runs), 'run')} in {_many(len(board.cells), 'cell')}: {', '.join(parts)}."


def provenance(board: Board) -> dict[str, dict[str, int]]:
    """For every provenance field ('versions.torch'), how many ended runs have which value."""
    seen: dict[str, Counter[str]] = {}
    for run in board.runs:
        for field, value in _flat(run.result.get("provenance")):
            seen.setdefault(field, Counter())[stats.clean(stats.told(value))] += 1
    return {field: dict(values.most_common()) for field, values in seen.items()}


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        name = f"{prefix}{stats.clean(str(key))}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _table(board: Board) -> str:
    """The best cells for a terminal, and the reference if it is not among them."""
    shown = list(board.cells[:TOP])
    if board.reference and board.reference.name not in {cell.name for cell in shown}:
        shown.append(board.reference)
    heads = ("#", "cell", board.metric, "sd", "n", "to baseline", "params", "tok/s", "time", "")
    rows = [heads, *(_line(cell, board.reference) for cell in shown)]
    used = [i for i in range(len(heads)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    lines = (
        "  ".join(row[i].ljust(widths[i]) if i in (1, 9) else row[i].rjust(widths[i]) for i in used) for row in rows
    )
    hidden = len(board.cells) - len(shown)
    more = [f"... and {_many(hidden, 'more cell')} in leaderboard.csv"] if hidden > 0 else []
    return "\n".join([*(line.rstrip() for line in lines), *more])


def _line(cell: Cell, reference: Cell | None) -> tuple[str, ...]:
    mean = cell.estimate
    against = cell.paired.mean if cell.paired else cell.difference
    return (
        str(cell.rank or "-"),
        short(cell.name, 64),
        decimal(mean.mean) if mean else "",
        decimal(mean.sd) if mean else "",
        str(len(cell.values)),
        "baseline" if cell is reference else decimal(against, True),
        magnitude(cell.mean("parameters")),
        magnitude(cell.mean("tokens_per_second")),
        duration(cell.mean("seconds")),
        "" if cell.status == "done" else cell.status,
    )
