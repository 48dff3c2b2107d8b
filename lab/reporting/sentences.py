"""The outcome in words: what won, whether that can be told from chance, what did not finish, what the numbers hide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lab.reporting.cells import OPEN, Board, Cell
from lab.reporting.numbers import clean, decimal, duration, equals, interval, magnitude, many, percent, short, told
from lab.reporting.tuning import Tuning

STOPS = {"halving": "Successive halving", "median": "Median stopping"}


def sentences(board: Board, tuning: Tuning | None = None, stop: str | None = None) -> Iterator[str]:
    """The outcome of a sweep. With tuned keys the variants are compared, each at its best; else the cells."""
    compared = tuning.board if tuning else board
    if not compared.finished:
        yield "No run has finished yet." if board.runs else "The sweep lists no runs."
    else:
        yield from _winner(compared, "variant" if tuning else "cell")
    if tuning and compared.finished:
        yield from _tuned(tuning)
    yield from _searched(board)
    yield _progress(board)
    yield from _stopped(board, stop)
    for cell in (c for c in compared.finished[:1] if len(c.values) < len(c.counted)):
        yield f"The mean of '{short(cell.name, 60)}' is over its finished seeds alone ({cell.status})."
    yield from _unlike(board)


def _unlike(board: Board) -> Iterator[str]:
    """What makes runs differ beside the swept keys, and what they cost."""
    tokens = [seen for cell in board.finished if (seen := cell.mean("tokens")) is not None]
    if tokens and min(tokens) < max(tokens):
        yield f"Cells saw different numbers of training tokens, {magnitude(min(tokens))} to {magnitude(max(tokens))}."
    packed = [size for run in board.runs if (size := run.number("pack") or 1) > 1]
    if packed:
        yield f"{many(len(packed), 'run')} of {len(board.runs):,} shared a process with others, at most {max(packed):g} in one."
    mixed = [field for field, values in provenance(board).items() if len(values) > 1]
    if mixed:
        yield f"Runs differ in where they come from ({', '.join(mixed)}): see the provenance before comparing."


def _winner(board: Board, noun: str) -> Iterator[str]:
    best, reference = board.finished[0], board.reference
    assert best.estimate
    found = f"{clean(board.metric)} {decimal(best.estimate.mean)} ({_spread(best)})"
    wanted = "lowest" if board.mode == "min" else "highest"
    if reference is None:
        yield f"'{short(best.name, 60)}' has the {wanted} mean {found} of {many(len(board.finished), f'finished {noun}')}."
        yield from _beside(board, noun)
        if board.baselines:
            yield "No baseline run has finished, so nothing is compared with it."
        elif len(board.finished) > 1:
            yield f"The sweep names no baseline, so no {noun} is tested against one."
        return
    one_of = f" (the best of {len(board.baselines)} baseline {noun}s)" if len(board.baselines) > 1 else ""
    if best.rank == reference.rank:
        yield f"The baseline '{short(best.name, 60)}'{one_of} has the {wanted} mean {found}; no other {noun} beats it."
        yield from _beside(board, noun)
        return
    assert best.difference is not None
    side = "below" if board.mode == "min" else "above"
    yield (
        f"'{short(best.name, 60)}' has the {wanted} mean {found}, {decimal(abs(best.difference))} {side} "
        f"the baseline '{short(reference.name, 60)}'{one_of}."
    )
    yield _verdict(best, len(board.finished) - 1)
    yield from _beside(board, noun)


def _beside(board: Board, noun: str) -> Iterator[str]:
    """How many cells cannot be told from the best."""
    marks = Counter(cell.mark for cell in board.finished)
    if marks["same"]:
        yield f"{many(marks['same'], f'other {noun}')} cannot be distinguished from the best on common seeds (paired t, 95%)."
    if marks["likely"]:
        them = "looks" if marks["likely"] == 1 else "look"
        yield (
            f"{many(marks['likely'], f'other {noun}')} {them} worse than the best, but not after Holm's correction for "
            f"{many(len(board.finished) - 1, 'comparison')}."
        )
    if marks["unknown"]:
        yield (
            f"Of {many(marks['unknown'], f'{noun}')} nothing can be said against the best: fewer than two finished seeds "
            "in common with it."
        )


def _verdict(cell: Cell, comparisons: int) -> str:
    """Whether a cell can be told from the baseline. Having been picked as the best of many counts against it."""
    paired, wider = cell.paired, cell.corrected
    if paired is None or paired.low is None or wider is None:
        seeds = "only one finished seed" if paired else "no finished seed"
        return f"The two have {seeds} in common, so this cannot be told from the noise between seeds."
    assert paired.p is not None
    told = (
        f"seed by seed the difference is {decimal(paired.mean, True)}, 95% interval {interval(paired)}, "
        f"{equals(paired.p)}, n = {paired.n}"
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
    fresh = "fresh " if cell.fresh else ""
    if cell.estimate.sd is None:
        return f"1 {fresh}seed, so no spread is known"
    return f"sd {decimal(cell.estimate.sd)} over {cell.estimate.n} {fresh}seeds"


def _tuned(tuning: Tuning) -> Iterator[str]:
    keys = ", ".join(short(key, 60) for key in tuning.keys)
    yield f"Each variant is taken at its own best value of {keys}."
    if tuning.chosen:
        yield (
            "Where that value was chosen on the same seeds that are compared, the mean is optimistic and the intervals do not "
            "know of the choice: confirm the winner with fresh seeds."
        )
    tried = [one.tried for one in tuning.variants if one.cell]
    if tried and min(tried) < max(tried):
        yield f"Variants were tried at {min(tried)} to {max(tried)} values: more tries flatter more."
    at_edge = [one for one in tuning.variants if one.cell and any("tried" in warning for warning in one.warnings)]
    if at_edge:
        first = "; ".join(f"'{short(one.name, 40)}': {one.warnings[0]}" for one in at_edge[:3])
        more = f"; and {len(at_edge) - 3} more" if len(at_edge) > 3 else ""
        yield f"Warning, not tuned to the end: {first}{more}."


def _searched(board: Board) -> Iterator[str]:
    fresh = sum(cell.fresh for cell in board.finished)
    selected = sum(cell.selected for cell in board.finished)
    if fresh:
        yield f"{many(fresh, 'cell')} chosen by a search {'is' if fresh == 1 else 'are'} judged by fresh seeds alone."
    if selected:
        after = " and ranked after all others" if board.confirmed else ""
        yield (
            f"{many(selected, 'cell')} chosen by a search {'is' if selected == 1 else 'are'} not confirmed with fresh seeds: "
            f"{'its mean is' if selected == 1 else 'their means are'} optimistic{after}."
        )


def _progress(board: Board) -> str:
    parts = [f"{count:,} {status}" for status, count in board.counts().items() if count or status == "done"]
    return f"{many(len(board.runs), 'run')} in {many(len(board.cells), 'cell')}: {', '.join(parts)}."


def _stopped(board: Board, stop: str | None) -> Iterator[str]:
    """What early stopping does to a comparison."""
    pruned = sum(run.status == "pruned" for run in board.runs)
    if stop is None and not pruned:
        return
    yield (
        f"{STOPS.get(stop or '', 'Early stopping')} ended {many(pruned, 'run')} early. Runs were compared at equal iterations, "
        "before their learning rates had annealed unless the schedule had, so this is a comparison of unfinished runs: what "
        "learns slowly and ends well may have been lost."
    )
    survivors = [cell for cell in board.finished if cell.survivors]
    if survivors:
        them = "its mean is" if len(survivors) == 1 else "their means are"
        yield (
            f"Of {many(len(survivors), 'cell')} some seeds were pruned: {them} over the seeds that survived, biased to the "
            "better side. Pruned seeds are never averaged with finished ones."
        )


def cost(board: Board) -> list[tuple[str, str]]:
    """What the sweep took: pairs of a name and a value in words."""
    by_kind: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for run in board.runs:
        seconds = run.number("seconds") or 0.0
        device = str((run.result.get("provenance") or {}).get("device") or "") if run.result else ""
        by_kind["GPU" if device.startswith("cuda") else "CPU" if device else "unknown device"] += seconds  # type: ignore[assignment]
        spent[run.status] += seconds  # type: ignore[assignment]
    total = sum(by_kind.values())
    lost = sum(spent[status] for status in ("diverged", "failed", "pruned"))
    again = [run for run in board.runs if (run.number("attempt") or 1) > 1]
    open_ = sum(run.status in OPEN for run in board.runs)
    rows = [("Training time of all ended runs", f"{duration(total)} ({total:,.0f} s)")]
    rows += [(f"{kind} hours", f"{seconds / 3600:,.3g}") for kind, seconds in by_kind.items() if seconds]
    if total:
        rows.append(
            ("Of it in runs that diverged, failed or were pruned", f"{duration(lost)} ({percent(lost / total)})")
        )
    rows.append(("Runs that needed more than one attempt", f"{len(again):,}"))
    if open_:
        rows.append(("Runs that have not ended (not counted here)", f"{open_:,}"))
    return rows


def provenance(board: Board) -> dict[str, dict[str, int]]:
    """For every provenance field ('versions.torch'), how many ended runs have which value."""
    seen: dict[str, Counter[str]] = {}
    for run in board.runs:
        for field, value in flat(run.result.get("provenance")):
            seen.setdefault(field, Counter())[clean(told(value))] += 1
    return {field: dict(values.most_common()) for field, values in seen.items()}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted names."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        name = f"{prefix}{clean(str(key))}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        else:
            yield name, value
