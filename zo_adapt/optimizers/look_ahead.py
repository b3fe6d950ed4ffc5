"""Whether a run's steps are too short or too long, seen by looking along its last ones.

With u the last updates, on rows of which no step has made use, at the weights theta now:

    f(theta - u), f(theta), f(theta + u)

A parabola through the three says where along u the mean is smallest: at s u from where the updates
began, s = 1 being here. The slope's standard error over the rows says whether that is known. Steps
become s times as long, or a part of that where it is not certain; on short runs of noisy
objectives, where it never is, nothing happens.

Only where a run draws more directions N than the view has numbers d, and no further than
sqrt(N / d) times the first displacement. With fewer, the larger part is one that a parabola along
the last updates does not show: the noise of all directions, which stays. Looks there cost LoRA of
an encoder 0.04 to 0.28 of accuracy on 40,000 and 100,000 queries, and gave LayerNorm 0.03
(benchmarks/defaults.py, two seeds).

So a run with more queries than it needs (least squares, a function of a few variables) takes the
steps of the steepest descent that noise allows, whatever its first displacement was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from zo_adapt.data.samples import Samples
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.optimizers.calibration import values
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import HERE, Shift, Term, scaled

SHARE = 0.05
"""Of the queries, for all looks together."""
MOST_LOOKS, LEAST_ROWS, MOST_ROWS, MOST_TERMS = 32, 32, 128, 512
SURE, LEAST_SURE = 3.5, 2.0
"""Standard errors of the slope from zero: followed in full, and not at all."""
TRUST, LARGEST_FACTOR, MOST_GROWTH = 1.0, 3.0, 64.0
MEMORY = 0.9
"""Share of the evidence that the next look finds."""
POINTS, POINTS_OF_ONE = (-1.0, 0.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Along the updates; five where a point has but one value, whose misfit is then its error."""


