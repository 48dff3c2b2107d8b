"""`data.tokenizer: hf:FOLDER`: a checkpoint's own tokenizer, from its folder to a run's identity and its text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
from test_prepare import decoded, ids, load, prepare

import lab.listing
import sample
import train
from core.yaml_files import load_file
from engine.corpus import META, FileTokenizer, Meta, load_tokenizer
from engine.data import open_corpus, stage_corpus
from engine.hf_tokenizer import read_checkpoint
from lab.expand import Run
from lab.listing import load_run, open_listing

pytest.importorskip("tokenizers", reason="THE TOKENIZERS OF CHECKPOINTS ARE NOT TESTED: pip install tokenizers")
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

Captured = pytest.CaptureFixture[str]
TEXT = "def the(cat, sat):\n    return on(a, mat) and the(cat)\n" * 3
OTHER = "lorem ipsum dolor sit amet, consectetur\n" * 3
SIZE = 275  # of the vocabularies: the bytes, two special tokens, and some pairs
END, TURN = "<|endoftext|>", "<|turn|>"
SCRIPT = f"""
import sys
sys.path.insert(0, {str(runs.ROOT)!r})
from data.preparing import arguments, run, tokenizer_for, write_texts
TOKENIZERS = ("byte", "hf:FOLDER")
SELF_PREPARING = True
def main():
    args = arguments(__doc__, TOKENIZERS).parse_args()
    texts = ["the cat sat on a mat\\n" * 40, "the dog saw one cat\\n" * 40], ["a cat, a mat\\n" * 40]
    write_texts(args.out, "tiny", tokenizer_for(args.tokenizer, []), *texts, "A test.")
if __name__ == "__main__":
    run(main)
"""


def learned(text: str = TEXT, size: int = SIZE) -> dict[str, Any]:
    """The tree of a byte-level BPE's tokenizer.json, with two special tokens, made by the library itself."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[TURN, END], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([text], trainer)
    made: dict[str, Any] = json.loads(model.to_str())
    return made


def checkpoint(folder: Path, tree: dict[str, Any] | None = None, **others: Any) -> Path:
    """A folder with a tokenizer.json; others: what files beside it hold, by name without '.json'."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"tokenizer": tree or learned(), **others}.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def named(folder: Path) -> str:
    return read_checkpoint(f"hf:{folder}").name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a checkpoint `tok`, the corpus `tiny` below `root`, and a file `x.yaml` of two iterations."""
    made = tmp_path / "home"
    checkpoint(made / "tok")
    (made / "root" / "tiny").mkdir(parents=True)
    (made / "root" / "tiny" / "prepare.py").write_text(SCRIPT)
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(lab.listing, "LIBRARY", tmp_path / "shipped")
    monkeypatch.chdir(made)
    write("x.yaml", made)
    return made


def write(name: str, home: Path, tokenizer: str | None = "hf:tok", **changes: Any) -> Path:
    tree = runs.tree(home / "root", **{"train__max_iters": 2, "data__tokenizer": tokenizer, **changes})
    return runs.write(home / name, tree)


def one(name: str, *words: str) -> Run:
    (run,) = open_listing(Path(name), words).runs
    return run


