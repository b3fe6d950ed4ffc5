"""Any function as an objective."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from objectives.mixture import Mixable
from zo_adapt.data.forms import Collate
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.failures import OnNonFinite, checked_on_nonfinite
from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.objective import Objective, checked_min_rows


class CallableObjective(Mixable, Objective):
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
        mean_over_rows: True where the value is a mean over rows, so that a batch may be cut; False
            where it is not (in-batch negatives, a metric); "auto": True if it gives one value per
            example. See ``Objective``.
        min_rows: Fewest rows that one direction sees; "all": the whole batch.
        independent_rows: False where the value of a row depends on the rows beside it.
        on_nonfinite: What a run makes of points at which the function has no value: it raised an
            error (a simulation that fails), or gave None, NaN or infinity. "stop": an error is
            raised as it is, NaN and infinity end the run. "worst": they get the worst other value
            of the step. "skip": the step is given up, its queries count, and other points are asked
            about. With these two the first error is logged, and the run ends where there is nothing
            to go by: by the error itself where all points of the first step raised one, and after
            100 steps in a row without a value. KeyboardInterrupt, SystemExit, the errors of this
            package and a GPU without memory end it in any case.

    Raises:
        OptionError: ``function`` cannot be called, ``min_rows`` is below 1, ``on_nonfinite``.

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
        mean_over_rows: bool | Literal["auto"] = "auto",
        min_rows: int | Literal["all"] = 1,
        independent_rows: bool = True,
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        if not callable(function):
            raise OptionError(f"{function!r} cannot be called; give a function of a batch")
        self.function, self.model, self.collate = function, model, collate
        self.maximize, self.step_like = maximize, step_like
        self.independent_rows = independent_rows
        self.on_nonfinite = checked_on_nonfinite(on_nonfinite)
        self.mean_over_rows, self.min_rows = mean_over_rows, checked_min_rows(min_rows)
        if model is not None:  # without one the loop itself looks for dropout that is on
            self.evaluating = EvaluationMode(model)

    def __call__(self, batch: Any) -> Any:
        """What the function returns."""
        return self.function(batch)
