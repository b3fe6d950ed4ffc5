"""What the SVRG optimizers share: the snapshot, kept as terms."""

from collections.abc import Mapping
from typing import Any

from zo_adapt.optimizers.estimator import Estimate
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.rule import Progress, StepRule
from zo_adapt.options import at_least_one
from zo_adapt.step import Step
from zo_adapt.term import HERE, Shift, Term, Terms, coalesced, scaled


class VarianceReduced(ZerothOrder):
    """Base of the optimizers with snapshots: theta_bar and g as terms, one copy of the weights.

    Args:
        rule: How an estimate is applied.
        snapshot_interval: q, steps from one snapshot to the next.
        perturbation_scale, displacement: See ``ZerothOrder``.

    Raises:
        OptionError: A number outside its range.
    """

    def __init__(
        self,
        rule: StepRule,
        snapshot_interval: int,
        perturbation_scale: float | None,
        displacement: float | None,
    ) -> None:
        self.snapshot_interval = at_least_one("snapshot_interval", snapshot_interval)
        super().__init__(rule, perturbation_scale, displacement)

    def reset(self) -> None:
        """No snapshot."""
        self._gradient: Terms = ()
        self._directions_of_snapshot = 1
        self._since = HERE

    @property
    def at_snapshot(self) -> bool:
        """Whether the next step begins with a snapshot."""
        return self.steps % self.snapshot_interval == 0

    @property
    def snapshot_point(self) -> Shift:
        """theta_bar, seen from the live weights: the updates since then, undone."""
        return self._since.inverse()

    def snapshot_step(self, here: Estimate, progress: Progress, lr: float | None) -> Step:
        """Set theta_bar <- theta, g <- the estimate, and step along it."""
        self._gradient, self._since = here.terms, HERE
        self._directions_of_snapshot = len(here.projected)
        return self._move(here.terms, here, progress, lr, 0.0, "snapshot")

    def corrected_step(
        self, here: Estimate, there: Estimate, progress: Progress, lr: float | None
    ) -> Step:
        """A step along g_I(theta) - g_I(theta_bar) + g."""
        terms = coalesced((*here.terms, *scaled(there.terms, -1.0), *self._gradient))
        pairs = zip(here.projected, there.projected, strict=True)
        change = sum((p - q) ** 2 for p, q in pairs) / len(here.projected) ** 2
        return self._move(terms, here, progress, lr, change, "minibatch")

    def _move(
        self,
        terms: Terms,
        here: Estimate,
        progress: Progress,
        lr: float | None,
        change: float,
        kind: str,
    ) -> Step:
        # The correction's directions add their noise to that of the snapshot's N.
        scale = self.rule.scale.value
        relative = change / scale**2 if scale else 0.0
        info = self.descend(
            terms,
            here,
            progress,
            lr=lr,
            kind=kind,
            directions=1.0 / (1.0 / self._directions_of_snapshot + relative),
            reuse=self.snapshot_interval,
        )
        self._since = self._since.then(info.update)
        return info

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, the snapshot included."""
        return super().state_dict() | {
            "gradient": self._gradient,
            "directions_of_snapshot": self._directions_of_snapshot,
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ``start`` comes first."""
        super().load_state_dict(state)
        self._gradient = tuple(Term(*term) for term in state["gradient"])
        self._directions_of_snapshot = state["directions_of_snapshot"]
        terms, decay = state["since"]
        self._since = Shift(tuple(Term(*term) for term in terms), decay)
