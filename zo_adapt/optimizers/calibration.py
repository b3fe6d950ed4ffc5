"""How far a run may go, found by forward passes before its first step.

A run's noise moves every weight by about the displacement rho. What that does is seen at once: with
the responses of single examples to a direction z of that length,

    even_i(rho) = [f_i(theta + rho z) + f_i(theta - rho z)] / 2 - f_i(theta)     damage: about rho^2
    odd_i(rho)  = [f_i(theta + rho z) - f_i(theta - rho z)] / 2                  signal: about rho
    bent_i(rho) = 4/3 [odd_i(rho) - 2 odd_i(rho / 2)]                            about rho^3

In a model that was trained rho is the largest at which both

    mean(even) / rms(odd) <= 0.4                     what noise alone costs, of what there is to win
    rms(bent) / hypot(rms(odd), std(even)) <= 0.35   how nonlinear the responses are

Neither has a unit, the objective's or the weights'. The second is for a new head, whose loss is
that of chance whatever becomes of the features below it: the first says the same of every adapter.
But along z, which moves both, odd_i is the new head on the features that noise leaves, and bent_i
on what noise made of them that is no linear mixture any more, which no head undoes. Weights that
nobody has trained have no features to lose: there the first ratio alone is 0.2.

A function without data goes further: it has one value, all of it signal and none the scatter of
rows. N directions win rho sqrt(N) |g|, all noise together damages rho^2 tr(H) / 2, and the best
ratio is sqrt(N) / 2, where N counts no further than to d. (A quarter of that, and twice as much,
are worse on most functions of benchmarks/black_box.py.)

A count jumps, so that of few rows a fifth is noise. Half is seen clearly, and a third of the way
there is right (docs/choosing.md, "Of counts"). Over a new head it has no search.

Measured in seventeen views of MiniLM (docs/choosing.md, "How the step is found"). Measured again
later in a run the first ratio shrinks the steps too much, so it is not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, NoData
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.evaluation.start_checks import warn_of_change
from zo_adapt.optimizers.directions import direction
from zo_adapt.optimizers.nonlinearity import MOST, Nonlinearity
from zo_adapt.optimizers.responses import Response, distinct, response
from zo_adapt.optimizers.round_size import LEAST_DIRECTIONS, LEAST_ROWS, MOST_FACTOR, RoundSize
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import HERE, Shift
from zo_adapt.view.group import Group

RATIO, TRAINED_RATIO, WITHOUT_DATA = 0.2, 0.4, 0.5
"""Of the even to the odd response, where the displacement is right; see ``Calibration.aim``."""
COUNT_RATIO, COUNT_SHARE = 0.5, 1 / 3
"""The ratio that is looked for where values are counts, and how much of that way is right."""
UNSEEN_FACTOR, MOST_LEAP = 1 / 8, 2.0
"""Of the view's displacement where the budget allows no look, and beyond what was looked at."""
MOST_ROUNDS, MOST_FAILURES, MOST_FLAT, MOST_STRAIGHT = 12, 4, 4, 6
FLAT_FACTOR = 8.0
"""How much further to look where nothing responds."""


