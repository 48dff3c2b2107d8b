"""What a sweep's `search`, `stop` and `tune` say: dataclasses, and their reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from core.options import Path, nearest
from lab.axes import Axis, Choice, Key, SweepError, read_values, same

METHODS = ("random", "tpe")  # those of the library that need no further packages
SEARCH_WORDS = ("method", "trials", "over", "confirm")
STOPS = {"halving": ("method", "eta", "min_iters"), "median": ("method", "min_iters")}
COMPARED = ("val_loss", "best_val_loss")  # metrics that early stopping can foresee
MAX_TRIALS = 10_000  # of one cell
MAX_CHOICES = 1_000  # of one key: each is tried on the configuration before anything starts
MAX_WHOLE = 2**53  # every whole number up to it is a float
ETA = 3
Wrong = Callable[..., None]  # (path, text, advice)


@dataclass(frozen=True)
class Dimension:
    """A key that a search chooses: one of `pairs` (label, value), or where there are none a number from `low` to `high`, whole
    where both are. Choices that are numbers in order are searched in that order. What a search suggests is a label or a
    number."""

    key: Key
    path: Path
    pairs: tuple[tuple[Any, Any], ...] = ()
    low: int | float = 0
    high: int | float = 0
    log: bool = False

    @property
    def labels(self) -> tuple[Any, ...]:
        return tuple(label for label, _ in self.pairs)

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ordered(self) -> bool:
        """Whether the choices are numbers that rise or fall."""
        values = [value for _, value in self.pairs]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return False
        steps = list(pairwise(values))
        return all(a < b for a, b in steps) or all(a > b for a, b in steps)

    @property
    def tried(self) -> tuple[Any, ...]:
        """What is tried on the configuration before anything starts: every choice, or both ends."""
        return self.labels or (self.low, self.high)

    @property
    def axis(self) -> Axis:
        """What is tried, as an axis."""
        return Axis(self.key, tuple(self.choice(label) for label in self.tried), {}, self.path)

    def choice(self, label: Any) -> Choice:
        """What a suggestion sets."""
        value = self.pairs[self.index(label)][1] if self.pairs else label
        return Choice({self.key: value}, {self.key: label}, {self.key: self.path})

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {_said(label): i for i, label in enumerate(self.labels)}

    def index(self, label: Any) -> int:
        """Where a label stands among the choices; true is not 1. Raises KeyError where it does not."""
        return self._indices[_said(label)]

    def allows(self, label: Any) -> bool:
        """Whether a search over this key could suggest `label`."""
        if self.pairs:
            return _said(label) in self._indices
        number = isinstance(label, int if self.whole else (int, float)) and not isinstance(label, bool)
        return number and self.low <= label <= self.high

    def meets(self, wanted: Any) -> bool:
        """Whether a condition on this key could hold of a suggestion; a list means any of these."""
        for one in [*wanted, wanted] if isinstance(wanted, list) else [wanted]:
            if self.allows(one) or any(same(known, one) for pair in self.pairs for known in pair):
                return True
        return False


@dataclass(frozen=True)
class Confirm:
    """The `top` best of a cell's search run again, with `seeds` fresh seeds."""

    top: int
    seeds: int


