"""Which runs of a sweep exist now: those that its file lists, and those that searches have chosen from the results so far.

They are a function of the results alone: a runner that is started again lists the same runs, and so does one with more devices.
(With early stopping the results themselves depend on which run came to a rung first.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lab.expand import Run
from lab.naming import in_words
from lab.search import Told, suggest
from lab.searched import Searched

if TYPE_CHECKING:
    from lab.listing import Listing

Result = Mapping[str, Any]
ResultOf = Callable[[Run], Result | None]
Recall = Callable[[str, int], dict[str, Any] | None]
Note = Callable[[str, int, dict[str, Any]], None]
PAUSED = "paused"  # of a run that waits at a rung: the search goes on with the loss that it has


def nothing(cell: str, number: int) -> None:
    """Recalls no suggestion."""


def nowhere(cell: str, number: int, values: dict[str, Any]) -> None:
    """Notes no suggestion."""


@dataclass
class _Trial:
    """A suggestion: its values, the hashes of its runs (none where it cannot be run), what is known once all of them have
    ended."""

    values: dict[str, Any]
    hashes: tuple[str, ...]
    told: Told | None = None


@dataclass
class _Cell:
    """A searched cell: its suggestions so far, and the runs that confirm the best, once these are chosen."""

    searched: Searched
    trials: list[_Trial] = field(default_factory=list)
    confirmed: tuple[str, ...] | None = None


class Campaign:
    """Adds to a listing the runs of its searches, as soon as the results that they follow from are there.

    `recall(cell, number)` gives what was suggested before, or None; `note` keeps what is suggested now. Together they hold a
    sweep to its suggestions where these would be others today: with another version of the library, after more trials were
    asked for, or when a run that had failed is tried again with success. `refused` says which suggestions cannot be run; they
    end as failed, so that the search turns away from them. `repeated` counts suggestions that were listed before; they have the
    results of the first.
    """

    def __init__(self, listing: Listing, recall: Recall = nothing, note: Note = nowhere) -> None:
        self.listing = listing
        self.plain = tuple(run.hash for run in listing.runs if run.phase == "grid")
        seeds = [run.seed for run in listing.runs]
        seeds += [seed for searched in listing.expansion.searches for seed in searched.seeds]
        self.fresh = max(seeds, default=0) + 1  # the first seed that no run had
        self.connect(recall, note)

    def connect(self, recall: Recall, note: Note) -> None:
        """Begins again with what was suggested before: `more` then lists the runs of the searches anew."""
        self.recall, self.note = recall, note
        self.cells = [_Cell(searched) for searched in self.listing.expansion.searches]
        self.refused: list[str] = []
        self.repeated = 0
        self._list()

    @property
    def more_to_come(self) -> int:
        """How many runs may still be listed, at most."""
        count = 0
        for cell in self.cells:
            search = cell.searched.search
            count += (search.trials - len(cell.trials)) * len(cell.searched.seeds)
            if search.confirm and cell.confirmed is None:
                count += (search.confirm.top + len(cell.searched.work.baselines)) * search.confirm.seeds
        return count

    def more(self, result_of: ResultOf) -> list[Run]:
        """Lists every run that can be known now. Returns those that were not listed before.

        result_of: a run's result.json, or None where it has not ended. A run that waits at a rung of early stopping may be told
        with the status 'paused', its `val_loss` and its `iters`: the search then goes on without its end, and confirms nothing
        before it.
        """
        before = {run.hash for run in self.listing.runs}
        added = [self._suggest(cell, result_of) + self._confirm(cell, result_of) for cell in self.cells]
        if any(added):
            self._list()
        return [run for run in self.listing.runs if run.hash not in before]

    def _list(self) -> None:
        """Lists what is known in an order that does not depend on when it became known."""
        known = dict.fromkeys(self.plain)
        self.repeated = 0
        for cell in self.cells:
            for trial in cell.trials:
                self.repeated += bool(trial.hashes) and all(made in known for made in trial.hashes)
                known |= dict.fromkeys(trial.hashes)
        known |= dict.fromkeys(made for cell in self.cells for made in cell.confirmed or ())
        self.listing.show(known, self.repeated)

    def _suggest(self, cell: _Cell, result_of: ResultOf) -> int:
        """Makes the suggestions of a cell that can be made now. Returns how many."""
        searched, first = cell.searched, len(cell.trials)
        for number in range(first, searched.search.trials):
            values = self._recalled(searched, number)
            if values is None:
                known = self._known(cell, number, result_of)
                if known is None:
                    break
                values = suggest(searched.search, searched.key, number, known, self._objective["mode"])
                self.note(searched.key, number, values)
            hashes, mistakes = searched.add(values)
            self.listing.call(searched.work.runs[made] for made in hashes)
            cell.trials.append(_Trial(values, hashes))
            if not hashes:
                self._refuse(number, values, [self.listing.sentence(mistake) for mistake in mistakes])
        return len(cell.trials) - first

    def _refuse(self, number: int, values: Mapping[str, Any], why: Sequence[str]) -> None:
        words = in_words(values, self.listing.expansion.short)
        self.refused.append(f"suggestion {number} of the search, {words}: {' '.join(why) or 'it is excluded.'}")

    def _recalled(self, searched: Searched, number: int) -> dict[str, Any] | None:
        values = self.recall(searched.key, number)
        if values is None or not all(d.key in values and d.allows(values[d.key]) for d in searched.search.over):
            return None
        return values

    def _known(self, cell: _Cell, number: int, result_of: ResultOf) -> list[Told] | None:
        """What suggestion `number` follows from, or None where a result that it needs is not there yet."""
        needs = cell.searched.search.needs(number)
        known = [self._told(cell, i, result_of) for i in range(needs)]
        if any(told.state == "running" for told in known):
            return None
        return known + [Told(i, cell.trials[i].values, "running") for i in range(needs, number)]

    def _told(self, cell: _Cell, number: int, result_of: ResultOf) -> Told:
        """What is known of a suggestion. It is kept once all its runs have ended for good."""
        trial = cell.trials[number]
        if trial.told is not None:
            return trial.told
        results = []
        for made in trial.hashes:
            result = result_of(cell.searched.work.runs[made])
            if result is None:
                return Told(number, trial.values, "running")
            results.append(result)
        told = Told(number, trial.values, *outcome(results, self._objective["metric"]))
        if all(result.get("status") != PAUSED for result in results):
            trial.told = told
        return told

    def _confirm(self, cell: _Cell, result_of: ResultOf) -> int:
        """Lists the best suggestions on fresh seeds, once all suggestions have ended, and what the sweep compares with on the
        same seeds. Returns how many runs."""
        confirm = cell.searched.search.confirm
        if confirm is None or cell.confirmed is not None or len(cell.trials) < cell.searched.search.trials:
            return 0
        for number, trial in enumerate(cell.trials):
            if self._told(cell, number, result_of).state == "running" or trial.told is None:
                return 0
        seeds = range(self.fresh, self.fresh + confirm.seeds)
        best, work = self._best(cell)[: confirm.top], cell.searched.work
        made = [run for told in best for run in cell.searched.add(told.values, seeds)[0]]
        if made:
            made += [run for point in work.baselines.values() for run in work.read(point, "grid", seeds)]
        cell.confirmed = tuple(made)
        return len(cell.confirmed)

    def _best(self, cell: _Cell) -> list[Told]:
        """The suggestions of a cell that are done, the best first; one that came twice stands there once."""
        sign = -1.0 if self._objective["mode"] == "max" else 1.0
        ranked = []
        for trial in cell.trials:
            if trial.told is not None and trial.told.state == "done" and trial.told.value is not None:
                ranked.append((sign * trial.told.value, trial.told.number, trial))
        unique: dict[tuple[str, ...], Told] = {}
        for _, _, trial in sorted(ranked, key=lambda one: one[:2]):
            assert trial.told is not None
            unique.setdefault(trial.hashes, trial.told)
        return list(unique.values())

    @property
    def _objective(self) -> Mapping[str, Any]:
        return self.listing.expansion.sweep.objective


def outcome(results: Sequence[Result], metric: str) -> tuple[str, float | None, int]:
    """What a search is told of a suggestion whose runs, one for each seed, ended so: a state, the mean objective, an iteration.

    One run that failed or diverged, or lacks the objective, makes the suggestion a failed one: seeds are not averaged over. One
    that was pruned makes it a pruned one, at the iteration of the first.
    """
    states = {result.get("status") for result in results}
    values = [_objective(result, metric) for result in results]
    finite = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if not results or len(finite) < len(results) or not states <= {"done", "pruned", PAUSED}:
        return "failed", None, 0
    if states == {"done"}:
        return "done", fmean(finite), 0
    return "pruned", fmean(finite), min(int(r.get("iters") or 0) for r in results if r.get("status") != "done")


def _objective(result: Result, metric: str) -> Any:
    """The objective of a run; of one that was stopped early, the loss that it had."""
    words = (metric,) if result.get("status") == "done" else (metric, "val_loss", "best_val_loss")
    return next((result[word] for word in words if result.get(word) is not None), None)
