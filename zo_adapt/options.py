"""Checks of hyper-parameters, and the warning for those that have a new name."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from zo_adapt.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")


def positive(name: str, value: float) -> float:
    """``value`` if it is finite and > 0.

    Raises:
        OptionError: It is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{name}={value}; choose a finite number > 0")
    return float(value)


def positive_or_none(name: str, value: float | None) -> float | None:
    """``value`` if it is None, or finite and > 0.

    Raises:
        OptionError: It is neither.
    """
    return None if value is None else positive(name, value)


def at_least_one(name: str, value: int) -> int:
    """``value`` if it is an integer >= 1.

    Raises:
        OptionError: It is not.
    """
    if not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value}; choose an integer >= 1")
    return value


def check_run(max_steps: int | None, max_queries: int | None, seed: int) -> None:
    """Refuse a run without a budget, a negative budget, or a seed out of range.

    Raises:
        OptionError: One of these.
    """
    if max_steps is None and max_queries is None:
        raise OptionError("give a budget: max_steps=... or max_queries=...")
    for name, limit in (("max_steps", max_steps), ("max_queries", max_queries)):
        if limit is not None and limit < 0:
            raise OptionError(f"{name}={limit}; choose a number >= 0")
    if not 0 <= seed < 2**64:
        raise OptionError(f"seed={seed} is outside 0 <= seed < 2**64")


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
