"""Uploads after the fact: against a server that speaks the protocol of wandb's own client, and offline, read back by its tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
from test_tracking import inspect
from wandb_server import Server, Uploaded, serving

from core.options import plain
from core.yaml_files import dump
from engine import tracking
from lab import __main__ as lab_main
from lab import store, sync, wandb_sweep
from lab.listing import open_listing
from train_args import with_vocabulary

KEY = "marker" * 7
RESULT = {"status": "done", "val_loss": 2.5, "best_val_loss": 2.25, "train_loss": None, "iters": 4, "error": None}
RESULT |= {"provenance": {"commit": "abc", "versions": {"torch": "2"}}}
BOARD = "rank,cell,n,mean,note,optimizer.learning_rate\n1,lr=1,2,2.5,,0.1\n,lr=2\x1b,2,,x,off\n"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082"
)
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, settings or proxy of the machine that runs the tests."""
    for name in [n for n in os.environ if n.startswith("WANDB_") or n.lower().endswith("_proxy")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def records(n: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"kind": "eval", "iter": 0, "tokens": 0, "val_loss": 3.0}]
    for i in range(1, n + 1):
        made.append(
            {"kind": "train", "iter": i, "tokens": i * 64, "train_loss": 2.0, "modules": {"h.0": {"load": 0.5}}}
        )
    return [*made, {"kind": "eval", "iter": n, "tokens": n * 64, "val_loss": 2.25}]


def write(folder: Path, made: list[dict[str, Any]], result: dict[str, Any] | None) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    (folder / "result.json").unlink(missing_ok=True)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


class Sweep:
    """A sweep of three runs as a runner leaves it: one is done, one was stopped, one has not begun."""

    def __init__(self, home: Path) -> None:
        data = runs.tiny_corpus(home / "data")
        tree = runs.tree(
            data, name="s", runner__root=str(home / "runs"), tracking__wandb={"project": "p", "tags": ["night"]}
        )
        tree["sweep"] = {"grid": {"model.norm": ["layernorm", "rmsnorm", "none"]}, "seeds": 1}
        self.listing = open_listing(runs.write(home / "s.yaml", tree), [])
        self.folder = self.listing.folder
        self.folders = [self.listing.path(run) for run in self.listing.runs]
        self.configs = [replace(run.config, run=self.listing.info(run, "off")) for run in self.listing.runs]
        for folder, config in zip(self.folders, self.configs, strict=True):
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(dump(plain(config)))
        (self.folder / "sweep.yaml").write_text(dump(plain(self.listing.tree)))
        write(self.folders[0], records(4), RESULT)
        write(self.folders[1], records(3), None)
        database = store.Store(self.folder / store.FILE)
        database.list(
            store.Row(r.hash, self.listing.ids[r.hash], r.cell, r.seed, dict(plain(r.changed)), False, 8, status)
            for r, status in zip(self.listing.runs, ("done", "stopped", "waiting"), strict=True)
        )
        database.close()

    def id(self, i: int) -> str:
        return tracking.wandb_id("s", self.folders[i].name)

    def tracked(self, i: int) -> dict[str, Any]:
        """What a trial tells its tracker."""
        config = with_vocabulary(self.configs[i], self.listing.reader.corpus(self.configs[i].data).meta.vocab_size)
        about = config.run
        changed = {"changed": about.changed, "swept": about.swept, "full_config": plain(config)}
        return {"cell": about.cell, "seed": config.train.seed, **changed}

    def command(self, *words: str, server: Server | None = None) -> subprocess.CompletedProcess[str]:
        """In a process of its own, as wandb remembers its first server."""
        given = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY} if server else {}
        command = [sys.executable, "-m", "lab", "sync", str(self.folder), *words]
        return subprocess.run(
            command, cwd=runs.ROOT, env={**os.environ, **given}, capture_output=True, text=True, timeout=120
        )

    def report(self) -> None:
        (self.folder / wandb_sweep.TABLE).write_text(BOARD)
        (self.folder / wandb_sweep.PLOTS).mkdir(exist_ok=True)
        (self.folder / wandb_sweep.PLOTS / "curves.png").write_bytes(PNG)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("wandb")
    with serving() as made:
        yield made


