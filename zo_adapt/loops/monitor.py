"""Metrics of interest: measured beside the objective, never minimised, their queries apart."""

import math
from collections.abc import Mapping
from typing import Any

from zo_adapt.data.batches import Batch
from zo_adapt.data.sources import Collate, Source, as_source
from zo_adapt.errors import NonFiniteObjectiveError, UndefinedMetricError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.objective import ObjectiveLike, as_objective
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.evaluation.start_checks import resolve_mean_over_rows
from zo_adapt.options import at_least_one
from zo_adapt.term import HERE
from zo_adapt.view.parameters import ParameterView

Metrics = Mapping[str, ObjectiveLike]


class Monitor:
    """Measures some objectives on the whole of a data set, every so many steps.

    Args:
        metrics: By name; reported as they are, whatever ``maximize`` says.
        view: Whose weights.
        data: As for ``minimize``; all of it is one batch.
        every: Steps from one measurement to the next.
        collate: Makes a batch of a list of examples; each objective's own by default.
        micro_batch_size: Most rows in one call of an objective.
    """

    def __init__(
        self,
        metrics: Metrics,
        view: ParameterView,
        data: Any,
        *,
        every: int,
        collate: Collate | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        self.every = at_least_one("metrics_every", every)
        self._last: tuple[int, dict[str, float]] | None = None
        self._ready = {}
        for name, metric in metrics.items():
            objective = as_objective(metric)
            source = as_source(data, collate or objective.collate)
            if micro_batch_size is not None and len(source) > micro_batch_size:
                objective = resolve_mean_over_rows(objective, source, view.model)
            evaluator = LocalEvaluator(objective, view, maximize=False, usual_rows=micro_batch_size)
            self._ready[name] = evaluator, source

    @property
    def queries(self) -> int:
        """Forwards of one sample made here."""
        return sum(evaluator.queries for evaluator, _ in self._ready.values())

    def after(self, step: int) -> dict[str, float] | None:
        """The metrics if they are due after this step."""
        return self.at(step) if self._ready and step % self.every == 0 else None

    def at(self, step: int) -> dict[str, float] | None:
        """The metrics at the weights after this step; not measured twice. None without metrics."""
        if not self._ready:
            return None
        if self._last is None or self._last[0] != step:
            self._last = step, {name: _measured(*ready) for name, ready in self._ready.items()}
        return self._last[1]


def _measured(evaluator: LocalEvaluator, source: Source) -> float:
    """NaN where a metric is undefined (one class only): no reason to stop a run."""
    # A batch of its own: what is read of it is not kept from one measurement to the next.
    whole = Batch(source, range(len(source)))
    try:
        return evaluator.evaluate([Probe(HERE, whole)])[0].value
    except (NonFiniteObjectiveError, UndefinedMetricError):
        return math.nan
