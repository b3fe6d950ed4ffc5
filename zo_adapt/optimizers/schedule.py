"""Parts of a step size, schedules and annealing, and the budget that their progress is through."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from zo_adapt.errors import OptionError
from zo_adapt.optimizers.settings import Settings
from zo_adapt.options import finite

Schedule = Callable[[float], float]
"""Progress through the budget, 0..1 -> factor on the learning rate."""


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def _cooldown(progress: float) -> float:
    return min(1.0, 8.0 * (1.0 - progress))


# Functions with a name, unlike lambdas, survive a pickle of the optimizer that holds them.
SCHEDULES: dict[str, Schedule] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cooldown": _cooldown,
}


def schedule_named(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or the callable itself.

    Raises:
        OptionError: No such schedule.
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule={schedule!r}; choose one of {sorted(SCHEDULES)} or a callable")
    return SCHEDULES[schedule]


def described(schedule: str | Schedule) -> str | list[float]:
    """A schedule's name, or its values at the quarters of a run if it has none."""
    # A function has no form that a later process could compare; its values have.
    known = schedule if isinstance(schedule, str) else _name_of(schedule)
    return known or [float(schedule_named(schedule)(quarter / 4)) for quarter in range(5)]


def _name_of(schedule: Schedule) -> str | None:
    return next((name for name, known in SCHEDULES.items() if known is schedule), None)


@dataclass(frozen=True, repr=False)
class Annealing(Settings):
    """Divide both learning rates when the loss stops falling (MeZO-SVRG, Algorithm 4).

    With m1 and m2 the mean loss of the last ``window`` steps and of the ``window`` before, the
    rates are divided by ``factor`` when m1 / m2 > ``threshold``. Each window is judged once.

    Args:
        factor: alpha > 1.
        threshold: kappa > 0; 1.0 anneals when the mean loss has risen.
        window: Steps of a window (the paper: the steps of an epoch).

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> Annealing(factor=3.0)
        Annealing(factor=3.0, threshold=1.0, window=32)
    """

    factor: float = 5.0
    threshold: float = 1.0
    window: int = 32

    def __post_init__(self) -> None:
        for name in ("factor", "threshold", "window"):
            finite(name, getattr(self, name))
        if not (self.factor > 1 and self.threshold > 0 and self.window >= 1):
            raise OptionError(f"{self}; choose factor > 1, threshold > 0, window >= 1")


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
