"""Rules through the front door: what is refused and in which words, and what --slices shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Desk

Front = Callable[..., tuple[int, str, str]]

TINY = "model: {n_layer: 2, n_embd: 16, n_head: 2}\nslices:\n"  # so that the first rule is on line 3
Q = "h.*.attn.qkv"


def refused(desk: Desk, front: Front, text: str, *words: str) -> list[str]:
    """The sentences about a file, of which nothing was started and nothing lies on disk."""
    file = desk.write(text)
    before = sorted(desk.folder.rglob("*"))
    code, out, told = front("--config", str(file), *words)
    assert (code, out) == (2, "") and "Traceback" not in told and desk.nothing_made()
    assert sorted(desk.folder.rglob("*")) == before
    lines = told.splitlines()
    for line in lines:
        assert re.fullmatch(r"\S+: \S.*? \((\S+:\d+|command line)\)\.( [A-Z].*[.])?", line), line
        assert not re.search(r"None|Ellipsis|<class|object at|\btuple\b|\bdict\b|\.\.$|  ", line), line
    return lines


# One rule, one mistake: what it says after its name, then where the sentence stands below the rule and words of it --------------

TIED_LOOKUP = ["wte.weight, which is also head.weight, is looked up", "the weight of linear maps alone"]
WRONG: list[tuple[str, str, list[str]]] = [
    # Places and parts
    (f'match: "{Q}[z]", lr_scale: 1', "match", [f"'{Q}[z]'", "there is no part 'z' there", "Known: k, q, v."]),
    (f'match: "{Q}[q,vv]", lr_scale: 1', "match", ["no part 'vv'", "Did you mean 'v'?"]),
    (f'match: ["{Q}[q]", "{Q}[q,k,qk]"], lr_scale: 1', "match", [f"'{Q}[q,k,qk]'", "no part 'qk'"]),
    ('match: "h.*.mlp.up[gate]", lr_scale: 1', "match", ["no part 'gate'", "It has no parts."]),
    ('match: "h.*.atn.qkv[q]", lr_scale: 1', "match", ["matches nothing", f"Did you mean '{Q}[q]'?", "Known: "]),
    ('match: "h.7.attn.qkv", lr_scale: 1', "match", ["matches nothing", "The layers are 0 to "]),
    ('match: lm_head, lr_scale: 1', "match", ["matches nothing", "Did you mean 'head'?"]),
    (f'match: "{Q}.bais", lr_scale: 1', "match", ["matches nothing", f"Did you mean '{Q}.bias[q,k,v]'?"]),
    ('match: ["h.**", "wte", "h.*.ln1"], lr_scale: 1', "match", ["'h.*.ln1' matches nothing", "Did you mean 'h.*.ln_1'?"]),
    ('match: "h.*", lr_scale: 1', "match", ["'h.*' matches nothing"]),
    (f'match: "{Q}[q", lr_scale: 1', "match", [f"'{Q}[q'", "bracket", "does not open and close"]),
    (f'match: "{Q}]q[", lr_scale: 1', "match", ["bracket"]),
    (f'match: "{Q}[q]x", lr_scale: 1', "match", [f"'{Q}[q]x'", "bracket"]),
    ('match: "h.[01].attn.qkv", lr_scale: 1', "match", ["bracket"]),
    (f'match: "{Q}[q,]", lr_scale: 1', "match", ["a part without a name"]),
    ('match: "h.{0..3.attn", lr_scale: 1', "match", ["'h.{0..3.attn'", "a brace that does not close"]),
    ('match: "h.{3..0}.attn", lr_scale: 1', "match", ["'{3..0}' is not a range of numbers such as {0..5}"]),
    ('match: "", lr_scale: 1', "match", ["a rule needs a pattern"]),
    ("match: [], lr_scale: 1", "match", ["a rule needs a pattern"]),
    ("lr_scale: 1", "match", ["a rule needs a pattern"]),
    ("match: null, lr_scale: 1", "match", ["null (off) is not possible here"]),
    ("match: 3, lr_scale: 1", "match", ["3 is not text or a list"]),
    (f'match: "{Q}", except: "h.5.**", lr_scale: 1', "except", ["'h.5.**' matches nothing"]),
    (f'match: "{Q}", except: "{Q}[w]", lr_scale: 1', "except", ["no part 'w'", "Known: k, q, v."]),
    (f'match: "{Q}", except: ["wte", "h.**"], lr_scale: 1', "except", ["nothing is left of what 'match' finds"]),
    # Fields
    (f'match: "{Q}"', "", ["the rule sets nothing; it may set lr_scale, learning_rate, weight_decay, optimizer"]),
    ("", "match", ["a rule needs a pattern"]),
    (f'match: "{Q}", lr_scal: 1', "lr_scal", ["unknown key", "Did you mean 'lr_scale'?"]),
    (f'match: "{Q}", exept: wte, lr_scale: 1', "exept", ["unknown key", "Did you mean 'except'?"]),
    (f'match: "{Q}", optimiser: sgd', "optimiser", ["unknown key", "Did you mean 'optimizer'?"]),
    (f'match: "{Q}", lr_scale: -1', "lr_scale", ["-1.0 is not >= 0"]),
    (f'match: "{Q}", lr_scale: .nan', "lr_scale", ["nan is not a finite number"]),
    (f'match: "{Q}", lr_scale: .inf', "lr_scale", ["inf is not a finite number"]),
    (f'match: "{Q}", lr_scale: fast', "lr_scale", ["'fast' is not a number"]),
    (f'match: "{Q}", lr_scale: true', "lr_scale", ["True is not a number"]),
    (f'match: "{Q}", lr_scale: null', "lr_scale", ["null (off) is not possible here", "Leave it out to say nothing."]),
    (f'match: "{Q}", frozen: null', "frozen", ["null (off) is not possible here"]),
    (f'match: "{Q}", frozen: 1', "frozen", ["1 is not true or false"]),
    (f'match: "{Q}", weight_decay: null', "weight_decay", ["null (off) is not possible here"]),
    (f'match: "{Q}", weight_decay: -0.1', "weight_decay", ["-0.1 is not >= 0"]),
    (f'match: "{Q}", learning_rate: -1e-3', "learning_rate", ["-0.001 is not >= 0"]),
    (f'match: "{Q}", optional: maybe, lr_scale: 1', "optional", ["'maybe' is not true or false"]),
    # Depth
    ('match: "h.**", lr_scale: {depth: [1.0]}', "lr_scale.depth", ["[1.0] is not two numbers above 0"]),
    ('match: "h.**", lr_scale: {depth: [1, 2, 3]}', "lr_scale.depth", ["is not two numbers above 0"]),
    ('match: "h.**", weight_decay: {depth: [0, 1]}', "weight_decay.depth", ["[0.0, 1.0] is not two numbers above 0"]),
    ('match: "h.**", lr_scale: {depth: 1}', "lr_scale.depth", ["1 is not a list"]),
    ('match: "h.**", lr_scale: {depht: [1, 2]}', "lr_scale.depht", ["unknown key", "Did you mean 'depth'?"]),
    ('match: "**", lr_scale: {depth: [1, 2]}', "lr_scale", ["wte.weight lies in no layer", "Match layers alone"]),
    ('match: ["h.**", "ln_f"], learning_rate: {depth: [1, 2]}', "learning_rate", ["ln_f.weight lies in no layer"]),
    # Optimizers and inits
    (f'match: "{Q}", optimizer: adam', "optimizer", ["no variant 'adam'", "Did you mean 'adamw'?"]),
    (f'match: "{Q}", optimizer: null', "optimizer", ["null (off) is not possible here"]),
    ('match: "**.bias", optimizer: muon', "optimizer", ["muon can take none of what the rule matches"]),
    ('match: "h.*.ln_*", optimizer: muon', "optimizer", ["muon can take none of what the rule matches"]),
    (f'match: "{Q}", optimizer: {{variant: muon, betas: [0.9, 0.9]}}', "optimizer.betas", ["unknown key"]),
    (f'match: "{Q}", optimizer: {{variant: muon, rest: muon}}', "optimizer.rest", ["need another optimizer than muon"]),
    (f'match: "{Q}", optimizer: muon, betas: [0.9, 0.9]', "betas", ["has no betas"]),
    (f'match: "{Q}", optimizer: sgd, betas: [0.9, 0.9]', "betas", ["has no betas"]),
    (f'match: "{Q}", betas: [0.9]', "betas", ["[0.9] is not two numbers"]),
    (f'match: "{Q}", betas: [0.9, 1.0]', "betas", ["1.0 is not < 1.0"]),
    (f'match: "{Q}", init: nromal', "init", ["no variant 'nromal'", "Did you mean 'normal'?"]),
    (f'match: "{Q}", init: {{std: -1}}', "init.std", ["-1.0 is not >= 0"]),
    (f'match: "{Q}", init: {{variant: zeros, std: 1}}', "init.std", ["unknown key"]),
    (f'match: "{Q}", init: null', "init", ["null (off) is not possible here"]),
    # LoRA
    (f'match: "{Q}", lora: {{rank: 17}}', "lora.rank", ["17 is more than 16, the smaller side of h.0.attn.qkv.weight "]),
    (f'match: "{Q}[v]", lora: {{rank: 17}}', "lora.rank", ["17 is more than 16", "h.0.attn.qkv.weight[v] "]),
    (f'match: "{Q}", lora: {{rank: 0}}', "lora.rank", ["0 is not >= 1"]),
    (f'match: "{Q}", lora: {{rank: -3}}', "lora.rank", ["-3 is not >= 1"]),
    (f'match: "{Q}", lora: {{rnk: 3}}', "lora.rnk", ["unknown key", "Did you mean 'rank'?"]),
    (f'match: "{Q}", lora: {{rank: 2, alpha: 0}}', "lora.alpha", ["0.0 is not > 0"]),
    (f'match: "{Q}", lora: lroa', "lora", ["no variant 'lroa'", "Did you mean 'lora'?"]),
    (f'match: "{Q}", lora: true', "lora", ["True is not possible here"]),
    ("match: wpe, lora: {rank: 1}", "lora", ["wpe.weight is looked up by an embedding"]),
    ("match: wte, lora: {rank: 1}", "lora", TIED_LOOKUP),
    ("match: head, lora: {rank: 1}", "lora", TIED_LOOKUP),
    ('match: "h.*.ln_1", lora: {rank: 1}', "lora", ["none of what the rule matches is a linear map"]),
    ('match: "**.bias", lora: {rank: 1}', "lora", ["none of what the rule matches is a linear map"]),
    (f'match: "{Q}[q].lora_a", lr_scale: 2', "match", ["matches nothing", "No rule gives a weight an adapter"]),
    ('match: "**.lora_*", frozen: true', "match", ["matches nothing", "No rule gives a weight an adapter"]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "where", "words"), WRONG, ids=[rule for rule, _, _ in WRONG])
def test_a_rule_that_cannot_hold_is_refused_with_its_name_and_line(
    desk: Desk, front: Front, rule: str, where: str, words: list[str]
) -> None:
    (told,) = refused(desk, front, f"{TINY}  calm_keys: {{{rule}}}")
    path = "slices.calm_keys" + (f".{where}" if where else "")
    assert told.startswith(f"{path}: ") and " (x.yaml:3)." in told
    assert [word for word in words if word not in told] == []


@pytest.mark.parametrize(
    "flags", [["--slices"], ["--slices", "--json"], ["--dry-run"], ["--dry-run", "--json"], ["--yes"]]
)
def test_what_only_looks_refuses_it_too(desk: Desk, front: Front, flags: list[str]) -> None:
    (told,) = refused(desk, front, f'{TINY}  x: {{match: "{Q}[z]", lr_scale: 1}}', *flags)
    assert told == f"slices.x.match: '{Q}[z]': there is no part 'z' there (x.yaml:3). Known: k, q, v."


@pytest.mark.parametrize("given", ["3", "wte", "[{match: wte, frozen: true}]", "true"])
def test_what_is_no_rule_at_all(desk: Desk, front: Front, given: str) -> None:
    (told,) = refused(desk, front, f"{TINY}  x: {given}")
    assert told.startswith("slices.x: ") and "is not a mapping (x.yaml:3)." in told


# Rules with one another -------------------------------------------------------------------------------------------------------


def both(*rules: str, base: str = TINY) -> str:
    return base + "".join(f"  {name}: {{{rule}}}\n" for name, rule in zip("abc", rules, strict=False))


CLASHES: list[tuple[list[str], str]] = [
    (["match: wte, lr_scale: 0.5", "match: head, lr_scale: 0.1"], "lr_scale"),
    (["match: head, weight_decay: 0.5", "match: wte, weight_decay: 0.1"], "weight_decay"),
    (["match: wte, init: zeros", "match: head, init: ones"], "init"),
    (["match: wte, frozen: true", "match: head, frozen: false"], "frozen"),
    (["match: [wte, wpe, head], except: head, lr_scale: 2", "match: head, lr_scale: 3"], "lr_scale"),
    (["match: wte, optimizer: sgd", "match: head, optimizer: lion"], "optimizer"),
]


@pytest.mark.parametrize(("rules", "field"), CLASHES)
def test_rules_that_contradict_each_other_about_a_tied_weight(
    desk: Desk, front: Front, rules: list[str], field: str
) -> None:
    (told,) = refused(desk, front, both(*rules))
    found = re.fullmatch(r"slices\.([ab])\.(\w+): (.*) \(x\.yaml:(\d)\)\. (.*)", told)
    assert found is not None and found.group(2) == field
    one = found.group(1)
    assert int(found.group(4)) == {"a": 3, "b": 4}[one]
    assert f"wte.weight and head.weight are one tied weight, and rule '{'ab'[one == 'a']}'" in found.group(3)
    assert found.group(5) == "Say it under one of the names, or set model.tie_weights: false."
    desk.write(both(*rules).replace("n_head: 2", "n_head: 2, tie_weights: false"))
    assert front("--config", "x.yaml", "--dry-run")[0] == 0, "the advice helps"


HIDDEN = [
    ("learning_rate", "0.01", "{variant: muon, learning_rate: 0.1}"),
    ("weight_decay", "0.01", "{variant: adamw, weight_decay: 0.3}"),
    ("betas", "[0.8, 0.9]", "{variant: adamw, betas: [0.7, 0.8]}"),
]


@pytest.mark.parametrize(("name", "early", "late"), HIDDEN)
def test_an_earlier_number_may_not_hide_a_later_optimizers_own(
    desk: Desk, front: Front, name: str, early: str, late: str
) -> None:
    rules = [f'match: "{Q}", {name}: {early}', f'match: "{Q}[k]", optimizer: {late}']
    (told,) = refused(desk, front, both(*rules))
    assert told.startswith("slices.b.optimizer: ") and f"rule 'a' has set {name} of h.0.attn.qkv.weight[k]" in told
    assert told.endswith(f"(x.yaml:4). Say {name} in this rule, beside the optimizer.")
    mended = [rules[0], f"{rules[1]}, {name}: {re.search(rf'{name}: ([^}}]+)}}', late).group(1)}"]  # type: ignore[union-attr]
    desk.write(both(*mended))
    assert front("--config", "x.yaml", "--dry-run")[0] == 0, "the advice helps"


@pytest.mark.parametrize("match", ['"**"', '["wte", "wpe", "ln_f.**", "h.**"]'])
def test_nothing_to_train_is_refused(desk: Desk, front: Front, match: str) -> None:
    (told,) = refused(desk, front, f"{TINY}  x: {{match: {match}, frozen: true}}")
    assert told.startswith("slices: every slice is frozen, so that nothing would train (x.yaml:")


def test_with_an_adapter_there_is_something_to_train(desk: Desk, front: Front) -> None:
    rules = ["match: '**', frozen: true", f"match: '{Q}[q]', lora: {{rank: 1}}"]
    desk.write(both(*rules))
    assert front("--config", "x.yaml", "--dry-run")[0] == 0
    (told,) = refused(desk, front, both(*rules, "match: '**.lora_*', frozen: true"))
    assert "every slice is frozen" in told


LORA = f"match: '{Q}[q,v]', lora: {{rank: 2}}"


@pytest.mark.parametrize(
    ("match", "words"),
    [
        (f"{Q}[k].lora_a", ["there is no part 'k' there", "Known: q, v."]),
        (
            f"{Q}[q].lora_c",
            ["matches nothing", "Did you mean 'h.*.attn.qkv.lora_", "Known: h.*.attn.qkv.lora_a[q,v], "],
        ),
        ("h.*.attn.proj.lora_a", ["matches nothing", "Known: h.*.attn.qkv.lora_a[q,v], h.*.attn.qkv.lora_b[q,v]."]),
    ],
)
def test_adapters_that_are_not_there(desk: Desk, front: Front, match: str, words: list[str]) -> None:
    (told,) = refused(desk, front, both(LORA, f"match: '{match}', lr_scale: 2"))
    assert told.startswith("slices.b.match: ") and "(x.yaml:4)" in told and all(word in told for word in words)


@pytest.mark.parametrize("match", ["[a]", "[b.q]", "[a.q, b.q, a.k]"])
def test_an_adapter_on_one_number_of_a_pkl_weight_is_refused(desk: Desk, front: Front, match: str) -> None:
    text = both(f'match: "{Q}{match}", lora: {{rank: 2}}', base=TINY.replace("n_head: 2", "n_head: 2, linear: pkl"))
    (told,) = refused(desk, front, text)
    assert told.startswith("slices.a.lora: h.0.attn.qkv.weight[") and "one number of a weight that has 2" in told
    desk.write(text.replace(match, "[q]"))
    assert front("--config", "x.yaml", "--dry-run")[0] == 0


def test_nested_parts_have_their_nearest_names(desk: Desk, front: Front) -> None:
    pkl = TINY.replace("n_head: 2", "n_head: 2, linear: pkl")
    (told,) = refused(desk, front, both(f'match: "{Q}[c.q]", lr_scale: 2', base=pkl))
    assert (
        "no part 'c.q'" in told and told.endswith("Known: a.k, a.q, a.v, b.k, b.q, b.v.") and "Did you mean '" in told
    )


# Many mistakes, and their places --------------------------------------------------------------------------------------------


def test_every_mistake_of_reading_is_told_at_once(desk: Desk, front: Front) -> None:
    told = refused(
        desk,
        front,
        """
        modl: 3
        slices:
          a: {match: x}
          b:
            match: "h.**"
            lr_scale: -1
            frozen: 3
          c: {match: ["wte[", "h.{5..1}.x"], except: "[q]", lr_scale: 2}
          d: {match: "h.**", lora: {rank: 0}, init: nothing}
        train: {batch_size: 0}
        """,
    )
    heads = [re.match(r"(\S+): .*? \(x\.yaml:(\d+)\)\.", line) for line in told]
    assert sorted((h.group(1), int(h.group(2))) for h in heads if h) == [
        ("modl", 1), ("slices.a", 3), ("slices.b.frozen", 7), ("slices.b.lr_scale", 6), ("slices.c.except", 8),
        ("slices.c.match", 8), ("slices.c.match", 8), ("slices.d.init", 9), ("slices.d.lora.rank", 9), ("train.batch_size", 10),
    ]  # fmt: skip


def test_every_mistake_about_the_model_is_told_at_once(desk: Desk, front: Front) -> None:
    told = refused(
        desk,
        front,
        """
        slices:
          a: {match: [x, "wte[q]"], lr_scale: 2}
          b: {match: "h.*.attn.qkv[z,y]", lr_scale: 2}
          c: {match: [wte, "h.**"], lr_scale: {depth: [1, 2]}}
          d: {match: "**.bias", optimizer: muon}
          e: {match: wpe, weight_decay: 1}
        train: {batch_size: 0}
        """,
    )
    heads = [re.match(r"(\S+): .*? \(x\.yaml:(\d+)\)\.", line) for line in told]
    assert sorted((h.group(1), int(h.group(2))) for h in heads if h) == [
        ("slices.a.match", 2), ("slices.a.match", 2), ("slices.b.match", 3), ("slices.b.match", 3), ("slices.c.lr_scale", 4),
        ("slices.d.optimizer", 5), ("train.batch_size", 7),
    ]  # fmt: skip


def test_all_adapters_that_cannot_be_are_told_at_once(desk: Desk, front: Front) -> None:
    rules = [f"match: '{Q}', lora: {{rank: 40}}", "match: wpe, lora: {rank: 1}", "match: '**.ln_*', lora: {rank: 1}"]
    told = refused(desk, front, both(*rules))
    assert sorted(line.partition(":")[0] for line in told) == ["slices.a.lora.rank", "slices.b.lora", "slices.c.lora"]


def test_a_mistake_in_one_cell_is_told_at_the_axis(desk: Desk, front: Front) -> None:
    told = refused(
        desk,
        front,
        """
        model: {n_layer: 2, n_embd: 16, n_head: 2}
        slices:
          k: {match: "**[k]", lr_scale: 1}
        sweep:
          grid:
            slices.k.match:
              - "**[k]"
              - "**[w]"
            slices.k.lr_scale: [1,
              -1]
            slices.k.lora: [null, {rank: 2}]
          cases:
            fine: {}
            bad:
              set:
                slices.k.except: "h.9.**"
          groups:
            g:
              none: {}
              some: {slices.l.match: wte,
                slices.l.lora: {rank: -2}}
        """,
    )
    heads = [re.match(r"(\S+): .*? \(x\.yaml:(\d+)\)\.", line) for line in told]
    assert {(h.group(1), int(h.group(2))) for h in heads if h} == {
        ("slices.k.match", 6), ("slices.k.lr_scale", 9), ("slices.k.except", 16), ("slices.l.lora.rank", 21)
    }  # fmt: skip


def test_a_rank_that_is_too_large_in_one_cell(desk: Desk, front: Front) -> None:
    text = f"{TINY}  k: {{match: '**[k]', lr_scale: 1}}\nsweep:\n  grid: {{slices.k.lora: [null, {{rank: 2}}, {{rank: 99}}]}}"
    (told,) = refused(desk, front, text)
    assert told.startswith("slices.k.lora.rank: 99 is more than 16") and "(x.yaml:5)" in told


def test_the_command_line_is_a_place_too(desk: Desk, front: Front) -> None:
    text = f"{TINY}  k: {{match: '**[k]', lr_scale: 1}}"
    (told,) = refused(desk, front, text, "slices.k.lr_scale=0.1,-0.3")
    assert told.startswith("slices.k.lr_scale: -0.3 is not >= 0") and "(command line)" in told
    (told,) = refused(desk, front, text, 'slices.k.match="h.*.attn.qkv[kk]"')
    assert "no part 'kk'" in told and "(command line)" in told and "Did you mean 'k'?" in told
    code, _, complaint = front("--config", "x.yaml", "slices.k.match=**[kk]")
    assert code == 2 and "quote text with special characters" in complaint


def test_a_mistake_of_a_preset_is_placed_there(desk: Desk, front: Front) -> None:
    desk.preset("calm", "slices:\n  k: {match: '**[kk]', lr_scale: 1}")
    (told,) = refused(desk, front, "defaults: [presets/calm, _self_]\nslices: {k: {lr_scale: 3}}")
    assert told.startswith("slices.k.match: ") and "calm.yaml:3)" in told


PLUGIN = """
from variations.linear import LINEARS
from variations.linear.standard import Linear

