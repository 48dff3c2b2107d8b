"""Trials as jobs of a Slurm cluster, submitted as arrays through submitit.

Jobs are submitted on hold, and released once the attempts at their runs say which jobs they are. So a runner may be killed at any
time: a job that runs is known to the next one, and one that nobody knows is still on hold and is cancelled.

What becomes of jobs is asked of squeue, once for all of them: that works without accounting. Of submitit only the submission is
used, as its results are pickles, which may hold code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from core.yaml_files import ConfigError
from lab.executors.job import STOP, command, order
from lab.executors.slurm_commands import OFTEN_OVER, OVER, WAITS, Unanswered, Word, answer, ask, cancel, is_outage
from lab.executors.trial import End, Trial
from lab.plan import Slot, Wish
from lab.store import current_attempt, holder, write_atomically
from train_args import RunnerConfig

PACKAGE = "submitit==1.5.4"
PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
POLL = 2.0  # seconds between two calls of squeue
STOPPED = 75  # the exit code of a trial that saved and can go on
GRACE = 600.0  # seconds that a stopped trial has for its checkpoint
WARNING = 120  # seconds before a job's time limit at which its trial is asked to save
LINGER = 60.0  # seconds that a lock may outlast its job: of a machine that is gone, shared disks free it late
AGAIN = 30.0  # seconds until jobs are submitted again to a controller that did not answer
GPU_OPTIONS = {"gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"}
NEW = Word("PENDING")


class SlurmTrial(Trial):
    """A trial in a job, as '123_4'; without one it is a process that holds the locks of its runs, whoever started it."""

    job: str = ""
    said: Word | None = NEW  # None: Slurm knows it no more
    over = False
    since = 0.0  # when it was first said to be over
    released = False


def make(config: RunnerConfig, slots: Callable[[], Sequence[Slot]], folder: Path) -> SlurmExecutor:
    """The executor of the cluster that this machine belongs to. `folder` is the sweep's, on a disk that its machines share.

    Raises ConfigError where Slurm or submitit is not installed, and for options that submitit refuses.
    """
    lacks = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacks:
        told = f"{lacks[0]} is not here"
        raise ConfigError(f"runner.executor: slurm needs the programs of a Slurm cluster, and {told}.")
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ConfigError(f"runner.executor: slurm needs submitit: pip install {PACKAGE}") from None
    return SlurmExecutor(config, folder)


class SlurmExecutor:
    """Carries out trials as jobs. Jobs of one sweep have one name, which begins with the sweep's."""

    def __init__(self, config: RunnerConfig, folder: Path) -> None:
        self.config, self.folder = config, folder.resolve()
        self.files = self.folder / ".slurm"
        self.name = f"{folder.name}-{hashlib.sha256(bytes(self.folder)).hexdigest()[:8]}"
        self.live: list[Trial] = []
        self.room = config.slurm.at_once
        self.polled = self.not_before = self.silent = 0.0
        self.files.mkdir(parents=True, exist_ok=True)
        self.options = self._options()

    # Starting ---------------------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        """What submitit is given. Raises ConfigError."""
        slurm = self.config.slurm
        more = {key.replace("_", "-"): value for key, value in slurm.more.items()}
        made: dict[str, Any] = {
            "job_name": self.name,
            "partition": slurm.partition,
            "account": slurm.account,
            "time": slurm.time,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": slurm.cpus,
            "mem": None if slurm.memory is None else f"{round(slurm.memory * 1024)}MB",
            "setup": list(slurm.setup),
            "stderr_to_stdout": True,
            "use_srun": False,  # one process, which is the job: signals and its exit code pass nobody
        }
        if not GPU_OPTIONS & set(more) and self.config.devices != "cpu" and self._has_gpus():
            made["gres"] = f"gpu:{self.config.devices_per_trial}"
        ours = {"requeue": True, "hold": True, "signal": f"B:TERM@{min(WARNING, slurm.time * 30)}"}
        made["additional_parameters"] = {**ours, **more, "hold": True}
        return {key: value for key, value in made.items() if value is not None}

    def _has_gpus(self) -> bool:
        """Whether some machine of the partition has a GPU. Raises ConfigError where Slurm does not answer."""
        partition = self.config.slurm.partition
        try:
            told = answer("sinfo", "-h", "-o", "%P %G", *(["-p", partition] if partition else []))
        except Unanswered as error:
            raise ConfigError(f"runner.executor: Slurm does not answer: {error}. Nothing was started.") from None
        rows = [line.split() for line in told.splitlines()]
        return any("gpu" in row[-1] for row in rows if partition or row[0].endswith("*"))

    def start(self, wishes: Sequence[Wish], folder: Callable[[str], Path]) -> list[Trial]:
        room = max(0, self.room - len(self.live))
        if not room or time.monotonic() < self.not_before:
            return []
        free = [(wish, [path for path in map(folder, wish.runs) if holder(path) is None]) for wish in wishes[:room]]
        wanted = [(wish, folders) for wish, folders in free if folders]
        made: list[Trial] = []
        # Others train all runs of these, which an earlier look at the locks did not see.
        for wish, _ in [one for one in free if not one[1]]:
            made += self._held([folder(run) for run in wish.runs])
        if wanted:
            made += self._submit(wanted)
        self.live += made
        return made

    def _submit(self, wanted: Sequence[tuple[Wish, list[Path]]]) -> list[SlurmTrial]:
        """One array of jobs for as many of these as Slurm takes."""
        while True:
            try:
                number = self._sbatch(len(wanted))
                self.room = min(self.config.slurm.at_once, max(self.room, len(self.live) + len(wanted) + 1))
                break
            except Unanswered as error:
                self.not_before = time.monotonic() + AGAIN
                self._outage(str(error))
                return []
            except ConfigError:
                if len(wanted) > 1:  # limits on jobs are many, and told of in as many ways
                    wanted = wanted[: len(wanted) // 2]
                elif self.live:
                    self.room = len(self.live)
                    return []
                else:
                    raise
        orders, made = [], list[SlurmTrial]()
        processes = self.config.devices_per_trial
        threads = self.config.threads or max(1, self.config.slurm.cpus // processes)
        for i, (wish, folders) in enumerate(wanted):
            trial = SlurmTrial(folders, wish, f"job {number}_{i}")
            trial.job = f"{number}_{i}"
            orders.append(order(folders, threads, processes, executor="slurm", job=trial.job))
            made.append(trial)
        write_atomically(self.files / f"{number}.json", json.dumps(orders))
        self._release(made)
        return made

    def _sbatch(self, count: int) -> str:
        """Submits an array of jobs on hold and returns its number. Raises ConfigError where Slurm takes none."""
        import submitit
        from submitit.core.utils import FailedJobError

        words = io.StringIO()
        try:
            with _outside_a_job(), contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
                executor = submitit.SlurmExecutor(self.files)
                executor.update_parameters(**self.options, array_parallelism=count)
                executor.parameters["map_count"] = count
                # A command and no function, which would be a pickle.
                return str(executor._submit_command("exec " + shlex.join(command(str(self.files)))).job_id)
        except (FailedJobError, ValueError, OSError) as error:
            told = " ".join((str(error) or words.getvalue()).split()).removesuffix(".")
            if not told or is_outage(told):  # Ctrl-C ends sbatch without a word
                raise Unanswered(told or "sbatch was ended") from None
            raise ConfigError(f"runner.slurm: no job could be submitted: {told}.") from None

    # Trials that are there already ------------------------------------------------------------------------------------------

    def adopt(self, folders: Sequence[Path]) -> list[Trial]:
        jobs: dict[str, list[Path]] = {}
        rest: list[Path] = []
        for folder in folders:
            attempt = current_attempt(folder)
            job = str(attempt.where.get("job")) if attempt and attempt.where.get("executor") == "slurm" else ""
            (jobs.setdefault(job, []) if job else rest).append(folder)
        words = self._ask()
        if words is None:
            raise ConfigError("runner.executor: squeue does not answer, so which runs have a job is not known.")
        made: list[Trial] = []
        for job, some in jobs.items():
            word = words.get(job)
            if word is None or word.state in OVER:
                rest += some
                continue
            trial = SlurmTrial(some, Wish(tuple(folder.name for folder in some)), f"job {job}", adopted=True)
            trial.job, trial.said = job, word
            made.append(trial)
        made += self._held([folder for folder in rest if holder(folder) is not None])
        self.live += made
        self._hear(words)
        return made

    def _held(self, folders: Sequence[Path]) -> list[Trial]:
        """Trials of processes that hold the locks of runs, though no job of ours is known."""
        found = [folder for folder in folders if holder(folder) is not None]
        return [SlurmTrial([folder], Wish((folder.name,)), "another process", adopted=True) for folder in found]

    # What becomes of them ---------------------------------------------------------------------------------------------------

    def _ask(self) -> dict[str, Word] | None:
        """What Slurm knows of all jobs of the sweep, or None where it does not answer."""
        self.polled = time.monotonic()
        try:
            words = ask(self.name)
        except Unanswered as error:
            self._outage(str(error))
            return None
        self.silent = 0.0
        return words

    def _outage(self, why: str) -> None:
        """Says that Slurm does not answer, once for as long as that lasts."""
        if not self.silent:
            self.silent = time.monotonic()
            print(f"Slurm does not answer ({why}). Its jobs are taken to be as they were.", file=sys.stderr, flush=True)

    def _poll(self) -> None:
        """Asks Slurm where it is time to; what it said last counts until it answers again."""
        if time.monotonic() - self.polled >= POLL and self.live:
            words = self._ask()
            if words is not None:
                self._hear(words)

    def _hear(self, words: dict[str, Word]) -> None:
        mine = {trial.job: trial for trial in self.live if isinstance(trial, SlurmTrial) and trial.job}
        for job, trial in mine.items():
            before, trial.said = trial.said, words.get(job)
            trial.over = self._is_over(before, trial.said)
        on_hold = [job for job, word in words.items() if word.on_hold]
        self._release([mine[job] for job in on_hold if job in mine and not mine[job].released])
        # Submitted by a runner that was killed before it knew them.
        cancel([job for job in on_hold if job not in mine])

    def _release(self, trials: Sequence[SlurmTrial]) -> None:
        """Lets jobs begin. Once: what is on hold later the user has put there. Where it fails, the next poll tries again."""
        arrays = sorted({trial.job.partition("_")[0] for trial in trials})
        with contextlib.suppress(Unanswered):
            if arrays:
                answer("scontrol", "release", ",".join(arrays))
            for trial in trials:
                trial.released = True

    def _is_over(self, before: Word | None, now: Word | None) -> bool:
        if now is None or now.state in OVER:
            return True
        if now.state in OFTEN_OVER:
            return before is not None and before.state == now.state
        return now.state in WAITS and now.reason.startswith("launch failed")

    def _ended(self, trial: SlurmTrial) -> bool:
        """Whether a trial is over and its locks are free."""
        held = any(holder(folder) is not None for folder in trial.open)
        if not trial.job:
            return not held
        trial.since = (trial.since or time.monotonic()) if trial.over else 0.0
        return trial.over and (not held or time.monotonic() - trial.since > LINGER)

    def ended(self) -> Iterator[End]:
        self._poll()
        for trial in list(self.live):
            assert isinstance(trial, SlurmTrial)
            done = self._ended(trial)
            over = list(trial.open) if done else trial.early()
            trial.open = [folder for folder in trial.open if folder not in over]
            if done:
                self.live.remove(trial)
                if trial.job and (trial.said is None or trial.said.state not in OVER):
                    cancel([trial.job])  # what Slurm may still mean to start again is ours no more
            if over:
                code = trial.said.code if done and trial.job and trial.said else None
                # Nobody here has asked it to stop: its time was over, or another job needed its place.
                yield End(trial, over, code, _why(trial, done, self.files), planned=code == STOPPED)

    def wait(self, seconds: float) -> None:
        due = self.polled + POLL - time.monotonic() if self.live else seconds
        time.sleep(max(0.0, min(seconds, due)))

    def stop(self, now: Callable[[], bool]) -> None:
        deadline = time.monotonic() + GRACE
        asked: set[str] = set()
        killed = False
        for trial in self._open():
            if trial.job:
                (self.files / f"{trial.job}{STOP}").touch()
        while live := self._open():
            hard = now() or time.monotonic() > deadline
            if hard and not killed:
                cancel([trial.job for trial in live], "--signal=KILL", "--batch")
                cancel([trial.job for trial in live])
            killed = killed or hard
            self._cancel_softly(live, asked)
            for number in {holder(trial.folders[0]) for trial in live if not trial.job} - {None, 0}:
                if hard or str(number) not in asked:
                    asked.add(str(number))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number or 0, signal.SIGKILL if hard else signal.SIGTERM)
            time.sleep(0.1)
            self._poll()

    def _open(self) -> list[SlurmTrial]:
        return [trial for trial in self.live if isinstance(trial, SlurmTrial) and not self._ended(trial)]

    def _cancel_softly(self, live: Sequence[SlurmTrial], asked: set[str]) -> None:
        """Cancels what waits, and asks what runs to save and end; each once, as being asked twice means at once."""
        waits = [t.job for t in live if t.job and t.said and t.said.state in WAITS and f"{t.job} waits" not in asked]
        runs = [t.job for t in live if t.job and t.said and t.said.state == "RUNNING" and t.job not in asked]
        cancel(waits, "--state=PENDING")
        cancel(runs, "--signal=TERM", "--batch")
        asked |= {*runs, *(f"{job} waits" for job in waits)}

    def close(self) -> None:
        """Jobs go on without it."""


def _why(trial: SlurmTrial, done: bool, files: Path) -> str:
    """How a trial ended, as far as Slurm says, with the last line that the job has printed outside the log of its attempt."""
    if not done:
        return ""
    if not trial.job:
        return "nobody saw it end"
    if trial.said is None:
        return f"Slurm knows its job {trial.job} no more"
    reason = "" if trial.said.reason in ("None", "NonZeroExitCode") else f", {trial.said.reason}"
    code = "" if trial.said.code is None else f", exit code {trial.said.code}"
    try:
        lines = (files / f"{trial.job}_0_log.out").read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
    return f"Slurm says {trial.said.state} of its job {trial.job}{reason}{code}" + (f" ({last})" if last else "")


@contextlib.contextmanager
def _outside_a_job() -> Iterator[None]:
    """A runner may be a job itself, whose own limits are not those of what it submits."""
    names = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF"]
    taken = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(taken)
