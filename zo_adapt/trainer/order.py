"""The order of ZOTrainer's batches: that of the steps of ``minimize``."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

from torch.utils.data import RandomSampler, Sampler

from zo_adapt.data.examples import class_labels
from zo_adapt.data.samples import Samples
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.trainer.state import Checkpoint

ORDER = "order of batches"
"""Name of a setting, as an error says it."""
AS_DRAWN = "as Trainer draws them"


class Unread:
    """So many rows, which nobody reads: only their numbers matter."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def take(self, rows: Sequence[int]) -> None:
        """Nothing."""


class SpreadRows(Sampler[int]):
    """The rows that every step of ``minimize`` is made of, classes spread over them if any.

    A loader gives a batch to every step, also to those that draw a large one (snapshots). Such a
    step is given the first rows of its own, so that no part of a pass is left out for it.

    A function of seeds and step: every process draws the same, and an epoch that is resumed goes on
    as it began.

    Args:
        count: How many rows there are.
        classes: Of every row; None: passes are drawn uniformly.
        seed: Of the order.
        batch_size: Rows of a batch; the last one of an epoch may have fewer.
        drop_last: Whether the loader leaves that one out.
        optimizer: Gives what makes the steps, when an epoch begins; None: nothing yet.
    """

    def __init__(
        self,
        count: int,
        classes: Sequence[int] | None,
        seed: int,
        batch_size: int,
        drop_last: bool,
        optimizer: Callable[[], Any],
    ) -> None:
        self._count, self._optimizer = count, optimizer
        whole, rest = divmod(count, batch_size)
        self._sizes = [batch_size] * whole + [rest] * (rest > 0)
        self._steps = whole if drop_last else len(self._sizes)
        self._seed, self._epoch = seed % 2**64, 0
        self._samples = Samples(Unread(count), min(batch_size, count), self._seed, classes)
        self._begun = 0, dict(self._samples.positions)
        """An epoch, and where in the data it begins."""
        self._given: dict[int, list[int]] = {}

    @property
    def order(self) -> str:
        """What a resumed run compares."""
        spread = "" if self._samples.classes is None else "classes spread over them, "
        return f"{spread}as steps read them, seed {self._seed}"

    def set_epoch(self, epoch: int) -> None:
        """Go on with an epoch; Trainer and Accelerate call this."""
        self._epoch = epoch

    def given_to(self, step: int) -> list[int] | None:
        """The rows of a step, by its number from 0 on; asked once. None: not drawn here."""
        for earlier in [one for one in self._given if one < step]:
            del self._given[earlier]
        return self._given.pop(step, None)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        last, positions = self._begun
        if self._epoch < last:
            last, positions = 0, dict.fromkeys(positions, 0)
        self._samples.positions = dict(positions)
        for epoch in range(last, self._epoch):
            for _ in self._batches(epoch):
                pass
        self._begun = self._epoch, dict(self._samples.positions)
        self._given.clear()
        for step, rows in self._batches(self._epoch):
            self._given[step] = rows
            yield from rows

    def _batches(self, epoch: int) -> Iterator[tuple[int, list[int]]]:
        """The steps of an epoch and their rows, from where the samples are."""
        optimizer, samples = self._optimizer(), self._samples
        for number, size in enumerate(self._sizes):
            step, samples.batch_size = epoch * self._steps + number, size
            if number < self._steps and isinstance(optimizer, ZerothOrder):
                batch = optimizer.batch_of(step, samples)
            else:
                batch = samples.minibatch()
            yield step, list(islice(cycle(batch.rows), size))


class SpreadBatches:
    """For Trainer: where rows would be drawn uniformly, they are those of ``minimize``'s steps."""

    args: Any
    train_dataset: Any
    _checkpoint: Checkpoint | None
    state: Any
    _run: Run | None
    _sampler: SpreadRows | None = None
    _train_batch_size: int

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        usual = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        # Another strategy of Trainer's was asked for, or the run was begun in Trainer's order.
        if type(usual) is not RandomSampler or not self.args.stratify or self._goes_on_as_drawn:
            return usual
        data = self.train_dataset if train_dataset is None else train_dataset
        return SpreadRows(
            len(data),
            class_labels(data),
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            self._train_batch_size,
            self.args.dataloader_drop_last,
            lambda: None if self._run is None else self._run.optimizer,
        )

    def _numbers(self) -> list[int] | None:
        """Those of the rows that the loader has given to this step, where they are known."""
        if self._sampler is None or self.args.ignore_data_skip:
            return None
        return self._sampler.given_to(self.state.global_step)

    @property
    def _goes_on_as_drawn(self) -> bool:
        """Whether a run is resumed that drew as Trainer does, as those of versions before."""
        kept = self._checkpoint
        return kept is not None and kept.state.get("settings", {}).get(ORDER, AS_DRAWN) == AS_DRAWN


def sampler_of(loader: Any) -> SpreadRows | None:
    """What draws the rows of a loader, where it is this package's."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return sampler if isinstance(sampler, SpreadRows) else None
