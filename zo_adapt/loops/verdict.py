"""What a run's values say about its step, once it is over."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from zo_adapt.step import Step

FEWEST_STEPS = 24
"""Shorter runs are trials: nothing is said of them."""
SURE = 3.0
"""Standard errors that a difference must have."""


def verdict(history: Sequence[Step], sign: float) -> str:
    """Whether the loss never fell, or still fell at the end, and what to do; empty if neither.

    Args:
        history: The steps of the run.
        sign: -1.0 where the objective is maximised.
    """
    losses = [sign * step.value for step in history]
    if len(losses) < FEWEST_STEPS or not all(map(math.isfinite, losses)):
        return ""
    quarter = len(losses) // 4
    first, last = losses[:quarter], losses[-quarter:]
    kind = "loss" if sign > 0 else "value"
    fell = _fall(first, last)
    if abs(fell) < 1.0:
        return (
            f"the {kind} did not improve ({sign * fmean(last):.4g}): give the run more queries, or "
            "a batch more rows; zo_adapt.diagnose(...) says what drowns the signal"
        )
    if fell < -SURE:
        return (
            f"the {kind} ended worse than it began ({sign * fmean(first):.4g} to "
            f"{sign * fmean(last):.4g}): the steps are too long for this objective; give a smaller "
            "displacement (or lr), or see what zo_adapt.diagnose(...) says"
        )
    half = quarter // 2
    if half >= FEWEST_STEPS // 4 and _fall(last[:half], last[half:]) > SURE:
        return (
            f"the {kind} still improved when the run ended: a larger budget (max_queries or "
            "max_steps) or, where a displacement or lr was given, a larger one would go further"
        )
    return ""


def _fall(before: Sequence[float], after: Sequence[float]) -> float:
    """How far the mean fell, in standard errors."""
    error = math.hypot(stdev(before) / math.sqrt(len(before)), stdev(after) / math.sqrt(len(after)))
    fall = fmean(before) - fmean(after)
    return fall / error if error > 0 else math.copysign(math.inf, fall) if fall else 0.0
