"""The displacement of a run that was given none: found before its first step, mended later."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.optimizers.calibration import Calibration
from zo_adapt.optimizers.look_ahead import LookAhead
from zo_adapt.optimizers.responses import Nonlinearity
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.optimizers.search import COUNT_SHARE
from zo_adapt.term import Shift
from zo_adapt.view.group import DISPLACEMENT, Group
from zo_adapt.view.newness import has_new_head, may_be_untrained
from zo_adapt.view.parameters import ParameterView

REACH_OF_NEW = 10.0
"""Of what the view assumes, a tenth of the weights' size: a count may go so far if they are new."""


class Finder:
    """Measurements between the steps of a run: which probes they need, what follows from values.

    Args:
        displacement: Where the search begins.
        numel: Of the view.
        is_new: Whether the view may be of a model that nobody has trained. Then it has no features
            to lose, and only damage bounds how far a run goes.
        farthest: The largest displacement that makes sense; None: any.
        counts: Whether values change in jumps. Then nothing is measured after the first step, and
            a run goes no further than ``displacement``, or no nearer and as far as ten times that
            if the view may be new: what is right by chance alone shows no damage but by chance.
    """

    def __init__(
        self,
        displacement: float,
        numel: int,
        *,
        is_new: bool = False,
        farthest: float | None = None,
        counts: bool = False,
    ) -> None:
        self.numel, self.is_new = numel, is_new
        first, least = displacement, 0.0
        if counts:
            most = displacement * (REACH_OF_NEW if is_new else 1.0) / COUNT_SHARE
            farthest = min(most, farthest or math.inf)
            first, least = (most, displacement) if is_new else (displacement, 0.0)
        self.calibration = Calibration(
            first,
            farthest=farthest,
            counts=counts,
            least=least,
            nonlinearity=None if counts or is_new else Nonlinearity(),
        )
        self.displacement = self.calibration.found
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
        seed: int,
        budget: Budget,
        done: float,
    ) -> list[Probe]:
        """The points of the next measurement; none where a step comes next.

        The arguments are those of ``Calibration.probes``, and ``done``, the share of the budget
        that is used.
        """
        found: list[Probe] = []
        if self.is_calibrating:
            self.calibration.aim(samples, budget, self.numel)
            found = self.calibration.probes(samples, groups, seed, budget)
            self.displacement = self.calibration.found
        elif self.look_ahead.is_due(done):
            found = self.look_ahead.probes(samples)
        self.asks = bool(found)
        return found

    def take(self, evaluations: Sequence[Evaluation]) -> None:
        """Let the values of the last probes change the displacement."""
        if self.is_calibrating:
            self.calibration.take(evaluations)
            self.look_ahead.by_row = evaluations[0].per_example is not None
            self.displacement = self.calibration.found
        else:
            longer = self.displacement * self.look_ahead.take(evaluations)
            farthest = self.calibration.farthest
            self.displacement = longer if farthest is None else min(longer, farthest)
        self.asks = False

    def take_failure(self) -> None:
        """Go on where the objective was not finite at the last probes: they may lie too far."""
        if self.is_calibrating:
            self.calibration.take_failure()
            self.displacement = self.calibration.found

    def give_up(self) -> None:
        """Go on without the measurement whose probes the budget does not allow."""
        if self.is_calibrating:
            self.calibration.give_up()
            self.displacement = self.calibration.found
        self.asks = False

    def after_step(
        self, update: Shift, samples: Samples, budget: Budget, step_queries: int
    ) -> None:
        """Remember an update; the first step says how many measurements there will be."""
        if self.calibration.counts:
            return
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


def finder_of(view: ParameterView, displacement: float, *, step_like: bool) -> Finder | None:
    """Make the finder of a run; None where values say nothing of how far it may go.

    What is right by chance alone takes no damage: a count over a new head, or of tensors or a
    module whose size says nothing, goes as far as the view assumes.
    """
    is_new = may_be_untrained(view.model)
    has_size = view.model is not None and not (is_new and displacement == DISPLACEMENT)
    if step_like and (not has_size or has_new_head(view.model)):
        return None
    farthest = view.farthest
    return Finder(displacement, view.numel, is_new=is_new, farthest=farthest, counts=step_like)
