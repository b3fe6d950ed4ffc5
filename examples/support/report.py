"""What a tuning run is reported with: one line of figures and one picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from zo_adapt import Step

Curve = list[tuple[int, float]]  # (queries, held-out accuracy), from before the run to after it


def table(curve: Curve, seconds: float) -> str:
    """The figures of a run that ends now, under their names."""
    (_, before), (queries, after) = curve[0], curve[-1]
    figures = {
        "accuracy before": f"{before:.3f}",
        "accuracy after": f"{after:.3f}",
        "queries": f"{queries}",
        "seconds": f"{seconds:.0f}",
        "peak memory": f"{peak_memory_gib():.2f} GiB",
    }
    widths = [max(len(name), len(figure)) for name, figure in figures.items()]
    rows = (figures.keys(), ["-" * width for width in widths], figures.values())
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def peak_memory_gib() -> float:
    """The most memory the GPU, or without one the whole process, has taken so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def draw(history: Sequence[Step], curve: Curve, path: Path) -> None:
    """Training loss and held-out accuracy against queries."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file, on machines without a display too
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, sharex=True, figsize=(6.4, 6.4), layout="constrained"
    )
    queries, values = [one.queries for one in history], [one.value for one in history]
    width = max(1, len(values) // 20)
    means = [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]
    upper.plot(queries, values, color="0.75", linewidth=0.6, label="of a step")
    upper.plot(queries[width - 1 :], means, label=f"mean of {width} steps")
    upper.set(ylabel="training loss")
    upper.legend()
    lower.plot(*zip(*curve, strict=True), marker="o")
    lower.set(
        xlabel="queries (forward passes of one sample)", ylabel="held-out accuracy", ylim=(0, 1)
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