@dataclass(frozen=True)
class Search:
    """In each cell of the rest of the sweep, `trials` suggestions of values for the keys `over`.

    Suggestion n is a function of the results of the first n - `lag` alone, so that it does not depend on which of the others
    happen to have ended: the search is the same on one device and on many, and after any stop.
    """

    method: str
    trials: int
    over: tuple[Dimension, ...]
    confirm: Confirm | None = None

    @property
    def lag(self) -> int:
        """How many of the suggestions right before it a suggestion does not look at, so that one more may be on their way."""
        return max(4, self.trials // 10)

    @property
    def startup(self) -> int:
        """How many results there are before they are used."""
        return min(10, max(4, self.trials // 4))

    def needs(self, number: int) -> int:
        """How many of the first suggestions have to have ended before suggestion `number`, from 0, is known."""
        return 0 if self.method == "random" or number < self.startup + self.lag else number - self.lag

    def without(self, keys: Collection[Key]) -> Search | None:
        """The search where `keys` are pinned, or None where that leaves nothing to choose."""
        over = tuple(dimension for dimension in self.over if dimension.key not in keys)
        return replace(self, over=over) if over else None

    @property
    def digest(self) -> str:
        """What the space is, and how it is searched: ten hexadecimal digits. More trials are another part of the same search."""
        over = [(d.key, [[label, value] for label, value in d.pairs], d.low, d.high, d.log) for d in self.over]
        said = _said([self.method, sorted(over, key=lambda one: one[0])])
        return hashlib.sha256(said.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Stop:
    """Early stopping from `min_iters` on: `halving` (asynchronous, one in `eta` goes on) or `median`."""

    method: str
    min_iters: int
    eta: int = ETA


# Reading --------------------------------------------------------------------------------------------------------------------


def read_search(given: Any, usable: Callable[[Key, Path], bool], wrong: Wrong) -> Search | None:
    """The `search` section, or None where there is none or it cannot be read. `usable(key, path)`: whether a key can be swept; it
    notes a mistake where it cannot."""
    path = ("sweep", "search")
    if given is None or not _words(given, SEARCH_WORDS, path, wrong):
        return None
    method = _one_of(given.get("method"), METHODS, (*path, "method"), wrong)
    trials = _whole(given.get("trials"), 1, MAX_TRIALS, (*path, "trials"), wrong)
    over = tuple(_over(given.get("over"), (*path, "over"), usable, wrong))
    confirm = _confirm(given.get("confirm"), trials, (*path, "confirm"), wrong)
    return Search(method, trials, over, confirm) if method and trials and over else None


def _over(given: Any, path: Path, usable: Callable[[Key, Path], bool], wrong: Wrong) -> Iterator[Dimension]:
    if not isinstance(given, Mapping) or all(axis is None for axis in given.values()):
        wrong(path, f"{given!r:.200} is no mapping of a key to an axis", "Name at least one key to search over.")
        return
    for key, axis in given.items():
        below = (*path, key)
        if axis is None or not usable(key, below):
            continue
        if key == "train.seed":
            wrong(below, "a seed is not searched, as the best seed is chance", "Give 'seeds' instead.")
            continue
        try:
            yield dimension(key, axis, below)
        except SweepError as error:
            wrong(below, str(error), error.advice)


def dimension(key: Key, given: Any, path: Path) -> Dimension:
    """A key to search over. `{log: [a, b]}` and `{linear: [a, b]}` without `num` are every number in between; any other form of
    an axis is a list of choices. Raises SweepError for what is no axis."""
    kind = next(iter(given), None) if isinstance(given, Mapping) and len(given) == 1 else None
    if kind in ("log", "linear"):
        ends = sorted(value for _, value in read_values({**given, "num": 2}).pairs)
        if ends[0] == ends[1]:
            raise SweepError(f"'{kind}' from {ends[0]} to {ends[1]} leaves nothing to search")
        if all(isinstance(end, int) for end in ends) and max(map(abs, ends)) > MAX_WHOLE:
            raise SweepError(
                f"whole numbers are searched up to {MAX_WHOLE:,}", "Write an end as 1.0e+20 for any number."
            )
        return Dimension(key, path, (), ends[0], ends[1], kind == "log")
    values = read_values(given)
    if values.when:
        raise SweepError("'when' is not possible in a search")
    if len(values.pairs) > MAX_CHOICES:
        advice = "A stretch of numbers is {linear: [a, b]} or {log: [a, b]}, without 'num'."
        raise SweepError(f"{len(values.pairs):,} choices are more than the {MAX_CHOICES:,} that are allowed", advice)
    said = [_said(label) for label, _ in values.pairs]
    if twice := next((label for label in said if said.count(label) > 1), None):
        raise SweepError(f"the choice {twice} stands there twice")
    return Dimension(key, path, values.pairs)


def _confirm(given: Any, trials: int | None, path: Path, wrong: Wrong) -> Confirm | None:
    if given is None or not _words(given, ("top", "seeds"), path, wrong):
        return None
    top = _whole(given.get("top"), 1, trials or MAX_TRIALS, (*path, "top"), wrong)
    seeds = _whole(given.get("seeds"), 1, MAX_TRIALS, (*path, "seeds"), wrong)
    return Confirm(top, seeds) if top and seeds else None


def read_stop(given: Any, metric: Any, wrong: Wrong) -> Stop | None:
    """The `stop` section, or None. metric: that of the objective, which runs are compared by at their evaluations."""
    path = ("sweep", "stop")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        wrong(path, f"{given!r:.200} is not a mapping")
        return None
    method = _one_of(given.get("method"), tuple(STOPS), (*path, "method"), wrong)
    words = STOPS.get(method or "", STOPS["halving"])
    for word in given:
        if word not in words:
            text = "does not go with the method 'median'" if word in STOPS["halving"] else "unknown key"
            wrong((*path, word), text, nearest(str(word), words))
    if metric not in COMPARED:
        text = f"runs are stopped by their validation loss, and the objective is '{metric}'"
        wrong(path, text, f"It goes with the objectives {' and '.join(COMPARED)}.")
    least = _whole(given.get("min_iters"), 1, None, (*path, "min_iters"), wrong)
    eta = _whole(given.get("eta", ETA), 2, None, (*path, "eta"), wrong)
    return Stop(method, least, eta) if method and least and eta else None


def read_tune(given: Any, swept: Collection[str], wrong: Wrong) -> tuple[Key, ...]:
    """The keys of `tune`, each of which is swept."""
    path = ("sweep", "tune")
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(key, str) for key in given):
        wrong(path, f"{given!r:.200} is not a list of keys")
        return ()
    for i, key in enumerate(given):
        if key not in swept:
            wrong((*path, str(i)), f"'{key}' is not swept", nearest(key, swept))
    return tuple(dict.fromkeys(given))


def _said(value: Any) -> str:
    """A plain value as text that differs where it differs, also where only its type does."""
    return json.dumps(value, sort_keys=True, default=str)


def _words(given: Any, known: Collection[str], path: Path, wrong: Wrong) -> bool:
    """Whether it is a mapping; words that are not known are noted."""
    if not isinstance(given, Mapping):
        wrong(path, f"{given!r:.200} is not a mapping")
        return False
    for word in given:
        if word not in known:
            wrong((*path, word), "unknown key", nearest(str(word), known))
    return True


def _one_of(given: Any, known: Collection[str], path: Path, wrong: Wrong) -> str | None:
    if given in known:
        return str(given)
    text = "it has to be said" if given is None else f"no method {given!r:.200}"
    wrong(path, text, nearest(str(given), known))
    return None


def _whole(given: Any, least: int, most: int | None, path: Path, wrong: Wrong) -> int | None:
    if isinstance(given, int) and not isinstance(given, bool) and least <= given and (most is None or given <= most):
        return given
    bounds = f"an integer of {least} or more" if most is None else f"an integer from {least} to {most:,}"
    wrong(path, f"it has to be said, {bounds}" if given is None else f"{given!r:.200} is not {bounds}")
    return None
