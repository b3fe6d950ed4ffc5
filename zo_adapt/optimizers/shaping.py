"""Shaping: what is compared across directions, in place of differences from a base point.

A shape takes the values of a population, the points that are compared with each other, and gives
utilities u_k in their place; the estimate is g = 1/K sum_k u_k z_k.

    one-sided   the population: f(theta + mu z_k), K directions on one batch
    two-sided   the population: the K pairs, each shifted to mean zero (+- half its difference),
                for pairs may have other batches; u_k is that of theta + mu z_k

Ranks and z-scores have no unit: a learning rate is then how far a weight moves, as with a
normalised step. "loo" is in the values' units and divided by mu: an unbiased gradient.

Against differences from a base point f(theta), a baseline from the others saves that point's
queries, and an error that all directions share drops out: the base point's own where the objective
counts, and mu/2 tr H where it bends. The price is 1 / (K - 1) of the signal's own variance.

Ties get the average rank, and a population without spread gets zeros: it is no signal. Utilities
sum to zero, so the one-sided estimate needs no base point: K b queries on a batch of b rows.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from zo_adapt.errors import OptionError
from zo_adapt.evaluation.protocol import Evaluation, Probe, mean_value
from zo_adapt.optimizers.estimator import (
    Directions,
    Estimate,
    Estimator,
    OneSided,
    TwoSided,
    gradient,
)
from zo_adapt.term import HERE, Shift

Shape = Callable[[np.ndarray], np.ndarray]
Shaping = Literal["auto", "ranks", "zscore", "loo"] | None


def ranks(values: np.ndarray) -> np.ndarray:
    """Centred ranks in -1/2 .. 1/2 (Salimans et al. 2017): blind to scale and outliers.

    Example:
        >>> ranks(np.array([3.0, 1.0, 900.0, 3.0]))
        array([ 0. , -0.5,  0.5,  0. ])
    """
    below = (values[:, None] > values).sum(1)
    above = (values[:, None] < values).sum(1)
    centred: np.ndarray = (below - above) / (2.0 * (len(values) - 1))
    return centred


def z_scores(values: np.ndarray) -> np.ndarray:
    """(f - mean) / standard deviation: blind to scale.

    Example:
        >>> z_scores(np.array([1.0, 3.0]))
        array([-1.,  1.])
    """
    centred: np.ndarray = (values - values.mean()) / values.std()
    return centred


def leave_one_out(values: np.ndarray) -> np.ndarray:
    """Each value less the mean of the others (Kool et al. 2019): unbiased, in the values' units.

    Example:
        >>> leave_one_out(np.array([1.0, 2.0, 6.0]))
        array([-3. , -1.5,  4.5])
    """
    count = len(values)
    less: np.ndarray = (values - values.mean()) * count / (count - 1)
    return less


SHAPES: dict[str, Shape] = {"ranks": ranks, "zscore": z_scores, "loo": leave_one_out}


class ShapedTwoSided(TwoSided):
    """The two-point estimate with the differences of the K pairs shaped: ranks are signed.

    Args:
        perturbation_scale: mu.
        shape: One without a unit.
    """

    def __init__(self, perturbation_scale: float, shape: Shape) -> None:
        super().__init__(perturbation_scale)
        self.shape = shape

    def estimate(self, along: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate from the answers, in the order of the questions."""
        plain = super().estimate(along, evaluations)
        half = np.array(plain.projected)  # over mu, which a shape without unit does not see
        utilities = _shaped(self.shape, np.concatenate([half, -half]))[: len(half)]
        projected = tuple(utilities.tolist())
        return plain._replace(terms=gradient(along, projected), projected=projected)


class ShapedOneSided(OneSided):
    """Directions on the same batch compared with each other, instead of with a base point.

    Args:
        perturbation_scale: mu.
        shape: Gives the utilities.
        unit: What they are divided by: mu where they are in the values' units.
    """

    def __init__(self, perturbation_scale: float, shape: Shape, unit: float = 1.0) -> None:
        super().__init__(perturbation_scale)
        self.shape, self.unit = shape, unit

    def probes(self, along: Directions, at: Shift = HERE) -> list[Probe]:
        """The questions to ask."""
        return super().probes(along, at)[-len(along.seeds) :]

    def estimate(self, along: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate from the answers; its value is the mean over the perturbed points."""
        values = np.array([evaluation.value for evaluation in evaluations])
        shared = np.array([id(batch) for batch in along.batches])
        utilities = np.empty(len(values))
        for population in (shared == batch for batch in dict.fromkeys(shared.tolist())):
            utilities[population] = _shaped(self.shape, values[population])
        projected = tuple((utilities / self.unit).tolist())
        value = mean_value(evaluations, [len(batch) for batch in along.batches])
        return Estimate(gradient(along, projected), projected, value)


def estimator(perturbation_scale: float, one_sided: bool, shaping: str | None) -> Estimator:
    """The estimator of an optimizer's options."""
    if shaping is None:
        return (OneSided if one_sided else TwoSided)(perturbation_scale)
    shape = SHAPES[shaping]
    if not one_sided:
        return ShapedTwoSided(perturbation_scale, shape)
    unit = perturbation_scale if shape is leave_one_out else 1.0
    return ShapedOneSided(perturbation_scale, shape, unit)


def shaping_of(shaping: Shaping, num_directions: int, one_sided: bool) -> str | None:
    """The shape that an optimizer uses; "auto" compares directions where they share a batch.

    Raises:
        OptionError: An unknown name, one direction, or a baseline for pairs.
    """
    if shaping == "auto":
        return "loo" if one_sided and num_directions > 1 else None
    if shaping is None:
        return None
    if shaping not in SHAPES:
        raise OptionError(f"shaping={shaping!r}; choose 'auto', one of {sorted(SHAPES)} or None")
    if num_directions < 2:
        raise OptionError(
            f"shaping={shaping!r} compares directions with each other, and num_directions="
            f"{num_directions}; choose at least 2"
        )
    if shaping == "loo" and not one_sided:
        raise OptionError(
            "shaping='loo' with one_sided=False: the two points of a pair are each other's "
            "baseline; choose one_sided=True or shaping=None"
        )
    return shaping


def _shaped(shape: Shape, values: np.ndarray) -> np.ndarray:
    # Rounding would leave a tiny mean or spread where all are equal, and a step along it.
    if (values == values[0]).all():
        return np.zeros(len(values))
    try:
        with np.errstate(over="raise"):
            return shape(values)
    except FloatingPointError as error:
        raise OverflowError(str(error)) from error
