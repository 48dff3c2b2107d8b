"""Scheduling, pure: which slots there are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A place where one trial at a time runs."""

    device: str
    threads: int


def slots(devices: tuple[str, ...], per_device: int | str, threads: int | None, cores: int, trials: int) -> list[Slot]:
    """The slots for a sweep of `trials` runs: one a GPU and one a core on a CPU unless asked otherwise; threads share the cores.

    It is the whole sweep that counts, not what is left of it: sums of several threads have other last bits, and a run must not
    depend on how often its sweep was stopped.
    """
    made: list[str] = []
    for device in devices:
        count = per_device if isinstance(per_device, int) else cores if device == "cpu" else 1
        made += [device] * count
    # One after another over the devices, so that few trials spread out.
    order = sorted(range(len(made)), key=lambda i: (made[:i].count(made[i]), i))[: max(1, trials)]
    each = threads or max(1, cores // len(order))
    return [Slot(made[i], each) for i in order]
