"""What the noise of the estimates is made of along a run, by TrackVariance, for evidence.py."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evidence_cells import Claim, Results, markdown
from evidence_drawing import legend, scaled
from evidence_plan import DIGITS, LS, SEEDS, WATCHED, Run
from evidence_problems import Problem
from torch import Tensor

from zo_adapt import TrackVariance
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.term import Step

FIGURES = ("direction_noise", "data_noise", "explained", "distance")
NAME = "variance"
PROBLEMS = (LS, DIGITS, "encoder, LoRA")
ROWS_AT_ONCE = 256
"""Of a gradient on all rows: what its backpropagation keeps."""


class Track:
    """Forty looks along a run, at as many rows for a direction as its minibatches have.

    Every second is after a minibatch step of q = 2: the looks are an even number of steps apart.
    """

    def __init__(self, run: Run, problem: Problem) -> None:
        self.every = 2 * max(1, (run.steps or 1) // 80)
        self.metrics = {NAME: TrackVariance(self.every, batch_size=run.batch_size)}
        self._objective, self._steps = problem.objective, dict[int, tuple[float, float, float]]()
        source = as_source(problem.data, getattr(problem.objective, "collate", None))
        self._rows = Batch(source, range(len(source)))
        view = problem.view
        self._tensors = [
            tensor
            for name, tensor in view.tensors.items()
            if view.group_of(name).perturbation_scale > 0  # a step is compared where it can go
        ]
        self._before: tuple[Tensor, Tensor] | None = None

    def look(self, step: Step) -> None:
        """Compare a step with the gradient where it began, on all rows."""
        if self._before is not None:
            place, gradient = self._before
            v = (place - self._place()) / (step.lr or 1.0)
            of_gradient = float(gradient.square().sum())
            cosine = float(v @ gradient / (v.norm() * gradient.norm()))
            error = float((v - gradient).square().sum()) / of_gradient
            self._steps[step.step] = cosine, error, of_gradient
        at_look = (step.step + 1) % self.every == 0
        self._before = (self._place(), self._gradient()) if at_look else None

    def _place(self) -> Tensor:
        return torch.cat([one.detach().double().flatten() for one in self._tensors])

    def _gradient(self) -> Tensor:
        needed = [tensor.requires_grad for tensor in self._tensors]
        for tensor in self._tensors:
            tensor.requires_grad_(True)
        total = torch.zeros((), dtype=torch.float64)
        for part in self._rows.micro_batches(ROWS_AT_ONCE):
            with torch.enable_grad():
                loss = self._objective(part.content).mean() * (len(part) / len(self._rows))
            found = torch.autograd.grad(loss, self._tensors)
            total = total + torch.cat([one.double().flatten() for one in found])
        for tensor, before in zip(self._tensors, needed, strict=True):
            tensor.requires_grad_(before)
        return total

    def rows(self, history: Sequence[Step]) -> list[list[float | None]]:
        """Step, ``FIGURES``, cosine, squared error over the gradient's, and that; or None."""
        return [
            [
                step.step,
                *(_rounded(step.metrics.get(f"{NAME}_{name}")) for name in FIGURES),
                *map(_rounded, self._steps.get(step.step, (None, None, None))),
            ]
            for step in history
            if step.metrics
        ]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


class Look(NamedTuple):
    """One look at a run.

    Args:
        step: After which step.
        estimated, data: G and sigma^2 of one example, as TrackVariance has them.
        explained: Share of a minibatch estimate that the control variate takes out.
        distance: |theta - theta_bar|.
        cosine: Of the step that ended there, and the negative gradient where it began.
        error: Its |v - grad f|^2 / |grad f|^2.
        direction: G, the gradient's square on all rows, by backpropagation.
        rows: Of a minibatch.
    """

    step: float
    estimated: float
    data: float
    explained: float | None
    distance: float | None
    cosine: float | None
    error: float | None
    direction: float
    rows: float

    @property
    def total(self) -> float:
        """Mean p^2 on b rows: d times it is the mean squared error of a pair.

        G + sigma^2 / b, with the gradient's own G, as TrackVariance's of a few directions is
        noisy. Where batches are stratified by class that takes a part of sigma^2 out.
        """
        return self.direction + self.data / self.rows

    @property
    def data_share(self) -> float:
        """The data's share of it, the most that a better estimate on all rows would take out."""
        return 1 - self.direction / self.total

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


