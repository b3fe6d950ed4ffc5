"""What a run's values say about its steps, once it is over, and what to set."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.optimizers.responses import MOST_NONLINEAR
from zo_adapt.optimizers.step_size import ByDistance
from zo_adapt.term import Step

FEWEST_STEPS = 24
"""Shorter runs are trials: what their values did is not told from noise."""
SURE, LEAST_SURE = 3.0, 2.0
"""Standard errors that a difference must have to be one, and below which there is none."""


def verdict(history: Sequence[Step], sign: float, optimizer: Optimizer) -> str:
    """Whether the loss never fell, rose, or still fell at the end, and what to set.

    Of a short run, only where a count was found to bear less than the view assumes.

    Args:
        history: The steps of the run.
        sign: -1.0 where the objective is maximised.
        optimizer: As it is after the run.

    Returns:
        A sentence; empty where nothing is to be said.
    """
    losses = [sign * step.value for step in history]
    if not all(map(math.isfinite, losses)):
        return ""
    if len(losses) < FEWEST_STEPS:
        return _further(optimizer)
    quarter = len(losses) // 4
    first, last = losses[:quarter], losses[-quarter:]
    kind = "loss" if sign > 0 else "value"
    way = f"({sign * fmean(first):.4g} in the first quarter, {sign * fmean(last):.4g} in the last)"
    fell = _fall(first, last)
    if fell < -SURE:
        return f"the {kind} ended worse than it began {way}: {_shorter(optimizer)}"
    if max(fell, _fall_at_once(losses, last)) < LEAST_SURE:
        return f"the {kind} did not improve beyond its noise {way}: {_more_signal(optimizer)}"
    half = quarter // 2
    if half >= FEWEST_STEPS // 4 and _fall(last[:half], last[half:]) > SURE:
        return f"the {kind} still improved when the run ended {way}: {_longer(optimizer)}"
    return ""


def _fall(before: Sequence[float], after: Sequence[float]) -> float:
    """How far the mean fell, in standard errors."""
    error = math.hypot(stdev(before) / math.sqrt(len(before)), stdev(after) / math.sqrt(len(after)))
    fall = fmean(before) - fmean(after)
    return fall / error if error > 0 else math.copysign(math.inf, fall) if fall else 0.0


def _fall_at_once(losses: Sequence[float], last: Sequence[float]) -> float:
    """How far it fell from the very first steps, whose own scatter is the fall: by the last's."""
    few = losses[:4]
    error = stdev(last) * math.sqrt(1 / len(few) + 1 / len(last))
    fall = fmean(few) - fmean(last)
    return fall / error if error > 0 else math.copysign(math.inf, fall) if fall else 0.0


def _reach(optimizer: Optimizer) -> tuple[float, bool] | None:
    """The displacement of the run, and whether it was measured; None for a learning rate."""
    if isinstance(optimizer, ZerothOrder) and isinstance(optimizer.apply, ByDistance):
        return optimizer.state.descent.displacement, optimizer.apply.finds_displacement
    return None


def _is_bent_little(optimizer: Optimizer) -> bool:
    """Whether the displacement was found where responses are far from as nonlinear as they may."""
    finder = optimizer.state.finder if isinstance(optimizer, ZerothOrder) else None
    if finder is None or finder.looks_along or finder.calibration.rounds == 0:
        return False
    bends = finder.calibration.nonlinearity
    return bends is not None and bends.before < MOST_NONLINEAR / 2


def _further(optimizer: Optimizer) -> str:
    """What to set where a count's displacement was found far below what the view assumes."""
    finder = optimizer.state.finder if isinstance(optimizer, ZerothOrder) else None
    if finder is None or finder.is_new or finder.calibration.rounds == 0:
        return ""
    found, assumed = finder.displacement, finder.calibration.begun
    if not finder.calibration.counts or found > assumed / 2:
        return ""
    return (
        f"set {_set(assumed)} to go as far as the view assumes: {found:.3g} was measured so as to "
        "harm nothing that is right already, which may be too near for a reward that has far to go"
    )


def _shorter(optimizer: Optimizer) -> str:
    match _reach(optimizer):
        case None:
            return "the steps are too long; set a smaller lr, or none and they are measured"
        case rho, True:
            return f"the steps are too long; set a smaller one than was found, {_set(rho / 2)}"
        case rho, _:
            return (
                f"the steps are too long; leave displacement out to measure it, or {_set(rho / 2)}"
            )


def _more_signal(optimizer: Optimizer) -> str:
    more = (
        "set max_queries or batch_size larger; zo_adapt.diagnose(...) says what drowns the signal; "
        "a metric that counts has softness=... for this"
    )
    if further := _further(optimizer):
        return f"{more}; or {further}"
    match _reach(optimizer):
        case rho, False:
            return f"leave displacement out to measure it (it was {rho:.3g}), or {more}"
        case None if isinstance(optimizer, ZerothOrder):
            return f"leave lr out and the steps are measured, or {more}"
    return more


def _longer(optimizer: Optimizer) -> str:
    more = "set max_queries (or max_steps) larger"
    match _reach(optimizer):
        case None:
            return f"{more}, or lr"
        case rho, True if further := _further(optimizer):
            return f"{more}; or {further}"
        case rho, True if _is_bent_little(optimizer):
            return f"{more}, or {_set(2 * rho)}: at {rho:.3g}, as measured, responses are linear"
        case rho, True:
            return f"{more}; the displacement, measured, is {rho:.3g}"
        case rho, _:
            return f"its displacement is used up; {more}, or {_set(2 * rho)}"


def _set(rho: float) -> str:
    return f"displacement={rho:.3g}"
