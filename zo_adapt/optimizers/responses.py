"""What noise of one displacement does to the values: damage, and signal beside it."""

import math
from collections.abc import Sequence
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
    """

    even: float
    odd: float
    rounding: float = 0.0
    error: float = 0.0

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
    """The response from the values at the base points and at the pairs of every direction."""
    bases = distinct(batches)
    base = {id(batch): values(one) for batch, one in zip(bases, evaluations, strict=False)}
    pairs = evaluations[len(bases) :]
    even, odd = [], []
    for batch, up, down in zip(batches, pairs[::2], pairs[1::2], strict=True):
        plus, minus = values(up), values(down)
        even.append((plus + minus) / 2 - base[id(batch)])
        odd.append((plus - minus) / 2)
    rms = float(np.sqrt(np.square(np.concatenate(odd)).mean()))
    largest = max(float(np.abs(values(one)).max()) for one in evaluations)
    damage = np.concatenate(even)
    with np.errstate(invalid="ignore"):
        error = float(damage.std(ddof=1)) / math.sqrt(damage.size) if damage.size > 1 else 0.0
    return Response(float(damage.mean()), rms, RESOLUTION * largest, error)


def values(evaluation: Evaluation) -> np.ndarray:
    """Those of the examples where there are any, or else that of the batch."""
    if evaluation.per_example is None:
        return np.array([evaluation.value])
    return np.asarray(evaluation.per_example, dtype=np.float64)


def distinct(batches: Sequence[Batch]) -> list[Batch]:
    """Every batch once, in order."""
    return list({id(batch): batch for batch in batches}.values())
