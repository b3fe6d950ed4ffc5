"""What a tuning run is reported with: one line of figures and one picture."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from zo_adapt import Step

Curve = list[tuple[int, float]]  # (queries, held-out accuracy), from before the run to after it


def figures(name: str, curve: Curve, seconds: float) -> dict[str, str]:
    """The row of a run that ends now."""
    (_, before), (queries, after) = curve[0], curve[-1]
    return {
        "": name,
        "accuracy before": f"{before:.3f}",
        "accuracy after": f"{after:.3f}",
        "queries": f"{queries:,}",
        "seconds": f"{seconds:.0f}",
        "peak memory so far": f"{peak_memory_gib():.2f} GiB",
    }


def table(runs: Sequence[dict[str, str]]) -> str:
    """Runs one below the other, under the names of their figures."""
    columns = {name: [name, *(run[name] for run in runs)] for name in runs[0]}
    widths = [max(map(len, column)) for column in columns.values()]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def peak_memory_gib() -> float:
    """The most memory the GPU, or without one the whole process, has taken so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def draw(runs: Mapping[str, tuple[Sequence[Step], Curve]], path: Path) -> None:
    """Training loss and held-out accuracy of runs against their queries."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file, on machines without a display too
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, sharex=True, figsize=(6.4, 6.4), layout="constrained"
    )
    for number, (name, (history, curve)) in enumerate(runs.items()):
        queries, values = [one.queries for one in history], [one.value for one in history]
        width = max(1, len(values) // 20)
        means = [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]
        upper.plot(queries, values, color=f"C{number}", linewidth=0.6, alpha=0.3)
        upper.plot(queries[width - 1 :], means, color=f"C{number}", label=name)
        lower.plot(*zip(*curve, strict=True), color=f"C{number}", marker="o")
    upper.set(ylabel="training loss")
    upper.legend()
    lower.set(
        xlabel="queries (forward passes of one sample)", ylabel="held-out accuracy", ylim=(0, 1)
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
