"""FineWeb, filtered web text, as GPT-2 tokens: by default the sample of 10 billion tokens, which needs 20 GB of disk.

    python data/fineweb/prepare.py [--max-documents N] [--input FILE|FOLDER] [--tokenizer-file FILE | --tokenizer hf:FOLDER] ...

The documents are streamed, not downloaded first. One in a thousand is held out. Needs the package `datasets`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.documents import Hub, prepare
from data.preparing import run

TOKENIZERS = ("gpt2", "hf:FOLDER")
HUB = Hub("fineweb", "HuggingFaceFW/fineweb", subset="sample-10BT", val_fraction=0.001)


if __name__ == "__main__":
    run(lambda: prepare(HUB, __doc__, TOKENIZERS))
