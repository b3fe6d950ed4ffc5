"""Questions to an objective and their answers, whoever evaluates them."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from zo_adapt.data.batches import Batch
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
    """A signal to the loop: the next step needs more queries than are left; none was made."""


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
    """

    objective: Any
    view: ParameterView
    sign: float
    queries: int
    micro_batch_size: int | None
    memory: int | None

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
