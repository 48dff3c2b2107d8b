"""Sweep files with mistakes in them, and a process that tries them: `python tests/mutants.py FOLDER`.

It is warm and forks a child for each folder in FOLDER/cases, which lists the file there with --dry-run under limits on memory and
processor time. A line of JSON for each says how that ended.
"""

# ruff: noqa: E501 - files in one line each
from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 10**9  # bytes that may be written to, those of torch at rest included
SECONDS = 5  # of processor time: how long a file takes must not depend on what else the machine does
WALL = 60  # a child that sleeps is ended too
FILE = "x.yaml"

# What is mutated ------------------------------------------------------------------------------------------------------------

COMPOSED = """
defaults: [presets/quick, _self_]
name: composed
model:
  norm: {variant: layernorm, eps: 1e-5}
  mlp: &mlp {variant: gated, width: 32}
  dropout: 0.1
  linear: {variant: pkl, scale: 0.25}
  position: "off"
train: {max_tokens: 20000, seed: 7, init_seed: 8, dtype: float32, block: null}
optimizer: {variant: adamw, learning_rate: 1e-3, betas: [0.9, 0.95]}
schedule: {variant: cosine, warmup_iters: 0.1, min_lr_ratio: 0.1}
tracking: {wandb: {mode: "off", project: "${name}", tags: [a, "b ${train.seed}"]}}
""".replace(", block: null", "")

RULES = """
defaults: [presets/small, _self_]
model:
  n_layer: 2
  sites:
    mlp_pkl: {match: "h.*.mlp.*", linear: {variant: pkl, scale: 0.5}}
    plain_head: {match: "head", linear: standard}
slices:
  calm_keys: {match: "h.*.attn.qkv[k]", lr_scale: 0.3, weight_decay: 0.0}
  deep: {match: "h.**", lr_scale: {depth: [1.0, 0.3]}}
  some: {match: ["h.{0..1}.attn.qkv[q]", "h.*.mlp.*"], except: "h.0.**", optional: true, learning_rate: 1e-3}
  matrices: {match: "h.*.attn.qkv", optimizer: {variant: muon, learning_rate: 0.02}}
  adapt: {match: "h.*.attn.qkv[q,v]", lora: {rank: 2, alpha: 4}}
  still: {match: wte, frozen: true}
  gone: null
sweep:
  grid: {slices.calm_keys.lr_scale: [0.1, 1.0], "slices.adapt.lora.rank": [2, 4]}
"""

SWEPT = """
defaults: [presets/small, _self_]
slices:
  v: {match: "h.*.attn.qkv[v]", lr_scale: 1.0}
sweep:
  grid:
    optimizer.learning_rate: {log: [1e-4, 1e-2], num: 3}
    optimizer.weight_decay: {range: [0.0, 0.2, 0.1]}
    schedule.min_lr_ratio: {linear: [0.0, 0.1], num: 2}
    model.activation: {named: {plain: gelu, other: silu}}
    model.dropout: {values: [0.0, 0.1], when: {model.activation: gelu}}
  zip: [{model.n_embd: [16, 32], model.n_head: [2, 4]}]
  groups:
    init: {plain: {}, small_v: {slices.v.init: {variant: normal, std: 0.01}}}
  cases:
    baseline: {}
    pkl: {use: presets/lora_base, set: {model.linear: {variant: pkl}}, grid: {model.linear.scale: [1.0, 1.25]}}
  exclude: [{case: pkl, optimizer.learning_rate: [1e-4, 1e-3]}, {model.n_embd: 32, init: small_v}]
  baseline: {case: baseline}
  seeds: 2
  objective: {metric: val_loss, mode: min}
  max_runs: 2000
"""

SEARCHED = """
defaults: [presets/small, _self_]
slices: {v: {match: "h.*.attn.qkv[v]", lr_scale: 1.0}}
sweep:
  grid: {model.norm: [layernorm, rmsnorm]}
  search:
    method: tpe
    trials: 8
    over: {optimizer.learning_rate: {log: [1e-4, 1e-2]}, slices.v.lr_scale: [0.3, 1.0, 3.0]}
    confirm: {top: 2, seeds: 2}
  stop: {method: halving, eta: 3, min_iters: 50}
  tune: [optimizer.learning_rate]
  seeds: [1, 2]
"""