class Odd(Linear):
    def __init__(self, options, site, *, parts=(), **shape):
        super().__init__(options, site, parts=tuple((n, s + (n == "WHICH")) for n, s in parts), **shape)

LINEARS["odd"] = Odd
"""


@pytest.mark.usefixtures("catalogue")
@pytest.mark.parametrize(("which", "part"), [("q", "v"), ("k", "v"), ("v", "v")])
def test_parts_that_do_not_add_up_are_told_with_their_names(desk: Desk, front: Front, which: str, part: str) -> None:
    desk.write(PLUGIN.replace("WHICH", which), "odd.py")
    (told,) = refused(desk, front, "plugins: [odd.py]\nmodel: {n_embd: 16, n_head: 2,\n  linear: odd}")
    sizes = " + ".join(f"{n} {17 if n == which else 16}" for n in "qkv")
    assert told.startswith("model.linear: at 'h.0.attn.qkv': ") and "(x.yaml:3)" in told
    assert f"({sizes}) x 1 do not add up to 48: part '{part}' would end at row 49" in told


# What --slices shows ------------------------------------------------------------------------------------------------------------

KEYS = ["address", "shape", "parameters", "lr_scale", "weight_decay", "optimizer", "init", "lora", "frozen", "rules"]
SHOWN = """
    model: {n_layer: 2, n_embd: 16, n_head: 2, init: {std: 0.5}}
    optimizer: {learning_rate: 0.25, weight_decay: 0.5}
    slices:
      base: {match: "**", frozen: true}
      keys: {match: "h.*.attn.qkv[k]", lr_scale: 0.5, frozen: false, weight_decay: 0}
      deep: {match: "h.**", lr_scale: {depth: [1.0, 4.0]}}
      adapt: {match: "h.1.attn.qkv[q,v]", lora: {rank: 2, alpha: 4}}
      b: {match: "**.lora_b", learning_rate: 2.0, init: {std: 0.125}, optimizer: {variant: sgd}}
      embedding: {match: head, init: zeros, weight_decay: 0.75}
