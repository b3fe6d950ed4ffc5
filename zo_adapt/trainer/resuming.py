"""Trainer's own resuming, from checkpoints that are whole and that are this run's."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from zo_adapt.errors import TrajectoryError
from zo_adapt.loops.around import read_around
from zo_adapt.loops.contents import configured, set_in_modules
from zo_adapt.loops.objective_parts import made_with
from zo_adapt.loops.origin import bound_values, described
from zo_adapt.loops.resume import AROUND, BOUND, CONFIG, MADE_WITH, MODULES, data_settings
from zo_adapt.loops.run import Run
from zo_adapt.ranks.launched import is_restarted
from zo_adapt.trainer.data import TrainerSamples
from zo_adapt.trainer.order import ORDER
from zo_adapt.trainer.state import Checkpoint, begin_log, last_whole_checkpoint, save_state
from zo_adapt.trainer.tuned_view import save_start
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.selection import owners


class WholeCheckpoints:
    """For Trainer: ``resume_from_checkpoint=True`` means the newest checkpoint that is whole."""

    args: Any
    model: Any
    view: ParameterView
    compute_loss_func: Any
    is_first_rank: bool
    _run: Run | None
    _samples: TrainerSamples
    _checkpoint: Checkpoint | None = None
    _is_begun: bool
    _settings_begun: dict[str, Any] | None = None
    """What the run depends on, as it was when the run began: globals may be others since."""

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
            self._end_run()  # type: ignore[attr-defined]
        output.metrics["queries"] = self.queries  # type: ignore[attr-defined]
        return output

    def _begin_log(self, run: Run) -> None:
        folder = Path(self.args.output_dir or ".")
        self._settings_begun = self._settings()
        begin_log(run, folder, self._settings_begun, self._checkpoint)
        if self.args.lora_start_rows and self._checkpoint is None and self.is_first_rank:
            save_start(self.view, folder)
        self._checkpoint, self._is_begun = None, True

    def _settings(self) -> dict[str, Any]:
        """What a run depends on, beside its view, its budget and the model."""
        run = self._run
        if run is None:
            return {}
        optimizer: dict[str, Any] = getattr(run.optimizer, "settings", dict)()
        data = data_settings(self._samples) if self._samples.has_length else {}
        return {
            **optimizer,
            "seed": self.args.seed,
            "batch_size": self.args.train_batch_size,
            **data,
            ORDER: self._samples.order,
            CONFIG: configured(self.view.model),
            MODULES: set_in_modules(self.view.model, self.view.changing),
            "objective": described(run.evaluator.objective),
            "compute_loss_func": described(self.compute_loss_func),
            BOUND: bound_values(run.evaluator.objective, self.compute_loss_func),
            MADE_WITH: made_with(run.evaluator.objective),
            AROUND: read_around(
                self.view,
                run.evaluator.objective,
                self.compute_loss_func,
                type(self).compute_loss,  # type: ignore[attr-defined]
            ),
            "label_smoothing_factor": self.args.label_smoothing_factor,
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._run is not None and self.is_first_rank:
            save_state(self._run, Path(output_dir), self._settings_begun or self._settings())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.view.resolved_at_start = None
        if self._checkpoint is not None:
            self._checkpoint.fit(self.view)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        with _parameters_kept(model or self.model):
            try:
                super()._load_from_checkpoint(folder, model)  # type: ignore[misc]
            except (KeyError, RuntimeError, ValueError, SafetensorError) as error:
                raise TrajectoryError(
                    f"{folder} holds weights that this model does not take ({error!s:.200}); "
                    "resume with the model, the adapter and its options that it was saved from"
                ) from error

    def _load_best_model(self) -> None:
        with _parameters_kept(self.model):
            super()._load_best_model()  # type: ignore[misc]


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Parameters stay the same objects, of the same dtypes, with the numbers that are loaded.

    peft makes new ones for an adapter that it loads, and makes them fp32, as it does with an
    adapter's buffers (VeRA); a view that the caller has made before holds those that were there.
    The file has the numbers in the dtype of before: no bit is lost.
    """
    before = {name: (p, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)}
    dtypes = {name: b.dtype for name, b in model.named_buffers(remove_duplicate=False)}
    yield
    for path, module, attribute, now in list(owners(model)):
        kept, dtype = before.get(f"{path}.{attribute}" if path else attribute, (now, now.dtype))
        if kept is not now and kept.shape == now.shape:
            kept.data.copy_(now.data)
            module._parameters[attribute] = kept
        elif now.dtype != dtype:
            now.data = now.data.to(dtype)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.dtype != (dtype := dtypes.get(name, buffer.dtype)):
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = buffer.to(dtype)
