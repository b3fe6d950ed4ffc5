"""Figures of docs/evidence.md."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence_lemmas
import evidence_memory
import evidence_variance
from evidence_cells import DIVERGED, Cell, Results, Where
from evidence_drawing import legend, save, scaled
from evidence_language import QUERIES, by_queries
from evidence_plan import HALVES, SEEDS, VIEWS

SHOWN = (
    "MeZO",
    "MeZO, all rows",
    "MeZO-SVRG as printed",
    "MeZO-SVRG, one rate, shared direction",
    "MeZO, 8 directions compared",
    "MeZO()",
    "FO-SGD",
)
BUDGETS = (
    Where("methods", "least squares", queries=100_000),
    Where("methods", "least squares", steps=2_000),
    Where("methods", "MNIST", queries=200_000),
    Where("methods", "MNIST", steps=1_000),
)
BATCHES = (16, 32, 64, 128, 512)


def draw(found: Results, memory: Sequence[dict[str, Any]], folder: Path) -> None:
    """All figures that have results; the same file for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "evidence", "svg.fonttype": "none"}
    folder.mkdir(exist_ok=True)
    _curves(found, folder / "evidence-curves.svg")
    _batches(found, folder / "evidence-batches.svg")
    evidence_variance.draw(found, folder / "evidence-variance.svg")
    evidence_lemmas.draw(found, folder / "evidence-theory.svg")
    _language(found, folder / "evidence-language.svg")
    if memory:
        evidence_memory.draw(memory, folder / "evidence-memory.svg")


def _curves(found: Results, path: Path) -> None:
    """Training loss along a run, the mean of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, where in zip(figure.subplots(2, 2).flat, BUDGETS, strict=True):
        for color, method in enumerate(SHOWN):
            line = _line(found.cell(where, method), by_queries=where.queries is not None)
            axes.plot(*zip(*line, strict=True) if line else ([], []), color=f"C{color}",
                      label=method, linewidth=1.2, marker=".", markersize=3)  # fmt: skip
        scaled(axes, xscale="log", yscale="log", title=f"{where.problem}, equal {where.budget}",
               xlabel="queries" if where.queries else "steps", ylabel="training loss",
               xlim=(500 if where.queries else 8, None))  # fmt: skip
    legend(axes)
    save(figure, path)


def _line(cell: Cell, by_queries: bool) -> list[tuple[float, ...]]:
    """Where the seeds are on average: at the steps that all of them have made, and at the end."""
    points = defaultdict(list)
    for run in cell.runs:
        for step, queries, loss in run.get("curve", ()):
            points[step].append((queries if by_queries else step, loss))
        end = run.get("queries" if by_queries else "steps"), run.get("training")
        points[math.inf] += [end] if None not in end else []
    found = [seeds for _, seeds in sorted(points.items()) if _whole(seeds)]
    return [tuple(statistics.mean(each) for each in zip(*seeds, strict=True)) for seeds in found]


def _whole(seeds: Sequence[tuple[float, float]]) -> bool:
    """Whether all seeds are there, and none has diverged."""
    return len(seeds) == len(SEEDS) and all(loss < DIVERGED for _, loss in seeds)


def _batches(found: Results, path: Path) -> None:
    """Accuracy by the rows of a minibatch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for color, method in enumerate((*SHOWN[:1], *SHOWN[2:4], "MeZO()", "MeZOSVRG()")):
        points = []
        for size in BATCHES:
            piece = "methods" if size == 32 else "batch sizes"
            cell = found.cell(Where(piece, "MNIST", 200_000, None, size), method)
            points += [(size, cell.mean("accuracy"))] if cell.runs else []
        if points:
            axes.plot(*zip(*points, strict=True), color=f"C{color}", marker="o", label=method)
    scaled(axes, xscale="log", xlabel="rows of a minibatch", ylabel="accuracy", ylim=(0, 1))
    axes.set_xticks(BATCHES, [str(size) for size in BATCHES])
    axes.set_xticks([], minor=True)
    axes.set_title("MNIST perceptron, 200,000 queries", fontsize="medium")
    legend(axes)
    save(figure, path)


def _language(found: Results, path: Path) -> None:
    """Accuracy of the causal language model by view and precision, a dot for every seed."""
    from matplotlib.figure import Figure

    if not any(found.cell(by_queries(view), "MeZO").runs for view in VIEWS[1:]):
        return  # a picture of one view says no more than the table
    names = ("MeZO", "MeZO-SVRG as printed", "MeZO()", "FO-SGD", "FO-Adam")
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, half in zip(figure.subplots(1, 2, sharey=True), HALVES, strict=True):
        for color, method in enumerate(names):
            places, values = list[float](), list[float]()
            for place, view in enumerate(VIEWS):
                good = found.cell(by_queries(view, half), method).good("accuracy")
                places += [place + 0.13 * (color - 2)] * len(good)
                values += good
            axes.plot(places, values, "o", color=f"C{color}", label=method, markersize=5)
        axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(VIEWS)), VIEWS)
        axes.set(title=f"{'bf16' if half else 'fp32'}, equal {QUERIES:,} queries")
    figure.axes[0].set_ylabel("held-out accuracy")
    legend(figure.axes[1], loc="upper right")
    save(figure, path)
