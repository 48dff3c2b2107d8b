"""How long 10,000 runs of one model shape take to expand and validate: `python bench/expand.py [--json]`."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.measure import machine, seconds, write  # noqa: E402
from lab.listing import open_listing  # noqa: E402

FILE = """
model: {linear: {variant: pkl}, norm: rmsnorm}
sweep:
  grid:
    optimizer.learning_rate: {log: [1e-4, 1e-2], num: 25}
    optimizer.weight_decay: {linear: [0.0, 1.0], num: 20}
    schedule.warmup_iters: {range: [0, 90, 10]}
  seeds: 2
"""


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "big.yaml"
        file.write_text(FILE)
        assert len(open_listing(file, []).runs) == 10_000
        times = [seconds(lambda: open_listing(file, [])) for _ in range(5)]
    figures = {
        "runs": 10_000,
        "seconds": {"median": round(statistics.median(times), 2), "all": [round(t, 2) for t in times]},
    }
    print(figures)
    print(write("expand", figures))


if __name__ == "__main__":
    main()
