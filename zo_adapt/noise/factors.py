"""Factors of low-rank directions themselves, for those who multiply by them and write no weight."""

import importlib.util
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.entries import numpy_entries, torch_entries
from zo_adapt.noise.low_rank import Matrices
from zo_adapt.noise.sums import HEADER, Sums


class Wanted(NamedTuple):
    """The factors of one tensor along the terms of one sum.

    Args:
        key: The tensor's noise key.
        matrices: How it is made of factors.
        sum: Which of the sums, by its index.
    """

    key: int
    matrices: Matrices
    sum: int = 0


class Factors:
    """Draws the factors of several tensors, end to end: for every term numel entries.

    Args:
        noise: Of the directions.
        wanted: Whose factors.
        device: Where.
        scaled: Multiply a by the term's coefficient and by 1 / sqrt(rank), so that a b^T is the
            whole term.

    Attributes:
        starts: Where each tensor's entries begin; its matrices follow each other, of each first all
            a, then all b.
        numel: Entries for one term.

    Example:
        >>> from zo_adapt.noise.distributions import LowRank
        >>> from zo_adapt.noise.sums import Sum, Sums
        >>> noise, cpu = LowRank(), torch.device("cpu")
        >>> factors = Factors(noise, [Wanted(7, Matrices(1, 3, 2, 1))], cpu)
        >>> factors(Sums([Sum([(1, 0.5), (2, 0.5)])])).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, noise: Noise, wanted: Sequence[Wanted], device: torch.device, *, scaled: bool = False
    ) -> None:
        self._entries, self._wanted, self._device = noise.entries, wanted, device
        self._scaled = scaled
        self.starts = list(accumulate((one.matrices.numel for one in wanted), initial=0))
        self.numel = self.starts[-1]
        self._fused = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        if self._fused:
            from zo_adapt.noise.triton_factors import FactorsDrawn

            self._drawn = FactorsDrawn(device, wanted, scaled=scaled)

    def count(self, sums: Sums) -> int:
        """Most terms that one of the sums has."""
        return max((len(sums.sums[one.sum].terms) for one in self._wanted), default=0)

    @torch.no_grad()
    def __call__(self, sums: Sums, out: Tensor | None = None) -> Tensor:
        """The entries, (terms, numel); zeros where a sum has no so many terms.

        Args:
            sums: Seeds and coefficients.
            out: Where they go, of any floating dtype; None: fp32, anew.
        """
        if out is None:
            out = torch.empty((self.count(sums), self.numel), device=self._device)
        if self._fused:
            self._drawn(sums, out)
            return out
        for one, start in zip(self._wanted, self.starts, strict=False):
            terms = sums.sums[one.sum].terms
            out[len(terms) :, start : start + one.matrices.numel] = 0.0
            for number, (seed, coefficient) in enumerate(terms):
                out[number, start : start + one.matrices.numel] = self._of(one, seed, coefficient)
        return out

    def _of(self, one: Wanted, seed: int, coefficient: float) -> Tensor:
        count, height, _, rank = one.matrices
        if self._device.type == "cpu":
            size = one.matrices.numel
            drawn = torch.from_numpy(numpy_entries(self._entries, seed, one.key, 0, size))
        else:
            drawn = torch_entries(self._entries, seed, one.key, one.matrices.numel, self._device)
        if self._scaled:
            drawn = drawn.clone()
            drawn.view(count, -1)[:, : rank * height] *= coefficient * rank**-0.5
        return drawn


def split(entries: Tensor, of: Matrices) -> tuple[Tensor, Tensor]:
    """A tensor's entries (terms, numel) as a (terms, count, rank, height) and b (..., width)."""
    each = entries.view(len(entries), of.number, -1)
    a, b = each[..., : of.rank * of.height], each[..., of.rank * of.height :]
    return a.unflatten(-1, (of.rank, of.height)), b.unflatten(-1, (of.rank, of.width))


def coefficients(sums: Sums, which: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Decay and coefficients of one sum as fp64 on a device; a graph reads them anew."""
    terms, decay = sums.sums[which]
    if device.type != "cuda":
        given = [decay, *(coefficient for _, coefficient in terms)]
        all_of_them = torch.tensor(given, dtype=torch.float64, device=device)
        return all_of_them[0], all_of_them[1:]
    header, pairs = sums.on(device)
    own = header[1 + HEADER * which :][:HEADER]
    numbers = own[0] + torch.arange(len(terms), device=device)
    return own[2:].view(torch.float64)[0], pairs.view(-1, 2)[numbers, 1].view(torch.float64)
