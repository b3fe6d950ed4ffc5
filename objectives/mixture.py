"""Sums of objectives, written as such: ``0.7 * loss - 0.3 * reward``.

Orientation is decided here, once. Every part keeps its own sign: the sum is the sum of the values
that the parts return. A loss falls and a reward rises; a negative weight turns that round. When all
parts of a sum pull the same way the sum is minimised or maximised accordingly,

    0.7 * loss - 0.3 * reward     minimised
    accuracy - 0.1 * loss         maximised
    -reward                       minimised

and a sum whose parts pull in opposite ways (``loss + reward``) is an error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from objectives._shared import joined, shared_forwards, values_of
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.later import Made, made, made_of
from zo_adapt.evaluation.objective import Objective, SetObjective, as_objective

Part = tuple[float, Objective]
"""A weight and an objective."""


class Mixable:
    """Operators of objectives: a number times one, sums, differences, the sign turned round."""

    __array_ufunc__ = None  # a numpy number times an objective is the objective's affair

    def __mul__(self, weight: float) -> "Mixture":
        return mixture(_parts(self, _number(weight)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Mixture":
        return mixture(_parts(self, 1.0 / divisor))

    def __neg__(self) -> "Mixture":
        return mixture(_parts(self, -1.0))

    def __add__(self, other: Any) -> "Mixture":
        return mixture([*_parts(self), *_parts(other)])

    def __radd__(self, other: Any) -> "Mixture":
        return mixture([*_parts(other), *_parts(self)])

    def __sub__(self, other: Any) -> "Mixture":
        return mixture([*_parts(self), *_parts(other, -1.0)])

    def __rsub__(self, other: Any) -> "Mixture":
        return mixture([*_parts(other), *_parts(self, -1.0)])


class MixedBatch(NamedTuple):
    """The batch of every part; one object where parts make the same of the examples."""

    of_part: list[Any]


class Mixture(Mixable, Objective):
    """A weighted sum of objectives, made by the operators: ``0.7 * loss - 0.3 * reward``.

    f(batch) = sum_j w_j f_j(batch)

    One value per example where all parts give one, else their weighted means. Parts that ask one
    model about one batch share the forward; parts that run different models, or one model on
    different inputs, make one each, and the sum of them counts as one query for a sample. A part
    without a ``collate`` of its own is given the batch of the first that has one.

    Args:
        parts: Pairs of a weight and an objective, or any callable ``batch -> values``.

    Raises:
        OptionError: A weight that is not a finite number, a part that cannot be called, no part, or
            parts that pull in opposite ways.

    Example:
        >>> import torch
        >>> from objectives import CallableObjective
        >>> loss = CallableObjective(lambda x: x.square())
        >>> reward = CallableObjective(lambda x: x, maximize=True)
        >>> both = 0.5 * loss - 2.0 * reward
        >>> both(torch.tensor([1.0, 2.0])).tolist(), both.maximize
        ([-1.5, -2.0], False)
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = [(_number(weight), as_objective(part)) for weight, part in parts]
        self.maximize = _orientation(self.parts)
        each = [part for _, part in self.parts]
        self.min_rows = _most_rows(each)
        # One smooth part gives a signal at the usual perturbation.
        self.step_like = all(part.step_like for part in each)
        self.independent_rows = all(part.independent_rows for part in each)
        failing = {part.on_nonfinite for part in each}
        self.on_nonfinite = (
            "skip" if "skip" in failing else "worst" if "worst" in failing else "stop"
        )
        said = {part.mean_over_rows for part in each}
        self.mean_over_rows = all(said) if False in said or "auto" not in said else "auto"
        # None where no part has one, so that the loop does what it does for a bare function.
        if any(part.collate is not None for part in each):
            self.collate = self._collate
        for name in ("check_labels", "check_columns"):
            if any(getattr(part, name) is not None for part in each):
                setattr(self, name, partial(self._check_with_all, name))
        if any(part.evaluating is not None for part in each):
            self.evaluating = self._evaluating
        if any(part.stand_in is not None for part in each):
            self.stand_in = self._stand_in

    def __call__(self, batch: Any) -> Tensor:
        """The sum, float64 on the CPU, of shape (b,) or ()."""
        with shared_forwards():
            batches = self._batches(batch)
            returned = [part(one) for (_, part), one in zip(self.parts, batches, strict=True)]
        return self._sum([values_of(value) for value in returned])

    def _sum(self, values: Sequence[Tensor]) -> Tensor:
        if len({value.shape for value in values}) > 1 or values[0].dim() != 1:
            values = [value.mean() for value in values]
        terms = [weight * value for (weight, _), value in zip(self.parts, values, strict=True)]
        return torch.stack(terms).sum(0)

    def _batches(self, batch: Any) -> list[Any]:
        if isinstance(batch, MixedBatch):
            return batch.of_part
        return [batch] * len(self.parts)

    def _collate(self, examples: list[Any]) -> MixedBatch:
        makers = [part.collate for _, part in self.parts]
        default = next(make for make in makers if make is not None)
        batches: list[Any] = []
        for make in makers:
            made = (make or default)(examples)
            batches.append(next((one for one in batches if _equal(one, made)), made))
        return MixedBatch(batches)

    def _stand_in(self, batch: Any) -> list[Any]:
        """Of every part what it is checked by."""
        with shared_forwards():
            pairs = zip(self.parts, self._batches(batch), strict=True)
            return [
                (part.stand_in or (part.predict if isinstance(part, SetObjective) else part))(one)
                for (_, part), one in pairs
            ]

    def _check_with_all(self, name: str, given: Any) -> None:
        for _, part in self.parts:
            if (check := getattr(part, name)) is not None:
                check(given)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with ExitStack() as stack:
            for _, part in self.parts:
                if part.evaluating is not None:
                    stack.enter_context(part.evaluating())
            yield


