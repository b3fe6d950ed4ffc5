"""Batches: rows of a source, read when they are asked for."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from zo_adapt.data.rows import width
from zo_adapt.data.sources import Source, TensorRows


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
