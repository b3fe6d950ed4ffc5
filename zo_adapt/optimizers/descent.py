"""What changes from step to step while estimates are applied, and the step itself."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from zo_adapt.errors import OptionError
from zo_adapt.optimizers.schedule import Annealing, Progress, schedule_named
from zo_adapt.optimizers.step_size import StepSize
from zo_adapt.term import HERE, Shift, Terms, scaled
from zo_adapt.view.group import Group

FIRST_DIRECTIONS, KEPT_SCALE = 24, 0.7
"""Where the displacement is found: after so many directions the scale may fall so far at most."""


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


class Annealed:
    """The factor on the learning rates that annealing has come to in a run.

    Args:
        annealing: When to divide, and by how much; None: never.

    Example:
        >>> annealed = Annealed(Annealing(factor=5.0, window=2))
        >>> [annealed.observe(loss) for loss in (1.0, 1.0, 2.0, 2.0)]
        [1.0, 1.0, 1.0, 0.2]
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


class Descent:
    """What changes from step to step while estimates are applied: running scale and annealing.

    Args:
        step_size: The hyper-parameters.
        displacement: How far a weight may go over this run.
    """

    def __init__(self, step_size: StepSize, displacement: float) -> None:
        self.step_size, self.displacement = step_size, displacement
        self.scale = RunningScale(step_size.scale_memory)
        self.seen, self.least_scale = 0, 0.0
        """Directions so far, and what estimates are divided by at least."""
        self.annealed = Annealed(step_size.annealing)

    def rate(self, directions: float, progress: Progress, lr: float | None = None) -> float:
        """The learning rate now, schedule and annealing included.

        Args:
            directions: N, directions in the estimate.
            progress: Where the step stands in its run.
            lr: In place of the step size's own.
        """
        if lr is None:
            lr = self.step_size.full_rate(self.displacement, directions, progress.share)
        schedule = schedule_named(self.step_size.schedule_in_force)
        return lr * self.annealed.factor * schedule(progress.done)

    def update(
        self, terms: Terms, projected: Sequence[float], rate: float, groups: Sequence[Group]
    ) -> Shift:
        """The step along -terms at a rate that ``rate`` gave."""
        scale = max(self._observed(projected), self.least_scale)
        # 0 where no difference was ever seen: then there is nothing to scale, either.
        if self.step_size.normalized and scale > 0.0:
            terms = scaled(terms, 1.0 / scale)
        return downhill(terms, rate, groups, self.step_size.weight_decay)

    def _observed(self, projected: Sequence[float]) -> float:
        """The running scale with these values."""
        scale, before = self.scale.update(projected), self.seen
        self.seen += len(projected)
        if self.step_size.finds_displacement and before < FIRST_DIRECTIONS <= self.seen:
            # The displacement was right at this slope. Where the slope falls, as near a minimum, so
            # must the steps; where it rises they stay, for noise does as much damage there.
            self.least_scale = KEPT_SCALE * scale
        return scale

    @property
    def slope(self) -> float:
        """The scale as a multiple of that of the first directions, at most 1."""
        first = self.least_scale / KEPT_SCALE
        return min(self.scale.value / first, 1.0) if first > 0.0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step."""
        return {
            "scale": [self.scale.total, self.scale.weight],
            "least_scale": [self.seen, self.least_scale],
            "annealing": self.annealed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.scale.total, self.scale.weight = state["scale"]
        self.seen, self.least_scale = state.get("least_scale", [0, 0.0])
        # Runs of the first version have None here where nothing anneals.
        if state["annealing"] is not None:
            self.annealed.load_state_dict(state["annealing"])


def downhill(terms: Terms, lr: float, groups: Sequence[Group], weight_decay: float = 0.0) -> Shift:
    """Update theta <- (1 - lr weight_decay) theta - lr g, each group by its own lr.

    Raises:
        OptionError: The decay is 1 or more.
    """
    # Ties are no signal: where the estimate is exactly zero nothing moves, not even by the decay.
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
