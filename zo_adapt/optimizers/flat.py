"""Notice that the points of the estimates give equal values, and say which knob to turn."""

import math
import warnings
from collections.abc import Sequence

from zo_adapt.errors import FlatObjectiveWarning

FLAT_STEPS = 20
"""Steps after which the user is warned, if none of them saw any difference."""
FLAT_SHARE, FLAT_DIRECTIONS, FEWEST_STEPS = 0.9, 100, 3
"""Or this share of zeros, judged on so many directions of so many steps at least."""


class FlatWatch:
    """Counts differences that are exactly zero over the first steps of a run.

    Later ones are not judged: a run that had a signal and has lost it may have arrived.

    Args:
        state: What ``state`` gave, to go on from there.
    """

    def __init__(self, state: Sequence[int] = (0, 0, 0, False)) -> None:
        self._steps, self._zeros, self._total, self._judged = state

    @property
    def state(self) -> list[int]:
        """All that changes from step to step."""
        return [self._steps, self._zeros, self._total, self._judged]

    def observe(self, projected: Sequence[float], perturbation_scale: float) -> None:
        """Take in the projected gradients of one step."""
        if self._judged:
            return
        self._steps += 1
        self._zeros += sum(p == 0.0 for p in projected)
        self._total += len(projected)
        # Few zeros among many need many to be told apart from chance; zeros alone do not.
        many = self._total >= FLAT_DIRECTIONS and self._steps >= FEWEST_STEPS
        everywhere = self._steps >= FLAT_STEPS and self._zeros == self._total
        if not (many or everywhere):
            return
        self._judged = True
        share = self._zeros / self._total
        if share >= FLAT_SHARE:
            message = self._message(share, perturbation_scale)
            warnings.warn(message, FlatObjectiveWarning, stacklevel=5)

    def _message(self, share: float, mu: float) -> str:
        seen = (
            f"{self._zeros} of {self._total} differences in {self._steps} steps were exactly zero "
            f"({share:.0%}), so "
        )
        if share == 1.0:
            return (
                f"{seen}nothing is learned: raise perturbation_scale (now {mu:.3g}); if the "
                "objective counts (accuracy), give it softness=... where it has that, or every "
                "direction more rows (batch_size together with the objective's min_rows); or "
                "check that the view reaches the objective; zo_adapt.diagnose(...) measures which"
            )
        # A change is as likely again at twice mu, or in twice the rows, as long as it is rare.
        further, more = 0.5 / (1.0 - share), math.log(0.5) / math.log(share)
        return (
            f"{seen}little is learned: raise perturbation_scale (now {mu:.3g}; about {further:.0f} "
            f"times that would move half of them) or the rows of a direction (about {more:.0f} "
            "times as many: batch_size together with the objective's min_rows), or give an "
            "objective that counts its softness=...; "
            "zo_adapt.diagnose(...) measures which"
        )
