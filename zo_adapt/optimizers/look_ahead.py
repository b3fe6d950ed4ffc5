"""Whether a run's steps are too short or too long, seen by looking along its last ones.

With u the last updates, on rows of which no step has made use, at the weights theta now:

    f(theta - u), f(theta), f(theta + u)

A parabola through the three, of slope b and curvature c here, is smallest at s u from where the
updates began, s = 1 - b / c, 1 being here. Steps of the length at which each gains the most have
s = 1 on average, whatever their noise: E[-g.u] = E[u.Hu] for a step u of that length, and sums of
such steps have it as well. Steps of half that length have s = 2.

What is known of s is a mean and a variance v, as in a Kalman filter. Before a look the mean is 1; a
look has the variance

    e^2 = (error of b over the rows / c)^2 (1 + rows / d) + 1 / N

the rows of the look in the first part, and beside it the N directions of the updates, whose noise
lies in the d numbers of the view. Steps become

    1 - (b / c) v / (v + e^2)

times as long, and 1 / v grows by 1 / e^2. So a look that can tell little changes little; many of
them add up. They come often at first, when the length is least known.

Only in weights that nobody has trained, where a run draws more directions N than the view has
numbers d, and no further than sqrt(N / d) times the first displacement, or 4 times. With fewer, the
larger part is one that a parabola along the last updates does not show: the noise of all
directions, which stays: at N = 0.47 d looks cost a network on MNIST 0.06 of accuracy. And trained
weights have something to lose by it: looks (of the first version) cost LoRA of an encoder 0.04 to
0.28 on 40,000 and 100,000 queries, and gave LayerNorm 0.03 (two seeds); those of the second cost
0.03 on 400,000, where directions outnumber the view, on each of five seeds (docs/choosing.md).

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
from zo_adapt.optimizers.former_looks import Evidence
from zo_adapt.optimizers.responses import values
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import HERE, Shift, Term, scaled

SHARE, LEAST_ROWS = 0.035, 12
"""Of the queries, for all looks together; of a look."""
FORMER_SHARE, FORMER_LEAST_ROWS = 0.05, 32
"""In runs of the first version."""
MOST_LOOKS, LEAST_LOOKS, MOST_ROWS, MOST_TERMS = 32, 4, 128, 512
LAST, POWER = 0.85, 1.5
"""Progress at the last look, and how the looks before it crowd towards the start."""
LARGEST_FACTOR, STEEPEST, LEAST_GROWTH, MOST_GROWTH = 3.0, 4.0, 4.0, 64.0
"""Of a look, of a slope beside its curvature, and of all looks."""
MOST_DOUBT, DRIFT = 4.0, 0.01
"""Variance of the best length, in squares of the present one: at first, and added by every look."""
POINTS, POINTS_OF_ONE = (-1.0, 0.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Along the updates; five where a point has but one value, whose misfit is then its error."""


