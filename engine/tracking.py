"""Tracking of one run: metrics.jsonl always, and Weights & Biases (wandb) fed from it.

metrics.jsonl is the truth: one JSON object a line, handed to the operating system before the next is made, cut back on
resume to what the checkpoint knows. wandb is a view of it: one row for an iteration, fed again from the file on resume.
Nothing that happens in wandb can stop training.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import importlib
import importlib.util
import netrc
import os
import re
import shutil
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from core.secrets import scrub
from engine.metrics import Metrics as Metrics
from engine.metrics import iteration, plain_record

WORD, NAME = 64, 128  # characters: the server's limits on tags and job types, on names and groups
STOPPED = 75  # exit code of a run that will continue
NO_KEY = "there is no API key ('wandb login')"
CLOUD = "api.wandb.ai"  # the cloud's keys are filed under this host, whatever address wandb's version prefers
FINISH = 60.0  # seconds that the end of a run waits for the rest of its upload
SETTINGS = {
    "silent": True,
    "quiet": True,
    "console": "off",
    "disable_git": True,  # a remote's URL may hold a token; commit and versions are in the result
    "disable_code": True,
    "x_save_requirements": False,
    "symlink": False,
    "init_timeout": 20.0,  # seconds until an online run must be registered
    "finish_timeout": FINISH,
    "x_transaction_log_flush_interval": 1,  # seconds; a killed run loses what is younger
}


def _flat(record: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """A record's values, nested ones under names with slashes, by which panels are grouped."""
    for key, value in record.items():
        yield from ((f"{key}/{k}", v) for k, v in _flat(value)) if isinstance(value, Mapping) else ((key, value),)


def warn(sentence: str) -> None:
    """One line on stderr, without the key that an error may quote."""
    print(f"tracking: {scrub(' '.join(sentence.split()))}", file=sys.stderr, flush=True)


def resolve_mode(wanted: str, *, timeout_s: float = 3.0, connect: Callable[..., Any] = socket.create_connection) -> str:
    """'online', 'offline' or 'off' for a configured mode ('auto' as well), in at most about `timeout_s` seconds.

    'auto' is online where a key for wandb is configured and its server can be reached; WANDB_MODE may say offline or
    disabled. What cannot be had becomes offline, with a line on stderr unless 'auto' merely found no key.
    """
    assert wanted in ("auto", "online", "offline", "off"), wanted
    if wanted == "auto":
        words = {"disabled": "off", "offline": "offline", "dryrun": "offline"}
        wanted = words.get(os.environ.get("WANDB_MODE", ""), "auto")
    if wanted != "off" and not installed():
        if wanted != "auto":
            warn(f"tracking.wandb.mode is {wanted}, but wandb is not installed: runs have metrics.jsonl alone.")
        return "off"
    if wanted in ("off", "offline"):
        return wanted
    why = unreachable(timeout_s=timeout_s, connect=connect)
    if why is None:
        return "online"
    if why == NO_KEY and wanted == "online":
        warn(f"tracking.wandb.mode is online, but {why}: runs are tracked offline.")
    elif why != NO_KEY:
        warn(f"{why}: runs are tracked offline; 'python -m lab sync' uploads them later.")
    return "offline"


def installed() -> bool:
    """Whether wandb is there. A folder of runs named wandb is a module too, without an origin."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None


def unreachable(*, timeout_s: float = 3.0, connect: Callable[..., Any] = socket.create_connection) -> str | None:
    """Why nothing can be sent to wandb's server now, in words; None where it can. Takes at most about `timeout_s` seconds."""
    server = _server_with_key()
    if server is None:
        return NO_KEY
    if _answers(server, timeout_s, connect):
        return None
    return f"{urlsplit(server).netloc} did not answer in {timeout_s:g} s"


