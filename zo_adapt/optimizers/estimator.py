"""How a gradient estimate is formed: probes out, evaluations in, terms of the estimate out.

With K directions z_k and their batches B_k (the same batch for all, or one batch split in K):

    two-sided (SPSA: Spall 1992; MeZO, Definition 1, eq. 1)
        g = 1/K sum_k [f_{B_k}(theta + mu z_k) - f_{B_k}(theta - mu z_k)] / (2 mu)  z_k
    one-sided, with a shared base point
        g = 1/K sum_k [f_{B_k}(theta + mu z_k) - f_{B_k}(theta)] / mu  z_k
    one-sided, the K directions of a batch compared with each other
        g = 1/K sum_k [f_B(theta + mu z_k) - 1/(K-1) sum_{j != k} f_B(theta + mu z_j)] / mu  z_k

E g = grad f + O(mu^2) for all; on a quadratic the two-sided p_k is exact, the one-sided one is
off by mu/2 z_k^T H z_k.
Queries on a batch of b rows: 2b per direction of its own; (K + 1) b one-sided with K directions,
K b where they are compared with each other.

Against differences from a base point, a baseline from the others saves that point's queries, and an
error that all directions share drops out: the base point's own where the objective counts, and
mu/2 tr H where it bends. The price is 1 / (K - 1) of the signal's own variance.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, Self

import numpy as np

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.protocol import Evaluation, Probe, mean_value
from zo_adapt.optimizers.directions import (
    SHAPES,
    Directions,
    Estimate,
    Shape,
    Shaping,
    gradient,
    leave_one_out,
    shaped,
)
from zo_adapt.optimizers.settings import Settings
from zo_adapt.options import at_least_one, positive_or_none
from zo_adapt.term import HERE, Shift

Baseline = Literal["auto", "others", "base"]


@dataclass(frozen=True, repr=False)
class Estimator(Settings, ABC):
    """Base of the estimators: values without state, which an optimizer uses at every step.

    Args:
        num_directions: K >= 1.
        shaping: "ranks" or "zscore": K >= 2 directions are compared with each other by rank or
            z-score, for rewards that are steps or have outliers; "none": by their differences.
        perturbation_scale: mu, in the parameters' units, > 0. None: 0.04 of the displacement, 0.4
            where the objective counts (``step_like``).

    Raises:
        OptionError: A number outside its range.
    """

    num_directions: int = 1
    _: KW_ONLY
    shaping: Shaping = "none"
    perturbation_scale: float | None = None

    def __post_init__(self) -> None:
        self._set(num_directions=at_least_one("num_directions", self.num_directions))
        self._set(
            perturbation_scale=positive_or_none("perturbation_scale", self.perturbation_scale)
        )
        if self.shaping not in ("none", *SHAPES):
            raise OptionError(f"shaping={self.shaping!r}; choose 'none' or one of {sorted(SHAPES)}")
        if self.shaping != "none":
            self._check_several(f"shaping={self.shaping!r}")

    @property
    @abstractmethod
    def of_one_direction(self) -> Self:
        """The same differences along one direction, which there is nothing to compare with."""

    @abstractmethod
    def divide(self, batch: Batch, samples: Samples) -> list[Batch]:
        """The batch of every direction; ``samples`` says how few rows are still enough."""

    @abstractmethod
    def probes(self, directions: Directions, at: Shift = HERE) -> list[Probe]:
        """The points to evaluate for an estimate of the gradient at a place."""

    @abstractmethod
    def combine(self, directions: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate from the evaluations of ``probes``, in their order."""

    def _check_several(self, option: str) -> None:
        if self.num_directions < 2:
            raise OptionError(
                f"{option} compares directions with each other, and num_directions="
                f"{self.num_directions}; choose at least 2"
            )