class SetMixture(Mixture, SetObjective):
    """A mixture with a part that is scored on the whole set at once."""

    def __call__(self, batch: Any) -> Tensor:
        """The sum on one batch, float64."""
        total: Tensor = self.score([self.predict(batch)])
        return total

    def predict(self, batch: Any) -> list[Any]:
        """Of every part the predictions, or values and the number of rows they stand for."""
        return self._of_parts(_predicted, batch)

    def predict_later(self, batch: Any) -> Made:
        """The same, where parts have predictions that are on their way."""
        return made(made_of(self._of_parts(_begun, batch), list))

    def _of_parts(self, ask: Callable[[Objective, Any], Any], batch: Any) -> list[Any]:
        with shared_forwards():
            pairs = zip(self.parts, self._batches(batch), strict=True)
            return [ask(part, one) for (_, part), one in pairs]

    def score(self, predictions: list[list[Any]]) -> Tensor:
        """The sum, set-level parts scored once."""
        columns = list(zip(*predictions, strict=True))
        values = [
            values_of(part.score(list(column)))
            if isinstance(part, SetObjective)
            else joined(column)
            for (_, part), column in zip(self.parts, columns, strict=True)
        ]
        return self._sum(values)


def _predicted(part: Objective, batch: Any) -> Any:
    if isinstance(part, SetObjective):
        return part.predict(batch)
    return values_of(part(batch)).detach(), batch


def _begun(part: Objective, batch: Any) -> Any:
    later = part.predict_later
    return _predicted(part, batch) if later is None else made(later(batch))


def mixture(parts: Sequence[Part]) -> Mixture:
    """The sum of weighted objectives, scored on the whole set where one of them is."""
    ready = [(weight, as_objective(part)) for weight, part in parts]
    whole = any(isinstance(part, SetObjective) for _, part in ready)
    return (SetMixture if whole else Mixture)(ready)


def _parts(objective: Any, weight: float = 1.0) -> list[Part]:
    """The summands of an objective times a number; of 0, where ``sum`` begins, none."""
    if isinstance(objective, Mixture):
        return [(weight * own, part) for own, part in objective.parts]
    if isinstance(objective, int | float) and objective == 0:
        return []
    return [(weight, objective)]


def _most_rows(parts: Sequence[Objective]) -> int | Literal["all"]:
    """What every part has enough of."""
    rows = [part.min_rows for part in parts]
    return "all" if "all" in rows else max(row for row in rows if row != "all")


def _number(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise OptionError(f"the weight {weight!r} of an objective; choose a finite number")
    return float(weight)


def _orientation(parts: Sequence[Part]) -> bool:
    """True where the sum is to be maximised."""
    if not parts:
        raise OptionError("a sum of no objectives; give at least one")
    rises = {(weight > 0) == part.maximize for weight, part in parts if weight}
    if len(rises) > 1:
        terms = [
            f"{weight:+g} * {_name(part)} ({'more' if part.maximize else 'less'} is better)"
            for weight, part in parts
        ]
        raise OptionError(
            f"the parts of {', '.join(terms)} pull in opposite ways; a reward is subtracted from a "
            "loss: loss - 0.3 * reward. A function is a reward by "
            "CallableObjective(function, maximize=True)"
        )
    return rises == {True}


def _name(part: Any) -> str:
    name: str = getattr(part, "__name__", type(part).__name__)
    return name


def _equal(one: Any, other: Any) -> bool:
    """Whether two batches are mappings of equal tensors."""
    if not (isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys()):
        return False
    return all(
        isinstance(one[name], Tensor)
        and isinstance(other[name], Tensor)
        and one[name].dtype == other[name].dtype
        and torch.equal(one[name], other[name])
        for name in one
    )
