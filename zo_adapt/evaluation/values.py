"""What objectives return: brought over from a GPU at once, and checked."""

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import NonFiniteObjectiveError, ObjectiveError


class Returned(NamedTuple):
    """What the objective returned for the parts of one probe, and their numbers of rows."""

    values: list[Any]
    sizes: list[int]


class RowsOf(NamedTuple):
    """Some rows of what the objective returned for several probes at once."""

    values: Tensor
    rows: slice


def on_host(answers: list[Returned]) -> list[Returned]:
    """The same, tensors of a GPU brought over in one transfer: each one waits for the GPU."""
    found = {id(tensor): tensor for answer in answers for tensor in _tensors(answer.values)}
    here: dict[int, np.ndarray] = {}
    for device in {tensor.device for tensor in found.values() if tensor.is_cuda}:
        there = [t for t in found.values() if t.device == device and not t.requires_grad]
        here |= _brought(there) if there else {}
    return [
        Returned([_read(value, here) for value in answer.values], answer.sizes)
        for answer in answers
    ]


def _tensors(values: list[Any]) -> Iterator[Tensor]:
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


def _numbers_of(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers on the host."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else str(tensor.layout)
        raise ObjectiveError(
            f"the objective returned a tensor without plain numbers ({kind}, {tensor.dtype}); "
            "return a dense tensor"
        )
    if tensor.is_complex():
        raise ObjectiveError(f"the objective returned complex numbers ({tensor.dtype})")
    numbers: np.ndarray = tensor.to("cpu", torch.float64).numpy()
    return numbers


def as_numbers(returned: Any) -> np.ndarray:
    """Whatever numbers a function returned, as float64; text, dates and gaps are none.

    Raises:
        ObjectiveError: Something that is no real number, or one beyond any float.
    """
    try:
        given = returned if isinstance(returned, np.ndarray) else np.asarray(returned)
        if given.dtype.kind == "O":  # Python's large integers, decimals, fractions, tensors
            given = np.array([_number(value) for value in given.flat]).reshape(given.shape)
        if given.dtype.kind not in "biuf":
            raise TypeError(f"values of type {given.dtype}")
        if isinstance(returned, np.ma.MaskedArray) and np.ma.getmaskarray(returned).any():
            raise TypeError("a masked array with gaps")
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ObjectiveError(
            f"the objective returned {type(returned).__name__} ({error}); return a float or one "
            "per example"
        ) from error


def _number(value: Any) -> float:
    if value is None or isinstance(value, str | bytes | complex):
        raise TypeError(f"{value!r:.40} is no real number")
    return float(value)


def checked_values(returned: Any, rows: int) -> np.ndarray:
    """What the objective returned, as float64 of shape () or (rows,).

    Raises:
        ObjectiveError: It requires grad, has another shape, or is not a number.
        NonFiniteObjectiveError: NaN or infinity.
    """
    usual = type(returned) is np.ndarray and returned.dtype == np.float64
    # A sum is finite only where all of its parts are.
    if usual and returned.shape == (rows,) and math.isfinite(returned.sum()):
        checked: np.ndarray = returned
        return checked
    if returned is None:
        raise ObjectiveError(
            "the objective returned NoneType; return a float or one per example (is the return "
            "statement missing?)"
        )
    if isinstance(returned, Tensor):
        if returned.requires_grad:
            raise ObjectiveError(
                "the objective returned a tensor that requires grad: it was computed outside "
                "no_grad, which costs memory; remove enable_grad(), or return .detach()"
            )
        returned = _numbers_of(returned)
    values = as_numbers(returned)
    if values.shape not in ((), (1,), (rows,)):
        raise ObjectiveError(
            f"the objective returned shape {values.shape} for {rows} examples; return a float "
            f"or shape ({rows},)"
        )
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(values)))
        raise NonFiniteObjectiveError(
            f"the objective returned {np.atleast_1d(values)[bad[0]]} for {len(bad)} of "
            f"{values.size} values; a smaller lr or perturbation_scale keeps it finite"
        )
    return values if values.shape == (rows,) else values.reshape(())
