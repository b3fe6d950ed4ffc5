"""Questions to an objective and their answers, whoever evaluates them."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from zo_adapt.data.sources import Batch, Source
from zo_adapt.evaluation.objective import Objective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.plan import Plan
from zo_adapt.term import Shift
from zo_adapt.view.parameters import ParameterView


class Probe(NamedTuple):
    """A question to an objective: its value at a place, on a batch.

    Args:
        at: The place, seen from the live weights.
        batch: The rows.
    """

    at: Shift
    batch: Batch


class Evaluation(NamedTuple):
    """An answer: the mean over the batch, and the values per example where there are any."""

    value: float
    per_example: np.ndarray | None = None


class BudgetExhausted(Exception):
    """The next step needs more queries than are left; none was made. The loop ends the run."""


def mean_value(evaluations: Sequence[Evaluation], weights: Sequence[int]) -> float:
    """The mean over all rows of several evaluations."""
    total = math.fsum(e.value * w for e, w in zip(evaluations, weights, strict=True))
    return total / sum(weights)


class Evaluator(Protocol):
    """Answers probes, in this process or elsewhere, and alone counts queries.

    Optimizers and loops know no more of evaluation than this. One query = one forward of one
    sample.

    Attributes:
        objective: What is asked.
        view: What the probes are places of.
        sign: -1.0 where the objective is maximised: values come out as losses.
        queries: Made so far.
        memory: Bytes that candidates may take together; None where none do.
        micro_batch_size: Most rows in one call of the objective; None is no limit.
        plan: How probes are evaluated, and why not faster.
        on_nonfinite: Other than "stop", values may be NaN, which are errors otherwise; set by a run
            that knows what to make of them.
    """

    objective: Any
    view: ParameterView
    sign: float
    queries: int
    micro_batch_size: int | None
    memory: int | None
    on_nonfinite: Literal["stop", "worst", "skip"]

    @property
    def plan(self) -> Plan:
        """See the class."""

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Answer every probe, in order; the weights are bit-identical afterwards.

        Raises:
            BudgetExhausted: The probes need more queries than are left; none was made.
            ObjectiveError: The objective returned something that is not a loss.
        """

    def reserve(self, queries: int) -> None:
        """Count queries that are about to be made.

        Raises:
            BudgetExhausted: More than are left.
        """

    def ready(self) -> AbstractContextManager[Any]:
        """A context in which the objective's model is ready to be evaluated."""


@runtime_checkable
class Measuring(Protocol):
    """An evaluator that may have to measure something before the first step.

    Attributes:
        measures: Whether it has.
        joint_tokens: Tokens up to which candidates go together; None where that was not measured.
            Kept with a run, which goes on with the same.
    """

    measures: bool
    joint_tokens: int | None

    def measure(self, probes: Sequence[Probe]) -> None:
        """Find it, on the probes of a step."""


class EvaluatedBy(Protocol):
    """A way of evaluating, before it is known what: what loops take as ``evaluator``."""

    def resolved(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The objective, saying whether its value is a mean over rows."""

    def prepared(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The same, after all that can be found out before the first step.

        Args:
            objective: What will be asked.
            source: Of the rows.
            view: What is tuned.

        Raises:
            ZOError: It cannot be evaluated in this way, or no run would survive it.
        """

    def bound_to(
        self,
        objective: Objective,
        view: ParameterView,
        options: EvaluationOptions,
        *,
        batch_size: int | None = None,
        max_queries: int | None = None,
    ) -> Evaluator:
        """The evaluator of one objective; metrics have evaluators of their own.

        Args:
            objective: What is asked.
            view: Where the probes shift.
            options: Memory and speed.
            batch_size: Rows of a step's minibatch.
            max_queries: Budget.
        """
