"""Whatever a sweep file holds: it is listed, or refused with sentences that say where, soon and in little memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mutants
import pytest
from shipped import small_corpora

CASES = mutants.cases(300)
WHOLE = (  # what is about a file as a whole, or about keys that no file sets
    "is larger than 1,000,000 bytes.",
    "train: one iteration has more than 2^40 tokens",
)
MORE = re.compile(r"\.\.\. and [\d,]+ more mistakes\.")
TOLD = {  # of files that are wrong by construction
    "binary": r"^x\.yaml:2: this is not text \(UTF-8\)\.$",
    "nul": r"^the character U\+0000 is not allowed \(x\.yaml:1\)\. This is not valid YAML\.$",
    "escape in key": r"^\\x1b\[2Jkey: unknown key \(x\.yaml:1\)",
    "newline in key": r"model\.n\\nn: unknown key \(x\.yaml:2\)",
    "surrogate in root": r"^'\\ud800' holds the character 0, or half of a pair of characters, .* \(x\.yaml:1\)\.$",
    "deep list": r"^it is nested deeper than 60 levels \(x\.yaml:1\)",
    "deep mapping": r"^it is nested deeper than 60 levels \(x\.yaml:60\)",
    "many keys": r"^it has more than 50,000 keys and values \(x\.yaml:25000\)",
    "bomb": r"^the file's aliases expand to more than 200,000 values \(x\.yaml:\d+\)\.$",
    "alias cycle": r"^a\.b: an alias refers to a value that contains it \(x\.yaml:1\)\.$",
    "huge hex": r"is larger than any number here \(x\.yaml:1\)\.$",
    "wider model": r"'weight' would be 28 x 1e\+20 numbers, more than any machine holds \(x\.yaml:1\)",
    "long default": r"^defaults: .*File name too long.* \.\.\. ",
    "defaults cycle": r"^defaults: .*\(x\.yaml:1\)",
    "reference bomb": r"the references lead through too many others \(x\.yaml:\d+\)",
    "range huge": r"^sweep\.grid\.train\.seed: the range has 1e\+09 values; at most 100,000 are allowed \(x\.yaml:1\)\.$",
    "two large": r"^sweep\.grid\.train\.data_seed: with this axis there are more than 100,000 values \(x\.yaml:1\)\. Shorten",
    "product huge": r"^sweep: it has more than 10\^15 combinations or more, and at most 20,000 are listed \(x\.yaml:1\)\. Shorten",
    "seeds large": r"^sweep: it has 100,000 combinations or more, and at most 20,000 are listed \(x\.yaml:1\)\. .* sweep\.max_runs",
    "search many": r"^sweep: it has 50,010,000 combinations",
    "when cycle": r"its 'when' is about an axis whose own 'when' is about this one \(x\.yaml:1\)\.$",
}
HARMLESS = ("empty", "blank", "comment", "null", "defaults twice", "axis null")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How listing each case ended, by its name, and how the two that go beyond the limits did."""
    folder = tmp_path_factory.mktemp("mutated")
    small_corpora(folder / "data")
    named = {f"{i:04d}": name for i, name in enumerate(CASES)}
    for number, name in named.items():
        (folder / "cases" / number).mkdir(parents=True)
        (folder / "cases" / number / mutants.FILE).write_bytes(CASES[name])
        (folder / "cases" / number / "y.yaml").write_text("defaults: [x]\n")  # a cycle where x.yaml names it
    (folder / "warm").mkdir()
    (folder / "warm" / mutants.FILE).write_text(mutants.SEARCHED)
    words = [sys.executable, str(Path(mutants.__file__)), str(folder)]
    done = subprocess.run(words, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {named.get(row["name"], row["name"]): row for row in rows}


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_listed_or_refused_with_sentences(ended: dict[str, dict[str, Any]], name: str) -> None:
    case = ended[name]
    told = f"{CASES[name][:2000]!r}\n{case['out'][-2000:]}\n{case['err'][-4000:]}"
    assert case["code"] in (0, 2), f"{case['code']}: {told}"
    assert "Traceback" not in case["out"] + case["err"], told
    assert case["left"] == [], "nothing was written"
    lines = case["err"].split("\n")
    assert lines.pop() == ""
    if case["code"] == 0:
        assert not lines and case["out"], told
        return
    assert lines and case["out"] == "", told
    for line in lines:
        assert line.isprintable() and len(line) < 2100, line
        assert re.search(r"[.?!)]$|--input FILE$", line), f"no sentence: {line}"
        whole = MORE.fullmatch(line) or any(words in line for words in WHOLE)
        assert whole or re.search(r"[\w-]\.yaml:\d+\b", line), f"no place: {line}"
        assert MORE.fullmatch(line) or "x.yaml" in line or "presets/" in line, f"no file: {line}"


@pytest.mark.parametrize("name", TOLD)
def test_what_is_wrong_is_said(ended: dict[str, dict[str, Any]], name: str) -> None:
    assert re.search(TOLD[name], ended[f"built: {name}"]["err"], re.MULTILINE), ended[f"built: {name}"]["err"][:3000]


def test_the_limits_hold_and_the_mutations_hurt(ended: dict[str, dict[str, Any]]) -> None:
    assert ended["greedy"]["code"] == 99 and "MemoryError" in ended["greedy"]["err"]
    assert ended["endless"]["code"] == -signal.SIGXCPU
    assert [ended[f"built: {name}"]["code"] for name in HARMLESS] == [0] * len(HARMLESS)
    assert len(CASES) == 300 and Counter(case["code"] for case in ended.values())[0] < 50
