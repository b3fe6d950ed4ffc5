"""What every optimizer is: ``step`` for the loops, and ask / tell where values are enough."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from zo_adapt.data.batches import Batch
from zo_adapt.data.samples import Samples
from zo_adapt.errors import StepTooLargeError
from zo_adapt.evaluation.protocol import Evaluation, Evaluator, Probe
from zo_adapt.noise.seeds import Seeds
from zo_adapt.optimizers.estimator import Directions, Estimate
from zo_adapt.optimizers.flat import FlatWatch
from zo_adapt.optimizers.resolution import check_resolution, finest_perturbation
from zo_adapt.optimizers.rule import NOWHERE, Budget, Progress, StepRule
from zo_adapt.optimizers.schedule import described
from zo_adapt.options import positive_or_none
from zo_adapt.step import Step
from zo_adapt.term import Terms
from zo_adapt.view.group import REACH, Group
from zo_adapt.view.parameters import ParameterView

SHARE, STEP_LIKE_SHARE = 1 / 25, 1 / 2.5
"""Of the way that a run goes: what a difference spans, on a smooth objective and on a count."""


class Optimizer(Protocol):
    """Anything the loops can drive."""

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Forget everything and begin a run: same seed, same run.

        Args:
            view: What will move.
            seed: Of the directions.
            step_like: Whether the objective changes in jumps, as ``Objective`` has it.
        """

    def step(self, evaluator: Evaluator, samples: Samples, budget: Budget) -> Step:
        """Evaluate and say how to move; the loop counts queries and applies ``Step.update``.

        Raises:
            BudgetExhausted: The step needs more queries than are left; nothing was done.
        """


