"""Sweeps as jobs of a real Slurm, which runs on this machine while these tests do; and what needs none of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import runs
import slurm_machine
from runs import PATIENCE, Lab, alive, until
from runs import same_as_here as same

from core.yaml_files import ConfigError
from lab.executors import Trial, job, slurm, slurm_commands
from lab.executors.slurm_commands import Unanswered
from lab.plan import Wish
from lab.store import begin_attempt, current_attempt, read_result
from train_args import RunnerConfig, SlurmConfig


class Killed(BaseException):
    """The runner dies here."""


class Cluster(Lab):
    """A sweep whose trials are jobs."""

    options: dict[str, Any] = {}
    machine: slurm_machine.Machine

    @property
    def file(self) -> Path:
        path = super().file
        made = json.loads(path.read_text())
        made["runner"] |= {"executor": "slurm", "threads": 1, "slurm": {"cpus": 1, "time": 5, **self.options}}
        return runs.write(path, made)

    def aside(self, act: Callable[[], None]) -> Future[None]:
        """Does something while the runner is at work in this thread, which does not wait for ever where that fails."""

        def safely() -> None:
            try:
                act()
            except BaseException:
                os.kill(os.getpid(), signal.SIGINT)
                self.release(*(path.stem for path in self.points.glob("*.hold")))
                raise

        threads = ThreadPoolExecutor(1)
        made = threads.submit(safely)
        threads.shutdown(wait=False)
        return made

    def job(self, label: str) -> str:
        attempt = current_attempt(self.run(label))
        assert attempt is not None and attempt.where["executor"] == "slurm"
        return str(attempt.where["job"])

    def jobs(self) -> list[str]:
        """Those that Slurm has not done with."""
        return self.machine.call("squeue", "-h", "-r", "-o", "%F_%K %T").split("\n")[:-1]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_machine.Machine]:
    if lacks := slurm_machine.missing():
        pytest.skip(f"SLURM IS NOT TESTED: {', '.join(lacks)} not installed (apt-get install slurm-wlm munge)")
    pytest.importorskip("submitit", reason=f"SLURM IS NOT TESTED: pip install {slurm.PACKAGE}")
    with slurm_machine.machine(tmp_path_factory.mktemp("m") / "slurm") as made:
        yield made


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The sweep on this machine, with nothing in its way."""
    made = Lab(tmp_path_factory.mktemp("whole"), data, labels=("a", "b", "c", "d"))
    process = made.start("--config", str(made.file), "runner.threads=1")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    return made


