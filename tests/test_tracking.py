"""Tracking: metrics.jsonl under kills and resumes, wandb offline read back by its own tool, and what failures cost."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import MagicMock

import pytest

from engine import tracking
from engine.tracking import Metrics, Tracker, columns, label, resolve_mode, wandb_id

MonkeyPatch: TypeAlias = pytest.MonkeyPatch
Captured: TypeAlias = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[1]
KEY = "marker" * 7  # 42 characters, as long as wandb wants a key to be
FULL = {
    "name": "norms",
    "model": {"n_embd": 64, "norm": {"variant": "rmsnorm", "eps": 1e-6}, "linear": {"variant": "pkl", "scale": 0.5}},
    "train": {"seed": 3, "max_tokens": None},
    "optimizer": {"learning_rate": 0.003},
}
CONFIG = types.SimpleNamespace(wandb=types.SimpleNamespace(project="slicewise", entity=None, tags=("night", "night")))
RESULT: dict[str, Any] = {"status": "done", "val_loss": 2.5, "best_val_loss": 2.25, "train_loss": math.nan}
RESULT |= {"error": None, "provenance": {"commit": "abc", "versions": {"torch": "2"}}}


@pytest.fixture(autouse=True)
def _clean_home(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """No key, settings or proxy of the machine that runs the tests."""
    for name in [n for n in os.environ if n.startswith("WANDB_") or n.lower().endswith("_proxy")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def train(iteration: int, loss: float = 2.0) -> dict[str, Any]:
    return {"kind": "train", "iter": iteration, "tokens": iteration * 10, "train_loss": loss}


def evaluation(iteration: int, loss: float = 3.0) -> dict[str, Any]:
    return {"kind": "eval", "iter": iteration, "tokens": iteration * 10, "val_loss": loss}


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def tracker(run_dir: Path, mode: str = "offline", keep_to: int | None = None, **given: Any) -> Tracker:
    about: dict[str, Any] = {"sweep": "norms", "run_id": run_dir.name, "cell": "norm-rmsnorm", "seed": 3}
    about["changed"] = {"model.norm": "rmsnorm", "optimizer.learning_rate": 0.003, "train.seed": 3}
    about["full_config"] = FULL
    return Tracker(run_dir, CONFIG, mode=mode, keep_to=keep_to, **(about | given))


def python(code: str, run_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    setup = "import os, signal, sys; from tests.test_tracking import *; run_dir = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", setup + textwrap.dedent(code), str(run_dir)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def offline_folder(run_dir: Path) -> Path:
    [folder] = (run_dir / "wandb").iterdir()
    return folder


def inspect(folder: Path) -> dict[str, Any]:
    """What wandb's own reader finds: run, history rows, last summary values, metric definitions, exit."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found: dict[str, Any] = {"history": [], "summary": {}, "metric": {}}
    for record in map(json.loads, out.splitlines()):
        kind, body = record["type"], record.get(record["type"])
        if kind == "history":
            found["history"].append({k: v for k, v in body["item"].items() if k not in ("_runtime", "_timestamp")})
        elif kind == "summary":
            found["summary"] |= body["update"]
        elif kind == "metric":
            found["metric"][body.get("name") or body["glob_name"]] = body
        elif kind in ("run", "exit"):
            found[kind] = body
    return found


def test_a_record_is_a_line_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = Metrics(path)
    scalar = types.SimpleNamespace(item=lambda: 0.5)  # a one-element tensor
    metrics.log({"kind": "train", "iter": 1, "train_loss": math.nan, "grad_norm": -math.inf, "lr": scalar})
    metrics.log({"kind": "slices", "iter": 1, "norms": {"h.0.attn.qkv.weight[k]": [1.0, math.inf]}})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [  # read while it is open
        {"kind": "train", "iter": 1, "train_loss": None, "grad_norm": None, "lr": 0.5},
        {"kind": "slices", "iter": 1, "norms": {"h.0.attn.qkv.weight[k]": [1.0, None]}},
    ]
    metrics.close()


def test_a_torn_last_line_is_left_out_and_another_bad_one_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in (b'{"kind": "tra', b'{"kind": "\xe2', b"\0\0\0", b"[1"):
        path.write_bytes(lines(train(1), train(2)).encode() + torn)
        assert Metrics.read(path) == [train(1), train(2)]
        path.write_bytes(lines(train(1)).encode() + torn + b"\n" + lines(train(2)).encode())
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no JSON object"):
            Metrics.read(path)


