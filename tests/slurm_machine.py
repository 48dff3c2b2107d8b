"""A real Slurm on this machine for tests: two virtual nodes with two fake GPUs each, without accounting, in a folder of its own.

It needs no service of the system, and lives beside another Slurm. Nothing of it outlives the `with` that started it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES, PATIENCE = 2, 60.0  # seconds until the nodes are ready
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# cred_expire: a job that is requeued waits for as long; less than 5 s means 120. GPUs have to be character devices, which nobody
# opens here.
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
KillWait=10
SlurmdTimeout=30
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=1000 Gres=gpu:fake:2
PartitionName=plain Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Machine:
    """Its processes. `environment` is what Slurm's commands need beside the usual."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, dict[str, subprocess.Popen[bytes]]()
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Returns when its nodes are ready. Raises RuntimeError with the last words of its logs."""
        folder, first = self.folder, _ports()
        (folder / "state").mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        known = {"folder": folder, "host": host, "user": getpass.getuser(), "nodes": NODES}
        (folder / "slurm.conf").write_text(CONF.format(**known, port=first, first=first + 1, last=first + NODES))
        (folder / "gres.conf").write_text(f"NodeName=n[1-{NODES}] Name=gpu Type=fake File=/dev/null,/dev/zero\n")
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        files = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self.begin("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files.values())
        self.until((folder / "munge.socket").exists)
        self.control()
        for i in range(1, NODES + 1):
            (folder / f"spool.n{i}").mkdir()
            self.begin("slurmd", "-D", "-N", f"n{i}")
        self.until(lambda: len(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == NODES)

    def control(self) -> None:
        """Starts the controller, also again."""
        self.begin("slurmctld", "-D")

    def begin(self, *words: str) -> None:
        environment = {**os.environ, **self.environment, "PATH": PATH}
        with (self.folder / f"{words[0]}.out").open("ab") as out:
            process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        self.started[words[0] + words[-1]] = process

    def end(self, name: str = "") -> None:
        """Ends the processes whose names begin so."""
        chosen = [process for key, process in reversed(self.started.items()) if key.startswith(name)]
        for process in chosen:
            process.send_signal(signal.SIGTERM)
        for process in chosen:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()

    def call(self, *words: str) -> str:
        """What one of Slurm's commands prints; nothing where it fails."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True).stdout

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            if time.monotonic() > deadline:
                logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                raise RuntimeError("\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs))
            time.sleep(0.05)


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """A Slurm while inside. `folder` is not there yet, and its path is short: a socket's may have 107 letters."""
    made = Machine(folder)
    try:
        made.start()
        yield made
    finally:
        made.end()


def _ports() -> int:
    """The first of free ports in a row, of the controller and of the nodes."""
    for first in range(16817, 30000, NODES + 1):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + NODES + 1):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("No ports are free.")


if __name__ == "__main__":
    with machine(Path(sys.argv[1])) as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        sys.stdin.read()