def _server_with_key() -> str | None:
    """The URL of wandb's server if a key for it is configured. Imports wandb only where some key may be the one."""
    settings = _wandb_settings()
    configured = os.environ.get("WANDB_BASE_URL") or settings.get("base_url")
    keys = (os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_IDENTITY_TOKEN_FILE"), settings.get("api_key"))
    given = any(keys)
    filed = _netrc_hosts()
    if not (given or filed):
        return None
    try:
        server = str(configured or importlib.import_module("wandb").Settings().base_url)
    except Exception as error:  # a broken installation is no reason to stop a sweep
        warn(f"wandb could not be asked for its server ({type(error).__name__}: {error}).")
        return None
    hosts = {urlsplit(server).netloc} | (set() if configured else {CLOUD})
    return server if given or filed & hosts else None


def _wandb_settings() -> dict[str, str]:
    """What 'wandb login' and 'wandb init' left in wandb's settings files."""
    parser = configparser.ConfigParser(interpolation=None)
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    with contextlib.suppress(configparser.Error, OSError, ValueError):
        parser.read([Path(folder).expanduser() / "settings", Path("wandb/settings")], encoding="utf-8")
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_hosts() -> set[str]:
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        with contextlib.suppress(netrc.NetrcParseError, OSError, ValueError):
            return set(netrc.netrc(str(path.expanduser())).hosts)
    return set()


def _answers(server: str, timeout_s: float, connect: Callable[..., Any]) -> bool:
    """Whether the server, or the proxy in front of it, takes a TCP connection within `timeout_s` seconds."""
    url = urlsplit(server)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    answered: list[bool] = []

    def dial() -> None:
        with contextlib.suppress(OSError, ValueError):
            address = (url.hostname, url.port or (80 if url.scheme == "http" else 443))
            connect(address, timeout=timeout_s).close()
            answered.append(True)

    # In a thread, because the time that a name server takes is not covered by the timeout of a connection.
    dialling = threading.Thread(target=dial, daemon=True)
    dialling.start()
    dialling.join(timeout_s)
    return bool(answered)


def fit(text: str, limit: int) -> str:
    """The text cut to `limit` characters, still different where the whole texts were."""
    return text if len(text) <= limit else f"{text[: limit - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def wandb_id(sweep: str, run_id: str) -> str:
    """The same for a run at each attempt, different for every run of a project; letters, digits, '-' and '_' only."""
    digest = hashlib.sha256(f"{sweep}\0{run_id}".encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run_id)[:80]}-{digest}"


def columns(swept: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """A short top-level name for each swept key: its shortest ending that no other swept key has, '_' for '.'.

    Names in `taken` (the configuration's own top-level keys) are avoided.
    """
    keys = list(dict.fromkeys(swept))
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            alone = all(other == key or other.split(".")[-n:] != parts[-n:] for other in keys)
            name = "_".join(parts[-n:])
            if alone and name not in taken and name not in names.values():
                break
        while name in taken or name in names.values():
            name = f"swept_{name}"
        names[key] = name
    return names


def label(value: Any) -> str:
    """A setting's value in a word: `rmsnorm`, `pkl(scale=0.5)`, `0.001`; null is off."""
    if isinstance(value, Mapping):
        inner = ",".join(f"{key}={label(option)}" for key, option in value.items() if key != "variant")
        return f"{value.get('variant', '')}({inner})" if inner or "variant" not in value else str(value["variant"])
    if isinstance(value, (list, tuple)):
        return f"[{','.join(label(inner) for inner in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _tags(changed: Mapping[str, Any], names: Mapping[str, str], extra: Iterable[str]) -> list[str]:
    tags = [f"{names[key]}={label(value)}" for key, value in changed.items() if key in names]
    return list(dict.fromkeys(fit(tag, WORD) for tag in [*tags, *map(str, extra)] if tag))


def _column_value(key: str, changed: Mapping[str, Any], full_config: Mapping[str, Any]) -> Any:
    """The run's value of a swept key, changed in this run or not. What is no number or word becomes its label."""
    value: Any = changed.get(key)
    if key not in changed:
        value = full_config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):  # the full configuration lists every default of a variant: its name says enough
            value = value.get("variant", value)
    return label(value) if isinstance(value, (Mapping, list, tuple)) else value


def described(
    config: Any,
    sweep: str,
    run_id: str,
    cell: str,
    seed: int,
    changed: Mapping[str, Any],
    full_config: Mapping[str, Any],
    swept: Iterable[str] = (),
) -> dict[str, Any]:
    """What wandb is told of a run before it begins. `config`: the configuration's `tracking` node; the rest as for `Tracker`."""
    keys = [key for key in dict.fromkeys([*swept, *changed]) if key != "train.seed"]
    names = columns(keys, {*full_config, "cell", "seed"})
    values = {names[key]: _column_value(key, changed, full_config) for key in keys}
    return {
        "project": config.wandb.project,
        "entity": config.wandb.entity,
        "group": fit(sweep, NAME),
        "job_type": fit(cell, WORD),
        "id": wandb_id(sweep, run_id),
        "name": fit(run_id, NAME),
        "tags": _tags(changed, names, config.wandb.tags),
        "config": plain_record({**full_config, **values, "cell": cell, "seed": seed}),
    }


def start(folder: Path, about: Mapping[str, Any], mode: str) -> Any:
    """A run in wandb, 'online' or 'offline', its files below `folder`: the one place that begins any. Raises what wandb raises."""
    if mode == "online" and _server_with_key() is None:
        raise ValueError("no API key is configured")  # wandb would ask for one at a terminal, and wait
    wandb = importlib.import_module("wandb")
    known = wandb.Settings.model_fields  # names of settings come and go; what a version does not know is left out
    wanted = {**SETTINGS, "x_disable_stats": mode != "online"}
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
    wandb.setup(settings=wandb.Settings(silent=True, quiet=True))  # a login's messages obey these, not the run's
    return wandb.init(
        **about,
        dir=str(folder.resolve()),
        mode=mode,
        resume="allow" if mode == "online" else None,
        reinit="create_new",  # a pack of runs shares a process
        save_code=False,
        settings=settings,
    )


