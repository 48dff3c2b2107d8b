"""Which runs a sweep with a search has, as results come: the same in any order, on any number of devices, after any restart."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Desk, dig

import lab.campaign
from lab.campaign import Campaign, outcome
from lab.expand import Run
from lab.listing import Listing

LR, DECAY, BATCH = "optimizer.learning_rate", "optimizer.weight_decay", "train.batch_size"
TEXT = """
    sweep:
      grid: {train.batch_size: [1, 2]}
      seeds: 2
      search: {method: tpe, trials: 18, over: {optimizer.learning_rate: {log: [1e-4, 1.0]}, optimizer.weight_decay: [0.0, 0.1]},
        confirm: {top: 2, seeds: 3}}
"""
Result = dict[str, Any]


def loss(run: Run) -> float:
    """The best rate is 0.01, and every seed adds its own."""
    rate, decay = (float(dig(run.config, key)) for key in (LR, DECAY))
    return math.log10(rate / 0.01) ** 2 + decay + (run.seed % 3) * 1e-3


def done(run: Run) -> Result:
    return {"status": "done", "val_loss": loss(run), "best_val_loss": loss(run) - 0.5, "iters": 9}


class Workshop:
    """Carries a campaign out with so many slots, in an order of chance. `results` holds what has ended."""

    def __init__(self, listing: Listing, end: Callable[[Run], Result] = done, slots: int = 1, chance: int = 0) -> None:
        assert listing.campaign is not None
        self.listing, self.campaign, self.end, self.slots = listing, listing.campaign, end, slots
        self.chance = random.Random(chance)
        self.results: dict[str, Result] = {}
        self.queue, self.live = list(listing.runs), list[Run]()

    def step(self) -> bool:
        """Ends one run. Returns whether there was any."""
        while self.queue and len(self.live) < self.slots:
            self.live.append(self.queue.pop(0))
        if not self.live:
            return False
        run = self.live.pop(self.chance.randrange(len(self.live)))
        self.results[run.hash] = self.end(run)
        self.queue += self.campaign.more(lambda one: self.results.get(one.hash))
        return True

    def finish(self) -> list[tuple[Any, ...]]:
        """Carries it out, and returns its table."""
        while self.step():
            pass
        assert self.listing.more_to_come == 0
        assert {run.hash for run in self.listing.runs} == set(self.results), "each once"
        return table(self.listing)


def table(listing: Listing) -> list[tuple[Any, ...]]:
    return [(listing.ids[run.hash], run.cell, run.seed, run.phase, dict(run.changed)) for run in listing.runs]


# The order of things --------------------------------------------------------------------------------------------------------


def test_the_table_depends_neither_on_slots_nor_on_the_order_of_ends(desk: Desk) -> None:
    wanted = Workshop(desk.listed(TEXT)).finish()
    assert len(wanted) == 2 * (18 * 2 + 2 * 3)
    for slots, chance in ((3, 1), (7, 2), (100, 3)):
        assert Workshop(desk.listed(TEXT), slots=slots, chance=chance).finish() == wanted


def test_what_is_known_at_the_start_and_what_follows(desk: Desk) -> None:
    listing = desk.listed(TEXT)
    assert len(listing.runs) == 2 * 2 * 8 and listing.more_to_come == 2 * (10 * 2 + 6), (
        "four to look at, four not to look at"
    )
    assert [run.changed[BATCH] for run in listing.runs] == [1] * 16 + [2] * 16
    results = {
        run.hash: done(run) for run in listing.runs[:9]
    }  # four suggestions of the first cell, and half of the fifth
    campaign = listing.campaign
    assert campaign is not None
    new = campaign.more(lambda run: results.get(run.hash))
    assert [(run.changed[BATCH], run.seed, run.phase) for run in new] == [(1, 1337, "search"), (1, 1338, "search")]
    assert [run.hash for run in listing.runs[16:18]] == [run.hash for run in new], "in its cell's place"
    assert campaign.more(lambda run: results.get(run.hash)) == [] and listing.more_to_come == 2 * (10 * 2 + 6) - 2
    assert campaign.more(lambda run: None) == [], "what has ended is remembered"


def test_after_a_restart_at_any_point_the_runs_are_the_same(desk: Desk) -> None:
    first = Workshop(desk.listed(TEXT), slots=3, chance=5)
    wanted = Workshop(desk.listed(TEXT)).finish()
    for _ in range(7):
        for _ in range(13):
            first.step()
        again = desk.listed(TEXT)  # knows nothing yet
        known = {run.hash for run in first.listing.runs}
        assert again.campaign is not None
        again.campaign.more(lambda run, known=first.results: known.get(run.hash))  # type: ignore[misc]
        assert {run.hash for run in again.runs} == known and table(again) == table(first.listing)
        second = Workshop(again, slots=3, chance=6)
        second.results = dict(first.results)
        second.queue = [run for run in again.runs if run.hash not in second.results]
        first = second
    assert first.finish() == wanted


def test_results_that_lie_there_are_listed_from(desk: Desk) -> None:
    """As --dry-run does after a part of the sweep is done."""
    listing = desk.listed(TEXT)
    for run in listing.runs:
        listing.path(run).mkdir(parents=True)
        (listing.path(run) / "result.json").write_text(json.dumps(done(run)))
    again = desk.listed(TEXT)
    assert len(again.runs) == len(listing.runs) + 2 * 5 * 2 and not (desk.folder / again.path(again.runs[-1])).exists()
    assert [again.ids[run.hash] for run in listing.runs] == [listing.ids[run.hash] for run in listing.runs]


# Recalling ------------------------------------------------------------------------------------------------------------------


class Notes:
    """What a store keeps of suggestions."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], str] = {}

    def note(self, cell: str, number: int, values: dict[str, Any]) -> None:
        self.kept[cell, number] = json.dumps(values)

    def recall(self, cell: str, number: int) -> dict[str, Any] | None:
        found = self.kept.get((cell, number))
        return None if found is None else json.loads(found)


