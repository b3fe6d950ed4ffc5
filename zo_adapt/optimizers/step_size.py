"""How an estimate is applied: learning rate, schedule, normalisation, decay, annealing.

Three ways, s(t) the schedule at progress t, r the running scale of the projected gradients:

    plain:       theta <- theta - lr s(t) g                       ``Rate(lr)``
    normalised:  theta <- theta - lr s(t) g / r                   ``Rate(lr, normalize=True)``
    by distance: the same with lr = rho sqrt(N dt / int s^2)      ``ByDistance(rho)``
"""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

from zo_adapt.errors import OptionError
from zo_adapt.optimizers.schedule import (
    Annealing,
    Schedule,
    described,
    schedule_named,
)
from zo_adapt.optimizers.settings import Settings
from zo_adapt.options import finite, positive, positive_or_none

FARTHEST = 1.5
"""Of a displacement that was measured: how far one step may go along the gradient."""


@dataclass(frozen=True, repr=False, kw_only=True)
class StepSize(Settings, ABC):
    """Base of the ways to apply an estimate.

    Args:
        schedule: "constant", "linear", "cosine", "cooldown" (constant, and linearly to zero in the
            last eighth) or a callable of the progress.
        weight_decay: Decoupled, as in AdamW.
        scale_memory: beta of the running scale.
        annealing: Algorithm 4 of MeZO-SVRG, or None.

    Raises:
        OptionError: A number outside its range.
    """

    schedule: str | Schedule = "linear"
    weight_decay: float = 0.0
    scale_memory: float = 0.98
    annealing: Annealing | None = None

    def __post_init__(self) -> None:
        schedule_named(self.schedule_in_force)
        self._set(
            weight_decay=finite("weight_decay", self.weight_decay),
            scale_memory=finite("scale_memory", self.scale_memory),
        )
        if not self.weight_decay >= 0:
            raise OptionError(f"weight_decay={self.weight_decay}; choose weight_decay >= 0")
        if not 0 <= self.scale_memory < 1:
            raise OptionError(f"scale_memory={self.scale_memory}; choose 0 <= scale_memory < 1")

    @property
    @abstractmethod
    def normalized(self) -> bool:
        """Whether estimates are divided by their running scale."""

    @abstractmethod
    def full_rate(self, displacement: float, directions: float, share: float) -> float:
        """The learning rate at factor 1 of schedule and annealing.

        Args:
            displacement: How far a weight may go over the run.
            directions: N, directions in the estimate.
            share: Of the budget, which the step uses.
        """

    @property
    def schedule_in_force(self) -> str | Schedule:
        """That of a run."""
        return self.schedule

    def displacement_on(self, usual: float) -> float:
        """How far a weight may go on a view that lets it go as far as ``usual``."""
        return usual

    @property
    def finds_displacement(self) -> bool:
        """Whether the way a weight may go is measured before the first step."""
        return False

    def settings(self) -> dict[str, Any]:
        """Every hyper-parameter by name, as JSON can hold it."""
        own = super().settings() | {"schedule": described(self.schedule_in_force)}
        if self.annealing is not None:
            own["annealing"] = list(self.annealing.settings().values())
        return own


@dataclass(frozen=True, repr=False)
class ByDistance(StepSize):
    """Steps such that noise alone would move each weight by rho over the whole run.

    theta <- theta - rho sqrt(N dt / int s^2) s(t) g / r,
    with N directions in g and dt the step's share of the budget. rho is a root mean square,
    whatever the budget, the batch and N. What a longer run has to spare goes into smaller steps.

    Args:
        displacement: rho, in the parameters' units, > 0. None: found by forward passes, of 2 to 5%
            of the queries before the first step and, in weights that nobody has trained where they
            are few beside the run's directions, 3.5% later. Then no step goes further than 1.5 rho
            along the gradient. Of an objective that counts (``step_like``) it is what the view
            assumes over a new head, at most that over trained weights, and up to their size in a
            module that may be untrained.
        schedule: "constant", "linear", "cosine", "cooldown" (constant, and linearly to zero in the
            last eighth) or a callable of the progress. "auto": "cooldown".
        weight_decay: Decoupled, as in AdamW.
        scale_memory: beta of the running scale r, 0 <= beta < 1.
        annealing: Algorithm 4 of MeZO-SVRG, ``Annealing(...)``, or None.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> ByDistance(0.25, schedule="cosine")
        ByDistance(displacement=0.25, schedule='cosine')
    """

    displacement: float | None = None
    _: KW_ONLY
    schedule: str | Schedule = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(displacement=positive_or_none("displacement", self.displacement))

    @property
    def schedule_in_force(self) -> str | Schedule:
        """Constant to the last eighth, unless another is given.

        Noise adds up in squares: of all schedules that let it go as far, the constant one goes the
        farthest along the gradient, and the end lets what noise moved last come to rest.
        """
        return "cooldown" if self.schedule == "auto" else self.schedule

    @property
    def normalized(self) -> bool:
        """Always: a distance has no use for the objective's unit."""
        return True

    def full_rate(self, displacement: float, directions: float, share: float) -> float:
        """Rho sqrt(N dt / int s^2)."""
        # A normalised estimate from N directions of pure noise has a mean square of 1 / N in every
        # weight, so a run adds sum lr^2 s^2 / N = rho^2 sum s^2 dt / int s^2 = rho^2 to it.
        length = math.sqrt(directions * share / self._power)
        # Along the gradient itself a step of lr goes lr, however little the noise adds. Beyond what
        # was looked at nothing is known of it: a run of two steps would leap.
        return displacement * (min(length, FARTHEST) if self.finds_displacement else length)

    def displacement_on(self, usual: float) -> float:
        """Rho, or the view's own, where a search begins."""
        return self.displacement or usual

    @property
    def finds_displacement(self) -> bool:
        """Where none was given."""
        return self.displacement is None

    @cached_property
    def _power(self) -> float:
        """The integral of s(t)^2 over a run; 1 for a schedule that is zero throughout."""
        schedule = schedule_named(self.schedule_in_force)
        squares = (schedule((k + 0.5) / 256) ** 2 for k in range(256))
        return math.fsum(squares) / 256 or 1.0


@dataclass(frozen=True, repr=False)
class Rate(StepSize):
    """Steps at a learning rate, plain or normalised by the running scale.

    Args:
        lr: Learning rate, > 0.
        normalize: Divide estimates by the running root mean square of their projected gradients.
        schedule: As of ``ByDistance``. "auto": "linear" when normalised, else "constant", as the
            papers have it.
        weight_decay: Decoupled, as in AdamW; < 1 / lr.
        scale_memory, annealing: As of ``ByDistance``.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> Rate(1e-3)
        Rate(lr=0.001, schedule='constant')
    """

    lr: float
    _: KW_ONLY
    normalize: bool = False
    schedule: str | Schedule = "auto"

    def __post_init__(self) -> None:
        self._set(lr=positive("lr", self.lr))
        if self.schedule == "auto":
            self._set(schedule="linear" if self.normalize else "constant")
        super().__post_init__()
        if self.weight_decay * self.lr >= 1:
            raise OptionError(f"weight_decay={self.weight_decay}; choose 0 <= weight_decay < 1/lr")

    @property
    def normalized(self) -> bool:
        """As ``normalize`` says."""
        return self.normalize

    def full_rate(self, displacement: float, directions: float, share: float) -> float:
        """As given, however long the run."""
        return self.lr
