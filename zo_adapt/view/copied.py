"""A model computes at shifted weights: the view is overwritten, and restored from a copy.

Costs the view's bytes. For adapters and plain tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zo_adapt.errors import ViewInUseError
from zo_adapt.interrupt import Guard
from zo_adapt.noise.accumulate import Accumulation
from zo_adapt.noise.sums import Sums
from zo_adapt.view.layers import Plan, Tensors
from zo_adapt.view.usage import KIND


class Copied:
    """Overwrites the tensors by shifted values and restores every bit, whatever happens inside."""

    def __init__(
        self, tensors: Tensors, plan: Plan, written: Callable[[], None] = lambda: None
    ) -> None:
        self._tensors, self._run = list(tensors.values()), plan(tensors, tensors)
        self._written = written
        self._room: list[Tensor] = []
        self._kinds: list[Any] = []
        self._copies: list[list[Tensor]] = []
        """What to restore, one for every context that is open, outermost first."""

    @contextmanager
    def shifted(self, sums: Sums, run: Accumulation | None = None) -> Iterator[None]:
        """Inside, the live tensors hold the shifted values.

        Args:
            sums: What is added to them, or by ``run`` to other values.
            run: Writes the tensors; None: from themselves.

        Raises:
            ViewInUseError: (at the end) A context that was entered inside is open still. The
                tensors are restored all the same.
        """
        copy = _like(self._tensors) if self._copies else self._room_for_a_copy()
        with torch.no_grad():
            torch._foreach_copy_(copy, self._tensors)
        with Guard(lambda: self._restore(copy)) as guard:
            self._copies.append(copy)
            (run or self._run)(sums)
            self._written()
            guard.open()
            yield

    def _restore(self, copy: list[Tensor]) -> None:
        places = [i for i, other in enumerate(self._copies) if other is copy]
        if not places:  # restored with a context further out
            return
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, copy)
        self._written()
        inside = len(self._copies) - places[0] - 1
        del self._copies[places[0] :]
        if inside:
            raise ViewInUseError(
                f"a shift of the view ended while {inside} that began inside it went on; leave "
                "them in the reverse order (use `with`)"
            )

    def _room_for_a_copy(self) -> list[Tensor]:
        """Always the same while the tensors are of the same kinds: every step needs it."""
        kinds = list(map(KIND, self._tensors))
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
