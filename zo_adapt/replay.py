"""Replay: the weights of any step from the trajectory alone, with no forward pass and no data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_adapt.errors import TrajectoryError
from zo_adapt.term import Term, Update
from zo_adapt.trajectory import Position, Reader
from zo_adapt.view import ParameterView

BATCH = 4096
"""Steps that are brought onto the weights in one pass."""


def header_of(view: ParameterView, **more: Any) -> dict[str, Any]:
    """What a trajectory says of itself.

    Args:
        view: The view, at the weights that the trajectory starts from.
        more: Further entries: the optimizer, its settings, the seed.
    """
    return {
        "view": [
            [name, list(tensor.shape), str(tensor.dtype)] for name, tensor in view.tensors.items()
        ],
        "groups": [list(group) for group in view.groups],
        "noise": view.noise.name,
        "fingerprint": view.fingerprint(),
        "initial": view.hash(),
        "torch": torch.__version__,
        **more,
    }


def check_header(view: ParameterView, header: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a trajectory of another view, noise or base checkpoint.

    The view must be at the weights that the trajectory starts from.

    Raises:
        TrajectoryError: Says what differs.
    """
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


def replay(view: ParameterView, path: str | Path, until: int | None = None) -> int:
    """Bring a view from the trajectory's initial weights to those of a step.

    theta_t = decay_t theta_{t-1} + sum_k c_k z(s_k), record by record, in the order and with the
    rounding of the run itself: bit-identical on the same kind of device.

    Args:
        view: At the weights that the trajectory starts from.
        path: The file.
        until: Number of the last step; 0 is the start, None the end.

    Returns:
        The number of the last step.

    Raises:
        TrajectoryError: Another view, noise or start, or the file has fewer steps; nothing changes.
        CorruptTrajectoryError: A damaged record; nothing is applied.

    Example:
        >>> import tempfile, torch
        >>> from zo_adapt import MeZO, ParameterView, minimize, replay
        >>> path = tempfile.mkdtemp() + "/run.zot"
        >>> x = torch.zeros(2)
        >>> view = ParameterView({"x": x})
        >>> result = minimize(lambda batch: float(x.square().sum()), view, None, MeZO(lr=0.1),
        ...     max_steps=9, trajectory=path, progress=False)
        >>> y = torch.zeros(2)
        >>> replay(ParameterView({"x": y}), path), torch.equal(x, y)
        (9, True)
    """
    reader = Reader(path)
    check_header(view, reader.header, path)
    # All is read and verified before the first weight changes.
    updates = [step.update for step, _ in _until(reader, until)]
    for start in range(0, len(updates), BATCH):
        apply_all(view, updates[start : start + BATCH])
    return len(updates)


def _until(reader: Reader, until: int | None) -> list[tuple[Any, Position]]:
    if until is not None and until < 0:
        raise TrajectoryError(f"until={until}; choose a step >= 0")
    steps = []
    if until != 0:
        for step, position in reader.steps():
            steps.append((step, position))
            if step.step == until:
                break
    if until is not None and len(steps) < until:
        raise TrajectoryError(
            f"{reader.path} has {len(steps)} steps, not {until}; choose 0..{len(steps)}"
        )
    return steps


def apply_all(view: ParameterView, updates: Sequence[Update]) -> None:
    """Apply updates one after the other, many in one pass where that gives the same bits.

    In fp32 and fp64 a weight is a running sum, so consecutive updates without decay are one list of
    terms; in half precision every step rounds.
    """
    wide = all(t.dtype in (torch.float32, torch.float64) for t in view.tensors.values())
    run: list[Term] = []
    for update in updates:
        if wide and update.decay == 1.0:
            run += update.terms
            continue
        view.apply_in_order(run)
        run = []
        view.apply_in_order(update.terms, update.decay)
    view.apply_in_order(run)


def export(view: ParameterView) -> dict[str, Tensor]:
    """The view's tensors as contiguous copies, ready for a safetensors file."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in view.tensors.items()}