def forget(folder: Path, run: Any) -> None:
    """Removes what earlier attempts at a run left offline below `folder`: this one has its whole history."""
    current = Path(run.dir).parent
    for old in (folder / "wandb").glob("offline-run-*"):
        if old.name != current.name:
            shutil.rmtree(old, ignore_errors=True)


class Board:
    """One run in wandb: a row for an iteration, at wandb's step `iter`. Every method may raise what wandb raises.

    A row is sent when the next iteration's first record arrives: all records of an iteration share it, and what a
    server has of an iteration is all of it. `sent` counts rows.
    """

    def __init__(self, run_dir: Path, about: Mapping[str, Any], history: Iterable[dict[str, Any]], mode: str) -> None:
        self._run: Any = start(run_dir, about, mode)
        for name in ("iter", "*", "tokens"):
            self._run.define_metric(name, step_metric=None if name == "iter" else "iter")
        self._run.define_metric("val_loss", step_metric="iter", summary="min")
        self._first = int(self._run.starting_step)  # after the server's last row (`step` is 0 until the first of ours)
        self._step, self.sent = -1, 0
        self._row: dict[str, Any] = {}
        for record in history:
            self.log(record)
        forget(run_dir, self._run)

    def log(self, record: Mapping[str, Any]) -> None:
        step = iteration(record, self._step)
        if step > self._step:
            self._send()
            self._step = step
        if step == self._step:
            self._row |= {
                key: value for key, value in _flat(plain_record(record)) if key != "kind" and value is not None
            }

    def _send(self) -> None:
        if self._row and self._step >= self._first:
            self._run.log(self._row, step=self._step, commit=True)
            self.sent += 1
        self._row = {}

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self._send()  # before the summary, which wandb overwrites with each row
        if result is None:
            self._run.mark_preempting()
            self._run.finish(exit_code=STOPPED)
            return
        summary = {key: value for key, value in plain_record(result).items() if value is not None}
        if "val_loss" in summary:
            summary["final_val_loss"] = summary.pop("val_loss")
        if "best_val_loss" in summary:  # wandb's own minimum knows no row from before a resume
            summary["val_loss"] = {"min": summary["best_val_loss"]}
        self._run.summary.update(summary)
        self._run.finish(exit_code=1 if result.get("status") == "failed" else 0)


class Tracker:
    """What training reports to: metrics.jsonl first, then wandb if `mode` (from `resolve_mode`) is online or offline.

    `config` is the configuration's `tracking` node. `changed` is what differs in this run, by dotted key; `swept` lists
    all keys that differ anywhere in the sweep, so that every run has the same columns. `keep_to`: see `Metrics`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Any,
        *,
        mode: str,
        sweep: str,
        run_id: str,
        cell: str,
        seed: int,
        changed: Mapping[str, Any],
        full_config: Mapping[str, Any],
        keep_to: int | None = None,
        swept: Iterable[str] = (),
    ) -> None:
        assert mode in ("online", "offline", "off"), f"{mode!r} is no resolved mode"
        self.metrics = Metrics(run_dir / "metrics.jsonl", keep_to=keep_to)
        self._board: Board | None = None
        about = described(config, sweep, run_id, cell, seed, changed, full_config, swept)
        begin = partial(self._safely, Board, run_dir, about, self.metrics.kept)
        if mode == "online":
            self._board = begin("online", so="this run is tracked offline")
        if mode != "off" and self._board is None:
            self._board = begin("offline")

    def _safely(self, act: Callable[..., Any], *given: Any, so: str = "metrics.jsonl alone has every record") -> Any:
        """Do something in wandb. No failure of it may stop training: wandb is given up, and a line says so."""
        try:
            return act(*given)
        except Exception as error:  # whatever it is
            self._board = None
            warn(f"wandb failed ({type(error).__name__}: {error}); training goes on, {so}.")
            return None

    def log(self, record: Mapping[str, Any]) -> None:
        """A record with its `kind` and `iter`: to metrics.jsonl (an OSError there is raised), then to wandb."""
        if self.metrics.log(record) and self._board:
            self._safely(self._board.log, record)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The run has ended with result.json's fields; None: it stops here and another process will continue it.

        Sets wandb's summary and exit code and waits for its uploads, a bounded time.
        """
        self.metrics.close()
        if self._board:
            self._safely(self._board.finish, result)
        self._board = None
