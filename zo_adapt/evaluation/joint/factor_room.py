"""Where the factors of several points lie, from one call to the next."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from zo_adapt.evaluation.joint import thin
from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.factors import Factors, Wanted
from zo_adapt.noise.low_rank import Matrices
from zo_adapt.noise.sums import Sums
from zo_adapt.view.moved import Stacks
from zo_adapt.view.parameters import ParameterView


class FactorRoom:
    """Where the factors and vectors of so many points lie, from one call to the next."""

    def __init__(
        self,
        view: ParameterView,
        places: Mapping[str, Place],
        multiplied: Mapping[str, Matrices],
        points: int,
        groups: int,
        terms: int,
        moving: frozenset[int],
    ) -> None:
        self.points, self.groups, self.terms = points, groups, terms
        self.noise = view.noise
        self.places = {name: place for name, place in places.items() if place.sum in moving}
        self._stacks = Stacks(
            view.noise,
            {n: p for n, p in self.places.items() if view.noise.matrices(p.source.shape) is None},
        )
        self.stacks: dict[str, Tensor] = {}
        self._drawn: list[tuple[Factors, Tensor]] = []
        self.pairs: dict[str, thin.Pair] = {}
        self._made: dict[tuple[str, int], Accumulation] = {}
        kinds: dict[tuple[torch.device, torch.dtype], dict[str, Matrices]] = {}
        for name, of in multiplied.items():
            if name in self.places:
                source = self.places[name].source
                kinds.setdefault((source.device, source.dtype), {})[name] = of
        for (device, dtype), named in kinds.items():
            self._make(device, dtype, named)

    def _make(
        self, device: torch.device, dtype: torch.dtype, named: Mapping[str, Matrices]
    ) -> None:
        wanted = [
            Wanted(self.places[name].key, of, point * self.groups + self.places[name].sum)
            for name, of in named.items()
            for point in range(self.points)
        ]
        factors = Factors(self.noise, wanted, device, scaled=True)
        with torch.inference_mode(False):
            entries = torch.zeros((self.terms, factors.numel), dtype=dtype, device=device)
        firsts = factors.starts[:: self.points]
        for (name, of), start in zip(named.items(), firsts, strict=False):
            own = entries[:, start : start + self.points * of.numel]
            self.pairs[name] = thin.Pair.of(own, of, self.points)
        self._drawn.append((factors, entries))

    def fill(self, sums: Sums) -> None:
        """Draw the factors of these sums, and make the vectors."""
        for factors, entries in self._drawn:
            factors(sums, entries)
        self.stacks = self._stacks(sums.sums, [None] * self.points)

    @property
    def key(self) -> Hashable:
        """Where everything lies: a graph reads it there."""
        drawn = tuple(entries.data_ptr() for _, entries in self._drawn)
        stacks = tuple((name, stack.data_ptr()) for name, stack in self.stacks.items())
        return self.points, self.terms, drawn, stacks

    def values(self, name: str, point: int, sums: Sums) -> Tensor:
        """A tensor at one point, made anew where it is no vector."""
        if name in self.stacks:
            return self.stacks[name][point]
        place = self.places[name]
        if (name, point) not in self._made:
            there = place._replace(sum=point * self.groups + place.sum)
            self._made[name, point] = Accumulation(self.noise, [there])
        out = torch.empty_like(place.source, requires_grad=False)
        self._made[name, point](sums, [out])
        return out