OWN = {"composed": COMPOSED, "rules": RULES, "swept": SWEPT, "searched": SEARCHED}


def originals() -> dict[str, str]:
    """What mutations begin with, by name: the shipped files and those above."""
    shipped = sorted((ROOT / "explorations").glob("*.yaml"))
    return {**OWN, **{path.stem: path.read_text() for path in shipped}}


# Single mutations -----------------------------------------------------------------------------------------------------------

Change = Callable[[str, random.Random], "str | bytes"]
VALUES = (
    "null",
    "off",
    "~",
    "true",
    "''",
    "-1",
    "0",
    "1.5",
    "1e999",
    "-1e999",
    ".nan",
    ".inf",
    "[]",
    "{}",
    "[1, [2, {a: b}]]",
    "{a: {b: c}}",
    "{variant: null}",
    "{variant: [1]}",
    "{variant: pkl, scale: {}}",
    "99999999999999999999",
    "0x" + "f" * 6000,
    "9" * 5000,
    "2020-01-01",
    "word",
    "rmsnrom",
    '"\\0"',
    '"a\\nb: c"',
    '"\\e[31mred"',
    '"\\ud800"',
    '"../../etc/passwd"',
    '"${}"',
    '"${x"',
    '"${.}"',
    '"${..}"',
    '"${model.n_lyer}"',
    '"${oc.env:HOME}"',
    '"${train}"',
    '"${sweep.grid}"',
    '"h.{0..999999999}.attn"',
    '"h.*' + ".*" * 300 + '"',
    '"**.**.**.**.**.**.**.**.**.x"',
    '"[[["',
    "!!python/object/apply:os.system [ls]",
    "!!python/name:os.system",
    "!!binary aGk=",
    "!x y",
    "!!set {a, b}",
    "*nowhere",
    "&a [*a]",
    "{range: [0, 1e9, 1]}",
    "{range: [0, 1, 1e-12]}",
    "{log: [1, 2], num: 1000000000}",
    "{linear: [0, 1], num: -3}",
    "{log: [0, 1], num: 3}",
    "{values: [1, 2], when: {nothing: 1}}",
    "{named: [1]}",
    "|\n  text\n  more",
    "? x",
    "{? [1] : 2}",
    "x" * 50_000,
    "[" * 5000,
    "{a: " * 2000,
    "'",
    '"',
    "%",
    "@x",
    "`x`",
    "- 1",
    "\t1",
    "a: b: c",
)
JUNK = (
    b"\0",
    b"\x07",
    b"\x1b[2J",
    b"\xff\xfe",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\x80",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\x85",
    b"\r",
    b"\t",
)


def lines_of(text: str, draw: random.Random) -> tuple[list[str], int]:
    """The lines, and which of them is meant: one that says something."""
    lines = text.strip("\n").split("\n")
    return lines, draw.choice([i for i, line in enumerate(lines) if line.strip("# ")] or [0])


def some(pattern: str, text: str, draw: random.Random) -> tuple[str, str, str]:
    """What is before, in and after one of the places where a pattern matches; before everything where it does nowhere."""
    found = draw.choice([match.span() for match in re.finditer(pattern, text)] or [(0, 0)])
    return text[: found[0]], text[slice(*found)], text[found[1] :]


def typo(text: str, draw: random.Random) -> str:
    """In a key or in a value."""
    before, word, after = some(r"[A-Za-z_]{3,}", text, draw)
    i = draw.randrange(len(word) + 1)
    spellings = (
        word[:i] + word[i + 1 :],
        word[:i] + draw.choice("abcxyz_.-0") + word[i:],
        word[:i] + word[i - 1 :],
        word.swapcase(),
    )
    return before + draw.choice(spellings) + after


def wrong_value(text: str, draw: random.Random) -> str:
    """Another value behind a key."""
    before, _, after = some(r"(?<=: )[^\s,{}\[\]][^,{}\[\]\n]*", text, draw)
    return before + draw.choice(VALUES) + after


