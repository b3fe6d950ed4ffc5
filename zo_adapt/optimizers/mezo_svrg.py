"""MeZO-SVRG: SPSA with variance reduction from large-batch snapshots."""

from dataclasses import dataclass
from typing import Self, Unpack

from zo_adapt.optimizers.estimator import Estimator, OneSided, TwoSided
from zo_adapt.optimizers.keywords import Keywords, estimator_of, split, step_size_of
from zo_adapt.optimizers.schedule import Annealing
from zo_adapt.optimizers.step_size import Rate, StepSize
from zo_adapt.optimizers.variance_reduced import (
    Coupling,
    SnapshotSize,
    VarianceReduced,
    size_named,
)


@dataclass(frozen=True, repr=False, init=False)
class MeZOSVRG(VarianceReduced):
    """MeZO-SVRG (Gautam et al. 2024, Algorithm 1), the snapshot kept as terms.

    Every q steps, on a large batch B with K directions:
        theta_bar <- theta,  g <- 1/K sum_k p_{B_k}(theta; z_k) z_k,
        theta <- theta - snapshot_lr * g
    otherwise, on a minibatch I and, shared by the pair, one direction z:
        theta <- theta - lr * ([p_I(theta; z) - p_I(theta_bar; z)] z + g)

    By default q = 2 and the large batch is four minibatches, cut into shares with 8 directions on
    each, as ``MeZO`` cuts a minibatch. The correction takes data noise out of a minibatch step, not
    the noise of its few directions, about d / K times the signal, which a large batch of many
    directions has less of. Where that noise is the larger one ``MeZO()`` does more with the same
    queries; ``diagnose`` says which one is.

    Memory: one copy of the weights. theta_bar is theta minus the terms applied since; where these
    would be many (q > 16) and the view is small, its values are kept instead.
    Queries: K |B| a snapshot step (|B| more with ``shaping="base"``; two-sided 2 |B|) and 4 b a
    minibatch step.

    Args:
        lr: Rate of the minibatch steps (eta_2), short for ``apply=Rate(lr)``. None: the step by
            distance, ``ByDistance()``.
        estimate: How the snapshots' estimates are formed; ``OneSided(8)`` by default. Shaping with
            ``snapshot_interval=1`` alone, as minibatch steps have none.
        apply: How an estimate is applied.
        snapshot_lr: Rate of the snapshot steps (eta_1); None: the same as of the others, which a
            shared direction allows.
        snapshot_interval: q >= 1; 1 makes every step a snapshot step.
        snapshot_size: Rows of the large batch; "auto": four minibatches, or all rows where there
            are fewer; "batch": as many as a minibatch; "all": all.
        coupling: "shared" uses one z for both estimates of a minibatch step, as the proof does;
            "independent" draws two, as the paper's text does.
        keywords: Short for the parts of ``estimate`` and ``apply``; as in ``MeZO``.

    Raises:
        OptionError: A number outside its range, or the same thing said twice.

    Example:
        >>> import torch
        >>> from zo_adapt import MeZOSVRG, ParameterView, minimize
        >>> x, data = torch.zeros(1), torch.linspace(0, 1, 64)[:, None]
        >>> result = minimize(
        ...     lambda batch: (x - batch).square().sum(1), ParameterView({"x": x}), data,
        ...     MeZOSVRG(lr=5e-2, snapshot_size=32), batch_size=8,
        ...     max_queries=8000, progress=False)
        >>> bool((x - data.mean()).abs() < 0.1)
        True

    Reference: arXiv 2404.08080.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        estimate: Estimator | None = None,
        apply: StepSize | None = None,
        snapshot_lr: float | None = None,
        snapshot_interval: int = 2,
        snapshot_size: SnapshotSize | None = "auto",
        coupling: Coupling = "shared",
        **keywords: Unpack[Keywords],
    ) -> None:
        of_estimate, of_step_size = split(keywords)
        self._set(
            estimate=estimator_of(estimate, of_estimate, usual=OneSided(8)),
            apply=step_size_of(apply, lr, of_step_size),
            snapshot_interval=snapshot_interval,
            snapshot_size=size_named(snapshot_size),
            snapshot_lr=snapshot_lr,
            coupling=coupling,
        )
        self._check()

    @classmethod
    def paper(
        cls,
        lr: float,
        snapshot_lr: float,
        *,
        epoch_steps: int = 32,
        snapshot_interval: int = 2,
        coupling: Coupling = "independent",
        perturbation_scale: float = 1e-3,
    ) -> Self:
        """Algorithm 1 of Gautam et al. 2024 (arXiv 2404.08080) with Algorithm 4, by name.

        Pairs along one direction, a snapshot of the whole set, two constant rates, divided by 5
        where the mean loss of an epoch is more than 1.05 times that of the epoch before. mu, q and
        the threshold are the defaults of the published code (amazon-science/mezo_svrg), the factor
        is that of its scripts (3 to 5; its default is 1.5). Its floors under the rates are left
        out: they raise small rates.

        Args:
            lr: eta_2, of the minibatch steps; chosen for each model and task (1e-6 in the code).
            snapshot_lr: eta_1, of the full-batch steps; larger (1e-3 to 5e-5 in the code).
            epoch_steps: w, steps of an epoch, which Algorithm 4 compares: the number of training
                examples over the batch size. The default is that of 512 examples in batches of 16.
            snapshot_interval: q.
            coupling: "independent", a z for each of the two estimates of a minibatch step, or
                "shared", as in the paper's proof.
            perturbation_scale: mu.

        Example:
            >>> MeZOSVRG.paper(1e-6, 1e-4, epoch_steps=16).apply.annealing
            Annealing(factor=5.0, threshold=1.05, window=16)
        """
        annealing = Annealing(factor=5.0, threshold=1.05, window=epoch_steps)
        return cls(
            estimate=TwoSided(1, perturbation_scale=perturbation_scale),
            apply=Rate(lr, schedule="constant", annealing=annealing),
            snapshot_lr=snapshot_lr,
            snapshot_interval=snapshot_interval,
            snapshot_size="all",
            coupling=coupling,
        )
