"""The batches of ZOTrainer's steps: Trainer's own, and large ones from its training set."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from zo_adapt.data import Batch, Examples, Samples, class_labels, stratified
from zo_adapt.errors import DataError


class TrainerSamples(Samples):
    """Minibatches are what Trainer hands over; large batches are drawn from its training set."""

    def __init__(self, source: "TrainingRows", seed: int, min_rows: int = 1) -> None:
        self._training, self.min_rows = source, min_rows
        self._classes = None
        self.positions = {}
        if source.has_length:
            super().__init__(source, 1, seed, source.classes, min_rows)

    def receive(self, inputs: Mapping[str, Any]) -> None:
        """The inputs of the next step."""
        rows = InputRows(inputs)
        self.batch_size = len(rows)
        if not self._training.has_length:
            self.source = rows  # of a stream this is all that there is to draw from
        self._inputs = Batch(rows, _fair_order(inputs, len(rows)))
        self._training.forget()

    def minibatch(self, size: int | None = None) -> Batch:
        """The step's inputs, or the first rows of them."""
        if size is None or size == len(self._inputs):
            return self._inputs
        if size > len(self._inputs):
            raise DataError(
                f"a step asks for {size} rows, the training batch has {len(self._inputs)}; raise "
                "per_device_train_batch_size"
            )
        return Batch(self._inputs.source, self._inputs.rows[:size])

    def large(self, size: int | None) -> Batch:
        """The next rows of the training set, or the step's inputs where they are as many.

        Raises:
            DataError: The training set is a stream, or smaller than ``size``.
        """
        if size == len(self._inputs):
            return self._inputs
        if not self._training.has_length:
            raise DataError(
                f"a large batch (snapshot_size={size}) cannot be drawn from a train_dataset without"
                " a length; choose optimizer='mezo', or snapshot_size="
                f"{len(self._inputs)}, the training batch"
            )
        return super().large(size)


def _fair_order(inputs: Mapping[str, Any], rows: int) -> list[int]:
    """Rows so arranged that parts of the batch are fair to every class, as those of a pass are."""
    classes = class_labels(inputs)
    order = np.arange(rows)
    arranged = order if classes is None else stratified(order, np.asarray(classes))
    return [int(row) for row in arranged]


class InputRows:
    """Rows of a collated batch; what has no row for every example is handed on whole."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        lengths = [len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 0]
        if not lengths:
            raise DataError(f"the batch has no tensors with rows, only {sorted(inputs)}")
        self._inputs, self._length = inputs, lengths[0]

    def __len__(self) -> int:
        return self._length

    def take(self, rows: Sequence[int]) -> Mapping[str, Any]:
        """The batch of these rows."""
        index = list(rows)
        return {
            name: value[index] if self._has_rows(value) else value
            for name, value in self._inputs.items()
        }

    def _has_rows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self._length


class TrainingRows(Examples):
    """Rows of the training set through Trainer's collator, collated once a step.

    A collator may draw (masks, crops): all points of an estimate must see the same draw.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], prepare: Callable[[Any], Any]
    ) -> None:
        super().__init__(dataset, lambda examples: prepare(collate(examples)))
        self._taken: dict[tuple[int, ...], Any] = {}

    def take(self, rows: Sequence[int]) -> Any:
        """The collated batch of these rows, the same one until ``forget``."""
        key = tuple(rows)
        if key not in self._taken:
            self._taken[key] = super().take(key)
        return self._taken[key]

    def forget(self) -> None:
        """Collate anew from here on."""
        self._taken.clear()

    @property
    def has_length(self) -> bool:
        """Whether rows can be drawn; a stream can only be read in order."""
        return hasattr(self._examples, "__len__") and hasattr(self._examples, "__getitem__")

    @property
    def classes(self) -> list[int] | None:
        """The class of every row where the data say so, to stratify large batches."""
        return class_labels(self._examples)
