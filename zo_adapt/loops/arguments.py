"""Checks of what users pass: where it is of another kind, the error says what to pass instead."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_adapt.data.examples import Data
from zo_adapt.errors import ArgumentTypeError
from zo_adapt.evaluation.objective import Objective, as_objective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.optimizers.named import OPTIMIZERS
from zo_adapt.trajectory.file import TrajectoryFile
from zo_adapt.view.parameters import ParameterView


def check_view(view: Any) -> None:
    """Refuse what is not a view."""
    if isinstance(view, ParameterView):
        return
    if isinstance(view, nn.Module):
        way_out = "say what of it may change: ParameterView.trainable(model), or .full(model)"
    elif isinstance(view, Mapping):
        way_out = "make a view of tensors by ParameterView(tensors)"
    else:
        way_out = "give a ParameterView"
    raise ArgumentTypeError(f"view is {_kind(view)}; {way_out}")


def checked_objective(objective: Any) -> Objective:
    """The objective, of anything that is one.

    Raises:
        ArgumentTypeError: Names what to give.
    """
    if isinstance(objective, ParameterView):
        raise ArgumentTypeError(
            "the objective is a ParameterView; the order is (objective, view, data, ...)"
        )
    return as_objective(objective)


def check_optimizer(optimizer: Any, name: str = "optimizer") -> None:
    """Refuse what is not an optimizer of this package, or of its form."""
    if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
        way_out = f"give the object, {OPTIMIZERS[optimizer].__name__}()"
    elif isinstance(optimizer, type):
        way_out = f"give an instance of it, {optimizer.__name__}()"
    elif isinstance(optimizer, torch.optim.Optimizer):
        way_out = "a torch optimizer needs gradients; give MeZO(), or zo_adapt.Adam(lr=...)"
    elif hasattr(optimizer, "start") and hasattr(optimizer, "step"):
        return
    else:
        way_out = "give MeZO(), MeZOSVRG(), ... or None for the recommended one"
    raise ArgumentTypeError(f"{name} is {_kind(optimizer)}; {way_out}")


def as_evaluation(evaluation: Any) -> EvaluationOptions:
    """The options as they are, or those of a way of evaluating that stands for them.

    Raises:
        ArgumentTypeError: It is something else.
    """
    if isinstance(evaluation, EvaluationOptions):
        check_evaluator(evaluation.evaluator)
        return evaluation
    if isinstance(evaluation, type) or not hasattr(evaluation, "bound_to"):
        raise ArgumentTypeError(
            f"evaluation is {_kind(evaluation)}; give EvaluationOptions(micro_batch_size=..., "
            "...), or ServedEvaluator(server)"
        )
    return EvaluationOptions(evaluator=evaluation)


def check_evaluator(evaluator: Any) -> None:
    """Refuse anything but a way of evaluating, or None."""
    if evaluator is not None and (
        isinstance(evaluator, type) or not hasattr(evaluator, "bound_to")
    ):
        raise ArgumentTypeError(
            f"evaluator is {_kind(evaluator)}; give ServedEvaluator(server), or None for this "
            "process"
        )


def check_run_files(trajectory: Any, callback: Any) -> None:
    """Refuse a trajectory that is no file, and a callback that cannot be called."""
    if not isinstance(trajectory, str | Path | TrajectoryFile | None):
        raise ArgumentTypeError(
            f"trajectory is {_kind(trajectory)}; give a path, or TrajectoryFile(path)"
        )
    if callback is not None and not callable(callback):
        raise ArgumentTypeError(
            f"callback is {_kind(callback)}; give a function of a Step, or None"
        )


def check_data(data: Any) -> None:
    """Refuse a view or an optimizer where data belong.

    Raises:
        ArgumentTypeError: Names the order of the arguments.
    """
    given = data.examples if isinstance(data, Data) else data
    is_optimizer = hasattr(given, "start") and hasattr(given, "step")
    if isinstance(given, ParameterView) or (is_optimizer and not isinstance(given, range)):
        raise ArgumentTypeError(
            f"data is {_kind(given)}; the order is (objective, view, data, optimizer), with "
            "data=None for a function without data"
        )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
