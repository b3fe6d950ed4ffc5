"""Questions to an objective and their answers, whoever evaluates them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zo_adapt.data.batches import Batch
from zo_adapt.term import Terms


class Probe(NamedTuple):
    """A question to the objective: its value on ``batch`` at decay * theta + terms."""

    terms: Terms
    batch: Batch
    decay: float = 1.0


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
