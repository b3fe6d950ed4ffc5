"""Tables and figures of docs/evidence.md, from the results of benchmarks/evidence.py."""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence import SEEDS, Run

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "evidence.md"
BEGIN, END = "<!-- tables: {} -->", "<!-- end: {} -->"


def report(results: Mapping[str, Any]) -> None:
    """Print every table that has results, and put it into its place on the page."""
    runs = [(Run(*json.loads(key)), found) for key, found in results.items()]
    counted = [(run, found) for run, found in runs if run.seed in SEEDS]
    tables = {
        "methods": methods(counted),
        "ablations": by_method(counted, "ablations", "training loss"),
        "batch sizes": batch_sizes(counted),
        "moments": theory(counted),
        "rate of convergence": convergence(counted),
    }
    page = PAGE.read_text() if PAGE.exists() else ""
    for name, table in tables.items():
        print(f"## {name}\n\n{table}\n")
        begin, end = re.escape(BEGIN.format(name)), re.escape(END.format(name))
        page = re.sub(
            f"({begin}\n).*?({end})", lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S
        )
    if page:
        PAGE.write_text(page)
    draw(counted)


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation; a diverged run is said."""
    good = [value for value in values if value is not None]
    if len(good) < len(values):
        return f"{len(values) - len(good)} of {len(values)} diverged"
    if not good:
        return "-"
    width = f".{digits}g"
    deviation = f" ± {statistics.stdev(good):.2g}" if len(good) > 1 else ""
    return f"{statistics.mean(good):{width}}{deviation}"


def rows_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods(runs: Sequence[tuple[Run, Any]]) -> str:
    """Methods by problem and budget."""
    cells: dict[tuple[str, str], list[Any]] = defaultdict(list)
    rates: dict[tuple[str, str], float | None] = {}
    for run, found in runs:
        if run.piece == "methods":
            figure = "training loss" if run.problem == "least squares" else "accuracy"
            budget = f"{run.queries:,} queries" if run.queries else f"{run.steps:,} steps"
            column = f"{run.problem}, {figure}, {budget}"
            cells[run.method, column].append(found.get(figure))
            rates[run.method, column] = run.lr
    columns = sorted({column for _, column in cells})
    names = list(dict.fromkeys(name for name, _ in cells))

    def cell(name: str, column: str) -> str:
        values = cells.get((name, column))
        if not values:
            return "-"
        rate = rates[name, column]
        return spread(values) + (f" (lr {rate:g})" if rate else "")

    return rows_of(
        ["method", *columns], ([name, *(cell(name, c) for c in columns)] for name in sorted(names))
    )


def by_method(runs: Sequence[tuple[Run, Any]], piece: str, figure: str) -> str:
    """One figure a method."""
    cells: dict[str, list[Any]] = defaultdict(list)
    rates: dict[str, float | None] = {}
    for run, found in runs:
        if run.piece == piece:
            cells[run.method].append(found.get(figure))
            rates[run.method] = run.lr
    rows = ([name, spread(values), f"{rates[name]:g}"] for name, values in cells.items())
    return rows_of(["what differs", figure, "lr"], rows)


def batch_sizes(runs: Sequence[tuple[Run, Any]]) -> str:
    """Accuracy on MNIST by the rows of a minibatch."""
    cells: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for run, found in runs:
        if run.problem == "MNIST perceptron" and run.queries == 200_000:
            cells[run.method, run.batch_size].append(found.get("accuracy"))
    sizes = sorted({size for _, size in cells})
    several = [name for name, size in cells if size != 32]
    rows = (
        [name, *(spread(cells.get((name, size), [])) for size in sizes)]
        for name in dict.fromkeys(several)
    )
    return rows_of(["method", *(f"b = {size}" for size in sizes)], rows)


def theory(runs: Sequence[tuple[Run, Any]]) -> str:
    """Unbiased, and of the expected size."""
    rows = []
    for run, found in sorted(runs):
        if run.piece == "moments":
            rows.append(
                [
                    f"{run.problem}, seed {run.seed}",
                    f"{found['mean along the gradient']:.3f} ± {found['its error']:.3f}",
                    f"{found['second moment']:.1f} ± {found['its standard error']:.1f}",
                    f"{found['expected']}",
                ]
            )
    return rows_of(
        ["function", "mean along grad f, of ‖grad f‖²", "E‖g‖² / ‖grad f‖²", "d + 2"], rows
    )


def convergence(runs: Sequence[tuple[Run, Any]]) -> str:
    """Mean squared gradients, and the exponents of a fit c d^a T^b."""
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run, found in runs:
        if run.piece == "rate of convergence":
            value = found["mean squared gradient"]
            cells[int(run.problem.split()[-1]), run.steps or 0].append(value)
    dimensions, steps = sorted({d for d, _ in cells}), sorted({t for _, t in cells})
    rows = [[f"{d}", *(spread(cells.get((d, t), [])) for t in steps)] for d in dimensions]
    table = rows_of(["d", *(f"T = {t:,}" for t in steps)], rows)
    points = [
        (math.log(d), math.log(t), math.log(v)) for (d, t), vs in cells.items() for v in vs if v > 0
    ]
    if len(points) < 4:
        return table
    import numpy as np

    x = np.array([[1.0, d, t] for d, t, _ in points])
    y = np.array([v for *_, v in points])
    (_, a, b), *_ = np.linalg.lstsq(x, y, rcond=None)
    return f"{table}\n\nFit over all: E‖grad f‖² proportional to d^{a:.2f} T^{b:.2f}."


def draw(runs: Sequence[tuple[Run, Any]]) -> None:
    """The methods on least squares at equal queries and at equal steps."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "evidence"  # the same file for the same figures
    found: dict[str, dict[str, list[float]]] = {"queries": {}, "steps": {}}
    for run, one in runs:
        if run.piece == "methods" and run.problem == "least squares":
            kind = "queries" if run.queries else "steps"
            loss = one.get("training loss")
            found[kind].setdefault(run.method, []).append(math.nan if loss is None else loss)
    kinds = [kind for kind, methods_ in found.items() if methods_]
    if not kinds:
        return
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        names = sorted(found[kind], key=lambda name, k=kind: statistics.mean(found[k][name]))
        axis.barh(names[::-1], [statistics.mean(found[kind][name]) for name in names[::-1]])
        axis.set_xscale("log")
        axis.set_xlabel("loss, least squares (start about 97)")
        axis.set_title(f"equal {kind}")
    figure.tight_layout()
    (DOCS / "figures").mkdir(exist_ok=True)
    figure.savefig(DOCS / "figures" / "evidence-least-squares.svg", metadata={"Date": None})
    pyplot.close(figure)