@dataclass
class LookAhead:
    """Looks over a run, more of them early than late.

    Args:
        rows: Of a look; 0 before the first step, which says how many there will be.
        looks: How many there will be.
        taken: Done so far.
        growth: Product of all factors.
        most_growth: What it may come to.
        numel: Of the view.
        doubt: Variance of the best length of steps, in squares of the present length.
        by_row: Whether rows have values of their own: a point is then asked about at once, and
            moved to once.
        window: The last updates, at most ``MOST_TERMS`` terms of them.
        former: What the looks of a run have said that was begun by the first version; None: this
            one's.
    """

    rows: int = 0
    looks: int = 0
    taken: int = 0
    growth: float = 1.0
    most_growth: float = MOST_GROWTH
    numel: int = 1
    doubt: float = MOST_DOUBT
    by_row: bool = False
    window: list[Shift] = field(default_factory=list)
    former: Evidence | None = None

    def plan(
        self,
        samples: Samples,
        budget: Budget,
        step_queries: int,
        directions: int,
        numel: int,
        *,
        is_new: bool = False,
    ) -> None:
        """Share out the queries for looks; there are none where directions are few.

        Nor in weights that were trained: there looks mostly did harm (docs/choosing.md).

        Args:
            samples: How many rows there are, and how many have a value.
            budget: Of the run.
            step_queries: Of one step.
            directions: Of one step.
            numel: Of the view.
            is_new: Whether it may be of a model that nobody has trained.
        """
        total = budget.max_queries or (budget.max_steps or 0) * step_queries
        is_former = self.former is not None
        share, least = (FORMER_SHARE, FORMER_LEAST_ROWS) if is_former else (SHARE, LEAST_ROWS)
        least = min(max(least, samples.rows_of_a_value), len(samples.source))
        points = len(_points(least, samples))
        self.numel, self.looks = numel, int(min(share * total / (points * least), MOST_LOOKS))
        most = min(MOST_ROWS, len(samples.source))
        # sqrt(N / d): by how much N steps in the slope's direction outgrow their noise.
        outgrown = math.sqrt(directions / numel * total / step_queries)
        if not (is_former or is_new) or outgrown < 1.0:
            self.looks = 0
        least_growth = 1.0 if is_former else LEAST_GROWTH
        self.most_growth = min(max(outgrown, least_growth), MOST_GROWTH)
        wanted = share * total / (points * max(self.looks, 1))
        self.rows = max(least, int(min(wanted, most)))

    @property
    def acts(self) -> bool:
        """Whether there are looks enough to find the length at which steps gain the most."""
        return self.former is None and self.looks >= LEAST_LOOKS

    def is_due(self, done: float) -> bool:
        """Whether it is time for the next look, at a share of the budget."""
        if self.taken >= self.looks:
            return False
        if self.former is not None:
            return done * (self.looks + 1) >= self.taken + 1
        return bool(self.window) and done >= LAST * ((self.taken + 1) / self.looks) ** POWER

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
        updates = HERE
        for update in self.window:
            updates = updates.then(update)
        self.window = []
        if not updates.terms:
            return []
        self._directions = len({term.seed for term in updates.terms})
        batch = samples.aside(self.rows)
        parts = batch.split(1 if self.by_row else max(1, len(batch) // samples.share))
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
        if self.former is not None:
            self.former.add(slope, curvature, error)
            weight, factor = self.former.verdict()
            self.former.fade(weight)
        else:
            noise = error**2 * (1.0 + rows.shape[1] / self.numel)
            factor, self.doubt = narrowed(self.doubt, slope, curvature, noise, self._directions)
        if factor > 1.0:
            factor = max(1.0, min(factor, self.most_growth / self.growth))
        self.growth *= factor
        return factor

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as JSON can hold it."""
        names = ("rows", "looks", "taken", "growth", "most_growth", "numel", "doubt", "by_row")
        # A copy: what the run goes back to, where a step fails, must not change with it.
        state = {name: getattr(self, name) for name in names} | {"window": list(self.window)}
        if self.former is not None:
            state["evidence"] = list(vars(self.former).values())
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Go on from a state; one of the first version has evidence."""
        window = [Shift(tuple(Term(*term) for term in terms), d) for terms, d in state["window"]]
        former = Evidence(*state["evidence"]) if "evidence" in state else None
        known = {name: state[name] for name in state if name != "evidence"}
        return cls(**{**known, "window": window, "former": former})


def narrowed(
    doubt: float, slope: float, curvature: float, noise: float, directions: int
) -> tuple[float, float]:
    """The factor on the length of steps after a look, and the doubt that is left.

    Args:
        doubt: Variance of the best length before, in squares of the present length.
        slope: Of the parabola along the last updates, here.
        curvature: Of the same.
        noise: Variance of the slope.
        directions: In the updates.

    Example:
        >>> factor, doubt = narrowed(4.0, -1.0, 1.0, 0.0, 1_000_000)  # smallest at twice the way
        >>> round(factor, 3), round(doubt, 3)
        (2.0, 0.01)
        >>> factor, doubt = narrowed(4.0, -1.0, 1.0, 1e6, 1_000_000)  # rows that differ by far more
        >>> round(factor, 3), round(doubt, 3)
        (1.0, 4.0)
    """
    # Where it bends little, or the other way, the minimum is far, and not known to be further.
    bend = max(curvature, abs(slope) / STEEPEST)
    if bend <= 0.0:
        return 1.0, doubt
    variance = noise / bend**2 + 1.0 / directions
    gain = doubt / (doubt + variance)
    factor = min(max(1.0 - slope / bend * gain, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
    left = gain * variance / factor**2 + DRIFT
    return factor, min(left, MOST_DOUBT)


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
