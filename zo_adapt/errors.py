"""Named errors and warnings, and the checks of options that raise them.

A message gives the value, the allowed range and the way out.
"""

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np


class ZOError(Exception):
    """Base of every error that zo_adapt raises on purpose.

    Example:
        >>> from zo_adapt import MeZO
        >>> try:
        ...     MeZO(displacement=-1.0)
        ... except ZOError as error:
        ...     print(type(error).__name__)
        OptionError
    """


class ViewError(ZOError, ValueError):
    """The view cannot be tuned: empty, integer, quantised, meta, not finite, or read by nothing."""


class NoMatchingParameterError(ViewError):
    """A pattern matches no parameter; the message lists near names."""


class AdapterError(ViewError):
    """A peft adapter is merged, disabled or inactive: the model's output does not depend on it."""


class ViewInUseError(ViewError, RuntimeError):
    """A view is changed, or used by another thread, while it is shifted."""


class TermError(ZOError, ValueError):
    """A term has a seed, coefficient or group outside its range."""


class OptionError(ZOError, ValueError):
    """A hyper-parameter is outside its range."""


class ArgumentTypeError(OptionError, TypeError):
    """An argument is of another kind than is asked for; the message says what to pass."""


class MissingPackageError(ZOError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class PerturbationError(OptionError):
    """The perturbation is smaller than the resolution of the tensors' dtype."""


class DataError(ZOError, ValueError):
    """The data cannot supply the batches asked for."""


class DropoutError(ZOError, RuntimeError):
    """Dropout is active: the two points of an estimate would differ by more than the direction."""


class ChangingBufferError(ZOError, RuntimeError):
    """Forwards change a buffer (BatchNorm's) or a weight: no two points see one model."""


class ObjectiveError(ZOError, ValueError):
    """The objective returned something other than a scalar or one value per example."""


class NonFiniteObjectiveError(ObjectiveError):
    """The objective returned NaN or infinity; the weights are those of the last good step."""


class StepTooLargeError(ZOError, OverflowError):
    """A step would leave the range of the dtype; the weights are those of the last good step."""


class TrajectoryError(ZOError, ValueError):
    """A trajectory file is not one, or belongs to another view, base or noise."""


class CorruptTrajectoryError(TrajectoryError):
    """A trajectory file is damaged; nothing was applied."""


class TrajectoryInUseError(TrajectoryError):
    """A trajectory file is being written by another run."""


class TrajectoryWriteError(ZOError, OSError):
    """A trajectory cannot be written; the steps before are safe."""


class TruncatedTrajectoryWarning(UserWarning):
    """The end of a trajectory file was cut off in the middle of a record, which was dropped."""


class ServedModelError(ZOError, RuntimeError):
    """A served model cannot do what is asked of it; the weights are those of the last good step."""


class ServerLostError(ServedModelError, ConnectionError):
    """A server did not answer, however often it was asked; its last words are in the message."""


class ServerReplyError(ServedModelError):
    """A server refused a request, or answered something else than it was asked."""


class NotServableError(ServedModelError, OptionError):
    """An adapter, or an objective, that this server cannot run."""


class SelfTestError(ServedModelError):
    """A served model failed the self-test before the first step; the message says which part."""


class UndefinedMetricError(ObjectiveError):
    """A metric has no value on these rows: one class only, no relevant document, NaN."""


class RankError(ZOError, RuntimeError):
    """Something went wrong in another of the processes that share a run."""


class LostRankError(RankError):
    """A process has ended or hangs; the weights of the others are those of the last good step."""


class ReplicaError(RankError):
    """The processes of a run differ in what must be the same: weights, settings, data, values."""


class FlatObjectiveWarning(UserWarning):
    """Both points of the estimate gave the same loss many times in a row: nothing is learned."""


class NoisyObjectiveWarning(UserWarning):
    """The objective gives other values for the same examples at the same weights."""


class RoundingWarning(UserWarning):
    """The differences of a half-precision or quantised model's values are mostly rounding."""


class UnreadTensorWarning(UserWarning):
    """Tensors of the view do not reach the objective's value; they stay as they are."""


P = ParamSpec("P")
R = TypeVar("R")


def positive(name: str, value: float) -> float:
    """``value`` if it is a finite number > 0, of any kind; an ``OptionError`` else."""
    found = finite(name, value, "a finite number > 0")
    if found <= 0:
        raise OptionError(f"{name}={value}; choose a finite number > 0")
    return found


def not_negative(name: str, value: float) -> float:
    """``value`` if it is a finite number >= 0, of any kind; an ``OptionError`` else."""
    found = finite(name, value, "a finite number >= 0")
    if found < 0:
        raise OptionError(f"{name}={value}; choose a finite number >= 0")
    return found


def finite(name: str, value: Any, range_: str = "a finite number") -> float:
    """``value`` as a float, if it is one finite number, no text; an ``OptionError`` else."""
    try:
        is_number = not isinstance(value, str | bytes | bytearray | bool | np.bool_)
        found = float(value) if is_number else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not math.isfinite(found):
        raise OptionError(f"{name}={value!r:.80}; choose {range_}")
    return found


def positive_or_none(name: str, value: float | None) -> float | None:
    """``value`` if it is None, or finite and > 0; an ``OptionError`` else."""
    return None if value is None else positive(name, value)


def at_least_one(name: str, value: int) -> int:
    """``value`` if it is an integer >= 1, numpy's included; an ``OptionError`` else."""
    found = _integer(value)
    if found is None or found < 1:
        raise OptionError(f"{name}={value}; choose an integer >= 1")
    return found


def integer(name: str, value: int) -> int:
    """``value`` if it is an integer, numpy's included; an ``OptionError`` else."""
    found = _integer(value)
    if found is None:
        raise OptionError(f"{name}={value!r}; choose an integer")
    return found


def _integer(value: Any) -> int | None:
    """An integer of any kind as Python's; None for anything else, truth values included."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_run(
    max_steps: int | None, max_queries: int | None, seed: int
) -> tuple[int | None, int | None, int]:
    """The budget and the seed, as Python's integers.

    Raises:
        OptionError: No budget, a negative one, a seed out of range, or no integer.
    """
    if max_steps is None and max_queries is None:
        raise OptionError("give a budget: max_steps=... or max_queries=...")
    limits: list[int | None] = []
    for name, limit in (("max_steps", max_steps), ("max_queries", max_queries)):
        found = None if limit is None else _integer(limit)
        if limit is not None and (found is None or found < 0):
            raise OptionError(f"{name}={limit}; choose an integer >= 0")
        limits.append(found)
    key = _integer(seed)
    if key is None or not 0 <= key < 2**64:
        raise OptionError(f"seed={seed} is no integer, or outside 0 <= seed < 2**64")
    return limits[0], limits[1], key


def renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that an old spelling still works, for one version.

    Args:
        old: As the user wrote it, as in ``"snapshot_size=None"``.
        new: What to write instead.
        stacklevel: Frames up to the user's own line; 3 where the function that users call warns.
    """
    message = f"{old} is now {new}; the old spelling goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def former_keywords(
    names: Mapping[str, str],
    translate: Callable[[dict[str, Any], dict[str, Any]], None],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function accept keywords that its signature no longer shows, with a warning for each.

    Args:
        names: Former keyword -> how to say it now.
        translate: ``translate(arguments, former)`` changes the arguments (by name) in place, so
            that they say what the former keywords said.

    Example:
        >>> @former_keywords({"size": "length="}, lambda new, old: new.update(length=old["size"]))
        ... def double(*, length: int) -> int:
        ...     return 2 * length
        >>> with warnings.catch_warnings(action="ignore"):
        ...     double(size=3)
        6
        >>> inspect.signature(double)
        <Signature (*, length: int) -> int>
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def accepting(*args: P.args, **kwargs: P.kwargs) -> R:
            former = {name: kwargs.pop(name) for name in names if name in kwargs}
            if not former:
                return function(*args, **kwargs)
            for name in former:
                renamed(f"{name}=", names[name])
            bound = signature.bind_partial(*args, **kwargs)
            translate(bound.arguments, former)
            return function(*bound.args, **bound.kwargs)

        return accepting

    return decorate
