"""How many rows a round of the search for a displacement asks about, and what it costs."""

import math
from typing import NamedTuple

from zo_adapt.data.samples import Samples

ROWS, MOST_ROWS, LEAST_ROWS, LEAST_DIRECTIONS = 16, 64, 4, 4
MOST_FACTOR = MOST_ROWS // ROWS
"""By which rows may be more than usual."""
LARGEST_SHARE, USUAL_SHARE = 0.25, 0.1
"""Of the queries, for all rounds together: the first two, and those that refine."""
COUNT_ROUND = 0.03
"""Of the queries, for a round of a count."""


class RoundSize(NamedTuple):
    """What decides it.

    Args:
        counts: Whether values change in jumps.
        halfway: Whether half the displacement is looked at, too.
        alone: Whether rows are asked about one at a time.
        before: Rounds that were before.
    """

    counts: bool
    halfway: bool
    alone: bool
    before: int

    @property
    def share(self) -> float:
        """Of the queries, what it and the rounds before it may take."""
        return LARGEST_SHARE if self.before < 2 else USUAL_SHARE

    def rows(self, samples: Samples, limit: float) -> int:
        """Rows that a budget of so many queries is worth."""
        if self.counts:
            affordable = limit * COUNT_ROUND
            wanted = range(MOST_ROWS, LEAST_ROWS, -LEAST_ROWS)
            return next((r for r in wanted if self.cost(samples, r) <= affordable), LEAST_ROWS)
        rows = ROWS if limit == math.inf else int(min(max(limit * 0.02 / 12, ROWS), MOST_ROWS))
        probes_of_a_row = 5 if self.halfway else 3
        most = limit * LARGEST_SHARE / probes_of_a_row if self.before == 0 else math.inf
        return int(min(rows, most))

    def parts(self, samples: Samples, rows: int) -> int:
        """In how many parts so many rows are asked about."""
        return max(1, rows if self.alone and samples.min_rows == 1 else rows // samples.share)

    def cost(self, samples: Samples, rows: int) -> int:
        """Queries of a round of so many rows."""
        parts = self.parts(samples, rows)
        pairs = max(parts, LEAST_DIRECTIONS) + parts * self.halfway
        return rows + 2 * pairs * -(-rows // parts)
