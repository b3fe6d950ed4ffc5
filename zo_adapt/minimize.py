"""The loop for anything callable."""

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from zo_adapt.data import Collate, Samples, as_source, class_labels
from zo_adapt.errors import NonFiniteObjectiveError, OptionError, StepTooLargeError
from zo_adapt.objective import BudgetExhausted, Evaluator, Objective, SetObjective
from zo_adapt.optimizer import Optimizer
from zo_adapt.options import at_least_one
from zo_adapt.rule import Budget
from zo_adapt.view import ParameterView


class StopReason(StrEnum):
    """Why a run ended; the values are the sentences that users read."""

    MAX_STEPS = "the maximum number of steps was reached"
    MAX_QUERIES = "the next step would exceed the maximum number of queries"
    CALLBACK = "the callback raised StopIteration"
    NON_FINITE = "the objective was not finite; the weights are those of the last good step"
    STEP_TOO_LARGE = "a step left the dtype's range; the weights are those of the last good step"


class Record(NamedTuple):
    """One line of the history.

    Args:
        step: Number of the step, from 1.
        queries: Forwards of one sample so far.
        value: Mean loss of the step's batch at the weights before the step.
        lr: Learning rate applied.
        projected_gradient: Root mean square of the step's projected gradients.
        kind: "snapshot" or "minibatch".
    """

    step: int
    queries: int
    value: float
    lr: float
    projected_gradient: float
    kind: str


class Result(NamedTuple):
    """What ``minimize`` returns. The weights are in the view's own tensors.

    Args:
        value: The last record's value, an estimate from one batch; NaN if there was no step.
        nit: Steps done.
        queries: Forwards of one sample.
        stop_reason: Why it ended.
        message: The same, as a sentence, with the details.
        history: One record per step.
    """

    value: float
    nit: int
    queries: int
    stop_reason: StopReason
    message: str
    history: list[Record]


def minimize(
    objective: Objective | SetObjective,
    view: ParameterView,
    data: Any,
    optimizer: Optimizer,
    *,
    batch_size: int | None = None,
    max_steps: int | None = None,
    max_queries: int | None = None,
    seed: int = 0,
    callback: Callable[[Record], None] | None = None,
    progress: bool = True,
    maximize: bool | None = None,
    collate: Collate | None = None,
    micro_batch_size: int | None = None,
    stratify: bool = True,
) -> Result:
    """Minimise an objective over a view by an optimizer of this package.

    Args:
        objective: Any callable ``batch -> float`` or one value per example; see ``Objective``.
        view: What may change; it is changed in place.
        data: None (the objective is called with None); tensors; or a sequence of examples.
        optimizer: ``MeZOSVRG()``, ``MeZO()``, ... It is restarted.
        batch_size: Rows of a minibatch; not needed without data.
        max_steps: Budget in steps.
        max_queries: Budget in forwards of one sample; never exceeded.
        seed: Of directions and data order, 0 <= seed < 2**64. Same seed, same run.
        callback: Called with a ``Record`` after every step; StopIteration stops the run.
        progress: Show a progress bar.
        maximize: Climb instead of descend; None: as the objective says (a metric is climbed).
        collate: Makes a batch of a list of examples; the objective's own by default.
        micro_batch_size: Most rows in one call of the objective; ``batch_size`` by default, so
            that a snapshot needs no more memory than a minibatch.
        stratify: Spread the classes evenly over every pass, where the data have a field ``labels``
            or ``label`` of one integer an example.

    Returns:
        Value, steps, queries, stop reason and history.

    Raises:
        ZOError: Named errors for bad input, before any evaluation.

    Example:
        >>> import torch
        >>> from zo_adapt import MeZO, ParameterView, minimize
        >>> x = torch.zeros(2)
        >>> result = minimize(
        ...     lambda batch: float(((x - 3) ** 2).sum()), ParameterView({"x": x}), None,
        ...     MeZO(lr=1e-2), max_steps=3, progress=False)
        >>> result.nit, result.queries, result.stop_reason.name
        (3, 6, 'MAX_STEPS')
    """
    if max_steps is None and max_queries is None:
        raise OptionError("give a budget: max_steps=... or max_queries=...")
    if micro_batch_size is not None:
        at_least_one("micro_batch_size", micro_batch_size)
    for name, limit in (("max_steps", max_steps), ("max_queries", max_queries)):
        if limit is not None and limit < 0:
            raise OptionError(f"{name}={limit}; choose a number >= 0")
    if not 0 <= seed < 2**64:
        raise OptionError(f"seed={seed} is outside 0 <= seed < 2**64")
    source = as_source(data, collate or getattr(objective, "collate", None))
    samples = Samples(source, batch_size, seed, class_labels(data) if stratify else None)
    evaluator = Evaluator(
        objective,
        view,
        maximize=maximize,
        micro_batch_size=micro_batch_size or batch_size,
        max_queries=max_queries,
    )
    view.check_adapters()
    view.check_finite()
    optimizer.start(view, seed)
    run = _Run(evaluator, samples, optimizer, Budget(max_steps, max_queries))
    with tqdm(
        total=max_queries or max_steps,
        unit="query" if max_queries else "step",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        reason, detail = run.until_stopped(callback, bar)
    value = run.history[-1].value if run.history else math.nan
    message = f"{reason}{detail}"
    return Result(value, len(run.history), evaluator.queries, reason, message, run.history)


class _Run:
    """The loop's state: what was done so far, out of how much."""

    def __init__(
        self,
        evaluator: Evaluator,
        samples: Samples,
        optimizer: Optimizer,
        budget: Budget,
    ) -> None:
        self.evaluator, self.samples, self.optimizer = evaluator, samples, optimizer
        self.budget = budget
        self.history: list[Record] = []

    def until_stopped(
        self, callback: Callable[[Record], None] | None, bar: "tqdm[Any]"
    ) -> tuple[StopReason, str]:
        """Step until a budget is used up, the callback stops or the objective is not finite."""
        limit = self.budget.max_steps
        while limit is None or len(self.history) < limit:
            try:
                record = self.step()
            except BudgetExhausted:
                return StopReason.MAX_QUERIES, ""
            except NonFiniteObjectiveError as error:
                return StopReason.NON_FINITE, f" ({error})"
            except StepTooLargeError as error:
                return StopReason.STEP_TOO_LARGE, f" ({error})"
            bar.update(record.queries - bar.n if self.budget.max_queries else 1)
            bar.set_postfix(loss=f"{record.value:.4f}", refresh=False)
            try:
                if callback is not None:
                    callback(record)
            except StopIteration:
                return StopReason.CALLBACK, ""
        return StopReason.MAX_STEPS, ""

    def step(self) -> Record:
        """One step of the optimizer, on record."""
        info = self.optimizer.step(self.evaluator, self.samples, self.budget)
        record = Record(
            step=len(self.history) + 1,
            queries=self.evaluator.queries,
            value=self.evaluator.sign * info.value,
            lr=info.lr,
            projected_gradient=info.projected_gradient,
            kind=info.kind,
        )
        self.history.append(record)
        return record
