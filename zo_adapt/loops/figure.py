"""A run as a figure: the value, the metrics and, where it was watched, what its noise is."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zo_adapt.term import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHED_SHARE = 1 / 20
"""Of a run's steps: how many the value is averaged over."""
SHARE, NOISES = "_data_share", ("_direction_noise", "_data_noise")
"""How the names of what ``TrackVariance`` reports end: the noises share one panel."""
Points = list[tuple[int, float]]


def draw(history: Sequence[Step]) -> "Figure":
    """The steps of a run against its queries, one panel for each thing that was measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    names = metric_names(history)
    shares = [name for name in names if name.endswith(SHARE)]
    parts = {name.removesuffix(SHARE) + end for name in shares for end in (SHARE, *NOISES)}
    plain = [name for name in names if name not in parts]
    panels = 1 + len(plain) + 2 * len(shares)
    figure = Figure(figsize=(7, 3 + 2 * (panels - 1)), layout="constrained")
    first, *others = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    _values(first, history)
    for axes, name in zip(others, plain + shares, strict=False):
        _line(axes, measured(history, name), name)
        if name in shares:
            axes.set_ylabel(f"{name.removesuffix(SHARE)}: share of data noise")
            axes.set_ylim(0, 1)
    for axes, name in zip(others[len(plain + shares) :], shares, strict=True):
        _noises(axes, history, name.removesuffix(SHARE))
    figure.axes[-1].set_xlabel("queries")
    return figure


def metric_names(history: Sequence[Step]) -> list[str]:
    """Names of all that was measured, in the order in which it first was."""
    return list(dict.fromkeys(name for step in history for name in step.metrics or ()))


def measured(history: Sequence[Step], name: str) -> Points:
    """Where a metric was measured, and what it was."""
    return [(s.queries, s.metrics[name]) for s in history if s.metrics and name in s.metrics]


def _values(axes: Any, history: Sequence[Step]) -> None:
    queries, values = [step.queries for step in history], [step.value for step in history]
    axes.plot(queries, values, alpha=0.25, linewidth=0.8)
    axes.plot(queries, smoothed(values, len(values) * SMOOTHED_SHARE), color="C0")
    axes.set_ylabel("value")


def _line(axes: Any, points: Points, label: str) -> None:
    axes.plot([at for at, _ in points], [value for _, value in points], marker=".")
    axes.set_ylabel(label)


def _noises(axes: Any, history: Sequence[Step], name: str) -> None:
    """Of the direction and of the data, over orders of magnitude; G may come out below 0."""
    found = {end: measured(history, name + end) for end in NOISES}
    for end, points in found.items():
        label = end.strip("_").replace("_", " ")
        axes.plot([at for at, _ in points], [noise for _, noise in points], marker=".", label=label)
    if any(noise > 0 for points in found.values() for _, noise in points):
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel(f"{name}: noise of an example")
    axes.legend()


def smoothed(values: list[float], width: float) -> list[float]:
    """Exponential moving average over about ``width`` values, of which the first is unbiased too.

    Example:
        >>> smoothed([1.0, 3.0], 1.0)
        [1.0, 3.0]
        >>> [round(value, 3) for value in smoothed([1.0, 3.0, 3.0], 2.0)]
        [1.0, 2.333, 2.714]
    """
    keep = 1.0 - 1.0 / max(width, 1.0)
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1.0
        averages.append(total / weight if weight else math.nan)
    return averages
