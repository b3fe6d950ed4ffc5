"""What an objective is: the contract between what is tuned for and what asks it."""

import sys
from typing import Any, Protocol, runtime_checkable


class Objective(Protocol):
    """Any callable ``batch -> float`` or one value per example (a 1-d tensor, array or list).

    It is evaluated where the view is now, without gradient. A single number is taken as the mean
    over the batch; values per example let micro-batches be weighted exactly and are better.

    Five optional attributes are used when present: ``collate`` (makes a batch of a list of
    examples), ``evaluating()``, a context in which the model is ready (evaluation mode),
    ``maximize``: True for a reward or a metric, of which more is better, ``joint``: False where
    the value of a row depends on the other rows of the batch, by random draws or otherwise, so that
    several points must not be evaluated in one call, and ``step_like``: True where the value
    changes in jumps, as a count does, and the usual perturbation is too small to see any.
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


def is_step_like(objective: Objective | SetObjective) -> bool:
    """Whether the objective says that it changes in jumps."""
    return bool(getattr(objective, "step_like", False))


class _Wrapped:
    """Temporary: the attributes of an objective, with defaults."""

    def __init__(self, given: Any) -> None:
        self.given = given
        self.maximize = bool(getattr(given, "maximize", False))
        self.independent_rows = bool(getattr(given, "joint", True))
        self.capturable = bool(getattr(given, "capturable", False))
        self.step_like = bool(getattr(given, "step_like", False))
        self.evaluating = getattr(given, "evaluating", None)

    def __call__(self, batch: Any) -> Any:
        return self.given(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)


def as_objective(given: Any) -> Any:
    """Temporary."""
    return _Wrapped(given)