def test_resume_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = [train(1), evaluation(2), train(2), train(3), evaluation(4)]
    path.write_text(lines(*before) + '{"kind": "train", "it')
    metrics = Metrics(path, keep_to=2)
    assert Metrics.read(path) == before[:3] == metrics.kept
    assert not metrics.log(evaluation(2))  # the loop evaluates again where it continues
    assert metrics.log(train(3))
    metrics.close()
    assert Metrics.read(path) == before[:4]
    Metrics(path).close()  # a start from nothing
    assert path.read_bytes() == b""
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["metrics.jsonl"]


def test_a_killed_process_loses_no_record(tmp_path: Path) -> None:
    code = """
        t = tracker(run_dir)
        for i in range(20): t.log(train(i))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    assert python(code, tmp_path / "run").returncode == -signal.SIGKILL
    assert Metrics.read(tmp_path / "run" / "metrics.jsonl") == [train(i) for i in range(20)]


def test_an_offline_run_reads_back(tmp_path: Path) -> None:
    """Group, job type, columns, rows, summary; nothing printed; the key of the environment in no file."""
    assert set(tracking.SETTINGS) <= set(pytest.importorskip("wandb").Settings.model_fields)
    run_dir = tmp_path / "rms=1_a1b2"
    code = """
        t = tracker(run_dir)
        for r in [evaluation(0), train(1), evaluation(1, 2.25), train(2, math.nan), evaluation(3)]: t.log(r)
        t.finish(RESULT)
        """
    done = python(code, run_dir, WANDB_API_KEY=KEY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = inspect(offline_folder(run_dir))
    run = found["run"]
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("norms", "norm-rmsnorm", "rms=1_a1b2")
    assert (run["project"], run["run_id"]) == ("slicewise", wandb_id("norms", "rms=1_a1b2"))
    assert run["tags"] == ["norm=rmsnorm", "learning_rate=0.003", "night"]
    columns_too = {"norm": "rmsnorm", "learning_rate": 0.003, "cell": "norm-rmsnorm", "seed": 3}
    assert {k: v for k, v in run["config"]["update"].items() if k != "_wandb"} == FULL | columns_too
    assert found["history"] == [
        {"_step": 0, "iter": 0, "tokens": 0, "val_loss": 3.0},
        {"_step": 1, "iter": 1, "tokens": 10, "train_loss": 2.0, "val_loss": 2.25},
        {"_step": 2, "iter": 2, "tokens": 20},
        {"_step": 3, "iter": 3, "tokens": 30, "val_loss": 3.0},
    ]
    assert found["metric"]["*"]["step_metric"] == found["metric"]["val_loss"]["step_metric"] == "iter"
    assert found["metric"]["val_loss"]["summary"] == {"min": True}
    kept = {key: found["summary"].get(key) for key in [*RESULT, "final_val_loss"]}
    assert kept == RESULT | {"val_loss": {"min": 2.25}, "final_val_loss": 2.5, "train_loss": 2.0}
    assert found["exit"]["exit_code"] == 0
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_resumed_offline_run_has_its_history_once(tmp_path: Path) -> None:
    """Two runs in one process as well: rows go to their own."""
    run_dir, other = tmp_path / "a", tracker(tmp_path / "b")
    first = tracker(run_dir)
    for record in [train(1), evaluation(2), train(3), train(4)]:
        first.log(record)
        other.log(record | {"tokens": -1})
    first.finish(None)
    before = offline_folder(run_dir).name
    second = tracker(run_dir, keep_to=2)
    for record in [evaluation(2), train(3, 1.5), evaluation(4)]:
        second.log(record)
    second.finish(RESULT | {"status": "failed"})
    other.finish(RESULT)
    assert Metrics.read(run_dir / "metrics.jsonl") == [train(1), evaluation(2), train(3, 1.5), evaluation(4)]
    assert offline_folder(run_dir).name != before  # and it is the only one
    found = inspect(offline_folder(run_dir))
    assert found["run"]["run_id"] == wandb_id("norms", "a")
    rows = [(row["_step"], row["tokens"], row.get("train_loss"), row.get("val_loss")) for row in found["history"]]
    assert rows == [(1, 10, 2.0, None), (2, 20, None, 3.0), (3, 30, 1.5, None), (4, 40, None, 3.0)]
    assert found["exit"]["exit_code"] == 1
    assert {row["tokens"] for row in inspect(offline_folder(tmp_path / "b"))["history"]} == {-1}


def test_mode_off_does_not_import_wandb(tmp_path: Path) -> None:
    code = """
        t = tracker(run_dir, mode=resolve_mode("off"))
        t.log(train(1)); t.finish(RESULT)
        assert resolve_mode("auto") == "offline"
        print([name for name in ("wandb", "torch") if name in sys.modules])
        """
    done = python(code, tmp_path / "run")
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_broken_wandb_stops_nothing(
    installed: bool, tmp_path: Path, monkeypatch: MonkeyPatch, capfd: Captured
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if installed:
        failing = MagicMock(side_effect=RuntimeError(f"no\n space left, {KEY}"))
        monkeypatch.setattr(pytest.importorskip("wandb"), "init", failing)
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    t = tracker(tmp_path / "run")
    t.log(train(1))
    t.finish(RESULT)
    assert Metrics.read(tmp_path / "run" / "metrics.jsonl") == [train(1)]
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith("training goes on, metrics.jsonl alone has every record.\n")
    assert "RuntimeError: no space left, [WANDB_API_KEY]" in err if installed else "ModuleNotFoundError" in err


def online(monkeypatch: MonkeyPatch, server: int = 0) -> MagicMock:
    """A wandb with a key and an old list of settings; `server` is the step after the server's last row."""
    wandb = MagicMock()
    known = {"model_fields": {"silent": 0, "console": 0}, "base_url": "https://api.wandb.ai"}
    wandb.Settings = type("Settings", (dict,), known)
    wandb.init.return_value.configure_mock(starting_step=server, dir="wandb/run-1/files")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return wandb


