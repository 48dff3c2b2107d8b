"""`python -m convert check`: whether two checkpoints hold the same weights, whatever format each has."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from torch import Tensor

from convert.mapping import Source
from convert.places import opened
from convert.steps import shape

SAME, DIFFERENT = 0, 1
SHOWN = 20  # lines of one kind


def arguments(parser: argparse.ArgumentParser) -> None:
    about = "a run folder, a folder in Hugging Face's format, files of parallel ranks, or a file of safetensors"
    for name in ("first", "second"):
        parser.add_argument(name, metavar=name.upper(), help=about)
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference of two numbers, absolute (default 0)"
    )


def act(given: argparse.Namespace) -> int:
    """Compares every weight under our names. Returns 1 where one is missing, of another shape, or differs by more than allowed."""
    first, second = opened(given.first), opened(given.second)
    wrong = list(differences(first, second, given.tolerance))
    for line in wrong[:SHOWN]:
        print(line)
    if len(wrong) > SHOWN:
        print(f"... and {len(wrong) - SHOWN} more")
    count = len({*first.names(), *second.names()})
    print(f"{count} weights: {count - len(wrong)} the same, {len(wrong)} not")
    return DIFFERENT if wrong else SAME


def differences(first: Source, second: Source, tolerance: float) -> Iterator[str]:
    """A line for each weight that the two do not hold alike; one of each is in memory at a time."""
    names, others = first.names(), set(second.names())
    for name in names:
        if name not in others:
            yield f"{name}: only in the first"
        elif shape(first.meta(name)) != shape(second.meta(name)):
            yield f"{name}: {shape(first.meta(name))} in the first, {shape(second.meta(name))} in the second"
        elif told := _apart(first.get(name), second.get(name), tolerance):
            yield f"{name}: {told}"
    yield from (f"{name}: only in the second" for name in second.names() if name not in set(names))


def _apart(a: Tensor, b: Tensor, tolerance: float) -> str:
    """How two tensors of one shape differ, in words; empty where they do not. What is no number equals itself."""
    wide = [t.double() for t in (a, b)] if a.is_floating_point() or b.is_floating_point() else [a, b]
    same = (wide[0] == wide[1]) | ((wide[0] != wide[0]) & (wide[1] != wide[1]))
    if bool(same.all()):
        return ""
    apart = (wide[0] - wide[1]).abs().where(~same, wide[0].new_zeros(()))
    far = ~(apart <= tolerance)
    if not bool(far.any()):
        return ""
    dtypes = "" if a.dtype == b.dtype else f", {a.dtype} and {b.dtype}".replace("torch.", "")
    return f"{int(far.sum()):,} of {a.numel():,} numbers differ, by at most {float(apart.max()):.3g}{dtypes}"
