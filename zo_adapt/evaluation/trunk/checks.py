"""Whether a model whose frozen layers were not run has computed the same."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_adapt.evaluation.trunk.calls import Call

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2}
COARSE = 5e-2
"""bf16, autocast, quantised weights: what another composition of a batch may do to a value."""
TF32 = 1e-3


def tolerance_of(weights: Iterable[Tensor]) -> float:
    """What rounding alone may do to a value, relative to the largest."""
    weights = list(weights)
    devices = {tensor.device.type for tensor in weights}
    if any(torch.is_autocast_enabled(device) for device in devices):
        return COARSE
    dtypes = {t.dtype for t in weights if t.is_floating_point() or t.numel() > 1 << 16}
    tolerance = max((TOLERANCE.get(dtype, COARSE) for dtype in dtypes), default=COARSE)
    exact = devices == {"cpu"} or torch.get_float32_matmul_precision() == "highest"
    return tolerance if exact else max(tolerance, TF32)


def alike(served: Sequence[Call], plain: Sequence[Call], tolerance: float) -> bool:
    """Whether the tuned layers were given the same, call by call."""
    if len(served) != len(plain):
        return False
    pairs = [(a, b) for a, b in zip(served, plain, strict=True) if a.served and a.watched]
    return all(
        _same_states(a, b, tolerance) and close(a.inputs, b.inputs, tolerance) for a, b in pairs
    )


def close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two nested values are equal up to rounding; of unknown objects, the type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return False
        if not (one.is_floating_point() or one.is_complex()):
            return torch.equal(one, other)
        return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        same = list(one) == list(other)
        return same and all(close(one[name], other[name], tolerance) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        same = len(one) == len(other)
        return same and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray | np.number | float) and np.shape(one) == np.shape(other):
        return np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    if one is None or isinstance(one, bool | int | str):
        return type(one) is type(other) and one == other
    return type(one) is type(other)


def _same_states(one: Call, other: Call, tolerance: float) -> bool:
    a, b = one.entering, other.entering
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or one.rows is None:
        return False
    counted = torch.zeros(a.shape[:2], dtype=torch.bool)
    for row in range(len(a)):
        start, stop = one.rows.span(row, a.shape[1])
        counted[row, start:stop] = True
    a, b = (hidden[counted.to(hidden.device)].double() for hidden in (a, b))
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