def refused(capsys: Captured, *words: str) -> str:
    """The sentence with which the front door refuses words, on one line and without a traceback."""
    assert train.main([*words, "--dry-run"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and "Traceback" not in told
    return told


# From end to end ------------------------------------------------------------------------------------------------------------


def test_from_a_folder_to_a_run_and_its_text(home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    name = named(home / "tok")
    assert train.main(["--config", "x.yaml", "--dry-run"]) == 0
    assert [path.name for path in (home / "root/tiny").iterdir()] == ["prepare.py"], "a dry run makes nothing"
    assert train.main(["--config", "x.yaml"]) == 0
    (folder,) = (path.parent for path in home.glob("runs/x/*/result.json"))
    assert json.loads((folder / "result.json").read_text())["status"] == "done"
    written = load_file(folder / "config.yaml").tree
    assert written["data"]["tokenizer"] == name
    assert re.fullmatch(r"hf-bpe-[0-9a-f]{8}", name)
    corpus = home / "root/tiny" / name
    assert Meta.read(corpus).tokenizer == name and Meta.read(corpus).vocab_size == SIZE
    ends = load_tokenizer(corpus).end
    assert ends == json.loads((home / "tok/tokenizer.json").read_text())["model"]["vocab"][END]
    assert (ids(corpus, "train") == ends).sum() == 2 and ids(corpus, "val")[-1] == ends, "one after each document"

    before = (folder / "result.json").stat().st_mtime_ns
    shutil.move(home / "tok", home / "elsewhere")  # what is prepared needs the folder no more
    monkeypatch.chdir(home.parent)  # as that of a trial on another machine may be
    assert load_run(folder, plugins=False)[1].folder == corpus
    monkeypatch.chdir(home)
    capsys.readouterr()
    assert sample.main([str(folder), "--prompt", "the cat", "--tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert train.main(["--config", "x.yaml", "data.tokenizer=hf:elsewhere"]) == 0
    assert (folder / "result.json").stat().st_mtime_ns == before, "the same run, which is done"
    assert train.main(["--config", "x.yaml", f"data.tokenizer={name}"]) == 0, "its own name is one too"
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert len(list(home.glob("runs/x/*/config.yaml"))) == 1
    shutil.rmtree(corpus)
    told = refused(capsys, "--config", "x.yaml", f"data.tokenizer={name}")
    assert f"'tiny' has no '{name}'" in told and "is made where its checkpoint is named, as hf:FOLDER." in told


def swept(home: Path) -> Path:
    """A sweep over the tokenizers of three folders, two of which hold the same."""
    shutil.copytree(home / "tok", home / "again")
    checkpoint(home / "other", learned(OTHER))
    sweep = {"grid": {"data.tokenizer": ["hf:tok", "hf:other", "hf:again"]}, "baseline": {"data.tokenizer": "hf:tok"}}
    return write("s.yaml", home, None, sweep=sweep)


def test_a_sweep_over_tokenizers(home: Path) -> None:
    listing = open_listing(swept(home), [])
    assert listing.expansion.duplicates == 1, "the same tokenizer twice is one run"
    assert [run.cell for run in listing.runs] == ["tokenizer=hf:tok", "tokenizer=hf:other"]
    assert [run.baseline for run in listing.runs] == [True, False]
    listing.settle()
    prepared = {path.parent.name for path in home.glob(f"root/tiny/*/{META}")}
    assert prepared == {named(home / "tok"), named(home / "other")}


@pytest.mark.system  # takes ten seconds
def test_a_sweep_over_tokenizers_in_trials(home: Path) -> None:
    """Trials run in processes of their own and read config.yaml alone."""
    file = swept(home)
    assert train.main(["--config", str(file)]) == 0
    listing = open_listing(file, [])
    assert [listing.status(run) for run in listing.runs] == ["done", "done"]


def test_the_one_prepared_for_a_checkpoint_is_nobodys_default(home: Path) -> None:
    root = home / "root"
    stage = stage_corpus("tiny", f"hf:{home / 'tok'}", root)
    assert stage.destination == root / "tiny" / named(home / "tok")
    open_corpus("tiny", f"hf:{home / 'tok'}", root)
    assert open_corpus("tiny", None, root).meta.tokenizer == "byte"


def test_the_vocabulary_of_the_model_may_be_larger_and_not_smaller(home: Path, capsys: Captured) -> None:
    assert train.main(["--config", "x.yaml", "model.vocab_size=320"]) == 0
    (folder,) = (path.parent for path in home.glob("runs/x/*/result.json"))
    for seed in ("1", "2"):  # of tokens that nearly all are equally likely, some of which stand for nothing
        assert sample.main([str(folder), "--tokens", "60", "--temperature", "9", "--seed", seed]) == 0
    told = refused(capsys, "--config", "x.yaml", f"model.vocab_size={SIZE - 1}")
    assert told.startswith(f"model.vocab_size: {SIZE - 1} is smaller than the data's vocabulary of {SIZE}")


# Identity and paths ---------------------------------------------------------------------------------------------------------


def test_the_content_is_the_identity_and_not_the_path(home: Path) -> None:
    run, tree = one("x.yaml"), learned()
    shutil.copytree(home / "tok", home / "deep/er")
    assert one("x.yaml", "data.tokenizer=hf:deep/er").hash == run.hash
    assert one("x.yaml", f"data.tokenizer=hf:{home}/deep/../tok/").hash == run.hash
    checkpoint(home / "tok", learned(OTHER))
    assert one("x.yaml").hash != run.hash, "another vocabulary under the same path"
    checkpoint(home / "tok", tree, tokenizer_config={"eos_token": TURN})
    assert one("x.yaml").hash != run.hash, "documents that end otherwise"
    checkpoint(home / "tok", tree, tokenizer_config={"eos_token": END, "chat_template": "x"})
    assert one("x.yaml").hash == run.hash, "what changes no id does not count"


def test_the_name_follows_from_what_changes_ids(tmp_path: Path) -> None:
    tree = learned()
    first = named(checkpoint(tmp_path / "first", tree))
    idle = {"padding": {"strategy": "BatchLongest"}, "truncation": {"max_length": 3}, "post_processor": None}
    same = [tree | idle, dict(reversed(tree.items()))]
    others = [
        tree | {"normalizer": {"type": "Lowercase"}},
        tree | {"model": tree["model"] | {"merges": tree["model"]["merges"][:-1]}},
        tree | {"added_tokens": tree["added_tokens"][:-1]},
    ]
    assert {named(checkpoint(tmp_path / f"same{i}", x)) for i, x in enumerate(same)} == {first}
    made = {named(checkpoint(tmp_path / f"other{i}", x)) for i, x in enumerate(others)}
    made.add(named(checkpoint(tmp_path / "ended", tree, tokenizer_config={"eos_token": TURN})))
    assert len({first, *made}) == 2 + len(others)


def test_paths_are_relative_to_the_file_that_says_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok, other = named(home / "tok"), named(checkpoint(home / "sub/tok", learned(OTHER)))

    def chosen(name: str, *words: str) -> str | None:
        tokenizer: str | None = one(name, *words).config.data.tokenizer
        return tokenizer

    write("sub/x.yaml", home)
    assert chosen("sub/x.yaml") == other, "beside the file, which comes first"
    assert chosen("sub/x.yaml", "data.tokenizer=hf:tok") == tok, "the command line's is of the current folder"
    assert chosen("sub/x.yaml", "data={tokenizer: 'hf:tok'}") == tok
    assert chosen("x.yaml", "data.tokenizer=hf:sub/tok") == other
    shutil.move(home / "sub/tok", home / "sub/moved")
    assert chosen("sub/x.yaml") == tok, "else the current folder's"
    write("sub/s.yaml", home, None, sweep={"grid": {"data.tokenizer": ["hf:moved", "byte"]}})
    assert [run.config.data.tokenizer for run in open_listing(Path("sub/s.yaml"), []).runs] == [other, "byte"]
    (home / "presets").mkdir()
    (home / "presets/cut.yaml").write_text('# @package _global_\ndata: {tokenizer: "hf:../sub/moved"}\n')
    composed = runs.tree(home / "root")
    runs.write(home / "composed.yaml", {**composed, "defaults": ["presets/cut", "_self_"]})
    assert chosen("composed.yaml") == other, "a preset's is relative to the preset"
    shutil.copytree(home / "tok", home / "byte")  # without the prefix it is a name, whatever folders there are
    assert chosen("x.yaml", "data.tokenizer=byte") == "byte"
    monkeypatch.chdir(home / "sub")
    assert chosen("../x.yaml", "data.tokenizer=hf:moved") == other and chosen("../x.yaml") == tok


# The end of a document ------------------------------------------------------------------------------------------------------


def test_what_ends_a_document(tmp_path: Path) -> None:
    tree = learned()
    vocabulary = tree["model"]["vocab"]
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({}, vocabulary[END]),
        ({"tokenizer_config": {"eos_token": TURN}}, vocabulary[TURN]),
        ({"tokenizer_config": {"eos_token": {"content": TURN, "special": True}}}, vocabulary[TURN]),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 7}}, 7),
        ({"tokenizer_config": {"eos_token": "</nowhere>"}, "config": {"eos_token_id": [9, 7]}}, 9),
        ({"generation_config": {"eos_token_id": 8}, "config": {"eos_token_id": 7}}, 8),
        ({"tokenizer_config": {"eos_token": TURN}, "generation_config": {"eos_token_id": 8}}, vocabulary[TURN]),
        ({"config": {"eos_token_id": SIZE}}, vocabulary[END]),  # no id of this vocabulary
    ]
    for number, (files, end) in enumerate(cases):
        found = read_checkpoint(f"hf:{checkpoint(tmp_path / str(number), tree, **files)}")
        assert (found.end, found.load().end) == (end, end), files
    vocab = [["<unk>", 0.0], ["\u2581", -1.0], ["a", -2.0]]
    unigram = {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}}
    found = read_checkpoint(f"hf:{checkpoint(tmp_path / 'plain', unigram, config={'eos_token_id': 2})}")
    assert (found.end, found.name.rpartition("-")[0], found.load().vocab_size) == (2, "hf-unigram", 3)
    assert read_checkpoint(f"hf:{checkpoint(tmp_path / 'none', unigram)}").end is None


