"""Runs trained together in one process: on a CPU one after another between evaluations, on a GPU as one folded model.

Whoever starts a pack makes each run as it would alone. Folders, records, results and checkpoints are those of solo runs.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence

import torch

from core.runs import fits, sizes
from core.weights import load_weights, weights
from engine.course import Course, Ended, take_turns
from engine.course import Member as Member  # for those who start a pack
from engine.device import calls_per_second, peak_memory
from engine.loop import Run
from engine.together import Together

WORTH = 1.1  # twice as many runs are to make a pack so much faster
ROOM = 0.9  # share of a device's memory that a pack may take
PROBE = 0.5  # seconds of each measurement


def train(
    members: Sequence[Member],
    ended: Ended,
    most: int | None = None,
    fold: bool | None = None,
    exact: bool | None = None,
) -> None:
    """Trains every member to its end. What one raises ends that one alone. Raises what `ended` raises.

    most: how many are computed at once; None: as many as make it faster. fold: whether they are computed as one model; None: on a
    GPU. One that is alone is the plain model. exact: whether the folded model rounds as the plain one and each run's own optimizers
    update it; None: on a CPU, and where train.deterministic is asked.
    """
    courses = [Course(member, ended) for member in members]
    folding = fold if fold is not None else any(member.run.device.type == "cuda" for member in members)
    try:
        while folding and (waiting := [course for course in courses if course.ask is not None]):
            if most is None and waiting[0].run.device.type == "cuda":
                most = knee(waiting)
            some = together(waiting[:most])
            if not some:
                break
            Together(some, exact).go_on()
    except Exception:  # of all of them; whose it was is seen when they go on by themselves
        print(f"these runs go on one after another, because together they failed:\n{traceback.format_exc()}")
    take_turns(courses)


def together(courses: Sequence[Course]) -> list[Course]:
    """The largest number of these courses that can be folded, from the first on; none where it would be one."""
    first, known = courses[0].run.config, sizes([course.run.plain for course in courses])
    for count in range(len(courses), 1, -1):
        if fits(known, count * first.train.batch_size, first.model.block_size):
            return list(courses[:count])
    return []


# How many --------------------------------------------------------------------------------------------------------------------


def knee(courses: Sequence[Course]) -> int:
    """How many runs to compute at once: twice as many as long as that is worth it and fits in memory; 1 where solo is faster.

    Measured on the runs themselves, by steps that leave them as they are.
    """
    device = courses[0].run.device
    speeds = {1: solo_speed(courses[0].run)}
    used: dict[int, int] = {}
    count = 2
    while count <= len(courses):
        some = together(courses[:count])
        count *= 2
        if len(some) < 2 or len(some) in speeds:
            continue  # no such number of runs can be told from the model's sizes; a larger one may
        if len(used) > 1 and _memory(used, len(some)) > ROOM * _total(device):
            break
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            pack = Together(some, exact=False)
            try:
                speeds[len(some)] = pack.speed(PROBE)
            finally:  # also where memory ran out, which it holds
                pack.leave()
            used[len(some)] = peak_memory(device)
        except torch.OutOfMemoryError:
            break
        if len(speeds) > 2 and speeds[len(some)] < WORTH * list(speeds.values())[-2]:
            break
    return max(speeds, key=lambda n: speeds[n])


def _memory(used: dict[int, int], count: int) -> float:
    """Bytes that `count` runs need, by a line through the first two that were measured."""
    (a, low), (b, high) = list(used.items())[:2]
    return low + (high - low) / (b - a) * (count - a)


def _total(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else float("inf")


def solo_speed(run: Run) -> float:
    """Training tokens a second of a run alone. It is left as it was."""
    state, values = copy.deepcopy(run.state), {name: t.clone() for name, t in weights(run.plain).items()}
    moments = {name: t.clone() for name, t in run.optimizers.state().items()}
    for _ in range(3):
        run.update()
    updates = calls_per_second(run.update, run.device, PROBE)
    vars(run.state).update(vars(state))  # the same object, which its course has too
    run.losses, run.grad_norm, run.telemetry = [], None, None
    run.optimizers.zero_grad()
    load_weights(run.plain, values)
    run.optimizers.load(moments)
    return updates * run.config.tokens_per_iter
