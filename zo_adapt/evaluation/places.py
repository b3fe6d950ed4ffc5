"""Where an evaluation takes place, at one point or at several together, and what computes there."""

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from zo_adapt.term import HERE, Shift
from zo_adapt.view.kept import KeptPlace
from zo_adapt.view.parameters import ParameterView


class Place(Protocol):
    """Where the model computes.

    Attributes:
        key: What decides, beside the batch, which kernels run: graphs are captured for each key.
    """

    @property
    def key(self) -> Hashable:
        """See the class."""

    def entered(self, replaying: bool = False) -> AbstractContextManager[Any]:
        """Inside, the model computes there.

        Args:
            replaying: Nothing but graphs that were captured at such a place runs inside. They shift
                the layers by themselves, so the modules are left alone.
        """


class OnePoint:
    """One point, seen from the live weights."""

    def __init__(self, view: ParameterView, at: Shift = HERE) -> None:
        self._view, self._at = view, at
        shifted = bool(at.terms) or at.decay != 1.0
        # Layers that are shifted just in time run other kernels than those that are not shifted;
        # a graph draws the factors of as many directions as there were when it was captured.
        self.key: Hashable = None
        if view.by_layer and shifted and not isinstance(at, KeptPlace):
            self.key = ("layer", len(at.terms)) if view.has_factors else "layer"

    def entered(self, replaying: bool = False) -> AbstractContextManager[None]:
        """Inside, the model computes at the point."""
        if self._at is HERE:
            watched = not (replaying or self._view.is_sharded)
            return self._view.usage.watching() if watched else nullcontext()
        if isinstance(self._at, KeptPlace):
            return self._view.shifted_from(self._at.kept, self._at.terms)
        enter = self._view.shifted_for_graphs if replaying else self._view.shifted
        return enter(self._at.terms, self._at.decay)


class Route(Protocol):
    """Computes what an objective returns for a batch, wherever the model computes now."""

    def __call__(self, content: Any, key: Hashable) -> Any:
        """What the objective returns."""

    def replays(self, content: Any, key: Hashable) -> bool:
        """Whether a call would run none of the model's own code."""
