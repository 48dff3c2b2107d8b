"""Weights sent among running processes: what files would give each, to the bit; and what one refuses, all refuse."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from runs import PATIENCE
from safetensors.torch import load_file, save_file
from test_ranks_of_weights import MODELS
from torch import Tensor

from convert.choice import choose
from convert.files import Folder
from convert.kinds import Sizes, Weight
from convert.live import broadcast, gather, scatter
from convert.mapping import Mismatch, Tensors
from convert.ranks import Rank, Sharding, write
from core.weights import weights

# What two processes try, and what four; of each model all ways to divide it.
TRIED: dict[int, list[tuple[str, Sizes]]] = {
    2: [
        ("a GPT-2", Sizes(tensor=2)),
        ("a GPT-2", Sizes(pipeline=2)),
        ("numbers that are sums", Sizes(expert=2, expert_tensor=1)),
        ("a hybrid", Sizes(tensor=2)),
    ],
    4: [
        ("a Llama", Sizes(tensor=4)),
        ("a Llama", Sizes(pipeline=2, tensor=2, layers=(1, 2))),
        ("experts", Sizes(pipeline=2, expert=2)),
        ("experts", Sizes(tensor=2, expert=2)),
        ("a hybrid", Sizes(pipeline=4)),
    ],
}


def sharded(name: str, sizes: Sizes) -> tuple[Sharding, dict[str, Tensor]]:
    """The same in every process, of seeds alone; some weights in another dtype than the model's."""
    model = models.scrambled(**MODELS[name])
    own = {n: t.bfloat16() if ".mlp." in n else t for n, t in weights(model).items()}
    return Sharding(choose(model), sizes), own


def tried(rank: int, folder: Path) -> None:
    """Leaves in a folder what this process got and gathered."""
    for i, (name, sizes) in enumerate(TRIED[dist.get_world_size()]):
        sharding, full = sharded(name, sizes)
        given = (Tensors(full), sharding) if rank == 0 else (None, None)
        plan, own = scatter(*given)
        assert not {t.data_ptr() for t in own.values()} & {t.data_ptr() for t in full.values()}
        save_file(own, folder / f"{i}-of-{rank}.safetensors")
        assert plan.sizes == sizes and plan.weights.keys() == full.keys()

        whole: dict[str, Tensor] = {}
        gather(Tensors(own), plan, whole.__setitem__ if rank == 0 else None)
        assert whole.keys() == (full.keys() if rank == 0 else set())
        assert all(torch.equal(t, full[n]) and t.dtype == full[n].dtype for n, t in whole.items())
        if rank == 0:
            save_file({n: t.clone() for n, t in whole.items()}, folder / f"{i}-full.safetensors")
            assert not {t.data_ptr() for t in whole.values()} & {t.data_ptr() for t in own.values()}
        gather(Tensors(own), plan)  # to whom nobody listens

        got: dict[str, Tensor] = {}
        for weight in plan.weights:
            got |= {f"{weight}/{j}": t for j, t in enumerate(broadcast(Tensors(own), plan, weight))}
        save_file(got, folder / f"{i}-sent-{rank}.safetensors")
    for refuse in (other_numbers, other_source, unread, other_plan, other_tensors, other_copies, other_name):
        refuse(rank)


def refused(act: Callable[[], object], told: str) -> None:
    """Every process raises the same, and none waits for another."""
    with pytest.raises(Mismatch) as caught:
        act()
    assert str(caught.value) == told, str(caught.value)


def plan_of(sizes: Sizes | None = None) -> tuple[Sharding, dict[str, Tensor]]:
    made = {"h.0.a": Weight((4, 2), "column"), "ln_f.b": Weight((2,), "replicated")}
    full = {"h.0.a": torch.arange(8.0).reshape(4, 2), "ln_f.b": torch.ones(2)}
    return Sharding(made, sizes or Sizes(tensor=dist.get_world_size())), full


def other_numbers(rank: int) -> None:
    sharding, full = plan_of(Sizes(tensor=1))
    told = f"The weights lie on 1 ranks, and there are {dist.get_world_size()} processes."
    refused(lambda: scatter(Tensors(full), sharding) if rank == 0 else scatter(), told)
    refused(lambda: gather(Tensors({}), sharding), told)


def other_source(rank: int) -> None:
    sharding, full = plan_of()
    del full["h.0.a"]
    told = "The source has no h.0.a."
    refused(lambda: scatter(Tensors(full), sharding) if rank == 0 else scatter(), told)


class Torn(Tensors):
    """A source whose second tensor cannot be read."""

    def get(self, name: str) -> Tensor:
        if name == "ln_f.b":
            raise OSError("the disk is gone")
        return super().get(name)


def unread(rank: int) -> None:
    sharding, full = plan_of()
    refused(lambda: scatter(Torn(full), sharding) if rank == 0 else scatter(), "ln_f.b: the disk is gone")


