"""Recursive variance reduction: each estimate corrects the one before, all of it kept as terms."""

import math
from abc import ABC
from dataclasses import KW_ONLY, dataclass
from typing import Unpack

from zo_adapt.errors import OptionError
from zo_adapt.noise import philox
from zo_adapt.optimizers.estimator import Estimator, TwoSided
from zo_adapt.optimizers.keywords import Keywords, estimator_of, split, step_size_of
from zo_adapt.optimizers.step_size import StepSize
from zo_adapt.optimizers.variance_reduced import SnapshotSize, VarianceReduced
from zo_adapt.options import finite
from zo_adapt.term import HERE, Shift, Terms, coalesced, scaled

RESTART_STREAM = 7
"""Of the generator: which steps of ``ZOPAGE`` take a large batch."""
SMALLEST = 1e-3
"""Share of what a term once was, below which STORM leaves it out."""


@dataclass(frozen=True, repr=False)
class Recursive(VarianceReduced, ABC):
    """Base of SPIDER, PAGE and STORM: v_t = g_I(theta_t) + keep (v_{t-1} - g_I(theta_{t-1})).

    Both estimates of a step are along one direction z on one minibatch I, so that v_t has one term
    more than v_{t-1}. theta_{t-1} is the weights less the last update: one copy of the weights.
    A step from a large batch begins anew, v = g_B(theta).

    Args:
        estimate: Of the large batch; the other steps take its differences along one direction.
        apply: How v is applied.
        snapshot_interval: Steps from one large batch to the next.
        snapshot_size: Rows of the large batch.
    """

    @property
    def keep(self) -> float:
        """The share of what was known before; 1 - a in STORM."""
        return 1.0

    def corrected(self, here: Terms, there: Terms) -> Terms:
        """V_t, from the two estimates of a step."""
        before = coalesced((*self.snapshot.gradient, *scaled(there, -1.0)))
        return coalesced((*here, *scaled(before, self.keep)))

    def noise(self, change: float) -> float:
        """That of (1 - keep) g_I(theta) + keep (v + correction); of one direction it is 1."""
        return (1.0 - self.keep) ** 2 + self.keep**2 * super().noise(change)

    def remember(self, terms: Terms, update: Shift, noise: float) -> None:
        """Keep v_t, its noise, and the way back to where it was estimated."""
        snapshot = self.snapshot
        snapshot.gradient, snapshot.since, snapshot.directions = terms, HERE, 1.0 / noise
        super().remember(terms, update, noise)

    @property
    def steps_back(self) -> int:
        """One: the other place is where the weights were before the last step."""
        return 1

    @property
    def steps_since(self) -> int:
        """The last step alone."""
        return min(self.steps, 1)

    def _build(
        self,
        lr: float | None,
        estimate: Estimator | None,
        apply: StepSize | None,
        interval: int,
        size: SnapshotSize,
        keywords: Keywords,
    ) -> None:
        of_estimate, of_step_size = split(keywords)
        self._set(
            estimate=estimator_of(estimate, of_estimate, usual=TwoSided()),
            apply=step_size_of(apply, lr, of_step_size),
            snapshot_interval=interval,
            snapshot_size=size,
            snapshot_lr=None,
            coupling="shared",
        )
        self._check()