TRACKED = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from engine.tracking import Tracker
folder, about = Path(sys.argv[1]), json.loads(sys.argv[2])
config = SimpleNamespace(wandb=SimpleNamespace(**about["full_config"]["tracking"]["wandb"]))
tracker = Tracker(Path(sys.argv[3]), config, mode="online", sweep="s", run_id=folder.name, **about)
for line in (folder / "metrics.jsonl").read_text().splitlines():
    tracker.log(json.loads(line))
tracker.finish(json.loads((folder / "result.json").read_text()))
"""


def told(run: Uploaded) -> dict[str, Any]:
    """What a run is, without what its process and clock add."""
    about = {key: run.about.get(key) for key in ("name", "displayName", "project", "groupName", "jobType", "tags")}
    config = {key: value for key, value in run.config.items() if key != "_wandb"}
    summary = {key: value for key, value in run.summary.items() if not key.startswith("_")}
    return {**about, "config": config, "rows": run.rows, "summary": summary, "exit": run.exit_code}


def test_what_is_uploaded_later_is_what_tracking_would_have_made(
    sweep: Sweep, server: Server, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> str:
        """Here, where there is nothing to upload."""
        with monkeypatch.context() as patch:
            patch.setenv("WANDB_API_KEY", KEY)
            patch.setenv("WANDB_BASE_URL", server.url)
            assert lab_main.main(["sync", str(sweep.folder)]) == 0
        return capsys.readouterr().out

    done = sweep.command(server=server)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{sweep.folder}: 3 runs: 2 uploaded, 1 without records"
    assert set(server.runs) == {sweep.id(0), sweep.id(1)}
    with serving() as other:
        environment = {**os.environ, "WANDB_BASE_URL": other.url, "WANDB_API_KEY": KEY}
        command = [
            sys.executable,
            "-c",
            TRACKED,
            str(sweep.folders[0]),
            json.dumps(sweep.tracked(0)),
            str(tmp_path / "live"),
        ]
        subprocess.run(command, cwd=runs.ROOT, env=environment, check=True, timeout=120)
        live = told(other.runs[sweep.id(0)])
    later = told(server.runs[sweep.id(0)])
    assert later == live
    assert later["config"]["model"]["vocab_size"] and later["tags"] == ["norm=layernorm", "night"]
    assert [row["iter"] for row in later["rows"]] == [0, 1, 2, 3, 4] and later["exit"] == 0
    assert later["summary"]["final_val_loss"] == 2.5
    assert server.runs[sweep.id(1)].exit_code == tracking.STOPPED

    # Again: nothing. Then what is new: rows that the server lacks, and the result of what has ended meanwhile.
    assert again() == f"{sweep.folder}: 3 runs: 2 up to date, 1 without records\n"
    assert [server.runs[sweep.id(i)].begun for i in (0, 1)] == [1, 1]
    write(sweep.folders[1], records(3)[:-1] + records(6)[4:], RESULT)
    sweep.report()
    before = list(server.runs[sweep.id(1)].history)
    third = sweep.command(server=server)
    assert (third.returncode, third.stderr) == (0, "")
    assert "1 uploaded, 1 up to date, 1 without records" in third.stdout
    grown = server.runs[sweep.id(1)]
    assert grown.history[: len(before)] == before and [row["iter"] for row in grown.rows] == list(range(7))
    assert (grown.exit_code, server.runs[sweep.id(0)].begun) == (0, 1)

    # The leaderboard is new too, so the sweep has a run of its own.
    own = server.runs[wandb_sweep.sweep_id("s", sweep.folder)]
    assert (own.about["jobType"], own.about["groupName"]) == ("sweep", "s")
    assert (own.summary["best_cell"], own.summary["best_mean"], own.summary["runs_done"]) == ("lr=1", 2.5, 1)
    assert own.summary["leaderboard"]["nrows"] == 2
    assert {name.split("/")[1] for name in own.files if name.startswith("media/")} == {"images", "table"}
    assert "2 up to date" in again() and own.begun == 1
    files = [file for file in sweep.folder.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert not [sent for sent in server.raw if KEY.encode() in sent]


def test_without_a_key_it_says_so(sweep: Sweep, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab_main.main(["sync", str(sweep.folder)]) == 1
    assert capsys.readouterr() == ("", "Nothing was uploaded: there is no API key ('wandb login').\n")
    monkeypatch.setattr(tracking, "installed", lambda: False)
    assert lab_main.main(["sync", str(sweep.folder)]) == 1
    assert "wandb is not installed" in capsys.readouterr().err
    assert not list(sweep.folder.rglob(sync.MARK))
    assert lab_main.main(["sync", str(sweep.folders[0])]) == 2


def test_offline_files_are_written_and_read_back(sweep: Sweep, capsys: Captured) -> None:
    pytest.importorskip("wandb")
    lock = store.hold(sweep.folders[1])
    assert lock is not None
    with lock:
        done = sweep.command("--offline")
        assert lab_main.main(["sync", str(sweep.folder), "--offline"]) == 0
        assert "1 up to date, 1 on their way (left out)" in capsys.readouterr().out
    assert done.stdout.endswith(": 3 runs: 1 written, 1 on their way (left out), 1 without records\n")
    assert (done.returncode, done.stderr) == (0, "")
    [offline] = (sweep.folders[0] / "wandb").iterdir()
    found = inspect(offline)
    assert (found["run"]["run_id"], found["run"]["run_group"]) == (sweep.id(0), "s")
    assert [row["iter"] for row in found["history"]] == [0, 1, 2, 3, 4] and found["history"][1][
        "modules/h.0/load"
    ] == 0.5
    assert found["summary"]["final_val_loss"] == 2.5 and found["exit"]["exit_code"] == 0
    assert sync.marks(sweep.folders[0]) == {"offline": {"records": 6, "status": "done"}}


def test_what_cannot_be_uploaded_is_told_and_three_in_a_row_end_it(
    sweep: Sweep, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fails(folder: Path, *given: Any) -> str:
        tried.append(folder.name)
        raise OSError(f"no answer to {KEY}")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(sync, "upload", fails)
    rows = store.listed(sweep.folder / store.FILE)
    monkeypatch.setattr(store, "open_sweep", lambda folder: ({"name": "s"}, rows * 2))
    assert lab_main.main(["sync", str(sweep.folder), "--offline"]) == 1
    out, err = capsys.readouterr()
    assert len(tried) == 3 and out.endswith("6 runs: 3 failed, 3 not tried\n")
    assert err.count("OSError: no answer to ") == 3 and KEY not in out + err


OWN = """
import sys
from pathlib import Path
from types import SimpleNamespace
from lab.wandb_sweep import log_sweep
config = SimpleNamespace(wandb=SimpleNamespace(project="p", entity=None, tags=("night",)))
for done in (1, 2):  # at its end, and at its end after it was continued
    summary = {"best_cell": "lr=1", "best_mean": float("nan"), "runs_done": done}
    assert log_sweep(Path(sys.argv[1]), "s", config, "offline", summary)
