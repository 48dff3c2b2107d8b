"""Scheduling, pure: which slots there are, who gets one, and what becomes of a run whose process came to an end.

Nothing here knows a process or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESUMES = 3  # times that a run whose process was lost is continued without being asked
ALIKE = 5  # failures in a row, all with one error and none else ended well, that pause a sweep
SHARE = 0.9  # of a GPU's memory that trials beside one another may take
MOST_PER_DEVICE = 16  # trials beside one another on one GPU, which only share its time


# Slots ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A place where one trial at a time runs: a device (as this machine calls it), CPU threads of each process, and how many
    processes train the trial together, each on a device of its own (`device` then lists them, with commas)."""

    device: str
    threads: int
    processes: int = 1


def slots(
    devices: Sequence[str], per_device: int | str, threads: int | None, cores: int, trials: int, together: int = 1
) -> list[Slot]:
    """The slots for a sweep of `trials` runs: one a GPU and one a core on a CPU unless asked otherwise; threads share the cores.

    together: how many devices, or processes on a CPU, train one run. It is the whole sweep that counts, not what is left of it:
    sums of several threads have other last bits, and a run must not depend on how often its sweep was stopped.
    Raises ValueError where there are fewer devices than a run is to have.
    """
    made: list[str] = []
    for names in _grouped(devices, together):
        count = per_device if isinstance(per_device, int) else max(1, cores // together) if names == "cpu" else 1
        made += [names] * count
    # One after another over the devices, so that few trials spread out.
    order = sorted(range(len(made)), key=lambda i: (made[:i].count(made[i]), i))[: max(1, trials)]
    each = threads or max(1, cores // (len(order) * together))
    return [Slot(made[i], each, together) for i in order]


def _grouped(devices: Sequence[str], together: int) -> list[str]:
    """Devices in groups that train one run."""
    cpus, gpus = [d for d in devices if d == "cpu"], [d for d in devices if d != "cpu"]
    if gpus and len(gpus) < together:
        raise ValueError(
            f"runner.devices_per_trial: {together} devices are asked for each run, and there are {len(gpus)}."
        )
    groups = [",".join(gpus[i : i + together]) for i in range(0, len(gpus) - together + 1, together)]
    return groups + cpus


def beside(total: int, peak: int) -> int:
    """How many trials that take at most `peak` bytes each fit beside one another on a GPU of `total` bytes."""
    return max(1, min(MOST_PER_DEVICE, int(total * SHARE) // max(1, peak)))


class Places:
    """Who has which slot. A trial that asks for a whole device waits until the device is empty; nobody else gets a slot there
    meanwhile, so it is not passed over for ever, and other devices go on."""

    def __init__(self, every: Sequence[Slot]) -> None:
        self.free, self.taken = list(every), list[Slot]()
        self.whole: dict[int, list[Slot]] = {}  # by the identity of the slot that stands for them
        self.reserved: str | None = None

    def take(self, whole: bool = False, on: str = "") -> Slot | None:
        """A free slot, or one that stands for all slots of a device; None where there is none now.

        on: the device of a trial that is at work there already, whoever else the device is kept for.
        """
        if whole:
            return self._whole()
        slot = next((slot for slot in self.free if (slot.device == on if on else slot.device != self.reserved)), None)
        if slot is not None:
            self._move(slot)
        return slot

    def _whole(self) -> Slot | None:
        busy = {slot.device for slot in self.taken}
        empty = [slot for slot in self.free if slot.device not in busy]
        if not empty:
            if self.reserved is None and self.taken:
                loads = [slot.device for slot in self.taken]
                self.reserved = min(dict.fromkeys(loads), key=loads.count)
            return None
        device = self.reserved if any(slot.device == self.reserved for slot in empty) else empty[0].device
        mine = [slot for slot in self.free if slot.device == device]
        for slot in mine:
            self._move(slot)
        self.reserved = None
        # Not more threads on a CPU, where sums of several have other last bits.
        threads = mine[0].threads if device == "cpu" else sum(slot.threads for slot in mine)
        one = Slot(mine[0].device, threads, mine[0].processes)
        self.whole[id(one)] = [one, *mine]  # `one` too: its identity must stay its own
        return one

    def _move(self, slot: Slot) -> None:
        index = next(i for i, other in enumerate(self.free) if other is slot)
        self.taken.append(self.free.pop(index))

    def give(self, slot: Slot) -> None:
        """Takes a slot back."""
        for mine in self.whole.pop(id(slot), [slot, slot])[1:]:
            index = next(i for i, other in enumerate(self.taken) if other is mine)
            self.free.append(self.taken.pop(index))

    def widen(self, device: str, count: int) -> None:
        """Makes the slots of a device as many as `count`, if they are fewer."""
        mine = [slot for slot in (*self.free, *self.taken) if slot.device == device]
        for _ in range(count - len(mine)):
            self.free.append(Slot(device, max(1, mine[0].threads // count), mine[0].processes))


# What becomes of runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """Runs that want to be carried out in one trial. `whole`: nothing else beside them on the device."""

    runs: tuple[str, ...]
    whole: bool = False


@dataclass(frozen=True)
class Verdict:
    """What becomes of a run: `status` is what the runner notes; whether it goes on, alone or with others of its pack that do, and
    whether with a device of its own."""

    status: str
    again: bool = False
    alone: bool = False
    whole: bool = False


def verdict(wish: Wish, result: Mapping[str, Any] | None, lost_before: int, paused: bool = False) -> Verdict:
    """What becomes of a run of `wish` whose process has ended, or has ended it.

    A result is the truth, but for one that ran out of memory beside others: it is tried once more, alone on the device. A process
    that left no result was killed, lost or asked to stop: its run goes on from its checkpoint, RESUMES times, from the second on
    without the others of its pack.
    """
    if result is not None:
        if result.get("status") == "failed" and result.get("cause") == "oom" and not wish.whole:
            return Verdict("crowded", again=True, alone=True, whole=True)
        return Verdict(str(result["status"]))
    if paused:
        return Verdict("paused")
    if lost_before >= RESUMES:
        return Verdict("failed")
    return Verdict("lost", again=True, alone=lost_before > 0, whole=wish.whole)


def wishes(ended: Mapping[str, Verdict]) -> list[Wish]:
    """What the runs of a trial wish for that ended together: one pack of those that go on with others, each other one alone."""
    again = {run: verdict for run, verdict in ended.items() if verdict.again}
    pack = tuple(run for run, verdict in again.items() if not verdict.alone)
    whole = any(again[run].whole for run in pack)
    lone = [Wish((run,), verdict.whole) for run, verdict in again.items() if verdict.alone]
    return [Wish(pack, whole), *lone] if pack else lone


class Streak:
    """Failures in a row that are alike."""

    def __init__(self) -> None:
        self.error, self.count = "", 0

    def ended(self, status: str, error: str) -> str | None:
        """Counts how a run ended. Returns the error that ALIKE runs in a row have ended with, or None."""
        if status != "failed":
            self.error, self.count = "", 0
            return None
        last = error.strip().splitlines()[-1] if error.strip() else "no error was told"
        self.count = self.count + 1 if last == self.error else 1
        self.error = last
        return last if self.count >= ALIKE else None
