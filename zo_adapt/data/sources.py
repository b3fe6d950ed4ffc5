"""Sources: what batches are rows of.

None (a function without data), tensors or a mapping of tensors of equal length, or any sequence of
examples (a list, a torch or a Hugging Face dataset) with a collate function. ``forms`` brings all
else to one of these.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch

from zo_adapt.data.forms import Collate, is_column, rows_given
from zo_adapt.data.rows import RowIndex, width
from zo_adapt.errors import DataError


class Source(Protocol):
    """Something that batches are rows of."""

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Any:
        """The collated batch of these rows."""


class NoData:
    """A function of the parameters alone: one row, whose content is None."""

    def __len__(self) -> int:
        return 1

    def take(self, rows: Sequence[int]) -> None:
        """None, whatever the rows."""
        return


class TensorRows:
    """Rows of a tensor, or of a tuple or mapping of tensors (or arrays) of equal length."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors
        if any(tensor.ndim == 0 for tensor in _leaves(tensors)):
            raise DataError("a tensor without dimensions has no rows; give one row per example")
        lengths = {len(tensor) for tensor in _leaves(tensors)}
        if len(lengths) != 1:
            raise DataError(
                f"the tensors have {sorted(lengths)} rows; all must have the same number"
            )
        self._length = lengths.pop()

    @property
    def examples(self) -> Any:
        """What it was made of."""
        return self._tensors

    def __len__(self) -> int:
        return self._length

    @cached_property
    def width(self) -> int:
        """Tokens of a row, about."""
        return width(self._tensors)

    def take(self, rows: Sequence[int]) -> Any:
        """These rows of every tensor."""
        index = RowIndex(rows)
        if isinstance(self._tensors, Mapping):
            return {name: index.of(value) for name, value in self._tensors.items()}
        if isinstance(self._tensors, tuple):
            return tuple(index.of(value) for value in self._tensors)
        return index.of(self._tensors)


class Examples:
    """A sequence of examples, collated on demand."""

    def __init__(self, examples: Any, collate: Collate) -> None:
        self._examples, self._collate = examples, collate

    @property
    def collate(self) -> Collate:
        """What makes a batch of them, as the caller knows it."""
        return self._collate

    @property
    def examples(self) -> Any:
        """What it was made of."""
        return self._examples

    def __len__(self) -> int:
        return len(self._examples)

    def take(self, rows: Sequence[int]) -> Any:
        """These examples, collated."""
        return self._collate([self._examples[row] for row in rows])


def _leaves(tensors: Any) -> list[Any]:
    if isinstance(tensors, Mapping):
        return list(tensors.values())
    return list(tensors) if isinstance(tensors, tuple) else [tensors]


def as_source(data: Any, collate: Collate | None = None) -> Source:
    """Wrap whatever the caller has.

    Args:
        data: As ``Data`` takes it.
        collate: Makes a batch of a list of examples; torch's default when None.

    Raises:
        DataError: Tensors of unequal length, or data without rows.
    """
    data, collate = rows_given(data, collate)
    if data is None:
        return NoData()
    leaves = _leaves(data)
    if leaves and all(map(is_column, leaves)):
        source: Source = TensorRows(data)
    else:
        source = Examples(data, collate or torch.utils.data.default_collate)
    if len(source) == 0:
        raise DataError("the data hold no examples; was a path, a split or a filter mistaken?")
    return source


class Batch:
    """Rows of a source. Nothing is read before ``content`` is asked for."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self.source, self.rows = source, tuple(rows)
        self._micro_batches: dict[int, list[Batch]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def content(self) -> Any:
        """What the objective is called with."""
        return self.source.take(self.rows)

    @property
    def width(self) -> int:
        """Tokens of a row, about; tells it without reading rows of tensors."""
        source = self.source
        return source.width if isinstance(source, TensorRows) else width(self.content)

    def split(self, parts: int) -> list["Batch"]:
        """Consecutive parts whose sizes differ by at most one; at most one for each row."""
        parts = min(parts, len(self))
        bounds = [len(self) * i // parts for i in range(parts + 1)]
        return [Batch(self.source, self.rows[first:last]) for first, last in pairwise(bounds)]

    def micro_batches(self, size: int | None) -> list["Batch"]:
        """Parts of at most ``size`` rows, for the memory's sake.

        Always the same ones: what a collate function draws, all points of an estimate must see.
        """
        if size is None or len(self) <= size:
            return [self]
        if size not in self._micro_batches:
            self._micro_batches[size] = self.split(-(-len(self) // size))
        return self._micro_batches[size]
