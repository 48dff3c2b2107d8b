"""Every file that is shipped composes and stands for the runs it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shipped import small_corpora

from lab.listing import open_listing
from model import assemble
from train_args import with_vocabulary

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted((REPOSITORY / "explorations").glob("**/*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpora(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_composes(path: Path, data: Path) -> None:
    listing = open_listing(path, [f"data.root={data}"])
    assert listing.runs and len({listing.ids[r.hash] for r in listing.runs}) == len(listing.runs)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_presets_can_be_composed_and_sweeps_have_a_baseline(path: Path) -> None:
    text = path.read_text()
    if path.parent.name == "presets":
        assert text.startswith("# @package _global_\n") and "\nsweep:" not in text
    else:
        assert "\nsweep:" in text and "baseline:" in text


def test_the_pkl_sweep_is_the_baseline_and_three_times_three(data: Path) -> None:
    listing = open_listing(REPOSITORY / "explorations" / "pkl_number_sweep.yaml", [f"data.root={data}"])
    assert (len(listing.runs), listing.expansion.cells, listing.expansion.duplicates) == (10, 10, 0)
    pairs = set()
    for run in listing.runs:
        model = run.config.model
        assert model.tie_weights and model.embedding == model.head
        if model.linear.name == "pkl":
            pairs.add((model.linear.options.scale, model.head.options.scale))
    scales = (1.0, 1.25, 2**0.5)
    assert pairs == {(a, b) for a in scales for b in scales}
    assert [run.cell for run in listing.runs if run.baseline] == ["baseline"]


def test_three_seeds_make_thirty(data: Path) -> None:
    listing = open_listing(
        REPOSITORY / "explorations" / "pkl_number_sweep.yaml", [f"data.root={data}", "sweep.seeds=3"]
    )
    assert (len(listing.runs), listing.expansion.cells) == (30, 10)


COUNTS = {"qkv_lr": (7, 21), "qkv_init": (10, 30), "gate_up": (11, 33), "lora_slices": (17, 34), "depth_lr": (5, 15),
          "slice_combinations": (96, 96)}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_the_sweeps_over_slices_stand_for_what_they_say(name: str, data: Path) -> None:
    listing = open_listing(REPOSITORY / "explorations" / f"{name}_sweep.yaml", [f"data.root={data}"])
    assert (listing.expansion.cells, len(listing.runs)) == COUNTS[name] and listing.expansion.duplicates == 0
    seeds = len({run.seed for run in listing.runs})
    assert sum(run.baseline for run in listing.runs) == seeds


def test_adapters_are_on_the_slices_that_the_sweep_names(data: Path) -> None:
    listing = open_listing(REPOSITORY / "explorations" / "lora_slices_sweep.yaml", [f"data.root={data}"])
    found: dict[str, set[str]] = {}
    for run in listing.runs:
        config = with_vocabulary(run.config, listing.reader.corpus(run.config.data).meta.vocab_size)
        _, rows = assemble(config.model, config.slices, config.optimizer)
        case = str(run.changed["case"])
        trained = {row.slice.address for row in rows if not row.settings.frozen}
        found[case] = {re.sub(r"h\.\d+", "h.*", a).removesuffix("_a") for a in trained if a.endswith("lora_a")}
        assert case == "everything" or all("lora_" in address for address in trained), "the base is frozen"
    assert found == {
        "everything": set(), "q_v": {"h.*.attn.qkv[q].lora", "h.*.attn.qkv[v].lora"}, "k": {"h.*.attn.qkv[k].lora"},
        "q_k_v": {f"h.*.attn.qkv[{part}].lora" for part in "qkv"}, "together": {"h.*.attn.qkv.lora"},
    }  # fmt: skip