"""


def test_the_sweeps_own_run(sweep: Sweep) -> None:
    pytest.importorskip("wandb")
    sweep.report()
    command = [sys.executable, "-c", OWN, str(sweep.folder)]
    environment = {**os.environ, "WANDB_API_KEY": KEY}
    done = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [offline] = (sweep.folder / "wandb").iterdir()  # of the second alone
    found = inspect(offline)
    assert found["run"]["run_id"] == wandb_sweep.sweep_id("s", sweep.folder)
    assert (found["run"]["run_group"], found["run"]["job_type"], found["run"]["tags"]) == ("s", "sweep", ["night"])
    assert (found["summary"]["best_cell"], found["summary"]["runs_done"]) == ("lr=1", 2)
    [table] = offline.glob("files/media/table/*.json")
    made = json.loads(table.read_text())
    assert made["columns"] == ["rank", "cell", "n", "mean", "note", "optimizer.learning_rate"]
    assert made["data"] == [
        [1, "lr=1", 2, 2.5, None, "0.1"],
        [None, "lr=2\N{REPLACEMENT CHARACTER}", 2, None, "x", "off"],
    ]
    [picture] = offline.glob("files/media/images/plots/*.png")
    assert picture.read_bytes() == PNG
    files = [file for file in sweep.folder.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert wandb_sweep.sweep_id("s", sweep.folder) != wandb_sweep.sweep_id("s", sweep.folder.parent)


def test_a_failure_of_the_sweeps_run_is_a_line(sweep: Sweep, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError(f"no\nspace for {KEY}")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "start", fails)
    config = sweep.configs[0].tracking
    assert not wandb_sweep.log_sweep(sweep.folder, "s", config, "online", {})
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "RuntimeError: no space for " in err and KEY not in err
    assert wandb_sweep.log_sweep(sweep.folder, "s", config, "off", {}) and capsys.readouterr() == ("", "")
