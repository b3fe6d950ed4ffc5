"""Directions of low rank: of a matrix, z = sum_p a_p b_p^T / sqrt(r), p = 1..r.

The entries of a and b are independent, with zero mean and unit variance, so

    E z_ij z_kl = 1/r sum_p E[a_pi a_pk] E[b_pj b_pl] = 1 if (i, j) = (k, l), else 0:

an estimate along z is as unbiased as along a Gaussian direction, and a linear layer at W + mu z is
x W^T + mu (x b) a^T / sqrt(r), for which no weight is written. The idea is that of EGGROLL (arXiv
2511.16652) and LOZO (arXiv 2410.07698).

Which matrices a tensor is (the fewer axes first):
    0 or 1      none: a Gaussian for every element
    2           itself
    3           one for each index of the first axis (the experts of a layer)
    4 and more  one, the first axis times all the others (the kernels of a convolution)
A matrix with a side of r or less has no higher rank than r, so it is a Gaussian as well.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_adapt.noise.entries import Entries, numpy_entries, torch_entries
from zo_adapt.noise.parts import Part


class Matrices(NamedTuple):
    """A tensor as equal matrices, each of them z = sum_p a_p b_p^T / sqrt(rank).

    Args:
        number: How many.
        height, width: Of each.
        rank: How many products are added.
    """

    number: int
    height: int
    width: int
    rank: int

    @property
    def numel(self) -> int:
        """Entries of all factors: for each matrix rank times a, then rank times b."""
        return self.number * self.rank * (self.height + self.width)


def as_matrices(shape: Sequence[int], rank: int) -> Matrices | None:
    """How a tensor is made of factors; None: as a vector, by element."""
    if len(shape) < 2:
        return None
    number = shape[0] if len(shape) == 3 else 1
    height, width = shape[-2:] if len(shape) == 3 else (shape[0], math.prod(shape[1:]))
    return Matrices(number, height, width, rank) if min(height, width) > rank else None


class Rectangle(NamedTuple):
    """The part of a tensor's matrices that is here, of each the same lines and columns.

    Args:
        number: How many matrices.
        height, width: Of the part of each.
        matrix, line, column: Where it begins.
    """

    number: int
    height: int
    width: int
    matrix: int = 0
    line: int = 0
    column: int = 0


def rectangle_of(part: Part | None, of: Matrices) -> Rectangle | None:
    """A part as a rectangle; None where it is none: of the inner axes of a convolution's kernels.

    Example:
        >>> from zo_adapt.noise.parts import slice_along
        >>> rectangle_of(slice_along(1, (6, 4), 2, 4), Matrices(1, 6, 4, 1))
        Rectangle(number=1, height=6, width=2, matrix=0, line=0, column=2)
    """
    number, height, width, _ = of
    if part is None:
        return Rectangle(number, height, width)
    if part.stride == width:
        return Rectangle(number, height, part.length, column=part.first)
    if part.first % width or part.length % width:
        return None
    line, lines = part.first // width, part.length // width
    if lines % height == 0 and line % height == 0:
        return Rectangle(part.number * lines // height, height, width, line // height)
    return Rectangle(part.number, lines, width, line // height, line % height)


def scale(matrices: Matrices) -> np.float32:
    """1 / sqrt(r)."""
    return np.float32(1.0 / math.sqrt(matrices.rank))


def numpy_factors(
    entries: Entries, seed: int, key: int, of: Matrices, matrix: int, rows: slice, columns: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Of one matrix, a for some rows (rank, n) and b for some columns (rank, m)."""
    start = matrix * of.rank * (of.height + of.width)
    middle = start + of.rank * of.height

    def part(begin: int, side: int, wanted: slice) -> np.ndarray:
        size = wanted.stop - wanted.start
        firsts = (begin + p * side + wanted.start for p in range(of.rank))
        return np.stack([numpy_entries(entries, seed, key, first, size) for first in firsts])

    if of.rank == 1 and rows.stop - rows.start == of.height and columns.stop == of.width:
        both = numpy_entries(entries, seed, key, start, of.height + of.width)  # in one call
        return both[None, : of.height], both[None, of.height :][:, columns]
    return part(start, of.height, rows), part(middle, of.width, columns)


def numpy_values(
    entries: Entries, seed: int, key: int, of: Matrices | None, first: int, size: int
) -> np.ndarray:
    """Elements ``first .. first + size`` of z in row-major order, as fp32.

    Args:
        entries: What is drawn.
        seed: The direction.
        key: The tensor's.
        of: The tensor's matrices; None: it is none.
        first: The first element.
        size: How many.
    """
    if of is None:
        return numpy_entries(entries, seed, key, first, size)
    parts = [
        _product(*numpy_factors(entries, seed, key, of, *piece), scale(of)).reshape(-1)
        for piece in _pieces(of, first, first + size)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _product(a: np.ndarray, b: np.ndarray, scale: np.float32) -> np.ndarray:
    """Added in the order of p, one rounding an operation: as it is done on every device."""
    total: np.ndarray = a[0][:, None] * b[0]
    for one, other in zip(a[1:], b[1:], strict=True):
        total += one[:, None] * other
    if len(a) > 1:
        total *= scale
    return total


def _pieces(of: Matrices, first: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """A range of elements as matrix, rows and columns: parts of a row, or whole rows."""
    while first < stop:
        (row, column), width = divmod(first, of.width), of.width
        matrix, line = divmod(row, of.height)
        if column or stop - first < width:
            end = min(stop - first + column, width)
            yield matrix, slice(line, line + 1), slice(column, end)
            first += end - column
        else:
            lines = min((stop - first) // width, of.height - line)
            yield matrix, slice(line, line + lines), slice(0, width)
            first += lines * width


def torch_factors(
    entries: Entries, seed: int, key: int, of: Matrices, device: torch.device
) -> tuple[Tensor, Tensor]:
    """All of a tensor's factors: a (count, rank, height) and b (count, rank, width)."""
    drawn = torch_entries(entries, seed, key, of.numel, device).view(of.number, -1)
    a, b = drawn.split([of.rank * of.height, of.rank * of.width], 1)
    return a.view(of.number, of.rank, of.height), b.view(of.number, of.rank, of.width)


def torch_values(a: Tensor, b: Tensor, of: Matrices, first: int, stop: int) -> Tensor:
    """Elements ``first .. stop`` of z in row-major order, from the factors."""
    element = torch.arange(first, stop, device=a.device)
    row, column = element // of.width, element % of.width
    return torch_products(a, b, of, row, column)


def torch_products(a: Tensor, b: Tensor, of: Matrices, row: Tensor, column: Tensor) -> Tensor:
    """Elements of z at some rows, counted through all matrices, and columns."""
    matrix, line = row // of.height, row % of.height
    total = a[matrix, 0, line] * b[matrix, 0, column]
    for p in range(1, of.rank):
        total += a[matrix, p, line] * b[matrix, p, column]
    return total if of.rank == 1 else total * float(scale(of))