class ZerothOrder(ABC):
    """Base of the optimizers that see values only: ``ask`` for probes, ``tell`` their values.

    Args:
        rule: How an estimate is applied.
        perturbation_scale: mu, in the parameters' units; None: displacement / 25, so that a
            difference spans a small part of the way that the run goes, and ten times that for an
            objective that changes in jumps, so that it sees some.
        displacement: rho of the rule by distance; None: the view's (``ParameterView.reach``).

    Raises:
        OptionError: A number outside its range.
    """

    def __init__(
        self,
        rule: StepRule,
        perturbation_scale: float | None,
        displacement: float | None,
    ) -> None:
        self.rule = rule
        self._perturbation_scale = positive_or_none("perturbation_scale", perturbation_scale)
        self._displacement = positive_or_none("displacement", displacement)
        self.begin((Group(""),), 0)

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Begin a run on a view.

        Raises:
            PerturbationError: mu is below the resolution of a tensor's dtype.
        """
        self.begin(view.groups, seed, view.reach, finest_perturbation(view), step_like)
        check_resolution(view, self.perturbation_scale)

    def begin(
        self,
        groups: Sequence[Group],
        seed: int,
        reach: float = REACH,
        finest: float = 0.0,
        step_like: bool = False,
    ) -> None:
        """Forget everything; ``start`` without a view.

        Args:
            groups: The parts of the view.
            seed: Of the directions.
            reach: Displacement where none was given.
            finest: The smallest perturbation that the dtype resolves.
            step_like: Whether the objective changes in jumps.
        """
        self.groups, self.seed = tuple(groups), seed
        displacement = self._displacement or reach
        usual = usual_perturbation(displacement, finest, step_like)
        self.perturbation_scale = self._perturbation_scale or usual
        self.rule.restart(displacement)
        self.steps = 0
        self._directions = 0
        self._flat = FlatWatch()
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Forget what only this kind of optimizer has."""

    @abstractmethod
    def ask(self, samples: Samples) -> list[Probe]:
        """The probes of the next step."""

    @abstractmethod
    def tell(self, evaluations: Sequence[Evaluation], progress: Progress = NOWHERE) -> Step:
        """Take the answers and return the step's update (not yet applied)."""

    def step(self, evaluator: Evaluator, samples: Samples, budget: Budget) -> Step:
        """Ask, evaluate, tell."""
        done = budget.used(self.steps, evaluator.queries)
        evaluations = evaluator.evaluate(self.ask(samples))
        share = budget.used(self.steps + 1, evaluator.queries) - done
        return self.told(evaluations, Progress(done, share))

    def told(self, evaluations: Sequence[Evaluation], progress: Progress) -> Step:
        """``tell``, with a named error where numbers overflow.

        Raises:
            StepTooLargeError: The values' differences or squares are beyond any float.
        """
        try:
            return self.tell(evaluations, progress)
        except OverflowError as error:
            largest = max(abs(evaluation.value) for evaluation in evaluations)
            raise StepTooLargeError(
                f"the estimate from values up to {largest:.3g} is beyond any float; scale them down"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, as JSON can hold it exactly; between two steps only."""
        return {
            "steps": self.steps,
            "directions": self._directions,
            "flat": self._flat.state,
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ``start`` comes first."""
        self.steps, self._directions = state["steps"], state["directions"]
        self._flat = FlatWatch(state["flat"])
        self.rule.load_state_dict(state["rule"])

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters in force, for a log and to compare on resuming."""
        own = {k: v for k, v in vars(self).items() if _is_setting(k, v)}
        rule = {k: v for k, v in vars(self.rule).items() if _is_setting(k, v)}
        parts = {"schedule": described(self.rule.schedule)}
        if self.rule.annealing is not None:
            parts["annealing"] = self.rule.annealing.settings()
        return {"optimizer": type(self).__name__} | rule | own | parts

    @property
    def drawn(self) -> int:
        """How many seeds were drawn so far."""
        return self._directions

    def new_seeds(self, count: int) -> list[int]:
        """Seeds of ``count`` new directions: a function of the run's seed and a counter."""
        first, self._directions = self._directions, self._directions + count
        return Seeds(self.seed).take(first, count)

    def directions(self, batches: Sequence[Batch]) -> Directions:
        """A new direction for every batch."""
        return Directions(self.new_seeds(len(batches)), batches, self.groups)

    def descend(
        self,
        terms: Terms,
        here: Estimate,
        progress: Progress,
        *,
        lr: float | None,
        kind: str = "minibatch",
        directions: float | None = None,
        reuse: int = 1,
    ) -> Step:
        """The step along -terms.

        Args:
            terms: The direction, in most optimizers the estimate itself.
            here: The plain estimate at the weights, for the scale and the report.
            progress: Where the step stands in its run.
            lr: Learning rate, None for the rule by distance.
            kind: What the step is called in the report.
            directions: 1 / the terms' mean square in units of the scale: for an estimate from N
                directions N, the default with those of ``here``.
            reuse: Number of steps that share the noise of one estimate.
        """
        self.steps += 1
        self._flat.observe(here.projected, self.perturbation_scale)
        self.rule.observe(here.value)
        share = progress._replace(share=progress.share / reuse)
        rate = self.rule.rate(lr, directions or len(here.projected), share)
        update = self.rule.update(terms, here.projected, rate, self.groups)
        rms = math.sqrt(math.fsum(p * p for p in here.projected) / len(here.projected))
        return Step(self.steps, 0, here.value, rate, rms, update, kind)


def usual_perturbation(displacement: float, finest: float, step_like: bool) -> float:
    """The mu of a run that is told none.

    Ten times as far for a count: of LoRA on texts, 20,000 queries, two seeds, from base points, the
    accuracy at 1, 3, 10 and 20 times the scale for a loss was 0.22, 0.33, 0.38 and 0.34 tuned by
    the hard count, and 0.24, 0.26, 0.31 and 0.29 by macro-F1 (benchmarks/accuracy.py has these
    scales as methods).
    """
    share = STEP_LIKE_SHARE if step_like else SHARE
    return max(share * displacement, 4 * finest)


def _is_setting(name: str, value: object) -> bool:
    changing = ("steps", "seed")
    simple = value is None or isinstance(value, int | float | str)
    return simple and not name.startswith("_") and name not in changing
