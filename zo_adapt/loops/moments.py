"""Second moments of what flows through a layer, in the memory of a few of its directions."""

import torch
from torch import Tensor

EXACT = 2048
"""Up to this width the whole matrix is kept: 32 MB."""
SPARE = 96
"""Directions of a sketch beyond twice those that are wanted."""


class Moment:
    """E[x x^T] of rows x, summed in fp64: whole where they are narrow, otherwise a sketch.

    A sketch keeps S = M Omega for a few random directions Omega, from which the leading eigenpairs
    of M follow (Nystroem; Tropp et al. 2017, arXiv 1706.05736): of a row of 14,336 numbers and rank
    8 it takes 13 MB in place of 1.6 GB.

    Args:
        width: Of a row.
        rank: How many eigenpairs are wanted at most.
        device: Where the rows are.
    """

    def __init__(self, width: int, rank: int, device: torch.device | str = "cpu") -> None:
        self._directions = _directions(width, 2 * rank + SPARE).to(device)
        self._total = torch.zeros_like(self._directions)
        self._squares = 0.0
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take rows (n, d) in."""
        rows = rows.to(torch.float64)
        self._total += rows.T @ (rows @ self._directions)
        self._squares += float(rows.square().sum())
        self.count += len(rows)

    @property
    def mean_square(self) -> float:
        """E |x|^2."""
        return self._squares / self.count

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading eigenvalues, largest first, and their eigenvectors as columns.

        As many as the rows span: beyond that an eigenvalue is rounding.
        """
        values, vectors = self._eigenpairs()
        known = int((values > 1e-9 * values[0]).sum())
        return values[: min(rank, known)], vectors[:, : min(rank, known)]

    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        omega, sketch = self._directions, self._total / self.count
        if len(sketch) <= EXACT:
            values, vectors = torch.linalg.eigh(sketch)
            return values.flip(0), vectors.flip(1)
        # A shift keeps the small matrix positive; it is taken off the eigenvalues again.
        shift = 1e-12 * float(torch.linalg.matrix_norm(sketch))
        sketch = sketch + shift * omega
        core = omega.T @ sketch
        root = torch.linalg.cholesky((core + core.T) / 2)
        factor = torch.linalg.solve_triangular(root, sketch.T, upper=False).T
        vectors, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        return (singular.square() - shift).clamp_min(0.0), vectors


def _directions(width: int, count: int) -> Tensor:
    """All of them, or a few orthonormal ones at random."""
    if width <= EXACT:
        return torch.eye(width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, min(count, width), generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn)[0]
    return orthonormal
