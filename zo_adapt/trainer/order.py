"""The order of ZOTrainer's minibatches: that of ``minimize``, the classes spread over every one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import RandomSampler, Sampler

from zo_adapt.data.examples import class_labels
from zo_adapt.data.samples import MINIBATCH_STREAM, order_of_pass
from zo_adapt.trainer.state import Checkpoint

ORDER = "order of batches"
"""Name of a setting, as an error says it."""
AS_DRAWN = "as Trainer draws them"


class SpreadRows(Sampler[int]):
    """All rows, as one pass of ``minimize`` draws them, anew in every epoch.

    A function of seed and epoch: every process draws the same, and an epoch that is resumed goes on
    as it began.
    """

    def __init__(self, classes: Sequence[int], seed: int) -> None:
        self._classes, self._seed, self._epoch = np.asarray(classes), seed % 2**64, 0

    @property
    def order(self) -> str:
        """What a resumed run compares."""
        return f"classes spread over them, seed {self._seed}"

    def set_epoch(self, epoch: int) -> None:
        """Go on with the pass of an epoch; Trainer and Accelerate call this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._classes)

    def __iter__(self) -> Iterator[int]:
        rows = len(self._classes)
        return iter(order_of_pass(rows, self._seed, MINIBATCH_STREAM, self._epoch, self._classes))


class SpreadBatches:
    """For Trainer: where rows would be drawn uniformly, their classes are spread over batches."""

    args: Any
    train_dataset: Any
    _checkpoint: Checkpoint | None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        usual = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        # Another strategy of Trainer's was asked for, or the run was begun in Trainer's order.
        if type(usual) is not RandomSampler or not self.args.stratify or self._goes_on_as_drawn:
            return usual
        classes = class_labels(self.train_dataset if train_dataset is None else train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return usual if classes is None else SpreadRows(classes, seed)

    @property
    def _goes_on_as_drawn(self) -> bool:
        """Whether a run is resumed that drew as Trainer does, as those of versions before."""
        kept = self._checkpoint
        return kept is not None and kept.state.get("settings", {}).get(ORDER, AS_DRAWN) == AS_DRAWN


def order_of(loader: Any) -> str:
    """The order that a loader gives its rows in."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return sampler.order if isinstance(sampler, SpreadRows) else AS_DRAWN
