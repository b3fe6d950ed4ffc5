"""Shapes: utilities in place of values, by comparing several values with each other.

A shape takes the values of a population, the points that are compared with each other, and gives
utilities u_k in their place; the estimate is g = 1/K sum_k u_k z_k.

    one-sided   the population: f(theta + mu z_k), K directions on one batch
    two-sided   the population: the K pairs, each shifted to mean zero (+- half its difference),
                for pairs may have other batches; u_k is that of theta + mu z_k

Ranks and z-scores have no unit: a learning rate is then how far a weight moves, as with a
normalised step. Leave-one-out is in the values' units and divided by mu: an unbiased gradient.

Ties get the average rank, and a population without spread gets zeros: it is no signal. Utilities
sum to zero, so the one-sided estimate needs no base point: K b queries on a batch of b rows.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

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