@dataclass(frozen=True, repr=False, init=False)
class ZOSPIDER(Recursive):
    """SPIDER (Fang et al. 2018) and SARAH (Nguyen et al. 2017) on SPSA estimates.

    Every q steps v_t = g_B(theta_t) on a large batch B with K directions; otherwise, on a
    minibatch I and along one direction z,
        v_t = [p_I(theta_t; z) - p_I(theta_{t-1}; z)] z + v_{t-1},   theta <- theta - lr v_t

    Queries: two-sided 2 |B| at a large batch, 4 b otherwise.

    Args:
        lr: Learning rate, short for ``apply=Rate(lr)``. None: the step by distance.
        estimate: Of the large batch; ``TwoSided()`` by default.
        apply: How v is applied.
        snapshot_interval: q >= 1.
        snapshot_size: Rows of the large batch; "all", or "batch" for a minibatch's.
        keywords: Short for the parts of ``estimate`` and ``apply``; as in ``MeZO``.

    Raises:
        OptionError: A number outside its range, or the same thing said twice.

    Example:
        >>> import torch
        >>> from zo_adapt import ParameterView, ZOSPIDER, minimize
        >>> x, data = torch.zeros(1), torch.linspace(0, 1, 64)[:, None]
        >>> result = minimize(
        ...     lambda batch: (x - batch).square().sum(1), ParameterView({"x": x}), data,
        ...     ZOSPIDER(lr=5e-2), batch_size=8, max_queries=8000, progress=False)
        >>> bool((x - data.mean()).abs() < 0.1)
        True

    Reference: arXiv 1807.01695, arXiv 1703.00102.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        estimate: Estimator | None = None,
        apply: StepSize | None = None,
        snapshot_interval: int = 5,
        snapshot_size: SnapshotSize = "all",
        **keywords: Unpack[Keywords],
    ) -> None:
        self._build(lr, estimate, apply, snapshot_interval, snapshot_size, keywords)


@dataclass(frozen=True, repr=False, init=False)
class ZOPAGE(Recursive):
    """PAGE (Li et al. 2021) on SPSA estimates: as ``ZOSPIDER``, large batches at random steps.

    With probability P a step takes a large batch, v_t = g_B(theta_t); the first does. Which ones is
    a function of the run's seed.

    Args:
        lr, estimate, apply, snapshot_size, keywords: As in ``ZOSPIDER``.
        restart_probability: P, 0 < P <= 1.

    Raises:
        OptionError: A number outside its range, or the same thing said twice.

    Example:
        >>> from zo_adapt import ZOPAGE
        >>> ZOPAGE(1e-3, restart_probability=0.2).restart_probability
        0.2

    Reference: arXiv 2008.10898, Algorithm 1.
    """

    _: KW_ONLY
    restart_probability: float = 0.2

    def __init__(
        self,
        lr: float | None = None,
        *,
        estimate: Estimator | None = None,
        apply: StepSize | None = None,
        restart_probability: float = 0.2,
        snapshot_size: SnapshotSize = "all",
        **keywords: Unpack[Keywords],
    ) -> None:
        probability = finite("restart_probability", restart_probability, "0 < P <= 1")
        if not 0 < probability <= 1:
            raise OptionError(f"restart_probability={restart_probability}; choose 0 < P <= 1")
        self._set(restart_probability=probability)
        self._build(lr, estimate, apply, 1, snapshot_size, keywords)

    def begins_at(self, step: int) -> bool:
        """Whether a step takes a large batch: a word of the generator says so."""
        if step == 0:
            return True
        word = philox.words_numpy(self.state.seed, step, RESTART_STREAM, 0, 1)[0]
        return float(word) / 2**64 < self.restart_probability

    @property
    def steps_of_an_estimate(self) -> int:
        """1 / P on average."""
        return round(1 / self.restart_probability)


@dataclass(frozen=True, repr=False, init=False)
class ZOSTORM(Recursive):
    """STORM (Cutkosky and Orabona 2019) on SPSA estimates: momentum that corrects itself.

    v_0 = g_B(theta_0) on a large batch; then, on a minibatch I and along one direction z,
        v_t = p_I(theta_t; z) z + (1 - a) [v_{t-1} - p_I(theta_{t-1}; z) z]

    A term shrinks by 1 - a a step and is left out once it is below ``SMALLEST`` of what it was, so
    that v_t has at most log(SMALLEST) / log(1 - a) terms, and what is left out is of that size.

    Queries: two-sided 2 |B| for the first step, 4 b for every other.

    Args:
        lr, estimate, apply, snapshot_size, keywords: As in ``ZOSPIDER``; the large batch is that of
            the first step alone.
        momentum: a, 0 < a <= 1; 1 is plain SPSA at twice the queries.

    Raises:
        OptionError: A number outside its range, or the same thing said twice.

    Example:
        >>> from zo_adapt import ZOSTORM
        >>> ZOSTORM(1e-3, momentum=0.1).keep
        0.9

    Reference: arXiv 1905.10018, Algorithm 1 with a constant rate.
    """

    _: KW_ONLY
    momentum: float = 0.1

    def __init__(
        self,
        lr: float | None = None,
        *,
        estimate: Estimator | None = None,
        apply: StepSize | None = None,
        momentum: float = 0.1,
        snapshot_size: SnapshotSize = "all",
        **keywords: Unpack[Keywords],
    ) -> None:
        a = finite("momentum", momentum, "0 < momentum <= 1")
        if not 0 < a <= 1:
            raise OptionError(f"momentum={momentum}; choose 0 < momentum <= 1")
        self._set(momentum=a)
        self._build(lr, estimate, apply, 1, snapshot_size, keywords)

    @property
    def keep(self) -> float:
        """1 - a."""
        return 1.0 - self.momentum

    def begins_at(self, step: int) -> bool:
        """The first step alone."""
        return step == 0

    def corrected(self, here: Terms, there: Terms) -> Terms:
        """V_t, the newest terms first, without those that have shrunk to nothing."""
        terms = super().corrected(here, there)
        depth = math.ceil(math.log(SMALLEST) / math.log(self.keep)) if self.keep else 0
        # One direction a step, on top of those of the large batch, which are the oldest.
        return terms if self.steps <= depth else terms[: (depth + 1) * len(here)]

    @property
    def steps_of_an_estimate(self) -> int:
        """1 / a."""
        return round(1 / self.momentum)
