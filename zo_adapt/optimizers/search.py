"""The search for how far a run may go: from what noise of one distance does, the next distance,
and how many rows a round asks about.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from zo_adapt.data.samples import Samples
from zo_adapt.optimizers.responses import MOST_NONLINEAR, Nonlinearity, Response

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


RATIO = 0.2
"""Of damage to signal, where the displacement is right, unless another is aimed at."""
COUNT_SHARE = 1 / 3
"""Of the displacement that is looked for where values are counts, what is right."""
UNSEEN_FACTOR, MOST_LEAP = 1 / 8, 2.0
"""Of the view's displacement where the budget allows no look, and beyond what was looked at."""
MOST_FAILURES, MOST_FLAT, MOST_STRAIGHT = 4, 4, 6
FLAT_FACTOR = 8.0
"""How much further to look where nothing responds."""


@dataclass
class Search:
    """The largest displacement at which damage and nonlinearity keep their bounds, round by round.

    Args:
        displacement: The one tried now, and in the end the one found.
        finished: Whether it is found.
        rounds: Done so far.
        low, high: The largest displacement that was too small, the smallest that was too large;
            None: none was.
        last: Displacement and odd response of the round before.
        begun: The displacement that the search began with.
        target: The ratio of damage to signal that is right.
        farthest: The largest displacement that is tried; None: any.
        counts: Whether values change in jumps.
        least: The smallest displacement that a run is given.
        rows_factor: By which rows are more than usual: of fewer, the last round could not tell.
        nonlinearity: That of the responses, for which rounds look at half the displacement, too.
            None: it is not measured, as in weights that nobody has trained, and in runs that a
            former version began.
    """

    displacement: float
    finished: bool = False
    rounds: int = 0
    low: float | None = None
    high: float | None = None
    last: tuple[float, float] | None = None
    begun: float = 0.0
    target: float = RATIO
    farthest: float | None = None
    counts: bool = False
    least: float = 0.0
    rows_factor: int = 1
    nonlinearity: Nonlinearity | None = None

    def __post_init__(self) -> None:
        self.displacement = self._within(self.displacement)
        self.begun = self.begun or self.displacement

    @property
    def found(self) -> float:
        """How far a run should go, by what was seen so far."""
        return max(self.displacement * self._share, self.least)

    @property
    def _as_begun(self) -> float:
        """Of which a run goes as far as the search began, or may go."""
        return self._within(self.begun / self._share)

    @property
    def _share(self) -> float:
        return COUNT_SHARE if self.counts else 1.0

    def give_up(self) -> None:
        """End the search where the budget does: no further than what was seen allows."""
        if self.finished:
            return
        self.finished = True
        if self.rounds == 0:
            self.displacement *= UNSEEN_FACTOR / self._share
        elif self.last is not None and self.last[1] == 0.0 and self.high is None:
            self.displacement = self._as_begun
        elif self.low is not None:
            self.displacement = min(self.displacement, MOST_LEAP * self.low)

    def take_failure(self) -> Response:
        """Narrow the search where the objective was not finite."""
        seen = Response(math.inf, math.inf)
        self.narrow(seen)
        return seen

    def narrow(self, seen: Response) -> None:
        """Choose the next displacement by the responses at this one, or end the search."""
        self.rounds += 1
        if seen.ratio < self.target < seen.doubt and self.rows_factor < MOST_FACTOR:
            # Rows that differ so much show no damage as often as they show any: a leap from here
            # has ended where a model forgets all. The same again, on more of them.
            self.rows_factor *= 2
        elif seen.ratio == math.inf and self.low is None and self.rounds == MOST_FAILURES:
            # Not for lying too far, then: the step itself will say what is wrong.
            self.finished = True
        elif self._is_unbounded(seen):
            self.displacement, self.finished = self._as_begun, True
        elif self._is_too_noisy(seen):
            self.nonlinearity, self.displacement = None, self._within(self.begun)
            self.low = self.high = self.last = None
        else:
            self._follow(seen)

    def _follow(self, seen: Response) -> None:
        """Go further or nearer, as the responses say."""
        here = self.displacement
        factor = self._factor(seen) if seen.ratio < math.inf else 1 / 16
        too_far = (
            seen.ratio >= self.target
            or seen.nonlinearity >= MOST_NONLINEAR
            or self._saturates(seen)
        )
        if too_far:
            self.high = here if self.high is None else min(self.high, here)
        else:
            self.low = here if self.low is None else max(self.low, here)
        self.last = (here, seen.odd)
        if too_far and factor > 1.0:
            factor = 0.25
        if self.rounds > 1 and 0.7 < factor < 1.4:
            # Two rounds agree: what is left is their noise, of which a part is followed.
            self.displacement, self.finished = self._within(here * factor**0.7), True
        elif factor > 1.0 and here == self.farthest:
            self.finished = True
        else:
            self.displacement = self._within(self._between(here * factor))
            self.finished = self.rounds > 3 and self._is_narrow

    @property
    def _is_narrow(self) -> bool:
        """Whether both sides are known, and near each other."""
        return self.low is not None and self.high is not None and self.high < 2.5 * self.low

    def _is_unbounded(self, seen: Response) -> bool:
        """Whether nothing responds at any distance, or nothing bends: no distance is too large."""
        if self.high is not None:
            return False
        is_flat = seen.odd == 0.0 and self.rounds == MOST_FLAT
        return is_flat or (seen.is_straight and self.rounds == MOST_STRAIGHT)

    def _factor(self, seen: Response) -> float:
        """By which the displacement should change, as the ratios grow with it."""
        if seen.odd == 0.0:
            return FLAT_FACTOR
        # Far below the target the ratio is mostly noise: only that it is far below is known.
        most = 32.0 if seen.ratio < self.target / 20 and self.rounds < 7 else 4.0
        factor = self.target / max(seen.ratio, 1e-9)
        if self.nonlinearity is not None:
            factor = min(factor, self.nonlinearity.factor(seen))
        return min(max(factor, 1 / 32), most)

    def _is_too_noisy(self, seen: Response) -> bool:
        """Whether values are too noisy for their nonlinearity; damage, a mean, is still seen."""
        if self.nonlinearity is None or not math.isfinite(seen.ratio):
            return False
        last = None if self.last is None else self.last[0]
        is_noise = self.nonlinearity.is_noise(seen, self.displacement, last)
        return is_noise and seen.ratio < self.target

    def _saturates(self, seen: Response) -> bool:
        """Whether the signal no longer grows with the displacement: values are anything there."""
        if self.last is None or self.counts:
            return False
        before, odd = self.last
        return self.displacement > 1.9 * before and odd > 0.0 and seen.odd < 1.2 * odd

    def _within(self, wanted: float) -> float:
        return wanted if self.farthest is None else min(wanted, self.farthest)

    def _between(self, wanted: float) -> float:
        low, high = self.low or 0.0, math.inf if self.high is None else self.high
        if low < wanted < high or low == 0.0 or high == math.inf:
            return wanted
        return math.sqrt(low * high)
