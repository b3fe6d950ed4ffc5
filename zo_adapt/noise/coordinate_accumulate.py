"""``accumulate`` along coordinates: of a small view only the scalars that the terms name."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from zo_adapt.noise.accumulate import Place, Runner, arithmetic, finish, flat
from zo_adapt.noise.coordinates import Coordinates
from zo_adapt.noise.rounding import fractions
from zo_adapt.noise.sums import Sum, Sums
from zo_adapt.noise.torch_accumulate import round_at_random


class OnCoordinates(Runner):
    """On any device, in torch operations; what is added where is found on the host."""

    def __init__(self, noise: Coordinates, places: Sequence[Place]) -> None:
        self._noise, self._places = noise, places

    def __call__(self, sums: Sums, outs: Sequence[Tensor]) -> None:
        """Add and round."""
        dtype = arithmetic(self._places[0].out.dtype)
        named = {
            which: self._named(sums.sums[which], dtype)
            for which in dict.fromkeys(place.sum for place in self._places)
        }
        for place, out in zip(self._places, outs, strict=True):
            result, source = flat(out, place.source)
            total = source.to(dtype, copy=True)
            if (decay := sums.sums[place.sum].decay) != 1.0:
                total *= decay
            if place.key in self._noise.starts:
                self._add(total, self._noise.starts[place.key], *named[place.sum])
            if sums.rounding is not None and result.element_size() == 2:
                drawn = fractions(sums.rounding, place.key, 0, len(total)).astype(np.int32)
                round_at_random(total, result.dtype, torch.from_numpy(drawn).to(total.device))
            result.copy_(total)
            finish(out, result)

    def _named(self, of: Sum, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """The scalars of a sum's terms by number, and what each adds, in the order of the terms."""
        scalar = np.float64 if dtype == torch.float64 else np.float32
        pairs = [self._noise.at(seed) for seed, _ in of.terms]
        numbers = np.array([number for number, _ in pairs], np.int64)
        values = np.array([value for _, value in pairs], scalar)
        return numbers, values * np.array([c for _, c in of.terms], scalar)

    def _add(self, total: Tensor, start: int, numbers: np.ndarray, amounts: np.ndarray) -> None:
        here = (numbers >= start) & (numbers < start + len(total))
        for elements, added in _once_each(numbers[here] - start, amounts[here]):
            total.index_add_(
                0,
                torch.from_numpy(elements).to(total.device),
                torch.from_numpy(added).to(total.device),
            )


def _once_each(
    elements: np.ndarray, amounts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """In rounds that name an element once, for a GPU adds to one in any order."""
    while len(elements):
        _, first = np.unique(elements, return_index=True)
        yield elements[first], amounts[first]
        elements, amounts = np.delete(elements, first), np.delete(amounts, first)
