"""The batches of ZOTrainer's steps: Trainer's own, and large ones from its training set."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from zo_adapt.data.examples import class_labels
from zo_adapt.data.forms import Collate, Columns, is_column, is_table, rows_given
from zo_adapt.data.samples import Samples, stratified
from zo_adapt.data.sources import Batch, Examples
from zo_adapt.errors import DataError
from zo_adapt.evaluation.objective import Objective
from zo_adapt.trainer.order import AS_DRAWN

EXAMPLES = "examples"
"""Where a batch that is not collated yet has its examples."""


def readable(data: Any) -> Any:
    """A training set as Trainer's loader can read it: tables and columns as one example a row.

    Raises:
        DataError: Several sets, or a loader.
    """
    if isinstance(data, DataLoader):
        raise DataError(
            "train_dataset is a DataLoader; give train_dataset=loader.dataset and, where it has "
            "one of its own, data_collator=loader.collate_fn"
        )
    if not (is_table(data) or isinstance(data, Mapping | tuple)):
        return data
    rows, _ = rows_given(data, None)
    if isinstance(rows, tuple) and all(map(is_column, rows)):
        return list(zip(*rows, strict=True))
    return Columns(rows) if isinstance(rows, Mapping) else rows


class Batching:
    """How examples become batches: by Trainer's collator, or by the objective's own ``collate``.

    What an objective makes of examples need not be tensors (prompts, queries with documents), and
    it makes them on the model's device: not in a loader's worker.

    Args:
        trainer: Whose batches they are.
        objective: Its ``collate``, if it has one, is used unless there is another collator.
        collator: What the trainer was given, or None.

    Attributes:
        is_usual: No collator was given.
    """

    def __init__(self, trainer: Any, objective: Objective | None, collator: Collate | None) -> None:
        own = None if objective is None else objective.collate
        self.is_usual = collator in (None, own)
        self._trainer, self._own = trainer, own if self.is_usual else None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, a data loader leaves examples for the objective whole and uncollated."""
        trainer = self._trainer
        changes = (
            (trainer, "data_collator", _uncollated),
            (trainer.args, "remove_unused_columns", False),
            # Of a stream accelerate would concatenate batches, which only tensors can be.
            (trainer.accelerator.dataloader_config, "dispatch_batches", False),
        )
        before = [getattr(owner, name) for owner, name, _ in changes]
        try:
            for owner, name, value in changes if self._own is not None else ():
                setattr(owner, name, value)
            yield
        finally:
            for (owner, name, _), value in zip(changes, before, strict=True):
                setattr(owner, name, value)

    def received(self, inputs: Any) -> "InputRows | TrainingRows":
        """The rows of what the loader gave."""
        if self._own is None:
            return InputRows(self._trainer._prepare_inputs(inputs))
        return TrainingRows(inputs[EXAMPLES], self._own)

    def training(self, loader: Any) -> "TrainingRows":
        """The rows of the whole training set."""
        prepare, collate = self._trainer._prepare_inputs, loader.collate_fn
        own = self._own or (lambda examples: prepare(collate(examples)))
        return TrainingRows(loader.dataset, own, self._own or collate)


def _uncollated(examples: list[Any]) -> dict[str, list[Any]]:
    return {EXAMPLES: examples}


