"""MeZO: stochastic gradient descent on SPSA estimates."""

from collections.abc import Sequence

from zo_adapt.data.samples import Samples
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.optimizers.estimator import dealt
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.rule import NOWHERE, Progress, StepRule
from zo_adapt.optimizers.schedule import Schedule
from zo_adapt.optimizers.shaping import Shaping, estimator, shaping_of
from zo_adapt.options import at_least_one
from zo_adapt.step import Step


class MeZO(ZerothOrder):
    """MeZO (Malladi et al. 2023, Algorithm 1).

    theta <- theta - lr * 1/K sum_k p_k z_k,
    p_k = [f(theta + mu z_k) - f(theta - mu z_k)] / (2 mu)

    Queries a step with a batch of b rows: 2 b, whatever K, for the batch is split over the
    directions; one-sided K b, and b more for the base points with ``shaping=None``.

    Args:
        lr: Learning rate. None: the step by distance (see ``StepRule``). A number: the paper's
            plain step at that rate.
        displacement: How far noise alone would move a weight over the run (rho); only for lr=None.
            None: as the view says.
        perturbation_scale: mu; None: displacement / 25, and ten times that where the objective is
            ``step_like``.
        num_directions: K.
        one_sided: f(theta + mu z) alone, of K directions for each share of the batch, compared as
            ``shaping`` says.
        shaping: K >= 2 directions compared with each other: by "ranks" or "zscore", for rewards
            that are steps or have outliers, or one-sided by "loo", each less the mean of the
            others. No base point is evaluated then. None: differences from the base point; "auto":
            "loo" where it can be. See ``shaping``.
        normalize, schedule, weight_decay, scale_memory: See ``StepRule``.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> import torch
        >>> from zo_adapt import MeZO, ParameterView, minimize
        >>> x = torch.zeros(2)
        >>> result = minimize(
        ...     lambda batch: float(((x - 3) ** 2).sum()), ParameterView({"x": x}), None,
        ...     MeZO(lr=1e-2), max_steps=500, progress=False)
        >>> bool(((x - 3).abs() < 0.05).all()), result.queries
        (True, 1000)

    Reference: arXiv 2305.17333.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        displacement: float | None = None,
        perturbation_scale: float | None = None,
        num_directions: int = 1,
        one_sided: bool = False,
        shaping: Shaping = "auto",
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
        self.num_directions = at_least_one("num_directions", num_directions)
        self.one_sided = one_sided
        self.shaping = shaping_of(shaping, num_directions, one_sided)
        super().__init__(rule, perturbation_scale, displacement)

    def reset(self) -> None:
        """The estimate at this run's mu."""
        self.estimator = estimator(self.perturbation_scale, self.one_sided, self.shaping)

    def ask(self, samples: Samples) -> list[Probe]:
        """The probes of the next step."""
        batch = samples.minibatch()
        batches = dealt(
            batch,
            self.num_directions,
            one_sided=self.one_sided,
            share=samples.share,
            min_rows=samples.min_rows,
        )
        self._along = self.directions(batches)
        return self.estimator.probes(self._along)

    def tell(self, evaluations: Sequence[Evaluation], progress: Progress = NOWHERE) -> Step:
        """The step from the answers; not yet applied."""
        estimate = self.estimator.estimate(self._along, evaluations)
        return self.descend(estimate.terms, estimate, progress, lr=self.rule.lr)
