"""Secrets in the environment, and texts and files without them.

A variable is taken for one where a word of its name says so. Its value, also as URLs and JSON write it, is replaced by its name
wherever something is about to be printed or saved.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

NAMES = re.compile(
    r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIAL|AUTH|PAT|COOKIE)S?(?:_|$)", re.IGNORECASE
)
SHORTEST = 8  # characters; a shorter value stands in ordinary words too
IN_URL = re.compile(r"(?<=://)[^/\s@\"'\\]+(?=@)")  # name and password, or a token
CREDENTIALS = "[credentials]"


def secrets(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The name of the variable by each of its forms, longest first. A path that exists is no secret; what is in the file may be."""
    found: dict[str, str] = {}
    for name, value in environment.items():
        if NAMES.search(name) and not (os.path.isabs(value) and os.path.exists(value)):
            for form in (value, *(value.splitlines() if "\n" in value else ())):
                if len(form.strip()) >= SHORTEST:
                    written = (
                        form,
                        form.strip(),
                        quote(form),
                        quote(form, safe=""),
                        json.dumps(form)[1:-1],
                        repr(form)[1:-1],
                    )
                    found |= dict.fromkeys(written, name)
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def scrub(text: str) -> str:
    """The text with the names of secrets in the place of their values, and without what URLs say before the host."""
    for value, name in secrets().items():
        if value in text:
            text = text.replace(value, f"[{name}]")
    return IN_URL.sub(CREDENTIALS, text) if "://" in text else text


def exposed(text: str, known: Mapping[str, str]) -> str:
    """What a text gives away, in words: one of the `known` secrets, or what a URL says before the host. Empty for nothing."""
    found = (f"the value of the environment variable {name}" for value, name in known.items() if value in text)
    return next(found, "") or ("a name or a password in a URL" if "://" in text and IN_URL.search(text) else "")


def scrub_file(path: Path) -> None:
    """Overwrites the values of secrets in a file, which keeps its length, so that another process may go on writing at its end.

    For what is written past Python: by libraries in C, by programs that a trial starts. Until then, it is in the file.
    """
    known = secrets()
    gone = contextlib.suppress(OSError, ValueError)  # or empty
    with gone, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for value, name in known.items():
            wanted, at = value.encode(), -1
            while (at := content.find(wanted, at + 1)) >= 0:
                content[at : at + len(wanted)] = _as_long(f"[{name}]", len(wanted))
        for found in list(re.finditer(IN_URL.pattern.encode(), content)):
            content[slice(*found.span())] = _as_long(CREDENTIALS, len(found.group()))


def _as_long(text: str, length: int) -> bytes:
    return text.encode().ljust(length, b"*")[:length]
