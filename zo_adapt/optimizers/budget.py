"""What a run may use, and where in it a step stands."""

import math
from typing import NamedTuple


class Progress(NamedTuple):
    """Where a step stands in its run.

    Args:
        done: Share of the budget used before the step, 0..1.
        share: Share of the budget that the step itself uses.
    """

    done: float = 0.0
    share: float = 1e-3


NO_BUDGET = Progress()
"""For ask and tell without a budget: every step is the first of a thousand equal ones."""


class Budget(NamedTuple):
    """What a run may use; None is no limit of that kind.

    Args:
        max_steps: Steps.
        max_queries: Forwards of one sample.
    """

    max_steps: int | None = None
    max_queries: int | None = None

    def used(self, steps: int, queries: int) -> float:
        """The share that is used, 0..1."""
        pairs = ((steps, self.max_steps), (queries, self.max_queries))
        return max((count / limit for count, limit in pairs if limit), default=0.0)

    def planned(self, queries: int) -> str:
        """What a run of equal steps will come to, in words.

        Args:
            queries: Of one step.

        Example:
            >>> Budget(max_queries=40_000).planned(128)
            'about 312 steps, 40,000 queries planned'
        """
        by_queries = self.max_queries // queries if self.max_queries and queries else math.inf
        steps = min(by_queries, math.inf if self.max_steps is None else self.max_steps)
        if steps == math.inf:
            return ""
        most = self.max_queries or steps * queries
        return (
            f"about {steps:,} steps, {min(most, steps * queries + queries - 1):,} queries planned"
        )


NO_LIMIT = Budget()
"""For runs that end when their caller says so."""
