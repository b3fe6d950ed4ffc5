"""What every optimizer is: ``step`` for the loops, and ask / tell where values are enough.

An optimizer is two choices: how a gradient estimate is formed (``TwoSided``, ``OneSided``) and how
it is applied (``ByDistance``, ``Rate``). The classics:
    MeZO        an estimate on a minibatch, applied
    MeZO-SVRG   an estimate on a large batch, applied; between two of those, corrected by the
                difference of two estimates on a minibatch, here and at the snapshot
    ZO-SVRG     the same with a direction for every sample

Both are values: what changes over a run is in ``RunState``, made by ``begun``, with a ``Finder`` of
ways to apply that are measured: what is asked may be its probes, whose ``Step`` moves nothing.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.errors import NonFiniteObjectiveError, OptionError, StepTooLargeError
from zo_adapt.evaluation.failures import with_values
from zo_adapt.evaluation.protocol import BudgetExhausted, Evaluation, Evaluator, Probe
from zo_adapt.optimizers.directions import Directions, Estimate
from zo_adapt.optimizers.estimator import Estimator
from zo_adapt.optimizers.run_state import RunState, begun
from zo_adapt.optimizers.schedule import NO_BUDGET, NO_LIMIT, Budget, Progress
from zo_adapt.optimizers.settings import Settings
from zo_adapt.optimizers.step_size import StepSize
from zo_adapt.term import MEASUREMENT, Shift, Step, Terms
from zo_adapt.view.parameters import ParameterView


class Optimizer(Protocol):
    """Anything the loops can drive."""

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Forget everything and begin a run: same seed, same run.

        Args:
            view: What will move.
            seed: Of the directions.
            step_like: Whether the objective changes in jumps, as ``Objective`` has it.

        Raises:
            ViewError: The weights are not finite.
        """

    def step(self, evaluator: Evaluator, samples: Samples, budget: Budget) -> Step:
        """Evaluate and say how to move; the loop counts queries and applies ``Step.update``.

        Raises:
            BudgetExhausted: The step needs more queries than are left; nothing was done.
        """


