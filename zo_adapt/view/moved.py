"""How the tensors of a view are moved: where they lie, what is added, and by which way.

The live ones are moved for good, stacks of them to several points at once.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zo_adapt.interrupt import gradients_off, uninterrupted
from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.coordinates import Coordinates
from zo_adapt.noise.distributions import RADEMACHER, Noise, draw
from zo_adapt.noise.entries import tensor_key
from zo_adapt.noise.gathered import Gathered
from zo_adapt.noise.sums import Memory, Sum, Sums
from zo_adapt.term import Term, Terms
from zo_adapt.view.copied import Copied
from zo_adapt.view.kept import KeptValues
from zo_adapt.view.layerwise import Layerwise
from zo_adapt.view.precision import Room
from zo_adapt.view.tuned import TunedTensors
from zo_adapt.view.usage import Usage


class Updates:
    """Adds sums to the live tensors, for good."""

    def __init__(self, accumulation: Accumulation) -> None:
        self._run = accumulation
        self._memory = Memory()
        self._addresses_fixed = False
        self._at_addresses: Callable[[Sums], None] | None = None

    def __call__(self, sums: Sequence[Sum], rounding: int | None) -> None:
        """Add and round; all tensors move, or none."""
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


class PlannedMoves(TunedTensors):
    """The tensors of a view with their ways of moving, planned anew when they lie elsewhere."""

    def __init__(self, *tensors: Any, **options: Any) -> None:
        super().__init__(*tensors, **options)
        self._keys = {name: tensor_key(name) for name in self.tensors}
        self.usage = Usage(self.tensors)
        self.memory = Memory()
        """Where the GPUs read the terms that the view is shifted by."""
        self._gpus = {tensor.device for tensor in self.tensors.values() if tensor.is_cuda}
        self.room = Room(self.held.values(), self.noise.largest, self.shards)
        """What the dtypes can still hold."""
        self.at_rest: frozenset[str] = frozenset()
        """Names of the tensors that stay as they are."""
        self._plan_moves()

    def places(self) -> dict[str, Place]:
        """Every tensor that moves, with its noise key and its group."""
        moving = {name: t for name, t in self.held.items() if name not in self.at_rest}
        return self._places(moving, moving)

    def _find_parts(self) -> None:
        """Look where the parts lie now: FSDP moves them when a model is loaded or converted."""
        if self.is_sharded and any(map(operator.is_not, self._parts, self.held.values())):
            self.room = Room(self.held.values(), self.noise.largest, self.shards)
            self._plan_moves()

    def _plan_moves(self) -> None:
        self._parts = list(self.held.values())
        places = self.places()
        moving = {name: place.source for name, place in places.items()}
        self._way: Copied | Layerwise = (
            Layerwise(self.model, moving, self._plan, self._rows, self.inspection.shared)
            if self.model is not None and self.by_layer
            else Copied(moving, self._plan, self.shards.forget_gathered)
        )
        self.updates = Updates(self._plan(moving, moving))
        self._stacks = Stacks(self.noise, places)
        self._from_kept: tuple[KeptValues, Copied, Accumulation] | None = None

    def _ways_from(self, kept: KeptValues) -> tuple[Copied, Accumulation]:
        if self._from_kept is None or self._from_kept[0] is not kept:
            moving = {name: place.source for name, place in self.places().items()}
            copied = self._way if isinstance(self._way, Copied) else Copied(moving, self._plan)
            run = self._plan(moving, {name: kept.tensors[name] for name in moving})
            self._from_kept = kept, copied, run
        return self._from_kept[1:]

    def _plan(self, outs: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> Accumulation:
        return Accumulation(self.noise, self._places(outs, sources).values())

    def _places(
        self, outs: Mapping[str, Tensor], sources: Mapping[str, Tensor]
    ) -> dict[str, Place]:
        return {
            name: Place(
                outs[name],
                source,
                self._keys[name],
                self._group_of[name],
                self.shards.parts.get(name),
            )
            for name, source in sources.items()
        }

    def _rows(self, name: str, table: Tensor) -> Gathered:
        return Gathered(self.noise, table, self._keys[name], self._group_of[name])

    def _sums(self, terms: Sequence[Term], decay: float) -> list[Sum]:
        """What each group adds. Weights that do not move do not shrink either."""
        return [
            Sum(
                [(t.seed, t.coefficient) for t in terms if t.group in (None, index)],
                decay if group.decays and group.lr * group.perturbation_scale else 1.0,
            )
            for index, group in enumerate(self.groups)
        ]

    def everywhere(self, seed: int, size: float) -> Terms:
        """A shift of every scalar that moves, with ``size`` as root mean square: for checks."""
        noise = self.noise
        if not isinstance(noise, Coordinates):
            return (Term(seed, size),)
        signs = draw(RADEMACHER, seed, "", noise.count, torch.device("cpu")).tolist()
        return tuple(Term(n, sign * size / noise.largest) for n, sign in enumerate(signs))

    def along(self, terms: Terms, name: str) -> Tensor:
        """sum_k c_k z(s_k) of one tensor, in fp64; none of it is written."""
        tensor = self.tensors[name]
        found = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        for term in terms:
            if term.group in (None, self._group_of[name]):
                z = draw(self.noise, term.seed, name, tensor.shape, tensor.device)
                found += term.coefficient * z
        return found

    @property
    def _moving_groups(self) -> frozenset[int]:
        """Those that an update moves."""
        both = (group.lr * group.perturbation_scale for group in self.groups)
        return frozenset(index for index, each in enumerate(both) if each)

    def _packed(self, terms: Terms, decay: float) -> Sums:
        sums = Sums(self._sums(terms, decay), memory=self.memory)
        for device in self._gpus:
            sums.on(device)  # now: a graph that is captured inside must not copy them
        return sums
