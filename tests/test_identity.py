"""GRAMMAR, section 4: what a run's identity is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Desk

import lab.reading
from core.options import NoOptions, Reader, Variant, differences, fields_of, hints, options_of, plain
from core.yaml_files import dump
from engine.corpus import ByteTokenizer, write_corpus
from lab.expand import Run
from lab.listing import load_run
from train_args import Config
from variations import CATALOGUE

PLUGIN = "from variations.norm import NORMS\nfrom variations.norm.none import NoNorm\nNORMS['half'] = NoNorm\n"


def only(desk: Desk, text: str, *words: str, name: str = "x.yaml") -> Run:
    (run,) = desk.listed(text, *words, name=name).runs
    return run


BASE = "model: {n_layer: 2, norm: {variant: rmsnorm, eps: 0.5}}\ntrain: {max_iters: 5, grad_clip: 1}"


@pytest.mark.parametrize(
    "same",
    [
        "train: {grad_clip: 1, max_iters: 5}\nmodel: {norm: {eps: 0.5, variant: rmsnorm}, n_layer: 2}",  # order
        "train: {grad_clip: 1.0, max_iters: 5}\nmodel: {norm: {variant: rmsnorm, eps: 5e-1}, n_layer: 2}",
        BASE.replace("n_layer: 2", "n_layer: 2, n_embd: 128, bias: true, linear: standard"),  # defaults
        BASE.replace("n_layer: 2", "n_layer: 2, linear: {variant: standard}, sites: {x: null}"),
        BASE.replace("n_layer: 2", 'n_layer: "${model.n_head}", n_head: 2'),
        "defaults: [presets/half, _self_]\ntrain: {grad_clip: 1}",  # presets
        "defaults: [presets/half, _self_]\ntrain: {grad_clip: 1}\nsweep: {}",
        "sweep: {cases: {a: {use: presets/half, set: {train.grad_clip: 1.0}}}}",
        "model: {n_layer: 2}\ntrain: {max_iters: 5}\nsweep: {grid: {model.norm: [{variant: rmsnorm, eps: 0.5}]}}",
        BASE + "\nname: other\nsweep: {max_runs: 7, objective: {mode: max}}",  # not hashed
        BASE + "\ntracking: {wandb: {mode: off, project: p, tags: [x]}}\nrunner: {per_device: 2, root: there}",
        BASE.replace("max_iters", "device: cpu, log_interval: 3, checkpoint_interval: 4, max_iters"),
    ],
)
def test_the_same_run_however_it_is_written(desk: Desk, same: str) -> None:
    desk.preset("half", "model: {n_layer: 2, norm: {variant: rmsnorm, eps: 0.5}}\ntrain: {max_iters: 5}")
    assert "n_head: 2" in same or only(desk, same).hash == only(desk, BASE).hash
    if "n_head: 2" in same:
        assert only(desk, same).hash == only(desk, BASE.replace("n_layer: 2", "n_layer: 2, n_head: 2")).hash


def test_int_and_float_differ_where_they_mean_different_things(desk: Desk) -> None:
    whole, fraction = (only(desk, f"schedule: {{warmup_iters: {v}}}").hash for v in ("1", "1.0"))
    assert whole != fraction, "one iteration, or all of them"


def test_the_order_of_a_named_table_counts(desk: Desk) -> None:
    rules = ["a: {match: ln_f, norm: none}", "b: {match: '**', norm: rmsnorm}"]
    one, two = (only(desk, f"model: {{sites: {{{', '.join(order)}}}}}").hash for order in (rules, rules[::-1]))
    assert one != two, "the later rule wins"


def test_the_hash_is_in_the_run_id_and_alone_is_the_identity(desk: Desk) -> None:
    listing = desk.listed("sweep: {grid: {train.batch_size: [1, 2]}}")
    assert [listing.ids[run.hash] for run in listing.runs] == [
        f"batch_size={n}-{run.hash}" for n, run in zip((1, 2), listing.runs, strict=True)
    ]
    assert all(len(run.hash) == 10 and int(run.hash, 16) >= 0 for run in listing.runs)
    alone = desk.listed("train: {batch_size: 2}")
    assert alone.runs[0].hash == listing.runs[1].hash and alone.ids[alone.runs[0].hash].startswith("run-")


def test_the_label_of_a_folder_that_is_there_is_kept(desk: Desk) -> None:
    listing = desk.listed("sweep: {grid: {train.batch_size: [1, 2]}}")
    (desk.folder / "runs" / "x" / f"an_old-label-{listing.runs[1].hash}").mkdir(parents=True)
    (desk.folder / "runs" / "x" / f"{listing.runs[0].hash}").write_text("a file is no folder")
    again = desk.listed("sweep: {grid: {train.batch_size: [1, 2]}}")
    assert again.ids[again.runs[1].hash] == f"an_old-label-{listing.runs[1].hash}"
    assert again.ids[again.runs[0].hash] == listing.ids[listing.runs[0].hash]
    (again.path(again.runs[1]) / "result.json").write_text('{"status": "done"}')
    assert [again.status(run) for run in again.runs] == [None, "done"] and again.pending() == [again.runs[0]]


def test_labels_are_safe_and_short(desk: Desk) -> None:
    listing = desk.listed(
        'sweep: {grid: {tracking.wandb.tags: [["../../x y", "ä/b"]], model.norm: [{variant: rmsnorm, eps: 0.1}]}}'
    )
    (name,) = listing.ids.values()
    assert "/" not in name and " " not in name and name.isascii() and "norm=rmsnorm" in name
    long = desk.listed(f"sweep: {{cases: {{{'x' * 300}: {{}}}}}}")
    assert len(next(iter(long.ids.values()))) <= 71


# What changes it ------------------------------------------------------------------------------------------------------------


def test_the_content_of_the_data_is_hashed(desk: Desk, tmp_path: Path) -> None:
    def run(step: int, name: str) -> Run:
        ids = (np.arange(400) * step % 200).astype("<u2")
        parts = [("train", ids), ("val", ids)]
        write_corpus(
            tmp_path / name / "toy" / "byte", parts, dataset="toy", tokenizer=ByteTokenizer(), source="A test."
        )
        return only(desk, "data: {dataset: toy}", f"data.root={tmp_path / name}")

    assert run(3, "a").hash == run(3, "b").hash, "where it lies is not"
    assert run(5, "c").hash != run(3, "a").hash


def test_the_content_of_plugins_is_hashed(desk: Desk, catalogue: None) -> None:
    desk.write(PLUGIN, "one.py")
    desk.write(PLUGIN, "two.py")
    desk.write(PLUGIN + "# more", "three.py")
    one, two, three, none = (only(desk, text).hash for text in (
        "plugins: [one.py]", "plugins: [two.py]", "plugins: [three.py]", "plugins: []"))  # fmt: skip
    assert one == two and len({one, three, none}) == 3


def test_the_version_of_the_configuration_is_hashed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = only(desk, BASE).hash
    monkeypatch.setattr(lab.reading, "CONFIG_VERSION", 10**6)
    assert only(desk, BASE).hash != before


def test_a_run_without_its_seed_is_a_cell_and_pinned_seeds_count(desk: Desk) -> None:
    one, two = only(desk, "train: {seed: 1}"), only(desk, "train: {seed: 2}")
    assert one.hash != two.hash and one.cell_hash == two.cell_hash
    assert only(desk, "train: {seed: 1, init_seed: 2}").cell_hash != one.cell_hash


# Every option ---------------------------------------------------------------------------------------------------------------


EXAMPLES: dict[Any, list[Any]] = {bool: [True, False], int: [3, 4], float: [0.25, 0.75], str: ["h", "cpu"]}


def examples(tp: Any) -> list[Any]:
    """Some values of a type."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin is typing.Literal:
        return list(args)
    if origin is tuple:
        return [(value, value) for value in examples(args[0])]
    if origin in (typing.Union, types.UnionType):
        return [value for arm in args for value in examples(arm)]
    return EXAMPLES.get(tp, [])


