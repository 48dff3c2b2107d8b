"""The report of a sweep: tables, plots and one page, from run folders alone, during the sweep and after it.

It is written so that it can be believed: a diverged or failed run is counted where its cell stands and never averaged,
one seed has no spread, a difference to the baseline is taken seed by seed, and the winner is told apart from it only if
the interval that allows for every comparison made says so.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core.options import nearest
from lab.process import side_by_side
from lab.reporting import drawing, page, plots, tables
from lab.reporting.cells import Listed, Run, board
from lab.reporting.reading import read
from lab.reporting.sentences import sentences
from lab.reporting.tuning import tuning
from lab.stats import finite

__all__ = ["Listed", "Summary", "write_report"]


@dataclass(frozen=True)
class Summary:
    """A sweep in short. `counts`: runs by status, every status a key; the best is None while no run is done.

    With tuned keys the best is a variant at its best value, and `cells` still counts all cells.
    """

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
    folder: Path,
    name: str,
    runs: Sequence[Listed],
    metric: str = "val_loss",
    mode: str = "min",
    *,
    tune: Sequence[str] = (),
    stop: str | None = None,
    live: bool = False,
) -> Summary:
    """Writes leaderboard.csv, leaderboard.md, runs.csv, plots/ and report.html into `folder` from the folders of `runs`.

    metric: any numeric field of result.json; mode: 'min' or 'max'. tune: keys of which each variant is compared at its own
    best value. stop: the sweep's early stopping ('halving', 'median'), which the report must speak of. live: the sweep is
    not over: the page renews itself, and plots/, which take most of the time, are left as they are.
    A run without result.json has not ended. Raises: ValueError where the mode is neither, a tuned key is not swept, or runs
    are done and none of them has the metric.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"sweep.objective.mode: {mode!r} is not allowed. {nearest(str(mode), ('min', 'max'))}")
    results = [read(run, metric) for run in runs]
    _refuse_unknown_metric(results, metric)
    whole = board(name, results, metric, mode)
    for key in tune:
        if whole.runs and key not in whole.keys:
            raise ValueError(f"sweep.tune: no axis sweeps '{key}'. {nearest(key, whole.keys)}")
    tuned = tuning(whole, tune) if tune else None
    if tuned and (reference := tuned.board.reference):
        origin = next(one.origin for one in tuned.variants if one.cell and one.cell.rank == reference.rank)
        whole = board(name, results, metric, mode, lambda cell: cell.name == origin)  # best is compared with best
    said = tuple(sentences(whole, tuned, stop))
    drawn = drawing.prepare(whole, tuned)
    _text(folder / "leaderboard.csv", tables.leaderboard_csv(whole))
    _text(folder / "runs.csv", tables.runs_csv(whole))
    _text(folder / "leaderboard.md", tables.leaderboard_md(whole, said, tuned))
    if not live:
        largest_first = sorted(plots.pictures(drawn), key=lambda picture: -picture.width * picture.height)
        side_by_side(largest_first, partial(_draw, folder / "plots"))
    _text(folder / "report.html", page.render(drawn, said, live), "replace")
    best = next(iter((tuned.board if tuned else whole).finished), None)
    mean = best.estimate.mean if best and best.estimate else None
    printed = [tables.variants_terminal(tuned), ""] if tuned else []
    path = folder / "report.html"
    text = "\n".join((*printed, tables.terminal(whole), *said, str(path)))
    text = text.replace("\N{MINUS SIGN}", "-").replace("…", "...")  # for terminals of any encoding
    return Summary(
        name, metric, mode, whole.counts(), len(whole.cells), best.name if best else None, mean, said, text, path
    )


def ready() -> None:
    """Imports what drawing takes, and draws for the first time, which takes longer, before it is needed."""
    for _ in plots.files(
        plots.Picture("nothing", 2, 1, lambda figure: plots.heading(plots.plain_axes(figure), "x", "x"))
    ):
        pass


def _draw(folder: Path, picture: plots.Picture) -> None:
    for file, content in plots.files(picture):
        _write(folder / file, content)


def _text(path: Path, content: str, errors: str = "backslashreplace") -> None:
    _write(path, content.encode("utf-8", errors))


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


def _refuse_unknown_metric(runs: Sequence[Run], metric: str) -> None:
    done = [run.result for run in runs if run.status == "done"]
    if done and not any(metric in result for result in done):
        known = {key for result in done for key, value in result.items() if finite(value) is not None}
        raise ValueError(f"sweep.objective.metric: no result has a field '{metric}'. {nearest(metric, known)}")
