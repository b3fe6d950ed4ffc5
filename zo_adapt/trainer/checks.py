"""Contradictions in what ZOTrainer is given, found before any work."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from zo_adapt.errors import OptionError
from zo_adapt.loops.arguments import check_optimizer, check_view
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import is_sharded

OPTIONS = (
    "learning_rate",
    "displacement",
    "perturbation_scale",
    "num_directions",
    "one_sided",
    "shaping",
    "normalize",
    "scale_memory",
    "snapshot_interval",
    "snapshot_size",
    "snapshot_lr",
    "coupling",
    "coordinates",
    "restart_probability",
    "momentum",
)
"""Arguments of ZOConfig that describe the optimizer; None leaves it its own default."""


IGNORED = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "neftune_noise_alpha",
)
"""Arguments of Trainer's that belong to gradients, or to noise in training mode."""


def warn_of_ignored(args: Any, has_objective: bool, options: Mapping[str, Any]) -> None:
    """Say once which settings that the user made have no effect.

    Args:
        args: Trainer's arguments.
        has_objective: Whether an objective takes the place of Trainer's loss.
        options: Trainer's further keywords.
    """
    usual = {field.name: field.default for field in dataclasses.fields(args)}
    names = [
        name
        for name in IGNORED
        if name in usual and getattr(args, name) not in (usual[name], None, False)
    ]
    if args.fp16 and args.device.type == "cpu":
        names.append("fp16 (on a CPU; bf16 has one)")
    if has_objective and args.label_smoothing_factor:
        names.append("label_smoothing_factor (the objective is the loss)")
    if has_objective and args.torch_compile:
        names.append("torch_compile (the objective calls the model that it was made with)")
    if has_objective and options.get("compute_loss_func") is not None:
        names.append("compute_loss_func (the objective is the loss)")
    if names:
        warnings.warn(
            f"these have no effect in ZOTrainer, which makes no gradients: {', '.join(names)}; "
            "leave them out",
            stacklevel=4,
        )


def check_arguments(args: Any, wanted: type[Any]) -> None:
    """Refuse arguments of another class, and what would need code of its own."""
    if not isinstance(args, wanted):
        raise OptionError(
            f"args is {type(args).__name__}; give a {wanted.__name__}, which takes the same "
            "arguments"
        )
    if args.deepspeed or args.fsdp:
        raise OptionError(
            f"deepspeed={args.deepspeed}, fsdp={args.fsdp}; ZOTrainer has no optimizer states and "
            "no gradients to shard: leave them out, and start it with torchrun, every process with "
            "the whole model"
        )


def check_model(model: object) -> None:
    """Refuse a model whose parts lie on several processes."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    if any(map(is_sharded, parameters)):
        raise OptionError(
            "ZOTrainer with a model that lies in parts on several processes (tensor parallel, "
            "FSDP2): its checkpoints are of whole models; tune it by minimize, whose trajectory is "
            "the checkpoint, or load the model whole on every process"
        )


def check_watched(tracked: Mapping[str, object], source: Any) -> None:
    """Refuse to watch the noise of estimates along a stream, of which no rows can be drawn."""
    if tracked and not source.has_length:
        raise OptionError(
            f"{next(iter(tracked))!r} watches the noise of estimates on rows of train_dataset, "
            "which has no length to draw them from; leave it out, or give the examples as a list"
        )


def check_choices(
    args: Any,
    view: ParameterView | None,
    objective: object,
    zo_optimizer: object,
    options: Mapping[str, Any],
) -> None:
    """Refuse the same thing said twice, or something that would be ignored.

    Raises:
        OptionError: One of these.
        ArgumentTypeError: A view or an optimizer of another kind.
    """
    if view is not None:
        check_view(view)
    if zo_optimizer is not None:
        check_optimizer(zo_optimizer, "zo_optimizer")
    in_args = {name for name in OPTIONS if getattr(args, name) is not None}
    if zo_optimizer is not None and in_args:
        raise OptionError(f"zo_optimizer is given, and so is {sorted(in_args)} in args; give one")
    if view is not None and args.noise is not None:
        raise OptionError(f"noise={args.noise!r} with a view, which has its own; leave it out")
    for name in ("optimizers", "optimizer_cls_and_kwargs"):
        if options.get(name) not in (None, (None, None)):
            raise OptionError(f"{name} is for torch optimizers; give zo_optimizer=...")
    if options.get("model_init") is not None and (view is not None or objective is not None):
        raise OptionError("model_init makes a model for every run; leave out view and objective")
