"""Whether the differences of a coarse model are signal: half precision and quantised weights round.

Such a model is accurate to few digits: where the change of an activation is below its last place,
the difference of two losses is rounding, and those at eps and 2 eps have little in common.
Measured per token at eps = 1e-3: correlation with the true ones 0.3 to 0.4 in bf16, 0.12 in
LLM.int8, 0.99 where the weights alone are in eight bits. And kernels of quantised weights need not
give the same values when a probe is asked again.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from zo_adapt.data.sources import Batch, Source
from zo_adapt.errors import RoundingWarning, ZOError
from zo_adapt.evaluation.answers import Answer
from zo_adapt.evaluation.protocol import Evaluator, Probe
from zo_adapt.evaluation.values import on_host
from zo_adapt.interrupt import is_from_handler
from zo_adapt.noise import philox
from zo_adapt.term import Shift, Term
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import local

logger = logging.getLogger(__name__)
LEAST = 0.9
"""Correlation from which on differences count as signal."""
DIRECTIONS, ROWS, TRIES, SEED, STREAM = 4, 8, 7, 7, 12
COARSE_BITS = 16
LARGE = 1 << 16
PACKED = 1 << 10
"""Elements of an integer buffer from which it is weights (GPTQ, AWQ), not positions or counts."""


def is_quantised(model: nn.Module | None) -> bool:
    """Whether some weights are integers, or tensors of a class of their own.

    Example:
        >>> is_quantised(nn.Linear(2, 2))
        False
        >>> layer = nn.Linear(2, 2)
        >>> layer.register_buffer("qweight", torch.zeros(64, 64, dtype=torch.int32))
        >>> is_quantised(layer)
        True
    """
    if model is None:
        return False
    kinds = (torch.Tensor, nn.Parameter)
    odd = (type(local(p)) not in kinds or not p.is_floating_point() for p in model.parameters())
    integers = (not b.is_floating_point() and b.numel() >= PACKED for b in model.buffers())
    return any(odd) or any(integers)


def why_not_the_same(first: Sequence[Answer], ask: Callable[[], Sequence[Answer]]) -> str | None:
    """How the answers to the same probe differ when it is asked again; None if they do not.

    Args:
        first: Answers that are there.
        ask: Gives them again; what it evaluates is not counted as queries.
    """
    before, after = _numbers(first), _numbers(ask())
    if np.array_equal(before, after):
        return None
    change = abs(after - before).max() / abs(before).max()
    return f"the same probe has other values when it is asked again (relatively {change:.1g})"


def _numbers(answers: Sequence[Answer]) -> np.ndarray:
    found = on_host([answer.returned for answer in answers])
    checked = [a._replace(returned=one).checked() for a, one in zip(answers, found, strict=True)]
    return np.concatenate([np.ravel(answer.returned) for answer in checked])


class Signal(NamedTuple):
    """What was found.

    Args:
        correlation: Of the differences at mu and 2 mu.
        perturbation_scale: mu, the smallest tried with a correlation of 0.9, or the best one.
        usual: The mu that was tried first.
    """

    correlation: float
    perturbation_scale: float
    usual: float

    @property
    def is_enough(self) -> bool:
        """Whether differences at this mu are signal."""
        return self.correlation >= LEAST

    def __str__(self) -> str:
        raised = self.perturbation_scale / self.usual
        more = f", {raised:.0f} times the usual one" if raised > 1 else ""
        return (
            f"differences at mu={self.perturbation_scale:.3g}{more} and at twice that correlate by "
            f"{self.correlation:.2f} (above {LEAST} they are more than rounding)"
        )


def is_coarse(model: nn.Module | None) -> bool:
    """Whether a model computes in half precision, or with quantised weights."""
    if model is None:
        return False
    return is_quantised(model) or any(
        p.element_size() * 8 <= COARSE_BITS and (p.is_floating_point() or p.numel() > LARGE)
        for p in model.parameters()
    )


def seeds() -> list[int]:
    """Of the directions that are tried; the same in every run."""
    return [int(word) for word in philox.words_numpy(SEED, 0, STREAM, 0, 1)[:DIRECTIONS]]


def along(view: ParameterView, seed: int, mu: float) -> Shift:
    """The point mu z(seed) from here, each group by its own scale."""
    moving = [(i, g) for i, g in enumerate(view.groups) if g.perturbation_scale > 0]
    return Shift(tuple(Term(seed, mu * g.perturbation_scale, i) for i, g in moving))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sets of differences, about zero; 0 where most of the first are none.

    A few that are not zero, of a function in steps, agree by chance.
    """
    if 2 * np.count_nonzero(one) < len(one):
        return 0.0
    norm = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / norm if norm > 0 else 0.0


def measured(evaluator: Evaluator, source: Source, usual: float) -> Signal:
    """Double mu until the differences are signal.

    Args:
        evaluator: Its queries are not the run's.
        source: Of the rows; the first eight are asked about.
        usual: The first mu.
    """
    batch, view = Batch(source, range(min(ROWS, len(source)))), evaluator.view

    def differences(mu: float) -> np.ndarray:
        points = [along(view, seed, sign * mu) for seed in seeds() for sign in (1.0, -1.0)]
        found = evaluator.evaluate([Probe(point, batch) for point in points])
        values = [e.value if e.per_example is None else e.per_example for e in found]
        pairs = zip(values[::2], values[1::2], strict=True)
        return np.concatenate([np.atleast_1d(np.subtract(*pair)) for pair in pairs])

    mu, best = usual, Signal(-1.0, usual, usual)
    once = differences(mu)
    for _ in range(TRIES):
        twice = differences(2 * mu)
        found = Signal(correlation(once, twice), mu, usual)
        best = max(best, found)
        if found.is_enough:
            return found
        mu, once = 2 * mu, twice
    return best


def measured_first(evaluator: Evaluator, source: Source, usual: float) -> Signal | None:
    """Measure the signal before a run, say it, and let the view's usual mu be large enough.

    None where the objective cannot be called on the first rows, or is not finite there.

    Args:
        evaluator: Its queries are not the run's.
        source: Of the rows.
        usual: The mu of a run that is given none.
    """
    try:
        found = measured(evaluator, source, usual)
    except ZOError as error:  # says itself again, where it counts
        logger.debug("the signal was not measured: %r", error)
        return None
    except Exception as error:
        if is_from_handler(error):
            raise
        logger.debug("the signal was not measured: %r", error)
        return None
    logger.info("%s", found)
    if found.is_enough:
        raised = found.perturbation_scale > usual
        evaluator.view.least_perturbation = found.perturbation_scale if raised else 0.0
        return found
    warnings.warn(
        f"{found}: the values of this model are too coarse to be tuned by. Compute in float32, or "
        "quantise the weights alone",
        RoundingWarning,
        stacklevel=4,
    )
    return found
