"""What an objective may know of where it is called: rows in blocks, each at its own point."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn


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
