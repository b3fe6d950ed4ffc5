"""The forms that data come in, brought to three: none, columns of tensors, a list of examples.

A table, a loader, arrays of objects and lists by name become what they stand for; what has no rows
of its own (a stream, several splits, text) is refused with the way out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from zo_adapt.errors import DataError

Collate = Callable[[list[Any]], Any]
_TABLES = {"pandas": "to_dict", "polars": "to_dicts", "pyarrow": "to_pylist"}
"""How a table of a library gives its rows."""
_OF_TORCH = (torch.utils.data.default_collate, torch.utils.data.default_convert)


class Columns(Sequence[dict[str, Any]]):
    """Lists of equal length by name, as examples: one dictionary a row.

    Raises:
        DataError: Their lengths differ.

    Example:
        >>> Columns({"x": [1, 2], "text": ["a", "b"]})[1]
        {'x': 2, 'text': 'b'}
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"the columns have {lengths} rows; all must have the same number")
        self.columns, self._length = columns, next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: Any) -> Any:
        return {name: column[row] for name, column in self.columns.items()}


def rows_given(examples: Any, collate: Collate | None) -> tuple[Any, Collate | None]:
    """Examples of any form as columns of tensors or a list, with the collate function they bring.

    Args:
        examples: As ``Data`` takes them.
        collate: The caller's own, which comes before that of a DataLoader.

    Raises:
        DataError: They have no rows; the message says what to give.

    Example:
        >>> rows_given({"x": [1, 2]}, None)[0][1]
        {'x': 2}
    """
    if isinstance(examples, DataLoader):
        return _of_loader(examples, collate)
    if isinstance(examples, Columns):
        return examples, collate
    if is_table(examples):
        return _of_table(examples), collate
    if isinstance(examples, Mapping):
        return _of_mapping(examples), collate
    if isinstance(examples, tuple):
        return _of_tuple(examples), collate
    return _of_single(_as_column(examples)), collate


def is_table(value: Any) -> bool:
    """Whether it is a table of pandas, polars or pyarrow."""
    return _library(value) in _TABLES and hasattr(value, "columns")


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def is_column(value: Any) -> bool:
    """Whether rows can be taken of it by an index of several."""
    return isinstance(value, Tensor | np.ndarray)


def named_sets(data: Any) -> dict[str, Any] | None:
    """Several sets of data by name, as a DatasetDict is; None for a single one.

    Example:
        >>> sorted(named_sets({"a": [{"x": 1}], "b": [{"x": 2}, {"x": 3}]}))
        ['a', 'b']
        >>> named_sets({"x": [1, 2]})
    """
    if isinstance(data, Mapping) and data and all(map(_is_set, data.values())):
        return dict(data)
    return None


def _is_set(value: Any) -> bool:
    """Whether it has columns or examples of its own, as a column of one set has not."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], Mapping | tuple)
    # A set of this package (Data), a table, a Hugging Face or torch dataset, columns by name.
    marks = ("examples", "columns", "column_names")
    if isinstance(value, tuple):
        return any(map(is_column, value))
    is_dataset = isinstance(value, Mapping | DataLoader | torch.utils.data.Dataset)
    return is_dataset or any(hasattr(value, mark) for mark in marks)


def _of_loader(loader: "DataLoader[Any]", collate: Collate | None) -> tuple[Any, Collate | None]:
    """The loader's examples and collate function; its order is not its own to choose here."""
    own = None if loader.collate_fn in _OF_TORCH else loader.collate_fn
    found = rows_given(loader.dataset, collate or own)
    sampler, batches = loader.sampler, loader.batch_sampler
    every_row_once = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if not every_row_once or type(batches) not in (BatchSampler, type(None)):
        kind = type(batches if every_row_once else sampler).__name__
        raise DataError(
            f"data is a DataLoader with a {kind}, which chooses rows; here a pass has every row "
            "once, in an order that the seed gives: give Data(loader.dataset, "
            "collate=loader.collate_fn), with rows repeated or left out as they should be"
        )
    return found