@dataclass(frozen=True, repr=False)
class ZerothOrder(Settings, ABC):
    """Base of the optimizers that see values only: ``ask`` for probes, ``tell`` their values.

    The object holds hyper-parameters, frozen, and the state of its last run, which ``start``
    replaces: it can be reused, copied and pickled.

    Args:
        estimate: How a gradient estimate is formed.
        apply: How it is applied.
    """

    estimate: Estimator
    apply: StepSize

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Begin a run on a view.

        Raises:
            PerturbationError: mu is below the resolution of a tensor's dtype.
            ViewError: The weights are not finite.
        """
        given = self.estimate.perturbation_scale
        self._set(_state=begun(view, seed, self.apply, given, step_like=step_like))

    @property
    def state(self) -> RunState:
        """That of the last run; an ``OptionError`` before any."""
        state: RunState | None = vars(self).get("_state")
        if state is None:
            raise OptionError(f"{type(self).__name__} has no run yet; call start(view, seed) first")
        return state

    @abstractmethod
    def propose(self, samples: Samples) -> list[Probe]:
        """The probes of the next step, where nothing is to be measured before it."""

    @abstractmethod
    def advance(self, evaluations: Sequence[Evaluation], progress: Progress) -> Step:
        """What ``tell`` does, where numbers do not overflow."""

    def begins_at(self, step: int) -> bool:
        """Whether a step, by its number from 0 on, is made of a large batch; here none is."""
        return False

    def batch_of(self, step: int, samples: Samples) -> Batch:
        """The next rows that such a step is made of."""
        return samples.minibatch()

    def ask(self, samples: Samples, budget: Budget = NO_LIMIT, queries: int = 0) -> list[Probe]:
        """The probes of the next step, or of a measurement before it.

        Args:
            samples: Where rows come from.
            budget: Of the run; without one there are no measurements after the first step.
            queries: Made so far.
        """
        return self.state.measurement(samples, budget, queries) or self.propose(samples)

    @property
    def is_measuring(self) -> bool:
        """Whether what was asked is a measurement: no step follows from it."""
        finder = self.state.finder
        return finder is not None and finder.asks

    def tell(self, evaluations: Sequence[Evaluation], progress: Progress = NO_BUDGET) -> Step:
        """The step that follows from the values of the probes, in their order; not yet applied.

        After a measurement it is of that kind and moves nothing.

        Raises:
            StepTooLargeError: The values' differences or squares are beyond any float.
        """
        if self.is_measuring and self.state.finder is not None:
            return self.state.measured(self.state.finder, evaluations)
        try:
            return self.advance(evaluations, progress)
        except OverflowError as error:
            largest = max(abs(evaluation.value) for evaluation in evaluations)
            raise StepTooLargeError(
                f"the estimate from values up to {largest:.3g} is beyond any float; scale them down"
            ) from error

    def step(self, evaluator: Evaluator, samples: Samples, budget: Budget) -> Step:
        """Ask, evaluate, tell: a step, after the measurements that are due before it."""
        state = self.state
        while True:
            before = evaluator.queries
            probes = self.ask(samples, budget, before)
            if not self.is_measuring or state.finder is None:
                break
            # A measurement is not given up for one bad value: how far steps may go would be cut.
            try:
                self.tell(with_values(evaluator.evaluate(probes), "worst"))
            except NonFiniteObjectiveError:
                state.finder.take_failure()
            except BudgetExhausted:
                self.skip_measurement()
        done = budget.used(state.steps, before)
        evaluations = with_values(
            evaluator.evaluate(probes), getattr(evaluator, "on_nonfinite", "stop")
        )
        share = budget.used(state.steps + 1, evaluator.queries) - done
        step = self.tell(evaluations, Progress(done, share))
        self.observe(step, samples, budget, evaluator.queries - before)
        return step

    def observe(self, step: Step, samples: Samples, budget: Budget, queries: int) -> None:
        """Let later measurements know of a step that is about to be applied.

        Args:
            step: What ``tell`` gave.
            samples: Where rows come from.
            budget: Of the run.
            queries: Of the step.
        """
        if self.state.finder is not None and step.kind != MEASUREMENT:
            self.state.finder.after_step(step.update, samples, budget, queries)

    def skip_measurement(self) -> None:
        """Go on without the measurement that was asked for: the budget does not allow it."""
        self.state.skip_measurement()

    @property
    def measuring_queries(self) -> int:
        """How many queries of the first step were to find how far steps may go."""
        finder = self.state.finder
        return 0 if finder is None else finder.calibration.queries

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, as JSON can hold it exactly; between two steps only."""
        return self.state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ``start`` comes first."""
        self.state.load_state_dict(state)

    def brief_state(self) -> dict[str, Any]:
        """``state_dict`` for a loop that also keeps all updates: without what these say."""
        return self.state_dict()

    def load_brief_state(self, state: Mapping[str, Any], updates: Sequence[Shift]) -> None:
        """Go on from a brief state and the updates of all steps so far."""
        self.load_state_dict(state)

    @property
    def steps_since_kept(self) -> int | None:
        """How many steps ago the weights had values that the optimizer keeps; None: it has none."""
        return None

    def keep_values(self) -> None:
        """Keep the present weights, for a run that is gone on with."""

    def tensors(self) -> dict[str, Tensor]:
        """What is no JSON of the state: nothing here."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what ``tensors`` gave; ``load_state_dict`` comes first."""

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters in force, for a log and to compare on resuming."""
        own = super().settings()
        estimate, apply = own.pop("estimate"), own.pop("apply")
        # In place of None what the view and the objective decided: not what was measured since,
        # for that is of the run, and settings are compared with those of another start.
        displacement, mu = self.state.at_start
        return {
            "optimizer": type(self).__name__,
            "apply": type(apply).__name__,
            **apply.settings(),
            "displacement": displacement,
            "measured": apply.finds_displacement,
            "estimate": type(estimate).__name__,
            **estimate.settings(),
            "perturbation_scale": mu,
            **own,
        }

    @property
    def steps(self) -> int:
        """Done in the last run; 0 before any."""
        return self.state.steps if "_state" in vars(self) else 0

    @property
    def perturbation_scale(self) -> float:
        """Mu in force in the last run."""
        return self.state.perturbation_scale

    @property
    def asked(self) -> Directions:
        """The directions of the step that was asked about; an ``OptionError`` where none was."""
        if self.state.asked is None:
            raise OptionError("tell without ask; call ask(samples) for the probes first")
        return self.state.asked

    @property
    def drawn(self) -> int:
        """How many seeds were drawn so far."""
        return self.state.drawn

    def new_directions(self, batches: Sequence[Batch]) -> Directions:
        """A new direction for every batch."""
        state = self.state
        seeds = state.new_seeds(len(batches))
        return Directions(seeds, batches, state.groups, state.perturbation_scale)

    def descend(
        self,
        terms: Terms,
        here: Estimate,
        progress: Progress,
        *,
        lr: float | None = None,
        kind: str = "minibatch",
        directions: float | None = None,
        reuse: int = 1,
    ) -> Step:
        """The step along -terms.

        Args:
            terms: The direction, in most optimizers the estimate itself.
            here: The plain estimate at the weights, for the scale and the report.
            progress: Where the step stands in its run.
            lr: Learning rate in place of the step size's own.
            kind: What the step is called in the report.
            directions: 1 / the terms' mean square in units of the scale: for an estimate from N
                directions N, the default with those of ``here``.
            reuse: Number of steps that share the noise of one estimate.
        """
        state, count = self.state, len(here.projected)
        state.steps += 1
        state.flat.observe(here.projected, state.perturbation_scale)
        state.descent.annealed.observe(here.value)
        # Steps that share their noise move by it in one direction, not at random: the distance of
        # q of them adds up as that of one step that uses the q-th part of the budget of each.
        share = progress._replace(share=progress.share / reuse)
        rate = state.descent.rate(directions or count, share, lr)
        update = state.descent.update(terms, here.projected, rate, state.groups)
        rms = math.sqrt(math.fsum(p * p for p in here.projected) / count)
        return Step(state.steps, 0, here.value, rate, rms, update, kind)
