"""Tensors that are moved: the live ones for good, stacks of them to several points at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from zo_adapt.interrupt import gradients_off, uninterrupted
from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.sums import Memory, Sum, Sums


class Updates:
    """Adds sums to the live tensors, for good.

    Args:
        accumulation: From the tensors into themselves.
    """

    def __init__(self, accumulation: Accumulation) -> None:
        self._run = accumulation
        self._memory = Memory()
        self._addresses_fixed = False
        self._at_addresses: Callable[[Sums], None] | None = None

    def __call__(self, sums: Sequence[Sum], rounding: int | None) -> None:
        """Add and round; all tensors move, or none.

        Args:
            sums: One for each group of the view.
            rounding: Seed of the stochastic rounding.
        """
        with uninterrupted():
            (self._at_addresses or self._run)(Sums(sums, rounding, self._memory))

    @contextmanager
    def fixed_addresses(self) -> Iterator[None]:
        """Inside, no tensor moves to other memory after ``read_addresses``.

        An update need not look where each one is then, while a GPU waits for it.
        """
        self._addresses_fixed = True
        try:
            yield
        finally:
            self._addresses_fixed, self._at_addresses = False, None

    def read_addresses(self) -> None:
        """Look where the tensors are, for the updates that follow inside ``fixed_addresses``."""
        if self._addresses_fixed:
            self._at_addresses = self._run.located()


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
        with gradients_off():
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
