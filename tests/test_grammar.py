"""GRAMMAR, sections 2 and 5: addresses and patterns, sites, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from conftest import Desk

import train
from core.addresses import Pattern
from core.slices import Declaration, Layout, Slice, slices
from model import GPT
from train_args import with_vocabulary
from variations.init.distributions import ZEROS

Front = Callable[..., tuple[int, str, str]]


def part(address: str) -> Slice:
    """A slice with an address such as h.3.attn.qkv.weight[5.gate]."""
    parameter, _, bracket = address.rstrip("]").partition("[")
    labels = tuple(bracket.split(".")) if bracket else ()
    return Slice(address, parameter, labels, (1,), Declaration(Layout(), "matrix", ZEROS))


MATCHES = [
    # * inside one dotted segment, ** across segments
    ("h.*.attn.qkv", "h.3.attn.qkv.weight[k]", True),
    ("h.*", "h.3.attn.qkv.weight[k]", False),
    ("h.*.qkv", "h.3.attn.qkv.weight[k]", False),
    ("h.**.qkv", "h.3.attn.qkv.weight[k]", True),
    ("h.**.attn.qkv", "h.attn.qkv.weight", True),
    ("*.3.at*.q*", "h.3.attn.qkv.weight[k]", True),
    ("hx3", "h.3.weight", False),
    # ranges
    ("h.{0..5}.mlp.up", "h.5.mlp.up.weight", True),
    ("h.{0..5}.mlp.up", "h.6.mlp.up.weight", False),
    ("h.{0..5}.mlp.up", "h.05.mlp.up.weight", False),
    ("h.{9..11}.mlp.up", "h.10.mlp.up.weight", True),
    # without .weight or .bias the weight is meant
    ("h.*.attn.qkv", "h.3.attn.qkv.bias[k]", False),
    ("h.*.attn.qkv.bias", "h.3.attn.qkv.bias[k]", True),
    ("h.*.attn.qkv.weight", "h.3.attn.qkv.weight[k]", True),
    # ** at the end means everything below
    ("h.3.**", "h.3.attn.qkv.bias[k]", True),
    ("h.3.**", "h.4.attn.qkv.bias[k]", False),
    ("**", "wte.weight", True),
    # no bracket means every part; a bracket lists parts by name, at any depth of nesting
    ("h.*.attn.qkv[k]", "h.3.attn.qkv.weight[k]", True),
    ("h.*.attn.qkv[q,v]", "h.3.attn.qkv.weight[k]", False),
    ("h.*.attn.qkv[q, k]", "h.3.attn.qkv.weight[k]", True),
    ("h.*.moe.gate_up[gate]", "h.1.moe.gate_up.weight[5.gate]", True),
    ("h.*.moe.gate_up[5.gate]", "h.1.moe.gate_up.weight[5.gate]", True),
    ("h.*.moe.gate_up[4.gate]", "h.1.moe.gate_up.weight[5.gate]", False),
    ("h.*.moe.gate_up[5]", "h.1.moe.gate_up.weight[5.gate]", True),
    ("h.*.attn.qkv[q]", "h.3.attn.qkv.weight[a.q]", True),
    ("h.*.attn.qkv[a]", "h.3.attn.qkv.weight[a.q]", True),
    # brackets are never character classes
    ("h.*.attn.qkv[qk]", "h.3.attn.qkv.weight[k]", False),
    ("h.[3].attn", "h.3.attn.weight", None),
]


@pytest.mark.parametrize(("pattern", "address", "matches"), MATCHES)
def test_what_a_pattern_matches(pattern: str, address: str, matches: bool | None) -> None:
    if matches is None:
        with pytest.raises(ValueError, match="does not open and close once, at its end"):
            Pattern(pattern)
    else:
        one = part(address)
        assert Pattern(pattern).matches(one.parameter, one.labels) is matches


def test_addresses_of_a_model(desk: Desk) -> None:
    addresses = {one.address for one in slices(built(desk, "model: {n_layer: 1}"))}
    assert {"wte.weight", "h.0.attn.qkv.weight[q]", "h.0.attn.qkv.bias[v]", "h.0.ln_1.weight"} <= addresses
    assert not any(address.startswith("head") for address in addresses), "tied: one set of slices, under the first name"


# Sites ----------------------------------------------------------------------------------------------------------------------

SITES = """
    model:
      n_layer: 2
      tie_weights: false
      sites:
        mlp_pkl: {match: "h.*.mlp.*", linear: {variant: pkl, scale: 0.5}}
        plain_head: {match: "head", linear: standard}
