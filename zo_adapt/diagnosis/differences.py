"""Projected gradients of examples along some directions, and what they say of noise."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zo_adapt.data.sources import Batch
from zo_adapt.diagnosis.advice import Noise
from zo_adapt.errors import NonFiniteObjectiveError
from zo_adapt.evaluation.objective import rows_needed
from zo_adapt.evaluation.protocol import Evaluator, Probe
from zo_adapt.noise import philox
from zo_adapt.optimizers.directions import direction
from zo_adapt.term import HERE, Shift

PROBE_STREAM = 4
PARTS = 4
"""Parts of a batch that stand for examples where the objective gives one number a batch."""
ROUNDING = 1e-13
"""Means of a batch that are as near as this, relative to the largest value, are equal."""


class Differences(NamedTuple):
    """The answers at one scale, K directions by U parts (examples) of their batches.

    Args:
        projected: Projected gradients of the parts.
        mean: Their means, (K,): exactly 0 where the two values are equal.
        equal: Share of directions whose two values are equal.
        curvature: rms(f+ + f- - 2 f0) / rms(f+ - f-).
        part: Rows of a part, on average.
    """

    projected: np.ndarray
    mean: np.ndarray
    equal: float
    curvature: float
    part: float


class Survey:
    """Asks the same directions on the same rows at every scale."""

    def __init__(self, evaluator: Evaluator, batches: Sequence[Batch], seed: int) -> None:
        self.evaluator, self.batches = evaluator, batches
        count = len(batches)
        words = philox.words_numpy(seed, 0, PROBE_STREAM, 0, -(-count // 4))
        self.seeds = [int(word) for word in words[:count]]
        self.parts = [[batch] for batch in batches]
        self.base = self._values(self._asked(0.0))
        if self.base.shape[1] == 1 and len(batches[0]) > 1:
            least = rows_needed(evaluator.objective)
            count = max(1, min(PARTS, len(batches[0]) // least))
            self.parts = [batch.split(count) for batch in batches]
            self.base = self._values(self._asked(0.0)) if count > 1 else self.base

    def at(self, mu: float, place: Shift = HERE) -> Differences | None:
        """The differences at one scale; None if the objective is not finite there.

        Args:
            mu: The scale.
            place: Where, seen from the live weights; the curvature is that at the weights.
        """
        try:
            up, down = (self._values(self._asked(sign * mu, place)) for sign in (1, -1))
        except NonFiniteObjectiveError:
            return None
        up, down, base = alike(up, down, self.base)
        change, bend = (up - down).mean(1), (up + down - 2 * base).mean(1)
        equal = abs(change) <= ROUNDING * np.maximum(abs(up), abs(down)).max(1)
        change[equal] = 0.0
        part = len(self.batches[0]) / up.shape[1]
        curvature = rms(bend) / rms(change) if change.any() else math.nan
        projected, mean = (up - down) / (2 * mu), change / (2 * mu)
        return Differences(projected, mean, float(equal.mean()), curvature, part)

    def _asked(self, mu: float, place: Shift = HERE) -> list[list[Probe]]:
        groups = self.evaluator.view.groups

        def point(seed: int) -> Shift:
            return place.plus(direction(seed, mu, groups)) if mu else place

        return [
            [Probe(point(seed), part) for part in parts]
            for seed, parts in zip(self.seeds, self.parts, strict=True)
        ]

    def _values(self, probes: Sequence[Sequence[Probe]]) -> np.ndarray:
        """Values per example where all batches have them; else one for every part."""
        answers = [self.evaluator.evaluate(of_one) for of_one in probes]
        rows = [one[0].per_example if len(one) == 1 else None for one in answers]
        if any(values is None for values in rows):
            return np.array([[part.value for part in one] for one in answers])
        return np.array(rows)


def alike(*values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same, or their means where not all have as many parts: not all scores were defined."""
    if len({one.shape for one in values}) == 1:
        return values
    return tuple(one.mean(1, keepdims=True) for one in values)


def anova(found: Differences | None, batch_size: int, rows: int) -> Noise:
    """Noise between and within directions, whose mean is known: zero.

    Args:
        found: The differences; None where the objective was not finite.
        batch_size: Rows of a direction.
        rows: Of the data.
    """
    if found is None:
        return Noise(math.nan, math.nan, math.nan)
    squares = found.mean**2
    error = float(squares.std(ddof=1)) / math.sqrt(len(squares)) if len(squares) > 1 else math.nan
    if found.projected.shape[1] == 1:
        data = 0.0 if rows == 1 else math.nan
        return Noise(float(squares.mean()), error, data)
    data = float(found.projected.var(1, ddof=1).mean()) * found.part
    # Rows are drawn without replacement: a batch of all of them has no noise.
    drawn = data / batch_size * (1 - batch_size / rows)
    return Noise(float(squares.mean()) - drawn, error, data)


def rms(values: np.ndarray) -> float:
    """The root mean square."""
    return math.sqrt(float((values**2).mean()))