def other_plan(rank: int) -> None:
    sharding, full = plan_of()
    own = Tensors({n: Rank(sharding, Tensors(full), rank).get(n) for n in sharding.ranks[rank]})
    if rank == 1:
        sharding = Sharding(
            {**sharding.weights, "h.0.a": replace(sharding.weights["h.0.a"], multiple=2)}, sharding.sizes
        )
    refused(lambda: gather(own, sharding), "Process 1 has another plan, or asks for another weight, than the first.")


def other_tensors(rank: int) -> None:
    sharding, full = plan_of()
    own = {n: Rank(sharding, Tensors(full), rank).get(n) for n in sharding.ranks[rank]}
    last = dist.get_world_size() - 1
    if rank == last:
        own["h.0.a"] = own["h.0.a"].double()
    size = 4 // dist.get_world_size()
    told = f"h.0.a of rank {last} is torch.float64, not torch.float32 [{size}, 2]."
    refused(lambda: gather(Tensors(own), sharding), told)
    if rank == last:
        own["h.0.a"] = own["h.0.a"].float()[:0]
    told = f"h.0.a of rank {last} is [0, 2], not [{size}, 2]."
    refused(lambda: broadcast(Tensors(own), sharding, "h.0.a"), told)


def other_copies(rank: int) -> None:
    sharding, full = plan_of()
    own = {n: Rank(sharding, Tensors(full), rank).get(n) for n in sharding.ranks[rank]}
    if rank == 1:
        own["ln_f.b"] = torch.tensor([1.0, 2.0])
    heard: list[str] = []
    ranks = ", ".join(map(str, range(dist.get_world_size())))
    told = f"ln_f.b, which is on ranks {ranks}: copy 1 differs from the first in 1 of 2 values."
    refused(lambda: gather(Tensors(own), sharding, lambda name, full: heard.append(name)), told)
    assert heard == (["h.0.a"] if rank == 0 else [])


def other_name(rank: int) -> None:
    sharding, full = plan_of()
    own = Tensors({n: Rank(sharding, Tensors(full), rank).get(n) for n in sharding.ranks[rank]})
    refused(lambda: broadcast(own, sharding, "h.1.a"), "There is no weight h.1.a.")
    name = "ln_f.b" if rank == 1 else "h.0.a"
    refused(
        lambda: broadcast(own, sharding, name),
        "Process 1 has another plan, or asks for another weight, than the first.",
    )


# Processes -----------------------------------------------------------------------------------------------------------------


def begin(rank: int, count: int, folder: Path) -> None:
    """One of the processes. What it raises is left in a file."""
    try:
        torch.set_num_threads(1)
        meeting, patience = f"file://{folder}/store", timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=patience)
        tried(rank, folder)
        dist.barrier()
    except BaseException:
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """How many processes there were, and the folder in which they left what they got."""
    count: int = request.param
    folder = tmp_path_factory.mktemp(f"of-{count}")
    # Of a process that has everything imported: a cold start takes longer than all that is tried.
    started = [multiprocessing.get_context("fork").Process(target=begin, args=(r, count, folder)) for r in range(count)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(2 * PATIENCE)
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
    wrong = "\n".join(path.read_text() for path in sorted(folder.glob("failed-*")))
    assert [process.exitcode for process in started] == [0] * count, wrong
    return count, folder


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours
    )


def test_processes_get_what_files_have(together: tuple[int, Path], tmp_path: Path) -> None:
    count, folder = together
    for i, (name, sizes) in enumerate(TRIED[count]):
        sharding, full = sharded(name, sizes)
        write(Tensors(full), sharding, tmp_path / f"{i}")
        for rank in range(count):
            there = load_file(tmp_path / f"{i}" / f"rank-{rank:05}-of-{count:05}.safetensors")
            assert alike(load_file(folder / f"{i}-of-{rank}.safetensors"), there), (name, rank)


def test_the_first_process_has_the_full_weights_again(together: tuple[int, Path]) -> None:
    count, folder = together
    for i, (name, sizes) in enumerate(TRIED[count]):
        assert alike(load_file(folder / f"{i}-full.safetensors"), sharded(name, sizes)[1])


def test_every_stage_gets_what_the_one_that_owns_it_has(together: tuple[int, Path]) -> None:
    count, folder = together
    for i, (name, sizes) in enumerate(TRIED[count]):
        sharding, _ = sharded(name, sizes)
        own: list[Any] = [Folder(folder / f"{i}-of-{rank}.safetensors") for rank in range(count)]
        for rank in range(count):
            got = load_file(folder / f"{i}-sent-{rank}.safetensors")
            wanted: dict[str, Tensor] = {}
            for weight, move in sharding.moves.items():
                owner = move.places[0][0] // sizes.inner * sizes.inner + rank % sizes.inner
                there = [local for where, local in move.places if where == owner]
                wanted |= {f"{weight}/{j}": own[owner].get(local) for j, local in enumerate(there)}
            assert alike(got, wanted), (name, rank)
