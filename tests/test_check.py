"""Before the launch: what models cost, which are broken, and in what cells differ though nobody asked for it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from conftest import Desk

from engine.device import peak_memory
from lab import __main__ as lab_main
from lab import check, measure
from lab.likeness import Case, differences
from lab.plan import Slot
from model import assemble, fill
from train_args import with_vocabulary

Captured = pytest.CaptureFixture[str]
Checked = Callable[..., tuple[int, dict[str, Any]]]
BASE = """
    name: s
    model: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, bias: false}
    train: {max_iters: 50, batch_size: 2, eval_interval: 20, eval_iters: 2, eval_batch_size: 4, device: cpu}
    runner: {threads: 1}
    tracking: {wandb: {mode: off}}
    plugins: [extra.py]
"""
DEADLY = (
    runs.PLUGIN
    + """
class Deadly(GELU):
    \"\"\"Formula: none, it ends the process.\"\"\"
    def forward(self, x):
        print("noise", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
ACTIVATIONS["deadly"] = Deadly
"""
)


@pytest.fixture
def checked(desk: Desk, capsys: Captured, catalogue: None) -> Checked:
    """What --json says of a sweep over BASE, and the exit code. Nothing may be left behind."""
    (desk.folder / "extra.py").write_text(DEADLY)

    def run(sweep: str, *words: str) -> tuple[int, dict[str, Any]]:
        file = desk.write(f"{BASE}    {sweep}\n")
        before = sorted(desk.folder.rglob("*"))
        code = lab_main.main(["check", str(file), "--json", *words])
        out, err = capsys.readouterr()
        assert err == "" and sorted(desk.folder.rglob("*")) == before and desk.nothing_made()
        made: dict[str, Any] = json.loads(out)
        return code, made

    return run


def test_what_models_cost(checked: Checked, desk: Desk) -> None:
    code, made = checked(
        "sweep: {grid: {model.norm: [layernorm, rmsnorm], optimizer.learning_rate: [0.1, 0.2]}, seeds: 2}"
    )
    assert code == 0 and made["left_out"] == 0 and made["differences"] == []
    assert [(model["runs"], len(model["cells"])) for model in made["models"]] == [(4, 2), (4, 2)]
    for model, word in zip(made["models"], ("layernorm", "rmsnorm"), strict=True):
        # wte 256 x 32 (and head), wpe 16 x 32; a block: 12 x 32^2 and two gains; the last gain
        assert model["parameters"] == model["trainable_parameters"] == 272 * 32 + 2 * (12 * 1024 + 64) + 32
        assert model["flops_per_token"] == 6 * (2 * 12 * 1024 + 256 * 32) + 3 * 2 * 4 * 32 * 16
        assert 0 < model["peak_memory_bytes"] < model["process_memory_bytes"] and word in model["cells"][0]
        assert model["fits"] == model["free_memory_bytes"] // model["process_memory_bytes"]
        step, batch = model["seconds_per_step"], model["seconds_per_evaluation_batch"]
        # evaluations before the first update, after 20 and 40, and at the end, of 2 batches each
        assert model["seconds"] == pytest.approx(50 * step + 8 * batch)
    assert made["seconds"] > 0 and [slot["threads"] for slot in made["slots"]] == [1] * len(made["slots"])


def test_the_table(desk: Desk, capsys: Captured, catalogue: None) -> None:
    (desk.folder / "extra.py").write_text(runs.PLUGIN)
    file = desk.write(f"{BASE}    sweep: {{grid: {{model.mlp: [standard, {{variant: gated, width: 256}}]}}}}\n")
    assert lab_main.main(["check", str(file), "train.max_iters=40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "model",
        "cells",
        "parameters",
        "trained",
        "FLOPs/token",
        *["memory", "a", "step", "a", "run", "at", "a", "time"],
    ]
    assert lines[1].split()[:4] == ["mlp=standard", "1", "33.4k", "all"]
    assert lines[2].split()[:4] == ["mlp=gated(width=256)", "1", "66.2k", "all"]  # 16 x 32^2 more in each of 2 layers
    assert (
        lines[4]
        == "Cells with model.mlp=gated(width=256) have 1.98 times the parameters of 'mlp=standard' (66.2k against 33.4k)."
    )
    assert lines[-1].startswith("An estimate: 2 runs on ")
    assert lab_main.main(["check", str(file), "model.n_embd=no"]) == 2
    assert "model.n_embd" in capsys.readouterr().err


def test_what_is_asked_for_is_not_told(checked: Checked) -> None:
    code, made = checked(
        "sweep: {grid: {model.n_embd: [32, 64], model.init.std: [0.02, 0.05], optimizer: [adamw, muon]}}"
    )
    assert (code, made["differences"]) == (0, [])


def test_deviations_are_of_the_weights_that_multiply(checked: Checked) -> None:
    """PKL is like for like unless it is naive: then a + b have the deviation times the square root of 2."""
    code, made = checked("sweep: {grid: {model.linear: [standard, pkl, {variant: pkl, naive_init: true}]}}")
    (told,) = [sentence for sentence in made["differences"] if "deviation" in sentence]
    assert code == 0 and told.startswith(
        "Cells with model.linear=pkl(naive_init=true) begin with effective weights of about 1.4 times"
    )
    assert "h.*.attn.qkv[q] (0.028 against 0.02)" in told
    sizes = [sentence for sentence in made["differences"] if "the parameters of" in sentence]
    assert len(sizes) == 1 and sizes[0].startswith(
        "Cells with model.linear=pkl, model.linear=pkl(naive_init=true) have 1.7"
    )


def test_broken_models_are_told_each_and_the_others_measured(checked: Checked, capsys: Captured, desk: Desk) -> None:
    code, made = checked("sweep: {grid: {model.activation: [angry, gelu, deadly], train.seed: [1, 2]}}")
    angry, gelu, deadly = made["models"]
    assert code == 1 and gelu["error"] is None and gelu["parameters"] > 0
    assert "RuntimeError: no activation today (extra.py:" in angry["error"] and "in forward" in angry["traceback"]
    assert deadly["error"] == "The process died: it was ended by SIGKILL; memory may have run out"
    assert made["seconds"] is None
    assert lab_main.main(["check", "x.yaml"]) == 1
    out = capsys.readouterr().out
    assert out.count("broken: ") == 2 and "noise" not in out and "broken: 'activation=deadly': The process died" in out


def test_a_model_that_would_not_fit_is_not_built(checked: Checked) -> None:
    code, made = checked("sweep: {grid: {model.n_embd: [32, 524288]}}")
    assert code == 1 and made["models"][0]["error"] is None
    assert (
        made["models"][1]["error"].startswith("It was not built: 6.6")
        and "are free on cpu." in made["models"][1]["error"]
    )


def test_no_more_models_than_asked_for(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST", 1)
    sweep = "sweep: {grid: {model.norm: [layernorm, rmsnorm, none]}}"
    code, made = checked(sweep)
    assert (code, len(made["models"]), made["left_out"], made["seconds"]) == (0, 1, 2, None)
    assert "Left out: 2 models of 2 cells. --all measures them too." in made["notes"]
    code, made = checked(sweep, "--all")
    assert (code, len(made["models"]), made["left_out"]) == (0, 3, 0)


def test_the_estimate_of_a_sweep(desk: Desk, catalogue: None) -> None:
    """By hand: runs of 50 steps of 1 s and 8 batches of 0.5 s, 54 s each, in packs of 2 on 2 slots."""
    (desk.folder / "extra.py").write_text(runs.PLUGIN)
    listing = desk.listed(f"{BASE}    sweep: {{grid: {{optimizer.learning_rate: [1, 2, 3, 4, 5]}}}}\n", "runner.pack=2")
    made = check.Check(listing, 64)
    made.slots = [Slot("cpu", 1), Slot("cpu", 1)]
    cost = {"parameters": 1, "seconds_per_step": 1.0, "seconds_per_evaluation_batch": 0.5}
    (model,) = made.models
    model.cost = cost
    assert made.total() == check.START + 3 * 54  # packs of 1, 2 and 2 runs: the third waits for the first
    done = listing.path(listing.runs[0])
    done.mkdir(parents=True)
    (done / "result.json").write_text('{"status": "done"}')
    assert made.total() == check.START + 2 * 54


# A process of its own ---------------------------------------------------------------------------------------------------------


def test_a_child_tells_what_it_made_or_why_not(tmp_path: Path) -> None:
    assert measure.apart(lambda: ["x" * 300_000]) == {"made": ["x" * 300_000]}
    assert measure.apart(lambda: 1 / 0)["error"].startswith("ZeroDivisionError: division by zero (test_check.py:")
    assert measure.apart(lambda: os._exit(3)) == {"error": "The process died: its exit code is 3", "traceback": ""}
    assert "SIGTERM" in measure.apart(lambda: os.kill(os.getpid(), signal.SIGTERM))["error"]
    assert "SystemExit" in measure.apart(lambda: exec_exit())["error"]


def exec_exit() -> None:
    raise SystemExit(4)


def test_a_peak_is_of_one_model_alone(desk: Desk) -> None:
    """What a process before has taken does not count, nor what this one has."""
    kept = torch.ones(20_000_000)  # 80 MB
    config = desk.config(
        "model: {n_embd: 32, n_head: 2, n_layer: 1, block_size: 16}\ntrain: {batch_size: 2, eval_batch_size: 4}"
    )
    listing = desk.listed("name: y")
    corpus = listing.reader.corpus(config.data)
    config = with_vocabulary(config, corpus.meta.vocab_size)
    small = measure.apart(lambda: measure.measure(config, corpus, "cpu", 1))["made"]
    assert 0 < small["peak_memory_bytes"] < 60e6 and kept.numel()

    def hungry() -> int:
        before = measure._resident()
        torch.ones(25_000_000)  # 100 MB, and gone
        return int(peak_memory(torch.device("cpu"))) - before

    assert 90e6 < measure.apart(hungry)["made"] < 200e6


# Profiles ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
def test_a_profile_by_hand(desk: Desk, stacked: bool) -> None:
    text = f"""
        model: {{n_layer: 3, n_head: 2, n_embd: 32, block_size: 16, vocab_size: 256, bias: false, stack_layers: {stacked}}}
        optimizer: {{variant: muon, weight_decay: 0.1}}
        slices:
          v: {{match: "h.*.attn.qkv[v]", init: {{variant: normal, std: 0.1}}}}
          still: {{match: "h.0.**", frozen: true}}
    """
    config = desk.config(text)
    made = measure.profile(config)
    model, rows = assemble(config.model, config.slices, config.optimizer)
    fill(model, rows, config.seeds[0])
    state = model.state_dict()
    whole = torch.stack([state[f"h.{i}.attn.qkv.weight"] for i in range(3)])
    for name, (a, b) in {"q": (0, 32), "k": (32, 64), "v": (64, 96)}.items():
        std, count = made["std"][f"h.*.attn.qkv[{name}]"]
        assert count == 3 * 32 * 32
        assert std == pytest.approx(float(whole[:, a:b].square().mean().sqrt()), rel=0.01)
    assert made["std"]["h.*.attn.qkv[v]"][0] == pytest.approx(0.1, rel=0.05)
    assert made["residual"] == pytest.approx({"h.*.attn.proj": 6**-0.5, "h.*.mlp.down": 6**-0.5})
    block = 12 * 32 * 32 + 2 * 32
    assert made["parameters"] - made["trainable_parameters"] == block
    # Of two layers q, k, v, proj and the MLP's two are matrices; the rest is the embedding, positions and 5 gains.
    assert made["optimizers"] == {"muon": 12, "adamw": 7}
    assert made["decayed"] == pytest.approx(1 - 5 * 32 / made["trainable_parameters"])


# Likeness, pure ---------------------------------------------------------------------------------------------------------------


def case(cell: str, changed: dict[str, Any], baseline: bool = False, **profile: Any) -> Case:
    usual: dict[str, Any] = {"parameters": 1000, "flops_per_token": 6000, "optimizers": {"adamw": 5}, "decayed": 0.9}
    usual |= {"residual": {"h.*.attn.proj": 0.5}, "std": {"h.*.attn.qkv[q]": (0.02, 10**6), "head": (0.02, 10**6)}}
    made = usual | profile
    return Case(cell, changed, baseline, {"trainable_parameters": made["parameters"], **made})


def norms(**profile: Any) -> list[str]:
    """Of a sweep over norms and rates: rmsnorm has this profile, also at the other rate."""
    cases = [
        case(f"n={n}, lr={r}", {"model.norm": n, "lr": r}, n == "layernorm" and r == 1)
        for n in ("layernorm",)
        for r in (1, 2)
    ]
    return differences([*cases, *(case(f"n=rms, lr={r}", {"model.norm": "rms", "lr": r}, **profile) for r in (1, 2))])


def test_alike_cells_have_no_sentence() -> None:
    assert norms() == [] and differences([]) == [] and differences([case("a", {})]) == []
    assert norms(parameters=1005, decayed=0.903) == [], "too little to matter"
    assert norms(std={"h.*.attn.qkv[q]": (0.026, 60)}) == [], "chance, of 60 values"
    assert norms(std={"other": (0.5, 10**6)}, residual={}) == [], "what is not in both is not compared"


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ({"parameters": 1500}, ["have 1.50 times the parameters of the baseline (1.50k against 1.00k)"]),
        ({"flops_per_token": 3000}, ["have 0.50 times the FLOPs per token of the baseline (3.00k against 6.00k)"]),
        ({"trainable_parameters": 250}, ["train 25% of their parameters, and the baseline 100%"]),
        (
            {"optimizers": {"muon": 3, "adamw": 2}},
            ["have other slices by optimizer (2 by adamw, 3 by muon) than the baseline (5 by adamw)"],
        ),
        ({"decayed": 0.5}, ["have weight decay on 50% of what is trained, and the baseline on 90%"]),
        (
            {"residual": {"h.*.attn.proj": 1.0}},
            ["scale what writes to the residual stream by 1, and the baseline by 0.5: h.*.attn.proj"],
        ),
        (
            {"std": {"h.*.attn.qkv[q]": (0.03, 10**6), "head": (0.031, 10**6)}},
            [
                "begin with effective weights of about 1.5 times the deviation of the baseline: "
                "h.*.attn.qkv[q] (0.03 against 0.02), head (0.031 against 0.02)"
            ],
        ),
    ],
)
def test_each_difference_is_told_of_the_key_that_makes_it(profile: dict[str, Any], told: list[str]) -> None:
    assert norms(**profile) == [f"Cells with model.norm=rms {words}." for words in told]


@pytest.mark.parametrize(
    ("key", "values", "profile"),
    [
        ("model.n_embd", (32, 64), {"parameters": 4000, "std": {"head": (0.01, 10**6)}}),
        ("model.mlp.width", (32, 64), {"parameters": 4000, "flops_per_token": 9000}),
        ("data.dataset", ("a", "b"), {"parameters": 4000}),
        (
            "slices.adapt.lora",
            (None, {"rank": 4}),
            {"parameters": 1200, "trainable_parameters": 200, "optimizers": {"adamw": 2}},
        ),
        ("slices.still.frozen", (False, True), {"trainable_parameters": 200, "decayed": 0.2}),
        ("optimizer", ("adamw", "muon"), {"optimizers": {"muon": 3}, "decayed": 0.7}),
        ("slices.x.weight_decay", (0.0, 0.1), {"decayed": 0.7}),
        ("model.init.std", (0.02, 0.1), {"std": {"head": (0.1, 10**6)}}),
        ("slices.v.init", ("normal", "zeros"), {"std": {"head": (0.0, 10**6)}, "residual": {"h.*.attn.proj": 1.0}}),
    ],
)
def test_what_a_key_asks_for(key: str, values: tuple[Any, Any], profile: dict[str, Any]) -> None:
    first, second = values
    assert differences([case("a", {key: first}), case("b", {key: second}, **profile)]) == []


def test_cells_are_named_where_no_key_explains_them() -> None:
    cases = [
        case(f"{a},{b}", {"model.norm": a, "model.bias": b}, parameters=2000 if (a, b) == ("x", True) else 1000)
        for a in "xy"
        for b in (False, True)
    ]
    assert differences(cases) == [
        "Cells such as 'x,True' (1 of 4) have 2.00 times the parameters of 'x,False' (2.00k against 1.00k)."
    ]


def test_hostile_names_are_cleaned() -> None:
    (told,) = differences([case("a", {"model.norm": "x"}), case("b", {"model.norm": "\x1b[2Jy\n"}, parameters=9000)])
    assert told.isprintable() and "y" in told