@dataclass(frozen=True, repr=False)
class TwoSided(Estimator):
    """The two-point estimate of SPSA: K pairs f(theta +- mu z), which share out the batch.

    Args:
        num_directions: K >= 1. Each has its own part of the batch: 2 b queries whatever K.
        shaping: "none": the differences as they are; for rewards that are steps or have outliers
            "ranks" (signed ranks of the differences) or "zscore", of K >= 2 directions.
        perturbation_scale: mu, in the parameters' units, > 0. None: 0.04 of the displacement, 0.4
            where the objective counts (``step_like``).

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> TwoSided(4, perturbation_scale=1e-3)
        TwoSided(num_directions=4, perturbation_scale=0.001)
    """

    @property
    def of_one_direction(self) -> Self:
        """The plain pair."""
        return replace(self, num_directions=1, shaping="none")

    def divide(self, batch: Batch, samples: Samples) -> list[Batch]:
        """K parts, or the whole for each where parts would be too small to have a value."""
        count = self.num_directions
        # The directions' own noise falls by K, and that of the rows stays as it is: at the queries
        # of one pair on the whole batch.
        separate = len(batch) >= count * samples.min_rows
        return batch.split(count) if separate else [batch] * count

    def probes(self, directions: Directions, at: Shift = HERE) -> list[Probe]:
        """Theta + mu z, theta - mu z, direction by direction."""
        return [
            directions.probe(number, sign, at)
            for number in range(len(directions.seeds))
            for sign in (1.0, -1.0)
        ]

    def combine(self, directions: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate from the pairs; its value is their mean."""
        plus, minus = evaluations[::2], evaluations[1::2]
        mu = directions.perturbation_scale
        projected = [
            (up.value - down.value) / (2 * mu) for up, down in zip(plus, minus, strict=True)
        ]
        if self.shaping != "none":
            # Both signs, so that the population is symmetric and its mean zero. Over mu: a shape
            # without a unit does not see it.
            both = np.array([*projected, *(-p for p in projected)])
            projected = shaped(SHAPES[self.shaping], both)[: len(projected)].tolist()
        sizes = [len(batch) for batch in directions.batches]
        value = (mean_value(plus, sizes) + mean_value(minus, sizes)) / 2
        return Estimate(gradient(directions, projected), tuple(projected), value)


@dataclass(frozen=True, repr=False)
class OneSided(Estimator):
    """One point f(theta + mu z) for each of K directions, which share the rows of a batch.

    Args:
        num_directions: K >= 1, for every share of the batch: K b queries.
        baseline: What a value is compared with. "others": the mean of the K - 1 other directions on
            the same rows. "base": f(theta), which costs b queries more. "auto": "others" where
            K > 1. With ranks or z-scores it is always the others.
        shaping: "none": the differences as they are; for rewards that are steps or have outliers
            "ranks" or "zscore", among K >= 2 directions.
        perturbation_scale: mu, in the parameters' units, > 0. None: 0.04 of the displacement, 0.4
            where the objective counts (``step_like``).

    Raises:
        OptionError: A number outside its range, or a baseline that the shaping does not have.

    Example:
        >>> OneSided(8)
        OneSided(num_directions=8, baseline='others')
        >>> OneSided(1, perturbation_scale=1e-3)
        OneSided(num_directions=1, perturbation_scale=0.001, baseline='base')
    """

    num_directions: int = 8
    _: KW_ONLY
    baseline: Baseline = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in ("auto", "others", "base"):
            raise OptionError(f"baseline={self.baseline!r}; choose 'auto', 'others' or 'base'")
        if self.baseline == "base" and self.shaping != "none":
            raise OptionError(
                f"shaping={self.shaping!r} with baseline='base': ranks and z-scores are among the "
                "directions; leave out one of the two"
            )
        if self.baseline == "others":
            self._check_several("baseline='others'")
        if self.baseline == "auto":
            self._set(baseline="others" if self.num_directions > 1 else "base")

    @property
    def of_one_direction(self) -> Self:
        """The forward difference."""
        return replace(self, num_directions=1, baseline="base", shaping="none")

    def divide(self, batch: Batch, samples: Samples) -> list[Batch]:
        """Parts that are fair to every class, as many as there are; K directions on each."""
        # More parts mean more directions at the same queries. A part that lacks a class, or has
        # fewer rows than the objective needs, would compare directions on a one-sided sample.
        parts = batch.split(max(1, len(batch) // samples.share))
        return [part for part in parts for _ in range(self.num_directions)]

    def probes(self, directions: Directions, at: Shift = HERE) -> list[Probe]:
        """The base point of every batch, where there is one, then theta + mu z."""
        base = _distinct(directions.batches) if self.baseline == "base" else []
        return [Probe(at, batch) for batch in base] + [
            directions.probe(number, 1.0, at) for number in range(len(directions.seeds))
        ]

    def combine(self, directions: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate; its value is that of the base points, or else of the perturbed points."""
        if self.baseline == "base":
            return _from_base(directions, evaluations)
        if self.shaping == "none":
            # In the values' units, unlike ranks: over mu they are projected gradients.
            return _compared(directions, evaluations, leave_one_out, directions.perturbation_scale)
        return _compared(directions, evaluations, SHAPES[self.shaping], 1.0)


def _from_base(directions: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
    """Forward differences; directions on the same batch share its base point."""
    distinct = _distinct(directions.batches)
    base = dict(zip(map(id, distinct), evaluations, strict=False))
    projected = [
        (up.value - base[id(batch)].value) / directions.perturbation_scale
        for up, batch in zip(evaluations[len(distinct) :], directions.batches, strict=True)
    ]
    value = mean_value(evaluations[: len(distinct)], [len(batch) for batch in distinct])
    return Estimate(gradient(directions, projected), tuple(projected), value)


def _compared(
    directions: Directions, evaluations: Sequence[Evaluation], shape: Shape, unit: float
) -> Estimate:
    """Directions on the same batch compared with each other; utilities over their unit."""
    values = np.array([evaluation.value for evaluation in evaluations])
    # Values on other rows differ by those rows' difficulty, which says nothing of a direction.
    shared = np.array([id(batch) for batch in directions.batches])
    utilities = np.empty(len(values))
    for population in (shared == batch for batch in dict.fromkeys(shared.tolist())):
        utilities[population] = shaped(shape, values[population])
    projected = tuple((utilities / unit).tolist())
    value = mean_value(evaluations, [len(batch) for batch in directions.batches])
    return Estimate(gradient(directions, projected), projected, value)


def _distinct(batches: Iterable[Batch]) -> list[Batch]:
    # By identity: two batches may hold equal rows and still be asked about apart.
    return list({id(batch): batch for batch in batches}.values())