def options(cls: type) -> Iterator[tuple[str, bool, Any]]:
    """Every single option: what it is called, whether it is hashed, and an instance in which only it differs."""
    default = Reader(CATALOGUE).read(cls, {})
    for name, spec in fields_of(cls).items():
        tp, hashed = hints(cls)[spec.name], spec.metadata["identity"]
        value = getattr(default, spec.name)
        if isinstance(value, Variant):
            for variant, variation in CATALOGUE[spec.metadata["kind"]].items():
                inside = options_of(variation)
                if variant != value.name:
                    made = Variant(variant, Reader(CATALOGUE).read(inside, {}))
                    yield f"{name}={variant}", hashed, dataclasses.replace(default, **{spec.name: made})
                elif inside is not NoOptions:
                    for below, inner, changed in options(inside):
                        yield (
                            f"{name}.{below}",
                            hashed and inner,
                            dataclasses.replace(default, **{spec.name: Variant(variant, changed)}),
                        )
        elif dataclasses.is_dataclass(value):
            for below, inner, changed in options(type(value)):
                yield f"{name}.{below}", hashed and inner, dataclasses.replace(default, **{spec.name: changed})
        else:
            for made in [made for made in examples(tp) if made != value]:
                with contextlib.suppress(ValueError):  # a value that does not go with the others
                    yield f"{name}={made}", hashed, dataclasses.replace(default, **{spec.name: made})


