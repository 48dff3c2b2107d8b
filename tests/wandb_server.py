"""A server that speaks as much of W&B's protocol as its client needs to begin, resume and end a run. It keeps what it is sent."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


@dataclass
class Uploaded:
    """A run as the server has it."""

    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    begun: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """History without what the client adds."""
        return [{k: v for k, v in row.items() if k not in ("_runtime", "_timestamp", "_step")} for row in self.history]


class Server:
    """Runs by id. `raw` is all that was sent, to look for what must not be in it."""

    def __init__(self) -> None:
        self.runs: dict[str, Uploaded] = {}
        self.raw: list[bytes] = []
        self.refuses = False
        self.lock = threading.Lock()
        self.http = _Quiet(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def asked(self, given: dict[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL question."""
        name, words = given.get("operationName"), given.get("variables") or {}
        if name == "RunResumeStatus":
            return {"model": {**_project(), "bucket": self._resumed(words["name"])}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(words["name"], Uploaded())
            run.begun += bool(words.get("displayName"))
            run.about |= {key: value for key, value in words.items() if value is not None}
            run.config |= {key: one.get("value") for key, one in json.loads(words.get("config") or "{}").items()}
            bucket = {
                "id": words["name"],
                "name": words["name"],
                "displayName": words.get("displayName"),
                "sweepName": None,
            }
            project = {"project": _project(), "historyLineCount": len(run.history), "config": "{}", "description": None}
            return {"upsertBucket": {"bucket": {**bucket, **project}, "inserted": run.begun < 2}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/put/{words['run']}/{f}"} for f in words["files"]]
            return {"createRunFiles": {"runID": words["run"], "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            teams: dict[str, Any] = {"edges": []}
            return {"viewer": {"id": "u", "entity": "somebody", "username": "somebody", "flags": "{}", "teams": teams}}
        if (
            name == "CreateArtifact"
        ):  # a table's; it is taken for one that is known already, so its files are not asked for
            made = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"createArtifact": {"artifact": made}}
        return {"project": None}

    def _resumed(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        tail = [json.dumps(row) for row in run.history[-1:]]
        lines = {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}
        config = json.dumps({key: {"value": value} for key, value in run.config.items()})
        more = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": json.dumps(run.summary)}
        about = {"displayName": run.about.get("displayName"), "tags": run.about.get("tags") or [], "notes": None}
        return {"id": name, "name": name, "config": config, "wandbConfig": '{"t": 1}', **lines, **more, **about}

    def streamed(self, name: str, given: dict[str, Any]) -> None:
        """What a run sends on its way."""
        run = self.runs.setdefault(name, Uploaded())
        for file, part in (given.get("files") or {}).items():
            if file == HISTORY:
                del run.history[part["offset"] :]
                run.history += [json.loads(line) for line in part["content"]]
            elif file == SUMMARY:
                run.summary = json.loads(part["content"][-1])
        if given.get("complete"):
            run.exit_code = given.get("exitcode")


class _Quiet(ThreadingHTTPServer):
    """A client that ends closes its connections as it likes."""

    def handle_error(self, request: Any, client_address: Any) -> None: ...


def _project() -> dict[str, Any]:
    return {"id": "p", "name": "p", "entity": {"id": "e", "name": "somebody"}}


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers for `server`."""

        protocol_version = "HTTP/1.1"

        def log_message(self, *given: Any) -> None: ...

        def body(self) -> bytes:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            sent = gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent
            server.raw.append(sent)
            return sent

        def answer(self, content: dict[str, Any], code: int = 200) -> None:
            told = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def do_GET(self) -> None:
            self.answer({})

        def do_PUT(self) -> None:
            _, _, run, file = self.path.split("/", 3)
            with server.lock:
                server.runs[run].files[file] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            try:
                sent = json.loads(self.body())
            except ValueError:  # of no interest here
                self.answer({})
                return
            if server.refuses:
                self.answer({"errors": [{"message": "not today"}]}, 403)
                return
            with server.lock:
                if found := re.search(r"/files/[^/]*/[^/]*/([^/]+)/file_stream$", self.path):
                    server.streamed(found[1], sent)
                    made: dict[str, Any] = {}
                else:
                    made = {"data": server.asked(sent)}
            self.answer(made)

    return Handler


@contextmanager
def serving() -> Iterator[Server]:
    """A server on this machine."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()
