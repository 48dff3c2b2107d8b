"""Sweeps on a real Ray, which runs on this machine while these tests do; and what needs none."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import PATIENCE, Lab, alive, until
from runs import same_as_here as same

from core.yaml_files import ConfigError
from lab.executors import ray
from train_args import RunnerConfig

PROGRAM = Path(sys.executable).with_name("ray")


class Cluster(Lab):
    """A sweep whose trials are children of actors."""

    options: dict[str, Any] = {}

    @property
    def file(self) -> Path:
        path = super().file
        made = json.loads(path.read_text())
        made["runner"] |= {"executor": "ray", "threads": 1, "ray": self.options}
        return runs.write(path, made)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The sweep on this machine, with nothing in its way."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip(f"RAY IS NOT TESTED: pip install {ray.PACKAGE}")
    made = Lab(tmp_path_factory.mktemp("whole"), data, labels=("a", "b", "c"))
    finish(made, 0, "--config", str(made.file), "runner.threads=1")
    return made


@pytest.fixture
def lab(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    made = Cluster(tmp_path / "lab", data)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps its token
    yield made
    made.close()


def finish(lab: Lab, code: int, *words: str, process: subprocess.Popen[str] | None = None) -> tuple[str, str]:
    """What a runner says until it ends."""
    process = process or lab.start(*words)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code and "Traceback" not in err, out + err
    return out, err


@pytest.mark.system
def test_a_sweep_and_a_trial_that_is_killed(whole: Lab, lab: Cluster) -> None:
    lab.labels = ("a", "b", "c")
    lab.hold("a-4")
    runner = lab.start()
    os.kill(lab.reached("a-4"), signal.SIGKILL)
    lab.release("a-4")
    out, err = finish(lab, 0, process=runner)
    assert "3 done" in out and err == ""
    assert lab.logs("a") == ["attempt-1.log", "attempt-2.log"] and lab.logs("b") == ["attempt-1.log"]
    (why,) = [detail["why"] for _, event, detail in lab.events() if event == "lost"]
    assert why == "it was ended by SIGKILL"
    same(lab, whole, *lab.labels)


@pytest.mark.system
def test_ctrl_c_stops_trials_and_a_killed_runner_leaves_none(whole: Lab, lab: Cluster) -> None:
    lab.labels, lab.options = ("a", "b"), {"cpus": 0.5}
    lab.hold("a-4", "b-4")
    runner = lab.start()
    trials = [lab.reached("a-4"), lab.reached("b-4")]
    os.killpg(runner.pid, signal.SIGINT)  # as a terminal does
    lab.asked("a-4")
    lab.asked("b-4")
    lab.release("a-4", "b-4")
    lab.hold("a-5")
    out, _ = finish(lab, 75, process=runner)
    assert "2 unfinished" in out and not any(alive(trial) for trial in trials)
    assert all((lab.run(label) / "checkpoint/00000005").is_dir() for label in lab.labels)
    runner = lab.start()
    trial = lab.reached("a-5")
    runner.kill()
    runner.communicate()
    until(lambda: not alive(trial))
    lab.release("a-5")
    finish(lab, 0)
    same(lab, whole, "a", "b")


@pytest.fixture
def address(lab: Cluster) -> Iterator[str]:
    """A cluster of one machine that no runner has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(PROGRAM), "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--block"]
    # Ray's sockets lie there, whose paths are limited.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as short, (lab.home / "ray.out").open("w") as out:
        words += ["--node-ip-address=127.0.0.1", f"--temp-dir={short}"]
        head = subprocess.Popen(words, stdout=out, stderr=out, env=lab.environment, start_new_session=True)
        try:
            until(lambda: "Ray runtime started" in (lab.home / "ray.out").read_text())
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(PATIENCE)


@pytest.mark.system
def test_on_a_cluster_trials_outlive_their_runner(whole: Lab, lab: Cluster, address: str) -> None:
    lab.labels, lab.options = ("a", "b"), {"address": address}
    lab.hold("a-4", "b-4")
    runner = lab.start()
    trials = [lab.reached("a-4"), lab.reached("b-4")]
    runner.kill()
    runner.communicate()
    runner = lab.start()
    until(lambda: [detail.get("adopted") for *_, detail in lab.events()].count(True) == 2)
    assert all(alive(trial) for trial in trials)
    lab.release("a-4", "b-4")
    finish(lab, 0, process=runner)
    assert lab.logs("a") == lab.logs("b") == ["attempt-1.log"], "nothing ran twice"
    same(lab, whole, "a", "b")


# Without Ray ----------------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"runner.executor: ray needs Ray: pip install ray==2\.60\.0"):
        ray.make(RunnerConfig(executor="ray"), list, tmp_path)
