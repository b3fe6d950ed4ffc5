"""What an objective is: the contract between what is tuned for and what asks it."""

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from zo_adapt.data.forms import Collate
from zo_adapt.errors import ArgumentTypeError
from zo_adapt.evaluation.later import Later
from zo_adapt.evaluation.model_state import check_dropout
from zo_adapt.options import at_least_one, renamed

ColumnOf = Callable[[str], Sequence[Any] | None]
"""Gives the values of a field, one an example."""


class Objective(ABC):
    """Base of what is minimised or maximised: ``batch -> float``, or one value per example.

    It is called where the weights are now, without gradient. Values per example (a 1-d tensor,
    array or list) are better than one number: parts of a batch are then weighted exactly.

    A bare function will do (``as_objective``); a class of its own says more. All that an objective
    may say of itself is below, with what holds where it says nothing.

    Attributes:
        collate: ``list of examples -> batch``. None: torch's default, or the loop's own.
        evaluating: Called, a context in which the model is ready. None: the caller keeps it so,
            and a model with dropout switched on is refused.
        maximize: More is better: a reward or a metric. Falls by default.
        independent_rows: The value of a row depends on that row alone, not on random draws or on
            the other rows of the batch; several points may then be evaluated in one call.
        step_like: The value changes in jumps, as a count does; the optimizers then perturb further
            than is usual, to see any.
        mean_over_rows: The value of a batch is the mean over its rows, so that a batch may be cut:
            over several directions, and into micro-batches, whose means are weighted by their
            rows. False: a batch stays in one call. "auto": True if it gives one value per example,
            the same for an example alone as beside another; found out at the start by calling it
            on the first two examples and on the first. (The calls are not counted as queries; an
            error in them counts as no value per example.)
        min_rows: Fewest rows of the part of a batch that one direction sees. "all": every
            direction sees the whole batch.
        check_labels: Called at the start with a tensor of all labels, where the data hold one
            integer an example; raises where one cannot be. None: any will do.
        check_columns: Called at the start with a function, name of a field -> its values of all
            examples (None where they would have to be made first); raises where one cannot be.
        capturable: A call on a GPU runs the same kernels for all batches of one shape and waits for
            no result of them, so that a CUDA graph can replay them.
        row_bytes: Called with a batch, the memory that a row takes while it is evaluated: as many
            go together as the device has room for. None: a number of tokens is the limit.
        stand_in: Called with a batch, numbers of its rows that change smoothly with the weights and
            come of the same forwards as the value, for checks of joint forwards. None: the value
            itself, which will not do where it jumps.
        uneven: Rows do not say how long calls take (texts end where they will): several processes
            then take them from a queue, one by one.
        predict_later: Of a ``SetObjective``, called in place of ``predict`` where more batches
            follow: does what needs the model and returns an object whose ``result()`` waits for
            the predictions (a ``concurrent.futures.Future``, say), whose ``cancel()`` gives them
            up. It is asked for them when the model has computed what follows.
        on_nonfinite: What a run makes of points where a call raised an error or gave NaN or
            infinity: "stop" ends it; "worst" takes them for the worst other value of the step;
            "skip" gives the step up, and the next has other points. See ``CallableObjective``.
        made_with: Arguments that no attribute has the name of, for a trajectory's header: a run is
            not gone on with by an objective that was made otherwise.

    Example:
        >>> import torch
        >>> class Distance(Objective):
        ...     mean_over_rows = True
        ...     def __init__(self, x):
        ...         self.x = x
        ...     def __call__(self, batch):
        ...         return (batch - self.x).square().sum(1)
        >>> Distance(torch.zeros(2))(torch.ones(3, 2)).tolist()
        [2.0, 2.0, 2.0]
    """

    collate: Collate | None = None
    evaluating: Callable[[], AbstractContextManager[Any]] | None = None
    maximize: bool = False
    independent_rows: bool = True
    step_like: bool = False
    mean_over_rows: bool | Literal["auto"] = "auto"
    min_rows: int | Literal["all"] = 1
    check_labels: Callable[[Tensor], None] | None = None
    check_columns: Callable[[ColumnOf], None] | None = None
    capturable: bool = False
    row_bytes: Callable[[Any], int] | None = None
    stand_in: Callable[[Any], Any] | None = None
    uneven: bool = False
    predict_later: Callable[[Any], Later] | None = None
    on_nonfinite: Literal["stop", "worst", "skip"] = "stop"
    made_with: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def __call__(self, batch: Any, /) -> Any:
        """The value of a batch, or one for each of its examples."""

    def __repr__(self) -> str:
        """The call that makes it: models by their class, defaults left out."""
        own, parts = vars(self), list[str]()
        for name, argument in inspect.signature(type(self)).parameters.items():
            value = next((own[key] for key in (name, f"_{name}") if key in own), argument.default)
            if value is argument.empty or value is not argument.default:
                parts.append(f"{name}={_in_short(value)}" if value is not argument.empty else "...")
        return f"{type(self).__name__}({', '.join(parts)})"


