"""The reference of the Python language, half a megabyte of English that comes with every Python, for `help()` to show.

    python data/pydoc/prepare.py [--tokenizer byte|char|hf:FOLDER] [--out ROOT]

The texts are the topics of the module `pydoc_data.topics`, which is read and never run. Each follows a comment line
with its name; with a checkpoint's tokenizer, each ends with its token for the end of a document. Whole topics are held
out for validation, about one in ten, chosen by a hash of their name: so the choice stays from one version of Python to
the next. Some short topics are sections of a longer one too, so that some 2 % of the text held out is also trained on.
For `char` only topics of printable ASCII, newline and tab are kept, a small part: most have typographic quotes. The ids
of `byte` are those of `stdlib`, so that weights carry over; `stdlib` leaves these texts out.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.preparing import arguments, run, tokenizer_for, write_texts

TOKENIZERS = ("byte", "char", "hf:FOLDER")
SELF_PREPARING = True

MODULE = "pydoc_data/topics.py"
PLAIN = {chr(code) for code in range(32, 127)} | {"\n", "\t"}
HELD_OUT = 10  # one topic in so many


def topics(path: Path) -> dict[str, str]:
    """The name and text of each topic, sorted, from the dictionary `topics` that the file assigns; it is not executed.

    Empty where there is no such file. Raises ValueError where the file holds no such dictionary of texts.
    """
    if not path.is_file():
        return {}
    found: object = None
    try:
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets):
                found = ast.literal_eval(node.value)
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise ValueError(f"{path} does not assign texts to 'topics'. Use another Python, or another corpus.")
    return dict(sorted(found.items()))


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def main() -> None:
    args = arguments(__doc__, TOKENIZERS).parse_args()
    path = Path(sysconfig.get_paths()["stdlib"]) / MODULE
    texts = {name: text for name, text in topics(path).items() if args.tokenizer != "char" or PLAIN.issuperset(text)}
    if not texts:
        raise ValueError(
            f"this Python ({sys.executable}) comes without the source of its language reference: no topics are in "
            f"{path}. Use another Python, or another corpus, such as shakespeare_char."
        )
    splits: tuple[list[str], list[str]] = ([], [])
    for name, text in texts.items():
        splits[is_held_out(name)].append(f"# {name}\n{text}\n")
    only = " of plain ASCII" if args.tokenizer == "char" else ""
    source = f"{len(texts)} topics{only} of the language reference of Python {platform.python_version()}."
    tokenizer = tokenizer_for(args.tokenizer, (part for parts in splits for part in parts))
    write_texts(args.out, "pydoc", tokenizer, *splits, source)


if __name__ == "__main__":
    run(main)
