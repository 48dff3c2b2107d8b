"""Models divided among running processes: full weights from the first process to all, back to it, and across pipeline stages.

Processes are those of torch.distributed's default group, and process i is rank i of a Sharding: what is here gives each the
tensors that its file would have. All processes call these functions, in the same order. Whatever one of them refuses, all raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from convert.base import shape
from convert.mapping import Mismatch, Source
from convert.ranks import Move, Sharding, joined, known, unlike

Device = torch.device | str


def scatter(
    source: Source | None = None, sharding: Sharding | None = None, device: Device = "cpu"
) -> tuple[Sharding, dict[str, Tensor]]:
    """Full weights of the first process, which alone gives them and the plan, to each process what it is to hold, on `device`.

    Returns the plan, in the source's dtypes, and the tensors under their names here. Raises Mismatch, in all processes, where the
    plan is for another number of them, the source is of other weights, or one of its tensors cannot be read.
    """
    rank, told = dist.get_rank(), ""
    plan = sharding
    if rank == 0:
        assert source is not None and plan is not None, "the first process has the weights"
        try:
            plan = Sharding(known(plan.weights, source), plan.sizes, plan.naming, plan.apart)
            if plan.sizes.count != dist.get_world_size():
                raise Mismatch(
                    [f"The weights lie on {plan.sizes.count} ranks, and there are {dist.get_world_size()} processes."]
                )
        except ValueError as error:
            told = str(error)
    _refuse(told, device)
    text = _word(json.dumps(plan.tree()) if rank == 0 and plan is not None else "", 0, device)
    plan = plan if rank == 0 and plan is not None else Sharding.read(json.loads(text))
    own: dict[str, Tensor] = {}
    for move in plan.moves.values():
        tensors, told = list[Tensor](), ""
        if source is not None and rank == 0:
            try:
                tensors = move.step([source.get(move.name).to(device)])
            except (ValueError, OSError, RuntimeError) as error:
                told = f"{move.name}: {error}"
        _refuse(told, device)
        own |= _deal(plan, move, tensors, device)
    return plan, own


def _deal(plan: Sharding, move: Move, tensors: list[Tensor], device: Device) -> dict[str, Tensor]:
    """One weight's tensors, which the first process has, to where they belong. Returns this process's."""
    rank, sent, own = dist.get_rank(), [], dict[str, Tensor]()
    for i, (where, local) in enumerate(move.places):
        if rank == 0 and where:
            sent.append(_send(tensors[i], where))
        elif rank == 0:
            own[local] = tensors[i].clone(memory_format=torch.contiguous_format)  # not a view of what was given
        elif rank == where:
            own[local] = _receive(plan.ranks[rank][local], 0, device)
    _wait(sent)
    return own


def gather(
    own: Source, sharding: Sharding, take: Callable[[str, Tensor], None] | None = None, device: Device = "cpu"
) -> None:
    """What each process holds, put together in the first one, where `take` is called with every full weight, one after another.

    Raises Mismatch, in all processes: before anything is sent where they have other plans, or tensors of other names, shapes or
    dtypes; at the end where copies differ.
    """
    rank, wrong = dist.get_rank(), list[str]()
    _same(own, sharding, device)
    for move in sharding.moves.values():
        held, sent = list[Tensor](), []
        for where, local in move.places:
            if rank == where == 0:
                held.append(own.get(local).to(device))
            elif rank == 0:
                held.append(_receive(sharding.ranks[where][local], where, device))
            elif rank == where:
                sent.append(_send(own.get(local).to(device), 0))
        _wait(sent)
        if rank == 0:
            try:
                full = joined(move, held)
                if take is not None:
                    take(move.name, full.clone() if any(full is t for t in held) else full)
            except ValueError as error:
                wrong.append(str(error))
    _refuse("\n".join(wrong), device)


def broadcast(own: Source, sharding: Sharding, name: str, device: Device = "cpu") -> list[Tensor]:
    """From the pipeline stage that owns a weight to all others: every process gets what the rank of that stage with its own tensor,
    expert and expert-tensor number holds of it. Several tensors where it has several experts, none of another rank's expert.

    Raises Mismatch, in all processes, where they do not agree on the plan, on their tensors or on the name.
    """
    rank, inner = dist.get_rank(), sharding.sizes.inner
    _same(own, sharding, device, name)
    move, made, sent = sharding.moves[name], list[Tensor](), []
    stage = move.places[0][0] // inner  # of a tied weight the first
    for where, local in move.places:
        if where // inner != stage or where % inner != rank % inner:
            continue
        if rank == where:
            made.append(own.get(local).to(device).clone(memory_format=torch.contiguous_format))
            others = range(where % inner, sharding.sizes.count, inner)
            sent += [_send(made[-1], other) for other in others if other != rank]
        else:
            made.append(_receive(sharding.ranks[where][local], where, device))
    _wait(sent)
    return made


# What processes say to one another -----------------------------------------------------------------------------------------


def _same(own: Source, sharding: Sharding, device: Device, name: str = "") -> None:
    """Raises Mismatch, in all processes, unless all have one plan for as many ranks, and each the tensors that it says."""
    rank, wrong = dist.get_rank(), list[str]()
    if _word(sharding.digest() + name, 0, device) != sharding.digest() + name:
        wrong.append(f"Process {rank} has another plan, or asks for another weight, than the first.")
    elif sharding.sizes.count != dist.get_world_size():
        wrong.append(
            f"The weights lie on {sharding.sizes.count} ranks, and there are {dist.get_world_size()} processes."
        )
    elif name and name not in sharding.moves:
        wrong.append(f"There is no weight {name}.")
    else:
        wrong += unlike(sharding, rank, own)
        for local, meta in sharding.ranks[rank].items() if not wrong else ():
            if own.meta(local).dtype != meta.dtype:
                wrong.append(f"{local} of rank {rank} is {own.meta(local).dtype}, not {meta.dtype} {shape(meta)}.")
    _refuse("\n".join(wrong), device)


def _refuse(wrong: str, device: Device) -> None:
    """Raises Mismatch in all processes with the mistakes of the first that has any."""
    found = torch.tensor(dist.get_rank() if wrong else dist.get_world_size(), device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    if (who := int(found)) < dist.get_world_size():
        raise Mismatch(_word(wrong, who, device).split("\n"))


def _word(text: str, who: int, device: Device) -> str:
    """One process's text, for all."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(own), device=device)
    dist.broadcast(length, who)
    letters = own.to(device) if dist.get_rank() == who else torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(letters, who)
    return bytes(letters.cpu().numpy()).decode()


def _send(tensor: Tensor, to: int) -> tuple[dist.Work | None, Tensor]:
    """Begins to send a tensor's bytes: not every dtype is known to those who carry them. They are kept until they were sent."""
    carried = tensor.contiguous().reshape(-1).view(torch.uint8)
    return dist.isend(carried, to), carried


def _receive(meta: Tensor, of: int, device: Device) -> Tensor:
    made = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    dist.recv(made.reshape(-1).view(torch.uint8), of)
    return made


def _wait(sent: list[tuple[dist.Work | None, Tensor]]) -> None:
    for work, _ in sent:
        if work is not None:
            work.wait()
