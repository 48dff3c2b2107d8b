"""Scheduling without processes: who gets a slot, and what becomes of runs whose process came to an end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.plan import ALIKE, RESUMES, Places, Slot, Streak, Verdict, Wish, beside, slots, verdict, wishes

PAIR = Wish(("a", "b"))
LONE = Wish(("a",))
OOM = {"status": "failed", "cause": "oom"}


@pytest.mark.parametrize("status", ["done", "diverged", "pruned", "failed"])
@pytest.mark.parametrize("lost", [0, 2, 9])
def test_a_result_is_the_truth(status: str, lost: int) -> None:
    assert verdict(PAIR, {"status": status, "cause": "exception"}, lost) == Verdict(status)


def test_out_of_memory_is_tried_once_more_alone_on_the_device() -> None:
    for wish in (PAIR, LONE):
        assert verdict(wish, OOM, 0) == Verdict("crowded", again=True, alone=True, whole=True)
    assert verdict(Wish(("a",), whole=True), OOM, 0) == Verdict("failed")


def test_a_lost_process_is_continued_three_times() -> None:
    """The first time with the others of its pack."""
    told = [verdict(PAIR, None, lost) for lost in range(RESUMES + 1)]
    assert [one.status for one in told] == ["lost", "lost", "lost", "failed"]
    assert [one.again for one in told] == [True, True, True, False]
    assert [one.alone for one in told] == [False, True, True, False]
    assert verdict(Wish(("a",), whole=True), None, 0).whole, "it stays alone on the device"
    assert verdict(PAIR, None, 9, paused=True) == Verdict("paused")


def test_what_ended_together_goes_on_together() -> None:
    lost, alone = Verdict("lost", again=True), Verdict("lost", again=True, alone=True)
    whole = Verdict("crowded", again=True, alone=True, whole=True)
    assert wishes({"a": lost, "b": Verdict("done"), "c": lost, "d": alone, "e": whole}) == [
        Wish(("a", "c")),
        Wish(("d",)),
        Wish(("e",), whole=True),
    ]
    assert wishes({"a": Verdict("done"), "b": Verdict("paused")}) == []


def test_failures_that_are_alike() -> None:
    streak = Streak()
    for _ in range(ALIKE - 1):
        assert streak.ended("failed", "Traceback\nOSError: no room") is None
    assert streak.ended("done", "") is None, "one that went well begins the count anew"
    told = [streak.ended("failed", f"line {i}\nOSError: no room") for i in range(ALIKE)]
    assert told == [None] * (ALIKE - 1) + ["OSError: no room"]
    assert streak.ended("failed", "another") is None


def test_devices_that_train_one_run_together() -> None:
    def plan(*devices: str, together: int, trials: int = 9) -> list[Slot]:
        return slots(devices, "auto", None, cores=8, trials=trials, together=together)

    assert plan("cuda:0", "cuda:1", "cuda:2", together=2) == [Slot("cuda:0,cuda:1", 4, 2)]
    assert plan("cpu", together=2) == [Slot("cpu", 1, 2)] * 4
    assert plan("cpu", together=2, trials=1) == [Slot("cpu", 4, 2)]
    with pytest.raises(ValueError, match="2 devices are asked for each run, and there are 1"):
        plan("cuda:0", together=2)


def test_how_many_fit_beside_one_another() -> None:
    assert beside(80 << 30, 10 << 30) == 7 and beside(80 << 30, 200 << 30) == 1 and beside(80 << 30, 1) == 16


def test_a_whole_device_is_waited_for_and_not_passed_over() -> None:
    places = Places([Slot("cuda:0", 2)] * 2 + [Slot("cuda:1", 2)] * 2)
    taken = [places.take() for _ in range(3)]
    assert [slot.device for slot in taken if slot] == ["cuda:0", "cuda:0", "cuda:1"]
    assert places.take(whole=True) is None, "no device is empty: the one with the least on it is kept for it"
    assert places.reserved == "cuda:1" and places.take() is None
    assert taken[0] and taken[2]
    places.give(taken[0])
    again = places.take()
    assert again is not None and again.device == "cuda:0", "other devices go on meanwhile"
    places.give(taken[2])
    whole = places.take(whole=True)
    assert whole == Slot("cuda:1", 4) and places.take() is None
    places.give(whole)
    assert [slot.device for slot in places.free] == ["cuda:1", "cuda:1"] and places.reserved is None


def test_a_device_can_take_more_than_was_known() -> None:
    places = Places([Slot("cuda:0", 8)])
    places.widen("cuda:0", 4)
    assert [slot.threads for slot in places.free] == [8, 2, 2, 2]
    places.widen("cuda:0", 2)
    assert len(places.free) == 4


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slots_are_neither_lost_nor_given_twice(data: Any) -> None:
    """Whatever is taken and given back in whatever order, and nobody waits for ever."""
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    every = [Slot(f"cuda:{i}", 1) for i, count in enumerate(counts) for _ in range(count)]
    places = Places(every)
    held: list[Slot] = []
    for _ in range(data.draw(st.integers(1, 40))):
        if held and data.draw(st.booleans()):
            places.give(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            slot = places.take(whole=data.draw(st.booleans()))
            held += [slot] if slot is not None else []
        assert len(places.free) + len(places.taken) == len(every)
        alone = [slot for slot in held if id(slot) in places.whole]
        for slot in alone:
            assert [other.device for other in held].count(slot.device) == 1, "it is alone on its device"
    for slot in held:
        places.give(slot)
    assert sorted(slot.device for slot in places.free) == [slot.device for slot in every]
    assert places.take(whole=True) is not None
