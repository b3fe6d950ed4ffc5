"""What the self-test of a served model found."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What the self-test found.

    Args:
        noise: Largest difference of a token's log-probability between two adapters that are equal.
        signal: Correlation of the differences that eps and 2 eps make; NaN where it was not tested.
        perturbation_scale: The eps, in the view's units: the default of the run is no smaller.
        raised: How often the usual eps was doubled for the signal's sake.
    """

    noise: float
    signal: float
    perturbation_scale: float
    raised: int = 0

    def __str__(self) -> str:
        if math.isnan(self.signal):
            return "self-test passed: the server gives no scores, so that signal was not measured"
        more = f", {2**self.raised} times the usual one" if self.raised else ""
        return (
            f"self-test passed: equal adapters differ by {self.noise:.2g} a token; differences at "
            f"eps={self.perturbation_scale:.3g}{more} and twice that correlate by {self.signal:.3f}"
        )
