"""What a trajectory says of itself, and whether it belongs to a view."""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from zo_adapt.errors import TrajectoryError
from zo_adapt.noise.entries import NAME
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
