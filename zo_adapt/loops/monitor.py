"""Metrics of interest: measured beside the objective, never minimised, their queries apart."""

import math
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from zo_adapt.data.examples import Data, as_data
from zo_adapt.data.forms import named_sets
from zo_adapt.data.sources import Batch, Source
from zo_adapt.errors import (
    ArgumentTypeError,
    NonFiniteObjectiveError,
    OptionError,
    UndefinedMetricError,
)
from zo_adapt.evaluation.locally import Locally
from zo_adapt.evaluation.objective import Objective, ObjectiveLike, as_objective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import EvaluatedBy, Evaluator, Probe
from zo_adapt.evaluation.start_checks import check_all_examples
from zo_adapt.loops.arguments import check_data, checked_objective
from zo_adapt.loops.run import Run
from zo_adapt.options import at_least_one
from zo_adapt.ranks.evaluator import shared
from zo_adapt.ranks.group import Ranks
from zo_adapt.term import HERE
from zo_adapt.view.parameters import ParameterView


class Watching(Protocol):
    """Measures what the estimates of a run are made of.

    Attributes:
        every: Steps from one measurement to the next.
        queries: Forwards of one sample made for it.
    """

    every: int

    @property
    def queries(self) -> int:
        """See the class."""

    def measure(self) -> dict[str, float]:
        """Figures by name, after the run's last step."""


@runtime_checkable
class OfEstimates(Protocol):
    """What watches the estimates of a run, as ``TrackVariance`` does, and no objective."""

    def watching(self, run: Run, evaluation: EvaluationOptions) -> Watching:
        """Watch a run that begins."""


@dataclass(frozen=True, eq=False)
class Metrics:
    """What to watch during a run: objectives by name, on some data, every so many steps.

    They are measured on all of the data, as one batch, at the end as well, and reported with their
    own sign. Their queries count apart, outside the budget.

    Args:
        objectives: By the names that they are reported under; ``TrackVariance`` among them watches
            the noise of the run's estimates, at its own steps.
        data: As for ``minimize``, or several of these by name, which end the metrics' names; None:
            the data of the run.
        every: Steps from one measurement to the next (in ``ZOTrainer``, logging has its own).

    Raises:
        ArgumentTypeError: Not a mapping of objectives.
        OptionError: ``every`` below 1.

    Example:
        >>> Metrics({"largest": max}, every=10).every
        10
    """

    objectives: Mapping[str, "ObjectiveLike | OfEstimates"] = field(default_factory=dict)
    data: Any = None
    every: int = 100
    tracked: Mapping[str, OfEstimates] = field(default_factory=dict, init=False)
    """Those of the objectives that watch the estimates themselves."""

    def __post_init__(self) -> None:
        if not isinstance(self.objectives, Mapping):
            raise ArgumentTypeError(
                f"metrics are a {type(self.objectives).__name__}; give objectives by name, as "
                "{'accuracy': Accuracy(model)}"
            )
        tracked = {n: one for n, one in self.objectives.items() if isinstance(one, OfEstimates)}
        checked = {
            name: _checked(name, one)
            for name, one in self.objectives.items()
            if not isinstance(one, OfEstimates)
        }
        object.__setattr__(self, "objectives", checked)
        object.__setattr__(self, "tracked", tracked)
        check_data(self.data)
        object.__setattr__(self, "every", at_least_one("every", self.every))


def _checked(name: str, given: ObjectiveLike) -> Objective:
    try:
        return checked_objective(given)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"metric {name!r}: {error}") from error


def as_metrics(metrics: Any) -> Metrics:
    """The metrics as they are, or a mapping as ``Metrics``; None is none.

    Raises:
        ArgumentTypeError: Something else.
    """
    if isinstance(metrics, Metrics):
        return metrics
    return Metrics() if metrics is None else Metrics(metrics)


