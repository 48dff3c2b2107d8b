"""Processes that serve this one over a socket: plain data and open files go both ways, and one whose socket is closed ends itself.

A helper is a Python of its own, or a fork of this process, which has then imported what it needs. What begins early, beside the
imports of the runner, is kept here until it is asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any, NoReturn

from core.secrets import scrub
from lab.process import REPOSITORY, Child, begin, leave

HEADER = struct.Struct("!II")  # bytes of the message, and how many open files come with it
FILES = 200  # that one call passes; the system allows 253
Message = tuple[dict[str, Any], list[int]]


# Messages -------------------------------------------------------------------------------------------------------------------


def send(channel: socket.socket, content: dict[str, Any], files: Sequence[int] = ()) -> None:
    """Sends plain data and open files. Raises OSError where nobody is there any more."""
    told = json.dumps(content).encode()
    channel.sendall(HEADER.pack(len(told), len(files)) + told)
    for i in range(0, len(files), FILES):
        socket.send_fds(channel, [b"f"], files[i : i + FILES])


def receive(channel: socket.socket) -> Message | None:
    """The next message, or None where the other end is closed."""
    try:
        length, count = HEADER.unpack(_exactly(channel, HEADER.size))
        content = json.loads(_exactly(channel, length))
        files: list[int] = []
        while len(files) < count:
            got, some, _, _ = socket.recv_fds(channel, 1, min(FILES, count - len(files)))
            if not got:
                raise EOFError
            files += some
    except (EOFError, OSError):
        return None
    return content, files


def _exactly(channel: socket.socket, length: int) -> bytes:
    made = b""
    while len(made) < length:
        some = channel.recv(length - len(made))
        if not some:
            raise EOFError
        made += some
    return made


def has_word(channel: socket.socket, seconds: float = 0.0) -> bool:
    """Whether there is something to be received, or the other end is closed."""
    return bool(select.select([channel], [], [], seconds)[0])


# Processes ------------------------------------------------------------------------------------------------------------------


class Helper:
    """A process that serves this one over `channel`.

    module: what it runs, which calls `serve_here`. serve: the same as a function, for a fork of this process where it has one
    thread; None: a Python of its own.
    """

    def __init__(self, module: str, serve: Callable[[socket.socket], None] | None = None) -> None:
        path = filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))
        self.environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)}
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the process
        self.channel, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            for file in (self.said, self.channel):
                stack.callback(file.close)
            with theirs:
                may = serve is not None and threading.active_count() == 1 and hasattr(os, "fork")
                self.process: Any = self._fork(serve, theirs) if serve and may else self._launch(module, theirs)
            stack.pop_all()  # it has begun

    def _launch(self, module: str, theirs: socket.socket) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self.environment}
        begin(environment)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            start_new_session=True,  # Ctrl-C reaches the runner alone
        )

    def _fork(self, serve: Callable[[socket.socket], None], theirs: socket.socket) -> Child:
        sys.stdout.flush()
        sys.stderr.flush()
        number = os.fork()
        if number == 0:
            try:
                os.setsid()
                self._settle(theirs.fileno())
                _serve(serve, theirs)
            except BaseException:  # a fork must not go on as the process that it was forked from
                traceback.print_exc()
            os._exit(1)
        return Child(number)

    def _settle(self, kept: int) -> None:
        """What a new process would have: streams and environment of its own, and no file but the socket."""
        null = os.open(os.devnull, os.O_RDWR)
        for there, here in ((0, null), (1, null), (2, self.said.fileno())):
            os.dup2(here, there)
        os.closerange(3, kept)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = io.TextIOWrapper(
                io.FileIO(number, "w", closefd=False), write_through=True, errors="backslashreplace"
            )
            setattr(sys, name, stream)
        os.environ.update(self.environment)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    @property
    def last_words(self) -> str:
        """The last line that the process has written, such as the error that ended it."""
        if self.said.closed:
            return ""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").split("\n")
        return next((scrub(line.strip()) for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Lets it end, and waits for that."""
        self.channel.close()
        self.process.wait()
        self.said.close()

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.close()


def serve_here(serve: Callable[[socket.socket], None]) -> NoReturn:
    """The main function of a helper's module: the socket's number is its only word."""
    begin()
    _serve(serve, socket.socket(fileno=int(sys.argv[1])))


def _serve(serve: Callable[[socket.socket], None], channel: socket.socket) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        serve(channel)
    leave(0)


# While the runner itself begins ---------------------------------------------------------------------------------------------


_early: dict[str, Helper] = {}


def start_early(module: str, serve: Callable[[socket.socket], None] | None = None) -> None:
    """Starts a helper now, beside the caller's own imports, for a runner that is likely to need it."""
    _early[module] = Helper(module, serve)


def begun(module: str) -> Helper:
    """The helper that was started early, or a new one."""
    return _early.pop(module, None) or Helper(module)


def discard(module: str | None = None) -> None:
    """Ends what was started early and not needed."""
    for name in [name for name in _early if module in (None, name)]:
        _early.pop(name).kill()
