"""What a trajectory says of itself, whether that makes sense, and whether it belongs to a view.

Sense is looked at after the checksums, which anyone can make right: trajectories are meant to be
shared, and a file of another origin is applied as it stands, or not.
"""

import math
import platform
import re
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from zo_adapt.errors import CorruptTrajectoryError, TrajectoryError
from zo_adapt.noise.seeds import NAME
from zo_adapt.term import SEED_LIMIT, Step
from zo_adapt.view.parameters import ParameterView

LIBRARIES = ("zo_adapt", "torch", "numpy", "transformers", "peft")


def header_of(view: ParameterView, seed: int, **more: Any) -> dict[str, Any]:
    """What a trajectory says of itself.

    Args:
        view: The view, at the weights that the trajectory starts from.
        seed: Of the directions.
        more: Further entries: the optimizer and its settings.
    """
    return {
        "view": [
            [name, list(tensor.shape), str(tensor.dtype)] for name, tensor in view.tensors.items()
        ],
        "groups": [group.as_list() for group in view.groups],
        "noise": view.noise.name,
        "fingerprint": view.fingerprint(),
        "initial": view.hash(),
        "base": view.base_hash(),
        "seeds": [NAME, seed],
        "versions": _versions(),
        **({"at_rest": sorted(view.at_rest)} if view.at_rest else {}),
        **more,
    }


def _versions() -> dict[str, str]:
    """Of Python and of the libraries at work that are installed as packages."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        if name in sys.modules:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return versions


def check_origin(view: ParameterView, header: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a trajectory that was made on another frozen base, where both are known.

    Raises:
        TrajectoryError: Says how to go on all the same.
    """
    begun = header.get("base")
    if begun is not None and not view.has_base(begun):
        raise TrajectoryError(
            f"{path} was made on another base model, or with adapters scaled otherwise "
            f"(lora_alpha; frozen weights {begun[:12]}..., not these): the same steps "
            "mean something else there; load the base that it was made on, or replay with "
            "check_base=False"
        )


def check_header(
    view: ParameterView, header: Mapping[str, Any], path: str | Path, *, check_base: bool = True
) -> None:
    """Refuse a trajectory of another view, noise or base checkpoint.

    The view must be at the weights that the trajectory starts from; it takes the file's noise where
    nobody has chosen its own.

    Args:
        view: The view.
        header: The file's.
        path: For the message.
        check_base: Compare the frozen weights as well.

    Raises:
        TrajectoryError: Says what differs.
    """
    view.follow_noise(header["noise"])
    if header["noise"] != view.noise.name:
        raise TrajectoryError(
            f"{path} was made with noise {header['noise']!r}, the view has {view.noise.name!r}; "
            "give the view that noise"
        )
    theirs = {name: (tuple(shape), dtype) for name, shape, dtype in header["view"]}
    ours = {name: (tuple(t.shape), str(t.dtype)) for name, t in view.tensors.items()}
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            raise TrajectoryError(
                f"{path} belongs to another view: {name!r} is {theirs.get(name)} there and "
                f"{ours.get(name)} here"
            )
    if header["fingerprint"] != view.fingerprint():
        raise TrajectoryError(f"{path} was made with other groups: {header['groups']}")
    if header["initial"] != view.hash():
        raise TrajectoryError(
            f"{path} starts from other weights (sha256 {header['initial'][:12]}..., here "
            f"{view.hash()[:12]}...); load the base checkpoint, and draw the adapter from the same "
            "seed as then"
        )
    if check_base:
        check_origin(view, header, path)


LARGEST_COUNT = 2**63
"""Scalars of a tensor: more than any has."""

LARGEST_DECAY = 2.0
"""1 - lr * rate, where a run refuses lr * rate >= 1; above 1 the rate is negative."""


def check_header_form(header: Any, path: str | Path) -> None:
    """Refuse a header without the entries that a replay reads, or with others in their place."""
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