@pytest.fixture
def lab(
    data: Path, tmp_path: Path, machine: slurm_machine.Machine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    made = Cluster(tmp_path / "lab", data)
    made.machine = machine
    monkeypatch.setattr(slurm, "POLL", 0.5)
    for name, value in {**machine.environment, "POINTS": str(made.points)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(made.home)
    yield made
    made.close()
    machine.call("scancel", "--user", str(os.getuid()))
    machine.until(lambda: not made.jobs())


def lost(lab: Lab) -> list[tuple[str, str]]:
    """Labels of runs whose process was lost, and why."""
    return [(run[6:7], detail["why"]) for run, event, detail in lab.events() if event == "lost"]


@pytest.mark.system
def test_a_sweep_is_one_array_of_jobs(lab: Cluster, whole: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.labels = ("a", "b", "c", "d")
    asked: list[float] = []
    answer = slurm_commands.answer

    def noted(*words: str) -> str:
        asked.extend([time.monotonic()] if words[0] == "squeue" else [])
        return answer(*words)

    monkeypatch.setattr(slurm_commands, "answer", noted)
    lab.hold("a-4")
    told: list[str] = []

    def look() -> None:
        lab.reached("a-4")
        told.append(lab.machine.call("scontrol", "show", "job", lab.job("a")))
        lab.release("a-4")

    helper = lab.aside(look)
    code = lab.here()
    helper.result()
    assert code == 0
    jobs = [lab.job(label) for label in lab.labels]
    assert jobs == [f"{jobs[0].partition('_')[0]}_{i}" for i in range(4)]
    assert "gres:gpu:1" in told[0] or "gres/gpu:1" in told[0], "the partition has GPUs"
    assert "Requeue=1" in told[0] and "NumCPUs=1" in told[0] and "TimeLimit=00:05:00" in told[0]
    (script,) = (lab.folder / ".slurm").glob("*_submission.sh")
    assert "--signal=B:TERM@120" in script.read_text()
    assert not list((lab.folder / ".slurm").glob("**/*.pkl"))
    assert all(lab.logs(label) == ["attempt-1.log"] for label in lab.labels)
    assert "iteration 6/6" in (lab.run("b") / "attempt-1.log").read_text()
    # One squeue for all jobs, and one to find out whether there are some.
    assert len(asked) >= 2 and all(b - a >= slurm.POLL for a, b in itertools.pairwise(asked))
    same(lab, whole, *lab.labels)


@pytest.mark.system
def test_jobs_of_a_killed_runner_are_taken_up_again(lab: Cluster, whole: Lab) -> None:
    lab.hold("a-4")
    runner = lab.start()
    process = lab.reached("a-4")
    runner.kill()
    runner.communicate()
    assert alive(process)

    def adopted() -> None:
        until(lambda: any(detail.get("adopted") for *_, detail in lab.events()))
        lab.release("a-4")

    helper = lab.aside(adopted)
    code = lab.here()
    helper.result()
    assert code == 0
    assert lab.logs("a") == lab.logs("b") == ["attempt-1.log"], "nothing ran twice"
    same(lab, whole, "a", "b")


@pytest.mark.system
@pytest.mark.parametrize("point", ["order", "_release"])
def test_a_runner_that_is_killed_while_it_submits(
    lab: Cluster, whole: Lab, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*given: Any, **_: Any) -> None:
        if given[-1]:  # no trials are released where there are none
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(slurm if point == "order" else slurm.SlurmExecutor, point, dies)
        with pytest.raises(Killed):
            lab.here()
    left = lab.jobs()
    assert [words.split()[1] for words in left] == ["PENDING", "PENDING"], "both are on hold"
    assert lab.here() == 0
    known = {words.split()[0] for words in left}
    assert ({lab.job("a"), lab.job("b")} == known) == (point == "_release"), "without an attempt they are cancelled"
    assert lab.logs("a") == lab.logs("b") == ["attempt-1.log"] and not lab.jobs()
    same(lab, whole, "a", "b")


@pytest.mark.system
def test_a_job_that_slurm_starts_again_continues(lab: Cluster, whole: Lab) -> None:
    lab.labels = ("a",)
    lab.hold("a-4", "a-5")

    def requeue() -> None:
        lab.reached("a-4")
        lab.machine.call("scontrol", "requeue", lab.job("a"))
        lab.asked("a-4")
        lab.release("a-4")  # it saves at 5 and ends
        lab.reached("a-5")
        lab.release("a-5")

    helper = lab.aside(requeue)
    code = lab.here()
    helper.result()
    assert code == 0
    assert lab.logs("a") == ["attempt-1.log"] and not lost(lab), "it is the same job and the same attempt"
    text = (lab.run("a") / "attempt-1.log").read_text()
    assert "stopped; it continues where it is" in text and text.count("iteration 0/6") == 1
    same(lab, whole, "a")


@pytest.mark.system
def test_jobs_that_are_cancelled_killed_or_out_of_time_are_continued_by_others(lab: Cluster, whole: Lab) -> None:
    lab.labels = ("a", "b", "c")
    lab.hold("a-4", "b-4", "c-4")
    first: list[str] = []

    def act() -> None:
        processes = [lab.reached(f"{label}-4") for label in "abc"]
        first.extend(lab.job(label) for label in "abc")
        os.kill(processes[0], signal.SIGKILL)
        lab.machine.call("scancel", first[1])
        lab.asked("b-4")
        lab.machine.call("scancel", "--batch", "--signal=TERM", first[2])  # as before the time limit
        lab.asked("c-4")
        lab.release("a-4", "b-4", "c-4")

    helper = lab.aside(act)
    code = lab.here()
    helper.result()
    assert code == 0
    assert [label for label, _ in lost(lab)] == ["a"] and "exit code -9" in dict(lost(lab))["a"]
    stopped = {run[6:7]: detail["why"] for run, event, detail in lab.events() if event == "stopped"}
    assert set(stopped) == {"b", "c"}, "who saved and said so does not count as lost"
    assert "CANCELLED" in stopped["b"] and "FAILED" in stopped["c"]
    assert all(lab.logs(label) == ["attempt-1.log", "attempt-2.log"] for label in lab.labels)
    assert not {lab.job(label) for label in lab.labels} & set(first)
    same(lab, whole, *lab.labels)


@pytest.mark.system
def test_ctrl_c_saves_what_runs_and_cancels_what_waits(lab: Cluster, whole: Lab) -> None:
    lab.labels, lab.options = ("a", "b", "c"), {"cpus": 2}
    lab.hold("a-4", "b-4", "c-4")
    runner = lab.start()
    processes = [lab.reached("a-4"), lab.reached("b-4")]
    os.killpg(runner.pid, signal.SIGINT)  # as a terminal does
    lab.asked("a-4")
    lab.asked("b-4")
    lab.release("a-4", "b-4", "c-4")
    out, err = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 75 and "3 unfinished. The same command continues." in out, out + err
    assert not any(alive(process) for process in processes) and not lab.jobs() and "Traceback" not in err
    assert not (lab.points / "c-4.pid").exists()
    assert all((lab.run(label) / "checkpoint/00000005").is_dir() for label in "ab")
    assert lab.here() == 0
    same(lab, whole, *lab.labels)


@pytest.mark.system
def test_a_second_ctrl_c_ends_jobs_at_once(lab: Cluster) -> None:
    lab.labels = ("a",)
    lab.hold("a-4")
    runner = lab.start()
    trial = lab.reached("a-4")
    os.killpg(runner.pid, signal.SIGINT)
    lab.asked("a-4")
    os.killpg(runner.pid, signal.SIGINT)
    runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 75 and not alive(trial) and not lab.jobs()
    assert read_result(lab.run("a")) is None


@pytest.mark.system
def test_a_controller_that_is_away_loses_nothing(lab: Cluster, whole: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.labels = ("a",)
    lab.hold("a-4")
    told: list[str] = []

    def restart() -> None:
        lab.reached("a-4")
        lab.machine.end("slurmctld")
        until(lambda: told.append(capsys.readouterr().err) or "does not answer" in "".join(told))  # type: ignore[func-returns-value]
        lab.release("a-4")
        until(lambda: (lab.run("a") / "result.json").exists())
        lab.machine.control()

    helper = lab.aside(restart)
    code = lab.here()
    helper.result()
    assert code == 0
    assert "".join(told).count("does not answer") == 1
    assert lab.logs("a") == ["attempt-1.log"] and not lost(lab)
    same(lab, whole, "a")


@pytest.mark.system
def test_what_slurm_refuses_is_a_sentence(lab: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    lab.options = {"partition": "nowhere"}
    assert lab.here() == 2
    err = capsys.readouterr().err
    assert "runner.slurm: no job could be submitted: sbatch: error: invalid partition specified: nowhere" in err
    assert "Traceback" not in err and not lab.jobs()
    assert not lab.logs("a"), "no attempt was begun"


# Without Slurm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "told", "code"),
    [
        ("RUNNING", "0", None),
        ("COMPLETED", "0", 0),
        ("FAILED", str(75 << 8), 75),
        ("FAILED", "9", -9),
        ("CANCELLED", "0", None),
        ("FAILED", "75:0", 75),
        ("TIMEOUT", "0:15", -15),
    ],
)
def test_exit_codes_as_squeue_tells_them(state: str, told: str, code: int | None) -> None:
    assert slurm_commands.code(state, told) == code


def test_what_is_missing_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunnerConfig(executor="slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs the programs of a Slurm cluster, and sbatch is not here"):
        slurm.make(config, list, tmp_path)
    monkeypatch.setattr(slurm, "PROGRAMS", ())
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"runner.executor: slurm needs submitit: pip install submitit==1\.5\.4"):
        slurm.make(config, list, tmp_path)


class Scripted(slurm.SlurmExecutor):
    """An executor whose Slurm says what a test wants. `cancelled` are the jobs that were."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.words: dict[str, slurm_commands.Word] | None = {}
        self.refuses: list[Exception] = []
        self.submitted, self.cancelled = list[int](), list[str]()
        monkeypatch.setattr(slurm, "cancel", lambda jobs, *_: self.cancelled.extend(jobs))
        monkeypatch.setattr(slurm, "answer", lambda *_: "plain* (null)")
        monkeypatch.setattr(slurm, "POLL", 0.0)
        super().__init__(RunnerConfig(executor="slurm", slurm=SlurmConfig(**options)), folder)

    def _sbatch(self, count: int) -> str:
        self.submitted.append(count)
        if self.refuses:
            raise self.refuses.pop(0)
        return str(len(self.submitted))

    def _ask(self) -> dict[str, slurm_commands.Word] | None:
        return self.words

    def begin(self, *names: str) -> list[Trial]:
        def folder(name: str) -> Path:
            (self.folder / name).mkdir(exist_ok=True)
            return self.folder / name

        return self.start([Wish((name,)) for name in names], folder)

    def say(self, **states: str) -> list[tuple[str, int | None]]:
        """Runs that have ended once Slurm says this of jobs (1_0 as j1_0)."""
        self.words = {name[1:]: slurm_commands.Word(state) for name, state in states.items()}
        return [(folder.name, end.code) for end in self.ended() for folder in end.folders]


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(tmp_path, monkeypatch, at_once=3)


def test_only_so_many_jobs_at_once(scripted: Scripted) -> None:
    assert [trial.place for trial in scripted.begin("a", "b", "c", "d")] == ["job 1_0", "job 1_1", "job 1_2"]
    assert scripted.begin("d") == []
    assert scripted.say(j1_0="RUNNING", j1_1="COMPLETED", j1_2="PENDING") == [("b", None)]
    assert [trial.place for trial in scripted.begin("d", "e")] == ["job 2_0"]


def test_a_job_that_slurm_forgot_is_over_but_not_one_it_was_not_asked_of(scripted: Scripted) -> None:
    scripted.begin("a", "b")
    scripted.words = None
    assert list(scripted.ended()) == []
    assert scripted.say(j1_0="RUNNING") == [("b", None)]
    assert scripted.cancelled == ["1_1"]


def test_a_lost_node_is_only_believed_twice(scripted: Scripted) -> None:
    scripted.begin("a", "b")
    assert scripted.say(j1_0="NODE_FAIL", j1_1="PREEMPTED") == []
    assert scripted.say(j1_0="NODE_FAIL", j1_1="PENDING") == [("a", None)]
    assert scripted.cancelled == ["1_0"], "it may not come back beside the next attempt"


def test_arrays_that_are_refused_are_cut(scripted: Scripted) -> None:
    scripted.refuses = [ConfigError("too large")]
    assert len(scripted.begin("a", "b", "c")) == 1 and scripted.submitted == [3, 1]
    scripted.refuses = [ConfigError("too many"), ConfigError("too many")]
    assert scripted.begin("b", "c") == [] and scripted.submitted == [3, 1, 2, 1]
    assert scripted.begin("b", "c") == [] and len(scripted.submitted) == 4, "not before a job has ended"
    assert scripted.say(j2_0="COMPLETED") == [("a", None)]
    assert len(scripted.begin("b", "c")) == 1
    assert not (scripted.folder / "c/attempt-1.log").exists()


def test_no_controller_is_waited_for_and_a_refusal_of_the_first_job_is_told(scripted: Scripted) -> None:
    scripted.refuses = [Unanswered("Unable to contact slurm controller")]
    assert scripted.begin("a") == [] == scripted.begin("a") and scripted.submitted == [1]
    scripted.not_before = 0.0
    scripted.refuses = [ConfigError("no such account")]
    with pytest.raises(ConfigError, match="no such account"):
        scripted.begin("a")


def test_options_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Scripted(
        tmp_path, monkeypatch, memory=1.5, account="me", setup=("module load x",), more={"mail_type": "END"}
    )
    assert (
        made.options["mem"] == "1536MB"
        and made.options["account"] == "me"
        and made.options["setup"] == ["module load x"]
    )
    assert made.options["additional_parameters"]["mail-type"] == "END" and "gres" not in made.options
    monkeypatch.setattr(slurm, "answer", lambda *_: "other gpu:2\nplain* gpu:a100:4(S:0-1)")
    assert made._options()["gres"] == "gpu:1"
    made.config = RunnerConfig(slurm=SlurmConfig(more={"gpus_per_node": 2}))
    assert "gres" not in made._options()
    made.config = RunnerConfig(devices="cpu")
    assert "gres" not in made._options()


def test_a_job_whose_attempt_was_given_up_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda file, words: started.append(words))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    made = job.order(folders, threads=3, processes=1, executor="slurm", job="7_0")
    (tmp_path / "7.json").write_text(json.dumps([made]))
    os.environ |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    monkeypatch.setattr(sys, "argv", ["job.py", str(tmp_path)])
    job.main()
    assert started[0][-2:] == [str(folder) for folder in folders] and os.environ["OMP_NUM_THREADS"] == "3"
    begin_attempt(folders[0])
    job.main()
    assert started[1][-1] == str(folders[1]) and str(folders[0]) not in started[1]
    begin_attempt(folders[1])
    assert job.main() == 75 and len(started) == 2
    made = job.order(folders, threads=1, processes=2)
    assert made["words"][-2:] == ["--processes", "2"]
    (tmp_path / "7_0.stop").touch()
    assert job.main() == 75 and len(started) == 2
