"""What a longer interval between two snapshots of MeZO-SVRG costs: time and kept bytes of a step.

theta_bar is kept as the terms that were applied since, so a probe there adds all of them to the
weights: the time of a step grows with the steps since the snapshot. What lies beside the trajectory
does not grow, for these terms are in the trajectory already.

    python benchmarks/snapshot_interval.py
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1])]

from zo_adapt import MeZOSVRG, ParameterView, Step, minimize

ROWS = 16


def measured(interval: int, scalars: int, seed: int) -> tuple[float, float, int]:
    """Milliseconds of a step in the first and the last tenth of an interval, bytes of the state."""
    x = torch.zeros(scalars)
    rows = torch.randn(64, scalars, generator=torch.Generator().manual_seed(seed))
    times: list[float] = []

    def loss(batch: Tensor) -> Tensor:
        return (batch - x).square().mean(1)

    def note(step: Step) -> None:
        times.append(time.perf_counter())

    optimizer = MeZOSVRG(displacement=0.1, snapshot_interval=interval, snapshot_size=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zot"
        minimize(
            loss, ParameterView({"x": x}), rows, optimizer, batch_size=ROWS, max_steps=interval,
            seed=seed, progress=False, trajectory=path, callback=note,
        )  # fmt: skip
        state = sum(file.stat().st_size for file in Path(folder).iterdir() if file != path)
    steps = [1e3 * (after - before) for before, after in pairwise(times)]
    part = max(1, len(steps) // 10)
    return statistics.median(steps[:part]), statistics.median(steps[-part:]), state


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_RAW)
    parser.add_argument("--intervals", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--scalars", type=int, nargs="+", default=[1000])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("| scalars | q | ms a step, first tenth | last tenth | bytes beside the trajectory |")
    print("|---|---|---|---|---|")
    for scalars in given.scalars:
        for interval in given.intervals:
            first, last, state = measured(interval, scalars, given.seed)
            print(
                f"| {scalars:,} | {interval:,} | {first:.1f} | {last:.1f} | {state:,} |", flush=True
            )


_RAW = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