def test_what_was_suggested_before_is_not_asked_for_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, listing = Notes(), desk.listed(TEXT)
    assert listing.campaign is not None
    listing.campaign.connect(notes.recall, notes.note)
    assert not listing.runs, "connecting begins again"
    listing.campaign.more(lambda run: None)
    wanted = Workshop(listing).finish()
    assert len(notes.kept) == 2 * 18

    again = desk.listed(TEXT)
    monkeypatch.setattr(lab.campaign, "suggest", lambda *some: pytest.fail("asked again"))
    campaign = Campaign(again, notes.recall, notes.note)
    again.campaign = campaign
    assert len(campaign.more(lambda run: None)) == 2 * 18 * 2, "also before the results are there"
    assert Workshop(again).finish() == wanted and again.expansion.duplicates == 0


def test_more_trials_are_another_part_of_the_same_search(desk: Desk) -> None:
    notes, listing = Notes(), desk.listed(TEXT)
    assert listing.campaign is not None
    listing.campaign.connect(notes.recall, notes.note)
    listing.campaign.more(lambda run: None)
    before = [row for row in Workshop(listing).finish() if row[3] == "search"]
    longer = desk.listed(TEXT, "sweep.search.trials=50")  # with others on their way at once
    assert longer.campaign is not None
    longer.campaign.connect(notes.recall, notes.note)
    longer.campaign.more(lambda run: None)
    after = [row for row in Workshop(longer).finish() if row[3] == "search"]
    assert len(after) == 2 * 50 * 2 and [row for row in after if row in before] == before
    other = desk.listed(TEXT.replace("1e-4, 1.0", "1e-4, 0.5"))
    assert other.campaign is not None
    other.campaign.connect(notes.recall, notes.note)
    other.campaign.more(lambda run: None)
    assert len(other.runs) == 2 * 8 * 2, "another space is another search"


def test_a_note_that_does_not_fit_is_not_believed(desk: Desk) -> None:
    listing = desk.listed(TEXT)
    wanted = table(listing)
    assert listing.campaign is not None
    for odd in ({}, {LR: 7.0, DECAY: 0.1}, {LR: 0.01, DECAY: 0.2}, {LR: "0.01", DECAY: 0.1}):
        listing.campaign.connect(lambda cell, number, odd=odd: odd, lambda cell, number, values: None)  # type: ignore[misc]
        listing.campaign.more(lambda run: None)
        assert table(listing) == wanted


