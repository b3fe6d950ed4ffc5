"""What a run returns: where it ended, why, and how it went."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from zo_adapt.errors import (
    MissingPackageError,
    NonFiniteObjectiveError,
    StepTooLargeError,
    TrajectoryWriteError,
)
from zo_adapt.evaluation.plan import Plan
from zo_adapt.loops.figure import draw, metric_names
from zo_adapt.options import renamed
from zo_adapt.term import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class StopReason(StrEnum):
    """Why a run ended; the values are the sentences that users read.

    Example:
        >>> print(StopReason.MAX_STEPS)
        the maximum number of steps was reached
        >>> StopReason.MAX_STEPS.is_fault
        False
    """

    MAX_STEPS = "the maximum number of steps was reached"
    MAX_QUERIES = "the next step would exceed the maximum number of queries"
    CALLBACK = "the callback raised StopIteration"
    NON_FINITE = "the objective was not finite; the weights are those of the last good step"
    STEP_TOO_LARGE = "a step left the dtype's range; the weights are those of the last good step"
    CANNOT_WRITE = "the trajectory cannot be written; the weights are those of the last good step"

    @property
    def is_fault(self) -> bool:
        """Whether something went wrong, as opposed to a budget or a callback that ended the run."""
        return self in _FAULTS.values()


_FAULTS: dict[type[Exception], StopReason] = {
    NonFiniteObjectiveError: StopReason.NON_FINITE,
    StepTooLargeError: StopReason.STEP_TOO_LARGE,
    TrajectoryWriteError: StopReason.CANNOT_WRITE,
}
FAULTS = tuple(_FAULTS)
"""Errors that end a run with the weights of the last good step."""


def reason_of(fault: Exception) -> StopReason:
    """The reason that one of ``FAULTS``, or a subclass of one, ends a run by."""
    return next(reason for kind, reason in _FAULTS.items() if isinstance(fault, kind))


@dataclass(frozen=True)
class Result:
    """What ``minimize`` returns. The weights are in the view's own tensors.

    Args:
        value: The last step's value, an estimate from one batch; NaN if there was no step.
        steps: Steps done.
        queries: Forwards of one sample.
        stop_reason: Why it ended.
        message: The same, as a sentence, with the details.
        history: One ``Step`` for each step.
        metrics: The watched metrics at the final weights; None where none are watched.
        metric_queries: Forwards of one sample made for them, which ``queries`` leaves out.
        evaluation: How the points were evaluated, and in ``why_not`` why not faster.
        advice: What the values say about the steps; empty where there is nothing to say.

    Example:
        >>> result = Result(0.5, 2, 8, StopReason.MAX_STEPS, str(StopReason.MAX_STEPS), [])
        >>> result
        Result: 2 steps, 8 queries, value 0.5
          the maximum number of steps was reached
        >>> result.success
        True
    """

    value: float
    steps: int
    queries: int
    stop_reason: StopReason
    message: str
    history: list[Step] = field(repr=False)
    metrics: dict[str, float] | None = None
    metric_queries: int = 0
    evaluation: Plan = field(default_factory=Plan, compare=False)
    advice: str = field(default="", compare=False)

    @property
    def success(self) -> bool:
        """Whether steps were made and none ended the run by a fault."""
        return self.steps > 0 and not self.stop_reason.is_fault

    @property
    def nit(self) -> int:
        """The former name of ``steps``."""
        renamed("Result.nit", "Result.steps")
        return self.steps

    def __repr__(self) -> str:
        lines = [f"Result: {self.steps} steps, {self.queries:,} queries, value {self.value:.6g}"]
        if self.metrics:
            found = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
            lines.append(f"{found} ({self.metric_queries:,} queries beside)")
        lines += [line for line in (self.message, self.advice) if line]
        if plan := str(self.evaluation):
            lines.append(plan)
        return "\n  ".join(lines)

    def to_pandas(self) -> "DataFrame":
        """The history as a table: one row a step, one column a metric (NaN where not measured).

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise _missing("pandas") from error
        columns = ("step", "queries", "value", "lr", "projected_gradient", "kind")
        # A metric may be called as a column is.
        metrics = {n: f"metrics.{n}" if n in columns else n for n in metric_names(self.history)}
        rows = [
            [getattr(step, name) for name in columns]
            + [(step.metrics or {}).get(name, math.nan) for name in metrics]
            for step in self.history
        ]
        return DataFrame(rows, columns=[*columns, *metrics.values()]).set_index("step")

    def plot(self) -> "Figure":
        """The value, smoothed over a twentieth of the steps, and the metrics against queries.

        What ``TrackVariance`` watched has panels for the share that the data have in the noise, for
        both noises, and for each of its other figures.

        Returns:
            A figure that belongs to no window: show it in a notebook, or ``savefig`` it.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        try:
            return draw(self.history)
        except ImportError as error:
            raise _missing("matplotlib") from error


def _missing(package: str) -> MissingPackageError:
    return MissingPackageError(
        f"{package} is not installed; pip install 'zo_adapt[plot]' brings it"
    )
