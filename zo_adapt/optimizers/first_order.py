"""First-order baselines: backpropagation under the same loop and the same count of queries."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zo_adapt.data.samples import Samples
from zo_adapt.errors import NonFiniteObjectiveError, ObjectiveError
from zo_adapt.evaluation.protocol import Evaluator
from zo_adapt.optimizers.rule import Budget
from zo_adapt.optimizers.schedule import Schedule, schedule_named
from zo_adapt.options import positive
from zo_adapt.step import Step
from zo_adapt.view.parameters import ParameterView


class FirstOrder:
    """A torch.optim optimizer over a view: b queries a step, the backward pass is not counted.

    Args:
        lr: Learning rate.
        schedule: "constant", "linear", "cosine" or a callable of the progress.
        weight_decay: As torch.optim has it.

    Raises:
        OptionError: A number outside its range.
        ObjectiveError: The objective has no gradient (raised by the first step).
        NonFiniteObjectiveError: The loss or its gradient is not finite; nothing was changed.
    """

    kind: type[torch.optim.Optimizer]

    def __init__(
        self, lr: float, *, schedule: str | Schedule = "linear", weight_decay: float = 0.0
    ) -> None:
        self.lr = positive("lr", lr)
        self.schedule = schedule_named(schedule)
        self.weight_decay = weight_decay

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Begin a run on a view."""
        self._steps = 0
        self._tensors = {name: tensor.detach() for name, tensor in view.tensors.items()}
        groups = [
            {
                "params": [
                    self._tensors[name] for name in view.tensors if view.group_of(name) is group
                ],
                "factor": group.lr,
            }
            for group in view.groups
        ]
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        self._optimizer = self.kind([g for g in groups if g["params"]], **options)

    def step(self, evaluator: Evaluator, samples: Samples, budget: Budget) -> Step:
        """One gradient step on one minibatch."""
        factor = self.schedule(budget.used(self._steps, evaluator.queries))
        batch = samples.minibatch()
        evaluator.reserve(len(batch))
        live = list(evaluator.view.tensors.values())
        with _differentiable(live), evaluator.ready():
            loss = evaluator.sign * _mean_loss(evaluator.objective(batch.content))
            gradients = torch.autograd.grad(loss, live, allow_unused=True)
        _check_finite(loss, gradients)
        for shadow, gradient in zip(self._tensors.values(), gradients, strict=True):
            shadow.grad = gradient
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * factor * group["factor"]
        self._optimizer.step()
        self._steps += 1
        self._optimizer.zero_grad()
        return Step(self._steps, 0, float(loss.detach()), self.lr * factor, math.nan)


class SGD(FirstOrder):
    """Stochastic gradient descent (torch.optim.SGD), the first-order baseline.

    Example:
        >>> SGD(lr=1e-2).lr
        0.01
    """

    kind = torch.optim.SGD


class Adam(FirstOrder):
    """Adam with decoupled decay (torch.optim.AdamW), the first-order baseline.

    Example:
        >>> Adam(lr=1e-3).lr
        0.001
    """

    kind = torch.optim.AdamW


@contextmanager
def _differentiable(tensors: list[Tensor]) -> Iterator[None]:
    """``requires_grad`` on the view inside, as it was afterwards."""
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor, flag in zip(tensors, before, strict=True):
            tensor.requires_grad_(flag)


def _check_finite(loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
    finite = all(bool(t.isfinite().all()) for t in (loss.detach(), *gradients) if t is not None)
    if not finite:
        raise NonFiniteObjectiveError(
            f"the loss {float(loss.detach())} or its gradient is not finite; "
            "a smaller lr keeps it finite"
        )


def _mean_loss(returned: object) -> Tensor:
    if not isinstance(returned, Tensor) or not returned.requires_grad:
        raise ObjectiveError(
            f"the objective returned {type(returned).__name__} without a gradient; a first-order "
            "optimizer needs a differentiable torch loss, MeZO and MeZOSVRG do not"
        )
    return returned.mean()
