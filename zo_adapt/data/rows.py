"""Rows of whatever a collate function or an objective returns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from zo_adapt.noise.sums import sendable

FLOATS_OF_A_TOKEN = 768
"""How many floats of a row count as one token: 16 x 16 pixels in colours, or an embedding."""


class NoRowsError(Exception):
    """Something has not one entry for every row, so that its rows cannot be selected."""


@runtime_checkable
class OwnRows(Protocol):
    """A batch of a class of its own that knows its rows."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int:
        """Tokens of a row."""

    def select_rows(self, rows: Sequence[int]) -> Self:
        """A batch of some of the rows, some of them perhaps several times."""


_WITH_WIDTH = (Tensor, np.ndarray, OwnRows)


class RowIndex:
    """Takes rows of tensors and arrays; on a GPU it is copied there once, without waiting.

    Args:
        rows: Their numbers.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = list(rows)
        self._on: dict[torch.device, Tensor] = {}

    def of(self, values: Any) -> Any:
        """The rows of a tensor or an array."""
        if not (isinstance(values, Tensor) and values.is_cuda):
            return values[self._rows]
        device = values.device
        if device not in self._on:
            rows = sendable(np.array(self._rows, np.int64), device)
            self._on[device] = rows.to(device, non_blocking=True)
        return values.index_select(0, self._on[device])


def select_rows(tree: Any, index: Sequence[int] | slice, rows: int) -> Any:
    """The same structure with some of its rows only.

    Args:
        tree: Tensors, arrays and lists with one entry a row; ``OwnRows``; tuples, lists, mappings
            of them.
        index: Which rows.
        rows: How many there are.

    Raises:
        NoRowsError: A part has not one entry a row, or that is not known.

    Example:
        >>> select_rows({"x": torch.arange(3), "text": ["a", "b", "c"]}, [2, 2], 3)
        {'x': tensor([2, 2]), 'text': ['c', 'c']}
    """
    return _Selector(index, rows)(tree)


class _Selector:
    """``select_rows``, remembering: what is one object stays one object."""

    def __init__(self, index: Sequence[int] | slice, rows: int) -> None:
        self.index, self.rows = index, rows
        self._each = None if isinstance(index, slice) else RowIndex(index)
        self._done: dict[int, Any] = {}

    def __call__(self, tree: Any) -> Any:
        if id(tree) not in self._done:
            self._done[id(tree)] = self._selected(tree)
        return self._done[id(tree)]

    def _selected(self, tree: Any) -> Any:
        if isinstance(tree, Tensor | np.ndarray):
            if tree.ndim == 0 or len(tree) != self.rows:
                raise NoRowsError(f"shape {tuple(tree.shape)} for {self.rows} rows")
            return tree[self.index] if self._each is None else self._each.of(tree)
        if isinstance(tree, OwnRows):
            if len(tree) != self.rows:
                raise NoRowsError(f"{type(tree).__name__} of {len(tree)} for {self.rows} rows")
            index = self.index
            whole = range(self.rows)
            return tree.select_rows(whole[index] if isinstance(index, slice) else index)
        if isinstance(tree, Mapping):
            named = {name: self(value) for name, value in tree.items()}
            return named if type(tree) is dict else _rebuilt(lambda: type(tree)(named))  # type: ignore[call-arg]
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return type(tree)(*map(self, tree))
        if isinstance(tree, list | tuple):
            return type(tree)(self._of_sequence(tree))
        raise NoRowsError(f"{type(tree).__name__} has no rows")

    def _of_sequence(self, items: Sequence[Any]) -> Sequence[Any]:
        """Either one entry a row, or parts that each have rows."""
        parts: list[Any] | None
        try:
            parts = [self(item) for item in items]
        except NoRowsError:
            parts = None
        if (parts is None) == (len(items) != self.rows):
            raise NoRowsError(f"{type(items).__name__} of {len(items)} for {self.rows} rows")
        if parts is not None:
            return parts
        index = self.index
        return items[index] if isinstance(index, slice) else [items[i] for i in index]


def _rebuilt(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        raise NoRowsError(f"a mapping that cannot be made of a dict: {error}") from error


def leaves(tree: Any) -> list[Any]:
    """The parts that hold the entries."""
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def width(tree: Any) -> int:
    """Tokens of a row, about; 0 where there are no tensors to tell.

    Example:
        >>> width({"input_ids": torch.zeros(4, 12, dtype=torch.long), "labels": torch.zeros(4)})
        12
        >>> width(torch.zeros(8, 3, 224, 224))
        196
    """
    sizes = [_tokens(leaf) for leaf in leaves(tree) if isinstance(leaf, _WITH_WIDTH)]
    return max(sizes, default=0)


def _tokens(leaf: Tensor | np.ndarray | OwnRows) -> int:
    if isinstance(leaf, OwnRows):
        return leaf.width
    entries = int(np.prod(leaf.shape[1:]))
    whole = leaf.dtype.is_floating_point if isinstance(leaf, Tensor) else leaf.dtype.kind == "f"
    return max(1, entries // FLOATS_OF_A_TOKEN if whole else entries)


def concatenate_rows(trees: Sequence[Any], rows: Sequence[int]) -> Any:
    """The rows of several structures in one; None where they are not tensors of one width.

    Args:
        trees: Tensors, or dictionaries of them, with one entry a row.
        rows: How many each has.

    Example:
        >>> concatenate_rows([{"x": torch.zeros(1, 2)}, {"x": torch.ones(1, 2)}], [1, 1])
        {'x': tensor([[0., 0.],
                [1., 1.]])}
        >>> concatenate_rows([torch.zeros(1, 2), torch.zeros(1, 3)], [1, 1])
        >>> concatenate_rows([torch.zeros(2), torch.zeros(2)], [2, 1])
    """
    first = trees[0]
    if type(first) is dict and all(type(t) is dict and t.keys() == first.keys() for t in trees):
        found = {name: concatenate_rows([tree[name] for tree in trees], rows) for name in first}
        return None if any(value is None for value in found.values()) else found
    kinds = {
        (tree.shape[1:], tree.dtype, tree.device)
        if isinstance(tree, Tensor) and tree.ndim and len(tree) == count
        else None
        for tree, count in zip(trees, rows, strict=True)
    }
    return torch.cat(list(trees)) if len(kinds) == 1 and None not in kinds else None


def second_sizes(tree: Any) -> list[int]:
    """Sizes of the second dimension of the tensors that have one."""
    found = [leaf for leaf in leaves(tree) if isinstance(leaf, _WITH_WIDTH)]
    own = [leaf.width for leaf in found if isinstance(leaf, OwnRows)]
    return own + [f.shape[1] for f in found if not isinstance(f, OwnRows) and f.ndim > 1]


def as_matrix(tree: Any, rows: int) -> np.ndarray:
    """All entries as one float64 matrix (rows, m).

    Raises:
        NoRowsError: Something is not a number.
    """
    try:
        return np.concatenate([one.reshape(rows, -1) for one in _arrays(tree, rows)], axis=1)
    except (TypeError, ValueError) as error:
        raise NoRowsError(f"what was returned is not numbers: {error}") from error


def _arrays(tree: Any, rows: int) -> list[np.ndarray]:
    if isinstance(tree, Tensor):
        return [tree.detach().to("cpu", torch.float64).numpy()]
    if isinstance(tree, Mapping):
        return [one for value in tree.values() for one in _arrays(value, rows)]
    if isinstance(tree, list | tuple) and not all(isinstance(item, int | float) for item in tree):
        return [one for value in tree for one in _arrays(value, rows)]
    return [np.asarray(tree, dtype=np.float64)]