@dataclass
class Evidence:
    """Parabolas of several looks, weighted by their certainty and by how recent they are.

    Args:
        weight: Sum of 1 / error^2.
        slope, curvature: Sums weighted so.
    """

    weight: float = 0.0
    slope: float = 0.0
    curvature: float = 0.0

    def add(self, slope: float, curvature: float, error: float) -> None:
        """Take one look in."""
        certainty = 1.0 / max(error, 1e-12 * abs(slope), 1e-150) ** 2
        self.weight += certainty
        self.slope += certainty * slope
        self.curvature += certainty * curvature

    def verdict(self) -> tuple[float, float]:
        """How certain the slope's sign is, 0..1, and the factor on the length of steps."""
        if self.slope == 0.0:
            return 0.0, 1.0
        sure = abs(self.slope) / math.sqrt(self.weight)
        weight = min(max((sure - LEAST_SURE) / (SURE - LEAST_SURE), 0.0), 1.0)
        flat = self.curvature <= 0.0
        best = math.copysign(math.inf, -self.slope) if flat else 1 - self.slope / self.curvature
        bounded = min(max(best, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
        return weight, float(bounded ** (TRUST * weight))

    def fade(self, factor: float) -> None:
        """Forget a part."""
        self.weight *= factor
        self.slope *= factor
        self.curvature *= factor


@dataclass
class LookAhead:
    """Looks at equal distances over a run.

    Args:
        rows: Of a look; 0 before the first step, which says how many there will be.
        looks: How many there will be.
        taken: Done so far.
        growth: Product of all factors.
        most_growth: What it may come to.
        window: The last updates, at most ``MOST_TERMS`` terms of them.
        evidence: Of the looks so far.
    """

    rows: int = 0
    looks: int = 0
    taken: int = 0
    growth: float = 1.0
    most_growth: float = MOST_GROWTH
    window: list[Shift] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)

    def plan(self, samples: Samples, budget: Budget, step_queries: int, directions: float) -> None:
        """Share out the queries for looks; there are none where directions are few.

        Args:
            samples: How many rows there are, and how many have a value.
            budget: Of the run.
            step_queries: Of one step.
            directions: Of one step, for each number of the view.
        """
        total = budget.max_queries or (budget.max_steps or 0) * step_queries
        least = min(max(LEAST_ROWS, samples.rows_of_a_value), len(samples.source))
        points = len(_points(least, samples))
        self.looks = int(min(SHARE * total / (points * least), MOST_LOOKS))
        most = min(MOST_ROWS, len(samples.source))
        # sqrt(N / d): by how much N steps in the slope's direction outgrow their noise.
        outgrown = math.sqrt(directions * total / step_queries)
        if outgrown < 1.0:
            self.looks = 0
        self.most_growth = min(max(outgrown, 1.0), MOST_GROWTH)
        wanted = SHARE * total / (points * max(self.looks, 1))
        self.rows = max(least, int(min(wanted, most)))

    def is_due(self, done: float) -> bool:
        """Whether it is time for the next look, at a share of the budget."""
        return self.taken < self.looks and done * (self.looks + 1) >= self.taken + 1

    def observe(self, update: Shift) -> None:
        """Add an update to the window."""
        if self.taken >= self.looks and self.rows:
            return
        self.window.append(update)
        count = sum(len(shift.terms) for shift in self.window)
        while len(self.window) > 1 and count > MOST_TERMS:
            count -= len(self.window.pop(0).terms)

    def probes(self, samples: Samples) -> list[Probe]:
        """The points of a look; none where nothing has moved."""
        self.taken += 1
        updates, self.window = HERE, self.window
        for update in self.window:
            updates = updates.then(update)
        self.window = []
        if not updates.terms:
            return []
        batch = samples.aside(self.rows)
        parts = batch.split(max(1, len(batch) // samples.share))
        self._points = _points(len(batch), samples)
        return [Probe(_along(updates, s), part) for s in self._points for part in parts]

    def take(self, evaluations: Sequence[Evaluation]) -> float:
        """The factor on the length of steps that follows from the values."""
        each = len(evaluations) // len(self._points)
        rows = np.array(
            [
                np.concatenate([values(one) for one in evaluations[first : first + each]])
                for first in range(0, len(evaluations), each)
            ]
        )
        if not np.isfinite(rows).all():
            return 1.0
        slope, curvature, error = parabola(np.array(self._points), rows)
        self.evidence.add(slope, curvature, error)
        weight, factor = self.evidence.verdict()
        if factor > 1.0:
            factor = max(1.0, min(factor, self.most_growth / self.growth))
        self.growth *= factor
        self.evidence.fade(MEMORY * (1.0 - weight))
        return factor

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as JSON can hold it."""
        names = ("rows", "looks", "taken", "growth", "most_growth", "window")
        numbers = {name: getattr(self, name) for name in names}
        # A copy: what the run goes back to, where a step fails, must not change with it.
        numbers["window"] = list(self.window)
        return numbers | {"evidence": list(vars(self.evidence).values())}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Go on from a state."""
        window = [Shift(tuple(Term(*term) for term in terms), d) for terms, d in state["window"]]
        return cls(**{**state, "window": window, "evidence": Evidence(*state["evidence"])})


def parabola(points: np.ndarray, rows: np.ndarray) -> tuple[float, float, float]:
    """Mean slope and curvature at 0 of parabolas through values, and the slope's standard error.

    Args:
        points: Where the values were taken, symmetric about 0.
        rows: Values, one row of columns (examples) for every point.
    """
    design = np.stack([np.ones_like(points), points, points**2], axis=1)
    fitted, misfit, _, _ = np.linalg.lstsq(design, rows, rcond=None)
    slopes, curvatures = fitted[1], 2 * fitted[2]
    count = rows.shape[1]
    if count > 1:
        error = float(slopes.std(ddof=1)) / math.sqrt(count)
    else:
        free = len(points) - 3
        variance = float(misfit[0]) / free if free > 0 and misfit.size else 0.0
        error = math.sqrt(variance / float((points**2).sum()))
    return float(slopes.mean()), float(curvatures.mean()), error


def _points(rows: int, samples: Samples) -> tuple[float, ...]:
    """Where along the updates to look at so many rows."""
    one_value = rows < 2 * samples.rows_of_a_value or rows == 1
    return POINTS_OF_ONE if one_value else POINTS


def _along(updates: Shift, s: float) -> Shift:
    """The place s times the updates from here: -1 is where they began."""
    if s < 0.0:
        back = updates.inverse()
        return Shift(scaled(back.terms, -s), 1.0 + (back.decay - 1.0) * -s)
    return Shift(scaled(updates.terms, s), 1.0 + (updates.decay - 1.0) * s) if s else HERE
