"""The displacement of a run that was given none: found before its first step, mended later."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.optimizers.calibration import Calibration, target_ratio
from zo_adapt.optimizers.look_ahead import LookAhead
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import Shift
from zo_adapt.view.group import Group


class Finder:
    """Measurements between the steps of a run: which probes they need, what follows from values.

    Args:
        displacement: Where the search begins.
        numel: Of the view.
        is_new: Whether the view may be of a model that nobody has trained.
        farthest: The largest displacement that makes sense; None: any.
    """

    def __init__(
        self,
        displacement: float,
        numel: int,
        *,
        is_new: bool = False,
        farthest: float | None = None,
    ) -> None:
        self.numel, self.is_new = numel, is_new
        self.calibration = Calibration(displacement, farthest=farthest)
        self.displacement = self.calibration.displacement
        """That of the steps from now on."""
        self.look_ahead = LookAhead()
        self.asks = False
        """Whether the last probes were for a measurement, not for a step."""

    @property
    def is_calibrating(self) -> bool:
        """Whether the first step is still to come."""
        return not self.calibration.finished

    @property
    def looks_along(self) -> bool:
        """Whether the run looks along its updates often enough to find how long steps should be."""
        return self.look_ahead.acts

    def probes(
        self,
        samples: Samples,
        groups: Sequence[Group],
        new_seeds: Callable[[int], list[int]],
        budget: Budget,
        done: float,
    ) -> list[Probe]:
        """The points of the next measurement; none where a step comes next.

        Args:
            samples: Where rows come from.
            groups: The parts of the view.
            new_seeds: Draws seeds of directions.
            budget: Of the run.
            done: Share of it that is used.
        """
        found: list[Probe] = []
        if self.is_calibrating:
            self.calibration.target = target_ratio(samples, budget, self.numel)
            found = self.calibration.probes(samples, groups, new_seeds, budget)
            self.displacement = self.calibration.displacement
        elif self.look_ahead.is_due(done):
            found = self.look_ahead.probes(samples)
        self.asks = bool(found)
        return found

    def take(self, evaluations: Sequence[Evaluation]) -> None:
        """Let the values of the last probes change the displacement."""
        if self.is_calibrating:
            self.calibration.take(evaluations)
            self.displacement = self.calibration.displacement
        else:
            longer = self.displacement * self.look_ahead.take(evaluations)
            farthest = self.calibration.farthest
            self.displacement = longer if farthest is None else min(longer, farthest)
        self.asks = False

    def take_failure(self) -> None:
        """Go on where the objective was not finite at the last probes: they may lie too far."""
        if self.is_calibrating:
            self.calibration.take_failure()
            self.displacement = self.calibration.displacement

    def give_up(self) -> None:
        """Go on without the measurement whose probes the budget does not allow."""
        if self.is_calibrating:
            self.calibration.give_up()
            self.displacement = self.calibration.displacement
        self.asks = False

    def after_step(
        self, update: Shift, samples: Samples, budget: Budget, step_queries: int
    ) -> None:
        """Remember an update; the first step says how many measurements there will be."""
        if not self.look_ahead.rows:
            directions = len({term.seed for term in update.terms})
            self.look_ahead.plan(
                samples, budget, step_queries, directions, self.numel, is_new=self.is_new
            )
        self.look_ahead.observe(update)

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as JSON can hold it."""
        return {
            "displacement": self.displacement,
            "calibration": self.calibration.state_dict(),
            "look_ahead": self.look_ahead.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.displacement = state["displacement"]
        self.calibration = Calibration.from_state(state["calibration"])
        self.look_ahead = LookAhead.from_state(state["look_ahead"])
