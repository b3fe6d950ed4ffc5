"""MeZO: stochastic gradient descent on SPSA estimates."""

from collections.abc import Sequence

from zo_adapt.data import Batch, Samples
from zo_adapt.estimator import HERE, OneSided, TwoSided
from zo_adapt.objective import Evaluation, Probe
from zo_adapt.optimizer import StepInfo, ZerothOrder
from zo_adapt.rule import Schedule


class MeZO(ZerothOrder):
    """MeZO (Malladi et al. 2023, Algorithm 1).

    theta <- theta - lr * 1/K sum_k p_k z_k,
    p_k = [f(theta + mu z_k) - f(theta - mu z_k)] / (2 mu)

    Queries a step: 2 b with the batch of b rows split over the K directions, 2 K b otherwise;
    one-sided, with a base point shared by all directions, (K + 1) b.

    Args:
        lr: Learning rate. None: the normalised step (lr 1e-2, linear decay). A number: the paper's
            plain step at that rate.
        perturbation_scale: mu.
        num_directions: K.
        split: Give each direction its own share of the batch.
        one_sided: Forward differences instead of the pair; the batch is then not split.
        normalize, schedule, weight_decay, scale_memory: See ``ZerothOrder``.

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
        perturbation_scale: float = 1e-3,
        num_directions: int = 1,
        split: bool = True,
        one_sided: bool = False,
        normalize: bool | None = None,
        schedule: str | Schedule | None = None,
        weight_decay: float = 0.0,
        scale_memory: float = 0.99,
    ) -> None:
        super().__init__(
            lr,
            perturbation_scale=perturbation_scale,
            num_directions=num_directions,
            normalize=normalize,
            schedule=schedule,
            weight_decay=weight_decay,
            scale_memory=scale_memory,
        )
        self.estimator = (OneSided if one_sided else TwoSided)(self.perturbation_scale)
        self.split = split and not one_sided

    def ask(self, samples: Samples) -> list[Probe]:
        """The probes of the next step."""
        self._seeds = self.new_seeds(self.num_directions)
        self._batches = shares(samples.minibatch(), self.num_directions, self.split)
        return self.estimator.probes(self._seeds, self._batches, self.groups, HERE)

    def tell(self, evaluations: Sequence[Evaluation], progress: float = 0.0) -> StepInfo:
        """The step from the answers; not yet applied."""
        estimate = self.estimator.estimate(self._seeds, self._batches, self.groups, evaluations)
        return self.descend(estimate.terms, estimate.projected, estimate.value, self.lr, progress)


def shares(batch: Batch, directions: int, split: bool = True) -> list[Batch]:
    """One batch for each direction: its own share, or the whole batch where nothing is split."""
    if split and len(batch) >= directions:
        return batch.split(directions)
    return [batch] * directions
