"""OpenWebText, the open copy of the text that GPT-2 learned from, as GPT-2 tokens.

    python data/openwebtext/prepare.py [--max-documents N] [--input FILE|FOLDER] [--tokenizer-file FILE | --tokenizer hf:FOLDER] ...

Some 8 million documents and 9 billion tokens, which need 18 GB of disk; they are streamed, not downloaded first. One
document in two thousand is held out, as many as in nanoGPT though not the same ones. Needs the package `datasets`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.documents import Hub, prepare
from data.preparing import run

TOKENIZERS = ("gpt2", "hf:FOLDER")
HUB = Hub("openwebtext", "Skylion007/openwebtext", subset=None, val_fraction=0.0005)


if __name__ == "__main__":
    run(lambda: prepare(HUB, __doc__, TOKENIZERS))
