"""Sweeps that start in a moment: runners forked from a process that has imported everything and has one thread.

`Template` is that process. A runner that it forks is `train.main` with the real executor; the process that forks its workers is
forked from it in turn (schedules.fork_helpers), so that what a prelude has changed in the runner holds in its trials too.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import runs
from runs import Lab, tree, write

from lab.helper import receive, send
from lab.store import Row, listed


class Template:
    """The process that forks runners, started when it is made."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{runs.ROOT}{os.pathsep}{Path(__file__).parent}",
        }
        command = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()

    def ask(self, content: dict[str, Any]) -> Any:
        send(self.channel, content)
        message = receive(self.channel)
        assert message is not None, "the template has died"
        return message[0]["answer"]

    def close(self) -> None:
        self.channel.close()
        self.process.wait()


@dataclass
class Runner:
    """A command at work. `prints` is what it has printed so far, both streams together."""

    template: Template
    pid: int
    log: Path
    code: int | None = None

    @property
    def prints(self) -> str:
        return self.log.read_text()

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.template.ask({"poll": self.pid})
        return self.code

    def wait(self) -> int:
        """Its exit code, negative for the signal that ended it."""
        runs.until(lambda: self.poll() is not None)
        assert self.code is not None
        return self.code

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        os.kill(self.pid, number)
        return self.wait()


RATES = {"a": 0.01, "b": 0.003, "c": 0.03, "d": 0.001, "e": 0.02, "r": 0.01}


@dataclass
class Warm(Lab):
    """A sweep over the plugin's labels whose runners come from a template.

    Each label has a learning rate of its own. `sweep` replaces that, `more` is added to it; `runner` and `changes` (by dotted key)
    are the rest of the file.
    """

    template: Template = None  # type: ignore[assignment]
    sweep: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    runner: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    runners: list[Runner] = field(default_factory=list)

    @property
    def file(self) -> Path:
        made = tree(self.data, name="s", plugins=["extra.py"])
        made["runner"] = {
            "root": str(self.home / "runs"),
            "pack": self.pack,
            "per_device": 1,
            "threads": 1,
            **self.runner,
        }
        made["model"] |= {"n_layer": 1}
        made["train"] |= {"max_iters": 6, "eval_interval": 6, "eval_iters": 1}
        made["schedule"] = {"variant": "points"}
        rates = {"optimizer.learning_rate": [RATES[label[0]] for label in self.labels]}
        made["sweep"] = self.sweep or {"zip": {"schedule.label": list(self.labels), **rates}}
        made["sweep"] |= self.more
        for key, value in self.changes.items():
            section, _, name = key.partition(".")
            made[section][name] = value
        return write(self.home / "s.yaml", made)

    def begin(self, *words: str, prelude: str = "") -> Runner:
        """A runner at work. prelude: Python that it carries out first."""
        log = self.home / f"runner-{len(self.runners)}.log"
        asked = {
            "words": ["--config", str(self.file), *words],
            "folder": str(self.home),
            "environment": {"POINTS": str(self.points)},
            "prelude": prelude,
            "log": str(log),
        }
        self.runners.append(Runner(self.template, self.template.ask(asked), log))
        return self.runners[-1]

    def carry_out(self, *words: str, prelude: str = "") -> tuple[int, str]:
        """The exit code of a whole command, and what it has printed."""
        runner = self.begin(*words, prelude=prelude)
        code = runner.wait()
        assert "Traceback" not in runner.prints, runner.prints
        return code, runner.prints

    def run(self, label: str) -> Path:
        return next(self.folder.glob(f"label={label}[+-]*"))

    def rows(self) -> list[Row]:
        return listed(self.folder / "sweep.db")

    def told(self, label: str) -> list[str]:
        """What became of a run, in words of the database."""
        name = self.run(label).name
        return [event for run_id, event, _ in self.events() if run_id == name]

    def close(self) -> None:
        super().close()
        for runner in self.runners:
            if runner.poll() is None:
                runner.end()


def gone(process: int) -> bool:
    """Whether a process has ended, whoever should have taken notice of it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# In the template ----------------------------------------------------------------------------------------------------------------


def become_runner(asked: dict[str, Any]) -> NoReturn:
    import schedules

    import lab.runner
    import train

    assert lab.runner

    code = 99
    try:
        os.setsid()
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        schedules.fork_helpers()
        schedules.silent_reports()
        exec(asked["prelude"], {})
        code = train.main(asked["words"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def main() -> None:
    import optuna
    import schedules
    import torch

    assert schedules and optuna
    torch.set_num_threads(1)
    channel = socket.socket(fileno=int(sys.argv[1]))
    while (message := receive(channel)) is not None:
        asked = message[0]
        if "poll" in asked:
            ended, status = os.waitpid(asked["poll"], os.WNOHANG)
            send(channel, {"answer": os.waitstatus_to_exitcode(status) if ended else None})
            continue
        number = os.fork()
        if number == 0:
            channel.close()
            become_runner(asked)
        send(channel, {"answer": number})


if __name__ == "__main__":
    main()
