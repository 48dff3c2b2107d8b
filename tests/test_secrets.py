"""No secret of the environment reaches a run folder, a log, the database, the report or the terminal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from conftest import Desk
from runs import ROOT

from core.secrets import exposed, scrub, scrub_file, secrets
from core.yaml_files import ConfigError
from engine.metrics import Metrics
from lab.store import Store

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_QqUnmistakableHubTokenQq",
    "AWS_SECRET_ACCESS_KEY": "wJalr/Unmistakable+Cloud/bPxRfi",
    "OPENAI_API_KEY": "sk-unmistakable-open-key",
    "GITHUB_TOKEN": "ghp_UnmistakableForgeToken",
    "MY_PASSWORD": 'un"mistakable\\pass word',
    "TLS_PRIVATE_KEY": "-----BEGIN-----\nUnmistakableFirstLine\nUnmistakableSecondLine\n-----END-----",
}
WRITTEN = [
    *(value.encode() for value in SECRETS.values()),
    b"UnmistakableFirstLine",
    b"UnmistakableSecondLine",
    b"Unmistakable%2BCloud",
]
LEAKS = '''
"""A schedule whose runs give secrets away, each in its own way."""
import json, logging, os, subprocess, sys, urllib.parse, warnings
from dataclasses import dataclass
from core.options import opt
from variations.schedule import SCHEDULES
from variations.schedule.shapes import Cosine, Decay

@dataclass(frozen=True)
class LeakOptions(Decay):
    """Options of leaks."""
    way: str = opt("no", "How.")

class Leaks(Cosine):
    """Formula: cosine."""
    Options = LeakOptions

    def multiplier(self, i):
        token, way = os.environ["HF_TOKEN"], self.options.way
        everything = [os.environ[name] for name in NAMES]
        if i != 2 or way == "no":
            pass
        elif way == "raises":
            raise RuntimeError(token)
        elif way == "raises_all":
            try:
                raise ValueError(f"{everything}")
            except ValueError as error:
                raise RuntimeError(json.dumps(everything)) from error
        elif way == "prints":
            print("printed", *everything, everything, json.dumps(everything), dict(os.environ))
            print("printed", *everything, file=sys.stderr)
        elif way == "split":
            sys.stdout.write(token[:9]); sys.stdout.write(token[9:] + "\\n")
        elif way == "logs":
            logging.getLogger("leaks").warning("logged %s", everything)
            warnings.warn(f"warned {everything}")
        elif way == "urls":
            print(f"cloning https://{token}@host/x.git and http://user:hunter2@host/x, "
                  + urllib.parse.quote(os.environ["AWS_SECRET_ACCESS_KEY"], safe=""))
        elif way == "beneath":
            os.write(1, f"beneath {everything} {token} http://user:hunter2@host\\n".encode())
            subprocess.run(["sh", "-c", 'echo "a program: $HF_TOKEN $GITHUB_TOKEN"; echo "$MY_PASSWORD" >&2'])
        elif way == "dies":
            os.write(2, f"last words {token}\\n".encode())
            os._exit(3)
        return super().multiplier(i)

SCHEDULES["leaks"] = Leaks
'''.replace("NAMES", repr(list(SECRETS)))
WAYS = ("no", "raises", "raises_all", "prints", "split", "logs", "urls", "beneath", "dies")


def sweep(home: Path, data: Path, ways: tuple[str, ...], **changes: object) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    (home / "leaks.py").write_text(LEAKS)
    made = runs.tree(
        data, name="s", plugins=["leaks.py"], runner__root=str(home / "runs"), schedule__variant="leaks", **changes
    )
    made["train"] |= {"max_iters": 4, "eval_interval": 2}
    made["sweep"] = {"grid": {"schedule.way": list(ways)}}
    return runs.write(home / "s.yaml", made)


def started(home: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    """A program of ours in a process of its own, in a git repository whose remote holds a password, with secrets around it."""
    git = ["git", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], cwd=home, check=True)
    subprocess.run(
        [*git, "config", "remote.origin.url", f"https://me:{SECRETS['GITHUB_TOKEN']}@host/x.git"], cwd=home, check=True
    )
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(home)}
    return subprocess.run([sys.executable, *words], cwd=home, env=environment, capture_output=True)


def found_in(content: bytes) -> list[bytes]:
    return [value for value in [*WRITTEN, b"hunter2"] if value in content]


def leaked(folder: Path) -> dict[str, list[bytes]]:
    """Which files below a folder hold secrets, and which."""
    held = {str(path.relative_to(folder)): found_in(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    return {name: values for name, values in held.items() if values}


@pytest.mark.parametrize("warm", [True, False])
def test_nothing_that_a_sweep_leaves_or_prints_holds_a_secret(warm: bool, data: Path, tmp_path: Path) -> None:
    offline = warm and importlib.util.find_spec("wandb") is not None
    mode = "offline" if offline else "off"
    ways = WAYS if warm else ("no", "raises_all", "prints", "beneath")
    file = sweep(tmp_path, data, ways, tracking={"wandb": {"mode": mode}}, runner__warm=warm, runner__pack="off")
    done = started(tmp_path, str(ROOT / "train.py"), "--config", str(file))
    told = f"{done.stdout.decode()}\n{done.stderr.decode()}"
    assert done.returncode == 1, told  # some raise
    assert not found_in(done.stdout + done.stderr), told
    assert leaked(tmp_path / "runs") == {}
    folders = {way: next((tmp_path / "runs/s").glob(f"way={way}-*")) for way in ways}
    logs = {way: "".join(log.read_text() for log in folder.glob("attempt-*.log")) for way, folder in folders.items()}
    results = {way: json.loads((folder / "result.json").read_text()) for way, folder in folders.items()}
    assert {way for way in ways if results[way]["status"] == "failed"} == {"raises", "raises_all", "dies"} & set(ways)
    # What was said is still there, with names in the place of values.
    assert all(f"[{name}]" in results["raises_all"]["error"] for name in SECRETS)
    assert all(logs["prints"].count(f"[{name}]") >= 5 for name in SECRETS if name != "TLS_PRIVATE_KEY")
    assert "a program: [HF_TOKEN]***" in logs["beneath"] and "[MY_PASSWORD]" in logs["beneath"]
    if warm:
        assert (
            results["raises"]["error"].endswith("RuntimeError: [HF_TOKEN]")
            and "RuntimeError: [HF_TOKEN]" in logs["raises"]
        )
        assert (
            "https://[credentials]@host/x.git and http://[credentials]@host/x, [AWS_SECRET_ACCESS_KEY]" in logs["urls"]
        )
        assert "logged" in logs["logs"] and "warned" in logs["logs"] and "last words [HF_TOKEN]***" in logs["dies"]
    if offline:
        assert list((tmp_path / "runs").rglob("*.wandb")), "and those were looked at too"


def test_a_run_alone_tells_no_secret(data: Path, tmp_path: Path) -> None:
    file = sweep(tmp_path, data, ("raises_all",))
    content = json.loads(file.read_text())
    del content["sweep"]
    runs.write(file, content)
    for way in ("raises_all", "prints"):
        done = started(tmp_path, str(ROOT / "train.py"), "--config", str(file), f"schedule.way={way}")
        assert done.returncode == (way == "raises_all") and not found_in(done.stdout + done.stderr)
        assert b"[HF_TOKEN]" in done.stdout + done.stderr
    assert leaked(tmp_path / "runs") == {}


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(secrets().values()):
        monkeypatch.delenv(name)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("around")
def test_a_configuration_with_a_secret_is_refused(desk: Desk) -> None:
    """It would be saved with every run; and the sentence does not say the value either."""
    token = SECRETS["HF_TOKEN"]
    told = "it holds the value of the environment variable HF_TOKEN, and configurations are saved with every run"
    for text in (
        f"name: x\ndata: {{root: '/data/{token}/x'}}",
        f"sweep:\n  grid: {{model.norm: [{token}]}}",
        f"a: 1\n{token}: 1",
    ):
        assert desk.wrong(text) == [f"{told} (x.yaml:2)."]
    desk.preset("leaky", f"tracking: {{wandb: {{entity: {token}}}}}")
    (sentence,) = desk.wrong("sweep: {cases: {a: {use: presets/leaky}}}")
    assert "HF_TOKEN" in sentence and token not in sentence and "leaky.yaml:2" in sentence
    (sentence,) = desk.wrong("name: x", f"tracking.wandb.project={token}")
    assert sentence == f"tracking.wandb.project=[HF_TOKEN]: {told} (command line)."
    (sentence,) = desk.wrong("data: {root: 'http://user:hunter2@host/x'}")
    assert sentence == "it holds a name or a password in a URL, and configurations are saved with every run (x.yaml:1)."


@pytest.mark.usefixtures("around")
def test_every_form_is_replaced(tmp_path: Path) -> None:
    for name, value in SECRETS.items():
        if "\n" not in value:
            for form in (value, repr(value), json.dumps(value), f"x{value}y", f"{value}{value}"):
                assert name in scrub(form) and not found_in(scrub(form).encode()), form
    assert scrub("https://example.org/a@b and mailto:a@b") == "https://example.org/a@b and mailto:a@b"
    assert str(ConfigError(f"no '{SECRETS['HF_TOKEN']}'")) == "no '[HF_TOKEN]'"
    file = tmp_path / "log"
    content = "".join(f"before {value} after\n" for value in SECRETS.values())
    file.write_text(content)
    scrub_file(file)
    assert not found_in(file.read_bytes()) and len(file.read_text()) == len(content)
    assert "before [HF_TOKEN]***" in file.read_text() and file.read_text().count(" after\n") == len(SECRETS)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.log({"kind": "train", "iter": 1, **SECRETS})
    metrics.close()
    database = Store(tmp_path / "sweep.db")
    database.event("failed", why=str(SECRETS))
    database.close()
    assert leaked(tmp_path) == {}
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["HF_TOKEN"] == "[HF_TOKEN]"
    (tmp_path / "empty").touch()
    for nothing in ("empty", "missing"):
        scrub_file(tmp_path / nothing)


def test_what_is_taken_for_a_secret(tmp_path: Path) -> None:
    def names(**environment: str) -> set[str]:
        return set(secrets(environment).values())

    assert names(A_KEY="x" * 8, b_token="y" * 8, PGPASSWORD="z" * 8, OPENAI_APIKEY="u" * 8, CREDENTIALS="v" * 8) == {
        "A_KEY", "b_token", "PGPASSWORD", "OPENAI_APIKEY", "CREDENTIALS",
    }  # fmt: skip
    assert (
        names(TOKENIZERS_PARALLELISM="forbidden", PWD="/home/somebody", KEYBOARD="x" * 9, PATH="x" * 9, A_KEY="short")
        == set()
    )
    assert names(WANDB_IDENTITY_TOKEN_FILE=str(tmp_path)) == set() and names(AWS_KEY="/not/a/path/here") == {"AWS_KEY"}
    assert exposed("nothing", {}) == "" and exposed("see https://host/x", {}) == ""