def test_every_hashed_option_changes_the_hash_and_no_other_does(desk: Desk) -> None:
    reader = desk.listed("{}").reader
    default = Reader(CATALOGUE).read(Config, {})
    hashes = {reader.identity(default)[0]: "the default"}
    seen = []
    for name, hashed, config in options(Config):
        if name.startswith(("data.", "train.init_from")):  # what they name would have to be there
            seen.append(name)
            assert bool(differences(config.data) or differences(config.train)) is hashed, name
            continue
        run_hash = reader.identity(config)[0]
        assert (run_hash not in hashes) is hashed, f"{name} has the hash of {hashes.get(run_hash)}"
        hashes[run_hash] = name
        seen.append(name)
    assert {"train.compile=True", "model.norm.eps=0.25", "optimizer=muon", "runner.root=h", "model.n_kv_head=4"} <= set(
        seen
    )


def test_options_that_go_elsewhere_are_the_ones_the_grammar_names() -> None:
    free = {name for name, hashed, _ in options(Config) if not hashed}
    places = (
        "name",
        "plugins",
        "tracking.",
        "runner.",
        "run.",
        "data.root",
        "train.device",
        "train.init_from",  # its content is hashed instead
        "train.log_interval",
        "train.checkpoint_interval",
    )
    assert all(name.startswith(places) for name in free), free


# Run folders ----------------------------------------------------------------------------------------------------------------


def test_combinations_of_two_values_never_meet(desk: Desk) -> None:
    keys = ("train.batch_size", "train.eval_iters", "train.seed", "train.eval_interval")
    listing = desk.listed(f"sweep: {{grid: {{{', '.join(f'{key}: [1, 11]' for key in keys)}}}}}")
    assert len({run.hash for run in listing.runs}) == 16 and len(set(listing.ids.values())) == 16


def test_a_run_folder_is_read_back_as_the_run_that_was_listed(desk: Desk) -> None:
    listing = desk.listed("model: {sites: {x: {match: ln_f, norm: none}}}\nsweep: {grid: {optimizer: [adamw, muon]}}")
    for run in listing.runs:
        folder = listing.path(run)
        folder.mkdir(parents=True)
        config = dataclasses.replace(run.config, run=listing.info(run, "off"))
        (folder / "config.yaml").write_text(dump(plain(config)))
        again, _ = load_run(folder, plugins=False)
        assert again == config and listing.reader.identity(again)[0] == run.hash
