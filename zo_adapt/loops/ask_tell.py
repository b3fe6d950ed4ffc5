"""Ask and tell: the optimizers where the caller does the evaluating."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import NoData
from zo_adapt.errors import ObjectiveError, OptionError, StepTooLargeError
from zo_adapt.evaluation.failures import OnNonFinite
from zo_adapt.evaluation.places import OnePoint
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.interrupt import uninterrupted
from zo_adapt.loops.arguments import check_optimizer
from zo_adapt.loops.box import Box, Form, Units
from zo_adapt.loops.given_losses import GivenLosses
from zo_adapt.loops.result import StopReason
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.schedule import Budget, Progress
from zo_adapt.options import check_run
from zo_adapt.term import MEASUREMENT, Step
from zo_adapt.view.group import Group
from zo_adapt.view.parameters import ParameterView

AVERAGED = 0.75
"""From this share of the budget on, the variables are averaged."""
SKIPPED = "skipped"


class Best(NamedTuple):
    """The best candidate so far, by the value it was given.

    Args:
        x: In the form of ``x0``.
        value: As it was told. Of a noisy function that is a lucky value more than a good point.
    """

    x: Any
    value: float


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
        bounds: (low, high) of all variables, of each, or by name; None or infinity is no bound.
            What would go beyond comes back by reflection, so that every candidate is within.
        units: Numbers > 0, one for each variable: steps are alike when measured in these. "auto":
            the width of the bounds, or |x0| where there are not two. None: 1.
        on_nonfinite: What ``tell`` makes of a simulation that failed: of NaN and infinity and, but
            for "stop", of None and of the error that it raised (given in the value's place).
            "stop" raises; "worst" takes them for the worst other value of the step, or of the last
            step that had one (the worst ever would be divided by a small perturbation); "skip"
            gives the step up, and the next one has other candidates. After eight such steps in a
            row it is "worst" for one: the present point may have no value itself.

    Attributes:
        queries: Values received so far.
        steps: Steps done. All candidates of a step are compared with each other: a simulator
            with noise does best with the same random numbers for all of them. An optimizer that was
            given neither ``lr`` nor ``displacement`` first asks for candidates that tell it how far
            steps may go, and a few times later; ``tell`` then gives a record of the kind
            "measurement", which is no step.
        stop_reason: Why ``ask`` has nothing more to ask, or None.
        best: The best candidate so far and its value; None before any.

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
        bounds: Any = None,
        units: Units = None,
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        check_optimizer(optimizer)
        if not isinstance(optimizer, ZerothOrder):
            raise OptionError(
                f"{type(optimizer).__name__} needs more than values; choose MeZO, MeZOSVRG, ZOSVRG"
            )
        max_steps, max_queries, seed = check_run(max_steps, max_queries, seed)
        self._form, tensors = Form.of(x0)
        self._box = Box(tensors, bounds, units)
        self._view = ParameterView(self._box.inner(tensors), noise=noise, groups=groups)
        self._view.farthest = self._box.farthest
        self._optimizer = copy.deepcopy(optimizer)
        self._optimizer.start(self._view, seed)
        self._samples = Samples(NoData(), None, seed)
        self._budget = Budget(max_steps, max_queries)
        self._losses = GivenLosses(maximize=maximize, on_nonfinite=on_nonfinite)
        self._asked: list[Probe] = []
        self._sum: tuple[int, dict[str, Tensor]] = (0, {})
        self.best: Best | None = None
        self.queries = self.steps = 0
        self.stop_reason: StopReason | None = None

    @property
    def x(self) -> Any:
        """The variables now (a copy), in the form of ``x0``."""
        return self._form.filled(self._box.outer(self._view.tensors))

    @property
    def averaged(self) -> Any:
        """The mean of the variables over the last quarter of the budget, in the form of ``x0``.

        Of a noisy function it is nearer to the answer than the last point; ``x`` before then.
        """
        count, sums = self._sum
        if not count:
            return self.x
        means = {name: total / count for name, total in sums.items()}
        return self._form.filled({n: m.to(self._view.tensors[n].dtype) for n, m in means.items()})

    def ask(self) -> list[Any]:
        """The candidates of the next step, the same ones until ``tell``; empty at the end."""
        if not self._asked and self.stop_reason is None:
            with uninterrupted():  # seeds are drawn and probes kept, or neither
                self._asked = self._next()
        return [self._candidate(probe) for probe in self._asked]

    def tell(self, values: Sequence[Any] | np.ndarray | Tensor) -> Step:
        """Take the candidates' values, in their order, and move.

        Raises:
            ObjectiveError: Not one number for every candidate, or nothing was asked.
            NonFiniteObjectiveError: NaN or infinity, unless ``on_nonfinite`` says otherwise. Even
                then where there is nothing to go by: "worst" and no value was finite so far, every
                candidate raised an error and none had a value before, 100 steps in a row were
                skipped. As with the others, nothing has changed and `tell` can be called again for
                the same candidates.
            StepTooLargeError: The step would leave the range of the dtype. It is not made, and
                the run ends with the variables as they were.
        """
        if not self._asked:
            raise ObjectiveError("tell without ask; call ask() for the candidates first")
        losses = self._losses.of(
            values,
            len(self._asked),
            measuring=self._optimizer.is_measuring,
            first=self.best is None,
        )
        with uninterrupted():  # the optimizer, the counts and the variables are those of one step
            return self._taken(losses)

    def _taken(self, losses: Sequence[float]) -> Step:
        """The step that follows from values, made."""
        self._note(losses)
        if self._losses.gives_up(losses, measuring=self._optimizer.is_measuring):
            return self._skipped(len(losses))
        evaluations = [Evaluation(loss) for loss in losses]
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
        if step.kind != MEASUREMENT and self._budget.used(self.steps, self.queries) > AVERAGED:
            self._average()
        step = step._replace(
            step=self.steps, queries=self.queries, value=self._losses.sign * step.value
        )
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
        with OnePoint(self._view, probe.at).entered():
            return self._form.filled(self._box.outer(self._view.tensors))

    def _skipped(self, candidates: int) -> Step:
        """A step that is given up; its candidates count, and others are asked about next."""
        self.queries += candidates
        self._asked = []
        return Step(self.steps, self.queries, math.nan, 0.0, math.nan, kind=SKIPPED)

    def _note(self, losses: Sequence[float]) -> None:
        """Keep the best candidate."""
        least = min((loss for loss in losses if math.isfinite(loss)), default=math.inf)
        if least < (math.inf if self.best is None else self._losses.sign * self.best.value):
            found = self._candidate(self._asked[losses.index(least)])
            self.best = Best(found, self._losses.sign * least)

    def _average(self) -> None:
        count, sums = self._sum
        now = {n: t.double() for n, t in self._box.outer(self._view.tensors).items()}
        self._sum = count + 1, {n: t + sums.get(n, 0.0) for n, t in now.items()}
