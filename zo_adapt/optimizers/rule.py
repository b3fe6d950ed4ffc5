"""How an estimate is applied: learning rate, schedule, normalisation, decay, annealing."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from zo_adapt.errors import OptionError
from zo_adapt.optimizers.schedule import Annealing, RunningScale, Schedule, schedule_named
from zo_adapt.options import positive
from zo_adapt.term import HERE, Shift, Terms, scaled
from zo_adapt.view.group import Group


class Progress(NamedTuple):
    """Where a step stands in its run.

    Args:
        done: Share of the budget used before the step, 0..1.
        share: Share of the budget that the step itself uses.
    """

    done: float = 0.0
    share: float = 1e-3


NOWHERE = Progress()
"""For ask and tell without a budget: the first of a thousand equal steps."""


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


class StepRule:
    """How far a step goes along an estimate.

    Three rules, s(t) the schedule at progress t, r the running scale of the projected gradients:

        plain:       theta <- theta - lr s(t) g                       (``lr`` given)
        normalised:  theta <- theta - lr s(t) g / r                   (``lr``, ``normalize=True``)
        by distance: the same with lr = rho sqrt(N dt / int s^2)      (``lr=None``)

    In the last, N is the number of directions in g and dt the step's share of the budget: over the
    whole run noise alone would move each weight by rho (root mean square), whatever the budget, the
    batch and N. What a longer run has to spare goes into smaller steps.

    Args:
        lr: Learning rate, or None for the rule by distance.
        displacement: rho, in the parameters' units.
        normalize: None: exactly when ``lr`` is None; a rate in absolute terms is taken at its word.
        schedule: "constant", "linear", "cosine" or a callable of the progress; None: "linear" when
            normalised, else "constant".
        weight_decay: Decoupled, as in AdamW.
        scale_memory: beta of the running scale.
        annealing: Algorithm 4 of MeZO-SVRG, or None.

    Raises:
        OptionError: A number outside its range.
    """

    def __init__(
        self,
        lr: float | None,
        *,
        normalize: bool | None = None,
        schedule: str | Schedule | None = None,
        weight_decay: float = 0.0,
        scale_memory: float = 0.98,
        annealing: Annealing | None = None,
    ) -> None:
        if lr is None and normalize is False:
            raise OptionError("normalize=False needs a learning rate: give lr > 0")
        self.lr = None if lr is None else positive("lr", lr)
        self.normalize = lr is None if normalize is None else normalize
        default = "linear" if self.normalize else "constant"
        self.schedule = schedule_named(schedule if schedule is not None else default)
        if not 0 <= weight_decay * (lr or 0.0) < 1 or weight_decay < 0:
            raise OptionError(f"weight_decay={weight_decay}; choose 0 <= weight_decay < 1/lr")
        self.weight_decay = weight_decay
        if not 0 <= scale_memory < 1:
            raise OptionError(f"scale_memory={scale_memory}; choose 0 <= scale_memory < 1")
        self.scale_memory, self.annealing = scale_memory, annealing
        self.restart(0.0)

    def restart(self, displacement: float) -> None:
        """Forget the run; ``displacement`` is rho for the next one."""
        self.displacement = displacement
        self.scale = RunningScale(self.scale_memory)
        self._annealed = 1.0
        if self.annealing is not None:
            self.annealing.restart()

    def rate(self, lr: float | None, directions: float, progress: Progress) -> float:
        """The learning rate now, schedule and annealing included."""
        if lr is None:
            lr = self.displacement * math.sqrt(directions * progress.share / self._power)
        return lr * self._annealed * self.schedule(progress.done)

    @cached_property
    def _power(self) -> float:
        """The integral of s(t)^2 over a run; 1 for a schedule that is zero throughout."""
        squares = (self.schedule((k + 0.5) / 256) ** 2 for k in range(256))
        return math.fsum(squares) / 256 or 1.0

    def update(
        self,
        terms: Terms,
        projected: Sequence[float],
        rate: float,
        groups: Sequence[Group],
    ) -> Shift:
        """The step along -terms at a rate that ``rate`` gave."""
        scale = self.scale.update(projected)
        if self.normalize and scale > 0.0:
            terms = scaled(terms, 1.0 / scale)
        return descent(terms, rate, groups, self.weight_decay)

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step."""
        annealing = None if self.annealing is None else self.annealing.state_dict()
        scale = [self.scale.total, self.scale.weight]
        return {"scale": scale, "annealed": self._annealed, "annealing": annealing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.scale.total, self.scale.weight = state["scale"]
        self._annealed = state["annealed"]
        if self.annealing is not None:
            self.annealing.load_state_dict(state["annealing"])

    def observe(self, loss: float) -> None:
        """Let the annealing see the loss of a step."""
        if self.annealing is not None:
            self._annealed = self.annealing.observe(loss)


def descent(terms: Terms, lr: float, groups: Sequence[Group], weight_decay: float = 0.0) -> Shift:
    """Update theta <- (1 - lr weight_decay) theta - lr g, each group by its own lr.

    Nothing moves, not even by the decay, when the estimate is exactly zero: ties are no signal.

    Raises:
        OptionError: The decay is 1 or more.
    """
    if all(term.coefficient == 0.0 for term in terms):
        return HERE
    if lr * weight_decay >= 1.0:
        raise OptionError(
            f"weight_decay={weight_decay} at lr={lr:.3g} turns the weights' sign; choose "
            f"weight_decay < {1 / lr:.3g}"
        )
    moved = tuple(
        term._replace(coefficient=-lr * groups[term.group or 0].lr * term.coefficient)
        for term in terms
    )
    return Shift(moved, 1.0 - lr * weight_decay)
