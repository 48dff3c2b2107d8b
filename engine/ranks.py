"""The processes that train one run together: what each computes, and what they have to tell one another.

A run's numbers do not depend on how many processes train it, but for rounding (and for variations that draw from torch's own
generator). Each process holds the whole model. The batch of one forward pass is that of the configuration: they share its sequences
evenly or, where these cannot be divided, the forward passes of an iteration.

Gradients are summed once an iteration, after the last backward pass, by all-reduces of our own. DistributedDataParallel was not
taken: it wraps the model, which rules, stacks, adapters and checkpoints address by name, averages where shares of one mean are to
be summed, and has to find out in every pass which parameters have no gradient. What it adds, sums beside the backward pass, gains
the few percent of an iteration that a sum takes among the GPUs of one machine.

Before any sum all agree that nobody has failed. So a process that fails, wherever that is, takes part in the next agreement of the
others and tells them why, and nobody waits for one that is gone. One that was killed is missed by the next sum.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.yaml_files import ConfigError
from engine.device import out_of_memory
from variations.dropout import Dropout
from variations.linear.standard import Linear

PATIENCE = timedelta(minutes=60)  # with the slowest: all wait while the first writes a checkpoint
LARGE = 2**18  # elements of a gradient that is summed where it is; smaller ones are copied together
LETTERS = 16_000  # bytes of what a process tells of its failure, the last of them
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Elsewhere(Exception):
    """Another process of the trial failed. The text says which one and what it raised."""


class NoMemoryElsewhere(Elsewhere, MemoryError):
    """Another process of the trial had no memory left."""


class Lost(Exception):
    """Another process of the trial is gone without a word: nothing more is known of the run than its last checkpoint."""


# Shares ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What one process computes of an iteration.

    `passes` are its forward passes by number, `rows` its sequences of each, `part` how many times as many stand before these. The
    iteration's loss is the sum over all processes and passes of a mean, divided by `parts`.
    """

    passes: Sequence[int]
    rows: slice
    part: int
    parts: int


def divide(batch_size: int, passes: int, rank: int, count: int, together: str = "") -> Share:
    """The share of process `rank` of `count` in `passes` forward passes of `batch_size` sequences each.

    together: why a pass has to have all its sequences in one process, if so. Raises ConfigError where shares cannot be equal.
    """
    if batch_size % count == 0 and not (together and count > 1):
        size = batch_size // count
        return Share(range(passes), slice(rank * size, (rank + 1) * size), rank, passes * count)
    if passes % count == 0:
        # The first process tells of the run, and so has the last pass, whose statistics are told.
        return Share([j for j in range(passes) if (passes - 1 - j) % count == rank], slice(None), 0, passes)
    given = f"train.batch_size is {batch_size} and train.gradient_accumulation_steps is {passes}"
    if together:
        advice = f"{together}; make train.gradient_accumulation_steps a multiple of {count}, or train it by one process"
    else:
        advice = f"make one of them a multiple of {count}"
    raise ConfigError(f"{given}, which {count} processes cannot share evenly: {advice}.")


def undivided(model: nn.Module) -> str:
    """Why the sequences of a forward pass cannot be divided among processes; empty where they can.

    Modules that mix the rows of a batch say so (`separately`); those with an attribute `ranks` ask the others for what they need.
    """
    for path, module in model.named_modules():
        why = getattr(module, "separately", None)
        if why and not hasattr(module, "ranks"):
            return f"{path} is computed of a whole batch ({why})"
        if (
            isinstance(module, Linear)
            and module.experts
            and any(isinstance(m, Dropout) and m.on for m in module.modules())
        ):
            return f"dropout in the adapters of {path} counts tokens in the order of all experts"
    return ""


# Processes ------------------------------------------------------------------------------------------------------------------


