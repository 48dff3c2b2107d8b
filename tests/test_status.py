"""How a sweep stands: from its database and from the files of runs on their way, with real locks and clocks that were set."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab import __main__ as lab_main
from lab import live, status, store
from lab.stats import finite

ROOT = Path(__file__).parents[1]
HOSTILE = "x\x1b[2J\u202eevil\nname\x07"
Captured = pytest.CaptureFixture[str]


class Desk:
    """A sweep made by hand. Runs are `run-NAME` of 100 iterations; locks are held until the test ends."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        folder.mkdir()
        (folder / "sweep.yaml").write_text("name: s\n")
        self.database = store.Store(folder / "sweep.db")

    def list(self, **statuses: str) -> None:
        self.database.list(
            store.Row(x, f"run-{x}", f"n={x}", 1, {}, False, 100, noted) for x, noted in statuses.items()
        )

    def at(self, name: str) -> Path:
        folder = self.folder / f"run-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def begun(self, name: str, *records: dict[str, Any], attempt: int = 1, beat: dict[str, Any] | None = None) -> Path:
        """A run with a process that is gone."""
        folder = self.at(name)
        (folder / ".lock").touch()
        (folder / f"attempt-{attempt}.log").touch()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if beat is not None:
            (folder / ".heartbeat").write_text(json.dumps(beat))
        return folder

    def held(self, name: str, *records: dict[str, Any], **more: Any) -> Path:
        """A run on its way."""
        folder = self.begun(name, *records, **more)
        lock = store.hold(folder)
        assert lock is not None
        self.stack.enter_context(lock)
        return folder

    def ended(self, name: str, how: str, **more: Any) -> None:
        folder = self.begun(name)
        (folder / "result.json").write_text(json.dumps({"status": how, "iters": 100, "error": None, **more}))

    def now(self) -> live.Now:
        return live.now(self.folder, "s", store.listed(self.folder / "sweep.db"))

    def told(self, *words: str) -> int:
        return lab_main.main(["status", str(self.folder), *words])


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no driver of this machine
    with ExitStack() as stack:
        made = Desk(tmp_path / "s", stack)
        yield made
        made.database.close()


def train(i: int, seconds: float, loss: float = 2.5) -> dict[str, Any]:
    return {"kind": "train", "iter": i, "tokens": i * 64, "seconds": seconds, "train_loss": loss}


def evaluation(i: int, seconds: float, loss: float = 3.25) -> dict[str, Any]:
    return {"kind": "eval", "iter": i, "tokens": i * 64, "seconds": seconds, "val_loss": loss}


def beat(age: float, **more: Any) -> dict[str, Any]:
    return {"time": time.time() - age, "pid": 7, "host": os.uname().nodename, "iter": 0, **more}


def test_a_line_for_every_run(desk: Desk, capsys: Captured) -> None:
    desk.list(a="waiting", b="running", c="stopped", d="done", e="failed", f="paused", g="lost")
    desk.held("b", evaluation(0, 0.5), train(10, 1.5), train(20, 2.5), attempt=2)
    desk.begun("c", evaluation(0, 0.1), train(10, 0.5, 2.25))
    desk.ended("d", "done", train_loss=1.5, val_loss=1.25, tokens_per_second=12345.6, attempt=1)
    desk.ended("e", "failed", error="Traceback\n  File x\nRuntimeError: no schedule today")
    (desk.begun("f") / store.PAUSED).touch()
    assert desk.told() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "s: 1 done, 1 failed, 1 running, 1 paused, 1 stopped, 1 waiting, 1 lost; about 48.0 s left"
    assert "failed: run-e: RuntimeError: no schedule today" in out and any(line.startswith("CPU: load") for line in out)
    rows = [line.split() for line in out[out.index("") + 2 :]]
    assert rows == [
        ["run-a", "waiting", "0/100"],
        ["run-b", "running", "20/100", "2.5000", "3.2500", "640", "8.0", "s", "2"],  # 20 iterations in 2 s, 80 to go
        ["run-c", "stopped", "10/100", "2.2500", "3.2500", "1.60k"],
        ["run-d", "done", "100/100", "1.5000", "1.2500", "12.3k"],
        ["run-e", "failed", "100/100"],
        ["run-f", "paused", "0/100"],
        ["run-g", "lost", "0/100"],
    ]


