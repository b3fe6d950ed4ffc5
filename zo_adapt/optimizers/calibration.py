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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, NoData
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.evaluation.start_checks import warn_of_change
from zo_adapt.optimizers.directions import direction, seeds_of
from zo_adapt.optimizers.responses import Nonlinearity, Response, distinct, response
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.optimizers.search import LEAST_DIRECTIONS, LEAST_ROWS, RATIO, RoundSize, Search
from zo_adapt.term import HERE, Shift
from zo_adapt.view.group import Group

TRAINED_RATIO, WITHOUT_DATA, COUNT_RATIO = 0.4, 0.5, 0.5
"""Of the even to the odd response, where the displacement is right; see ``Calibration.aim``."""
MOST_ROUNDS = 12
SEARCH_STREAM = 6


@dataclass
class Calibration(Search):
    """The search by forward passes: which probes a round needs, and what their values say.

    Args:
        queries: Made so far.
        alone: Whether rows are asked about one at a time.
        here: The value at the weights in the round before, of a function without data.
    """

    queries: int = 0
    alone: bool = False
    here: float | None = None

    def aim(self, samples: Samples, budget: Budget, numel: int) -> None:
        """Choose the ratio of damage to signal that is looked for."""
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
        seed: int,
        budget: Budget,
    ) -> list[Probe]:
        """The points of the next round; none where it is found, or the budget is too small.

        Args:
            samples: Where rows come from.
            groups: The parts of the view.
            seed: Of the run. The search draws directions apart from the steps, whose are the same
                as where the displacement is given.
            budget: Of the run.
        """
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
        pairs = [*zip(seeds_of(seed, SEARCH_STREAM, len(parts), self.rounds), parts, strict=True)]
        for distance, asked in ((1.0, pairs), (0.5, pairs[:once])):
            for seed, batch in asked:
                for sign in (distance, -distance):
                    along = direction(seed, sign * self.displacement, groups)
                    probes.append(Probe(Shift(along), batch))
        self.queries += sum(len(probe.batch) for probe in probes)
        return probes

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
        self.narrow(seen)
        if self._several and evaluations[0].per_example is None and not self.finished:
            # Means of several rows scatter less than rows do, and the ratio is one of rows: they
            # are asked about alone from now on, at the same number of queries.
            self.alone, self.low, self.high, self.last = True, None, None, None
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
