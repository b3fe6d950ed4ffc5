"""Ask and tell: the optimizers where the caller does the evaluating."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from zo_adapt.arguments import check_optimizer
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import NoData
from zo_adapt.errors import (
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
    StepTooLargeError,
)
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.evaluation.values import as_float64
from zo_adapt.loops.arrays import Form
from zo_adapt.loops.result import StopReason
from zo_adapt.optimizers.budget import Budget, Progress
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.options import check_run
from zo_adapt.step import MEASUREMENT, Step
from zo_adapt.view.group import Group
from zo_adapt.view.parameters import ParameterView


class AskTell:
    """An optimizer as a dialogue: ``ask`` for candidates, evaluate them anywhere, ``tell`` values.

    Step for step what ``minimize`` does with the same variables, optimizer, budget and seed. All
    state is in the object: it can be pickled or deep-copied between any two calls.

    Args:
        optimizer: ``MeZO()``, ``MeZOSVRG()``, ``ZOSVRG()``. It is copied.
        x0: Where to start: an array, a tensor, or a mapping of names to these; never changed.
            Candidates come in the same form. Integers become float64.
        max_steps: Budget in steps.
        max_queries: Budget in candidates; never exceeded.
        seed: Of the directions, 0 <= seed < 2**64.
        maximize: Larger values are better.
        noise: As for ``ParameterView``.
        groups: Variables with their own step, by name (a single array's name is "x").

    Attributes:
        queries: Values received so far.
        steps: Steps done. All candidates of a step are compared with each other: a simulator
            with noise does best with the same random numbers for all of them. An optimizer that was
            given neither ``lr`` nor ``displacement`` first asks for candidates that tell it how far
            steps may go, and a few times later; ``tell`` then gives a record of the kind
            "measurement", which is no step.
        stop_reason: Why ``ask`` has nothing more to ask, or None.

    Raises:
        OptionError: No budget, or an optimizer that needs gradients.
        ViewError: Variables that are not finite floating-point numbers.

    Example:
        >>> import numpy as np
        >>> from zo_adapt import AskTell, MeZO
        >>> asker = AskTell(MeZO(), np.zeros(2), max_queries=1000)
        >>> while candidates := asker.ask():
        ...     record = asker.tell([float(((x - 3) ** 2).sum()) for x in candidates])
        >>> bool((abs(asker.x - 3) < 0.05).all()), asker.queries
        (True, 998)
    """

    def __init__(
        self,
        optimizer: ZerothOrder,
        x0: Any,
        *,
        max_steps: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
        maximize: bool = False,
        noise: str = "gaussian",
        groups: Sequence[Group] = (),
    ) -> None:
        check_optimizer(optimizer)
        if not isinstance(optimizer, ZerothOrder):
            raise OptionError(
                f"{type(optimizer).__name__} needs more than values; choose MeZO, MeZOSVRG, ZOSVRG"
            )
        max_steps, max_queries, seed = check_run(max_steps, max_queries, seed)
        self._form, tensors = Form.of(x0)
        self._view = ParameterView(tensors, noise=noise, groups=groups)
        self._optimizer = copy.deepcopy(optimizer)
        self._optimizer.start(self._view, seed)
        self._samples = Samples(NoData(), None, seed)
        self._budget = Budget(max_steps, max_queries)
        self._sign = -1.0 if maximize else 1.0
        self._asked: list[Probe] = []
        self.queries = self.steps = 0
        self.stop_reason: StopReason | None = None

    @property
    def x(self) -> Any:
        """The variables now (a copy), in the form of ``x0``."""
        return self._form.filled(self._view.tensors)

    def ask(self) -> list[Any]:
        """The candidates of the next step, the same ones until ``tell``; empty at the end."""
        if not self._asked and self.stop_reason is None:
            self._asked = self._next()
        return [self._candidate(probe) for probe in self._asked]

    def tell(self, values: Sequence[Any] | np.ndarray | Tensor) -> Step:
        """Take the candidates' values, in their order, and move.

        Raises:
            ObjectiveError: Not one number for every candidate, or nothing was asked.
            NonFiniteObjectiveError: NaN or infinity. As with the others, nothing has changed and
                `tell` can be called again for the same candidates.
            StepTooLargeError: The step would leave the range of the dtype. It is not made, and
                the run ends with the variables as they were.
        """
        evaluations = self._checked(values)
        done = self._budget.used(self.steps, self.queries)
        self.queries += len(evaluations)
        share = self._budget.used(self.steps + 1, self.queries) - done
        self._asked = []
        try:
            step = self._optimizer.tell(evaluations, Progress(done, share))
            self._optimizer.observe(step, self._samples, self._budget, len(evaluations))
            self._view.apply(step.update)
        except StepTooLargeError:
            self.stop_reason = StopReason.STEP_TOO_LARGE
            raise
        self.steps += step.kind != MEASUREMENT
        step = step._replace(step=self.steps, queries=self.queries, value=self._sign * step.value)
        return step.brief()

    def _next(self) -> list[Probe]:
        if self.steps == self._budget.max_steps:
            self.stop_reason = StopReason.MAX_STEPS
            return []
        limit, optimizer = self._budget.max_queries, self._optimizer
        probes = optimizer.ask(self._samples, self._budget, self.queries)
        if limit is not None and self.queries + len(probes) > limit and optimizer.is_measuring:
            optimizer.skip_measurement()
            probes = optimizer.ask(self._samples, self._budget, self.queries)
        if limit is not None and self.queries + len(probes) > limit:
            self.stop_reason = StopReason.MAX_QUERIES
            return []
        return probes

    def _candidate(self, probe: Probe) -> Any:
        with self._view.shifted(probe.at.terms, probe.at.decay):
            return self._form.filled(self._view.tensors)

    def _checked(self, values: Any) -> list[Evaluation]:
        if not self._asked:
            raise ObjectiveError("tell without ask; call ask() for the candidates first")
        is_text = isinstance(values, str | bytes | bytearray | memoryview)
        is_list = isinstance(values, Sequence | np.ndarray | Tensor) and not is_text
        if not is_list or getattr(values, "ndim", 1) == 0:
            raise ObjectiveError(
                f"tell({values!r:.80}); give a list of one number for each candidate"
            )
        numbers = np.array([number(value) for value in values])
        if len(numbers) != len(self._asked):
            raise ObjectiveError(
                f"{len(numbers)} values for {len(self._asked)} candidates; give one for each"
            )
        if not np.isfinite(numbers).all() and not self._optimizer.is_measuring:
            first = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise NonFiniteObjectiveError(
                f"value {first} is {numbers[first]}; tell finite values for the same candidates"
            )
        return [Evaluation(float(self._sign * number)) for number in numbers]


def number(value: Any) -> float:
    """A value of the caller's function, as one float.

    Raises:
        ObjectiveError: It is not one number.
    """
    values = as_float64(value, "the value is", "that is not one number")
    if values.size != 1:
        raise ObjectiveError(f"the value {value!r:.80} is not one number")
    return float(values.item())
