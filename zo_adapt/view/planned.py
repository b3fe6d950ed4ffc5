"""How the tensors of a view are moved: where they lie, what is added, and by which way."""

import operator
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.entries import tensor_key
from zo_adapt.noise.gathered import Gathered
from zo_adapt.noise.sums import Memory, Sum, Sums
from zo_adapt.term import Term, Terms
from zo_adapt.view.copied import Copied
from zo_adapt.view.group import Groups
from zo_adapt.view.kept import KeptValues
from zo_adapt.view.layerwise import Layerwise
from zo_adapt.view.moved import Stacks, Updates
from zo_adapt.view.precision import Room
from zo_adapt.view.tuned import Scratch, TunedTensors
from zo_adapt.view.usage import Usage


class PlannedMoves(TunedTensors):
    """The tensors of a view with their ways of moving, planned anew when they lie elsewhere.

    The arguments are those of ``ParameterView``.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | np.ndarray],
        *,
        model: nn.Module | None,
        noise: str,
        groups: Groups,
        scratch: Scratch,
    ) -> None:
        super().__init__(tensors, model=model, noise=noise, groups=groups, scratch=scratch)
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