def wrong_node(text: str, draw: random.Random) -> str:
    """Another value in the place of a list or a mapping."""
    before, _, after = some(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}", text, draw)
    return before + draw.choice(VALUES) + after


def without_line(text: str, draw: random.Random) -> str:
    lines, i = lines_of(text, draw)
    return "\n".join(lines[:i] + lines[i + 1 :])


def line_twice(text: str, draw: random.Random) -> str:
    lines, i = lines_of(text, draw)
    return "\n".join([*lines[: i + 1], *lines[i:]])


def moved_line(text: str, draw: random.Random) -> str:
    """Indented otherwise."""
    lines, i = lines_of(text, draw)
    lines[i] = draw.choice([" ", "  ", "\t", "    "]) + lines[i] if draw.random() < 0.6 else lines[i][2:]
    return "\n".join(lines)


def without_mark(text: str, draw: random.Random) -> str:
    """One bracket, colon or quote is gone, or there twice."""
    before, mark, after = some(r"[\[\]{}:,\"]", text, draw)
    return before + mark * draw.choice([0, 2]) + after


def cut(text: str, draw: random.Random) -> str:
    return text[: draw.randrange(len(text))]


def junk(text: str, draw: random.Random) -> bytes:
    """Bytes that are no text, or none that YAML takes."""
    raw = text.encode()
    i = draw.randrange(len(raw))
    return raw[:i] + draw.choice(JUNK) * draw.choice([1, 1, 50]) + raw[i:]


def flipped(text: str, draw: random.Random) -> bytes:
    raw = bytearray(text.encode())
    for _ in range(draw.choice([1, 3, 20])):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def mixed(text: str, draw: random.Random) -> str:
    """A line of one file in another."""
    other, j = lines_of(draw.choice(list(originals().values())), draw)
    lines, i = lines_of(text, draw)
    return "\n".join([*lines[:i], other[j], *lines[i:]])


CHANGES: tuple[Change, ...] = (
    typo,
    typo,
    typo,
    wrong_value,
    wrong_value,
    wrong_value,
    wrong_node,
    without_line,
    line_twice,
    moved_line,
    without_mark,
    cut,
    junk,
    flipped,
    mixed,
)


# Files that are wrong by construction ---------------------------------------------------------------------------------------


def bomb(width: int, levels: int) -> str:
    rows = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels))
    return f"a0: &a0 [x, x]\n{rows}\n"