class SetObjective(Objective):
    """Base of what needs the whole set at once (F1, NDCG): predicted in parts, scored once.

    ``predict`` is called on micro-batches; ``score`` on what it returned for all of them. Every
    direction sees the whole batch (``min_rows="all"``) unless the class says how many rows will do.

    Attributes:
        min_rows: As in ``Objective``; here "all".
        mean_over_rows: Here: rows may be predicted in micro-batches.

    Example:
        >>> import torch
        >>> class Largest(SetObjective):
        ...     maximize = True
        ...     def predict(self, batch):
        ...         return batch.max()
        ...     def score(self, predictions):
        ...         return max(predictions)
        >>> float(Largest()(torch.tensor([1.0, 3.0])))
        3.0
    """

    min_rows: int | Literal["all"] = "all"
    mean_over_rows: bool | Literal["auto"] = True

    def __call__(self, batch: Any, /) -> Any:
        """The score of one batch."""
        return self.score([self.predict(batch)])

    @abstractmethod
    def predict(self, batch: Any, /) -> Any:
        """Predictions for one micro-batch."""

    @abstractmethod
    def score(self, predictions: list[Any], /) -> Any:
        """One number, or one per example, from the predictions of all micro-batches."""


def _in_short(value: Any) -> str:
    if isinstance(value, str | int | float | bool | tuple | list | None):
        return f"{value!r:.60}"
    return str(getattr(value, "__qualname__", f"<{type(value).__name__}>"))


class PredictsAndScores(Protocol):
    """A class of another origin with the two methods of a ``SetObjective``."""

    def predict(self, batch: Any, /) -> Any:
        """Predictions for one micro-batch."""

    def score(self, predictions: list[Any], /) -> Any:
        """One number, or one per example, from the predictions of all micro-batches."""


ObjectiveLike = Objective | Callable[[Any], Any] | PredictsAndScores
"""What ``as_objective`` takes."""

ATTRIBUTES = tuple(name for name in Objective.__annotations__ if name != "made_with")
"""All that an objective says of itself."""


class _Wrapped(Objective):
    """A callable, and what is said of it."""

    def __init__(self, wrapped: Any, said: Mapping[str, Any]) -> None:
        self.wrapped = wrapped
        self.__name__ = getattr(wrapped, "__name__", type(wrapped).__name__)
        vars(self).update(said)

    def __call__(self, batch: Any, /) -> Any:
        return self.wrapped(batch)

    def __repr__(self) -> str:
        return f"as_objective({self.wrapped!r})"


class _WrappedSet(_Wrapped, SetObjective):
    """Something with ``predict`` and ``score``, and what is said of it."""

    def __call__(self, batch: Any, /) -> Any:
        return SetObjective.__call__(self, batch)

    def predict(self, batch: Any, /) -> Any:
        return self.wrapped.predict(batch)

    def score(self, predictions: list[Any], /) -> Any:
        return self.wrapped.score(predictions)


def as_objective(given: ObjectiveLike) -> Objective:
    """An ``Objective`` of whatever the caller has.

    Args:
        given: An ``Objective``, returned as it is; any callable ``batch -> float`` or one value per
            example; or an object with ``predict`` and ``score``, which makes a ``SetObjective``.
            Its attributes of an objective's names are read once, here; the others have the
            defaults.

    Raises:
        ArgumentTypeError: Something else.
        OptionError: A ``min_rows`` that is neither an integer >= 1 nor "all".

    Example:
        >>> as_objective(lambda batch: 0.0).maximize
        False
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, type):
        name = given.__name__
        raise ArgumentTypeError(f"the objective is the class {name}; make one: {name}(...)")
    said = attributes_of(given)
    if callable(getattr(given, "predict", None)) and callable(getattr(given, "score", None)):
        return _WrappedSet(given, said)
    if not callable(given):
        raise ArgumentTypeError(
            f"the objective {given!r:.80} cannot be called; give a function of a batch, or an "
            "object with predict and score"
        )
    return _Wrapped(given, said)


def attributes_of(given: Any) -> dict[str, Any]:
    """Those of an objective's attributes that an object has, by name."""
    said = {name: getattr(given, name) for name in ATTRIBUTES if hasattr(given, name)}
    if "joint" in dir(given) and "independent_rows" not in said:
        renamed(f"{type(given).__name__}.joint", "independent_rows", stacklevel=4)
        said["independent_rows"] = bool(given.joint)
    if "min_rows" in said:
        said["min_rows"] = checked_min_rows(said["min_rows"])
    return said


def with_attributes(objective: Objective, **changes: Any) -> Objective:
    """The same objective, of which some attributes are others."""
    kind = _WrappedSet if isinstance(objective, SetObjective) else _Wrapped
    return kind(objective, attributes_of(objective) | changes)


def checked_min_rows(rows: int | Literal["all"] | None) -> int | Literal["all"]:
    """The same, if it is an integer >= 1 or "all".

    Raises:
        OptionError: It is neither.
    """
    if rows is None:
        renamed("min_rows=None", 'min_rows="all"', stacklevel=4)
        return "all"
    return "all" if rows == "all" else at_least_one("min_rows", rows)


def rows_needed(objective: Objective) -> int:
    """Fewest rows of the part of a batch that one direction sees; ``sys.maxsize``: all of it."""
    if objective.min_rows == "all" or keeps_batch_whole(objective):
        return sys.maxsize
    return objective.min_rows


def keeps_batch_whole(objective: Objective) -> bool:
    """Whether every call must have all rows of a batch."""
    return objective.mean_over_rows is not True


def ready(objective: Objective, model: nn.Module | None) -> AbstractContextManager[Any]:
    """The objective's own evaluation mode, or a check that the model is in it."""
    if objective.evaluating is not None:
        return objective.evaluating()
    if model is not None:
        check_dropout(model)
    return nullcontext()
