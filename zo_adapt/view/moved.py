"""Tensors that are moved: the live ones for good, stacks of them to several points at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from zo_adapt.interrupt import gradients_off, uninterrupted
from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.sums import Memory, Sum, Sums
from zo_adapt.view.kept import KeptValues


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
        self._rooms: dict[tuple[int, frozenset[int]], _Room] = {}

    def __call__(
        self,
        sums: Sequence[Sum],
        kept: Sequence[KeptValues | None],
        moving_since: frozenset[int] = frozenset(),
    ) -> dict[str, Tensor]:
        """The stacks for n points.

        Args:
            sums: What each group adds, point by point.
            kept: n, the values that it is added to; None: the live ones.
            moving_since: Groups whose kept values may be others than the live ones.
        """
        count, groups = len(kept), len(sums) // len(kept)
        moving = frozenset(
            i % groups for i, each in enumerate(sums) if each.terms or each.decay != 1.0
        )
        if any(kept):
            moving |= moving_since
        if (room := self._rooms.get((count, moving))) is None:
            room = self._rooms[count, moving] = self._room(count, moving)
        while len(self._rooms) > MOST:
            del self._rooms[next(iter(self._rooms))]
        if room.run is None or room.kept != list(kept):
            # The stacks stay where they are: graphs read them there.
            room.run, room.kept = self._filling(room.stacks, kept, groups), list(kept)
        room.run(Sums(sums))
        return room.stacks

    def _room(self, count: int, moving: frozenset[int]) -> "_Room":
        """Stacks for points that move these groups."""
        with gradients_off():
            return _Room(
                {
                    name: place.source.new_empty((count, *place.source.shape))
                    for name, place in self._places.items()
                    if place.sum in moving
                }
            )

    def _filling(
        self, stacks: Mapping[str, Tensor], kept: Sequence[KeptValues | None], groups: int
    ) -> Accumulation:
        return Accumulation(
            self._noise,
            [
                place._replace(
                    out=out,
                    source=place.source if values is None else values.tensors[name],
                    sum=row * groups + place.sum,
                )
                for name, stack in stacks.items()
                for place in (self._places[name],)
                for row, (out, values) in enumerate(zip(stack, kept, strict=True))
            ],
        )


@dataclass
class _Room:
    """Stacks, and what fills them from the values that were asked for last."""

    stacks: dict[str, Tensor]
    run: Accumulation | None = None
    kept: list[KeptValues | None] = field(default_factory=list)
