"""What one run of an optimizer has, and changes: counters, the step's length, measurements."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import FlatObjectiveWarning
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.noise.seeds import Seeds
from zo_adapt.optimizers.descent import Descent
from zo_adapt.optimizers.directions import Directions
from zo_adapt.optimizers.finder import Finder, finder_of
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.optimizers.step_size import StepSize
from zo_adapt.term import MEASUREMENT, Step
from zo_adapt.view.group import Group
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.precision import check_resolution, finest_perturbation, usual_perturbation

FLAT_STEPS = 20
"""Steps after which the user is warned, if none of them saw any difference."""
FLAT_SHARE, FLAT_DIRECTIONS, FEWEST_STEPS = 0.9, 100, 3
"""Or this share of zeros, judged on so many directions of so many steps at least."""

FORMER_SCHEDULE = "linear"
LEAST_SLOPE = 1e-3
"""Of the first slope: probes come no nearer where it falls further."""


class FlatWatch:
    """Counts differences that are exactly zero over the first steps of a run.

    Later ones are not judged: a run that had a signal and has lost it may have arrived.
    """

    def __init__(self, state: Sequence[int] = (0, 0, 0, False)) -> None:
        self._steps, self._zeros, self._total, self._judged = state

    @property
    def state(self) -> list[int]:
        """All that changes from step to step."""
        return [self._steps, self._zeros, self._total, self._judged]

    def observe(self, projected: Sequence[float], perturbation_scale: float) -> None:
        """Take in the projected gradients of one step."""
        if self._judged:
            return
        self._steps += 1
        self._zeros += sum(p == 0.0 for p in projected)
        self._total += len(projected)
        # A few zeros among many may be chance unless there are many of both; zeros alone are not.
        many = self._total >= FLAT_DIRECTIONS and self._steps >= FEWEST_STEPS
        everywhere = self._steps >= FLAT_STEPS and self._zeros == self._total
        if not (many or everywhere):
            return
        self._judged = True
        share = self._zeros / self._total
        if share >= FLAT_SHARE:
            message = self._message(share, perturbation_scale)
            warnings.warn(message, FlatObjectiveWarning, stacklevel=5)

    def _message(self, share: float, mu: float) -> str:
        seen = (
            f"{self._zeros} of {self._total} differences in {self._steps} steps were exactly zero "
            f"({share:.0%}), so "
        )
        if share == 1.0:
            return (
                f"{seen}nothing is learned: raise perturbation_scale (now {mu:.3g}); if the "
                "objective counts (accuracy), give it softness=... where it has that, or every "
                "direction more rows (batch_size together with the objective's min_rows); or "
                "check that the view reaches the objective; zo_adapt.diagnose(...) measures which"
            )
        # A change is as likely again at twice mu, or in twice the rows, as long as it is rare.
        further, more = 0.5 / (1.0 - share), math.log(0.5) / math.log(share)
        return (
            f"{seen}little is learned: raise perturbation_scale (now {mu:.3g}; about {further:.0f} "
            f"times that would move half of them) or the rows of a direction (about {more:.0f} "
            "times as many: batch_size together with the objective's min_rows), or give an "
            "objective that counts its softness=...; "
            "zo_adapt.diagnose(...) measures which"
        )


@dataclass
class RunState:
    """One run of an optimizer.

    Args:
        seed: Of the directions.
        groups: The parts of the view.
        perturbation_scale: mu in force.
        descent: The running scale and the annealing.
        usual_scale: The mu that suits a displacement; None: mu was given.
        finder: Finds the displacement; None: it was given.
        resolved: The smallest mu that the weights told from rounding as the run began.
        steps: Done so far.
        drawn: Seeds drawn so far.
        flat: Watches for an objective that does not change.
        asked: The directions of the step that was asked about and has not been taken.

    Attributes:
        at_start: Displacement and mu as the run began: what a setting of None stands for.
    """

    seed: int
    groups: Sequence[Group]
    perturbation_scale: float
    descent: Descent
    usual_scale: Callable[[float], float] | None = None
    finder: Finder | None = None
    resolved: float = 0.0
    steps: int = 0
    drawn: int = 0
    flat: FlatWatch = field(default_factory=FlatWatch)
    asked: Directions | None = None

    def __post_init__(self) -> None:
        self._is_former = False
        self.at_start = (self.descent.displacement, self.perturbation_scale)

    def keep_former_schedule(self) -> bool:
        """Step as before "cooldown" was usual; False where a schedule is given.

        Steps fell linearly then, but where looks along the updates found how long they should be.
        """
        if self.descent.step_size.schedule == "auto":
            self._is_former = True
            self.descent.step_size = replace(self.descent.step_size, schedule=FORMER_SCHEDULE)
        return self._is_former

    def new_seeds(self, count: int) -> list[int]:
        """Seeds of ``count`` new directions: a function of the run's seed and a counter."""
        first, self.drawn = self.drawn, self.drawn + count
        return Seeds(self.seed).take(first, count)

    def measurement(self, samples: Samples, budget: Budget, queries: int) -> list[Probe]:
        """The probes of a measurement that is due before the next step; empty where none is."""
        if self.finder is None:
            return []
        done = budget.used(self.steps, queries)
        probes = self.finder.probes(samples, self.groups, self.seed, budget, done)
        self._follow(self.finder)
        return probes

    def measured(self, finder: Finder, evaluations: Sequence[Evaluation]) -> Step:
        """The record of a measurement, which moves nothing but how far steps go."""
        finder.take(evaluations)
        self._follow(finder)
        value = sum(evaluation.value for evaluation in evaluations) / len(evaluations)
        return Step(self.steps, 0, value, 0.0, math.nan, kind=MEASUREMENT)

    def skip_measurement(self) -> None:
        """Go on without the measurement that was asked for."""
        if self.finder is not None:
            self.finder.give_up()
            self._follow(self.finder)

    def _follow(self, finder: Finder) -> None:
        """Let steps and probes go as far as was found."""
        descent = self.descent
        descent.displacement = finder.displacement
        if self._is_former and finder.looks_along:
            descent.step_size = replace(descent.step_size, schedule="cooldown")
        if self.usual_scale is not None:
            far = finder.displacement
            if finder.looks_along:
                # As near as the minimum is: where the slope has fallen by ten, so has the distance.
                far = finder.calibration.displacement * max(descent.slope, LEAST_SLOPE)
            self.perturbation_scale = self.usual_scale(far)

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, as JSON can hold it exactly; between two steps only."""
        return {
            "steps": self.steps,
            "directions": self.drawn,
            "flat": self.flat.state,
            "rule": self.descent.state_dict(),
            "finder": None if self.finder is None else self.finder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.steps, self.drawn = state["steps"], state["directions"]
        self.flat = FlatWatch(state["flat"])
        self.descent.load_state_dict(state["rule"])
        if state.get("finder") is None:
            self.finder = None  # given, or begun by a version that measured nothing
        elif self.finder is not None:
            self.finder.load_state_dict(state["finder"])
            self._follow(self.finder)


def begun(
    view: ParameterView,
    seed: int,
    apply: StepSize,
    perturbation_scale: float | None,
    *,
    step_like: bool,
) -> RunState:
    """The state of a run that is about to begin.

    Args:
        view: What will move.
        seed: Of the directions.
        apply: How estimates are applied.
        perturbation_scale: mu, or None for the one that suits the displacement.
        step_like: Whether the objective changes in jumps.

    Raises:
        PerturbationError: mu is below the resolution of a tensor's dtype.
        ViewError: The weights are not finite.
    """
    displacement = apply.displacement_on(view.displacement)
    finest = finest_perturbation(view)
    resolved = view.resolved_at_start
    if resolved is None:
        resolved = max(finest, view.least_perturbation / 4)
    usual_scale = partial(usual_perturbation, finest=resolved, step_like=step_like)
    mu = perturbation_scale or usual_scale(displacement)
    if view.resolved_at_start is None:
        check_resolution(view, mu, finest)
    finder = None
    if apply.finds_displacement:
        finder = finder_of(view, displacement, step_like=step_like)
    usual = usual_scale if perturbation_scale is None else None
    return RunState(seed, view.groups, mu, Descent(apply, displacement), usual, finder, resolved)
