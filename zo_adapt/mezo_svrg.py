"""MeZO-SVRG: SPSA with variance reduction from large-batch snapshots."""

from collections.abc import Sequence
from typing import Literal

from zo_adapt.data import Samples
from zo_adapt.errors import OptionError
from zo_adapt.estimator import HERE, Estimate, Point, TwoSided
from zo_adapt.group import Group
from zo_adapt.mezo import shares
from zo_adapt.objective import Evaluation, Probe
from zo_adapt.optimizer import StepInfo, ZerothOrder, at_least_one, positive
from zo_adapt.rule import Annealing, Schedule
from zo_adapt.term import Terms, coalesced, scaled


class MeZOSVRG(ZerothOrder):
    """MeZO-SVRG (Gautam et al. 2024, Algorithm 1), the snapshot kept as terms.

    Every q steps, on a large batch B split over K directions:
        theta_bar <- theta,  g <- 1/K sum_k p_{B_k}(theta; z_k) z_k,
        theta <- theta - snapshot_lr * g
    otherwise, on a minibatch I and, shared by the pair, one direction z:
        theta <- theta - lr * ([p_I(theta; z) - p_I(theta_bar; z)] z + g)

    Memory: one copy of the weights. theta_bar is theta minus the terms applied since.
    Queries: 2 |B| a snapshot step, 4 b a minibatch step.

    Args:
        lr: Rate of the minibatch steps (eta_2); None: the normalised step.
        snapshot_lr: Rate of the snapshot steps (eta_1); None: the same as ``lr``, which a shared
            direction allows.
        snapshot_interval: q >= 1; 1 makes every step a snapshot step.
        snapshot_size: Rows of the large batch; None is the whole set.
        num_directions: K.
        perturbation_scale: mu.
        coupling: "shared" uses one z for both estimates of a minibatch step, as the proof does;
            "independent" draws two, as the paper's text does.
        annealing: Algorithm 4, or None.
        normalize, schedule, weight_decay, scale_memory: See ``ZerothOrder``.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> import torch
        >>> from zo_adapt import MeZOSVRG, ParameterView, minimize
        >>> x, data = torch.zeros(1), torch.linspace(0, 1, 64)[:, None]
        >>> result = minimize(
        ...     lambda batch: (x - batch).square().sum(1), ParameterView({"x": x}), data,
        ...     MeZOSVRG(lr=1e-2, snapshot_size=32), batch_size=8, max_queries=4000, progress=False)
        >>> bool((x - data.mean()).abs() < 0.1)
        True

    Reference: arXiv 2404.08080.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        snapshot_lr: float | None = None,
        snapshot_interval: int = 5,
        snapshot_size: int | None = 128,
        num_directions: int = 8,
        perturbation_scale: float = 1e-2,
        coupling: Literal["shared", "independent"] = "shared",
        annealing: Annealing | None = None,
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
            annealing=annealing,
        )
        self.snapshot_lr = positive("snapshot_lr", self.lr if snapshot_lr is None else snapshot_lr)
        self.snapshot_interval = at_least_one("snapshot_interval", snapshot_interval)
        self.snapshot_size = snapshot_size and at_least_one("snapshot_size", snapshot_size)
        if coupling not in ("shared", "independent"):
            raise OptionError(f"coupling={coupling!r}; choose 'shared' or 'independent'")
        self.coupling = coupling
        self.estimator = TwoSided(self.perturbation_scale)

    def begin(self, groups: Sequence[Group], seed: int) -> None:
        """Forget everything, the snapshot too."""
        super().begin(groups, seed)
        self._snapshot_gradient: Terms = ()
        self._since = HERE

    def ask(self, samples: Samples) -> list[Probe]:
        """The probes of the next step."""
        if self.steps % self.snapshot_interval == 0:
            self._seeds = self.new_seeds(self.num_directions)
            self._batches = shares(samples.large(self.snapshot_size), self.num_directions)
            return self.estimator.probes(self._seeds, self._batches, self.groups, HERE)
        self._batches = [samples.minibatch()]
        self._seeds = self.new_seeds(1)
        self._other = self._seeds if self.coupling == "shared" else self.new_seeds(1)
        return [
            *self.estimator.probes(self._seeds, self._batches, self.groups, HERE),
            *self.estimator.probes(self._other, self._batches, self.groups, self.snapshot_point),
        ]

    def tell(self, evaluations: Sequence[Evaluation], progress: float = 0.0) -> StepInfo:
        """The step from the answers; not yet applied."""
        if self.steps % self.snapshot_interval == 0:
            here = self._estimate(self._seeds, evaluations)
            self._snapshot_gradient, self._since = here.terms, HERE
            terms, lr, kind = here.terms, self.snapshot_lr, "snapshot"
        else:
            here = self._estimate(self._seeds, evaluations[:2])
            there = self._estimate(self._other, evaluations[2:])
            control = (*scaled(there.terms, -1.0), *self._snapshot_gradient)
            terms, lr, kind = coalesced((*here.terms, *control)), self.lr, "minibatch"
        info = self.descend(terms, here.projected, here.value, lr, progress, kind)
        self._since = self._since.then(info.update)
        return info

    @property
    def snapshot_point(self) -> Point:
        """theta_bar, seen from the live weights."""
        return self._since.inverse()

    def _estimate(self, seeds: Sequence[int], evaluations: Sequence[Evaluation]) -> Estimate:
        return self.estimator.estimate(seeds, self._batches, self.groups, evaluations)