# How suggestions end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "wanted"),
    [
        ([{"status": "done", "val_loss": 1.0}, {"status": "done", "val_loss": 2.0}], ("done", 1.5, 0)),
        ([{"status": "done", "val_loss": 1.0}, {"status": "failed", "val_loss": 0.0}], ("failed", None, 0)),
        ([{"status": "diverged"}], ("failed", None, 0)),
        ([{"status": "done", "val_loss": None}], ("failed", None, 0)),
        ([{"status": "done", "val_loss": math.nan}], ("failed", None, 0)),
        ([{"status": "done", "val_loss": True}], ("failed", None, 0)),
        ([], ("failed", None, 0)),
        ([{"status": "pruned", "val_loss": 3.0, "iters": 9}, {"status": "done", "val_loss": 1.0}], ("pruned", 2.0, 9)),
        ([{"status": "pruned", "val_loss": 3.0, "iters": 9}, {"status": "paused", "val_loss": 4.0}], ("pruned", 3.5, 0)),
        ([{"status": "pruned", "iters": 9}], ("failed", None, 0)),
        ([{"status": "pruned", "val_loss": None, "best_val_loss": 2.0, "iters": 9}], ("pruned", 2.0, 9)),
        ([{"status": "done", "val_loss": None, "best_val_loss": 2.0}], ("failed", None, 0)),
    ],
)  # fmt: skip
def test_how_a_suggestion_ended(results: list[Result], wanted: tuple[str, float | None, int]) -> None:
    assert outcome(results, "val_loss") == wanted


def test_a_run_at_a_rung_holds_the_confirmation_up_and_not_the_search(desk: Desk) -> None:
    text = TEXT.replace("seeds: 2", "seeds: 1")
    listing = desk.listed(text)
    shop = Workshop(listing, lambda run: {"status": "paused", "val_loss": loss(run), "iters": 3})
    while shop.step():
        pass
    assert (
        len(listing.runs) == 2 * 18 and listing.more_to_come == 2 * 6 and {r.phase for r in listing.runs} == {"search"}
    )
    for run in listing.runs:
        shop.results[run.hash] = done(run) if loss(run) < 2 else {"status": "pruned", "val_loss": loss(run), "iters": 3}
    assert len(shop.campaign.more(lambda run: shop.results[run.hash])) == 2 * 6 and listing.more_to_come == 0


@pytest.mark.parametrize(("mode", "metric"), [("min", "val_loss"), ("max", "val_loss"), ("min", "best_val_loss")])
def test_the_best_are_confirmed_on_fresh_seeds(desk: Desk, mode: str, metric: str) -> None:
    """In each cell the two best by the mean over seeds. One that is best with one seed and fails with the other is not."""
    listing = desk.listed(TEXT, f"sweep.objective.mode={mode}", f"sweep.objective.metric={metric}")

    def end(run: Run) -> Result:
        return (
            {"status": "diverged"} if run.seed == 1338 and abs(math.log10(dig(run.config, LR)) + 2) < 0.1 else done(run)
        )

    shop = Workshop(listing, end, slots=4)
    shop.finish()
    for batch in (1, 2):
        means: dict[str, list[float]] = {}
        for run in listing.runs:
            if run.changed[BATCH] == batch and run.phase == "search":
                value = shop.results[run.hash].get(metric, math.nan)
                means.setdefault(run.cell_hash, []).append(value)
        ranked = sorted((sum(v) / 2, cell) for cell, v in means.items() if not math.isnan(sum(v)))
        best = {cell for _, cell in (ranked if mode == "min" else ranked[::-1])[:2]}
        confirmed = [run for run in listing.runs if run.changed[BATCH] == batch and run.phase == "confirm"]
        assert {run.cell_hash for run in confirmed} == best
        assert sorted(run.seed for run in confirmed) == [1339, 1339, 1340, 1340, 1341, 1341]


