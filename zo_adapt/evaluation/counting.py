"""What evaluators share: the sign, the count of queries, values of what objectives return."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from zo_adapt.evaluation.objective import (
    Objective,
    ObjectiveLike,
    SetObjective,
    as_objective,
    keeps_batch_whole,
    ready,
)
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import BudgetExhausted, Evaluation
from zo_adapt.evaluation.start_checks import check_micro_batch_size
from zo_adapt.evaluation.values import checked_values
from zo_adapt.view.parameters import ParameterView


class CountingEvaluator:
    """Base of evaluators. One query = one forward of one sample.

    Args:
        objective: What is asked: an ``Objective``, or any callable of a batch.
        view: Where the probes shift.
        options: Memory and speed.
        batch_size: Rows of a step's minibatch: most rows in one call of the objective where the
            options do not say; None is no limit.
        max_queries: Budget; a step that does not fit is not begun.
        maximize: Flip the sign, here and nowhere else; None: as the objective says.
    """

    def __init__(
        self,
        objective: ObjectiveLike,
        view: ParameterView,
        options: EvaluationOptions,
        *,
        batch_size: int | None = None,
        max_queries: int | None = None,
        maximize: bool | None = None,
    ) -> None:
        self.objective: Objective = as_objective(objective)
        self.view = view
        maximize = self.objective.maximize if maximize is None else maximize
        self.sign = -1.0 if maximize else 1.0
        check_micro_batch_size(self.objective, options.micro_batch_size, batch_size)
        whole = keeps_batch_whole(self.objective)
        self.micro_batch_size = None if whole else options.micro_batch_size or batch_size
        self.max_queries, self.queries = max_queries, 0
        self._function: Callable[[Any], Any] = self.objective
        self._score: Callable[[list[Any]], Any] | None = None
        if isinstance(self.objective, SetObjective):
            self._function, self._score = self.objective.predict, self.objective.score

    def reserve(self, queries: int) -> None:
        """Count queries that are about to be made.

        Raises:
            BudgetExhausted: More than are left.
        """
        if self.max_queries is not None and self.queries + queries > self.max_queries:
            raise BudgetExhausted
        self.queries += queries

    def ready(self) -> AbstractContextManager[Any]:
        """The objective's own evaluation mode, or a check that the model is in it."""
        return ready(self.objective, self.view.model)

    def _scored(self, returned: list[Any], sizes: list[int]) -> tuple[list[Any], list[int]]:
        if self._score is not None:
            return [self._score(returned)], [sum(sizes)]
        return returned, sizes

    def _evaluation(self, returned: list[Any], sizes: list[int]) -> Evaluation:
        values = [checked_values(*one) for one in zip(returned, sizes, strict=True)]
        if all(value.ndim == 1 for value in values):
            per_example = self.sign * (values[0] if len(values) == 1 else np.concatenate(values))
            return Evaluation(float(per_example.sum()) / len(per_example), per_example)
        means = [float(value.mean()) for value in values]
        if len(means) == 1:
            return Evaluation(self.sign * means[0])
        return Evaluation(self.sign * float(np.average(means, weights=sizes)))
