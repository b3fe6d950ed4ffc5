"""The classes of examples, where the data say which they have."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

FIELDS = ("labels", "label", "label_ids")
"""Names that labels go by, the first one found is meant."""


def class_labels(data: Any) -> list[int] | None:
    """The class of every example, to stratify by: one integer each, and several of a class.

    Only columns and examples in memory are read; anything else gives None.
    """
    labels = integer_labels(data)
    return labels if labels is not None and 1 < len(set(labels)) < len(labels) else None


def integer_labels(data: Any) -> list[int] | None:
    """The label of every example where the data hold one integer for each; else None."""
    for field in FIELDS:
        column = _column(data, field)
        if column is None:
            continue
        if isinstance(column, Tensor | np.ndarray):
            column = column.tolist()
        values: list[Any] = [
            c.item() if isinstance(c, Tensor | np.generic) and c.ndim == 0 else c for c in column
        ]
        if values and all(isinstance(value, int) for value in values):
            return values
    return None


def _column(data: Any, field: str) -> Any:
    if isinstance(data, Mapping):
        return data.get(field)
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a DataFrame
        return data[field].tolist() if field in data.columns else None
    if hasattr(data, "column_names"):
        if field not in (data.column_names or ()) or not hasattr(data, "__len__"):
            return None  # a stream can be read once
        # As it is stored: a transform would decode every image for the sake of its label.
        return data.with_format(None)[field][:]
    if isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        return [row[field] for row in data] if all(field in row for row in data) else None
    return None