def built() -> Iterator[tuple[str, str | bytes]]:
    """Name and content of files that somebody might write to break this, and of some that somebody might write by mistake."""
    grid = "sweep: {grid: {%s}}"
    axis = "optimizer.learning_rate: {log: [1e-4, 1e-2], num: %d}"
    made: dict[str, str | bytes] = {
        "empty": "",
        "blank": "\n \n",
        "comment": "# nothing\n",
        "list": "- 1\n- 2\n",
        "word": "word",
        "number": "3",
        "null": "null",
        "two documents": "a: 1\n---\nb: 2\n",
        "directive": "%YAML 9.9\n---\nname: x\n",
        "tag directive": "%TAG ! !!\n---\na: 1\n",
        "binary": bytes(range(256)) * 40,
        "utf-16": "name: x\n".encode("utf-16"),
        "nul": b"name: x\0y\n",
        "latin": "name: caf\xe9\n".encode("latin-1"),
        "escape in key": '"\\e[2Jkey": 1\n',
        "newline in key": '"a\\nb": 1\nmodel: {"n\\nn": 1}\n',
        "surrogate in key": '"\\ud800": 1\n',
        "nul in name": 'name: "a\\0b"\n',
        "nul in root": 'data: {root: "a\\0b"}\n',
        "nul in base": 'train: {init_from: "a\\0b"}\n',
        "nul in plugin": 'plugins: ["a\\0b.py"]\n',
        "nul in defaults": 'defaults: ["a\\0b"]\n',
        "nul in use": 'sweep: {cases: {a: {use: "a\\0b"}}}\n',
        "nul in runs": 'runner: {root: "a\\0b"}\n',
        "long name": f"name: {'x' * 100_000}\n",
        "long file name": f"train: {{init_from: {'x' * 5000}}}\n",
        "long dataset": f"data: {{dataset: {'x' * 5000}}}\n",
        "long default": f"defaults: [{'x' * 5000}]\n",
        "long plugin": f"plugins: [{'x' * 5000}.py]\n",
        "surrogate in root": 'data: {root: "\\ud800"}\n',
        "surrogate in base": 'train: {init_from: "\\ud800"}\n',
        "surrogate in plugin": 'plugins: ["\\ud800.py"]\n',
        "surrogate in defaults": 'defaults: ["\\ud800"]\n',
        "surrogate in use": 'sweep: {cases: {a: {use: "\\ud800"}}}\n',
        "long key": f"{'k' * 100_000}: 1\n",
        "long quoted key": f'"{"k" * 900_000}": 1\n',
        "long value": f"model: {{norm: {'v' * 500_000}}}\n",
        "large": "a: 1 #" + "x" * 1_000_001,
        "many keys": "".join(f"k{i}: 1\n" for i in range(60_000)),
        "many values": "x: [" + "1," * 190_000 + "]",
        "many wrong rules": "slices:\n" + "".join(f"  r{i}: {{match: x}}\n" for i in range(4000)),
        "deep list": "a: " + "[" * 100_000,
        "deep closed": "a: " + "[" * 400 + "]" * 400,
        "deep mapping": "".join(" " * i + f"k{i}:\n" for i in range(700)),
        "deep flow mapping": "{a: " * 3000 + "1" + "}" * 3000,
        "deep blocks": "- " * 3000,
        "deep quotes": "a: " + "'" * 99_999,
        "bomb": bomb(9, 12),
        "wide bomb": "a: &a [" + "x," * 5000 + "]\nb: &b [" + "*a," * 5000 + "]\nc: [" + "*b," * 5000 + "]\n",
        "merge bomb": "m0: &m0 {a: 1}\n"
        + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}], k{i}: 1}}\n" for i in range(1, 30)),
        "alias cycle": "a: &a {b: *a}\n",
        "alias cycle in a list": "model: &m {sites: [*m]}\n",
        "merge cycle": "a: &a {<<: *a}\n",
        "merge of a list": "a: {<<: [1, 2]}\n",
        "merge of nothing": "a: {<<: *nowhere}\n",
        "merge of a word": "<<: x\n",
        "alias as key": "a: &a b\n*a : 1\n",
        "key of a list": "? [1, 2]\n: 3\n",
        "key of null": "null: 1\n~: 2\n",
        "key of true": "true: 1\n",
        "keys equal as values": "1: a\n0x1: b\n",
        "dotted keys": "model.n_layer: 2\n",
        "empty key": '"": 1\nmodel: {"": 2}\n',
        "dots as keys": '".": 1\n"..": 2\nslices: {".": {match: x}}\n',
        "python object": "a: !!python/object/new:os.system {x: 1}\n",
        "python tuple": "a: !!python/tuple [1]\n",
        "timestamp": "name: !!timestamp 2020-01-01\n",
        "ordered map": "a: !!omap [b: 1]\n",
        "huge number": f"model: {{n_layer: {'9' * 5000}}}\n",
        "huge hex": f"model: {{n_layer: 0x{'f' * 9000}}}\n",
        "huge octal": f"train: {{seed: 0{'7' * 9000}}}\n",
        "sexagesimal": f"train: {{seed: 1{':59' * 5000}}}\n",
        "huge exponent": "optimizer: {learning_rate: 1e400}\n",
        "many layers": "model: {n_layer: 100000000}\n",
        "some layers": "model: {n_layer: 20000}\n",
        "wide model": "model: {n_embd: 1000000000000, n_head: 1}\n",
        "wider model": "model: {n_embd: 100000000000000000000, n_head: 1}\n",
        "many heads": "model: {n_head: 100000000, n_embd: 100000000}\n",
        "long block": "model: {block_size: 1000000000000}\n",
        "many experts": "model: {mlp: {variant: moe, experts: 100000000}}\n",
        "large batch": "train: {batch_size: 1000000000000000000}\n",
        "many iterations": "train: {max_iters: 1000000000000000000000000}\n",
        "defaults of itself": "defaults: [x]\n",
        "defaults cycle": "defaults: [y]\n",
        "defaults missing": "defaults: [presets/quik]\n",
        "defaults a word": "defaults: presets/quick\n",
        "defaults a number": "defaults: [1, 2.5, null]\n",
        "defaults nested": "defaults: [[presets/quick]]\n",
        "defaults a mapping": "defaults: [{presets: quick}]\n",
        "defaults absolute": "defaults: [/etc/passwd]\n",
        "defaults upwards": "defaults: [../../x]\n",
        "defaults twice": "defaults: [presets/quick, presets/quick]\n",
        "defaults environment": 'defaults: ["${oc.env:HOME}"]\n',
        "defaults override": "defaults: [override hydra/launcher: x]\n",
        "defaults package": "defaults: [presets/quick@model]\n",
        "defaults optional": "defaults: [optional nothing]\n",
        "defaults self twice": "defaults: [_self_, _self_]\n",
        "hydra": "hydra: {run: {dir: /tmp/x}}\n",
        "environment": 'name: "${oc.env:HOME}"\n',
        "reference cycle": 'name: "${data.dataset}"\ndata: {dataset: "${name}"}\n',
        "reference bomb": "".join(f'k{i}: "${{k{i + 1}}}${{k{i + 1}}}"\n' for i in range(40)) + "k40: x\n",
        "reference of itself": 'name: "${name}"\n',
        "reference open": 'name: "${a"\n',
        "reference nested": 'name: "${a.${b}}"\n',
        "references many": "train: {seed: 1}\nx:\n" + '  - "${train.seed}"\n' * 20_000,
        "range huge": grid % "train.seed: {range: [0, 1e9, 1]}",
        "range fine": grid % "optimizer.weight_decay: {range: [0, 1, 1e-300]}",
        "range of infinity": grid % "train.seed: {range: [0, .inf, 1]}",
        "range of words": grid % "train.seed: {range: [a, b, c]}",
        "range backwards": grid % "train.seed: {range: [9, 0, 1]}",
        "num huge": grid % (axis % 10**9),
        "num large": grid % (axis % 1_000_000),
        "num negative": grid % (axis % -1),
        "num a word": grid % "train.seed: {log: [1, 2], num: x}",
        "range large": grid % "train.seed: {range: [0, 999999, 1]}",
        "two large": grid % "train.seed: {range: [0, 99999, 1]}, train.data_seed: {range: [0, 99999, 1]}",
        "product huge": grid % ", ".join(f"slices.r{i}.lr_scale: {{range: [1, 100, 1]}}" for i in range(9)),
        "product of pairs": grid % ", ".join(f"slices.r{i}.lr_scale: [1, 2]" for i in range(300)),
        "groups huge": "sweep:\n  groups:\n" + "".join(f"    g{i}: {{a: {{}}, b: {{}}, c: {{}}}}\n" for i in range(60)),
        "cases huge": "sweep:\n  cases:\n"
        + "".join(f"    c{i}: {{grid: {{train.seed: {{range: [0, 5000, 1]}}}}}}\n" for i in range(300)),
        "zip long": "sweep: {zip: {train.seed: {range: [0, 999999, 1]}, train.data_seed: {range: [0, 999999, 1]}}}\n",
        "zip unequal": "sweep: {zip: {train.seed: [1, 2], train.data_seed: [1]}}\n",
        "seeds huge": "sweep: {seeds: 1000000000}\n",
        "seeds large": "sweep: {seeds: 100000}\n",
        "seeds negative": "sweep: {seeds: -1}\n",
        "seeds equal": "sweep: {seeds: [1, 1]}\n",
        "seeds words": "sweep: {seeds: [a]}\n",
        "seeds and axis": "sweep: {seeds: 100000, grid: {optimizer.learning_rate: {log: [1e-4, 1e-2], num: 100000}}}\n",
        "sweep a list": "sweep: [1]\n",
        "sweep a word": "sweep: x\n",
        "axis a word": grid % "train.seed: x",
        "axis empty": grid % "train.seed: []",
        "axis null": grid % "train.seed: null",
        "axis of axes": grid % "sweep.seeds: [1, 2]",
        "axis of names": grid % "name: [a, b]",
        "axis of sections": grid % "model: [{n_layer: 1}, 3, null]",
        "axis empty key": grid % "'': [1]",
        "axis long values": grid % f"model.norm: [{'v' * 100_000}, {'w' * 100_000}]",
        "axis of lists": grid % "optimizer.betas: [[0.9, 0.95], [1, 2, 3], x]",
        "axis dots": grid % "'model..n_layer': [1]",
        "exclude all": "sweep: {grid: {train.seed: [1]}, exclude: [{train.seed: 1}]}\n",
        "exclude nothing": "sweep: {exclude: [{}]}\n",
        "exclude a word": "sweep: {exclude: [x]}\n",
        "when cycle": grid
        % "train.seed: {values: [1, 2], when: {train.data_seed: 1}}, train.data_seed: {values: [1, 2], when: {train.seed: 1}}",
        "search huge": "sweep: {search: {method: tpe, trials: 1000000000, over: {optimizer.learning_rate: {log: [1e-4, 1e-2]}}}}\n",
        "search wide": "sweep: {search: {method: random, trials: 5, over: {train.seed: {range: [0, 1e9, 1]}}}}\n",
        "search of nothing": "sweep: {search: {method: tpe, trials: 3, over: {}}}\n",
        "search words": "sweep: {search: x, stop: y, tune: {a: 1}, objective: [z]}\n",
        "search many": "sweep: {grid: {train.data_seed: {range: [0, 5000, 1]}}, search: {method: tpe, trials: 10000, over: {optimizer.learning_rate: {log: [1e-4, 1e-2]}}}}\n",
        "search infinite": "sweep: {search: {method: tpe, trials: 4, over: {optimizer.learning_rate: {log: [1e-4, .inf]}}}}\n",
        "slices a list": "slices: [1, 2]\n",
        "slices a word": "slices: {a: x, b: null, c: 3}\n",
        "pattern open": 'slices: {a: {match: "h.*.attn.qkv[q", lr_scale: 2.0}}\n',
        "pattern range": 'slices: {a: {match: "h.{0..999999999999}.attn.qkv", lr_scale: 2.0}}\n',
        "pattern backwards": 'slices: {a: {match: "h.{9..0}.attn.qkv", lr_scale: 2.0}}\n',
        "pattern stars": f'slices: {{a: {{match: "{"*." * 2000}x", lr_scale: 2.0}}}}\n',
        "pattern double stars": f'slices: {{a: {{match: "{"**." * 40}x", lr_scale: 2.0}}}}\n',
        "pattern starred word": f'slices: {{a: {{match: "h.{"*a" * 40}b", lr_scale: 2.0}}}}\n',
        "pattern brackets": f'slices: {{a: {{match: "h.*.attn.qkv{"[" * 2000}", lr_scale: 2.0}}}}\n',
        "pattern long": f'slices: {{a: {{match: "{"x" * 200_000}", lr_scale: 2.0}}}}\n',
        "pattern list": "slices: {a: {match: [1, null, [x]], lr_scale: 2.0}}\n",
        "pattern special": 'slices: {a: {match: "h.(.*)+$|^\\\\", lr_scale: 2.0}}\n',
        "depth": 'slices: {a: {match: "h.**", lr_scale: {depth: [0, -1, 2]}}}\n',
        "depth infinite": 'slices: {a: {match: "h.**", lr_scale: {depth: [1e-300, 1e300]}}}\n',
        "lora huge": 'slices: {a: {match: "h.*.attn.qkv", lora: {rank: 1000000000000}}}\n',
        "sites a list": "model: {sites: [1]}\n",
        "sites of nothing": 'model: {sites: {a: {match: "nothing", linear: pkl}}}\n',
        "site of everything": 'model: {sites: {a: {match: "**", linear: pkl}}}\n',
        "plugins a word": "plugins: x\n",
        "plugins missing": "plugins: [nothing.py]\n",
        "plugins a folder": "plugins: [.]\n",
        "plugins numbers": "plugins: [1]\n",
        "base of itself": "train: {init_from: x.yaml}\n",
        "base missing": "train: {init_from: nothing}\n",
        "base a folder": "train: {init_from: .}\n",
        "base a mapping": "train: {init_from: {a: 1}}\n",
        "base a hub's": 'train: {init_from: "hf:nothing"}\n',
        "dataset path": "data: {dataset: ../../etc}\n",
        "dataset absolute": "data: {dataset: /etc}\n",
        "root a file": "data: {root: /etc/passwd}\n",
        "root missing": "data: {root: nothing}\n",
        "dataset a list": "data: {dataset: [a]}\n",
        "run": "run: {run_id: x}\n",
        "json": '{"name": "x",\n\t"model": {"n_layer": 1}}\n',
        "windows": "name: x\r\nmodel:\r\n  n_layer: x\r\n",
        "bom": "\ufeffname: x\nmodl: 1\n",
        "old mac": "name: x\rmodl: 1\r",
        "line separators": "name: x\u2028modl: 1\u2029\n",
        "spaces": "name:\u00a0x\nmodel:\u3000y\n",
        "tabs": "model:\n\tn_layer: 1\n",
        "block text": "model: |\n  n_layer: 1\n",
    }
    yield from made.items()


