"""Every file that is shipped composes and stands for the runs it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from shipped import small_corpora

from lab.listing import open_listing

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
