"""Trainer's own resuming, from checkpoints that are whole and that are this run's."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from zo_adapt.ranks.launched import is_restarted
from zo_adapt.trainer.state import Checkpoint, last_whole_checkpoint
from zo_adapt.view.selection import owners


class WholeCheckpoints:
    """For Trainer: ``resume_from_checkpoint=True`` means the newest checkpoint that is whole."""

    args: Any
    model: Any
    _checkpoint: Checkpoint | None = None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **options: Any
    ) -> Any:
        """Trainer's own; without any whole checkpoint to resume from, training begins.

        Raises:
            TrajectoryError: The checkpoint was not written by ZOTrainer, or by another run.
        """
        folder = Path(self.args.output_dir or ".")
        if resume_from_checkpoint is None and is_restarted():
            resume_from_checkpoint = last_whole_checkpoint(folder)
        elif resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(folder)
            if resume_from_checkpoint is None:
                warnings.warn(
                    f"{folder} has no whole checkpoint to resume from: training begins",
                    stacklevel=2,
                )
        is_folder = resume_from_checkpoint not in (None, False)
        self._checkpoint = Checkpoint.read(str(resume_from_checkpoint)) if is_folder else None
        try:
            with self.sharing():  # type: ignore[attr-defined]
                output = super().train(resume_from_checkpoint, *positional, **options)  # type: ignore[misc]
        finally:
            self._end_run()
        output.metrics["queries"] = self.queries  # type: ignore[attr-defined]
        return output

    def _end_run(self) -> None:
        """Give up what the run held."""

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        with _parameters_kept(model or self.model):
            super()._load_from_checkpoint(folder, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        with _parameters_kept(self.model):
            super()._load_best_model()  # type: ignore[misc]


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Parameters stay the same objects, of the same dtypes, with the numbers that are loaded.

    peft makes new ones for an adapter that it loads, and makes them fp32; a view that the caller
    has made before holds those that were there. The file has the numbers in the dtype of before: no
    bit is lost.
    """
    before = {name: (p, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)}
    yield
    for path, module, attribute, now in list(owners(model)):
        kept, dtype = before.get(f"{path}.{attribute}" if path else attribute, (now, now.dtype))
        if kept is not now and kept.shape == now.shape:
            kept.data.copy_(now.data)
            module._parameters[attribute] = kept
        elif now.dtype != dtype:
            now.data = now.data.to(dtype)