@pytest.mark.parametrize(
    ("noted", "files", "seen"),
    [
        ("running", "held", "running"),
        ("waiting", "held", "running"),  # the runner died before it could note that it had begun
        ("running", "gone", "stopped"),
        ("running", "ended", "diverged"),  # it died before it could note the end
        ("running", "", "waiting"),
        ("waiting", "", "waiting"),
        ("submitted", "", "submitted"),
        ("running", "elsewhere", "running"),
        ("running", "elsewhere, silent", "stopped"),
        ("done", "held", "done"),  # of an ended run no file is looked at
    ],
)
def test_files_decide_about_runs_that_have_not_ended(desk: Desk, noted: str, files: str, seen: str) -> None:
    desk.list(a=noted)
    if files == "held":
        desk.held("a")
    elif files == "gone":
        desk.begun("a", beat=beat(1))
    elif files == "ended":
        desk.ended("a", "diverged")
    elif files:
        age = 500.0 if "silent" in files else 10.0
        path = desk.begun("a", beat=beat(age, host="another")) / ".heartbeat"
        os.utime(path, (time.time() - age,) * 2)
    assert desk.now().counts == {seen: 1}


def test_the_rate_is_of_the_runs_own_clock(desk: Desk) -> None:
    """Times in files and database may be anything: a clock was set to 1970 and back."""
    desk.list(a="running", b="done", c="done", d="done", e="waiting", f="done")
    desk.held("a", *(train(i, i / 4) for i in range(0, 50, 10)), beat=beat(1e9, iter=60))
    for name, begun, ended in (("b", 100.0, 300.0), ("c", 1e9, 300.0), ("d", 300.0, 500.0), ("f", 9.0, 1e9)):
        for event, at in (("running", begun), ("done", ended)):
            words = "INSERT INTO events (time, run_id, event, detail) VALUES (?, ?, ?, '{}')"
            desk.database.db.execute(words, (at, f"run-{name}", event))
    now = desk.now()
    life = now.lives["run-a"]
    assert (life.iter, life.seconds_left) == (60, 10.0)  # 4 iterations a second
    assert life.silent is not None and life.silent < 30, "the file is new, whatever is in it"
    # Runs took 200 s for 100 iterations, everything included; one is on its way, so 140 iterations take 280 s.
    assert now.seconds_left == pytest.approx(280.0)
    desk.database.event("done", "run-e")
    assert desk.now().seconds_left == 10.0, "it alone is left, and its own rate is known"


def test_runs_of_one_process_share_its_time(desk: Desk) -> None:
    desk.list(a="running", b="running", c="waiting")
    for name in "ab":
        desk.held(name, train(0, 0.0), train(50, 5.0), beat=beat(0, iter=50))
    now = desk.now()
    assert [life.seconds_left for life in now.lives.values()] == [10.0, 10.0]  # 5 s each of its own
    assert now.seconds_left == pytest.approx(20.0)  # 200 iterations, 10 a second together


def test_what_a_process_said_of_itself(desk: Desk, capsys: Captured) -> None:
    desk.list(a="running", b="running")
    path = desk.held("a", train(0, 0.0), train(50, 5.0), beat=beat(95, device="cuda:3", peak_memory_bytes=123))
    os.utime(path / ".heartbeat", (time.time() - 95,) * 2)
    desk.held("b", beat={"time": "noon", "iter": None, "pid": []})
    assert desk.told() == 0
    out = capsys.readouterr().out
    assert re.search(r"run-a: no sign of life for 9\d\.\d s", out)
    assert "about" not in out and "run-b: no sign" not in out
    assert desk.told("--json") == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert (run["device"], run["peak_memory_bytes"], run["seconds_left"]) == ("cuda:3", 123, None)


