"""A model computes at shifted weights: the view is overwritten, and restored from a copy.

Costs the view's bytes. For adapters and plain tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from zo_adapt.interrupt import uninterrupted
from zo_adapt.noise.sums import Sums
from zo_adapt.view.layers import Plan, Tensors

_KIND = attrgetter("dtype", "device", "shape")


class Copied:
    """Overwrites the tensors by shifted values and restores every bit, whatever happens inside."""

    def __init__(self, tensors: Tensors, plan: Plan) -> None:
        self._tensors, self._run = list(tensors.values()), plan(tensors, tensors)
        self._room: list[Tensor] = []
        self._kinds: list[Any] = []
        self._is_used = False

    @contextmanager
    def shifted(self, sums: Sums) -> Iterator[None]:
        """Inside, the live tensors hold the shifted values."""
        outermost = not self._is_used
        kept = self._room_for_a_copy() if outermost else _like(self._tensors)
        with torch.no_grad():
            torch._foreach_copy_(kept, self._tensors)
        self._is_used = True
        try:
            self._run(sums)
            yield
        finally:
            with uninterrupted(), torch.no_grad():
                torch._foreach_copy_(self._tensors, kept)
            self._is_used = not outermost

    def _room_for_a_copy(self) -> list[Tensor]:
        """Always the same while the tensors are of the same kinds: every step needs it."""
        kinds = list(map(_KIND, self._tensors))
        if kinds != self._kinds:
            self._room, self._kinds = _like(self._tensors), kinds
        return self._room

    @contextmanager
    def loaded(self, sums: Sums) -> Iterator[None]:
        """As ``shifted``: a graph reads the live tensors."""
        with self.shifted(sums):
            yield

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, a graph is captured."""
        yield


def _like(tensors: list[Tensor]) -> list[Tensor]:
    """Room for copies, of the tensors' own memory format."""
    with torch.inference_mode(False):  # a later copy may be made outside of it
        return [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
