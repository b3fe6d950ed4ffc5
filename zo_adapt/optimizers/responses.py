"""What noise of one displacement does to the values: damage, signal beside it, nonlinearity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.protocol import Evaluation

RESOLUTION = 1e-6
"""Of the values: even responses below it are rounding."""


class Response(NamedTuple):
    """What noise of one displacement does.

    Args:
        even: Mean of the even responses, in the objective's unit.
        odd: Root mean square of the odd ones.
        rounding: Even responses up to this may be none.
        error: Standard error of ``even``.
        nonlinearity: Part of the odd responses that is not in proportion to the distance, of the
            root mean square of all; 0 where it was not asked.
    """

    even: float
    odd: float
    rounding: float = 0.0
    error: float = 0.0
    nonlinearity: float = 0.0

    @property
    def is_straight(self) -> bool:
        """Whether values change, and in a straight line: no distance does any damage."""
        return self.odd > 0.0 and abs(self.even) <= self.rounding

    @property
    def ratio(self) -> float:
        """Damage over signal; 0 where nothing responds, infinite where values are not finite."""
        if not (math.isfinite(self.even) and math.isfinite(self.odd)):
            return math.inf
        return self.even / self.odd if self.odd > 0.0 else 0.0

    @property
    def doubt(self) -> float:
        """Standard error of the ratio."""
        return self.error / self.odd if self.odd > 0.0 else 0.0


def response(batches: Sequence[Batch], evaluations: Sequence[Evaluation]) -> Response:
    """The response from the values at the base points and at the pairs of every direction.

    Args:
        batches: That of every direction.
        evaluations: At the base points; at theta + rho z and theta - rho z, of every direction; and
            half as far away, of the first directions or of none.
    """
    bases = distinct(batches)
    base = {id(batch): values(one) for batch, one in zip(bases, evaluations, strict=False)}
    pairs = [values(one) for one in evaluations[len(bases) :]]
    ends = 2 * len(batches)
    odd = _odd(pairs[:ends])
    even = [
        (plus + minus) / 2 - base[id(batch)]
        for batch, plus, minus in zip(batches, pairs[:ends:2], pairs[1:ends:2], strict=True)
    ]
    largest = max(float(np.abs(values(one)).max()) for one in evaluations)
    damage = np.concatenate(even)
    with np.errstate(invalid="ignore"):
        error = float(damage.std(ddof=1)) / math.sqrt(damage.size) if damage.size > 1 else 0.0
        bend = _nonlinearity(odd, damage, _odd(pairs[ends:]), RESOLUTION * largest)
    return Response(float(damage.mean()), _rms(odd), RESOLUTION * largest, error, bend)


def _odd(pairs: Sequence[np.ndarray]) -> np.ndarray:
    """Half of the differences of the pairs."""
    halves = [(plus - minus) / 2 for plus, minus in zip(pairs[::2], pairs[1::2], strict=True)]
    return np.concatenate(halves) if halves else np.zeros(0)


def _nonlinearity(odd: np.ndarray, even: np.ndarray, halfway: np.ndarray, rounding: float) -> float:
    """How much of the first responses is not linear, from the odd ones at half the distance."""
    if not halfway.size:
        return 0.0
    odd, even = odd[: halfway.size], even[: halfway.size]
    # odd = a rho + b rho^3, so that what is bent, b rho^3, is four thirds of the difference.
    bent = _rms(odd - 2 * halfway) * 4 / 3
    scale = math.hypot(_rms(odd), float(even.std()))
    return bent / scale if bent > rounding else 0.0


def _rms(numbers: np.ndarray) -> float:
    return float(np.sqrt(np.square(numbers).mean()))


def values(evaluation: Evaluation) -> np.ndarray:
    """Those of the examples where there are any, or else that of the batch."""
    if evaluation.per_example is None:
        return np.array([evaluation.value])
    return np.asarray(evaluation.per_example, dtype=np.float64)


def distinct(batches: Sequence[Batch]) -> list[Batch]:
    """Every batch once, in order."""
    return list({id(batch): batch for batch in batches}.values())


MOST_NONLINEAR = 0.35
"""Nonlinearity of the responses where the displacement is right."""
MOST_IN_VAIN, ALL_NOISE = 3, 1.2
"""Rounds that come nearer in vain; and more than responses of any model had, where the noise of
values alone has 1.5."""
FALL = 0.9
"""From a round to a nearer one, where it is a model's; of few rows one round may rise by chance."""
NEARER = 0.75


@dataclass
class Nonlinearity:
    """That of the round before, with which the next one is compared.

    Args:
        before: 0 before the first round.
        in_vain: Rounds, one after the other, that came nearer while it did not fall.
        nearest: The nearest displacement at which responses were as linear as is right: noise of
            the values would have shown there, more than further away. None: there was none.
    """

    before: float = 0.0
    in_vain: int = 0
    nearest: float | None = None

    def factor(self, seen: Response) -> float:
        """By which the displacement may change."""
        if seen.nonlinearity <= 0.0:
            return math.inf
        factor = MOST_NONLINEAR / seen.nonlinearity
        # It grows by about rho^2, and by no more than rho where nothing linear is left.
        return factor if factor < 1.0 else math.sqrt(factor)

    def is_noise(self, seen: Response, here: float, last: float | None) -> bool:
        """Whether the values are too noisy to tell: two evaluations at one place differ as much."""
        is_nearer = last is not None and here < NEARER * last
        before = self.before if is_nearer else math.inf
        self.before = seen.nonlinearity
        self.in_vain = self.in_vain + 1 if seen.nonlinearity > FALL * before else 0
        if seen.nonlinearity < MOST_NONLINEAR:
            self.nearest = min(self.nearest or here, here)
        if self.nearest is not None and self.nearest <= here:
            return False
        return seen.nonlinearity > ALL_NOISE or self.in_vain == MOST_IN_VAIN
