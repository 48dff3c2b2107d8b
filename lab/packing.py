"""Packs, pure: which runs may be trained in one process, which of them not folded into one model, and how many at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from core.options import Catalogue, Variant, fields_of, plain
from lab.plan import Slot

if TYPE_CHECKING:
    from lab.expand import Run
    from train_args import Config, RunnerConfig

WHOLE = ("schedule", "init")  # kinds of which nothing is in the forward graph
MOST = 16  # runs of a pack on a CPU that nobody asked for: more save little and are told of late
BYTES = 16  # of a parameter: weight, gradient and two moments in float32
SHARE = 0.5  # of the memory, for what lasts: activations and checkpoints on their way come on top


# Which runs -----------------------------------------------------------------------------------------------------------------


def key(config: Config, content: Mapping[str, str]) -> str:
    """Equal for runs that may be one pack: those that differ in knobs alone, and in what is no part of an identity.

    content: hashes of the data, plugins and base. A knob that is zero or null is another graph than a number, but for those of
    optimizers.
    """
    told = json.dumps([sorted(content.items()), _graph(config)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _fields(options: Any) -> Iterator[tuple[str, Any]]:
    cls: Any = type(options)
    yield from fields_of(cls).items()


def _graph(value: Any, numbers: bool = True) -> Any:
    """What of options decides shapes and graph. numbers: whether a knob does, by being zero or null; an optimizer's does not."""
    if isinstance(value, Variant):
        return [value.name, _graph(value.options, numbers)]
    if isinstance(value, Mapping):
        return [[name, _graph(inner)] for name, inner in value.items() if _says(inner)]
    if not is_dataclass(value):
        return plain(value)
    made: dict[str, Any] = {}
    for name, spec in _fields(value):
        got, knob = getattr(value, spec.name), spec.metadata.get("knob", False)
        if not spec.metadata.get("identity", True) or spec.metadata.get("kind") in WHOLE:
            continue
        if "absent" in spec.metadata:  # of a rule, which may say nothing
            made |= {name: _graph(got)} if got is not None and not knob else {}
        else:
            of_optimizer = spec.metadata.get("kind") == "optimizer"
            made[name] = numbers and _is_on(name, got) if knob else _graph(got, not of_optimizer)
    return made


def _is_on(name: str, knob: Any) -> Any:
    """Whether a knob is a number other than zero; of each of a tuple. Every seed is a seed."""
    if name.endswith("seed"):
        return True
    return [bool(x) for x in knob] if isinstance(knob, tuple) else bool(knob)


def _says(entry: Any) -> bool:
    """Whether an entry of a table says more than knobs and where they hold."""
    if not is_dataclass(entry):
        return True
    said = {name for name, spec in _fields(entry) if "absent" in spec.metadata}
    return not said or not said.isdisjoint(_graph(entry))


def reason(config: Config, catalogue: Catalogue) -> str | None:
    """Why a run cannot be folded with others into one model, as a sentence, or None."""
    if config.train.dtype == "float16":
        return "The loss scaling of train.dtype: float16 reads the gradient's norm at each step."
    if config.tracking.slice_interval is not None:
        return "tracking.slice_interval measures the weights before and after an update."
    nodes = {*_nodes(config), *(("attention", name) for name in config.model.layer_pattern)}
    found = ((kind, name, getattr(catalogue[kind].get(name), "solo", None)) for kind, name in sorted(nodes))
    return next((f"{kind} {name}: {why}" for kind, name, why in found if why), None)


def _nodes(value: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of every variation in options, those inside others, in sites and in rules too."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _nodes(inner)
    elif is_dataclass(value):
        for _, spec in _fields(value):
            got = getattr(value, spec.name)
            if isinstance(got, Variant):
                yield spec.metadata["kind"], got.name
                yield from _nodes(got.options)
            else:
                yield from _nodes(got)


# How many -------------------------------------------------------------------------------------------------------------------


def wanted(runner: RunnerConfig, slots: Sequence[Slot]) -> int | str:
    """What `runner.pack: auto` means here: packs on a GPU, where they are folded, and on a CPU where each trial would be a new
    process; with warm workers only of what is 'small', and folded on a CPU too."""
    if runner.devices_per_trial > 1:
        return "off"
    if runner.pack != "auto":
        return runner.pack
    if runner.executor != "local":  # nobody knows how many places a cluster has
        return "off"
    needed = any(slot.device.startswith("cuda") for slot in slots) or not runner.warm
    return "auto" if needed else "small"


def groups(
    runs: Sequence[Run],
    pack: int | str,
    slots: Sequence[Slot],
    content: Callable[[Run], Mapping[str, str]],
    catalogue: Catalogue,
    most: Callable[[Run], int],
    small: Callable[[Run], bool] = lambda run: True,
) -> list[list[Run]]:
    """The trials of runs, each a pack; runs and packs stay in their order. pack: as `wanted` says.

    On a CPU a pack saves the start of processes, or the calls of kernels, so slots share what there is. On a GPU it is one folded
    model. A run that cannot be folded where the others are is alone. most: how many runs like one of them the memory of a slot
    holds (asked of a CPU alone). small: whether runs like one are.
    """
    if pack == "off":
        return [[run] for run in runs]
    cuda = any(slot.device.startswith("cuda") for slot in slots)
    folded = cuda or pack == "small"
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alone = folded and reason(run.config, catalogue) is not None
        alike.setdefault(run.hash if alone else key(run.config, content(run)), []).append(run)
    made = []
    for some in alike.values():
        if isinstance(pack, int):
            count = -(-len(some) // pack)
        elif pack == "small" and not small(some[0]):
            count = len(some)
        else:
            count = min(len(slots), len(some))
            if not cuda and count < len(some):
                count *= -(-len(some) // (count * min(MOST, most(some[0]))))  # every slot has as many
        made += _divided(some, min(count, len(some)))
    place = {run.hash: i for i, run in enumerate(runs)}
    return sorted(made, key=lambda trial: place[trial[0].hash])


def fitting(parameters: int, memory: int, slots: int) -> int:
    """How many runs of so many parameters a pack may have where `slots` of them share `memory` bytes."""
    return max(1, int(memory * SHARE) // slots // (BYTES * max(1, parameters)))


def _divided(runs: list[Run], count: int) -> list[list[Run]]:
    """Neighbours together, in `count` parts whose lengths differ by one at most."""
    cuts = [len(runs) * i // count for i in range(count + 1)]
    return [runs[a:b] for a, b in itertools.pairwise(cuts)]
