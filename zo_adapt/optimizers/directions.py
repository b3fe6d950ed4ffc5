"""Directions as terms: from seeds to probes, from values to an estimate.

Values are compared as they are, or by their shapes: utilities in their place. A shape takes the
values of a population, the points that are compared with each other; the estimate is
g = 1/K sum_k u_k z_k.

    one-sided   the population: f(theta + mu z_k), K directions on one batch
    two-sided   the population: the K pairs, each shifted to mean zero (+- half its difference),
                for pairs may have other batches; u_k is that of theta + mu z_k

Ranks and z-scores have no unit: a learning rate is then how far a weight moves, as with a
normalised step. Leave-one-out is in the values' units and divided by mu: an unbiased gradient.

Ties get the average rank, and a population without spread gets zeros: it is no signal. Utilities
sum to zero, so the one-sided estimate needs no base point: K b queries on a batch of b rows.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.noise import philox
from zo_adapt.term import Shift, Term, Terms
from zo_adapt.view.group import Group

Shape = Callable[[np.ndarray], np.ndarray]
Shaping = Literal["none", "ranks", "zscore"]


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
    # f_k - sum_{j != k} f_j / (K - 1) = (f_k - mean) K / (K - 1): one pass in place of K.
    count = len(values)
    less: np.ndarray = (values - values.mean()) * count / (count - 1)
    return less


SHAPES: dict[str, Shape] = {"ranks": ranks, "zscore": z_scores}
"""The shapes without a unit, by the name that estimators know them by."""


def shaped(shape: Shape, values: np.ndarray) -> np.ndarray:
    """The utilities of a population; zeros where all values are equal.

    Raises:
        OverflowError: The squares of the values are beyond any float.
    """
    # Rounding would leave a tiny mean or spread where all are equal, and a step along it.
    if (values == values[0]).all():
        return np.zeros(len(values))
    try:
        with np.errstate(over="raise"):
            return shape(values)
    except FloatingPointError as error:
        raise OverflowError(str(error)) from error


class Directions(NamedTuple):
    """The directions of an estimate, how far along them it looks, and on which rows.

    Args:
        seeds: Of K directions.
        batches: K, that of every direction; one batch may be that of several.
        groups: The parts of the view.
        perturbation_scale: mu, in the parameters' units; > 0.
    """

    seeds: Sequence[int]
    batches: Sequence[Batch]
    groups: Sequence[Group]
    perturbation_scale: float

    def probe(self, number: int, factor: float, at: Shift) -> Probe:
        """The point ``at`` + factor mu z of one direction, on its batch."""
        along = direction(self.seeds[number], factor * self.perturbation_scale, self.groups)
        # One term a direction, also where the place is reached along the same one.
        return Probe(at.plus(along), self.batches[number])


class Estimate(NamedTuple):
    """A gradient estimate.

    Args:
        terms: The vector, as sum_k c_k z(s_k).
        projected: Projected gradients, one per direction.
        value: Mean loss at the point (no probe of its own: the mean of the pair, the base,
            or the mean of the perturbed points where there is no base).
    """

    terms: Terms
    projected: tuple[float, ...]
    value: float


def seeds_of(seed: int, stream: int, count: int, number: int = 0) -> list[int]:
    """Seeds of directions apart from those of a run's steps, a function of its seed."""
    words = philox.words_numpy(seed, number, stream, 0, -(-count // philox.WORDS))
    seeds: list[int] = words[:count].tolist()
    return seeds


def direction(seed: int, coefficient: float, groups: Sequence[Group]) -> Terms:
    """The terms of coefficient * z(seed), each group by its own perturbation_scale."""
    if len(groups) == 1:
        return (Term(seed, coefficient),)
    return tuple(
        Term(seed, coefficient * group.perturbation_scale, index)
        for index, group in enumerate(groups)
        if group.perturbation_scale > 0
    )


def gradient(directions: Directions, projected: Sequence[float]) -> Terms:
    """1/K sum_k p_k z_k, unbiased in every group."""
    share = 1.0 / len(directions.seeds)
    pairs = zip(directions.seeds, projected, strict=True)
    each = (direction_terms(seed, p * share, directions.groups) for seed, p in pairs)
    return tuple(term for terms in each for term in terms)


def direction_terms(seed: int, projected: float, groups: Sequence[Group]) -> Terms:
    """P z, the estimate along one direction, unbiased in every group."""
    if len(groups) == 1:
        return (Term(seed, projected),)
    # A probe stretched by s in a group sees p = s z.grad there: its share is p z / s, so that
    # E g = grad f in every group, whatever its scale.
    return tuple(
        Term(seed, projected / group.perturbation_scale, index)
        for index, group in enumerate(groups)
        if group.perturbation_scale > 0
    )
