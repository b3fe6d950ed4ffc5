"""Any function as an objective."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from objectives.mixture import Mixable
from zo_adapt.data.sources import Collate
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.mode import EvaluationMode


class CallableObjective(Mixable):
    """A function of a batch, with what a loop needs to know about it.

    A bare function is an objective too; this adds evaluation mode of the model behind it, and how
    examples become a batch.

    Args:
        function: ``batch -> float``, or one value per example (a 1-d tensor, array or list).
        model: Put into evaluation mode during a step, each module's own mode restored afterwards.
        collate: Makes a batch of a list of examples; torch's default when None.
        maximize: True for a reward: more is better.
        step_like: True where the value changes in jumps, as a count does: the optimizers' own
            perturbation is then ten times as large.

    Raises:
        OptionError: ``function`` cannot be called.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> objective = CallableObjective(lambda x: layer(x).square().sum(1), model=layer)
        >>> objective(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        model: nn.Module | None = None,
        collate: Collate | None = None,
        maximize: bool = False,
        step_like: bool = False,
    ) -> None:
        if not callable(function):
            raise OptionError(f"{function!r} cannot be called; give a function of a batch")
        self.function, self.model, self.collate = function, model, collate
        self.maximize, self.step_like = maximize, step_like
        if model is not None:
            # Absent without a model, so that the loop itself looks for dropout that is on.
            self.evaluating: Callable[[], AbstractContextManager[None]] = EvaluationMode(model)

    def __call__(self, batch: Any) -> Any:
        """What the function returns."""
        return self.function(batch)
