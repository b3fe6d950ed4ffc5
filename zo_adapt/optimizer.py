"""What every optimizer is: ``step`` for the loops, and ask / tell where values are enough."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from zo_adapt import philox
from zo_adapt.data import Samples
from zo_adapt.errors import FlatObjectiveWarning, OptionError, PerturbationError
from zo_adapt.group import Group
from zo_adapt.objective import Evaluation, Evaluator, Probe
from zo_adapt.rule import Annealing, RunningScale, Schedule, descent, schedule_named
from zo_adapt.term import Terms, Update
from zo_adapt.view import ParameterView

SEED_STREAM = 3
FLAT_STEPS = 20
"""Steps in a row without any difference in loss after which the user is warned."""


class StepInfo(NamedTuple):
    """What one step did.

    Args:
        value: Mean loss of the step's batch where the weights were (the pair's mean).
        lr: Learning rate applied, schedule and annealing included.
        projected_gradient: Root mean square of the step's projected gradients; NaN first-order.
        update: The terms applied; empty for a first-order step.
        kind: "minibatch", or "snapshot" for a large-batch step.
    """

    value: float
    lr: float
    projected_gradient: float
    update: Update
    kind: str = "minibatch"


class Optimizer(Protocol):
    """Anything the loops can drive."""

    def start(self, view: ParameterView, seed: int) -> None:
        """Forget everything and begin a run: same seed, same run."""

    def step(self, evaluator: Evaluator, samples: Samples, progress: float) -> StepInfo:
        """Evaluate, then change the view once.

        Raises:
            BudgetExhausted: The step needs more queries than are left; nothing was done.
        """


class ZerothOrder(ABC):
    """Base of the optimizers that see values only: ``ask`` for probes, ``tell`` their values.

    Args:
        lr: Learning rate; None chooses the normalised step with the default of the class.
        perturbation_scale: mu, in the parameters' units.
        num_directions: K.
        normalize: Divide the step by the running root mean square of the projected gradients; None:
            exactly when ``lr`` is None, for a rate given in absolute terms is taken at its word.
        schedule: "constant", "linear", "cosine" or a callable of the progress through the budget;
            None: "linear" when normalised, else "constant".
        weight_decay: Decoupled, as in AdamW.
        scale_memory: beta of the running scale.

    Raises:
        OptionError: A number outside its range.
    """

    default_lr: float = 1e-2

    def __init__(
        self,
        lr: float | None,
        *,
        perturbation_scale: float,
        num_directions: int,
        normalize: bool | None,
        schedule: str | Schedule | None,
        weight_decay: float,
        scale_memory: float,
        annealing: Annealing | None = None,
    ) -> None:
        self.normalize = lr is None if normalize is None else normalize
        self.lr = positive("lr", self.default_lr if lr is None else lr)
        self.perturbation_scale = positive("perturbation_scale", perturbation_scale)
        self.num_directions = at_least_one("num_directions", num_directions)
        default = "linear" if self.normalize else "constant"
        self.schedule = schedule_named(schedule if schedule is not None else default)
        if not 0 <= weight_decay < 1 / self.lr:
            raise OptionError(f"weight_decay={weight_decay}; choose 0 <= weight_decay < 1/lr")
        self.weight_decay = weight_decay
        if not 0 <= scale_memory < 1:
            raise OptionError(f"scale_memory={scale_memory}; choose 0 <= scale_memory < 1")
        self.scale_memory = scale_memory
        self.annealing = annealing
        self.begin((Group(""),), 0)

    def start(self, view: ParameterView, seed: int) -> None:
        """Begin a run on a view.

        Raises:
            PerturbationError: mu is below the resolution of a tensor's dtype.
        """
        check_resolution(view, self.perturbation_scale)
        self.begin(view.groups, seed)

    def begin(self, groups: Sequence[Group], seed: int) -> None:
        """Forget everything; ``start`` without a view."""
        self.groups, self.seed = tuple(groups), seed
        self.scale = RunningScale(self.scale_memory)
        self.steps = 0
        self._directions = 0
        self._flat = 0
        self._anneal_scale = 1.0

    @abstractmethod
    def ask(self, samples: Samples) -> list[Probe]:
        """The probes of the next step."""

    @abstractmethod
    def tell(self, evaluations: Sequence[Evaluation], progress: float = 0.0) -> StepInfo:
        """Take the answers and return the step's update (not yet applied)."""

    def step(self, evaluator: Evaluator, samples: Samples, progress: float) -> StepInfo:
        """Ask, evaluate, tell, apply."""
        evaluations = evaluator.evaluate(self.ask(samples))
        info = self.tell(evaluations, progress)
        evaluator.view.apply(info.update)
        return info

    def new_seeds(self, count: int) -> list[int]:
        """Seeds of ``count`` new directions: a function of the run's seed and a counter."""
        first, self._directions = self._directions, self._directions + count
        words = philox.words_numpy(
            self.seed, 0, SEED_STREAM, first // 4, (first + count - 1) // 4 - first // 4 + 1
        )
        return [int(word) for word in words[first % 4 :][:count]]

    def descend(
        self,
        terms: Terms,
        projected: Sequence[float],
        value: float,
        lr: float,
        progress: float,
        kind: str = "minibatch",
    ) -> StepInfo:
        """The step along -terms: schedule, annealing, normalisation, decay."""
        self.steps += 1
        self._notice_flat(projected)
        if self.annealing is not None:
            self._anneal_scale = self.annealing.observe(value)
        rate = lr * self._anneal_scale * self.schedule(progress)
        scale = self.scale.update(projected)
        if self.normalize and scale > 0.0:
            terms = tuple(t._replace(coefficient=t.coefficient / scale) for t in terms)
        update = descent(terms, rate, self.groups, self.weight_decay)
        rms = math.sqrt(math.fsum(p * p for p in projected) / len(projected))
        return StepInfo(value, rate, rms, update, kind)

    def _notice_flat(self, projected: Sequence[float]) -> None:
        self._flat = self._flat + 1 if not any(projected) else 0
        if self._flat == FLAT_STEPS:
            warnings.warn(
                f"the loss was the same at both points for {FLAT_STEPS} steps in a row, so nothing "
                f"is learned: raise perturbation_scale (now {self.perturbation_scale}), raise "
                "batch_size if the objective counts (accuracy), or check that the view reaches "
                "the loss",
                FlatObjectiveWarning,
                stacklevel=4,
            )


def positive(name: str, value: float) -> float:
    """``value`` if it is finite and > 0.

    Raises:
        OptionError: It is not.
    """
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{name}={value}; choose a finite number > 0")
    return float(value)


def at_least_one(name: str, value: int) -> int:
    """``value`` if it is an integer >= 1.

    Raises:
        OptionError: It is not.
    """
    if not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value}; choose an integer >= 1")
    return value


def check_resolution(view: ParameterView, perturbation_scale: float) -> None:
    """Refuse a perturbation that rounding would swallow.

    Half a unit in the last place at the tensor's root mean square must not exceed mu.

    Raises:
        PerturbationError: Names the tensor, and the smallest usable mu.
    """
    for name, tensor in view.tensors.items():
        rms = float(tensor.detach().double().square().mean().sqrt())
        smallest = 0.5 * torch.finfo(tensor.dtype).eps * rms
        mu = perturbation_scale * view.group_of(name).perturbation_scale
        if mu < smallest:
            raise PerturbationError(
                f"perturbation_scale={mu:.3g} is below the resolution of {name!r} ({tensor.dtype}, "
                f"root mean square {rms:.3g}); choose at least {smallest:.3g}, or float32 tensors"
            )