def test_the_end_is_kept_with_the_corpus(home: Path) -> None:
    checkpoint(home / "tok", tokenizer_config={"eos_token": TURN})
    corpus = open_corpus("tiny", f"hf:{home / 'tok'}", home / "root")
    tokenizer = load_tokenizer(corpus.folder)
    assert tokenizer.end == corpus.meta.end == corpus.val[-1] and tokenizer.decode([corpus.val[-1]]) == TURN
    path = corpus.folder / META
    for wrong in (-1, SIZE, "0", True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"end": wrong}))
        with pytest.raises(ValueError, match="'end' must be an id of the vocabulary"):
            Meta.read(corpus.folder)


def test_text_is_never_cut_or_filled_up() -> None:
    """Checkpoints of encoders often carry the lengths of their training in the file."""
    model = tokenizers.Tokenizer.from_str(json.dumps(learned()))
    plain = FileTokenizer(model.to_str())
    model.enable_truncation(4)
    model.enable_padding(length=32)
    said = FileTokenizer(model.to_str())
    assert len(plain.encode(TEXT)) > 32
    assert said.encode(TEXT).tolist() == plain.encode(TEXT).tolist()
    for ours, theirs in zip(said.encode_documents(["a", TEXT]), plain.encode_documents(["a", TEXT]), strict=True):
        assert ours.tolist() == theirs.tolist()