def sent(wandb: MagicMock) -> list[dict[str, Any]]:
    calls = wandb.init.return_value.log.call_args_list
    assert all(call.kwargs == {"step": call.args[0]["iter"], "commit": True} for call in calls)
    return [call.args[0] for call in calls]


def test_a_resumed_online_run_sends_what_the_server_lacks(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(train(1), evaluation(1), train(2), train(3), evaluation(3)))
    wandb = online(monkeypatch, server=2)
    t = tracker(tmp_path, mode="online", keep_to=3)
    t.log(train(4))
    assert [row["iter"] for row in sent(wandb)] == [2, 3]  # 4 may still get an evaluation
    assert sent(wandb)[1] == {"iter": 3, "tokens": 30, "train_loss": 2.0, "val_loss": 3.0}
    t.finish(None)
    assert [row["iter"] for row in sent(wandb)] == [2, 3, 4]
    wandb.init.return_value.mark_preempting.assert_called_once_with()
    wandb.init.return_value.finish.assert_called_once_with(exit_code=75)
    call = wandb.init.call_args.kwargs
    assert (call["resume"], call["mode"], call["id"]) == ("allow", "online", wandb_id("norms", tmp_path.name))
    assert call["settings"] == {"silent": True, "console": "off"}


def test_what_fails_online_is_tracked_offline(tmp_path: Path, monkeypatch: MonkeyPatch, capfd: Captured) -> None:
    wandb = online(monkeypatch)
    wandb.init.side_effect = [TimeoutError("no answer"), wandb.init.return_value]
    t = tracker(tmp_path, mode="online")
    t.log(train(1))
    t.finish(RESULT)
    modes = [(call.kwargs["mode"], call.kwargs["resume"]) for call in wandb.init.call_args_list]
    assert modes == [("online", "allow"), ("offline", None)]
    assert len(sent(wandb)) == 1
    wandb.init.return_value.finish.assert_called_once_with(exit_code=0)
    err = capfd.readouterr().err
    assert (err.count("\n"), "this run is tracked offline" in err) == (1, True)


def test_a_failure_while_training_is_told_once(tmp_path: Path, monkeypatch: MonkeyPatch, capfd: Captured) -> None:
    online(monkeypatch).init.return_value.log.side_effect = OSError("disk full")
    t = tracker(tmp_path, mode="online")
    for i in range(5):
        t.log(train(i))
    t.finish(RESULT)
    assert (len(Metrics.read(tmp_path / "metrics.jsonl")), capfd.readouterr().err.count("disk full")) == (5, 1)


@pytest.fixture
def keyed(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")


def test_without_a_key_nobody_is_called(capfd: Captured) -> None:
    connect = MagicMock()
    assert [resolve_mode(mode, connect=connect) for mode in ("auto", "offline", "off")] == ["offline", "offline", "off"]
    assert capfd.readouterr() == ("", "")
    assert resolve_mode("online", connect=connect) == "offline"
    assert capfd.readouterr().err.count("no API key") == 1
    connect.assert_not_called()


@pytest.mark.usefixtures("keyed")
@pytest.mark.parametrize("wanted", ["auto", "online"])
def test_with_a_key_the_server_decides(wanted: str, monkeypatch: MonkeyPatch, capfd: Captured) -> None:
    connect = MagicMock()
    assert resolve_mode(wanted, connect=connect) == "online"
    connect.assert_called_once_with(("wandb.example", 8080), timeout=3.0)
    assert capfd.readouterr() == ("", "")
    connect.side_effect = ConnectionRefusedError
    assert resolve_mode(wanted, connect=connect, timeout_s=60) == "offline"  # at once, not after a minute
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), KEY in err) == ("", 1, False)
    assert "wandb.example:8080 did not answer" in err
    for word, mode in (("offline", "offline"), ("disabled", "off")):
        monkeypatch.setenv("WANDB_MODE", word)
        assert resolve_mode("auto", connect=connect) == mode
    assert connect.call_count == 2


