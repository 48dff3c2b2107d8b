"""The front door: composes a configuration, then shows it, trains one run, or carries out a sweep."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from core.options import describe, nearest, options_of, plain, walk
from core.yaml_files import ConfigError
from lab.process import begin, leave

FAILED, WRONG, STOPPED = 1, 2, 75


def parse(words: list[str]) -> argparse.Namespace:
    about = "Trains a run or a sweep. key=value sets an option, key=a,b sweeps it; without --config one run with the defaults."
    parser = argparse.ArgumentParser(prog="python train.py", description=about)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, in Hydra's grammar")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="list what would run; start nothing")
    parser.add_argument("--slices", action="store_true", help="list every slice of the first model")
    parser.add_argument("--json", action="store_true", help="with --dry-run or --slices")
    parser.add_argument("--list", nargs="?", const="", metavar="KIND", help="the catalogue of variations")
    parser.add_argument("--yes", action="store_true", help="start more runs than sweep.max_runs")
    parser.add_argument(
        "--detach", action="store_true", help="stopping leaves running trials behind, to be taken up again"
    )
    parser.add_argument("--takeover", action="store_true", help="take over a sweep whose runner's machine is dead")
    given = parser.parse_intermixed_args(words)
    if given.json and not (given.dry_run or given.slices):
        parser.error("--json goes with --dry-run or --slices")
    return given


def main(words: list[str], ours: bool = False) -> int:
    """Returns the exit code: 0, 1 a run failed, 2 the configuration is wrong, 75 stopped.

    ours: whether nothing else goes on in this process, so that it may be forked.
    """
    given = parse(words)
    try:
        code = act(given, ours)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print("\n".join(error.sentences), file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        print("the output was closed before all of it was written", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"{error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped. The same command continues.", file=sys.stderr)
        return STOPPED


def act(given: argparse.Namespace, ours: bool) -> int:
    """What the command line asks for. Raises ConfigError with every mistake in it or in the files."""
    if given.list is not None:
        return list_catalogue(given.list)
    from lab import beside, forks, helper

    try:
        shown = given.config is None or given.slices or given.dry_run
        if ours and not shown and _may_be_a_sweep(given.config):
            beside.start_early()
            forks.start_early()
        return carry_out(given)
    finally:
        helper.discard()


def _may_be_a_sweep(file: Path) -> bool:
    """Whether it is worth starting what many runs need before the file is understood."""
    try:
        return b"sweep" in file.read_bytes()[:100_000]
    except OSError:
        return False


def carry_out(given: argparse.Namespace) -> int:
    """Shows, or carries out, what a file and the command line stand for."""
    from lab.listing import open_listing

    listing = open_listing(given.config, given.overrides)
    if given.slices:
        return show_slices(listing, given.json)
    if given.dry_run:
        return show_runs(listing, given.json)
    limit, count = listing.expansion.sweep.max_runs, len(listing.runs) + listing.more_to_come
    if count > limit and not given.yes:
        raise ConfigError(f"sweep.max_runs: {count:,} runs are more than {limit:,}. Start them with --yes.")
    from lab.runner import Manner, run

    return run(listing, Manner(given.detach, given.takeover))


def show_runs(listing: Any, as_json: bool) -> int:
    """--dry-run."""
    from lab.base import untrained

    expansion = listing.expansion
    done = len(listing.runs) - len(listing.pending())
    if as_json:
        runs = [
            {
                "run_id": listing.ids[r.hash],
                "cell": r.cell,
                "seed": r.seed,
                "changed": plain(r.changed),
                "config": plain(r.config),
            }
            for r in listing.runs
        ]
        counts = {
            "cells": expansion.cells,
            "excluded": expansion.excluded,
            "duplicates": expansion.duplicates,
            "done": done,
        }
        print(json.dumps({**counts, "runs": runs}), flush=True)
        return 0
    seeds = len({r.seed for r in listing.runs})
    print(f"{listing.folder}: {expansion.cells} cells x {seeds} seeds = {len(listing.runs)} runs, {done} done")
    print(f"excluded: {expansion.excluded} cells; duplicates merged: {expansion.duplicates} cells")
    if listing.more_to_come:
        print(f"searches: up to {listing.more_to_come:,} more runs, chosen from the results of others")
    for base in untrained(listing):
        print(f"trained first, as other runs start from it: {base.folder} ({base.path})")
    for run in listing.runs:
        marks = " (baseline)" if run.baseline else ""
        print(f"  {listing.ids[run.hash]}  {run.cell}, seed {run.seed}{marks}  {listing.status(run) or ''}".rstrip())
    return 0


def show_slices(listing: Any, as_json: bool) -> int:
    """--slices."""
    from model import assemble
    from train_args import with_vocabulary

    config = listing.runs[0].config
    config = with_vocabulary(config, listing.reader.corpus(config.data).meta.vocab_size)
    _, rows = assemble(config.model, config.slices, config.optimizer)
    if as_json:
        print(json.dumps([_slice(row) for row in rows]))
        return 0
    cells = [{**_slice(row), "learning_rate": row.learning_rate, "rules": _origins(row)} for row in rows]
    columns = ["address", "shape", "parameters", "learning_rate", "lr_scale", "weight_decay", "optimizer", "init"]
    columns += [name for name in ("lora", "frozen") if any(cell[name] for cell in cells)] + ["rules"]
    lines = [[_cell(cell[c]) for c in columns] for cell in cells]
    widths = [max(len(c), *(len(line[i]) for line in lines)) for i, c in enumerate(columns)]
    for line in (columns, *lines):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    trained = sum(row.slice.numel for row in rows if not row.settings.frozen)
    print(f"{len(rows)} slices, {sum(row.slice.numel for row in rows):,} parameters, {trained:,} of them trained")
    return 0


def _slice(row: Any) -> dict[str, Any]:
    """A row of the table as --slices --json prints it."""
    part, settings = row.slice, row.settings
    return {
        "address": part.address,
        "shape": list(part.shape),
        "parameters": part.numel,
        "lr_scale": settings.lr_scale,
        "weight_decay": settings.weight_decay,
        "optimizer": settings.optimizer.name,
        "init": str(row.init),
        "lora": None if settings.lora is None or len(part.shape) < 2 else plain(settings.lora),
        "frozen": settings.frozen,
        "rules": list(row.rules),
    }


def _origins(row: Any) -> str:
    """Which rules made which value."""
    return "; ".join(f"{name}: {' x '.join(rules)}" for name, rules in row.settings.origins.items())


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['variant']}({', '.join(f'{k}={v}' for k, v in value.items() if k != 'variant')})"
    if isinstance(value, bool) or value is None:
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " x ".join(map(str, value)) if value and isinstance(value[0], int) else ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def list_catalogue(kind: str) -> int:
    """--list: every variation of a kind (or of all), its formula, its options."""
    from variations import CATALOGUE

    if kind and kind not in CATALOGUE:
        raise ConfigError(f"--list: no kind '{kind}'. {nearest(kind, CATALOGUE)}")
    for name in [kind] if kind else list(CATALOGUE):
        print(f"{name}:")
        for variation, cls in CATALOGUE[name].items():
            formula = next((x.strip() for x in (cls.__doc__ or "").splitlines() if "Formula:" in x), "")
            print(f"  {variation:<18}{formula.removeprefix('Formula:').strip()}")
            options = options_of(cls)
            for option, spec, tp in walk(options):
                default = spec.default.name if hasattr(spec.default, "name") else spec.default
                words = "a variation" if spec.metadata.get("kind") else describe(tp)
                print(f"    {option}: {words}, default {json.dumps(default, default=str)}. {spec.metadata['doc']}")
    return 0


if __name__ == "__main__":
    begin()
    leave(main(sys.argv[1:], ours=True))