# Mistakes -------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_told(home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(tokenizer: str) -> str:
        return refused(capsys, "--config", "x.yaml", f"data.tokenizer={tokenizer}")

    said = told("hf:tuk")
    assert (
        said.startswith("data.tokenizer: there is no 'tuk' (command line).") and "hf: is followed by a folder" in said
    )
    assert "there is no folder 'x.yaml'" in told("hf:x.yaml")
    slow = checkpoint(home / "slow")
    (slow / "tokenizer.json").rename(slow / "vocab.json")
    said = told("hf:slow")
    assert "'slow' holds no tokenizer.json, and tokenizers are read from no other file (command line)." in said
    assert "AutoTokenizer.from_pretrained('slow', use_fast=True).save_pretrained('slow')." in said
    damaged: dict[str, Any] = {
        "version https://git-lfs.github.com/spec/v1": "tokenizer.json is damaged: Expecting value",
        "[]": "tokenizer.json is damaged: it holds no mapping (command line). Download it again.",
        "{}": "tokenizer.json is not a file of the 'tokenizers' library (command line). Download it again.",
        '{"model": {"vocab": [1]}}': "is not a file of the 'tokenizers' library (command line). Download it again.",
        '{"model": {"type": "BPE", "vocab": {"a": 0}}}': "file is not one of the 'tokenizers' library: ",
    }
    for content, reason in damaged.items():
        (checkpoint(home / "bad") / "tokenizer.json").write_text(content)
        assert reason in told("hf:bad"), content
    checkpoint(home / "bad", tokenizer_config="{")
    assert "bad/tokenizer_config.json is damaged" in told("hf:bad")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert re.search(r"^data.tokenizer: the hf-bpe-\w+ tokenizer needs .*: pip install tokenizers", told("hf:tok"))
    write("y.yaml", home, "hf:tuk")
    assert "there is no 'tuk' (y.yaml:1)" in refused(capsys, "--config", "y.yaml")


