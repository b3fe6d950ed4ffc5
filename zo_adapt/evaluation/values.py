"""What objectives return: brought over from a GPU at once, and checked."""

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import NonFiniteObjectiveError, ObjectiveError


class RowsOf(NamedTuple):
    """Some rows of what the objective returned for several probes at once."""

    values: Tensor
    rows: slice


def on_host(returned: Sequence[Any]) -> list[Any]:
    """The same, tensors of a GPU brought over in one transfer: each one waits for the GPU."""
    found = {id(tensor): tensor for tensor in _tensors(returned)}
    here: dict[int, np.ndarray] = {}
    for device in {tensor.device for tensor in found.values() if tensor.is_cuda}:
        there = [t for t in found.values() if t.device == device and not t.requires_grad]
        here |= _brought(there) if there else {}
    return [_read(value, here) for value in returned]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        tensor = value.values if isinstance(value, RowsOf) else value
        if isinstance(tensor, Tensor):
            yield tensor


def _brought(there: list[Tensor]) -> dict[int, np.ndarray]:
    """Tensors of one GPU in one transfer, by their identity."""
    flat = torch.cat([tensor.flatten().to(torch.float64) for tensor in there]).cpu().numpy()
    ends = accumulate((tensor.numel() for tensor in there), initial=0)
    return {
        id(tensor): flat[start : start + tensor.numel()].reshape(tensor.shape)
        for tensor, start in zip(there, ends, strict=False)
    }


def _read(value: Any, here: Mapping[int, np.ndarray]) -> Any:
    if isinstance(value, RowsOf):
        return here.get(id(value.values), value.values)[value.rows]
    return here.get(id(value), value)


def checked_values(returned: Any, rows: int, *, finite: bool = True) -> np.ndarray:
    """What the objective returned, as float64 of shape () or (rows,).

    Args:
        returned: By a call.
        rows: Of its batch.
        finite: Whether NaN and infinity are errors.

    Raises:
        ObjectiveError: It requires grad, has another shape, or is not a number.
        NonFiniteObjectiveError: NaN or infinity.
    """
    usual = type(returned) is np.ndarray and returned.dtype == np.float64
    # A sum is finite only where all of its parts are.
    if usual and returned.shape == (rows,) and math.isfinite(returned.sum()):
        checked: np.ndarray = returned
        return checked
    values = as_float64(returned, "the objective returned", "return a float or one per example")
    if values.shape not in ((), (1,), (rows,)):
        raise ObjectiveError(
            f"the objective returned shape {values.shape} for {rows} examples; return a float "
            f"or shape ({rows},)"
        )
    if finite and not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(values)))
        raise NonFiniteObjectiveError(
            f"the objective returned {np.atleast_1d(values)[bad[0]]} for {len(bad)} of "
            f"{values.size} values; a smaller lr or perturbation_scale keeps it finite"
        )
    return values if values.shape == (rows,) else values.reshape(())


def as_float64(given: Any, said: str, way_out: str) -> np.ndarray:
    """Numbers of any kind as float64, and nothing that only looks like them.

    Args:
        given: A number, a tensor, an array, or a list of these.
        said: How an error begins.
        way_out: How it ends.

    Raises:
        ObjectiveError: Text, dates, complex or masked numbers, a sparse tensor or one that requires
            grad, a number beyond float64, anything without a value.

    Example:
        >>> as_float64([1, True], "got", "give numbers")
        array([1., 1.])
    """
    if given is None:
        raise ObjectiveError(f"{said} NoneType; {way_out} (is the return statement missing?)")
    if isinstance(given, Tensor):
        return _of_tensor(given, said, way_out)
    if isinstance(given, np.ma.MaskedArray):
        if np.ma.is_masked(given):
            raise ObjectiveError(f"{said} masked entries, which have no value; {way_out}")
        given = given.data
    try:
        array = np.asarray(given)
        if array.dtype.kind == "O":
            flat = [_of_object(value, said, way_out) for value in array.ravel()]
            return np.array(flat, np.float64).reshape(array.shape)
        if array.dtype.kind not in "biuf":
            raise TypeError(array.dtype)
        return array.astype(np.float64)
    except OverflowError as error:
        raise ObjectiveError(f"{said} a number beyond float64; {way_out}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{given!r:.40}, a {type(given).__name__}"
        raise ObjectiveError(f"{said} {what}; {way_out}") from error


def _of_object(value: Any, said: str, way_out: str) -> float:
    """One entry of an array of objects: a number of another library, or a tensor."""
    if isinstance(value, Tensor | np.generic | np.ndarray):
        return float(as_float64(value, said, way_out).item())
    # Decimal is a number that is neither real nor complex to Python.
    if not isinstance(value, numbers.Real | Decimal):
        raise TypeError(type(value))
    return float(value)


def _of_tensor(tensor: Tensor, said: str, way_out: str) -> np.ndarray:
    if tensor.requires_grad:
        raise ObjectiveError(
            f"{said} a tensor that requires grad: it was computed outside no_grad, which costs "
            "memory; remove enable_grad(), or return .detach()"
        )
    odd = {
        "sparse": tensor.layout is not torch.strided,
        "nested": tensor.is_nested,
        "meta": tensor.is_meta,
        "complex": tensor.is_complex(),
        "quantized": tensor.is_quantized,
    }
    if kinds := [name for name, is_so in odd.items() if is_so]:
        raise ObjectiveError(f"{said} a {kinds[0]} tensor; {way_out}")
    values: np.ndarray = tensor.to("cpu", torch.float64).numpy()
    return values
