"""What ZOTrainer tunes: its view, and what stands where Trainer wants a torch optimizer.

LoRA adapters may start where the training data are, before the first step.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_adapt.data.samples import Samples
from zo_adapt.errors import NoMatchingParameterError, OptionError, TrajectoryError
from zo_adapt.evaluation.objective import Objective
from zo_adapt.loops.loop import announce
from zo_adapt.loops.lora_start import start_on
from zo_adapt.trainer.data import TrainingRows
from zo_adapt.trainer.state import INITIAL, Checkpoint
from zo_adapt.view.group import Group, Groups
from zo_adapt.view.parameters import ParameterView


class TunedView:
    """For Trainer: what is tuned, on resuming what was tuned before."""

    args: Any
    model: Any
    optimizer: Any
    _given: tuple[Any, Any, Any]
    _checkpoint: Checkpoint | None
    _modes: list[tuple[nn.Module, bool]]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """What Trainer takes for its torch optimizer: it holds the rate and moves nothing."""
        self._modes = [(module, module.training) for module in self.model.modules()]
        if self.optimizer is None:
            self.view = self._new_view()
            # Schedules are functions of the share of the budget: some need a rate to be a share of.
            rate = {"lr": self.args.learning_rate or 1.0}
            self.optimizer = AlreadyApplied(list(self.view.tensors.values()), rate)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def keep_modes(self) -> None:
        """Leave every module in the mode it was in: Trainer of transformers 5.0 has changed it."""
        for module, training in self._modes:
            module.training = training

    def _new_view(self) -> ParameterView:
        view: ParameterView | None = self._given[0]
        kept = self._checkpoint
        if view is None:
            # On resuming, the weights are those of the checkpoint already: what suits them now is
            # not what suited them at the start.
            groups: Groups = "auto" if kept is None else kept.groups
            noise = self.args.noise or "gaussian"
            try:
                view = ParameterView.trainable(self.model, noise=noise, groups=groups)
            except NoMatchingParameterError as error:
                if kept is None:
                    raise
                raise TrajectoryError(
                    f"{kept.folder} belongs to another view, whose groups are not here: {error}"
                ) from error
        if self.args.weight_decay and self._given[2] is None and view.model is not None:
            decaying = self.get_decay_parameter_names(view.model)  # type: ignore[attr-defined]
            view = without_decay(view, view.tensors.keys() - set(decaying))
        return view

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not has_no_values(model):
            super()._move_model_to_device(model, device)  # type: ignore[misc]


class AlreadyApplied(torch.optim.Optimizer):
    """Holds the parameters and the rate: no state, and no step of its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the training step has moved the weights."""


def without_decay(view: ParameterView, names: Iterable[str]) -> ParameterView:
    """The same view, of which some tensors do not decay: in Trainer LayerNorms and biases.

    Args:
        view: The view.
        names: Of tensors; those that it does not hold are passed over.

    Example:
        >>> import torch
        >>> view = ParameterView({"weight": torch.ones(2), "bias": torch.ones(2)})
        >>> without_decay(view, ["bias"]).groups
        (Group(names=['bias'], lr=1.0, perturbation_scale=1.0, decays=False), \
Group('', lr=1.0, perturbation_scale=1.0))
    """
    exempt = {name for name in names if name in view.tensors and view.group_of(name).decays}
    parts = [
        (group, [name for name in view.tensors if name in exempt and view.group_of(name) is group])
        for group in view.groups
    ]
    new = [
        Group(
            names=members,
            lr=group.lr,
            perturbation_scale=group.perturbation_scale,
            decays=False,
        )
        for group, members in parts
        if members and group.lr * group.perturbation_scale > 0  # what rests does not decay
    ]
    if not new:
        return view
    changed = ParameterView(
        view.tensors,
        model=view.model,
        noise=view.noise.name,
        groups=[*new, *view.groups[:-1]],
        scratch="layer" if view.by_layer else "copy",
    )
    changed.displacement = view.displacement
    return changed


def has_no_values(model: nn.Module) -> bool:
    """Whether the base is served, and here are its shapes alone."""
    return any(parameter.is_meta for parameter in model.parameters())


def start_adapters(trainer: Any, objective: Objective, source: TrainingRows) -> int:
    """Set the adapters' A on training examples, and say so.

    Returns:
        Forwards of one sample that it took.

    Raises:
        OptionError: The training set is a stream.
        AdapterError: No LoRA on a linear layer, or one that has been tuned.
    """
    args, model = trainer.args, trainer.view.model
    if not source.has_length:
        raise OptionError(
            f"lora_start_rows={args.lora_start_rows} with a train_dataset without a length; call "
            "initialise_lora on some of its examples before training"
        )
    count = min(args.lora_start_rows, len(source))
    classes = source.classes if args.stratify else None
    batch = Samples(source, count, args.seed, classes).minibatch()
    start = start_on(model, objective, batch.micro_batches(args.train_batch_size))
    source.forget()
    announce(
        f"LoRA's A of {len(start.layers)} layers from the inputs of {count:,} examples: "
        f"{start.queries:,} forwards of one sample, beside the budget",
        shown=trainer.is_first_rank and not args.disable_tqdm,
    )
    return start.queries


def save_start(view: ParameterView, folder: Path) -> None:
    """Save the adapters as the trajectory begins."""
    model: Any = view.model
    model.save_pretrained(folder / INITIAL)
