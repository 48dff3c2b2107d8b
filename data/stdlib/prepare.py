"""The source code of Python's own standard library, some 10 MB of real text that is on every machine.

    python data/stdlib/prepare.py [--tokenizer byte|char|hf:FOLDER] [--out ROOT]

Each file follows a comment line with its path. With a checkpoint's tokenizer, each ends with its token for the end of a
document. Whole files are held out for validation, about one in ten, chosen by a hash of their path: so the choice stays
from one version of Python to the next, and is not one corner of the library.
Left out are tests, packages installed by others, and what a program wrote: the codec tables under `encodings` and the
text of `pydoc_data`, which is the corpus `pydoc`. For `char` also files with other characters than printable ASCII,
newline and tab, so that the vocabulary stays below a hundred. The content depends on the version of Python: its hash,
not its name, says what was trained on.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.preparing import arguments, run, tokenizer_for, write_texts

TOKENIZERS = ("byte", "char", "hf:FOLDER")
SELF_PREPARING = True

LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
PLAIN = {chr(code) for code in range(32, 127)} | {"\n", "\t"}
HELD_OUT = 10  # one file in so many


def sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Pairs of a relative path, with forward slashes, and its text, sorted. A file that is not UTF-8 is left out."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name in sorted(paths):
        parts = name.removesuffix(".py").split("/")
        # Folders like this also hold what the build or the distribution added, which differs between machines.
        if parts[0] not in sys.stdlib_module_names or LEFT_OUT & set(parts[:-1]) or not paths[name].is_file():
            continue
        try:
            yield name, paths[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def main() -> None:
    args = arguments(__doc__, TOKENIZERS).parse_args()
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [(name, text) for name, text in sources(folder) if args.tokenizer != "char" or PLAIN.issuperset(text)]
    if not files:
        raise ValueError(
            f"this Python ({sys.executable}) comes without the source of its standard library: no .py files are in "
            f"{folder}. Use another Python, or another corpus, such as shakespeare_char."
        )
    splits: tuple[list[str], list[str]] = ([], [])
    for name, text in files:
        splits[is_held_out(name)].append(f"# {name}\n{text}\n")
    only = " of plain ASCII" if args.tokenizer == "char" else ""
    source = f"{len(files)} source files{only} of the standard library of Python {platform.python_version()}."
    tokenizer = tokenizer_for(args.tokenizer, (part for parts in splits for part in parts))
    write_texts(args.out, "stdlib", tokenizer, *splits, source)


if __name__ == "__main__":
    run(main)
