"""First-order baselines: backpropagation under the same loop and the same count of queries."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.errors import NonFiniteObjectiveError, ObjectiveError, StepTooLargeError, ViewError
from zo_adapt.evaluation.protocol import Evaluator
from zo_adapt.interrupt import undone, uninterrupted
from zo_adapt.optimizers.schedule import Budget, Schedule, described, schedule_named
from zo_adapt.optimizers.settings import Settings
from zo_adapt.options import not_negative, positive
from zo_adapt.term import Step
from zo_adapt.view.parameters import ParameterView


@dataclass
class _Run:
    """One run: the view's tensors as torch.optim sees them, and what moves them."""

    tensors: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    steps: int = 0


@dataclass(frozen=True, repr=False)
class FirstOrder(Settings):
    """A torch.optim optimizer over a view: b queries a step, the backward pass is not counted.

    Args:
        lr: Learning rate.
        schedule: "constant", "linear", "cosine" or a callable of the progress.
        weight_decay: As torch.optim has it.

    Raises:
        OptionError: A number outside its range.
        ObjectiveError: The objective has no gradient (raised by the first step).
        NonFiniteObjectiveError: The loss or its gradient is not finite; nothing was changed.
        StepTooLargeError: A weight might leave its dtype's range; nothing was changed.
    """

    lr: float
    _: KW_ONLY
    schedule: str | Schedule = "linear"
    weight_decay: float = 0.0
    kind: ClassVar[type[torch.optim.Optimizer]]

    def __post_init__(self) -> None:
        schedule_named(self.schedule)
        decay = not_negative("weight_decay", self.weight_decay)
        self._set(lr=positive("lr", self.lr), weight_decay=decay)

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Begin a run on a view.

        Raises:
            ViewError: The weights are not finite, or of a dtype that the optimizer cannot step in.
        """
        view.check_whole(type(self).__name__)
        view.norms()
        self._check_dtypes(view)
        # Detached, they share the view's memory, and the view's tensors never hold a gradient.
        tensors = {name: tensor.detach() for name, tensor in view.tensors.items()}
        groups = [
            {
                "params": [tensors[name] for name in tensors if view.group_of(name) is group],
                "factor": group.lr,
            }
            for group in view.groups
        ]
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        optimizer = self.kind([g for g in groups if g["params"]], **options)
        self._set(_run=_Run(tensors, optimizer))

    def _check_dtypes(self, view: ParameterView) -> None:
        """Refuse dtypes that the optimizer's own numbers do not fit; for subclasses."""

    def step(self, evaluator: Evaluator, samples: Samples, budget: Budget) -> Step:
        """One gradient step on one minibatch."""
        run: _Run = vars(self)["_run"]
        factor = schedule_named(self.schedule)(budget.used(run.steps, evaluator.queries))
        batch = samples.minibatch()
        evaluator.reserve(len(batch))
        loss, gradients = backpropagated(evaluator, batch)
        # Before anything is written: the weights stay those of the last good step.
        _check_finite(loss, gradients)
        _check_room(run, gradients, self.lr * factor, self.weight_decay)
        for shadow, gradient in zip(run.tensors.values(), gradients, strict=True):
            shadow.grad = gradient
        for group in run.optimizer.param_groups:
            group["lr"] = self.lr * factor * group["factor"]
        with uninterrupted():
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.steps += 1
        return Step(run.steps, 0, float(loss.detach()), self.lr * factor, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, as JSON can hold it; the moments are ``tensors``."""
        run: _Run = vars(self)["_run"]
        return {"steps": run.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ``start`` comes first."""
        vars(self)["_run"].steps = state["steps"]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that torch keeps between steps, as "exp_avg/name of the weight"."""
        run: _Run = vars(self)["_run"]
        return {
            f"{kind}/{name}": moment
            for name, tensor in run.tensors.items()
            for kind, moment in run.optimizer.state[tensor].items()
            if isinstance(moment, Tensor)
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what ``tensors`` gave."""
        run: _Run = vars(self)["_run"]
        for key, moment in tensors.items():
            kind, _, name = key.partition("/")
            tensor = run.tensors[name]
            # Step counts stay where torch keeps them, on the CPU.
            place = tensor.device if moment.ndim else moment.device
            run.optimizer.state[tensor][kind] = moment.to(place).clone()

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, for a log and to compare on resuming."""
        own = super().settings() | {"schedule": described(self.schedule)}
        return {"optimizer": type(self).__name__, **own}


@dataclass(frozen=True, repr=False)
class SGD(FirstOrder):
    """Stochastic gradient descent (torch.optim.SGD), the first-order baseline.

    Args:
        lr: Learning rate.
        schedule: "constant", "linear", "cosine" or a callable of the progress.
        weight_decay: As torch.optim has it.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> SGD(lr=1e-2)
        SGD(lr=0.01)
    """

    kind = torch.optim.SGD


@dataclass(frozen=True, repr=False)
class Adam(FirstOrder):
    """Adam with decoupled decay (torch.optim.AdamW), the first-order baseline.

    Args:
        lr: Learning rate.
        schedule: "constant", "linear", "cosine" or a callable of the progress.
        weight_decay: As torch.optim has it.

    Raises:
        OptionError: A number outside its range.
        ViewError: (when a run begins) Weights in float16, in which Adam's eps is 0.

    Example:
        >>> Adam(lr=1e-3)
        Adam(lr=0.001)
    """

    kind = torch.optim.AdamW

    def _check_dtypes(self, view: ParameterView) -> None:
        for name, tensor in view.tensors.items():
            if tensor.dtype == torch.float16:
                raise ViewError(
                    f"{name!r} is float16, in which Adam's eps of 1e-8 is 0, so that its first "
                    "step is infinite; make the view float32 or bfloat16, or use SGD or MeZO"
                )


def backpropagated(evaluator: Evaluator, batch: Batch) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The loss of a batch and its gradient by the view's tensors; None of one that is not read.

    Raises:
        ObjectiveError: The objective has no gradient.
    """
    live = list(evaluator.view.tensors.values())
    with _differentiable(live), evaluator.ready():
        loss = evaluator.sign * _mean_loss(evaluator.objective(batch.content))
        return loss, torch.autograd.grad(loss, live, allow_unused=True)


@contextmanager
def _differentiable(tensors: list[Tensor]) -> Iterator[None]:
    """``requires_grad`` on the view inside, as it was afterwards."""

    def changes() -> Iterator[Callable[[], Any]]:
        for tensor in tensors:
            yield partial(tensor.requires_grad_, tensor.requires_grad)
            tensor.requires_grad_(True)

    with undone(changes()), torch.enable_grad():
        yield


def _check_finite(loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
    tensors = [t for t in (loss.detach(), *gradients) if t is not None]
    if not all(_numbers([t.isfinite().all() for t in tensors])):
        raise NonFiniteObjectiveError(
            f"the loss {float(loss.detach())} or its gradient is not finite; "
            "a smaller lr keeps it finite"
        )


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """Scalars of any device, waited for once: a GPU would be waited for at every single one."""
    numbers = torch.stack([v.to(values[0].device, torch.float64) for v in values]).tolist()
    return list(map(float, numbers))


def _check_room(
    run: _Run, gradients: Sequence[Tensor | None], lr: float, weight_decay: float
) -> None:
    """Refuse a step after which a weight might be infinite."""
    moved = [
        (name, tensor, gradient)
        for (name, tensor), gradient in zip(run.tensors.items(), gradients, strict=True)
        if gradient is not None and tensor.numel()
    ]
    largest = [torch.linalg.vector_norm(t, math.inf) for _, *both in moved for t in both]
    sizes = iter(_numbers(largest) if largest else ())
    for (name, tensor, _), weight, slope in zip(moved, sizes, sizes, strict=True):
        factor = lr * max(group["factor"] for group in run.optimizer.param_groups)
        # AdamW's own step is at most (1 - beta1) / sqrt(1 - beta2) < 4 times the rate.
        farthest = factor * (max(slope, 4.0) + weight_decay * weight)
        limit = torch.finfo(tensor.dtype).max
        if not weight + farthest <= limit:
            raise StepTooLargeError(
                f"a step of up to {farthest:.3g} from weights of up to {weight:.3g} in {name!r} "
                f"does not fit {tensor.dtype} (at most {limit:.3g}); use a smaller lr"
            )


def _mean_loss(returned: object) -> Tensor:
    if not isinstance(returned, Tensor) or not returned.requires_grad:
        raise ObjectiveError(
            f"the objective returned {type(returned).__name__} without a gradient; a first-order "
            "optimizer needs a differentiable torch loss, MeZO and MeZOSVRG do not"
        )
    return returned.mean()
