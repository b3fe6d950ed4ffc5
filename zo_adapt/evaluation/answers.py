"""A step's probes cut into blocks, the answers to them, and what evaluators that give them share.

How probes are cut depends on the probes alone, never on how many processes share the blocks, so
that a value is computed from the same rows, side by side in the same order, in any of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from zo_adapt.evaluation.failures import Failures, OnNonFinite
from zo_adapt.evaluation.later import Made, cancelled_on_failure
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
from zo_adapt.interrupt import is_from_handler
from zo_adapt.view.parameters import ParameterView


class Block(NamedTuple):
    """Probes that are computed in one forward, or micro-batches of a single one.

    Args:
        probes: Their numbers in the step.
        parts: Numbers of the micro-batches; none: all that there are, for one answer.
    """

    probes: tuple[int, ...]
    parts: tuple[int, ...] = ()

    def split(self) -> list["Block"]:
        """The smallest blocks that others could compute instead."""
        if not self.parts:
            return [self]
        return [Block(self.probes, (part,)) for part in self.parts]

    def holds(self, answer: "Answer") -> bool:
        """Whether an answer is one to this block."""
        return answer.probe in self.probes and (not self.parts or answer.part in self.parts)


def merged(blocks: Sequence[Block]) -> Iterator[Block]:
    """Neighbouring micro-batches of one probe as one block: the view is then shifted once."""
    for (probes, cut), run in groupby(blocks, key=lambda block: (block.probes, bool(block.parts))):
        parts = tuple(part for block in run for part in block.parts)
        yield Block(probes, parts if cut else ())


class Answer(NamedTuple):
    """What the objective returned for a probe, or for a micro-batch of it.

    Args:
        probe: Its number in the step.
        part: Number of the micro-batch.
        rows: Of which it is the answer.
        returned: As it was returned; after ``checked`` float64 of shape () or (rows,). What is on
            its way is a ``Made`` until ``arrived``.
    """

    probe: int
    part: int
    rows: int
    returned: Any

    def arrived(self) -> "Answer":
        """The same with what was on its way."""
        late = isinstance(self.returned, Made)
        return self._replace(returned=self.returned.result()) if late else self

    def checked(self, *, finite: bool = True) -> "Answer":
        """The same with numbers.

        Args:
            finite: Whether NaN and infinity are errors.

        Raises:
            ObjectiveError: See ``checked_values``.
        """
        return self._replace(returned=checked_values(self.returned, self.rows, finite=finite))


@contextmanager
def all_arrived(
    found: list[tuple[Block, list[Answer]]], note: Callable[[Block], None]
) -> Iterator[None]:
    """Inside, answers are collected of which some are on their way; afterwards all are there.

    Errors come in the order of the blocks: where one fails, those before it are waited for. A
    signal waits for none.

    Args:
        found: The blocks, each in front of the work on it, and their answers.
        note: Called with each block before an error of it could be raised.
    """
    try:
        with cancelled_on_failure():
            try:
                yield
            except Exception as error:
                if not is_from_handler(error):
                    _arrive(found, note)
                raise
            _arrive(found, note)
    except BaseException:
        for answer in (answer for _, answers in found for answer in answers):
            if isinstance(answer.returned, Made):
                answer.returned.cancel()
        raise


def _arrive(found: list[tuple[Block, list[Answer]]], note: Callable[[Block], None]) -> None:
    for block, answers in found:
        note(block)
        answers[:] = [answer.arrived() for answer in answers]


def evaluations(answers: Sequence[Answer], sign: float) -> list[Evaluation]:
    """One evaluation for every probe, of checked answers in any order.

    Args:
        answers: All of a step.
        sign: -1.0 where the objective is maximised.
    """
    ordered = sorted(answers, key=lambda answer: answer[:2])
    return [_evaluation(list(own), sign) for _, own in groupby(ordered, lambda one: one.probe)]


def _evaluation(answers: list[Answer], sign: float) -> Evaluation:
    values = [answer.returned for answer in answers]
    if all(value.ndim == 1 for value in values):
        per_example = sign * (values[0] if len(values) == 1 else np.concatenate(values))
        return Evaluation(float(per_example.sum()) / len(per_example), per_example)
    means = [float(value.mean()) for value in values]
    if len(means) == 1:
        return Evaluation(sign * means[0])
    return Evaluation(sign * float(np.average(means, weights=[one.rows for one in answers])))


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
        self.failures = Failures()
        """Errors of the objective that stand for missing values."""
        self.on_nonfinite: OnNonFinite = "stop"
        """Other than "stop", values may be NaN: set by a run that knows what to make of them."""
        if self.objective.on_nonfinite != "stop" and self._score is None:
            self._function = self.failures.forgiven(self._function)

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
