"""Data: batches are rows of a source, drawn in an order that is a function of the seed.

Sources: None (a function without data), tensors or a mapping of tensors of equal length, or any
sequence of examples (a list, a torch or a Hugging Face dataset) with a collate function.

Passes are stratified where the examples have class labels: any run of consecutive rows holds the
classes in nearly the proportions of the whole. A batch's mean stays unbiased, and the part of its
variance that stems from the label counts, often the largest, is gone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import DataError
from zo_adapt.noise import philox
from zo_adapt.rows import RowIndex, width

Collate = Callable[[list[Any]], Any]
MINIBATCH_STREAM, LARGE_BATCH_STREAM = 1, 2


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
        data: None; a tensor, array, or a tuple or mapping of them; or a sequence of examples.
        collate: Makes a batch of a list of examples; torch's default when None.

    Raises:
        DataError: Tensors of unequal length, or data without a length.
    """
    if data is None:
        return NoData()
    if all(isinstance(leaf, Tensor | np.ndarray) for leaf in _leaves(data)):
        return TensorRows(data)
    if isinstance(data, Mapping):
        kinds = sorted({type(value).__name__ for value in data.values()})
        raise DataError(f"a mapping of {kinds} is no data; give tensors or arrays of equal length")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"data of type {type(data).__name__} has no length; give a sequence or tensors"
        )
    return Examples(data, collate or torch.utils.data.default_collate)


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


class Samples:
    """Draws minibatches and large batches: endless passes, each in a fresh order.

    The order of pass e is a function of (seed, stream, e), so a position is all there is to resume.

    Args:
        source: Where rows come from.
        batch_size: Rows of a minibatch; None for a source without data.
        seed: Of the order.
        classes: Class of every row, to stratify the passes; None draws uniformly.
        min_rows: Fewest rows of a part of a batch; see ``objective.rows_needed``.

    Raises:
        DataError: The data are shorter than a batch.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int | None,
        seed: int,
        classes: Sequence[int] | None = None,
        min_rows: int = 1,
    ) -> None:
        self.min_rows = min_rows
        if batch_size is None:
            if not isinstance(source, NoData):
                raise DataError(f"batch_size is needed for data; choose 1..{len(source)}")
            batch_size = 1
        if not 1 <= batch_size <= len(source):
            raise DataError(
                f"batch_size={batch_size} with {len(source)} examples; choose 1..{len(source)}"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._classes = None if classes is None else np.asarray(classes)
        self.positions = {MINIBATCH_STREAM: 0, LARGE_BATCH_STREAM: 0}

    @property
    def share(self) -> int:
        """The smallest number of consecutive rows that is fair to every class, at least four."""
        classes = 1 if self._classes is None else len(np.unique(self._classes))
        return max(classes * -(-4 // classes), self.min_rows)

    def minibatch(self, size: int | None = None) -> Batch:
        """The next rows of the minibatch stream (``batch_size`` of them by default)."""
        return self._next(MINIBATCH_STREAM, size or self.batch_size)

    def large(self, size: int | None) -> Batch:
        """The next rows of the large-batch stream; the whole set when ``size`` is None.

        Raises:
            DataError: ``size`` is larger than the data.
        """
        if size is None:
            return Batch(self.source, range(len(self.source)))
        if not 1 <= size <= len(self.source):
            raise DataError(
                f"snapshot_size={size} with {len(self.source)} examples; choose "
                f"1..{len(self.source)}, or None for all"
            )
        return self._next(LARGE_BATCH_STREAM, size)

    def _next(self, stream: int, size: int) -> Batch:
        rows: list[int] = []
        while len(rows) < size:
            number, offset = divmod(self.positions[stream], len(self.source))
            part = self._order(stream, number)[offset : offset + size - len(rows)]
            self.positions[stream] += len(part)
            rows += part
        return Batch(self.source, rows)

    def _order(self, stream: int, number: int) -> list[int]:
        cached = getattr(self, "_cache", {})
        if cached.get(stream, (None,))[0] != number:
            # Sorting random words: unlike a library's shuffle, the same in every version.
            words = philox.words_numpy(self.seed, number, stream, 0, -(-len(self.source) // 4))
            order = np.argsort(words[: len(self.source)], kind="stable")
            if self._classes is not None:
                order = stratified(order, self._classes)
            self._cache = cached | {stream: (number, order.tolist())}
        order = self._cache[stream][1]
        return list(order)


def stratified(order: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """A random order, rearranged so that every class is spread evenly over it.

    Row number r of the n_c rows of a class goes to place (r + 1/2) / n_c of the pass.
    """
    place = np.empty(len(order))
    for label in np.unique(classes):
        members = np.flatnonzero(classes[order] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    # Ties, classes of equal size, stay in the random order.
    return order[np.argsort(place, kind="stable")]


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
