"""Data: examples, how they become a batch, and what they say of themselves without being made.

Columns are read as they are stored; the classes among them are spread over the batches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Subset, TensorDataset

from zo_adapt.data.forms import Collate, Columns, rows_given
from zo_adapt.data.sources import Source, as_source
from zo_adapt.errors import ArgumentTypeError, DataError


@dataclass(frozen=True, eq=False)
class Data:
    """Examples with what is to be known of them, accepted wherever data are.

    Args:
        examples: None (the objective is called with None); a tensor, an array, or a tuple (x, y)
            or mapping of them, with one row an example; or a sequence of examples (a list, a torch
            or a Hugging Face dataset). A table (pandas, polars, pyarrow), lists by name and an
            array of objects become a sequence of examples; of a DataLoader its dataset and collate
            function are used, not its order.
        collate: Makes a batch of a list of examples; None: the objective's own ``collate`` or, if
            it has none, torch's default.
        stratify: Spread the classes evenly over every pass, where the examples have one integer
            each as ``labels`` or ``label``, or as the second of (x, y).

    Raises:
        ArgumentTypeError: A collate function that cannot be called, or data within data.
        DataError: Examples that cannot be rows of a batch.

    Example:
        >>> data = Data([1, 2, 3], collate=sum)
        >>> data.source().take([0, 2])
        4
    """

    examples: Any = field(default=None, repr=False)
    collate: Collate | None = None
    stratify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.examples, Data):
            raise ArgumentTypeError("examples is a Data already; use dataclasses.replace on it")
        if self.collate is not None and not callable(self.collate):
            raise ArgumentTypeError(
                f"collate is a {type(self.collate).__name__}; give a function of a list of examples"
            )
        examples, collate = rows_given(self.examples, self.collate)
        object.__setattr__(self, "examples", examples)
        object.__setattr__(self, "collate", collate)
        as_source(examples)

    def source(self, own: Collate | None = None) -> Source:
        """What batches are rows of.

        Args:
            own: The objective's collate function, for data that bring none.
        """
        return as_source(self.examples, self.collate or own)

    def classes(self) -> list[int] | None:
        """The class of every example where passes are to be stratified, or None."""
        return class_labels(self.examples) if self.stratify else None


def as_data(data: Any) -> Data:
    """The data as they are if they are a ``Data``, else as examples of one."""
    return data if isinstance(data, Data) else Data(data)


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


IGNORED = -100
"""Label of a token that no loss counts."""
FIELDS = ("labels", "label", "label_ids")
"""Names that labels go by, the first one found is meant."""


def class_labels(data: Any) -> list[int] | None:
    """The class of every example, to stratify by: one integer each, and several of a class.

    Only columns and examples in memory are read; anything else gives None.
    """
    labels = next(filter(None, map(_integers, _columns(data))), None)
    return labels if labels is not None and 1 < len(set(labels)) < len(labels) else None


def labels_to_check(data: Any) -> Tensor | None:
    """All labels where the data hold integers: one for each example, (n,), or a list of them.

    Lists make (n, t), the shorter filled up with -100, as those of the tokens of texts are. None
    where the labels are something else, or would have to be made first.

    Raises:
        DataError: Some examples have a label and one has none, or text.
    """
    if is_transformed(data):
        return None
    for column in _columns(data):
        if labels := _integers(column):
            return torch.tensor(labels)
        if rows := _integer_rows(column):
            return pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        _refuse_missing(column)
    return None


def _integer_rows(column: Sequence[Any]) -> list[Tensor] | None:
    """A list of integers for every example; None where it is something else for one of them."""
    rows: list[Tensor] = []
    for value in column:
        if not isinstance(value, list | tuple | Tensor | np.ndarray) or len(value) == 0:
            return None
        try:
            row = torch.as_tensor(value)
        except (TypeError, ValueError):
            return None
        if row.dim() != 1 or row.is_floating_point() or row.is_complex():
            return None
        rows.append(row.long())
    return rows


def _integers(column: Sequence[Any]) -> list[int] | None:
    return list(column) if column and all(isinstance(value, int) for value in column) else None


def _refuse_missing(column: Sequence[Any]) -> None:
    """Refuse a column in which most are numbers: the first other one would end a run midway."""
    missing = [not isinstance(v, int | float) or math.isnan(v) for v in column]
    others = [index for index, is_missing in enumerate(missing) if is_missing]
    # A list is a label of several parts, and has its own checks.
    if len(others) in (0, len(column)) or isinstance(column[others[0]], list | tuple | Tensor):
        return
    raise DataError(
        f"the label of example {others[0]} is {column[others[0]]!r:.80}, that of others a number "
        f"({len(others)} of {len(column)} are none); give integers 0..C-1, or leave these out"
    )


def _columns(data: Any) -> list[list[Any]]:
    """What the labels may be, as Python's own numbers, in the order of ``FIELDS``."""
    found = [column for column in map(_as_list, _stored(data)) if column is not None]
    return [[_number(value) for value in column] for column in found]


def _stored(data: Any) -> list[Any]:
    """Columns of labels, as they are stored."""
    named = [stored_column(data, field) for field in FIELDS]
    if any(column is not None for column in named):
        return [column for column in named if column is not None]
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Subset):
        columns = filter(None, map(_as_list, _stored(data.dataset)))
        return [[column[row] for row in data.indices] for column in columns]
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor | np.ndarray):
        return [data[1]]  # (x, y)
    if isinstance(data, list | tuple) and all(isinstance(r, tuple) and len(r) == 2 for r in data):
        return [[row[1] for row in data]]
    return []


def _as_list(column: Any) -> list[Any] | None:
    """One entry an example; None where it has several, or is no column."""
    if isinstance(column, Tensor | np.ndarray):
        return column.tolist() if column.ndim == 1 else None
    return list(column) if isinstance(column, Sequence) and not isinstance(column, str) else None


def _number(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return value
