"""Values that are missing: a simulation raised an error or gave NaN, and the run shall go on."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch

from zo_adapt.data.rows import NoRowsError
from zo_adapt.errors import NonFiniteObjectiveError, OptionError, ZOError
from zo_adapt.evaluation.joint.candidates import NotJoint
from zo_adapt.evaluation.protocol import BudgetExhausted, Evaluation
from zo_adapt.evaluation.trunk.call import RefusedError
from zo_adapt.evaluation.trunk.calls import Recorded
from zo_adapt.evaluation.trunk.keys import ForeignArgumentError
from zo_adapt.interrupt import is_from_handler

logger = logging.getLogger(__name__)
OnNonFinite = Literal["stop", "worst", "skip"]
MOST_SKIPPED, MOST_TRIED = 100, 8
"""Steps that are given up in a row: more than the first are no accident; after the second it is
likely that the point where the run is has no value itself, so that no others would help."""
NOT_OF_A_SIMULATION = (
    ZOError,
    torch.OutOfMemoryError,
    BudgetExhausted,
    NoRowsError,
    NotJoint,
    Recorded,
    RefusedError,
    ForeignArgumentError,
)
"""Errors that say something to this package or to the user, not that one point has no value."""


class NoValueError(NonFiniteObjectiveError):
    """Not one of the points of a step had a value."""


def checked_on_nonfinite(given: Any) -> OnNonFinite:
    """The same, if it is one of the three.

    Raises:
        OptionError: It is not.
    """
    if given not in ("stop", "worst", "skip"):
        raise OptionError(f"on_nonfinite={given!r}; choose 'stop', 'worst' or 'skip'")
    return cast(OnNonFinite, given)


def tried(on_nonfinite: OnNonFinite, skipped: int) -> OnNonFinite:
    """What is made of missing values after so many steps in a row were given up.

    Example:
        >>> tried("skip", 7), tried("skip", 8), tried("skip", 9), tried("stop", 8)
        ('skip', 'worst', 'skip', 'stop')
    """
    is_due = skipped % (MOST_TRIED + 1) == MOST_TRIED
    return "worst" if on_nonfinite == "skip" and is_due else on_nonfinite


def is_failed_simulation(error: Exception) -> bool:
    """Whether an error that a function raised says that it has no value at this point.

    Not so of what this package raises, of memory that is used up, and of what the handler of a
    signal raises (a timeout); KeyboardInterrupt and SystemExit are no ``Exception``.
    """
    return not isinstance(error, NOT_OF_A_SIMULATION) and not is_from_handler(error)


class Failures:
    """Errors of the objective that stand for missing values.

    Attributes:
        last: The last of them; None: there was none.
    """

    def __init__(self) -> None:
        self.last: Exception | None = None

    def add(self, error: Exception) -> None:
        """Keep one; the first is logged, with where it was raised."""
        if self.last is None:
            logger.warning("the function raised an error: no value at this point", exc_info=error)
        self.last = error

    def raise_last(self) -> None:
        """Raise the last error, if there was one: for a function that has no value anywhere."""
        if self.last is not None:
            raise self.last

    def forgiven(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which gives NaN where it raises an error or gives None."""

        def called(*given: Any) -> Any:
            try:
                found = function(*given)
                return math.nan if found is None else found
            except Exception as error:
                if not is_failed_simulation(error):
                    raise
                self.add(error)
                return math.nan

        return called


def with_values(evaluations: Sequence[Evaluation], on_nonfinite: OnNonFinite) -> list[Evaluation]:
    """The evaluations of a step, all of them with values.

    Args:
        evaluations: Losses, of which some may be NaN or infinite.
        on_nonfinite: "worst": these become the largest finite one.

    Raises:
        NonFiniteObjectiveError: What is missing may not be made up, or there is no finite value.
    """
    if all(math.isfinite(one.value) for one in evaluations):
        return list(evaluations)
    known = [one.value for one in evaluations if math.isfinite(one.value)]
    rows = [one.per_example for one in evaluations if one.per_example is not None]
    known_rows = np.concatenate(rows) if rows else np.array(known)
    known_rows = known_rows[np.isfinite(known_rows)]
    bad = next(one.value for one in evaluations if not math.isfinite(one.value))
    said = f"the objective returned {bad}, or raised an error, at a point"
    if not known_rows.size and not known:
        raise NoValueError(f"{said}, and had a value at none of {len(evaluations)}")
    if on_nonfinite != "worst":
        raise NonFiniteObjectiveError(said)
    worst_row = float(known_rows.max()) if known_rows.size else max(known)
    return [_filled(one, max(known, default=worst_row), worst_row) for one in evaluations]


def _filled(one: Evaluation, worst: float, worst_row: float) -> Evaluation:
    if math.isfinite(one.value):
        return one
    if one.per_example is None:
        return Evaluation(worst)
    values = np.where(np.isfinite(one.per_example), one.per_example, worst_row)
    return Evaluation(float(values.mean()), values)
