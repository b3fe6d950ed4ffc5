"""Projected gradients of examples along some directions, and what they say of noise; of a score of
the whole set, what every row adds to it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from zo_adapt.data.rows import NoRowsError, leaves, select_rows
from zo_adapt.data.sources import Batch
from zo_adapt.diagnosis.advice import Noise
from zo_adapt.errors import NonFiniteObjectiveError
from zo_adapt.evaluation.objective import SetObjective, attributes_of, rows_needed
from zo_adapt.evaluation.protocol import Evaluator, Probe
from zo_adapt.interrupt import is_from_handler
from zo_adapt.optimizers.directions import direction, seeds_of
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
        self.seeds = seeds_of(seed, PROBE_STREAM, len(batches))
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


MOST = 128
"""Scores that are computed for one point; of more rows, several are left out together."""


class Jackknife(SetObjective):
    """A set objective with a value for every row, where its own is one number f for n rows.

    v_i = f + (n - 1) (mean_j f_j - f_i),    f_i the score without row i

    which is the row's own value where f is a mean over rows, and otherwise tells how much the row
    moves f. (These are Tukey's pseudo-values, centred on f: without the correction of its bias, for
    it is f that is optimised.) With g groups of m rows left out, n is g, and the deviation is
    stretched by sqrt(m), to the variance of one row.

    Where the rows of the predictions cannot be determined, or the score is not defined without some
    of them, f stays one number. All else is the objective's own.

    Example:
        >>> class Share(SetObjective):
        ...     def predict(self, batch):
        ...         return batch
        ...     def score(self, predictions):
        ...         return float(np.concatenate(predictions).mean())
        >>> Jackknife(Share()).score([np.array([2.0, 1.0]), np.array([3.0])]).round(9).tolist()
        [2.0, 1.0, 3.0]

    Reference: Efron and Stein (1981), The jackknife estimate of variance.
    """

    def __init__(self, objective: SetObjective) -> None:
        self._objective = objective
        vars(self).update(attributes_of(objective))

    def predict(self, batch: Any) -> Any:
        """The objective's predictions."""
        return self._objective.predict(batch)

    def score(self, predictions: list[Any]) -> Any:
        """The objective's values where it has one for every row, else those of the jackknife."""
        whole = self._objective.score(predictions)
        value = _number(whole)
        if value is None:
            return whole
        try:
            sizes = [_rows(prediction) for prediction in predictions]
            groups = _groups(sum(sizes))
            without = [
                self._objective.score(list(_without(predictions, sizes, *group)))
                for group in groups
            ]
            scores = np.array([float(score) for score in without])
        # A subset may have no value in any way; the whole has one, and that is what counts.
        except Exception as error:
            if is_from_handler(error):
                raise
            return whole
        if len(scores) < 2 or not np.isfinite(scores).all():
            return whole
        counts = np.array([last - first for first, last in groups])
        moved = (counts.sum() / counts - 1) * (value - scores) * np.sqrt(counts)
        moved = np.repeat(moved, counts)
        return value + moved - moved.mean()


def _number(score: Any) -> float | None:
    """A score that is one finite number; what else it is, is not this module's affair."""
    try:
        value = float(np.asarray(score.cpu() if isinstance(score, Tensor) else score).item())
    except (TypeError, ValueError, RuntimeError):
        return None
    return value if np.isfinite(value) else None


def _groups(rows: int) -> list[tuple[int, int]]:
    """Bounds of the rows that are left out together."""
    count = min(rows, MOST)
    return list(pairwise(rows * i // count for i in range(count + 1)))


def _without(
    predictions: Sequence[Any], sizes: Sequence[int], first: int, last: int
) -> Iterator[Any]:
    """The predictions of all rows but first..last-1."""
    for prediction, size in zip(predictions, sizes, strict=True):
        kept = [row for row in range(size) if not first <= row < last]
        if kept:
            yield prediction if len(kept) == size else select_rows(prediction, kept, size)
        first, last = first - size, last - size


def _rows(prediction: Any) -> int:
    """How many rows a prediction is of: all its parts have an entry for each.

    Raises:
        NoRowsError: It cannot be determined.
    """
    arrays = [leaf for leaf in leaves(prediction) if isinstance(leaf, Tensor | np.ndarray)]
    sizes = [len(array) for array in arrays if array.ndim > 0]
    if isinstance(prediction, list):
        sizes.append(len(prediction))
    for size in dict.fromkeys(sizes):
        try:
            select_rows(prediction, slice(None), size)
        except NoRowsError:
            continue
        return size
    raise NoRowsError(f"{type(prediction).__name__} has no rows")
