"""Checks of hyper-parameters."""

import math

from zo_adapt.errors import OptionError


def positive(name: str, value: float) -> float:
    """``value`` if it is finite and > 0.

    Raises:
        OptionError: It is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{name}={value}; choose a finite number > 0")
    return float(value)


def at_least_one(name: str, value: int) -> int:
    """``value`` if it is an integer >= 1.

    Raises:
        OptionError: It is not.
    """
    if not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value}; choose an integer >= 1")
    return value
