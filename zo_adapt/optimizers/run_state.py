"""What one run of an optimizer has, and changes: counters, the step's length, measurements."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.noise.seeds import Seeds
from zo_adapt.optimizers.budget import Budget
from zo_adapt.optimizers.directions import Directions
from zo_adapt.optimizers.finder import Finder
from zo_adapt.optimizers.flat import FlatWatch
from zo_adapt.optimizers.step_size import Descent
from zo_adapt.step import MEASUREMENT, Step
from zo_adapt.view.group import Group


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
    steps: int = 0
    drawn: int = 0
    flat: FlatWatch = field(default_factory=FlatWatch)
    asked: Directions | None = None

    def __post_init__(self) -> None:
        self.at_start = (self.descent.displacement, self.perturbation_scale)

    def new_seeds(self, count: int) -> list[int]:
        """Seeds of ``count`` new directions: a function of the run's seed and a counter."""
        first, self.drawn = self.drawn, self.drawn + count
        return Seeds(self.seed).take(first, count)

    def measurement(self, samples: Samples, budget: Budget, queries: int) -> list[Probe]:
        """The probes of a measurement that is due before the next step; empty where none is."""
        if self.finder is None:
            return []
        done = budget.used(self.steps, queries)
        probes = self.finder.probes(samples, self.groups, self.new_seeds, budget, done)
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
        self.descent.displacement = finder.displacement
        if self.usual_scale is not None:
            self.perturbation_scale = self.usual_scale(finder.displacement)

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
