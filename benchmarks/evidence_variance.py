"""What the noise of the estimates is made of along a run, by TrackVariance, for evidence.py."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evidence_cells import Results, markdown
from evidence_pieces import DIGITS, LS, SEEDS, WATCHED, Run

from zo_adapt import TrackVariance
from zo_adapt.term import Step

FIGURES = ("direction_noise", "data_noise", "explained", "distance", "cosine")
NAME = "variance"


def watching(run: Run) -> dict[str, TrackVariance]:
    """Forty looks along the run, at as many rows for a direction as its minibatches have."""
    every = max(1, (run.steps or 1) // 40)
    return {NAME: TrackVariance(every, batch_size=run.batch_size, gradient=True)}


def track_of(history: Sequence[Step]) -> list[list[float | None]]:
    """The step and ``FIGURES`` of every look; None: the method has no such figure."""
    return [
        [step.step, *(_rounded(step.metrics.get(f"{NAME}_{name}")) for name in FIGURES)]
        for step in history
        if step.metrics
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


class Look(NamedTuple):
    """One look at a run.

    Args:
        step: After which step.
        direction, data: G and sigma^2, of one example.
        explained: Share of a minibatch estimate that the control variate takes out.
        distance: |theta - theta_bar|.
        cosine: Of the last step and the negative gradient.
        rows: Of a minibatch.
    """

    step: int
    direction: float
    data: float
    explained: float | None
    distance: float | None
    cosine: float | None
    rows: int

    @property
    def total(self) -> float:
        """G + sigma^2 / b: d times it is the mean squared error of a pair on b rows."""
        return self.direction + self.data / self.rows

    @property
    def data_share(self) -> float:
        """The data's share of it, the most that a better estimate on all rows would take out."""
        return self.data / self.rows / self.total

    @property
    def left(self) -> float | None:
        """The error of a minibatch step of Algorithm 1 over that of MeZO's on as many rows.

        That of g, d G, and that of the difference of the two estimates: what is not explained of a
        minibatch's along a shared direction; along two, all of both.
        """
        if self.explained is None:
            return None
        return (self.direction + (1 - self.explained) * self.total) / self.total

    @property
    def left_of_two(self) -> float:
        """The same along two directions."""
        return (self.direction + 2 * self.total) / self.total


def looks(found: Results, problem: str, method: str) -> list[list[Look]]:
    """Those of every seed; none where a seed is missing."""
    runs = [
        [Look(*row, run.batch_size) for row in one["track"]]
        for run, one in sorted(found.of("variance"), key=lambda pair: pair[0].seed)
        if (run.problem, run.method) == (problem, method) and "track" in one
    ]
    return runs if len(runs) == len(SEEDS) else []


def mean(runs: Sequence[Sequence[Look]], figure: Callable[[Look], float | None]) -> list[float]:
    """The mean of the seeds at every look that all of them have; NaN where it is missing."""
    rows = []
    for each in zip(*runs, strict=False):
        values = [value for value in map(figure, each) if value is not None]
        rows.append(statistics.fmean(values) if len(values) == len(each) else math.nan)
    return rows


def table(found: Results) -> str:
    """The first and the last fifth of the runs."""
    header = ["", "part", "G", "sigma² / b", "data's share", "explained",
              "‖theta - theta_bar‖", "cosine", "error / MeZO's"]  # fmt: skip
    rows = []
    for problem in (LS, DIGITS):
        for method in WATCHED:
            runs = looks(found, problem, method)
            fifth = max(1, len(runs[0]) // 5) if runs else 0
            for name, part in (("first fifth", slice(fifth)), ("last fifth", slice(-fifth, None))):
                if runs:
                    cells = (_text(one[part]) for one in _columns(runs, method))
                    rows.append([f"{problem}, {method}", name, *cells])
    return markdown(header, rows)


def _columns(runs: Sequence[Sequence[Look]], method: str) -> list[list[float]]:
    figures: list[Callable[[Look], float | None]] = [
        lambda one: one.direction,
        lambda one: one.data / one.rows,
        lambda one: one.data_share,
        lambda one: one.explained,
        lambda one: one.distance,
        lambda one: one.cosine,
        left_of(method),
    ]
    return [mean(runs, figure) for figure in figures]


def left_of(method: str) -> Callable[[Look], float | None]:
    """The share of MeZO's error that a minibatch step of a method has."""
    if "SVRG" not in method:
        return lambda one: None
    two = "printed" in method or "two directions" in method
    return (lambda one: one.left_of_two) if two else (lambda one: one.left)


def _text(values: Sequence[float]) -> str:
    found = [value for value in values if not math.isnan(value)]
    return f"{statistics.fmean(found):.2g}" if found else "-"


def draw(found: Results, path: Path) -> None:
    """Noise, its shares, the way from the snapshot and the cosine, by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    for row, problem in zip(figure.subplots(2, 4), (LS, DIGITS), strict=True):
        for color, method in enumerate(WATCHED):
            runs = looks(found, problem, method)
            if runs:
                _lines(row, runs, f"C{color}", method)
        row[0].set(yscale="log", ylabel=problem, title="G (line), sigma² / b (dots)")
        row[1].set(ylim=(-0.05, 1.05), title="data's share (dots), explained (line)")
        row[2].set(yscale="log", title="‖theta - theta_bar‖")
        row[3].set(title="cosine of step and -gradient")
        row[3].axhline(0, color="grey", linewidth=0.8, linestyle=":")
        for axes in row:
            axes.title.set_fontsize("medium")
            axes.set_xlabel("steps")
    figure.axes[0].legend(fontsize="x-small", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _lines(row: Any, runs: Sequence[Sequence[Look]], color: str, method: str) -> None:
    steps = [float(one.step) for one in runs[0]]

    def plot(axes: Any, figure: Callable[[Look], float | None], style: str = "-") -> None:
        values = mean(runs, figure)
        if not all(map(math.isnan, values)):
            label = method if style == "-" else None
            axes.plot(steps[: len(values)], values, style, color=color, linewidth=1.2,
                      markersize=3, label=label)  # fmt: skip

    plot(row[0], lambda one: one.direction)
    plot(row[0], lambda one: one.data / one.rows, ".")
    plot(row[1], lambda one: one.explained)
    plot(row[1], lambda one: one.data_share, ".")
    plot(row[2], lambda one: one.distance)
    plot(row[3], lambda one: one.cosine)


def claims(found: Results, link: str) -> list[tuple[str, str, str, str, str]]:
    """Whether the variance falls, and which part of it matters."""
    rows = []
    for problem in (LS, DIGITS):
        setting = f"{problem}, pairs, b = 32, TrackVariance along the runs"
        plain = looks(found, problem, "MeZO")
        if plain:
            shares = mean(plain, lambda one: one.data_share)
            text = f"share of the data {min(shares):.2f} to {max(shares):.2f}"
            holds = "yes" if min(shares) > 0.5 else "no" if max(shares) < 0.5 else "in part"
            rows.append(("The noise of the data is the larger part of MeZO's error", setting, text,
                         holds, link))  # fmt: skip
        for method in WATCHED:
            runs = looks(found, problem, method)
            if not runs or "SVRG" not in method:
                continue
            left = mean(runs, left_of(method))
            text = f"{min(left):.2f} to {max(left):.2f} of MeZO's on as many rows"
            holds = "yes" if max(left) < 1 else "no" if min(left) > 1 else "in part"
            rows.append((f"The error of a step is smaller than MeZO's: {method}", setting, text,
                         holds, link))  # fmt: skip
    return rows