class Monitor:
    """Measures metrics at the weights as they are.

    Args:
        metrics: What to measure.
        view: Whose weights.
        data: For metrics without data of their own; several by name are measured each.
        evaluation: How.
        batch_size: Most rows in one call where ``evaluation`` sets no limit.
        way: Where values come from.
        ranks: Who shares the work; None: this process is alone.

    Raises:
        OptionError: ``TrackVariance`` among the metrics of a model that is served.
    """

    def __init__(
        self,
        metrics: Metrics,
        view: ParameterView,
        data: Any,
        *,
        evaluation: EvaluationOptions,
        batch_size: int | None,
        way: EvaluatedBy = Locally(),
        ranks: Ranks | None = None,
    ) -> None:
        if metrics.tracked and not isinstance(way, Locally):
            raise OptionError(
                f"{next(iter(metrics.tracked))!r} watches the noise of estimates that are made in "
                f"this process, and {type(way).__name__} asks elsewhere; leave it out"
            )
        self.every = metrics.every
        self._step, self._last, self._done = -1, dict[str, float](), set[str]()
        self._evaluation, self._asked = evaluation, metrics.tracked
        self._tracked: dict[str, Watching] = {}
        # The run's trunk is filled by its own examples: these would push them out.
        options = replace(evaluation, reuse_trunk="off", micro_batch_size=None)
        most = evaluation.micro_batch_size or batch_size
        self._ready = {
            name + suffix: _prepared(
                as_objective(metric), view, as_data(rows), options, most, way, ranks
            )
            for suffix, rows in _sets(data if metrics.data is None else metrics.data)
            for name, metric in metrics.objectives.items()
            if not isinstance(metric, OfEstimates)
        }

    def follow(self, run: Run) -> None:
        """Watch the estimates of this run."""
        self._tracked = {
            n: asked.watching(run, self._evaluation) for n, asked in self._asked.items()
        }

    @property
    def queries(self) -> int:
        """Forwards of one sample made here."""
        tracked = sum(one.queries for one in self._tracked.values())
        return tracked + sum(evaluator.queries for evaluator, _ in self._ready.values())

    def after(self, step: int) -> dict[str, float] | None:
        """The metrics that are due after this step; None where none is."""
        due = self._watching_at(step)
        if self._ready and step % self.every == 0:
            due |= self._ready.keys()
        return self._measured(step, due) if due else None

    def watched(self, step: int) -> dict[str, float]:
        """What watches the estimates and is due after this step."""
        due = self._watching_at(step)
        return self._measured(step, due) if due else {}

    def logged(self, step: int) -> dict[str, float]:
        """The objectives, and what else is due after this step, for a log with steps of its own."""
        names = self._ready.keys() | self._watching_at(step)
        return self._measured(step, names) if names else {}

    def _watching_at(self, step: int) -> set[str]:
        return {name for name, one in self._tracked.items() if step % one.every == 0}

    def at(self, step: int) -> dict[str, float] | None:
        """All metrics at the weights after this step. None without metrics."""
        names = self._ready.keys() | self._tracked.keys()
        return self._measured(step, names) if names else None

    def _measured(self, step: int, names: Set[str]) -> dict[str, float]:
        """What is due, in the order in which it was given; nothing is measured twice at a step."""
        if step != self._step:
            self._step, self._last, self._done = step, {}, set[str]()
        for name, ready in self._ready.items():
            if name in names - self._done:
                self._last[name] = _measured(*ready)
        for name, tracked in self._tracked.items():
            if name in names - self._done:
                self._last |= {f"{name}_{n}": value for n, value in tracked.measure().items()}
        self._done |= names
        return dict(self._last)


def _sets(data: Any) -> list[tuple[str, Any]]:
    """What metrics are measured on, with what is added to their names."""
    sets = named_sets(data)
    return [("", data)] if sets is None else [(f"_{name}", one) for name, one in sets.items()]


def _prepared(
    metric: Objective,
    view: ParameterView,
    examples: Data,
    options: EvaluationOptions,
    most: int | None,
    way: EvaluatedBy,
    ranks: Ranks | None,
) -> tuple[Evaluator, Source]:
    """A metric's evaluator and rows; one that is cut has to be a mean over rows."""
    source = examples.source(metric.collate)
    with suppress(UndefinedMetricError):  # it is NaN, as where the model leaves it undefined
        check_all_examples(metric, examples.examples, as_stored=examples.collate is None)
    if most is not None and len(source) > most:
        metric = way.resolved(metric, source, view)
    return shared(way.bound_to(metric, view, options, batch_size=most), ranks), source


def _measured(evaluator: Evaluator, source: Source) -> float:
    """NaN where a metric is undefined (one class only): no reason to stop a run."""
    # A batch of its own: what is read of it is not kept from one measurement to the next.
    whole = Batch(source, range(len(source)))
    try:
        # The evaluator gives losses: its sign turns them into what the metric itself said.
        # Of a metric that is maximised 0 would be -0.
        return evaluator.sign * evaluator.evaluate([Probe(HERE, whole)])[0].value + 0.0
    except (NonFiniteObjectiveError, UndefinedMetricError):
        return math.nan
