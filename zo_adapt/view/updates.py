"""Updates of a view's live tensors, and where these lie while a step is made."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from zo_adapt.interrupt import uninterrupted
from zo_adapt.noise.accumulate import Accumulation
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
