"""What looks along updates said in runs that were begun before version 2: these go on as begun."""

import math
from dataclasses import dataclass

SURE, LEAST_SURE = 3.5, 2.0
"""Standard errors of the slope from zero: followed in full, and not at all."""
LARGEST_FACTOR, MEMORY = 3.0, 0.9
"""Of a look; and the share of the evidence that the next one finds."""


@dataclass
class Evidence:
    """Parabolas of several looks, weighted by their certainty and by how recent they are.

    Args:
        weight: Sum of 1 / error^2.
        slope, curvature: Sums weighted so.
    """

    weight: float = 0.0
    slope: float = 0.0
    curvature: float = 0.0

    def add(self, slope: float, curvature: float, error: float) -> None:
        """Take one look in."""
        certainty = 1.0 / max(error, 1e-12 * abs(slope), 1e-150) ** 2
        self.weight += certainty
        self.slope += certainty * slope
        self.curvature += certainty * curvature

    def verdict(self) -> tuple[float, float]:
        """How certain the slope's sign is, 0..1, and the factor on the length of steps."""
        if self.slope == 0.0:
            return 0.0, 1.0
        sure = abs(self.slope) / math.sqrt(self.weight)
        weight = min(max((sure - LEAST_SURE) / (SURE - LEAST_SURE), 0.0), 1.0)
        flat = self.curvature <= 0.0
        best = math.copysign(math.inf, -self.slope) if flat else 1 - self.slope / self.curvature
        bounded = min(max(best, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
        return weight, float(bounded**weight)

    def fade(self, weight: float) -> None:
        """Forget a part: all that was acted on, at the certainty of the verdict."""
        factor = MEMORY * (1.0 - weight)
        self.weight *= factor
        self.slope *= factor
        self.curvature *= factor
