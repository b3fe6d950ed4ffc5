"""Values that a view had at one time, and places seen from them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zo_adapt.interrupt import gradients_off
from zo_adapt.term import Shift, Term, Terms, coalesced


class KeptValues:
    """The values that tensors had when ``keep`` was called, wherever they have gone since.

    Costs the tensors' bytes, from the first call on.

    Example:
        >>> x = torch.zeros(2)
        >>> kept = KeptValues({"x": x})
        >>> kept.keep()
        >>> x += 1
        >>> kept.tensors["x"]
        tensor([0., 0.])
    """

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        self._live = live
        self.tensors: dict[str, Tensor] = {}
        """Empty before the first ``keep``; always the same tensors afterwards."""

    def keep(self) -> None:
        """Keep what the tensors are now, in place of what was kept before."""
        self.load(self._live)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take what another object of this class has kept."""
        with gradients_off(), torch.inference_mode(False):
            if not self.tensors:
                self.tensors = {
                    name: torch.empty_like(tensor, requires_grad=False)
                    for name, tensor in self._live.items()
                }
            for name, tensor in self.tensors.items():
                tensor.copy_(values[name])

    def at(self, terms: Terms = ()) -> "KeptPlace":
        """The place ``kept + sum_k c_k z(s_k)``."""
        return KeptPlace(self, terms)

    def distance(self) -> float:
        """The Euclidean distance from the kept values to the present ones."""
        pairs = ((self.tensors[name], tensor) for name, tensor in self._live.items())
        squares = ((a.double() - b.double()).square().sum() for a, b in pairs)
        return float(sum(map(float, squares)) ** 0.5)


class KeptPlace(Shift):
    """A place seen from kept values, not from the live ones."""

    kept: KeptValues

    def __new__(cls, kept: KeptValues, terms: Terms = ()) -> "KeptPlace":
        """See the class."""
        place = super().__new__(cls, terms)
        place.kept = kept
        return place

    def plus(self, terms: Iterable[Term]) -> "KeptPlace":
        """This place and some directions more."""
        return KeptPlace(self.kept, coalesced((*self.terms, *terms)))

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, KeptPlace) and self.kept is other.kept
        return same and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((id(self.kept), tuple(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptPlace, (self.kept, self.terms)
