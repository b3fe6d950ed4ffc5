"""A model computes at shifted weights: the view is overwritten, and restored from a copy.

Costs the view's bytes. For adapters and plain tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zo_adapt.interrupt import uninterrupted
from zo_adapt.noise.sums import Sums
from zo_adapt.view.layers import Plan, Tensors


class Copied:
    """Overwrites the tensors by shifted values and restores every bit, whatever happens inside."""

    def __init__(self, tensors: Tensors, plan: Plan) -> None:
        self._tensors, self._run = list(tensors.values()), plan(tensors, tensors)

    @contextmanager
    def shifted(self, sums: Sums) -> Iterator[None]:
        """Inside, the live tensors hold the shifted values."""
        with torch.no_grad():
            kept = [
                tensor.detach().clone(memory_format=torch.preserve_format)
                for tensor in self._tensors
            ]
        try:
            self._run(sums)
            yield
        finally:
            with uninterrupted(), torch.no_grad():
                torch._foreach_copy_(self._tensors, kept)

    @contextmanager
    def loaded(self, sums: Sums) -> Iterator[None]:
        """As ``shifted``: a graph reads the live tensors."""
        with self.shifted(sums):
            yield

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, a graph is captured."""
        yield