class Ranks:
    """This process among those that train a run. Without arguments it is alone, and nothing here costs or changes anything.

    Whatever waits for the others raises Elsewhere where one of them has failed, and Lost where one is gone.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0) -> None:
        self.rank, self.count, self.local = rank, count, local
        self.graded: list[bool] = []  # which parameters had a gradient here in the last iteration
        self.absent: list[int] = []  # those that had none anywhere
        self.dividing = False  # whether each forward pass is shared
        if count > 1:  # not compiled; what says so takes longer to import than all that a run alone needs
            self.gather = torch.compiler.disable(self.gather)  # type: ignore[method-assign]

    def device(self, wanted: str) -> str:
        """This process's own of the devices that a word stands for: a list with commas, or the first of as many GPUs as there are
        processes. Raises ConfigError for a list of another length."""
        names = wanted.split(",")
        if self.count == 1 or names == ["cpu"] or (names == ["auto"] and not torch.cuda.is_available()):
            return wanted
        if len(names) > 1:
            if len(names) != self.count:
                told = f"{wanted} are {len(names)} devices, and {self.count} processes train the run"
                raise ConfigError(f"{told}. Each needs one of its own.")
            return names[self.local]
        first = wanted.partition(":")[2] or "0"
        return f"cuda:{int(first) + self.local}"

    def share(self, model: nn.Module, batch_size: int, passes: int) -> Share:
        """This process's share of every iteration, of which the model's modules are told. Raises ConfigError."""
        if self.count == 1:
            return divide(batch_size, passes, 0, 1)
        made = divide(batch_size, passes, self.rank, self.count, undivided(model))
        self.dividing = made.rows != slice(None)
        for module in model.modules():
            if isinstance(module, Dropout):
                module.part = made.part
            if hasattr(module, "ranks"):
                module.ranks = self if self.dividing else None  # type: ignore[assignment]
            if (moving := getattr(module, "moving", "")) and not self.dividing:
                advice = f"make train.batch_size, which is {batch_size}, a multiple of {self.count}"
                raise ConfigError(f"{moving}, so {self.count} processes cannot share forward passes: {advice}.")
        return made

    # What all have to know --------------------------------------------------------------------------------------------------

    def agree(self, stop: bool = False, news: bool = False, failed: bool = False) -> tuple[bool, bool]:
        """Whether anybody was asked to stop, and has news. On the hosts alone: no GPU is waited for."""
        if self.count == 1:
            return stop, news
        said = torch.tensor([failed, stop, news], dtype=torch.int32)
        self._most(said)
        if said[0]:
            self._hear()
        return bool(said[1]), bool(said[2])

    def _hear(self, own: str | None = None, memory: bool = False) -> None:
        """Tells the others what this process failed of, or raises what one of them did."""
        letters = torch.zeros(self.count, LETTERS, dtype=torch.uint8)
        if own is not None:
            told = (b"m" if memory else b"e") + own.encode(errors="replace")[-LETTERS + 1 :]
            letters[self.rank, : len(told)] = torch.tensor(list(told), dtype=torch.uint8)
        self._most(letters)
        for rank, row in enumerate(letters):
            text = bytes(row.tolist()).rstrip(b"\0")
            if text and own is None:
                kind = NoMemoryElsewhere if text[:1] == b"m" else Elsewhere
                words = text[1:].decode(errors="replace")
                raise kind(f"process {rank + 1} of the {self.count} that train this run failed:\n{words}")

    def _most(self, values: Tensor) -> None:
        """Each number becomes the largest that any process has."""
        with _missing():
            dist.all_reduce(values, dist.ReduceOp.MAX)

    def word(self, own: str) -> str:
        """The first process's word."""
        if self.count == 1:
            return own
        told = own.encode()
        assert len(told) <= LETTERS, "it is a word"
        letters = torch.zeros(LETTERS, dtype=torch.uint8)
        if self.rank == 0:
            letters[: len(told)] = torch.tensor(list(told), dtype=torch.uint8)
        self.agree()
        self._most(letters)
        return bytes(letters.tolist()).rstrip(b"\0").decode()

    def asked(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """`stop` of any process."""
        return stop if self.count == 1 else lambda: self.agree(stop=stop())[0]

    def leave(self, error: Exception | None = None) -> bool:
        """The last of what all do together; the others are told what was raised here. False where one of them is gone."""
        if self.count == 1 or isinstance(error, (Elsewhere, Lost)):
            return not isinstance(error, Lost)
        try:
            if error is None:
                self.agree()
            else:
                self._most(torch.tensor([1, 0, 0], dtype=torch.int32))
                self._hear(_told(error), out_of_memory(error))
        except Elsewhere:
            pass  # after its last checkpoint
        except Lost:
            return False
        return True

    # Sums -------------------------------------------------------------------------------------------------------------------

    def reduce(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sums the gradients over all processes, in place, and the loss, which is returned.

        A gradient that only some have is zero for the others; one that nobody has stays None, as optimizers leave such parameters
        out. The sum is the same, to the bit, in every process: each of its elements is computed once and sent to all.
        """
        if self.count == 1:
            return loss
        graded = [p.grad is not None for p in parameters]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        gradients: list[Any] = [p.grad for p in parameters]
        large = [g for g in gradients if g.numel() >= LARGE]
        small = [g for g in gradients if g.numel() < LARGE]
        flat = torch.cat([*(g.flatten() for g in small), loss.flatten()])
        _, news = self.agree(news=graded != self.graded)
        if news:
            somewhere = torch.tensor(graded, dtype=torch.int32)
            self._most(somewhere)
            self.graded, self.absent = graded, [i for i, found in enumerate(somewhere.tolist()) if not found]
        self._sum(flat, *large)
        *parts, total = flat.split([*(g.numel() for g in small), 1])
        for gradient, part in zip(small, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        for i in self.absent:
            parameters[i].grad = None
        return total.view_as(loss)

    def total(self, *values: Tensor | float) -> list[float]:
        """Numbers, summed over all processes."""
        made = torch.stack([torch.as_tensor(x, dtype=torch.float64).cpu() for x in values])
        if self.count > 1:
            self.agree()
            self._sum(made)
        return made.tolist()

    def means(self, found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """What modules measured, of a whole forward pass."""
        if self.count == 1 or not self.dividing or not found:
            return found
        every = iter(self.total(*(x for some in found.values() for x in some.values())))
        return {path: {name: next(every) / self.count for name in some} for path, some in found.items()}

    def gather(self, x: Tensor) -> Tensor:
        """What every process has, [processes, ...]. No gradient flows through it."""
        self.agree()
        made = x.new_empty(self.count, *x.shape)
        with _missing():
            dist.all_gather(list(made.unbind(0)), x.detach().contiguous())
        return made

    def _sum(self, *tensors: Tensor) -> None:
        with _missing():
            for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
                work.wait()

    def alike(self, iteration: int, tensors: Iterable[Tensor]) -> None:
        """Makes sure that all processes are at one iteration with the same weights, to the bit. Raises RuntimeError."""
        if self.count == 1:
            return
        bits = [_bits(t) for t in tensors]
        mine = torch.tensor([iteration, int(torch.stack(bits).sum())])
        every = self.gather(mine)
        if not bool((every == mine).all()):
            told = "; ".join(f"process {i + 1}: iteration {a}, checksum {b}" for i, (a, b) in enumerate(every.tolist()))
            raise RuntimeError(f"the processes that train this run have other weights than one another ({told})")


@contextmanager
def _missing() -> Iterator[None]:
    """Whatever a sum raises means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(f"another process that trains this run is gone: {error}") from error


def _bits(t: Tensor) -> Tensor:
    """A checksum of a tensor's bits, int64: their sum as whole numbers."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(whole).sum(dtype=torch.int64)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigError) else "".join(traceback.format_exception(error)).rstrip()


# How processes begin --------------------------------------------------------------------------------------------------------


def torchrun(words: Sequence[str], processes: int) -> list[str]:
    """The command by which `processes` processes carry out a trial together; `words` are what Python is given for one of them.

    It is one process, which starts the others through torchrun's own launcher, ends when they have, forwards a signal to stop,
    takes them with it when it is killed, holds the run's lock, and ends with the code that a process alone would have ended with.
    """
    return [sys.executable, "-P", *words, "--processes", str(processes)]


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join() -> Ranks:
    """Meets the other processes that torchrun has started. They do not outlive it."""
    rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    if count > 1:
        # For what is on hosts and for what is on GPUs. No GPU is touched before a tensor of it is summed.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Ranks(rank, count, local)
