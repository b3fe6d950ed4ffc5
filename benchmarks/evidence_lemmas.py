"""Lemmas 5.1 and 5.2 and Theorem 5.3 in tables, claims and a figure, for benchmarks/evidence.py."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evidence_cells import Claim, Results, markdown, spread
from evidence_drawing import legend, save, scaled
from evidence_theory import bound

THEORY = "[table](#theory)"


def by_size(found: Results, piece: str, method: str) -> dict[tuple[int, int], list[float]]:
    """Mean squared gradients by d and T."""
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run, one in found.of(piece):
        if run.method == method and one.get("mean squared gradient") is not None:
            key = int(run.problem.split()[-1]), run.steps or 0
            cells[key].append(one["mean squared gradient"])
    return cells


def exponents(cells: Mapping[tuple[int, int], Sequence[float]]) -> tuple[float, float] | None:
    """Of d and T; None: too few points."""
    import numpy as np

    points = [(math.log(d), math.log(t), math.log(v)) for (d, t), vs in cells.items() for v in vs]
    if len({p[:2] for p in points}) < 4:
        return None
    x = np.array([[1.0, d, t] for d, t, _ in points])
    (_, a, b), *_ = np.linalg.lstsq(x, np.array([v for *_, v in points]), rcond=None)
    return float(a), float(b)


def late(
    cells: Mapping[tuple[int, int], Sequence[float]],
) -> dict[tuple[int, int], Sequence[float]]:
    """Those of T >= 10 d, of the sizes that do not grow."""
    grow = growing(cells)
    return {(d, t): v for (d, t), v in cells.items() if t >= 10 * d and d not in grow}


def growing(cells: Mapping[tuple[int, int], Sequence[float]]) -> list[int]:
    """The sizes whose squared gradients are largest in the longest runs."""
    means = {key: statistics.mean(values) for key, values in cells.items()}
    found = []
    for size in sorted({d for d, _ in cells}):
        steps = sorted(t for d, t in cells if d == size)
        if len(steps) > 1 and means[size, steps[-1]] > 1.5 * means[size, steps[0]]:
            found.append(size)
    return found


def by_rows(found: Results) -> dict[int, dict[int, list[float]]]:
    """Squared gradients late in a run of Theorem 5.3, by steps and rows of the large batch."""
    cells: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, one in sorted(found.of("Theorem 5.3"), key=lambda pair: pair[0].steps or 0):
        if run.method.startswith("large batch"):
            rows = int(run.method.split()[-1])
            cells[run.steps or 0][rows].append(one["of the second half"])
    return {steps: dict(sorted(rows.items())) for steps, rows in cells.items()}


def moments(found: Results) -> str:
    """Unbiased, and of the expected size."""
    rows = [
        [
            f"{run.problem}, seed {run.seed}",
            f"{one['mean along the gradient']:.3f} ± {one['its error']:.3f}",
            f"{one['second moment']:.1f} ± {one['its standard error']:.1f}",
            f"{one['expected']}",
        ]
        for run, one in sorted(found.of("moments"))
    ]
    return markdown(
        ["function", "mean along grad f, of ‖grad f‖²", "E‖g‖² / ‖grad f‖²", "d + 2"], rows
    )


def convergence(found: Results, piece: str, method: str) -> str:
    """Mean squared gradients, and the exponents of a fit c d^a T^b."""
    cells = by_size(found, piece, method)
    dimensions, steps = sorted({d for d, _ in cells}), sorted({t for _, t in cells})
    rows = [
        [f"{d}", *(spread(cells[d, t]) if (d, t) in cells else "-" for t in steps)]
        for d in dimensions
    ]
    text = markdown(["d", *(f"T = {t:,}" for t in steps)], rows)
    fitted, grow = exponents(late(cells)), growing(cells)
    if fitted:
        text += f"\n\nFit over T >= 10 d{f', without d = {grow[0]}' if grow else ''}: "
        text += f"proportional to d^{fitted[0]:.2f} T^{fitted[1]:.2f}."
    return text


def large_batch(found: Results) -> str:
    """Where the squared gradient stays, by the rows of the large batch of 256."""
    by_steps = by_rows(found)
    sizes = sorted({b for cells in by_steps.values() for b in cells})
    rows = [
        [f"{b}", *(spread(cells[b]) if b in cells else "-" for cells in by_steps.values())]
        for b in sizes
    ]
    return markdown(["rows of the large batch", *(f"T = {t:,}" for t in by_steps)], rows)


def claims(found: Results) -> Iterator[Claim]:
    """Lemmas and Theorem 5.3."""
    runs = found.of("moments")
    if runs:
        apart = max(abs(o["mean along the gradient"] - 1) / o["its error"] for _, o in runs)
        text = f"{len(runs)} means, the farthest {apart:.1f} standard errors from 1"
        yield ("The estimate is unbiased (Lemma 5.1)", "smooth non-convex functions", text,
               "yes" if apart < 3 else "no", THEORY)  # fmt: skip
        ratio = [o["second moment"] / o["expected"] for _, o in runs]
        text = f"E‖g‖² / ((d + 2) ‖grad f‖²) from {min(ratio):.2f} to {max(ratio):.2f}"
        yield ("Its size grows as d (Lemma 5.2)", "the same", text,
               "yes" if max(abs(r - 1) for r in ratio) < 0.1 else "no", THEORY)  # fmt: skip
    for piece, method, name in (
        ("rate of convergence", "MeZO", "MeZO, eta = 1 / 4 (d + 2)"),
        ("Theorem 5.3", "eta = rho / L (d + 2)", "MeZO-SVRG, eta = rho / L (d + 2), rho = 0.1"),
    ):
        cells = by_size(found, piece, method)
        if not cells:
            continue
        sizes = f"d in {sorted({d for d, _ in cells})}, T in {sorted({t for _, t in cells})}"
        if method == "MeZO":
            shares = [v / (bound(d) / t) for (d, t), values in cells.items() for v in values]
            text = f"{min(shares):.2f} to {max(shares):.2f} of what the descent lemma allows"
            yield ("The mean of ‖grad f‖² is below c d / T (Theorem 5.3)", f"{name}, {sizes}",
                   text, "yes" if max(shares) <= 1 else "no", THEORY)  # fmt: skip
        fitted, grow = exponents(late(cells)), growing(cells)
        if fitted:
            text = f"d^{fitted[0]:.2f} T^{fitted[1]:.2f}"
            text += f" without d = {grow[0]}" if grow else ""
            holds = "yes" if fitted[1] < -0.9 else "not reached at these T"
            holds = f"no, it grows at d = {grow[0]}" if grow else holds
            yield "The mean of ‖grad f‖² falls as 1 / T", f"{name}, T >= 10 d", text, holds, THEORY
    for steps, floors in by_rows(found).items():
        means = [statistics.mean(values) for values in floors.values()]
        text = f"{min(means):.2g} to {max(means):.2g} for b from {min(floors)} to {max(floors)}"
        yield ("A floor of O(1 / b) is left by a large batch of b < n rows (Theorem 5.3)",
               f"d = 10, n = 256, {steps:,} steps", text,
               "seen" if means[0] > 2 * means[-1] else "not seen", THEORY)  # fmt: skip
    steep = [o for run, o in found.of("Theorem 5.3") if run.method == "eta = rho / L"]
    if steep:
        squares = [o.get("of the second half") for o in steep]
        worse = sum(s is None or not math.isfinite(s) or s > 1e4 for s in squares)
        text = f"{worse} of {len(steep)} runs diverged at rho = 0.1; at eta = rho / L (d + 2) none"
        yield ("eta = rho / L is small enough (Gaussian directions)",
               "MeZO-SVRG, d in [10, 100, 1000], 100 steps", text,
               "no" if worse else "yes", THEORY)  # fmt: skip


def draw(found: Results, path: Path) -> None:
    """Mean squared gradients by T, and by the rows of the large batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    rate, floor = figure.subplots(1, 2)
    for style, piece, method, name in (
        ("-", "rate of convergence", "MeZO", "MeZO"),
        (":", "Theorem 5.3", "eta = rho / L (d + 2)", "MeZO-SVRG"),
    ):
        cells = by_size(found, piece, method)
        for color, d in enumerate(sorted({d for d, _ in cells})):
            steps = sorted(t for size, t in cells if size == d)
            means = [statistics.mean(cells[d, t]) for t in steps]
            rate.plot(steps, means, style, color=f"C{color}", marker="o", markersize=3,
                      label=f"{name}, d = {d}")  # fmt: skip
    scaled(rate, xscale="log", yscale="log", xlabel="T", ylabel="mean ‖grad f‖²")
    legend(rate)
    for steps, rows in by_rows(found).items():
        means = [statistics.mean(values) for values in rows.values()]
        floor.plot(list(rows), means, marker="o", markersize=3, label=f"T = {steps:,}")
    scaled(floor, xscale="log", yscale="log", xlabel="rows of the large batch, of 256",
           ylabel="mean ‖grad f‖², second half", ylim=(1e-3, 2))  # fmt: skip
    floor.set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
    floor.set_xticks([], minor=True)
    legend(floor)
    save(figure, path)