def _of_table(table: Any) -> list[Any]:
    """The rows of a table, as dictionaries of Python's own numbers."""
    library = _library(table)
    if library == "pandas" and not table.columns.is_unique:
        twice = sorted(set(table.columns[table.columns.duplicated()]))
        raise DataError(f"the columns {twice} of the table are there twice; rename them")
    how = ("records",) if library == "pandas" else ()
    rows: list[Any] = getattr(table, _TABLES[library])(*how)
    return rows


def _of_mapping(named: Mapping[str, Any]) -> Any:
    """Columns of tensors, or of lists; a DatasetDict is neither."""
    if not named:
        raise DataError("data is an empty mapping; give columns of rows by name")
    if sets := named_sets(named):
        names = sorted(map(str, sets))
        raise DataError(
            f"data is a {type(named).__name__} of the data sets {names}; choose one, as "
            f"data[{names[0]!r}]"
        )
    columns = {name: _as_column(value) for name, value in named.items()}
    if all(map(is_column, columns.values())):
        return columns
    odd = {
        name: type(value).__name__
        for name, value in columns.items()
        if not (is_column(value) or isinstance(value, list | tuple))
    }
    if odd:
        raise DataError(
            f"data is a mapping with {odd}, which are no columns; give lists, tensors or arrays of "
            "equal length"
        )
    return Columns(columns)


def _of_tuple(parts: tuple[Any, ...]) -> Any:
    """Columns, such as (x, y), where one part looks like one; else examples."""
    columns = tuple(map(_as_column, parts))
    length = next((len(part) for part in columns if is_column(part) and part.ndim), None)
    if length is None:
        return columns if all(map(is_column, columns)) else parts
    columns = tuple(
        np.asarray(part) if isinstance(part, list) and len(part) == length else part
        for part in columns
    )
    if not all(map(is_column, columns)):
        kinds = [type(part).__name__ for part in parts]
        raise DataError(
            f"data is a tuple of {kinds}; give tensors or arrays of equal length, as (x, y), or a "
            "list of examples"
        )
    return columns


def _of_single(data: Any) -> Any:
    """Data that are no columns by name: a tensor, an array, or a sequence of examples."""
    if isinstance(data, np.ndarray) and data.dtype.names:
        return {name: _as_column(data[name]) for name in data.dtype.names}
    if isinstance(data, np.ndarray) and data.ndim and data.dtype.kind in "OUST":
        return data.tolist()  # each an example of its own, for a collate function
    if data is None or is_column(data):
        return data
    # A module may have a length (nn.Sequential), and text has one: neither is a list of examples.
    if isinstance(data, str | bytes | torch.nn.Module):
        raise DataError(f"data is a {type(data).__name__}; give a sequence of examples or tensors")
    if isinstance(data, set | frozenset):
        raise DataError("data is a set, which has no order; give a list, as sorted(data)")
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return data
    is_stream = isinstance(data, Iterable)
    way_out = "make a list of it, as list(data)" if is_stream else "give a sequence or tensors"
    raise DataError(f"data of type {type(data).__name__} has no length; {way_out}")


def _as_column(value: Any) -> Any:
    """An array of a table's column or a matrix; anything else as it is.

    Raises:
        DataError: Rows of it cannot be read: it is sparse, masked, or has no values.
    """
    library = _library(value)
    if isinstance(value, Tensor):
        _check_tensor(value)
    elif library == "scipy":
        raise DataError(f"data is a {type(value).__name__} of scipy; give it dense, .toarray()")
    elif isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise DataError("data is an array with masked entries; give .filled(...), or leave out")
        value = value.data
    elif library in _TABLES and hasattr(value, "to_numpy"):
        value = value.to_numpy()
        if value.ndim > 1 and value.dtype.kind == "O":
            raise DataError("a table beside other columns must hold numbers; choose its columns")
    return value


def _check_tensor(tensor: Tensor) -> None:
    if tensor.is_meta:
        raise DataError("data is a tensor on the meta device, which has no values; give a real one")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise DataError(f"data is a {kind} tensor, of which rows cannot be taken; give .to_dense()")
