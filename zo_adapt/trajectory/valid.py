"""What a trajectory says makes sense: looked at after the checksums, which anyone can make right.

Trajectories are meant to be shared: a file of another origin is applied as it stands, or not.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zo_adapt.errors import CorruptTrajectoryError
from zo_adapt.term import SEED_LIMIT, Step

LARGEST_COUNT = 2**63
"""Scalars of a tensor: more than any has."""

LARGEST_DECAY = 2.0
"""1 - lr * rate, where a run refuses lr * rate >= 1; above 1 the rate is negative."""


def check_header_form(header: Any, path: str | Path) -> None:
    """Refuse a header without the entries that a replay reads, or with others in their place.

    Raises:
        CorruptTrajectoryError: Names the entry.
    """
    if not isinstance(header, Mapping):
        raise CorruptTrajectoryError(f"the header of {path} is a {type(header).__name__}")
    for name, is_right in _ENTRIES.items():
        if name not in header and name not in _OPTIONAL:
            raise CorruptTrajectoryError(f"the header of {path} has no {name!r}")
        if name in header and not is_right(header[name]):
            found = f"{header[name]!r:.80}"
            raise CorruptTrajectoryError(f"the header of {path} has {name}={found}, which is none")


def check_step_form(step: Step, groups: int) -> None:
    """Refuse a step that no run makes.

    Args:
        step: As it was read.
        groups: How many the view has, that of the rest included.

    Raises:
        ValueError: Says what is wrong.
    """
    for name in ("value", "lr", "projected_gradient"):
        if not math.isfinite(getattr(step, name)):
            raise ValueError(f"{name} {getattr(step, name)}")
    if not 0 < step.update.decay < LARGEST_DECAY:
        raise ValueError(f"decay {step.update.decay}")
    for seed, coefficient, group in step.update.terms:
        if not math.isfinite(coefficient):
            raise ValueError(f"coefficient {coefficient} of seed {seed}")
        if group is not None and group >= groups:
            raise ValueError(f"group {group} of {groups}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_COUNT


def _is_factor(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (
        is_number and 0 <= value <= 1e300
    )  # compared as it is: an integer may be beyond any float


def _is_view(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_tensor, value))


def _is_tensor(row: Any) -> bool:
    if not (isinstance(row, list) and len(row) == 3):
        return False
    name, shape, dtype = row
    sizes = isinstance(shape, list) and all(map(_is_count, shape))
    return _is_text(name) and _is_text(dtype) and sizes and math.prod(shape) < LARGEST_COUNT


def _is_groups(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_group, value))


def _is_group(row: Any) -> bool:
    if not (isinstance(row, list) and len(row) in (3, 4) and _is_text(row[0])):
        return False
    try:
        re.compile(row[0])
    except (re.error, RecursionError, OverflowError):
        return False
    return all(map(_is_factor, row[1:3])) and row[3:] in ([], [False])


def _is_seeds(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 2 and _is_text(value[0])):
        return False
    key = value[1]
    return isinstance(key, int) and not isinstance(key, bool) and 0 <= key < SEED_LIMIT


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and _is_factor(value.get("weight_decay", 0.0))


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "view": _is_view,
    "groups": _is_groups,
    "noise": _is_text,
    "fingerprint": _is_text,
    "initial": _is_text,
    "seeds": _is_seeds,
    "versions": lambda value: isinstance(value, dict),
    "settings": _is_settings,
    "at_rest": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "base": lambda value: value is None or _is_text(value),
}
_OPTIONAL = ("settings", "at_rest", "base")
"""Not in every file of this format."""
