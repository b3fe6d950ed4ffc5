"""The classes of examples, where the data say which they have."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def class_labels(data: Any) -> list[int] | None:
    """The class of every example where the data say so: an integer field ``labels`` or ``label``.

    Only columns and examples in memory are read; anything else, or a field that is not one integer
    an example, gives None.
    """
    for field in ("labels", "label"):
        column = _column(data, field)
        if column is None:
            continue
        if isinstance(column, Tensor | np.ndarray):
            column = column.tolist()
        values: list[Any] = [
            c.item() if isinstance(c, Tensor | np.generic) and c.ndim == 0 else c for c in column
        ]
        if all(isinstance(value, int) for value in values) and 1 < len(set(values)) < len(values):
            return values
    return None


def _column(data: Any, field: str) -> Any:
    if isinstance(data, Mapping):
        return data.get(field)
    if hasattr(data, "column_names"):
        return data[field][:] if field in data.column_names else None
    if isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        return [row[field] for row in data] if all(field in row for row in data) else None
    return None