def cases(count: int, seed: int = 20260101) -> dict[str, bytes]:
    """`count` files by name: those built to be wrong, then mutations of real ones, one to three at a time."""
    made = {
        f"built: {name}": content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        for name, content in built()
    }
    draw, files = random.Random(seed), originals()
    names = list(files)
    while len(made) < count:
        name = names[len(made) % len(names)]
        text: str | bytes = files[name]
        words = []
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            change = draw.choice(CHANGES)
            if isinstance(text, bytes) or not text:
                break
            words.append(change.__name__)
            text = change(text, draw)
        made[f"{name} {len(made)}: {', '.join(words)}"] = (
            text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        )
    return made


# The process that tries them ------------------------------------------------------------------------------------------------


def limited(seconds: int) -> None:
    """Limits on this process, which has one case to try."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(WALL)


def tried(folder: Path, act: Callable[[list[str]], int], seconds: int = SECONDS) -> dict[str, object]:
    """How listing the file in `folder` ends in a fork: exit code or signal, what it printed, what it used, what it left."""
    before = sorted(map(str, folder.rglob("*")))
    child = os.fork()
    if child == 0:
        code = 99
        try:
            limited(seconds)
            os.chdir(folder)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder.parent / f"{folder.name}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = act(["--config", FILE, "--dry-run"])
        except BaseException:  # whatever it is, it is no sentence
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    started = time.perf_counter()
    _, status, used = os.wait4(child, 0)
    texts = {name: folder.parent / f"{folder.name}.{name}" for name in ("out", "err")}
    made = {name: path.read_text("utf-8", "backslashreplace") if path.exists() else "" for name, path in texts.items()}
    return {
        "name": folder.name,
        "code": os.waitstatus_to_exitcode(status),
        "cpu": round(used.ru_utime + used.ru_stime, 3),
        "wall": round(time.perf_counter() - started, 3),
        "left": [path for path in sorted(map(str, folder.rglob("*"))) if path not in before],
        **made,
    }


def main(folder: Path) -> None:
    """Tries every case below `folder`: each in a folder of its own, with the corpora in FOLDER/data."""
    sys.path.insert(0, str(ROOT))
    import torch

    import lab.listing
    import train

    torch.set_num_threads(1)
    vars(lab.listing)["DATA"] = folder / "data"
    train.main(["--config", str(folder / "warm" / FILE), "--dry-run"])  # whatever is imported late is imported once
    for case in sorted(path for path in (folder / "cases").iterdir() if path.is_dir()):
        print(f"\n{json.dumps(tried(case, train.main))}", flush=True)
    for act in (greedy, endless):
        (folder / act.__name__).mkdir()
        print(f"\n{json.dumps(tried(folder / act.__name__, act, 1))}", flush=True)


def greedy(words: list[str]) -> int:
    """Takes more memory than a case may."""
    return len(bytearray(MEMORY))


def endless(words: list[str]) -> int:
    while True:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