def test_the_end_of_long_metrics_is_found_behind_long_records(desk: Desk) -> None:
    desk.list(a="running")
    slices = {"kind": "slices", "iter": 40, "slices": {f"h.{i}": 0.5 for i in range(9000)}}
    folder = desk.held("a", evaluation(0, 0.1), train(40, 8.0), slices)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\nno json\n{"kind": "tr')
    assert (folder / "metrics.jsonl").stat().st_size > live.TAIL
    life = desk.now().lives["run-a"]
    assert (life.iter, life.train_loss, life.val_loss) == (40, 2.5, 3.25)


def test_of_many_runs_only_those_on_their_way_are_read(desk: Desk) -> None:
    """In a process of its own, which notes every file that is opened; torch is not imported there."""
    count = 300
    desk.list(
        **{f"r{i}": "done" if i < 250 else "waiting" for i in range(count)} | {"r298": "running", "r299": "running"}
    )
    for i in range(count - 2):
        (desk.begun(f"r{i}") / "result.json").write_text("{}") if i < 250 else desk.at(f"r{i}")
    desk.held("r298", train(50, 1.0))
    desk.held("r299")
    code = """
import sys
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from lab.__main__ import main
assert main(["status", sys.argv[1]]) == 0
print("opened", *{path.split("run-")[1].split("/")[0] for path in opened if "run-" in path})
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(desk.folder)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.splitlines()
    assert sorted(lines[-2].split()) == ["opened", "r298", "r299"] and lines[-1] == "False False"
    assert lines[0] == "s: 250 done, 2 running, 48 waiting" and len(lines) == 8
    assert desk.told("--all") == 0


def test_failures_are_told_once_for_all_that_share_them(desk: Desk, capsys: Captured) -> None:
    desk.list(**{f"x{i}": "failed" for i in range(60)})
    for i in range(60):
        words = (
            "OSError: run-x7 no space" if i == 7 else "" if i == 8 else f"KeyError: {i - 9}" if 8 < i < 14 else "Killed"
        )
        desk.ended(f"x{i}", "failed", error=f"Traceback\n{words}\n" if words else None)
    assert desk.told() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2] == "failed: run-x59 and 52 more: Killed"
    assert "failed: run-x7: OSError: ... no space" in out and "... and 3 other failures" in out
    assert len(out) == 8, "none is on its way, so there is no table"


def smi(desk: Desk, script: str) -> None:
    tool = desk.folder.parent / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_gpus_are_told_where_the_driver_is(desk: Desk, capsys: Captured) -> None:
    desk.list(a="waiting")
    smi(
        desk,
        'echo "$1 $2" >&2; echo "GPU-1, NVIDIA H200, big, 87, 12595, 142336"; echo "GPU-2, Old, [N/A], [N/A], [N/A]"',
    )
    assert desk.told() == 0
    out = capsys.readouterr().out
    assert "GPU 0, NVIDIA H200, big: 87% busy, 12.3 of 139.0 GiB\nGPU 1, Old\n" in out and "CPU: load" not in out
    assert desk.told("--json") == 0
    first = json.loads(capsys.readouterr().out)["gpus"][0]
    assert first == {
        "uuid": "GPU-1",
        "name": "NVIDIA H200, big",
        "busy": 87.0,
        "used": 12595 << 20,
        "total": 142336 << 20,
    }


@pytest.mark.parametrize("script", ["exit 9", "echo no devices were found", "sleep 60"])
def test_a_driver_that_fails_stops_nothing(
    desk: Desk, script: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.list(a="waiting")
    monkeypatch.setattr(status, "PATIENCE", 0.3)
    smi(desk, f"PATH=/bin:/usr/bin; exec {script}" if "sleep" in script else script)
    assert desk.told() == 0
    assert "CPU: load" in capsys.readouterr().out


def test_hostile_names_and_narrow_terminals(desk: Desk) -> None:
    made = live.Life(HOSTILE, HOSTILE, 1, "run\x1bning", 5, 100, 1.0, 2.0, 1e4, 3.0, 2, "cuda:0\x07")
    long = live.Life(
        "learning_rate=0.0001+n_embd=256-0123456789abcdef", "", 1, "done", 100, 100, 1.0, 2.0, 1e4, None, 1, ""
    )
    wide = live.Life("日本語日本語日本語日本語", "", 1, "done", 100, 100)
    for width in (200, 90, 64, 45, 30):
        lines = [status.cut(line, width) for line in status.table([made, long, wide], width)]
        assert all(status.columns_of(line) <= width for line in lines)
        assert all(line.replace("日本語", "").isprintable() for line in lines)
        assert lines[0].startswith("run") and len(lines) == 4
        assert ("validation loss" in lines[0]) == (width >= 64) and ("device" in lines[0]) == (width >= 200)
    (desk.folder / "sweep.yaml").write_text(json.dumps({"name": HOSTILE}))
    desk.database.list([store.Row("a", HOSTILE.replace("/", ""), HOSTILE, 1, {}, False, 9, "\x1b[0mfailed")])
    seen = status.see(desk.folder)
    text = "\n".join(status.told(seen, status.shown(seen, True), None))
    assert "\x1b" not in text and "\u202e" not in text and text.count("evil") == 2


def test_wrong_words(desk: Desk, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        lab_main.main(["status", "--watch", str(desk.folder)])
    assert end.value.code == 2 and "DIR comes before --watch" in capsys.readouterr().err
    assert lab_main.main(["status", "nowhere"]) == 2
    assert capsys.readouterr().err == "nowhere is not the folder of a sweep: there is no such folder.\n"


# Watching -------------------------------------------------------------------------------------------------------------------


class Turns:
    """Stands for `sleep`: does the next thing at each call."""

    def __init__(self, *acts: Any) -> None:
        self.acts, self.slept = list(acts), list[float]()

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.acts.pop(0)()


def watching(desk: Desk, monkeypatch: pytest.MonkeyPatch, *words: str, turns: Turns) -> int:
    monkeypatch.setattr("time.sleep", turns)
    monkeypatch.setattr(status.watch, "__defaults__", (turns,))
    return desk.told("--watch", *words)


def test_watching_ends_with_the_sweep(desk: Desk, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.list(a="waiting", b="waiting")
    turns = Turns(
        lambda: None, lambda: desk.database.event("done", "run-a"), lambda: desk.database.event("pruned", "run-b")
    )
    assert watching(desk, monkeypatch, "0.5", turns=turns) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["s: 2 waiting", "s: 1 done, 1 waiting", "s: 1 done, 1 pruned"], (
        "a line where something has changed"
    )
    assert len(out) > 5 and turns.slept == [0.5, 0.5, 0.5]


def test_watching_as_json_is_a_line_each_time(desk: Desk, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.list(a="waiting")
    turns = Turns(lambda: None, lambda: desk.database.event("done", "run-a"))
    assert watching(desk, monkeypatch, "--json", turns=turns) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["ended"] for one in made] == [False, False, True] and turns.slept == [status.EVERY] * 2


def test_ctrl_c_ends_the_watch_and_nothing_else(desk: Desk, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.list(a="waiting")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert watching(desk, monkeypatch, turns=Turns(interrupt)) == 0
    assert capsys.readouterr() == ("s: 1 waiting\n\n", "")


def test_without_a_runner_nothing_is_waited_for(desk: Desk, capsys: Captured) -> None:
    desk.list(a="stopped")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (desk.folder / ".runner").write_text(f"process {gone.pid} on {os.uname().nodename}")
    assert desk.told("--watch") == 0
    assert "No runner is at work on it." in capsys.readouterr().out
    (desk.folder / ".runner").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    assert desk.now().runner is True and not desk.now().ended
    (desk.folder / ".runner").write_text("process 1 on another-machine")
    assert desk.now().runner is True
    os.utime(desk.folder / ".runner", (1e9, 1e9))
    assert desk.now().runner is None, "it may be dead"
    (desk.folder / ".runner").write_text("")
    assert desk.now().runner is False


def test_on_a_terminal_it_is_drawn_in_its_place(desk: Desk) -> None:
    """A real pseudo-terminal of 40 columns and 12 lines: what is drawn fits, and the next drawing begins where it began."""
    desk.list(**{f"r{i}": "waiting" for i in range(30)})
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40", "LINES": "12"}
    command = [sys.executable, "-m", "lab", "status", str(desk.folder), "--watch", "0.05"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    seen, drawn = b"", 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the terminal is closed
            break
        drawn = seen.count(b"\x1b[J")
        if drawn == 3:
            desk.database.events("done", [f"run-r{i}" for i in range(30)])
    assert process.wait(timeout=30) == 0, seen.decode()
    os.close(ours)
    screens = seen.decode().replace("\r", "").split("\x1b[J")[1:]
    for screen in screens:
        lines = re.sub(r"\x1b\[\d+F$", "", screen).splitlines()
        assert len(lines) <= 11 and all(len(line) < 40 for line in lines)
        lifted = re.search(r"\x1b\[(\d+)F$", screen)
        assert (lifted is None) if screen is screens[-1] else (lifted is not None and int(lifted[1]) == len(lines))
    assert "more" in screens[0] and screens[-1].startswith("s: 30 done")


def test_numbers_alone_are_numbers() -> None:
    assert [finite(x) for x in (1, 2.5, True, "3", None, float("nan"))] == [1, 2.5, None, None, None, None]
