"""Rows in blocks, each computed at its own point: what an objective may know of them where it is
called, and the rows of several candidates as one batch of such blocks.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_adapt.data.rows import concatenate_rows, second_sizes, select_rows
from zo_adapt.data.sources import Batch, TensorRows
from zo_adapt.evaluation.later import Made
from zo_adapt.evaluation.values import RowsOf


class Narrowed(NamedTuple):
    """Some rows of a batch whose blocks are no longer of one size.

    Args:
        padded: (n m,), rows as n equal blocks, of which shorter ones are filled up with any row.
        own: Where in these the rows are.
    """

    padded: Tensor
    own: Tensor


class Blocks:
    """How the rows of a batch are computed: in equal blocks one after another, each at its point.

    Args:
        count: How many.
        frozen: The model's layers before the first that holds weights of the view, in order: what
            they make of a row is the same in every block.

    Attributes:
        narrowed: The rows that are left, where an objective leaves some out.

    Example:
        >>> here = Blocks(2)
        >>> with here.of_rows(torch.tensor([0, 3, 4]), 6):  # of (0, 1, 2) and (3, 4, 5)
        ...     here.narrowed
        Narrowed(padded=tensor([0, 0, 1, 2]), own=tensor([0, 2, 3]))
    """

    def __init__(self, count: int = 1, frozen: Sequence[nn.Module] = ()) -> None:
        self.count, self.frozen = count, frozen
        self.narrowed: Narrowed | None = None

    @contextmanager
    def of_rows(self, rows: Tensor, whole: int) -> Iterator[None]:
        """Inside, the model is called with some of a batch's rows alone.

        Args:
            rows: Their numbers, ascending.
            whole: How many the batch has.
        """
        if self.count > 1 and len(rows) < whole:
            self.narrowed = self._narrowed(rows, whole)
        try:
            yield
        finally:
            self.narrowed = None

    def _narrowed(self, rows: Tensor, whole: int) -> Narrowed:
        block = rows // (whole // self.count)
        sizes = torch.bincount(block, minlength=self.count)
        most, numbers = int(sizes.max()), torch.arange(len(rows), device=rows.device)
        own = block * most + numbers - (sizes.cumsum(0) - sizes)[block]
        padded = torch.zeros(self.count * most, dtype=torch.long, device=rows.device)
        padded[own] = numbers
        return Narrowed(padded, own)


_blocks: ContextVar[Blocks | None] = ContextVar("blocks", default=None)


def blocks() -> Blocks:
    """The blocks in which an objective is called here.

    Example:
        >>> blocks().count
        1
    """
    return _blocks.get() or Blocks()


@contextmanager
def calling_in(here: Blocks) -> Iterator[None]:
    """Inside, objectives are called with rows in these blocks."""
    token = _blocks.set(here)
    try:
        yield
    finally:
        _blocks.reset(token)


def fits(rows: int, here: Blocks, leads: Collection[int]) -> bool:
    """Whether a first size of a tensor is rows in blocks."""
    return rows in leads if here.narrowed is None else rows == len(here.narrowed.own)


class JointBatch(Batch):
    """The rows of several batches of one source, in blocks of one size.

    A batch that comes several times is read once: a collate function may draw, and all points of an
    estimate must see the same draw.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.sizes = [len(batch) for batch in batches]
        self.block = max(self.sizes)
        self._distinct: dict[tuple[int, ...], Batch] = {}
        for batch in batches:
            self._distinct.setdefault(batch.rows, batch)
        self._read = [row for rows in self._distinct for row in rows]
        ends = accumulate(map(len, self._distinct), initial=0)
        start = dict(zip(self._distinct, ends, strict=False))
        self._index: list[int] = []
        for batch in batches:
            own = range(start[batch.rows], start[batch.rows] + len(batch))
            self._index += (*own, *[own[-1]] * (self.block - len(own)))
        super().__init__(batches[0].source, [self._read[index] for index in self._index])

    @cached_property
    def content(self) -> Any:
        """What the objective is called with.

        Raises:
            NoRowsError: It is not known where the rows of the source's batches are.
        """
        if isinstance(self.source, TensorRows):
            return self.source.take(self.rows)
        parts = list(self._distinct.values())
        contents = [part.content for part in parts]
        whole = (
            contents[0] if len(parts) == 1 else concatenate_rows(contents, list(map(len, parts)))
        )
        if whole is None:  # together they are padded to another length
            whole = self.source.take(self._read)
        return select_rows(whole, self._index, len(self._read))

    @property
    def leads(self) -> set[int]:
        """First sizes of a tensor that has these rows: one by one, or flattened with positions.

        Rows without padding have as many positions as the widest tensor, or fewer in all.
        """
        return {len(self), len(self) * max(second_sizes(self.content), default=1)}

    def read(self, tree: Any) -> list[Any]:
        """The rows of every candidate, brought to the host.

        Raises:
            NoRowsError: There is not one entry for every row.
        """
        tree = tree.to("cpu") if isinstance(tree, Tensor) else tree  # one transfer for all
        return [select_rows(tree, rows, len(self)) for rows in self._slices()]

    def read_later(self, tree: Any) -> list[Any]:
        """As ``read``; where the tree is on its way, so are the rows of every candidate."""
        if not isinstance(tree, Made):
            return self.read(tree)
        pieces = Made(lambda: self.read(tree.result()), tree)

        def piece(index: int) -> Made:
            return Made(lambda: pieces.result()[index], tree)

        return [piece(index) for index in range(len(self.sizes))]

    def rows_of(self, tree: Any) -> list[Any]:
        """The rows of every candidate, those of a tensor left on its device: reading would wait.

        Raises:
            NoRowsError: There is not one entry for every row.
        """
        if isinstance(tree, Tensor) and tree.ndim and len(tree) == len(self):
            return [RowsOf(tree, rows) for rows in self._slices()]
        return self.read(tree)

    def _slices(self) -> list[slice]:
        starts = range(0, len(self), self.block)
        return [slice(a, a + size) for a, size in zip(starts, self.sizes, strict=True)]

    def part(self, index: int) -> Batch:
        """One candidate's rows, as they are read here."""
        rows = slice(index * self.block, (index + 1) * self.block)
        part = Batch(self.source, self.rows[rows])
        part.content = select_rows(self.content, rows, len(self))
        return part