def pooled(runs: Sequence[Sequence[Look]], part: slice) -> Look:
    """The means over the seeds and the looks of a part: single ones are too noisy for shares."""
    parts = [look for run in runs for look in run[part]]
    means = (_mean([look[i] for look in parts]) for i in range(len(Look._fields)))
    needed = [
        Look._fields.index(name) for name in ("step", "estimated", "data", "direction", "rows")
    ]
    return Look(*(one or 0.0 if i in needed else one for i, one in enumerate(means)))


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def fifths(runs: Sequence[Sequence[Look]]) -> list[Look]:
    """The run in five parts."""
    size = max(1, min(map(len, runs)) // 5)
    return [pooled(runs, slice(i * size, (i + 1) * size)) for i in range(5)]


def table(found: Results) -> str:
    """The first and the last fifth of the runs."""
    header = ["", "part", "G", "p²", "data's share", "explained",
              "‖theta - theta_bar‖", "cosine", "error"]  # fmt: skip
    rows = []
    for problem in PROBLEMS:
        for method in WATCHED:
            runs = looks(found, problem, method)
            parts = fifths(runs) if runs else []
            for name, i in (("first fifth", 0), ("last fifth", -1)) if parts else ():
                one = parts[i]
                figures = (one.direction, one.total, one.data_share, one.explained,
                           one.distance, one.cosine, one.error)  # fmt: skip
                cells = map(_text, figures)
                rows.append([f"{problem}, {method}", name, *cells])
    return markdown(header, rows)


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def left_of(method: str, one: Look) -> float | None:
    """The share of MeZO's error that a minibatch step of a method has; None: it is MeZO."""
    if "SVRG" not in method:
        return None
    return one.left_of_two if "printed" in method or "two directions" in method else one.left


def draw(found: Results, path: Path) -> None:
    """Noise, its shares, the way from the snapshot and the cosine, by step."""
    from matplotlib.figure import Figure

    drawn = [one for one in PROBLEMS if any(looks(found, one, method) for method in WATCHED)]
    drawn = drawn or [LS]
    figure = Figure(figsize=(12, 2.8 * len(drawn)), layout="constrained")
    panels = figure.subplots(len(drawn), 4, squeeze=False)
    for row, problem in zip(panels, drawn, strict=True):
        for color, method in enumerate(WATCHED):
            runs = looks(found, problem, method)
            if runs:
                _lines(row, runs, f"C{color}", method)
        scaled(row[0], yscale="log", ylabel=problem, title="G (line), mean p² (dots)")
        row[1].set(ylim=(-0.05, 1.05), title="data's share (dots), explained (line)")
        row[2].set(title="‖theta - theta_bar‖ at the looks")
        row[3].set(title="cosine of step and -gradient")  # where the step began
        row[3].axhline(0, color="grey", linewidth=0.8, linestyle=":")
        for axes in row:
            axes.title.set_fontsize("medium")
            axes.set_xlabel("steps")
    legend(figure.axes[1], loc="lower left")
    figure.savefig(path, metadata={"Date": None})


def _lines(row: Any, runs: Sequence[Sequence[Look]], color: str, method: str) -> None:
    """Means of five looks in a row."""
    count = min(map(len, runs))
    means = [pooled(runs, slice(max(0, i - 2), i + 3)) for i in range(count)]
    for axes, figure, style in (
        (row[0], lambda one: one.direction, "-"),
        (row[0], lambda one: one.total, "."),
        (row[1], lambda one: one.explained, "-"),
        (row[1], lambda one: one.data_share, "."),
        (row[2], lambda one: one.distance, "-"),
        (row[3], lambda one: one.cosine, "-"),
    ):
        points = [(look.step, figure(one)) for look, one in zip(runs[0], means, strict=False)]
        drawn = [(step, value) for step, value in points if value is not None]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), style, color=color, linewidth=1.2, markersize=3,
                      label=method if style == "." else None)  # fmt: skip


def claims(found: Results, link: str) -> list[Claim]:
    """Whether the variance falls, and which part of it matters."""
    rows = []
    for problem in PROBLEMS:
        watched = {method: looks(found, problem, method) for method in WATCHED}
        sizes = sorted({run[0].rows for runs in watched.values() for run in runs})
        rows_said = " or ".join(f"{size:.0f}" for size in sizes)
        setting = f"{problem}, pairs, b = {rows_said}, TrackVariance along the runs, by fifths"
        plain = watched["MeZO"]
        if plain:
            shares = [one.data_share for one in fifths(plain)]
            text = f"share of the data {min(shares):.2f} to {max(shares):.2f}"
            holds = "yes" if min(shares) > 0.5 else "no" if max(shares) < 0.5 else "in part"
            rows.append(("The noise of the data is the larger part of MeZO's error", setting, text,
                         holds, link))  # fmt: skip
        for method, runs in watched.items():
            if not runs or "SVRG" not in method:
                continue
            left = [left_of(method, one) or 0.0 for one in fifths(runs)]
            text = f"{min(left):.2f} to {max(left):.2f} of MeZO's on as many rows by its parts"
            whole = [pooled(one, slice(None)).error for one in (runs, plain) if one]
            if len(whole) == 2:
                text += "; measured {:.0f} ‖grad f‖², MeZO's {:.0f}".format(*whole)
            ratios = list(left)
            if plain:
                pairs = zip(fifths(runs), fifths(plain), strict=True)
                ratios += [ours.error / theirs.error for ours, theirs in pairs]
            holds = "yes" if max(ratios) < 1 else "no" if min(ratios) > 1 else "in part"
            rows.append((f"The error of a minibatch step is smaller than MeZO's: {method}", setting,
                         text, holds, link))  # fmt: skip
    return rows