@dataclass
class Calibration:
    """A search for the displacement, one round of probes at a time.

    Args:
        displacement: The one tried now, and in the end the one found.
        finished: Whether it is found.
        rounds: Done so far.
        queries: Made so far.
        low, high: The largest displacement that was too small, the smallest that was too large;
            None: none was.
        last: Displacement and odd response of the round before.
        alone: Whether rows are asked about one at a time.
        begun: The displacement that the search began with.
        target: The ratio that is right.
        farthest: The largest displacement that is tried; None: any.
        counts: Whether values change in jumps.
        least: The smallest displacement that a run is given.
        here: The value at the weights in the round before, of a function without data.
        rows_factor: By which rows are more than usual: of fewer, the last round could not tell.
        nonlinearity: That of the responses, for which rounds look at half the displacement, too.
            None: it is not measured, as in weights that nobody has trained, and in runs that a
            former version began.
    """

    displacement: float
    finished: bool = False
    rounds: int = 0
    queries: int = 0
    low: float | None = None
    high: float | None = None
    last: tuple[float, float] | None = None
    alone: bool = False
    begun: float = 0.0
    target: float = RATIO
    farthest: float | None = None
    counts: bool = False
    least: float = 0.0
    rows_factor: int = 1
    here: float | None = None
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

    def aim(self, samples: Samples, budget: Budget, numel: int) -> None:
        """Choose the ratio of damage to signal that is looked for.

        Args:
            samples: Where rows come from.
            budget: Of the run.
            numel: Numbers that are tuned.
        """
        if self.counts:
            self.target = COUNT_RATIO
        elif isinstance(samples.source, NoData):
            limit = math.inf if budget.max_queries is None else budget.max_queries
            self.target = WITHOUT_DATA * math.sqrt(min(numel, limit))
            self.nonlinearity = None
        else:
            self.target = RATIO if self.nonlinearity is None else TRAINED_RATIO

    def probes(
        self,
        samples: Samples,
        groups: Sequence[Group],
        new_seeds: Callable[[int], list[int]],
        budget: Budget,
    ) -> list[Probe]:
        """The points of the next round; none where it is found, or the budget is too small."""
        parts = [] if self.finished else self._parts(samples, budget)
        if not parts:
            self.give_up()
            return []
        # Directions on the same rows where there are few parts: what noise does differs with both.
        self._several = samples.min_rows == 1 < len(parts[0])
        once = 0 if self.nonlinearity is None else len(parts)
        parts *= -(-LEAST_DIRECTIONS // len(parts))
        self._batches = parts
        probes = [Probe(HERE, batch) for batch in distinct(parts)]
        pairs = [*zip(new_seeds(len(parts)), parts, strict=True)]
        for distance, asked in ((1.0, pairs), (0.5, pairs[:once])):
            for seed, batch in asked:
                for sign in (distance, -distance):
                    along = direction(seed, sign * self.displacement, groups)
                    probes.append(Probe(Shift(along), batch))
        self.queries += sum(len(probe.batch) for probe in probes)
        return probes

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

    def take(self, evaluations: Sequence[Evaluation]) -> Response:
        """Narrow the search by the values of the last round's probes.

        A function without data is asked at the weights in every round: noise shows there.
        """
        if isinstance(self._batches[0].source, NoData):
            warn_of_change(self.here, evaluations[0].value)
            self.here = evaluations[0].value
        seen = response(self._batches, evaluations)
        if self.counts:
            # Too far harms more than too near, and of few rows either may be chance.
            seen = seen._replace(even=seen.even + seen.error, error=0.0)
            if evaluations[0].per_example is None:
                # The ratio is one of rows, whose mean scatters less than they do.
                seen = seen._replace(odd=seen.odd * math.sqrt(len(self._batches[0])))
        self._narrow(seen)
        if self._several and evaluations[0].per_example is None and not self.finished:
            # Means of several rows scatter less than rows do, and the ratio is one of rows: they
            # are asked about alone from now on, at the same number of queries.
            self.alone, self.low, self.high, self.last = True, None, None, None
        return seen

    def take_failure(self) -> Response:
        """Narrow the search where the objective was not finite."""
        seen = Response(math.inf, math.inf)
        self._narrow(seen)
        return seen

    def _parts(self, samples: Samples, budget: Budget) -> list[Batch]:
        """The rows of a round, in parts that are fair to every class; none if it costs too much."""
        limit = math.inf if budget.max_queries is None else budget.max_queries
        needed, there = samples.rows_of_a_value, len(samples.source)
        size = RoundSize(self.counts, self.nonlinearity is not None, self.alone, self.rounds)
        rows = min(max(self.rows_factor * size.rows(samples, limit), needed), there)
        too_few = rows < min(max(LEAST_ROWS, needed), there)
        too_dear = self.queries + size.cost(samples, rows) > size.share * limit
        if too_few or too_dear or self.rounds == MOST_ROUNDS:
            return []
        return samples.aside(rows).split(size.parts(samples, rows))

    def _narrow(self, seen: Response) -> None:
        self.rounds += 1
        here, ratio = self.displacement, seen.ratio
        if ratio < self.target < seen.doubt and self.rows_factor < MOST_FACTOR:
            # Rows that differ so much show no damage as often as they show any: a leap from here
            # has ended where a model forgets all. The same again, on more of them.
            self.rows_factor *= 2
            return
        if ratio == math.inf and self.low is None and self.rounds == MOST_FAILURES:
            # Not for lying too far, then: the step itself will say what is wrong.
            self.finished = True
            return
        if seen.odd == 0.0 and self.high is None and self.rounds == MOST_FLAT:
            # Nothing responds at any distance: the steps say so, from where they would be.
            self.displacement, self.finished = self._as_begun, True
            return
        if seen.is_straight and self.high is None and self.rounds == MOST_STRAIGHT:
            # Nothing bends at any distance, and so nothing bounds it.
            self.displacement, self.finished = self._as_begun, True
            return
        if self._is_too_noisy(seen):
            self.nonlinearity, self.displacement = None, self._within(self.begun)
            self.low = self.high = self.last = None
            return
        factor = self._factor(seen) if ratio < math.inf else 1 / 16
        too_far = ratio >= self.target or seen.nonlinearity >= MOST or self._saturates(seen)
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
            return
        if factor > 1.0 and here == self.farthest:
            self.finished = True
            return
        self.displacement = self._within(self._between(here * factor))
        between = self.low is not None and self.high is not None
        if self.rounds > 3 and between and self.high < 2.5 * self.low:  # type: ignore[operator]
            self.finished = True

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

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """A search that goes on from a state."""
        last, bends = state["last"], state.get("nonlinearity")
        known = {name: state[name] for name in state if name in cls.__dataclass_fields__}
        known["last"] = None if last is None else tuple(last)
        known["nonlinearity"] = None if bends is None else Nonlinearity(**bends)
        return cls(**known)
