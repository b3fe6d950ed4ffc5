"""Parts of tensors: a process that holds a slice of one makes the noise of that slice alone."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """The slice of a tensor that is here: in row-major order of the whole, ranges of one length.

    Element i of the slice is element (i // length) * stride + first + i % length of the whole.

    Args:
        shape: Of the whole tensor.
        first: Where the first range begins in it.
        length: Of each range.
        stride: From the beginning of one range to that of the next.

    Example:
        >>> right_half = slice_along(1, (2, 6), 3, 6)
        >>> list(right_half.ranges(0, 6)), right_half.elements(2, 5, torch.device("cpu")).tolist()
        ([(3, 3), (9, 3)], [5, 9, 10])
    """

    shape: tuple[int, ...]
    first: int
    length: int
    stride: int

    def ranges(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Elements ``start .. start + size`` of the slice as ranges (first, size) of the whole."""
        stop = start + size
        while start < stop:
            row, within = divmod(start, self.length)
            count = min(self.length - within, stop - start)
            yield row * self.stride + self.first + within, count
            start += count

    def elements(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The same, one by one, in ascending order."""
        element = torch.arange(start, stop, device=device)
        row, within = element // self.length, element % self.length
        return row * self.stride + self.first + within

    @property
    def number(self) -> int:
        """How many ranges there are."""
        numel: int = math.prod(self.shape)
        return numel // self.stride

    def begins_at_multiples_of(self, size: int) -> bool:
        """Whether every range does."""
        return self.first % size == 0 and self.stride % size == 0


def slice_along(axis: int, shape: tuple[int, ...], start: int, stop: int) -> Part:
    """Indices ``start .. stop`` of one axis of a tensor."""
    inner = math.prod(shape[axis + 1 :])
    return Part(shape, start * inner, (stop - start) * inner, shape[axis] * inner)
