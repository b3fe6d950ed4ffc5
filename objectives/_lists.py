"""A list is a list: what only looks like one is refused."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_list(value: Any) -> list[Any] | None:
    """The items of a list, tuple, one-dimensional array, tensor or column; None for all else.

    Text, mappings and sets have items too, which nobody means: letters, keys, in no order.

    Example:
        >>> as_list((1.0, None)), as_list({0: 5.0}), as_list("12")
        ([1.0, None], None, None)
    """
    if isinstance(value, str | bytes | bytearray):
        return None
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta):
        return None
    if isinstance(value, Tensor | np.ndarray) or type(value).__module__.startswith("pandas."):
        return value.tolist() if getattr(value, "ndim", 0) == 1 else None
    return None


def as_number(value: Any) -> float | None:
    """A real number as float; None for text, complex numbers and all else."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) else None
