"""Columns of examples, where they can be had without making the examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Subset

from zo_adapt.data.forms import Columns


def stored_column(data: Any, name: str) -> Sequence[Any] | None:
    """One entry an example, as it is stored; None where there is none, or rows must be made first.

    Args:
        data: Examples in any form; those in memory and in files of a Hugging Face dataset are read.
        name: Of the field.

    Example:
        >>> stored_column([{"x": 1}, {"x": 2}], "x"), stored_column([{"x": 1}, {}], "x")
        ([1, 2], None)
    """
    if isinstance(data, Columns):
        data = data.columns
    if hasattr(data, "iloc"):  # a DataFrame, as Trainer may hold one
        data = {field: data[field].tolist() for field in data.columns if field == name}
    if isinstance(data, Mapping):
        return data.get(name)
    if isinstance(data, Subset):
        column = stored_column(data.dataset, name)
        return None if column is None else [column[row] for row in data.indices]
    if hasattr(data, "column_names"):
        # As it is stored: a transform would decode every image for the sake of its label. A stream
        # can be read once.
        names = (data.column_names or ()) if hasattr(data, "__len__") else ()
        return data.with_format(None)[name][:] if name in names else None
    if isinstance(data, list | tuple) and data and all(isinstance(row, Mapping) for row in data):
        return [row[name] for row in data] if all(name in row for row in data) else None
    return None


def is_transformed(data: Any) -> bool:
    """Whether the examples are made of what is stored, by a transform of the user's own."""
    while isinstance(data, Subset):
        data = data.dataset
    return bool(getattr(data, "format", None)) and data.format.get("type") == "custom"