"""


def built(desk: Desk, text: str, *words: str) -> GPT:
    config = with_vocabulary(desk.config(text, *words), 256)
    return GPT(config.model)


def kinds(model: GPT) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def test_the_sites_of_the_example(desk: Desk) -> None:
    made = kinds(built(desk, SITES))
    assert made["h.0.mlp.up"] == made["h.1.mlp.down"] == "PKLLinear"
    assert made["h.0.attn.qkv"] == made["head"] == "Linear"
    everywhere = kinds(built(desk, SITES, "model.linear=pkl"))
    assert everywhere["h.0.attn.qkv"] == "PKLLinear" and everywhere["head"] == "Linear"


def test_the_later_site_wins_lists_exceptions_and_removal(desk: Desk) -> None:
    text = """
    model:
      n_layer: 2
      sites:
        all: {match: "**", norm: rmsnorm}
        some: {match: ["h.{0..0}.ln_1", "ln_f"], except: ["ln_*"], norm: none}
    """
    made = kinds(built(desk, text))
    assert (made["h.0.ln_1"], made["h.1.ln_1"], made["ln_f"]) == ("NoNorm", "RMSNorm", "RMSNorm")
    made = kinds(built(desk, text, "model.sites.some=null"))
    assert made["h.0.ln_1"] == "RMSNorm"


def test_a_mapping_without_a_variant_is_about_the_models_own(desk: Desk) -> None:
    text = """
    model:
      norm: {variant: rmsnorm, eps: 0.5}
      sites: {final: {match: ln_f, norm: {gain: false}}, default: {match: "h.**", init: {std: 0.5}}}
    """
    sites = desk.config(text).model.sites
    assert (sites["final"].norm.name, sites["final"].norm.options.eps, sites["final"].norm.options.gain) == (
        "rmsnorm",
        0.5,
        False,
    )
    assert (sites["default"].init.name, sites["default"].init.options.std) == ("normal", 0.5)
    off = desk.wrong("model: {norm: off, sites: {final: {match: ln_f, norm: {gain: false}}}}")
    assert off[0].startswith("model.sites.final.norm.gain: unknown key")


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("{match: ln_g, norm: none}", "model.sites.x: 'ln_g' matches no place where "),
        ("{match: [], norm: none}", "model.sites.x.match: a rule needs a pattern"),
        ("{norm: none}", "model.sites.x.match: a rule needs a pattern"),
        ("{match: ln_f}", "model.sites.x: the site chooses no variation"),
        ("{match: ln_f, norm: nome}", "model.sites.x.norm: no variant 'nome' (x.yaml:1). Did you mean 'none'?"),
        ("{match: ln_f, nrom: none}", "model.sites.x.nrom: unknown key (x.yaml:1). Did you mean 'norm'?"),
        ('{match: "h.{3..1}", norm: none}', "is not a range of numbers such as {0..5}"),
        ("3", "model.sites.x: 3 is not a mapping"),
    ],
)
def test_a_site_that_cannot_be_is_told(desk: Desk, site: str, words: str) -> None:
    (told,) = desk.wrong(f"model: {{sites: {{x: {site}}}}}")
    assert words in told and "(x.yaml:1)" in told
    if "ln_g" in site:
        assert "Did you mean 'ln_f'?" in told
        assert desk.config(f"model: {{sites: {{x: {site[:-1]}, optional: true}}}}}}").model.sites["x"].optional


def test_a_site_can_be_swept(desk: Desk) -> None:
    text = "sweep: {grid: {model.sites.x: [null, {match: ln_f, norm: none}, {match: 'h.*.ln_1', norm: none}]}}"
    assert [kinds(GPT(with_vocabulary(run.config, 256).model))["ln_f"] for run in desk.listed(text).runs] == [
        "LayerNorm", "NoNorm", "LayerNorm"
    ]  # fmt: skip


# Exit codes -----------------------------------------------------------------------------------------------------------------

TINY = """
    model: {n_layer: 1, n_embd: 8, n_head: 2, block_size: 8}
    train: {max_iters: 2, batch_size: 2, eval_iters: 1, device: cpu}
    tracking: {wandb: {mode: off}}
"""
FAILING = """
    from variations.norm import NORMS
    from variations.norm.none import NoNorm

    class Fails(NoNorm):
        '''Formula: none'''

        def forward(self, x):
            raise RuntimeError("no luck")

    NORMS["fails"] = Fails
"""


def test_0_is_done_and_counted_on_the_last_line(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(desk.write(TINY))
    assert train.main(["--config", file]) == 0
    assert "1 done" in capsys.readouterr().out.strip().splitlines()[-1]
    (folder,) = (desk.folder / "runs" / "x").glob("run-*")
    assert json.loads((folder / "result.json").read_text())["status"] == "done"
    assert train.main(["--config", file, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 1


def test_1_is_a_run_that_failed(desk: Desk, catalogue: None, capsys: pytest.CaptureFixture[str]) -> None:
    desk.write(FAILING, "fails.py")
    # Building the model does not run it, so the configuration is right and the run is not.
    assert train.main(["--config", str(desk.write(TINY + "    plugins: [fails.py]")), "model.norm=fails"]) == 1
    assert "1 failed" in capsys.readouterr().out.strip().splitlines()[-1]
    assert torch.is_grad_enabled()


def test_2_is_a_wrong_configuration_and_nothing_is_started(desk: Desk, front: Front) -> None:
    assert front("--config", str(desk.write(TINY)), "train.max_iters=0")[0] == 2
    assert front("--config", "nowhere.yaml")[0] == 2
    assert front("model.n_layer=2", "model.n_layr=2")[0] == 2
    with pytest.raises(SystemExit) as caught:
        train.main(["--cofnig", "x"])
    assert caught.value.code == 2 and desk.nothing_made()