def test_the_baseline_has_the_fresh_seeds_too(desk: Desk) -> None:
    """Else what is confirmed could not be compared with it seed by seed. It stays what the file lists."""
    listing = desk.listed(
        """
        sweep:
          cases: {plain: {set: {optimizer.learning_rate: 9.0e-4}}, searched: {}}
          search: {method: tpe, trials: 4, over: {optimizer.learning_rate: {log: [1.0e-4, 1.0e-2]}}, confirm: {top: 2, seeds: 3}}
          baseline: {case: plain}
          seeds: 2
        """
    )
    assert len(listing.runs) + listing.more_to_come == 2 + 4 * 2 + (2 + 1) * 3
    shop = Workshop(listing)
    shop.finish()
    assert listing.more_to_come == 0
    baseline = [run for run in listing.runs if run.baseline]
    assert [run.seed for run in baseline] == [1337, 1338, 1339, 1340, 1341]
    assert {run.phase for run in baseline} == {"grid"} and len({run.cell_hash for run in baseline}) == 1
    confirmed = [run for run in listing.runs if run.phase == "confirm"]
    assert {run.seed for run in confirmed} == {1339, 1340, 1341} and len({run.cell_hash for run in confirmed}) == 2
    again = desk.listed(desk.folder.joinpath("x.yaml").read_text())
    second = Workshop(again, lambda run: shop.results[run.hash])
    second.finish()
    assert [run.hash for run in again.runs] == [run.hash for run in listing.runs], "in any process"


def test_where_everything_failed_nothing_is_confirmed(desk: Desk) -> None:
    listing = desk.listed(TEXT)
    Workshop(listing, lambda run: {"status": "failed"}).finish()
    assert len(listing.runs) == 2 * 18 * 2


def test_suggestions_that_come_again_are_merged_and_counted(desk: Desk) -> None:
    text = (
        "sweep: {search: {method: tpe, trials: 20, over: {train.batch_size: [1, 2, 3]}, confirm: {top: 2, seeds: 1}}}"
    )
    listing = desk.listed(text)
    Workshop(listing).finish()
    assert [run.phase for run in listing.runs] == ["search"] * 3 + ["confirm"] * 2
    assert (listing.expansion.duplicates, listing.expansion.cells) == (17, 3)
    assert len({run.cell_hash for run in listing.runs if run.phase == "confirm"}) == 2


# What the rest of the sweep says --------------------------------------------------------------------------------------------


def test_what_a_case_sets_is_not_searched_there(desk: Desk) -> None:
    text = f"""
    sweep:
      cases:
        equal: {{set: {{{LR}: 0.5, {DECAY}: 0.0}}}}
        half: {{set: {{optimizer: {{weight_decay: 0.5}}}}}}
        free: {{}}
      baseline: {{case: equal}}
      search: {{method: random, trials: 5, over: {{{LR}: {{log: [1e-4, 1e-2]}}, {DECAY}: [0.0, 0.1]}}}}
    """
    listing = desk.listed(text)
    assert listing.more_to_come == 0, "random suggestions are known at once"
    assert [(run.changed["case"], run.phase, run.baseline) for run in listing.runs] == [
        ("equal", "grid", True), *[("half", "search", False)] * 5, *[("free", "search", False)] * 5
    ]  # fmt: skip
    assert {dig(run.config, DECAY) for run in listing.runs[1:6]} == {0.5} and DECAY not in listing.runs[1].changed
    assert listing.runs[0].cell == "equal" and listing.swept == ("case", LR, DECAY)


def test_names_labels_and_folders(desk: Desk) -> None:
    over = f"{LR}: {{named: {{low: 1e-3, high: 1e-2}}}}, {BATCH}: {{linear: [1, 99]}}"
    text = f"sweep: {{search: {{method: random, trials: 9, over: {{{over}}}}}}}"
    listing = desk.listed(text)
    for run in listing.runs:
        low, batch = run.changed[LR] == "low", run.changed[BATCH]
        assert dig(run.config, LR) == (1e-3 if low else 1e-2) and dig(run.config, BATCH) == batch
        words = f"learning_rate={'low' if low else 'high'}"
        assert run.cell == f"{words}, batch_size={batch}"
        assert listing.ids[run.hash] == f"{words}+batch_size={batch}-{run.hash}"
    assert {run.seed for run in listing.runs} == {1337}


def test_folders_have_the_seed_in_their_names_where_there_will_be_several(desk: Desk) -> None:
    listing = desk.listed(TEXT, "sweep.seeds=1", f"{DECAY}=0.1", f"{BATCH}=1")
    assert all("+seed=1337-" in name for name in listing.ids.values())
    listing = desk.listed(f"sweep: {{seeds: 2, search: {{method: random, trials: 2, over: {{{BATCH}: [1, 2]}}}}}}")
    assert all(f"+seed={run.seed}-" in listing.ids[run.hash] for run in listing.runs)
    listing = desk.listed(f"sweep: {{search: {{method: random, trials: 2, over: {{{BATCH}: [1, 2]}}}}}}")
    assert not any("seed" in name for name in listing.ids.values())


