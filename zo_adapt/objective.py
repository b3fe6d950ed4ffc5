"""What an objective is, and the one owner of evaluations and of their count."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from zo_adapt.data import Batch
from zo_adapt.errors import DropoutError, NonFiniteObjectiveError, ObjectiveError
from zo_adapt.term import Terms
from zo_adapt.view import ParameterView


class Objective(Protocol):
    """Any callable ``batch -> float`` or one value per example (a 1-d tensor, array or list).

    It is evaluated where the view is now, without gradient. A single number is taken as the mean
    over the batch; values per example let micro-batches be weighted exactly and are better.

    Three optional attributes are used when present: ``collate`` (makes a batch of a list of
    examples), ``evaluating()``, a context in which the model is ready (evaluation mode), and
    ``maximize``: True for a reward or a metric, of which more is better.
    """

    def __call__(self, batch: Any, /) -> Any:
        """The loss of a batch."""


@runtime_checkable
class SetObjective(Protocol):
    """An objective that needs the whole set at once (F1, NDCG): predicted in parts, scored once.

    A batch is not cut over several directions below ``min_rows`` rows, where the objective has that
    attribute; without it, or when it is None, a batch stays whole.
    """

    def predict(self, batch: Any, /) -> Any:
        """Predictions for one micro-batch."""

    def score(self, predictions: list[Any], /) -> Any:
        """One number, or one per example, from the predictions of all micro-batches."""


def rows_needed(objective: Objective | SetObjective) -> int:
    """Fewest rows that the objective has a meaningful value on; ``sys.maxsize``: all of a batch."""
    rows = getattr(objective, "min_rows", None if isinstance(objective, SetObjective) else 1)
    return sys.maxsize if rows is None else int(rows)


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


class Evaluator:
    """Evaluates probes and counts queries. One query = one forward of one sample.

    Args:
        objective: What is minimised.
        view: Where the probes shift.
        maximize: Flip the sign, here and nowhere else; None: as the objective says.
        micro_batch_size: Largest number of rows in one call of the objective; None is no limit.
        max_queries: Budget; a step that does not fit is not begun.
    """

    def __init__(
        self,
        objective: Objective | SetObjective,
        view: ParameterView,
        *,
        maximize: bool | None = None,
        micro_batch_size: int | None = None,
        max_queries: int | None = None,
    ) -> None:
        self.objective, self.view = objective, view
        own = bool(getattr(objective, "maximize", False))
        self.sign = -1.0 if (own if maximize is None else maximize) else 1.0
        self.micro_batch_size = micro_batch_size
        self.max_queries = max_queries
        self.queries = 0

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Answer every probe, in order; the weights are bit-identical afterwards.

        Raises:
            BudgetExhausted: The probes need more queries than are left.
            ObjectiveError: The objective returned something that is not a loss.
        """
        self.reserve(sum(len(probe.batch) for probe in probes))
        with torch.no_grad(), self.ready():
            return [self._evaluate(probe) for probe in probes]

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
        if hasattr(self.objective, "evaluating"):
            context: AbstractContextManager[Any] = self.objective.evaluating()
            return context
        check_dropout(self.view)
        return nullcontext()

    def _evaluate(self, probe: Probe) -> Evaluation:
        parts = list(probe.batch.micro_batches(self.micro_batch_size))
        with self.view.shifted(probe.terms, probe.decay):
            if isinstance(self.objective, SetObjective):
                predictions = [self.objective.predict(part.content) for part in parts]
                values = [_values(self.objective.score(predictions), len(probe.batch))]
            else:
                values = [_values(self.objective(part.content), len(part)) for part in parts]
        return self._combine(values, [len(part) for part in parts])

    def _combine(self, values: list[np.ndarray], sizes: list[int]) -> Evaluation:
        if all(value.ndim == 1 for value in values):
            per_example = self.sign * np.concatenate(values)
            return Evaluation(float(per_example.mean()), per_example)
        means = [float(value.mean()) for value in values]
        if len(means) == 1:
            return Evaluation(self.sign * means[0])
        return Evaluation(self.sign * float(np.average(means, weights=sizes)))


def _values(returned: Any, rows: int) -> np.ndarray:
    """What the objective returned, as float64 of shape () or (rows,).

    Raises:
        ObjectiveError: It requires grad, has another shape, or is not a number.
        NonFiniteObjectiveError: NaN or infinity.
    """
    if returned is None:
        raise ObjectiveError(
            "the objective returned NoneType; return a float or one per example (is the return "
            "statement missing?)"
        )
    if isinstance(returned, Tensor):
        if returned.requires_grad:
            raise ObjectiveError(
                "the objective returned a tensor that requires grad: it was computed outside "
                "no_grad, which costs memory; remove enable_grad(), or return .detach()"
            )
        returned = returned.to("cpu", torch.float64).numpy()
    try:
        values = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(
            f"the objective returned {type(returned).__name__}; return a float or one per example"
        ) from error
    if values.shape not in ((), (1,), (rows,)):
        raise ObjectiveError(
            f"the objective returned shape {values.shape} for {rows} examples; return a float "
            f"or shape ({rows},)"
        )
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(values)))
        raise NonFiniteObjectiveError(
            f"the objective returned {np.atleast_1d(values)[bad[0]]} for {len(bad)} of "
            f"{values.size} values; a smaller lr or perturbation_scale keeps it finite"
        )
    return values if values.shape == (rows,) else values.reshape(())


def check_dropout(view: ParameterView) -> None:
    """Refuse a model that would draw a dropout mask.

    Raises:
        DropoutError: A module in training mode has dropout with p > 0.
    """
    if view.model is None:
        return
    for name, module in view.model.named_modules():
        rate = _dropout_rate(module) if module.training else 0.0
        if rate > 0:
            raise DropoutError(
                f"dropout of {name!r} (p={rate}) is on; call model.eval() before tuning"
            )


def _dropout_rate(module: torch.nn.Module) -> float:
    """The largest rate of a dropout module, or of one that calls the function (OPT, LSTM do)."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return float(module.p)
    rates = [rate for name, rate in vars(module).items() if "drop" in name]
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; each module's own mode restored afterwards.

    Example:
        >>> layer = torch.nn.Dropout(0.5)
        >>> with evaluation_mode(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def mean_value(evaluations: Sequence[Evaluation], weights: Sequence[int]) -> float:
    """The mean over all rows of several evaluations."""
    total = math.fsum(e.value * w for e, w in zip(evaluations, weights, strict=True))
    return total / sum(weights)
