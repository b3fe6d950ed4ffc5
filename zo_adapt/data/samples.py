"""Which rows a step sees: drawn in an order that is a function of the seed.

Passes are stratified where the examples have class labels: any run of consecutive rows holds the
classes in nearly the proportions of the whole. A batch's mean stays unbiased, and the part of its
variance that stems from the label counts, often the largest, is gone.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from zo_adapt.data.sources import Batch, NoData, Source
from zo_adapt.errors import DataError
from zo_adapt.noise import philox

MINIBATCH_STREAM, LARGE_BATCH_STREAM, ASIDE_STREAM = 1, 2, 3


class Samples:
    """Draws minibatches and large batches: endless passes, each in a fresh order.

    The order of pass e is a function of (seed, stream, e), so a position is all there is to resume.

    Args:
        source: Where rows come from.
        batch_size: Rows of a minibatch; None for a source without data.
        seed: Of the order.
        classes: Class of every row, to stratify the passes; None draws uniformly.
        min_rows: Fewest rows of a part of a batch; see ``objective.rows_needed``.

    Raises:
        DataError: The data are shorter than a batch.
    """

    least_share = 4
    """Fewest rows of a share; more where every direction costs much, however few its rows."""
    knows_rows = True
    """Whether the rows of a minibatch are numbers of examples, the same ones in every pass."""

    def __init__(
        self,
        source: Source,
        batch_size: int | None,
        seed: int,
        classes: Sequence[int] | None = None,
        min_rows: int = 1,
    ) -> None:
        self.min_rows = min_rows
        if batch_size is None:
            if not isinstance(source, NoData):
                raise DataError(f"batch_size is needed for data; choose 1..{len(source)}")
            batch_size = 1
        if not 1 <= batch_size <= len(source):
            raise DataError(
                f"batch_size={batch_size} with {len(source)} examples; choose 1..{len(source)}"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._classes = None if classes is None else np.asarray(classes)
        self.positions = dict.fromkeys((MINIBATCH_STREAM, LARGE_BATCH_STREAM, ASIDE_STREAM), 0)
        self._passes: dict[int, tuple[int, list[int]]] = {}
        """The pass that each stream is in, by stream."""

    @property
    def classes(self) -> np.ndarray | None:
        """Class of every row, if passes are stratified."""
        return self._classes

    @property
    def share(self) -> int:
        """The smallest number of consecutive rows that is fair to every class, of enough rows."""
        classes = 1 if self._classes is None else len(np.unique(self._classes))
        return max(classes * -(-self.least_share // classes), self.min_rows)

    @property
    def rows_of_a_value(self) -> int:
        """Fewest rows that the objective can be asked about: a minibatch, if it wants all."""
        return min(self.min_rows, self.batch_size)

    def minibatch(self, size: int | None = None) -> Batch:
        """The next rows of the minibatch stream (``batch_size`` of them by default)."""
        return self._next(MINIBATCH_STREAM, size or self.batch_size)

    def large(self, size: int | Literal["all"]) -> Batch:
        """The next rows of the large-batch stream; the whole set when ``size`` is "all".

        Raises:
            DataError: ``size`` is larger than the data.
        """
        if size == "all":
            return Batch(self.source, range(len(self.source)))
        if not 1 <= size <= len(self.source):
            raise DataError(
                f"snapshot_size={size} with {len(self.source)} examples; choose "
                f"1..{len(self.source)}, or 'all'"
            )
        return self._next(LARGE_BATCH_STREAM, size)

    def aside(self, size: int) -> Batch:
        """The next rows for a measurement beside the steps, which see the same rows without it."""
        return self._next(ASIDE_STREAM, size)

    def _next(self, stream: int, size: int) -> Batch:
        rows: list[int] = []
        # A run that was begun by an earlier version has no position aside.
        self.positions.setdefault(stream, 0)
        while len(rows) < size:
            number, offset = divmod(self.positions[stream], len(self.source))
            part = self._order(stream, number)[offset : offset + size - len(rows)]
            self.positions[stream] += len(part)
            rows += part
        return Batch(self.source, rows)

    def _order(self, stream: int, number: int) -> list[int]:
        """Rows of pass ``number``: the list that is kept, so a step copies its own rows alone."""
        if self._passes.get(stream, (None,))[0] != number:
            rows = order_of_pass(len(self.source), self.seed, stream, number, self._classes)
            self._passes[stream] = number, rows
        return self._passes[stream][1]


def order_of_pass(
    rows: int, seed: int, stream: int, number: int, classes: np.ndarray | None
) -> list[int]:
    """All rows in the order of a pass.

    Args:
        rows: How many there are.
        seed: Of the order.
        stream: One of the three.
        number: Of the pass.
        classes: Of every row, to spread them evenly; None: uniformly random.
    """
    # Sorting random words: unlike a library's shuffle, the same in every version.
    words = philox.words_numpy(seed, number, stream, 0, -(-rows // 4))
    order = np.argsort(words[:rows], kind="stable")
    found: list[int] = (order if classes is None else stratified(order, classes)).tolist()
    return found


def stratified(order: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """A random order, rearranged so that every class is spread evenly over it.

    Row number r of the n_c rows of a class goes to place (r + 1/2) / n_c of the pass.
    """
    place = np.empty(len(order))
    for label in np.unique(classes):
        members = np.flatnonzero(classes[order] == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    # Ties, classes of equal size, stay in the random order.
    return order[np.argsort(place, kind="stable")]
