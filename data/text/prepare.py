"""Any text files of your own, as characters, bytes, byte pairs learned from them, or the tokens of a checkpoint.

    python data/text/prepare.py --input FILE|FOLDER|GLOB [--input ...] [--name NAME] [--tokenizer NAME|hf:FOLDER] ...

The files are taken in the order given, sorted by path within a folder or a glob. The last part of all their text is
held out for validation, as in nanoGPT. An end-of-text token follows each file; where the tokenizer has none, as char and
byte, a line end stands between two. The byte pairs of bpe are learned from the training part alone. The corpus is then
known as `data.dataset: NAME`.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.preparing import (
    Progress,
    announce,
    arguments,
    check_name,
    checkpoint_tokenizer,
    encoded,
    fraction,
    pieces,
    read_text,
    run,
    tokenizer_for,
)
from engine.corpus import DATA, FileTokenizer, Tokenizer, write_corpus
from engine.hf_tokenizer import is_checkpoint

TOKENIZERS = ("char", "byte", "bpe", "hf:FOLDER")
ARGUMENTS = "--input FILE"  # shown in the command that an unprepared corpus asks for
END = "<|endoftext|>"

Part = tuple[str, str, bool]  # the split it belongs to, its text, and whether its file ends there


def expand(inputs: list[str]) -> list[Path]:
    """The files that `--input` names, each once. Raises ValueError for one that names none."""
    files: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if not any(x.startswith(".") for x in p.relative_to(path).parts))
        else:
            found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(given, recursive=True))
        found = [p for p in found if p.is_file()]
        if not found:
            raise ValueError(f"--input {given}: no such file, and no files in such a folder or for such a pattern.")
        files.update((p.resolve(), None) for p in found)
    return list(files)


class Texts:
    """The text of the files in order, read again for each pass so that memory holds one file at a time."""

    def __init__(self, files: list[Path], between: str, val_fraction: float) -> None:
        self.files, self.between = files, between
        self.cut = int(sum(len(text) for text in self._texts()) * (1 - val_fraction))  # characters of training text

    def _texts(self) -> Iterator[str]:
        for number, path in enumerate(self.files):
            yield read_text(path) + (self.between if number + 1 < len(self.files) else "")

    def __iter__(self) -> Iterator[Part]:
        seen = 0
        for text in self._texts():
            head, tail = text[: max(self.cut - seen, 0)], text[max(self.cut - seen, 0) :]
            if head:
                yield "train", head, not tail
            if tail:
                yield "val", tail, True
            seen += len(text)


def learn(texts: Texts, vocab_size: int) -> FileTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, learned from the training part."""
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("--tokenizer bpe needs the package 'tokenizers': pip install tokenizers") from None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(f"--vocab-size {vocab_size} is too small: bytes and {END} already make {len(alphabet) + 1}.")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    model.train_from_iterator((p for split, text, _ in texts if split == "train" for p in pieces(text)), trainer)
    return FileTokenizer(model.to_str(), "bpe")


def chunks(texts: Texts, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    progress = Progress("files")
    for split, text, ends in texts:
        for ids in encoded(tokenizer, text):
            yield split, ids
            progress.add(0, len(ids))
        if ends and tokenizer.end is not None:
            yield split, np.array([tokenizer.end])
        progress.add(ends, 0)


def check_free(name: str) -> None:
    """Raises ValueError for a name that belongs to another corpus."""
    if name != "text" and (DATA / name / "prepare.py").is_file():
        raise ValueError(f"--name {name} is taken: {DATA / name} has its own prepare.py. Choose another name.")


def main() -> None:
    parser = arguments(__doc__, TOKENIZERS)
    help_input = "a UTF-8 text file, a folder (every file below it) or a glob; may be repeated"
    parser.add_argument("--input", action="append", required=True, metavar="PATH", help=help_input)
    parser.add_argument("--name", default="text", help="what the corpus is called (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of bpe, at most (default %(default)s)")
    help_fraction = "share of the characters held out (default %(default)s)"
    parser.add_argument("--val-fraction", type=fraction, default=0.1, metavar="SHARE", help=help_fraction)
    args = parser.parse_args()
    check_name("--name", args.name)
    check_free(args.name)
    files = expand(args.input)
    tokenizer: Tokenizer | None = checkpoint_tokenizer(args.tokenizer) if is_checkpoint(args.tokenizer) else None
    ends = args.tokenizer == "bpe" or (tokenizer is not None and tokenizer.end is not None)
    texts = Texts(files, "" if ends else "\n", args.val_fraction)
    if not texts.cut:
        raise ValueError(f"--input: the {len(files)} files hold no text, or too little to hold some of it out.")
    if args.tokenizer == "bpe":
        tokenizer = learn(texts, args.vocab_size)
    elif tokenizer is None:
        tokenizer = tokenizer_for(args.tokenizer, (text for _, text, _ in texts))
    names = ", ".join(path.name for path in files[:3]) + (", ..." if len(files) > 3 else "")
    source = f"The text of {len(files)} {'file' if len(files) == 1 else 'files'}: {names}."
    folder = args.out / args.name / tokenizer.name
    meta = write_corpus(folder, chunks(texts, tokenizer), dataset=args.name, tokenizer=tokenizer, source=source)
    announce(folder, meta)


if __name__ == "__main__":
    run(main)