def test_an_axis_over_the_seed_gives_every_suggestion_its_seeds(desk: Desk) -> None:
    axis = desk.listed(TEXT, "train.seed=5,8")
    listed = desk.listed(TEXT, "sweep.seeds=[5, 8]")
    assert [(run.hash, run.seed) for run in axis.runs] == [(run.hash, run.seed) for run in listed.runs]
    assert Workshop(axis).finish()[-1][2] == Workshop(listed).finish()[-1][2] == 11


def test_equal_cells_are_searched_once(desk: Desk) -> None:
    listing = desk.listed(TEXT.replace("[1, 2]", "{named: {one: 1, also: 1}}"))
    assert len(listing.runs) == 8 * 2 and listing.expansion.duplicates == 1


def test_exclude_and_baseline(desk: Desk) -> None:
    def listed(words: str) -> Listing:
        return desk.listed(TEXT.replace("grid:", f"{words}\n      grid:"))

    whole = listed("exclude: {train.batch_size: 2}")
    assert {run.changed[BATCH] for run in whole.runs} == {1} and whole.expansion.excluded == 1
    half = listed("exclude: {optimizer.weight_decay: 0.0}")
    assert {run.changed[DECAY] for run in half.runs} == {0.1} and half.expansion.excluded == 0
    assert half.campaign is not None and half.campaign.refused
    assert all(said.startswith("suggestion ") and said.endswith(" it is excluded.") for said in half.campaign.refused)
    based = listed("baseline: {train.batch_size: 1, optimizer.weight_decay: [0.1, 5]}")
    assert {(run.changed[BATCH], run.changed[DECAY]) for run in based.runs if run.baseline} == {(1, 0.1)}
    for words in ("baseline: {optimizer.weight_decay: 0.2}", "exclude: {optimizer.learning_rate: 3.0}"):
        (told,) = desk.wrong(TEXT.replace("grid:", f"{words}\n      grid:"))
        assert "matches no run (x.yaml:2)" in told
    told, *_ = desk.wrong(TEXT.replace("grid:", "exclude: {train.batch_size: [1, 2]}\n      grid:"))
    assert "nothing is left: every run is excluded" in told


def test_combinations_that_cannot_be_run_end_as_failed_and_are_told(desk: Desk) -> None:
    """Each choice is possible with the first of the others, but three heads do not go into a width of 32."""
    text = """
    sweep:
      search: {method: tpe, trials: 24, over: {model.n_embd: [48, 32, 24],
        model.n_head: [2, 4, 3]}}
    """
    listing = desk.listed(text)
    shop = Workshop(listing, lambda run: {"status": "done", "val_loss": 0.0})
    shop.finish()
    tried = {(run.config.model.n_embd, run.config.model.n_head) for run in listing.runs}
    assert (32, 3) not in tried and tried <= {(n, h) for n in (48, 32, 24) for h in (2, 3, 4)}
    said = shop.campaign.refused
    assert said and all("n_embd=32, n_head=3" in one and "(x.yaml:" in one for one in said)
    assert len(said) + listing.expansion.duplicates + len(tried) == 24
    (told,) = desk.wrong(text.replace("24,", "4,").replace("[48, 32, 24]", "[32]").replace("[2, 4, 3]", "[3]"))
    assert told.startswith("model.n_embd: 32 is not divisible by n_head 3") and "(x.yaml:2)" in told


def test_max_runs_counts_what_may_come(desk: Desk) -> None:
    """A runner asks for --yes by the sum of what is listed and what may come."""
    listing = desk.listed(TEXT)
    assert len(listing.runs) + listing.more_to_come == 2 * (18 * 2 + 2 * 3)
    shop = Workshop(listing, slots=5)
    most = len(listing.runs) + listing.more_to_come
    while shop.step():
        assert len(listing.runs) + listing.more_to_come <= most
        most = len(listing.runs) + listing.more_to_come
