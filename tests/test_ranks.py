"""Several processes that train one run: the same numbers as one process, one voice, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pair
import pytest
import runs
import torch
from runs import PATIENCE, ROOT, alive, until
from safetensors.torch import load_file
from torch import nn

from core.options import plain
from core.weights import weights
from core.yaml_files import ConfigError, dump
from engine.course import Member
from engine.ranks import Elsewhere, NoMemoryElsewhere, Ranks, divide, torchrun, undivided
from lab import store
from lab.listing import open_listing
from lab.several import train
from variations.dropout import Dropout

SGD = {"variant": "sgd", "learning_rate": 0.3, "momentum": 0.9}
MOE = {"variant": "moe", "experts": 4, "width": 8, "load_balance": 0.5, "z_loss": 0.1}
LORA = {
    "base": {"match": "**", "frozen": True},
    "adapt": {"match": "h.*.attn.qkv[q,v]", "lora": {"rank": 2, "alpha": 8, "dropout": 0.3}},
}
FULL = {**MOE, "bias_rate": 0.01, "capacity_factor": 1.1}
# Without clipping, and with an optimizer that a factor of the gradient moves as much, unless they are what is tried.
CASES: dict[str, dict[str, Any]] = {
    "sgd, accumulation": {"optimizer": SGD, "train__gradient_accumulation_steps": 3},
    "adamw, dropout, clipping": {"model__dropout": 0.3, "model__bias": False, "train__grad_clip": 0.05},
    "muon, untied": {"optimizer": {"variant": "muon", "learning_rate": 0.02}, "model__tie_weights": False},
    "forward passes are shared": {
        "optimizer": SGD,
        "train__batch_size": 3,
        "train__gradient_accumulation_steps": 4,
        "model__dropout": 0.3,
    },
    "adapters": {"optimizer": {**SGD, "learning_rate": 3.0}, "slices": LORA, "model__dropout": 0.1},
    "stacked": {"optimizer": SGD, "model__stack_layers": True, "model__bias": False, "tracking__slice_interval": 4},
    "experts share a batch": {"optimizer": SGD, "model__mlp": FULL, "model__dropout": 0.1, "train__gradient_accumulation_steps": 2},
    "experts share passes": {"optimizer": SGD, "model__mlp": MOE, "train__batch_size": 1, "train__gradient_accumulation_steps": 2},
    "diverging": {"optimizer": {"variant": "sgd", "learning_rate": 1e30}, "train__eval_interval": 8, "train__log_interval": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pairs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have trained every case."""
    folder = tmp_path_factory.mktemp("pairs")
    changes = {name: {"train__grad_clip": None, **some} for name, some in CASES.items()} | {"rungs": {}}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = [sys.executable, str(ROOT / "tests" / "pair.py"), str(root), str(folder), json.dumps(changes)]
    started = [
        subprocess.Popen(
            words, env={**common, "RANK": str(i), "LOCAL_RANK": str(i)}, text=True, stdout=-1, stderr=subprocess.STDOUT
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=2 * PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(told)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(root: Path, tmp_path: Path, pairs: Path, case: str) -> None:
    config, corpus = runs.read(root, **{"train__grad_clip": None, **CASES[case]})
    run = runs.make(tmp_path, config, corpus)
    kept = pair.keep(run)
    how = runs.drive(run)
    kept |= {f"after/{name}": t for name, t in weights(run.plain).items()}
    assert (pairs / case / "how").read_text() == how == ("diverged" if case == "diverging" else "done")
    there = load_file(pairs / case / "kept.safetensors")
    assert there.keys() == kept.keys()

    before = {name: t for name, t in kept.items() if name.startswith("before/")}
    assert all(torch.equal(there[name], t) for name, t in before.items())
    gradients = {name for name in kept if name.startswith("gradient/")}
    assert gradients
    for name in gradients:
        # A sum over some hundred tokens in another order, of which some are added earlier: each rounding is 6e-8 of a partial sum,
        # and they are of either sign. The gradient of a key's bias is nothing but rounding of the others', which are below 1.
        assert (there[name] - kept[name]).norm() <= 1e-6 * kept[name].norm() + 1e-7, name
    if how == "done":
        moved = sum((t - before[f"before/{name}"]).norm() for name, t in weights(run.plain).items())
        apart = sum((there[f"after/{name}"] - t).norm() for name, t in weights(run.plain).items())
        # Eight updates carry on the roundings of each, and Muon makes all singular values of a gradient equal, small ones too.
        assert moved > 0 and apart <= 3e-5 * moved


@pytest.mark.parametrize("case", CASES)
def test_one_process_tells_what_all_have_measured(root: Path, tmp_path: Path, pairs: Path, case: str) -> None:
    config, corpus = runs.read(root, **{"train__grad_clip": None, **CASES[case]})
    runs.drive(runs.make(tmp_path, config, corpus))
    here, there = runs.records(tmp_path), runs.records(pairs / case)
    assert len(here) == len(there) > 2
    for one, other in zip(_flat(here), _flat(there), strict=True):
        assert one == other or one == pytest.approx(other, rel=1e-5)  # of weights that are as near as above


def test_the_first_process_s_judge_decides_for_all(pairs: Path) -> None:
    assert (pairs / "rungs" / "how").read_text() == "Paused"
    assert max((pairs / "rungs" / "checkpoint").iterdir()).name == "00000005"
    assert [r["iter"] for r in runs.records(pairs / "rungs", "eval")] == [0, 2, 4, 5]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _flat(inner)
    else:
        yield value


# Shares ---------------------------------------------------------------------------------------------------------------------


def test_every_sequence_is_in_one_share() -> None:
    for size, passes, count in ((4, 1, 1), (4, 1, 4), (6, 3, 2), (3, 4, 2), (1, 6, 3), (5, 10, 5)):
        seen: list[tuple[int, int]] = []
        for rank in range(count):
            share = divide(size, passes, rank, count)
            rows = range(size)[share.rows]
            seen += [(j, row) for j in share.passes for row in rows]
            assert share.parts * len(rows) == size * passes, "the mean over sequences"
            assert share.part * len(rows) == rows.start
        assert sorted(seen) == [(j, row) for j in range(passes) for row in range(size)]
    assert divide(3, 4, 0, 2).passes[-1] == 3, "the first process tells what was measured in the last pass"


def test_what_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        divide(3, 5, 0, 2)
    assert str(caught.value) == (
        "train.batch_size is 3 and train.gradient_accumulation_steps is 5, which 2 processes cannot share evenly: "
        "make one of them a multiple of 2."
    )


class Mean(nn.Module):
    separately = "the mean is over a batch"


def test_modules_that_mix_a_batch() -> None:
    model = nn.ModuleDict({"mean": Mean()})
    assert undivided(nn.ModuleDict()) == ""
    assert Ranks(1, 2).share(model, 2, 4).rows == slice(None), "whole passes"
    with pytest.raises(
        ConfigError, match=r"mean is computed of a whole batch \(the mean is over a batch\); make train.grad"
    ):
        Ranks(0, 2).share(model, 2, 3)


def test_experts_that_cannot_be_shared(root: Path) -> None:
    def model(**mlp: Any) -> nn.Module:
        config, corpus = runs.read(root, model__mlp={**MOE, **mlp}, slices=slices)
        return runs.make(root / "unused", config, corpus).plain

    slices: dict[str, Any] = {}
    moving = model(bias_rate=0.01)
    share = Ranks(1, 2).share(moving, 4, 1)
    assert share.rows == slice(2, 4)
    with pytest.raises(
        ConfigError, match=r"the bias of h\.0\.mlp moves in every .* make train\.batch_size, which is 3, a multiple"
    ):
        Ranks(0, 2).share(moving, 3, 2)
    slices["adapt"] = {"match": "h.0.mlp.down", "lora": {"rank": 2, "dropout": 0.5}}
    dropping = model()
    assert Ranks(0, 2).share(dropping, 4, 2).rows == slice(None)
    assert {m.part for m in dropping.modules() if isinstance(m, Dropout)} == {0}
    with pytest.raises(ConfigError, match=r"dropout in the adapters of h\.0\.mlp\.down counts tokens"):
        Ranks(0, 2).share(dropping, 4, 1)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks().device("cuda:3") == "cuda:3" and Ranks(1, 2, 1).device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Ranks(1, 2, 1).device("auto") == "auto", "which is then the CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = ("auto", "cuda", "cuda:0", "cuda:2", "cuda:5,cuda:3")
    assert [Ranks(1, 2, 1).device(word) for word in given] == ["cuda:1", "cuda:1", "cuda:1", "cuda:3", "cuda:3"]
    with pytest.raises(ConfigError, match="cuda:0,cuda:1 are 2 devices, and 3 processes train the run"):
        Ranks(1, 3, 1).device("cuda:0,cuda:1")


def test_a_process_that_is_alone_waits_for_nobody(root: Path, tmp_path: Path) -> None:
    config, corpus = runs.read(root)
    run = runs.make(tmp_path, config, corpus)
    asked = iter([False, False, True])
    how = train(Ranks(), Member(run, runs.Silent(), lambda state, evaluated: None, lambda: next(asked)))
    assert type(how).__name__ == "Stopped" and run.state.iter == 2
    assert isinstance(NoMemoryElsewhere(""), Elsewhere)


# Whole trials ---------------------------------------------------------------------------------------------------------------


class Trials:
    """Run folders of the plugin's schedule, and trials of two processes in them."""

    def __init__(self, home: Path, data: Path) -> None:
        self.lab = runs.Lab(home, data)
        both = runs.PLUGIN.replace("{name}.part", "{name}.{os.getpid()}.part")  # stand at a point
        (home / "extra.py").write_text(both)
        self.data = data

    def folder(self, name: str) -> Path:
        """A run whose label is `name`, as a runner leaves it for a trial."""
        made = runs.tree(
            self.data, plugins=["extra.py"], schedule={"variant": "points", "label": name}, model__dropout=0.2
        )
        listing = open_listing(runs.write(self.lab.home / f"{name}.yaml", made), [])
        folder = self.lab.home / "runs" / name
        folder.mkdir(parents=True)
        one = listing.runs[0]
        (folder / "config.yaml").write_text(dump(plain(replace(one.config, run=listing.info(one, "off")))))
        return folder

    def start(self, folder: Path) -> subprocess.Popen[str]:
        """As a runner starts it: with the run's lock, in a folder that is not the repository and has a module of our name."""
        environment = {**self.lab.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        lock = store.hold(folder)
        assert lock is not None
        with lock, (folder / "log").open("w") as log:
            words = ["-m", "lab.worker", str(folder), "--device", "cpu", "--threads", "1", "--lock", str(lock.fileno())]
            process = subprocess.Popen(
                torchrun(words, 2),
                cwd=self.lab.home,
                env=environment,
                pass_fds=[lock.fileno()],
                text=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.lab.started.append(process)
        return process

    def others(self, process: subprocess.Popen[str], first: int) -> int:
        """The process that trains beside the first."""
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        (other,) = {int(word) for word in path.read_text().split()} - {first}
        return other

    def close(self) -> None:
        self.lab.close()


@pytest.fixture
def trials(root: Path, tmp_path: Path) -> Iterator[Trials]:
    made = Trials(tmp_path, root)
    yield made
    made.close()


def drive(folder: Path, stop_at: int | None = None) -> str:
    """The run in a folder, from where it is, by this process."""
    from lab.listing import load_run
    from train_args import with_vocabulary

    config, corpus = load_run(folder, plugins=True)
    run = runs.make(folder, with_vocabulary(config, corpus.meta.vocab_size), corpus)
    return runs.drive(run, lambda: run.state.iter == stop_at)


@pytest.mark.usefixtures("catalogue")
def test_any_process_is_asked_to_stop_and_any_number_continues(trials: Trials) -> None:
    folder, whole = trials.folder("a"), trials.folder("whole")
    assert drive(whole) == "done"
    assert drive(folder, stop_at=2) == "stopped"
    trials.lab.hold("a-5")
    process = trials.start(folder)
    trials.lab.reached("a-5")
    first = store.heartbeat(folder)["pid"]
    assert store.holder(folder) == process.pid != first
    os.kill(trials.others(process, first), signal.SIGTERM)
    trials.lab.asked("a-5")
    trials.lab.release("a-5")
    assert process.wait(PATIENCE) == 75, (folder / "log").read_text()
    assert "stopped; it continues where it is" in (folder / "log").read_text()
    assert not (folder / "result.json").exists() and store.holder(folder) is None
    assert max((folder / "checkpoint").iterdir()).name == "00000006"
    assert drive(folder) == "done"

    here, there = (load_file(max((f / "checkpoint").iterdir()) / "model.safetensors") for f in (whole, folder))
    # As above; a key's bias has no gradient but rounding, and AdamW makes steps of that.
    assert all((there[name] - t).norm() <= 1e-3 * t.norm() for name, t in here.items() if not name.endswith("bias"))
    assert [r["iter"] for r in runs.records(folder, "eval")] == [r["iter"] for r in runs.records(whole, "eval")]
    losses = [[r["train_loss"] for r in runs.records(f, "train")] for f in (whole, folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


FAILING = """
from variations.schedule import SCHEDULES
import os
class Failing(SCHEDULES["points"]):
    \"\"\"Formula: none, one process of two fails.\"\"\"
    def multiplier(self, i):
        if i == 4 and os.environ.get("RANK") == "1":
            raise MemoryError("no memory for this schedule")
        return super().multiplier(i)
SCHEDULES["points"] = Failing
"""


@pytest.mark.usefixtures("catalogue")
def test_what_one_process_raises_ends_all_and_is_told_once(trials: Trials) -> None:
    with (trials.lab.home / "extra.py").open("a") as plugin:
        plugin.write(FAILING)
    folder = trials.folder("a")
    assert trials.start(folder).wait(PATIENCE) == 1
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["iters"], result["cause"]) == ("failed", 5, "oom")
    assert "process 2 of the 2 that train this run failed" in result["error"]
    assert result["error"].splitlines()[-1] == "MemoryError: no memory for this schedule"
    assert (folder / "log").read_text().count("MemoryError: no memory for this schedule") == 1
    assert [r["iter"] for r in runs.records(folder, "train")] == [2, 4]


@pytest.mark.parametrize("who", ["one of them", "who started them"])
@pytest.mark.usefixtures("catalogue")
def test_all_end_with_one_that_is_killed(trials: Trials, who: str) -> None:
    folder = trials.folder("a")
    trials.lab.hold("a-4")
    process = trials.start(folder)
    trials.lab.reached("a-4")
    first = store.heartbeat(folder)["pid"]
    other = trials.others(process, first)
    os.kill(other if who == "one of them" else process.pid, signal.SIGKILL)
    if who == "one of them":
        trials.lab.release("a-4")
    assert process.wait(PATIENCE) == (1 if who == "one of them" else -signal.SIGKILL)
    until(lambda: not alive(first) and not alive(other))
    assert not (folder / "result.json").exists() and store.holder(folder) is None
    if who == "one of them":
        assert "process 2 of 2 was ended by SIGKILL" in (folder / "log").read_text()
    assert max((folder / "checkpoint").iterdir()).name == "00000003"