def test_a_corpus_that_is_not_prepared_tells_the_command(home: Path, capsys: Captured) -> None:
    texts = f"{runs.ROOT}/data/text/prepare.py --tokenizer hf:tok --out root"
    commands = {"text": f"{texts} --input FILE", "mine": f"{texts} --name mine --input FILE"}
    commands["fineweb"] = f"{runs.ROOT}/data/fineweb/prepare.py --tokenizer hf:tok --out root"
    (home / "book.txt").write_text(TEXT * 9)
    prepared = prepare("text", "--input", home / "book.txt", "--name", "mine", "--out", home / "root")
    assert prepared.returncode == 0
    for dataset, command in commands.items():
        told = refused(capsys, "--config", "x.yaml", f"data.dataset={dataset}", "data.root=root")
        assert told.startswith(f"data.dataset: '{dataset}' is not prepared for hf:tok (command line).")
        assert told.endswith(f" Run: python {command}")
    words = commands["mine"].replace("FILE", "book.txt").split()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    assert one("x.yaml", "data.dataset=mine").config.data.tokenizer == named(home / "tok")
    script = home / "root/tiny/prepare.py"
    script.write_text(script.read_text().replace(', "hf:FOLDER"', ","))
    told = refused(capsys, "--config", "x.yaml")
    assert "'tiny' takes no tokenizer of a checkpoint" in told and "'hf:FOLDER' among its TOKENIZERS: byte." in told


# prepare.py -----------------------------------------------------------------------------------------------------------------


def run_main(monkeypatch: pytest.MonkeyPatch, corpus: str, main: Callable[[Any], None], *words: str | Path) -> None:
    module = load(f"data/{corpus}/prepare.py")
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
    main(module)


def scripted(module: Any) -> None:
    module.main()


def of_the_hub(module: Any) -> None:
    module.prepare(module.HUB, module.__doc__, module.TOKENIZERS)


def test_texts_of_ones_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "a.txt").write_text("the cat\n" * 30)
    (home / "b.txt").write_text(f"sat on {END} a mat\n" * 30)
    words = ("--input", "a.txt", "--input", "b.txt", "--out", "root", "--tokenizer")
    run_main(monkeypatch, "text", scripted, *words, "hf:tok")
    folder = home / "root/text" / named(home / "tok")
    assert "".join(decoded(folder)) == "the cat\n" * 30 + END + f"sat on {END} a mat\n" * 30 + END
    end = load_tokenizer(folder).end
    assert [*ids(folder, "train"), *ids(folder, "val")].count(end) == 2, "one that is spelled out stays text"
    with pytest.raises(ValueError, match=r"^--tokenizer hf:FOLDER: there is no folder 'FOLDER'$"):
        run_main(monkeypatch, "text", scripted, *words, "hf:FOLDER")

    tree = learned()
    for name in (TURN, END):
        tree["model"]["vocab"][f"x{name}"] = tree["model"]["vocab"].pop(name)
    checkpoint(home / "endless", tree | {"added_tokens": []})
    run_main(monkeypatch, "text", scripted, *words, "hf:endless")
    whole = "".join(decoded(home / "root/text" / named(home / "endless")))
    assert whole == "the cat\n" * 30 + "\n" + f"sat on {END} a mat\n" * 30, "then a line break stands between them"