class TrainerSamples(Samples):
    """Minibatches are what Trainer hands over; large batches are drawn from its training set."""

    def __init__(
        self,
        source: "TrainingRows",
        seed: int,
        min_rows: int = 1,
        stratify: bool = True,
        order: str = AS_DRAWN,
    ) -> None:
        self._training, self.min_rows, self.order = source, min_rows, order
        self._stratify, self._classes, self.knows_rows = stratify, None, False
        self.positions = {}
        if source.has_length:
            classes = source.classes if stratify else None
            super().__init__(source, 1, seed, classes, min_rows)

    @property
    def has_length(self) -> bool:
        """Whether the training set is no stream."""
        return self._training.has_length

    def receive(
        self, rows: "InputRows | TrainingRows", numbers: Sequence[int] | None = None
    ) -> None:
        """The rows of the next step.

        Args:
            rows: What the loader gave.
            numbers: Theirs in the training set, where they are known.
        """
        self.batch_size = len(rows)
        if not self._training.has_length:
            self.source = rows  # of a stream this is all that there is to draw from
        # Spread over a pass, they are spread over any part of it already.
        is_to_arrange = self._stratify and self.order == AS_DRAWN
        classes = rows.classes if is_to_arrange else None
        self.knows_rows = numbers is not None and len(numbers) == len(rows)
        if numbers is not None and self.knows_rows:
            self._inputs = Batch(Numbered(rows, numbers), numbers)
        else:
            self._inputs = Batch(rows, _fair_order(classes, len(rows)))
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

    def large(self, size: int | Literal["all"]) -> Batch:
        """The next rows of the training set, or the step's inputs where they are as many.

        Raises:
            DataError: The training set is a stream, or smaller than ``size``.
        """
        if size == len(self._inputs):
            if self._training.has_length:
                super().large(size)  # what was given are these rows, or stands for them
            return self._inputs
        if not self._training.has_length:
            raise DataError(
                f"a large batch (snapshot_size={size}) cannot be drawn from a train_dataset without"
                " a length; choose optimizer='mezo', or snapshot_size="
                f"{len(self._inputs)}, the training batch"
            )
        return super().large(size)

    def aside(self, size: int) -> Batch:
        """The next rows of the training set; of a stream, rows of the step's inputs."""
        if self._training.has_length:
            return super().aside(size)
        return self.minibatch(min(size, len(self._inputs)))


def _fair_order(classes: Sequence[int] | None, rows: int) -> list[int]:
    """Rows so arranged that parts of the batch are fair to every class, as those of a pass are."""
    order = np.arange(rows)
    arranged = order if classes is None else stratified(order, np.asarray(classes))
    return [int(row) for row in arranged]


class Numbered:
    """Rows by their numbers in the training set."""

    def __init__(self, rows: "InputRows | TrainingRows", numbers: Sequence[int]) -> None:
        self._rows = rows
        self._places = {number: place for place, number in enumerate(numbers)}

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Sequence[int]) -> Any:
        """The batch of these rows."""
        return self._rows.take([self._places[row] for row in rows])


class InputRows:
    """Rows of a collated batch; what has no row for every example is handed on whole.

    Rows are those of tensors and arrays, and the items of lists (text, other columns).
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        columns = [value for value in inputs.values() if _is_column(value)]
        if not columns:
            raise DataError(f"the batch has no tensors or lists with rows, only {sorted(inputs)}")
        # A tensor knows better than a list how many rows there are.
        first = next((one for one in columns if isinstance(one, Tensor)), columns[0])
        self._inputs, self._length = inputs, len(first)

    def __len__(self) -> int:
        return self._length

    @property
    def classes(self) -> list[int] | None:
        """The class of every row where the batch says so."""
        return class_labels(self._inputs)

    def take(self, rows: Sequence[int]) -> Mapping[str, Any]:
        """The batch of these rows."""
        return {name: self._of_rows(value, list(rows)) for name, value in self._inputs.items()}

    def _of_rows(self, value: Any, rows: list[int]) -> Any:
        if not (_is_column(value) and len(value) == self._length):
            return value
        return [value[row] for row in rows] if isinstance(value, list) else value[rows]


def _is_column(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


class TrainingRows(Examples):
    """Rows of examples through a collator, collated once a step.

    A collator may draw (masks, crops): all points of an estimate must see the same draw.

    Args:
        examples, collate: As for ``Examples``.
        given: The collate function as the caller knows it.
    """

    def __init__(self, examples: Any, collate: Collate, given: Collate | None = None) -> None:
        super().__init__(examples, collate)
        self._given = collate if given is None else given
        self._collated: dict[tuple[int, ...], Any] = {}

    @property
    def collate(self) -> Collate:
        """As the caller knows it."""
        return self._given

    def take(self, rows: Sequence[int]) -> Any:
        """The collated batch of these rows, the same one until ``forget``."""
        key = tuple(rows)
        if key not in self._collated:
            self._collated[key] = super().take(key)
        return self._collated[key]

    def forget(self) -> None:
        """Collate anew from here on."""
        self._collated.clear()

    @property
    def has_length(self) -> bool:
        """Whether rows can be drawn; a stream can only be read in order."""
        return hasattr(self._examples, "__len__") and hasattr(self._examples, "__getitem__")

    @property
    def classes(self) -> list[int] | None:
        """The class of every row where the data say so, to stratify large batches."""
        return class_labels(self._examples)
