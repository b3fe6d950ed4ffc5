"""How far a run may go from the weights that are there: the optimizers' own search, explained."""

import math
from typing import NamedTuple

from zo_adapt.data.samples import Samples
from zo_adapt.errors import NonFiniteObjectiveError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.optimizers.calibration import Calibration
from zo_adapt.optimizers.finder import finder_of
from zo_adapt.optimizers.responses import MOST_NONLINEAR, Response
from zo_adapt.optimizers.schedule import NO_LIMIT


class Found(NamedTuple):
    """What the search gave.

    Args:
        displacement: How far noise alone may move a weight over a run.
        reason: A sentence.
        queries: Forwards of one sample made.
    """

    displacement: float
    reason: str
    queries: int


def find_displacement(evaluator: LocalEvaluator, samples: Samples, seed: int) -> Found:
    """Search as an optimizer does before its first step, with no budget to keep.

    Args:
        evaluator: Answers the probes.
        samples: Where rows come from; minibatches drawn later are as without the search.
        seed: Of the directions.
    """
    view, before = evaluator.view, evaluator.queries
    counts = evaluator.objective.step_like
    finder = finder_of(view, view.displacement, step_like=counts)
    if finder is None:
        return Found(
            view.displacement,
            f"{view.displacement:.3g}, what the view assumes: the value changes in jumps, and by "
            "weights that nobody has trained it is right by chance alone, so that no distance does "
            "any damage; try twice and half of it",
            0,
        )
    search = finder.calibration
    search.aim(samples, NO_LIMIT, view.numel)
    looks: list[tuple[float, Response]] = []

    while probes := search.probes(samples, view.groups, seed, NO_LIMIT):
        at = search.displacement
        try:
            looks.append((at, search.take(evaluator.evaluate(probes))))
        except NonFiniteObjectiveError:
            looks.append((at, search.take_failure()))
    reason = _reason(search, view.displacement, looks)
    return Found(search.found, reason, evaluator.queries - before)


def _reason(search: Calibration, usual: float, looks: list[tuple[float, Response]]) -> str:
    found = search.found
    if all(seen.odd == 0.0 for _, seen in looks):
        farthest = max(at for at, _ in looks)
        return (
            f"{found:.3g}, what the view assumes: no value changed as far as {farthest:.3g} away, "
            "so the objective does not see the view, or counts what the weights hardly move"
        )
    if all(seen.is_straight for _, seen in looks):
        farthest = max(at for at, _ in looks)
        return (
            f"{found:.3g}, what the view assumes: as far as {farthest:.3g} away the value changes "
            "in a straight line, so nothing bounds it; add what the weights are to cost"
        )
    at, seen = min(looks, key=lambda look: abs(math.log(look[0] / search.displacement)))
    if not math.isfinite(seen.ratio):
        return f"{found:.3g} or less: at {at:.3g} the objective is not finite"
    if search.counts and (found == search.least or search.displacement == search.farthest):
        return (
            f"{found:.3g}, as far as a run by a count goes there: at {at:.3g} damage is "
            f"{seen.ratio:.0%} of what single values gain or lose along a direction"
        )
    if search.counts:
        return (
            f"{found:.3g} (the view assumes {usual:.3g}): a third of {search.displacement:.3g}, "
            f"where damage is to be {search.target:.0%} of what single values gain or lose along a "
            f"direction; at {at:.3g} it is {seen.ratio:.0%}"
        )
    bends, most = "", f"{search.target:.0%}"
    if search.nonlinearity is not None:
        bends = f", and {seen.nonlinearity:.0%} of what they do is not linear"
        most = f"{most}, and {MOST_NONLINEAR:.0%},"
    return (
        f"{found:.3g} (the view assumes {usual:.3g}): noise of {at:.3g} in every weight adds "
        f"{seen.even:.3g} to the value, {seen.ratio:.0%} of the {seen.odd:.3g} that single values "
        f"gain or lose along a direction{bends}; {most} is right at most: more is damage, less is "
        "time lost"
    )
