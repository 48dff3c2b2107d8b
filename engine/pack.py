"""Runs trained together in one process: on a GPU as one folded model, on a CPU too where they are small, else one after another
between evaluations.

Whoever starts a pack makes each run as it would alone. Folders, records, results and checkpoints are those of solo runs.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence

import torch

from core.runs import fits, sizes
from core.weights import load_weights, weights
from engine.course import Course, Ended, Maker, Queue, take_turns
from engine.course import Judge as Judge  # for those who start a pack
from engine.course import Member as Member
from engine.device import calls_per_second, free_memory, out_of_memory, peak_memory
from engine.loop import Run
from engine.rehearsal import Rehearsal, small
from engine.together import HalfMoved, Together

WORTH = 1.1  # twice as many runs are to make a pack so much faster
ROOM = 0.9  # share of a device's memory that a pack may take
PROBE = 0.5  # seconds of each measurement


def train(
    makers: Sequence[Maker],
    ended: Ended,
    most: int | None = None,
    fold: bool | None = None,
    exact: bool | None = None,
) -> None:
    """Trains every run to its end. What one raises ends that one alone. Raises what `ended` raises.

    most: how many are computed at once, while others wait until one of these has ended; None: as many as make it faster.
    fold: whether they are computed as one model; None: on a GPU, and on a CPU where they are small and a rehearsal has shown that
    it is faster and moves no bit. One that is alone is the plain model. exact: whether the folded model rounds as the plain one and
    each run's own optimizers update it; None: on a CPU, and where train.deterministic is asked.

    Where memory runs out, no run ends but one that is alone: all are given up (their members end with Anew), made anew from their
    checkpoints, and computed half as many at once.
    """
    queue, failed = Queue(makers, ended), False
    while first := queue[:1]:
        cuda, short = first[0].run.device.type == "cuda", False
        rehearsed = fold is None and not cuda
        folding = not failed and (fold if fold is not None else cuda or _may(first[0].run))
        try:
            if folding:
                most = knee(queue) if most is None and cuda else most
                folding = _fold(queue, most, exact, rehearsed)
            if not folding:
                take_turns(queue, most)
        except Exception as error:  # of all of them; whose it was is seen when they go on by themselves
            short = out_of_memory(error) and queue.count() > 0
            if not (short or folding):
                raise
            failed, live = failed or not short, max(1, len(queue.live()))
            if short:
                most = max(1, live // 2)
                print(
                    f"memory is out with {live} runs at a time: they go on with {most}, from their checkpoints ({error})"
                )
            else:
                why = str(error) if rehearsed else f"together they failed:\n{traceback.format_exc()}"
                print(f"these runs go on one after another: {why}")
            if short or rehearsed or isinstance(error, HalfMoved):
                queue.put_down()
            queue.give_back(queue.live())
        del first
        if short:  # what failed is held by its error no longer
            free_memory()


def _may(run: Run) -> bool:
    """Whether runs like this one may be folded on a CPU, where threads are part of how a kernel rounds."""
    count = sum(p.numel() for p in run.plain.parameters())
    return small(run.config, count) and run.state.threads in (0, torch.get_num_threads())


def _fold(queue: Queue, most: int | None, exact: bool | None, rehearsed: bool) -> bool:
    """Trains the next runs as one model, as long as that is worth it; False where fewer than two can be, or a rehearsal says no."""
    count = len(together(queue[:most]))
    if not count:
        return False
    some = queue.take(count)
    rehearsal = Rehearsal([course.run for course in some]) if rehearsed else None
    pack = Together(some, exact, queue)
    pack.evaluates = rehearsal is None  # evaluations have shapes of their own
    agreed = rehearsal is None or rehearsal.agrees(pack)
    pack.go_on() if agreed else pack.leave()
    queue.give_back(queue.live())
    return agreed


def together(courses: Sequence[Course]) -> list[Course]:
    """The largest number of these courses that can be folded, from the first on; none where it would be one."""
    if not courses:
        return []
    first, known = courses[0].run.config, sizes([course.run.plain for course in courses])
    for count in range(len(courses), 1, -1):
        if fits(known, count * first.train.batch_size, first.model.block_size):
            return list(courses[:count])
    return []


# How many --------------------------------------------------------------------------------------------------------------------


def knee(courses: Sequence[Course] | Queue) -> int:
    """How many runs to compute at once: twice as many as long as that is worth it and fits in memory; 1 where solo is faster.

    Measured on the runs themselves, by steps that leave them as they are.
    """
    run = courses[:1][0].run
    device, speeds = run.device, {1: solo_speed(run)}
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
        except Exception as error:
            if not out_of_memory(error):
                raise
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
