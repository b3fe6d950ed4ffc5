"""The values that a caller gives for candidates, as losses: checked, what is missing filled in."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from zo_adapt.errors import NonFiniteObjectiveError, ObjectiveError
from zo_adapt.evaluation.failures import MOST_SKIPPED, OnNonFinite, checked_on_nonfinite, tried
from zo_adapt.evaluation.values import as_float64


class GivenLosses:
    """Makes losses of the values of one step after the other.

    Args:
        maximize: Larger values are better: their negatives are the losses.
        on_nonfinite: What becomes of values that are missing, as for ``AskTell``.

    Attributes:
        sign: Of a loss that is given as a value.

    Raises:
        OptionError: ``on_nonfinite`` is none of the three.

    Example:
        >>> given = GivenLosses(maximize=True, on_nonfinite="worst")
        >>> given.of([1.0, None, 3.0], 3)
        [-1.0, -1.0, -3.0]
    """

    def __init__(self, *, maximize: bool, on_nonfinite: OnNonFinite) -> None:
        self.sign = -1.0 if maximize else 1.0
        self._on_nonfinite = checked_on_nonfinite(on_nonfinite)
        self._worst = -math.inf
        self._skipped = 0

    def of(
        self, values: Any, candidates: int, *, measuring: bool = False, first: bool = False
    ) -> list[float]:
        """One loss for each candidate; only what will be given up is not finite.

        Args:
            values: As given.
            candidates: How many were asked about.
            measuring: Whether they tell how far steps may go. Such a step is not given up for one
                bad value: how far would be cut by it.
            first: Whether no candidate had a value so far.

        Raises:
            ObjectiveError: Not one number for each candidate.
            NonFiniteObjectiveError: A value is missing, and there is nothing to go by.
        """
        numbers = self._numbers(values, candidates, first)
        is_bad = ~np.isfinite(numbers)
        own = self.sign * numbers[~is_bad]
        worst = float(own.max()) if own.size else self._worst
        way = tried(self._on_nonfinite, self._skipped if own.size else 0)
        if way != "stop" and (way == "worst" or measuring) and math.isfinite(worst):
            numbers[is_bad] = self.sign * worst
        elif measuring:
            numbers[is_bad] = math.nan  # differences of infinities would warn
        elif is_bad.any() and self._on_nonfinite != "skip":
            place = int(np.flatnonzero(is_bad)[0])
            raise NonFiniteObjectiveError(
                f"value {place} is {numbers[place]}; tell finite values for the same candidates"
            )
        return [float(self.sign * number) for number in numbers]

    def gives_up(self, losses: Sequence[float], *, measuring: bool = False) -> bool:
        """Whether a step with these losses is given up; they are noted.

        Raises:
            NonFiniteObjectiveError: So were too many before it.
        """
        finite = [loss for loss in losses if math.isfinite(loss)]
        self._worst = max(finite, default=self._worst)
        if measuring or len(finite) == len(losses):
            self._skipped = 0
            return False
        if self._skipped == MOST_SKIPPED:
            bad = next(loss for loss in losses if not math.isfinite(loss))
            raise NonFiniteObjectiveError(
                f"{MOST_SKIPPED} steps in a row had a value such as {bad}; start nearer to where "
                "the function has values, or give bounds"
            )
        self._skipped += 1
        return True

    def _numbers(self, values: Any, candidates: int, first: bool) -> np.ndarray:
        is_text = isinstance(values, str | bytes | bytearray | memoryview)
        is_list = isinstance(values, Sequence | np.ndarray | Tensor) and not is_text
        if not is_list or getattr(values, "ndim", 1) == 0:
            raise ObjectiveError(
                f"tell({values!r:.80}); give a list of one number for each candidate"
            )
        errors = [value for value in values if isinstance(value, Exception)]
        if len(errors) == candidates and first and self._on_nonfinite != "stop":
            raise NonFiniteObjectiveError(
                f"the function raised an error at every candidate, the last {errors[-1]!r:.120}"
            ) from errors[-1]
        numbers = np.array([self._number(value) for value in values])
        if len(numbers) != candidates:
            raise ObjectiveError(
                f"{len(numbers)} values for {candidates} candidates; give one for each"
            )
        return numbers

    def _number(self, value: Any) -> float:
        """A value as one float; NaN where a simulation had none and that is no reason to stop."""
        failed = value is None or isinstance(value, Exception)
        return math.nan if failed and self._on_nonfinite != "stop" else number(value)


def number(value: Any) -> float:
    """A value of the caller's function, as one float.

    Raises:
        ObjectiveError: It is not one number.
    """
    values = as_float64(value, "the value is", "that is not one number")
    if values.size != 1:
        raise ObjectiveError(f"the value {value!r:.80} is not one number")
    return float(values.item())
