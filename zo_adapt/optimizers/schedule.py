"""Parts of a step size: schedules, the running scale, annealing."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class RunningScale:
    """Root of an exponential mean of squares, free of the start's bias.

    v <- beta v + (1 - beta) mean(p^2);  scale = sqrt(v / (1 - beta^t))

    Args:
        beta: Memory, 0 <= beta < 1.

    Example:
        >>> scale = RunningScale(0.99)
        >>> scale.update([3.0, -3.0])
        3.0
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.total = 0.0
        self.weight = 0.0  # 1 - beta^t, summed as the total is, so that their errors cancel

    @property
    def value(self) -> float:
        """The scale; 0.0 before any value."""
        return math.sqrt(self.total / self.weight) if self.weight else 0.0

    def update(self, values: Sequence[float]) -> float:
        """Take the values in and return the scale."""
        square = math.fsum(value * value for value in values) / len(values)
        self.total = self.beta * self.total + (1.0 - self.beta) * square
        self.weight = self.beta * self.weight + (1.0 - self.beta)
        return self.value


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
        >>> annealed = Annealed(Annealing(factor=5.0, window=2))
        >>> [annealed.observe(loss) for loss in (1.0, 1.0, 2.0, 2.0)]
        [1.0, 1.0, 1.0, 0.2]
    """

    factor: float = 5.0
    threshold: float = 1.0
    window: int = 32

    def __post_init__(self) -> None:
        for name in ("factor", "threshold", "window"):
            finite(name, getattr(self, name))
        if not (self.factor > 1 and self.threshold > 0 and self.window >= 1):
            raise OptionError(f"{self}; choose factor > 1, threshold > 0, window >= 1")


class Annealed:
    """The factor on the learning rates that annealing has come to in a run.

    Args:
        annealing: When to divide, and by how much; None: never.
    """

    def __init__(self, annealing: Annealing | None) -> None:
        self.annealing = annealing
        self.factor = 1.0
        self._losses: deque[float] = deque()

    def observe(self, loss: float) -> float:
        """Take one step's loss in and return the factor on the learning rates."""
        if self.annealing is None:
            return self.factor
        window = self.annealing.window
        self._losses.append(loss)
        if len(self._losses) == 2 * window:
            losses = list(self._losses)
            earlier, recent = sum(losses[:window]), sum(losses[window:])
            # m1 / m2 > kappa without the division, so that a mean loss of zero is no fault.
            if recent > self.annealing.threshold * earlier:
                self.factor /= self.annealing.factor
            for _ in range(window):
                self._losses.popleft()
        return self.factor

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step."""
        return {"scale": self.factor, "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.factor = state["scale"]
        self._losses = deque(state["losses"])


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
