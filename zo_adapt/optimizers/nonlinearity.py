"""How nonlinear the responses to noise may be, and when it is only the values that are noisy."""

import math
from dataclasses import dataclass

from zo_adapt.optimizers.responses import Response

MOST = 0.35
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
        factor = MOST / seen.nonlinearity
        # It grows by about rho^2, and by no more than rho where nothing linear is left.
        return factor if factor < 1.0 else math.sqrt(factor)

    def is_noise(self, seen: Response, here: float, last: float | None) -> bool:
        """Whether the values are too noisy to tell: two evaluations at one place differ as much.

        Args:
            seen: The responses of this round.
            here: Its displacement.
            last: That of the round before.
        """
        is_nearer = last is not None and here < NEARER * last
        before = self.before if is_nearer else math.inf
        self.before = seen.nonlinearity
        self.in_vain = self.in_vain + 1 if seen.nonlinearity > FALL * before else 0
        if seen.nonlinearity < MOST:
            self.nearest = min(self.nearest or here, here)
        if self.nearest is not None and self.nearest <= here:
            return False
        return seen.nonlinearity > ALL_NOISE or self.in_vain == MOST_IN_VAIN