@pytest.mark.usefixtures("keyed")
def test_a_slow_name_server_costs_no_more_than_the_timeout() -> None:
    released = threading.Event()

    def connect(*_: Any, **__: Any) -> Any:
        released.wait(10)
        return MagicMock()  # it answers in the end

    assert resolve_mode("auto", timeout_s=0.05, connect=connect) == "offline"
    released.set()


def test_a_key_may_be_in_netrc_for_that_server_only(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine wandb.example\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    connect = MagicMock()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert resolve_mode("auto", connect=connect) == "offline"
    connect.assert_not_called()
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example\n")
    assert resolve_mode("auto", connect=connect) == "online"
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert resolve_mode("auto", connect=connect) == "online"
    assert [call.args[0] for call in connect.call_args_list] == [("wandb.example", 443), ("proxy.example", 3128)]


def test_columns_are_the_shortest_names_that_differ() -> None:
    expected = {"model.norm": "norm", "slices.k.lr_scale": "k_lr_scale", "slices.v.lr_scale": "v_lr_scale"}
    expected |= {"runner.model": "runner_model", "train.seed": "train_seed", "lr": "lr", "a.lr": "a_lr"}
    expected["name"] = "swept_name"
    assert columns(expected, {"model", "name", "seed"}) == expected
    assert columns(["a_b", "x.a.b", "y.a_b"], ()) == {"a_b": "a_b", "x.a.b": "b", "y.a_b": "y_a_b"}


def test_every_run_of_a_sweep_has_its_columns(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A key that another run changes has a column here too, with the value of the whole configuration."""
    wandb = online(monkeypatch)
    linear = {"variant": "pkl", "scale": 0.5}
    swept = ["model.norm", "model.norm.eps", "train.max_tokens", "data.cell", "data.seed"]
    changed = {"model.linear": linear, "model.sizes": [1, 2], "slices.v.init": {"variant": "normal", "std": 0.01}}
    tracker(tmp_path, mode="online", swept=swept, changed=changed).finish(RESULT)
    config = wandb.init.call_args.kwargs["config"]
    assert {key: config.pop(key) for key in FULL} == FULL
    expected = {"norm": "rmsnorm", "eps": 1e-6, "linear": "pkl(scale=0.5)", "max_tokens": None, "sizes": "[1,2]"}
    expected |= {"data_cell": None, "data_seed": None}
    assert config == expected | {"init": "normal(std=0.01)", "cell": "norm-rmsnorm", "seed": 3}


def test_names_keep_to_wandbs_limits(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    wandb = online(monkeypatch)
    long = "x" * 300
    for end in ("1", "2"):
        changed = {"model.norm": long + end, "data.set": "y"}
        given: dict[str, Any] = {"sweep": long + end, "run_id": long + end, "cell": long + end, "changed": changed}
        tracker(tmp_path / end, mode="online", **given).finish(RESULT)
    one, two = (call.kwargs for call in wandb.init.call_args_list)
    for field, limit in [("group", 128), ("name", 128), ("id", 128), ("job_type", 64)]:
        assert one[field] != two[field]
        assert max(len(one[field]), len(two[field])) <= limit
    assert max(map(len, one["tags"] + two["tags"])) == 64
    assert one["tags"][0] != two["tags"][0]
    assert one["tags"][1:] == ["set=y", "night"]


def test_an_id_is_stable_and_belongs_to_its_sweep() -> None:
    ids = [wandb_id(sweep, run) for sweep in ("a", "b") for run in ("lr=0.1,h.*[k]", "lr=0.1;h.*[k]", "é/x")] * 2
    assert len(set(ids)) == 6
    assert all(re.fullmatch("[A-Za-z0-9_-]+", one) for one in ids)


def test_labels() -> None:
    values = {"rmsnorm": "rmsnorm", "off": None, "true": True, "3": 3, "1e-05": 1e-5, "[1,off]": [1, None]}
    assert {word: label(value) for word, value in values.items()} == {word: word for word in values}
