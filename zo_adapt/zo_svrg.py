"""ZO-SVRG: variance-reduced gradient descent with a direction for every sample (a baseline)."""

from collections.abc import Mapping, Sequence
from typing import Any

from zo_adapt.data import Batch, Samples
from zo_adapt.errors import OptionError
from zo_adapt.estimator import HERE, Point, TwoSided
from zo_adapt.group import REACH, Group
from zo_adapt.objective import Evaluation, Probe
from zo_adapt.optimizer import StepInfo, ZerothOrder
from zo_adapt.options import at_least_one
from zo_adapt.rule import NOWHERE, Progress, StepRule
from zo_adapt.schedule import Schedule
from zo_adapt.term import Term, Terms, coalesced, scaled


class ZOSVRG(ZerothOrder):
    """ZO-SVRG (Gautam et al. 2024, Algorithm 2; Liu et al. 2018).

    As MeZO-SVRG, but every estimate is a mean over samples that each have their own direction:
        g_B(theta) = 1/|B| sum_{i in B} p_i(theta; z_i) z_i
    Every q steps theta_bar <- theta, g <- g_{all}(theta); in every step
        theta <- theta - lr * (g_I(theta) - g_I(theta_bar) + g)
    with the same z_i at both points. At the snapshot the two cancel: no minibatch is drawn.

    Queries: 2 n at a snapshot, 4 b otherwise. Slow by design: a forward pass for one sample at a
    time, and n terms in every update.

    Args:
        lr: Learning rate; None: the step by distance (see ``StepRule``).
        snapshot_interval: q >= 1.
        snapshot_size: Rows of the large batch; None is the whole set.
        displacement: rho of the step by distance; None: as the view says.
        perturbation_scale: mu; None: displacement / 25.
        normalize, schedule, weight_decay, scale_memory: See ``StepRule``.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> import torch
        >>> from zo_adapt import ParameterView, ZOSVRG, minimize
        >>> x, data = torch.zeros(1), torch.linspace(0, 1, 16)[:, None]
        >>> result = minimize(
        ...     lambda batch: (x - batch).square().sum(1), ParameterView({"x": x}), data,
        ...     ZOSVRG(lr=2e-2), batch_size=4, max_queries=6000, progress=False)
        >>> bool((x - data.mean()).abs() < 0.1)
        True

    Reference: arXiv 2404.08080, arXiv 1805.10367.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        snapshot_interval: int = 5,
        snapshot_size: int | None = None,
        displacement: float | None = None,
        perturbation_scale: float | None = None,
        normalize: bool | None = None,
        schedule: str | Schedule | None = None,
        weight_decay: float = 0.0,
        scale_memory: float = 0.98,
    ) -> None:
        rule = StepRule(
            lr,
            normalize=normalize,
            schedule=schedule,
            weight_decay=weight_decay,
            scale_memory=scale_memory,
        )
        self.snapshot_interval = at_least_one("snapshot_interval", snapshot_interval)
        self.snapshot_size = snapshot_size and at_least_one("snapshot_size", snapshot_size)
        super().__init__(rule, perturbation_scale, displacement)

    def begin(
        self, groups: Sequence[Group], seed: int, reach: float = REACH, finest: float = 0.0
    ) -> None:
        """Forget everything, the snapshot too."""
        super().begin(groups, seed, reach, finest)
        self.estimator = TwoSided(self.perturbation_scale)
        self._snapshot_gradient: Terms = ()
        self._snapshot_directions = 1
        self._since = HERE

    def ask(self, samples: Samples) -> list[Probe]:
        """The probes of the next step."""
        if samples.min_rows > 1:
            raise OptionError(
                "ZOSVRG asks for one sample at a time, on which this objective has no value (its "
                "min_rows is larger); choose MeZO or MeZOSVRG"
            )
        at_snapshot = self.steps % self.snapshot_interval == 0
        batch = samples.large(self.snapshot_size) if at_snapshot else samples.minibatch()
        self._rows: list[Batch] = batch.split(len(batch))
        self._seeds = self.new_seeds(len(self._rows))
        here = self.estimator.probes(self._seeds, self._rows, self.groups, HERE)
        if at_snapshot:
            return here
        back = self._since.inverse()
        return here + self.estimator.probes(self._seeds, self._rows, self.groups, back)

    def tell(self, evaluations: Sequence[Evaluation], progress: Progress = NOWHERE) -> StepInfo:
        """The step from the answers; not yet applied."""
        count = 2 * len(self._rows)
        here = self.estimator.estimate(self._seeds, self._rows, self.groups, evaluations[:count])
        if self.steps % self.snapshot_interval == 0:
            self._snapshot_gradient, self._since = here.terms, HERE
            self._snapshot_directions = len(self._seeds)
            terms, kind = here.terms, "snapshot"
        else:
            there = self.estimator.estimate(
                self._seeds, self._rows, self.groups, evaluations[count:]
            )
            control = (*scaled(there.terms, -1.0), *self._snapshot_gradient)
            terms, kind = coalesced((*here.terms, *control)), "minibatch"
        info = self.descend(
            terms,
            here,
            progress,
            lr=self.rule.lr,
            kind=kind,
            directions=self._snapshot_directions,
            reuse=self.snapshot_interval,
        )
        self._since = self._since.then(info.update)
        return info

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, the snapshot included."""
        return super().state_dict() | {
            "snapshot_gradient": self._snapshot_gradient,
            "snapshot_directions": self._snapshot_directions,
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ``start`` comes first."""
        super().load_state_dict(state)
        self._snapshot_gradient = tuple(Term(*term) for term in state["snapshot_gradient"])
        self._snapshot_directions = state["snapshot_directions"]
        terms, decay = state["since"]
        self._since = Point(tuple(Term(*term) for term in terms), decay)