def test_the_corpora_of_the_machine_and_of_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in this process, over a standard library of two files and a hub of two documents."""
    library = home / "library"
    (library / "pydoc_data").mkdir(parents=True)
    (library / "pydoc_data/topics.py").write_text("topics = " + repr({f"t{i}": TEXT for i in range(30)}))
    for name in ("dataclasses.py", "fractions.py", "heapq.py", *(f"json/a{i}.py" for i in range(20))):
        (library / name).parent.mkdir(exist_ok=True)
        (library / name).write_text(TEXT)
    for sysconfig in (load(f"data/{corpus}/prepare.py").sysconfig for corpus in ("stdlib", "pydoc")):
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    (home / "play.txt").write_text(TEXT)
    words = ("--tokenizer", "hf:tok", "--out", home / "root")
    for corpus in ("stdlib", "pydoc", "shakespeare_char"):
        more = ("--input", home / "play.txt") if corpus == "shakespeare_char" else ()
        run_main(monkeypatch, corpus, scripted, *words, *more)
    rows = [{"text": f"{text} {i}"} for i in range(40) for text in (TEXT, OTHER)]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: iter(rows)))
    run_main(monkeypatch, "fineweb", of_the_hub, *words, "--val-fraction", "0.3")
    with pytest.raises(ValueError, match="--tokenizer-file: --tokenizer hf:tok names a file already"):
        run_main(monkeypatch, "fineweb", of_the_hub, *words, "--tokenizer-file", home / "x.json")
    counts = {"stdlib": 23, "pydoc": 30, "shakespeare_char": 0, "fineweb": 80}
    for corpus, documents in counts.items():
        folder = home / "root" / corpus / named(home / "tok")
        tokens = np.concatenate([ids(folder, split) for split in ("train", "val")])
        assert (tokens == load_tokenizer(folder).end).sum() == documents, corpus
    assert "".join(decoded(home / "root/shakespeare_char" / named(home / "tok"))) == TEXT
    assert f"\n{END}# heapq.py\ndef the(cat" in "".join(decoded(home / "root/stdlib" / named(home / "tok")))


# Against the library that checkpoints come from -----------------------------------------------------------------------------


@pytest.mark.system
def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    """On every tenth file of the standard library, as text and with special tokens spelled out in it."""
    reason = "THE TOKENIZERS OF CHECKPOINTS ARE NOT COMPARED: pip install transformers"
    transformers = pytest.importorskip("transformers", reason=reason)
    module = load("data/stdlib/prepare.py")
    texts = [text for _, text in module.sources(Path(module.sysconfig.get_paths()["stdlib"]))][::2]
    tree = learned("".join(texts[:20]), 2000)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(tree)), eos_token=TURN, pad_token=END
    )
    fast.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    found = read_checkpoint(f"hf:{tmp_path / 'saved'}")
    ours = found.load()
    assert (ours.end, ours.vocab_size) == (theirs.eos_token_id, len(theirs)) and found.end == tree["model"]["vocab"][
        TURN
    ]
    pieces = [text[:4000] for text in texts] + [f"{TURN}{text[:200]}{END} \u00e9\N{FOX FACE}" for text in texts[:50]]
    assert len(pieces) > 300
    assert any(TURN in piece for piece in pieces)
    for piece, plain in zip(pieces, ours.encode_documents(pieces), strict=True):
        assert ours.encode(piece).tolist() == theirs.encode(piece, add_special_tokens=False)
        assert plain.tolist() == theirs.encode(piece, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(plain) == theirs.decode(plain.tolist(), clean_up_tokenization_spaces=False)