"""


def test_slices_as_json_has_the_keys_of_the_contract_and_the_rules_values(desk: Desk, front: Front) -> None:
    code, out, told = front("--config", str(desk.write(SHOWN)), "--slices", "--json")
    assert (code, told) == (0, "") and desk.nothing_made()
    listed = json.loads(out)
    assert all(list(row) == KEYS for row in listed)
    rows = {row["address"]: {k: v for k, v in row.items() if k != "address"} for row in listed}
    lora = {"variant": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0, "rslora": False}
    usual: dict[str, Any] = {
        "shape": [16, 16], "parameters": 256, "lr_scale": 1.0, "weight_decay": 0.5, "optimizer": "adamw",
        "init": "normal(std=0.5)", "lora": None, "frozen": True,
    }  # fmt: skip
    expected: dict[str, dict[str, Any]] = {
        "wte.weight": {"shape": [256, 16], "parameters": 4096, "weight_decay": 0.75, "init": "zeros"},
        "h.0.attn.qkv.weight[q]": {},
        "h.0.attn.qkv.weight[k]": {"lr_scale": 0.5, "weight_decay": 0.0, "frozen": False},
        "h.1.attn.qkv.weight[k]": {"lr_scale": 2.0, "weight_decay": 0.0, "frozen": False},
        "h.1.attn.qkv.weight[v]": {"lr_scale": 4.0, "lora": lora},
        "h.1.attn.qkv.bias[v]": {"shape": [16], "parameters": 16, "lr_scale": 4.0, "weight_decay": 0.0, "init": "zeros"},
        "h.1.attn.qkv[v].lora_b": {"shape": [16, 2], "parameters": 32, "frozen": False, "optimizer": "sgd",
                                   "weight_decay": 0.0, "init": "normal(std=0.125)"},
        "h.1.mlp.up.weight": {"shape": [64, 16], "parameters": 1024, "lr_scale": 4.0},
        "ln_f.bias": {"shape": [16], "parameters": 16, "weight_decay": 0.0, "init": "zeros"},
    }  # fmt: skip
    for address, what in expected.items():
        assert {k: v for k, v in rows[address].items() if k != "rules"} == {**usual, **what}, address
    rules = {address: sorted(rows[address]["rules"]) for address in expected}
    assert rules == {
        "wte.weight": ["base", "embedding"], "h.0.attn.qkv.weight[q]": ["base", "deep"],
        "h.0.attn.qkv.weight[k]": ["deep", "keys"], "h.1.attn.qkv.weight[k]": ["deep", "keys"],
        "h.1.attn.qkv.weight[v]": ["adapt", "base", "deep"],
        "h.1.attn.qkv.bias[v]": ["base", "deep", "default.no_decay_on_vectors"], "h.1.attn.qkv[v].lora_b": ["b"],
        "h.1.mlp.up.weight": ["base", "deep"], "ln_f.bias": ["base", "default.no_decay_on_vectors"],
    }  # fmt: skip
    assert len(rows) == len(listed) == 36 + 4 and "head.weight" not in rows


def test_slices_in_words_shows_each_value_with_the_rules_that_made_it(desk: Desk, front: Front) -> None:
    code, out, _ = front("--config", str(desk.write(SHOWN)), "--slices")
    head, *lines, last = out.splitlines()
    assert code == 0 and head.split() == [*KEYS[:3], "learning_rate", *KEYS[3:]]
    at = {name: found.start() for name in head.split() if (found := re.search(rf"\b{name}\b", head))}
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        ends = [*sorted(at.values())[1:], len(line)]
        cells[line.split()[0]] = {
            n: line[a:b].strip() for (n, a), b in zip(sorted(at.items(), key=lambda x: x[1]), ends, strict=True)
        }
    k = cells["h.1.attn.qkv.weight[k]"]
    assert (k["learning_rate"], k["lr_scale"], k["weight_decay"], k["frozen"]) == ("0.5", "2", "0", "")
    assert set(k["rules"].split("; ")) == {"frozen: keys", "lr_scale: keys x deep", "weight_decay: keys"}
    v = cells["h.1.attn.qkv.weight[v]"]
    assert (v["shape"], v["parameters"], v["frozen"]) == ("16 x 16", "256", "yes") and v["lora"].startswith(
        "lora(rank=2, alpha=4.0"
    )
    assert cells["h.1.attn.qkv[q].lora_b"]["learning_rate"] == "2" and cells["wte.weight"]["parameters"] == "4,096"
    json_rows = json.loads(front("--config", "x.yaml", "--slices", "--json")[1])
    total = sum(row["parameters"] for row in json_rows)
    trained = sum(row["parameters"] for row in json_rows if not row["frozen"])
    assert last == f"{len(lines)} slices, {total:,} parameters, {trained:,} of them trained"
    assert trained == 2 * 256 + 2 * 2 * (2 * 16), "the keys of two layers, and two pairs of A and B"


def test_slices_without_rules_names_the_default_treatment(desk: Desk, front: Front) -> None:
    muon = "model: {n_layer: 1, n_embd: 16, n_head: 2, linear: {variant: pkl, scale: 3.0, compensate_step: true}}\noptimizer: muon"
    code, out, _ = front("--config", str(desk.write(muon)), "--slices")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and "lora" not in lines["address"] and "frozen" not in lines["address"], "columns that say nothing"
    assert lines["h.0.attn.qkv.weight[a.k]"].endswith("lr_scale: default.pkl_step")
    assert " 0.25 " in lines["h.0.attn.qkv.weight[a.k]"] and " muon " in lines["h.0.attn.qkv.weight[a.k]"]
    assert lines["h.0.attn.qkv.bias[k]"].endswith("optimizer: default.rest; weight_decay: default.no_decay_on_vectors")
    assert lines["wte.weight"].endswith("optimizer: default.rest")
