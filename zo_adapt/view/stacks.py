"""Tensors at several points at once, for forwards that evaluate several points together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.sums import Sum, Sums

MOST = 8
"""Stacks of different numbers of points that are kept."""


class Stacks:
    """The tensors that n points move, at all of them: name -> (n, *shape).

    Written anew at every call, where as many points move the same groups.

    Args:
        noise: Of the directions.
        places: Of the view's tensors, by name; ``sum`` is the tensor's group.
    """

    def __init__(self, noise: Noise, places: Mapping[str, Place]) -> None:
        self._noise, self._places = noise, places
        self._kept: dict[tuple[int, frozenset[int]], tuple[dict[str, Tensor], Accumulation]] = {}

    def __call__(self, sums: Sequence[Sum], count: int) -> dict[str, Tensor]:
        """The stacks for ``count`` points.

        Args:
            sums: What each group adds, point by point.
            count: n.
        """
        groups = len(sums) // count
        moving = frozenset(
            i % groups for i, each in enumerate(sums) if each.terms or each.decay != 1.0
        )
        key = count, moving
        if key not in self._kept:
            self._kept[key] = self._room(count, groups, moving)
        while len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        stacks, run = self._kept[key]
        run(Sums(sums))
        return stacks

    def _room(
        self, count: int, groups: int, moving: frozenset[int]
    ) -> tuple[dict[str, Tensor], Accumulation]:
        """Stacks for points that move these groups, and what fills them."""
        with torch.no_grad():
            stacks = {
                name: place.source.new_empty((count, *place.source.shape))
                for name, place in self._places.items()
                if place.sum in moving
            }
        places = [
            self._places[name]._replace(out=out, sum=row * groups + self._places[name].sum)
            for name, stack in stacks.items()
            for row, out in enumerate(stack)
        ]
        return stacks, Accumulation(self._noise, places)
