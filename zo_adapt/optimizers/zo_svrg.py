"""ZO-SVRG: variance-reduced gradient descent with a direction for every sample (a baseline)."""

from collections.abc import Sequence

from zo_adapt.data.samples import Samples
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.optimizers.estimator import TwoSided
from zo_adapt.optimizers.rule import NOWHERE, Progress, StepRule
from zo_adapt.optimizers.schedule import Schedule
from zo_adapt.optimizers.variance_reduced import VarianceReduced
from zo_adapt.options import at_least_one
from zo_adapt.step import Step


class ZOSVRG(VarianceReduced):
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
        perturbation_scale: mu; None: displacement / 25, and ten times that where the objective is
            ``step_like``.
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
        if snapshot_size is not None:
            at_least_one("snapshot_size", snapshot_size)
        self.snapshot_size = snapshot_size
        super().__init__(rule, snapshot_interval, perturbation_scale, displacement)

    def reset(self) -> None:
        """No snapshot, and the estimate at this run's mu."""
        super().reset()
        self.estimator = TwoSided(self.perturbation_scale)

    def ask(self, samples: Samples) -> list[Probe]:
        """The probes of the next step."""
        if samples.min_rows > 1:
            raise OptionError(
                "ZOSVRG asks for one sample at a time, and this objective wants more: its min_rows "
                "is larger, or it gives one number for a batch (return one value per example, or "
                "set mean_over_rows=True if the number is a mean); or choose MeZO or MeZOSVRG"
            )
        batch = samples.large(self.snapshot_size) if self.at_snapshot else samples.minibatch()
        self._along = self.directions(batch.split(len(batch)))
        here = self.estimator.probes(self._along)
        if self.at_snapshot:
            return here
        return here + self.estimator.probes(self._along, self.snapshot_point)

    def tell(self, evaluations: Sequence[Evaluation], progress: Progress = NOWHERE) -> Step:
        """The step from the answers; not yet applied."""
        count = 2 * len(self._along.seeds)
        here = self.estimator.estimate(self._along, evaluations[:count])
        if self.at_snapshot:
            return self.snapshot_step(here, progress, self.rule.lr)
        there = self.estimator.estimate(self._along, evaluations[count:])
        return self.corrected_step(here, there, progress, self.rule.lr)
