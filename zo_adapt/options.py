"""Checks of hyper-parameters, and the warning for those that have a new name."""

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from zo_adapt.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")


def positive(name: str, value: float) -> float:
    """``value`` if it is a finite number > 0, of any kind.

    Raises:
        OptionError: It is not.
    """
    found = finite(name, value, "a finite number > 0")
    if found <= 0:
        raise OptionError(f"{name}={value}; choose a finite number > 0")
    return found


def not_negative(name: str, value: float) -> float:
    """``value`` if it is a finite number >= 0, of any kind.

    Raises:
        OptionError: It is not.
    """
    found = finite(name, value, "a finite number >= 0")
    if found < 0:
        raise OptionError(f"{name}={value}; choose a finite number >= 0")
    return found


def finite(name: str, value: Any, range_: str = "a finite number") -> float:
    """``value`` as a float, if it is one finite number: no text, no truth value.

    Raises:
        OptionError: It is not.
    """
    try:
        is_number = not isinstance(value, str | bytes | bytearray | bool | np.bool_)
        found = float(value) if is_number else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not math.isfinite(found):
        raise OptionError(f"{name}={value!r:.80}; choose {range_}")
    return found


def positive_or_none(name: str, value: float | None) -> float | None:
    """``value`` if it is None, or finite and > 0.

    Raises:
        OptionError: It is neither.
    """
    return None if value is None else positive(name, value)


def at_least_one(name: str, value: int) -> int:
    """``value`` if it is an integer >= 1, numpy's included.

    Raises:
        OptionError: It is not.
    """
    found = _integer(value)
    if found is None or found < 1:
        raise OptionError(f"{name}={value}; choose an integer >= 1")
    return found


def integer(name: str, value: int) -> int:
    """``value`` if it is an integer, numpy's included.

    Raises:
        OptionError: It is not.
    """
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
