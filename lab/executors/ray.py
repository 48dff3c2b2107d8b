"""Trials as children of Ray actors, on this machine or on a cluster whose machines share the disk.

An actor per trial takes the place that Ray gives it, starts the process that would train the runs anywhere else, and is asked for
its exit code. On a cluster it outlives the runner, and the next one finds it by its name; a Ray of this machine ends with the
runner, and so do its trials, which continue from their checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from core.yaml_files import ConfigError
from lab.executors.job import command, order
from lab.executors.trial import End, Trial
from lab.plan import Slot, Wish
from lab.store import current_attempt, holder
from train_args import RunnerConfig

PACKAGE = "ray==2.60.0"
NAMESPACE = "slicewise"
POLL = 0.2  # seconds between looks at what cannot be waited for
GRACE = 600.0  # seconds that a stopped trial has for its checkpoint
AHEAD = 2  # times as many trials as a cluster has room for: what waits makes it grow
CALLS = 8  # of one actor at a time: those who wait for it, and who signals it


class RayTrial(Trial):
    """A trial with its actor and the answer to what its exit code is; without them, a process here that holds its locks."""

    actor: Any = None
    answer: Any = None
    killed = False


def make(config: RunnerConfig, slots: Callable[[], Sequence[Slot]], folder: Path) -> RayExecutor:
    """The executor of a Ray cluster. Raises ConfigError where Ray is not installed or the cluster does not answer."""
    try:
        import ray
    except ImportError:
        raise ConfigError(f"runner.executor: ray needs Ray: pip install {PACKAGE}") from None
    address = config.ray.address
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": NAMESPACE}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            # Without an address one is started here, also where the environment names a cluster.
            ray.init(**quiet, address=address) if address else ray.init(
                **quiet, address="local", include_dashboard=False
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConfigError(f"runner.ray: Ray cannot be used at '{address or 'this machine'}': {error}") from None
    return RayExecutor(config, ray)


def keeper() -> type:
    """The class of actors: one starts a trial's process, and tells how that ends.

    A class of a function is sent to the cluster as it is, so its machines need not find this module.
    """
    import subprocess

    class Keeper:
        def __init__(self, words: list[str]) -> None:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)

        def wait(self) -> int:
            return self.process.wait()

        def signal(self, number: int) -> None:
            self.process.send_signal(number)

    return Keeper


class RayExecutor:
    """Carries out trials with actors. `ray` is the module, connected."""

    def __init__(self, config: RunnerConfig, ray: Any) -> None:
        self.config, self.ray, self.keeper = config, ray, ray.remote(keeper())
        self.live: list[Trial] = []
        gpus = config.ray.gpus
        if gpus is None:
            usable = config.devices != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
            gpus = config.devices_per_trial if usable else 0
        self.needs = {"CPU": config.ray.cpus, "GPU": float(gpus)}

    def room(self) -> int:
        """How many more trials are given to Ray now. Raises ConfigError where not even one fits."""
        there = self.ray.cluster_resources()
        fit = min(int(there.get(name, 0) / count) for name, count in self.needs.items() if count)
        if not fit and not self.config.ray.address:
            told = f"{self.needs['CPU']:g} CPU cores and {self.needs['GPU']:g} GPUs"
            raise ConfigError(f"runner.ray: a trial asks for {told}, and this machine has not as many.")
        most = max(1, fit * AHEAD) if self.config.ray.address else fit
        return most - len(self.live)

    def start(self, wishes: Sequence[Wish], folder: Callable[[str], Path]) -> list[Trial]:
        made: list[Trial] = []
        for wish in wishes[: max(0, self.room())]:
            folders = [path for path in map(folder, wish.runs) if holder(path) is None]
            made += [self._start(wish, folders)] if folders else self._held([folder(run) for run in wish.runs])
        self.live += made
        return made

    def _start(self, wish: Wish, folders: list[Path]) -> Trial:
        name = f"{folders[0].name}-{secrets.token_hex(4)}"
        processes = self.config.devices_per_trial
        threads = self.config.threads or max(1, int(self.config.ray.cpus / processes))
        made = order(folders, threads, processes, executor="ray", actor=name)
        trial = RayTrial(folders, wish, f"actor {name}")
        # A Ray of this machine ends with the runner whatever its actors are.
        lasting = {"name": name, "lifetime": "detached"} if self.config.ray.address else {}
        options = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs["GPU"], "max_concurrency": CALLS, **lasting}
        trial.actor = self.keeper.options(**options).remote(command(json.dumps(made)))
        trial.answer = trial.actor.wait.remote()
        return trial

    def adopt(self, folders: Sequence[Path]) -> list[Trial]:
        actors: dict[str, list[Path]] = {}
        rest: list[Path] = []
        for folder in folders:
            attempt = current_attempt(folder)
            name = str(attempt.where.get("actor")) if attempt and attempt.where.get("executor") == "ray" else ""
            (actors.setdefault(name, []) if name else rest).append(folder)
        made: list[Trial] = []
        for name, some in actors.items():
            try:
                actor = self.ray.get_actor(name)
            except ValueError:  # there is none
                rest += some
                continue
            trial = RayTrial(some, Wish(tuple(folder.name for folder in some)), f"actor {name}", adopted=True)
            trial.actor, trial.answer = actor, actor.wait.remote()
            made.append(trial)
        made += self._held(rest)
        self.live += made
        return made

    def _held(self, folders: Sequence[Path]) -> list[Trial]:
        """Trials of processes that hold the locks of runs, though no actor of ours is known."""
        found = [folder for folder in folders if holder(folder) is not None]
        return [RayTrial([folder], Wish((folder.name,)), "another process", adopted=True) for folder in found]

    # How they end -----------------------------------------------------------------------------------------------------------

    def _is_over(self, trial: RayTrial) -> bool:
        if trial.answer is None:
            return all(holder(folder) is None for folder in trial.open)
        return bool(self.ray.wait([trial.answer], timeout=0)[0])

    def ended(self) -> Iterator[End]:
        for trial in list(self.live):
            assert isinstance(trial, RayTrial)
            done = self._is_over(trial)
            over = list(trial.open) if done else trial.early()
            trial.open = [folder for folder in trial.open if folder not in over]
            code, why = self._how(trial) if done else (None, "")
            if done:
                self.live.remove(trial)
            if over:
                yield End(trial, over, code, why)

    def _how(self, trial: RayTrial) -> tuple[int | None, str]:
        """The exit code of a trial that is over, None where it is not known, and what there is to say of that. Its actor ends."""
        if trial.answer is None:
            return None, "nobody saw it end"
        try:
            code = int(self.ray.get(trial.answer))
        except self.ray.exceptions.RayError as error:
            told = str(error).strip().splitlines() or [type(error).__name__]
            return None, f"Ray lost its actor: {told[0].removesuffix('.')}"
        finally:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.kill(trial.actor)
        return code, f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"its exit code is {code}"

    def wait(self, seconds: float) -> None:
        trials = [trial for trial in self.live if isinstance(trial, RayTrial)]
        answers = [trial.answer for trial in trials if trial.answer is not None]
        others = len(answers) < len(trials) or any(len(trial.folders) > 1 for trial in trials)
        seconds = min(seconds, POLL) if others else seconds
        if answers:
            self.ray.wait(answers, timeout=seconds)
        else:
            time.sleep(seconds)

    def stop(self, now: Callable[[], bool]) -> None:
        deadline = time.monotonic() + GRACE
        asked: set[int] = set()
        while live := [trial for trial in self.live if isinstance(trial, RayTrial) and not self._is_over(trial)]:
            hard = now() or time.monotonic() > deadline
            for trial in live:
                if id(trial) not in asked or (hard and not trial.killed):
                    asked.add(id(trial))
                    trial.killed = hard
                    self._send(trial, signal.SIGKILL if hard else signal.SIGTERM)
            time.sleep(POLL)

    def _send(self, trial: RayTrial, number: signal.Signals) -> None:
        """A signal to a trial's process; an actor that has not begun is ended."""
        if trial.actor is None:
            for process in {holder(folder) for folder in trial.open} - {None, 0}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process or 0, number)
            return
        with contextlib.suppress(self.ray.exceptions.RayError):
            sent = trial.actor.signal.remote(number)
            if not self.ray.wait([sent], timeout=10 * POLL)[0]:
                self.ray.kill(trial.actor)

    def close(self) -> None:
        self.ray.shutdown()
