"""Tiny Shakespeare, 1.1 million characters, split as in nanoGPT: nine tenths for training, the last one held out.

python data/shakespeare_char/prepare.py [--tokenizer char|byte|hf:FOLDER] [--input FILE] [--out ROOT]
"""

from __future__ import annotations

import hashlib
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.preparing import arguments, read_text, run, tokenizer_for, write_texts

TOKENIZERS = ("char", "byte", "hf:FOLDER")
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download() -> str:
    """The text from its home. Raises ValueError with no network, or if something else came."""
    try:
        with urllib.request.urlopen(URL, timeout=30) as answer:
            raw: bytes = answer.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"could not download {URL} ({reason}). With a copy of the file, pass --input FILE.") from None
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise ValueError(f"what came from {URL} ({len(raw):,} bytes) is not tiny Shakespeare. Pass --input FILE.")
    return raw.decode("utf-8")


def main() -> None:
    parser = arguments(__doc__, TOKENIZERS)
    parser.add_argument("--input", type=Path, metavar="FILE", help="a text file to use instead of downloading")
    args = parser.parse_args()
    text = read_text(args.input) if args.input else download()
    if not text:
        raise ValueError(f"{args.input} is empty.")
    cut = int(len(text) * 0.9)
    source = f"The text of the file {args.input.name}." if args.input else f"Tiny Shakespeare from {URL}."
    tokenizer = tokenizer_for(args.tokenizer, [text])
    write_texts(args.out, "shakespeare_char", tokenizer, text[:cut], text[cut:], source)


if __name__ == "__main__":
    run(main)
