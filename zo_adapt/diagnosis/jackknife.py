"""What every row adds to a score of the whole set, from the scores without it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from zo_adapt.data.rows import NoRowsError, leaves, select_rows
from zo_adapt.evaluation.objective import SetObjective, attributes_of
from zo_adapt.interrupt import is_from_handler

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

    Args:
        objective: Predicts rows one by one.

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
