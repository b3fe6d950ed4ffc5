"""Evaluations in this process: the one owner of them and of their count."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch

from zo_adapt.data.batches import Batch
from zo_adapt.evaluation.graphs import Graphs
from zo_adapt.evaluation.joint.groups import Joint, JointRows
from zo_adapt.evaluation.objective import (
    ObjectiveLike,
    SetObjective,
    as_objective,
    keeps_batch_whole,
    ready,
)
from zo_adapt.evaluation.protocol import BudgetExhausted, Evaluation, Probe
from zo_adapt.evaluation.start_checks import check_micro_batch_size
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk
from zo_adapt.evaluation.trunk.graphs import TrunkGraphs
from zo_adapt.evaluation.values import Returned, checked_values, on_host
from zo_adapt.view.parameters import ParameterView


class LocalEvaluator:
    """Evaluates probes and counts queries. One query = one forward of one sample.

    Args:
        objective: What is minimised.
        view: Where the probes shift.
        maximize: Flip the sign, here and nowhere else; None: as the objective says.
        micro_batch_size: Largest number of rows in one call of the objective; None is no limit.
        max_queries: Budget; a step that does not fit is not begun.
        joint_rows: Largest number of rows in a call that answers several probes; see ``minimize``.
        usual_rows: Stands in for ``micro_batch_size``, except in calls that answer several probes.
        trunk: Runs the layers below the view once for each example; None runs them every time.
        cuda_graphs: Whether calls on a GPU are captured; "auto": where the objective allows it.

    Raises:
        OptionError: ``joint_rows`` is none of its values.
    """

    def __init__(
        self,
        objective: ObjectiveLike,
        view: ParameterView,
        *,
        maximize: bool | None = None,
        micro_batch_size: int | None = None,
        max_queries: int | None = None,
        joint_rows: JointRows = "auto",
        usual_rows: int | None = None,
        trunk: FrozenTrunk | None = None,
        cuda_graphs: bool | Literal["auto"] = "auto",
    ) -> None:
        objective = as_objective(objective)
        check_micro_batch_size(objective, micro_batch_size, usual_rows)
        self.objective, self.view, self.trunk = objective, view, trunk
        self._is_scored = isinstance(objective, SetObjective)
        captures = cuda_graphs is True or (cuda_graphs == "auto" and objective.capturable)
        self._graphs = Graphs(view) if captures else None
        self._trunk_graphs = (
            None if trunk is None or self._graphs is None else TrunkGraphs(trunk, self._graphs)
        )
        self.sign = -1.0 if (objective.maximize if maximize is None else maximize) else 1.0
        whole = keeps_batch_whole(objective)
        self.micro_batch_size = None if whole else micro_batch_size or usual_rows
        self.max_queries = max_queries
        self.queries = 0
        self._joint = Joint(
            view,
            self._call,
            objective.score if isinstance(objective, SetObjective) else None,
            captured=lambda part, way: self._captured([part], way),
            joint_rows=joint_rows,
            most_rows=micro_batch_size,
            usual_rows=self.micro_batch_size,
            allowed=objective.independent_rows,
        )

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Answer every probe, in order; the weights are bit-identical afterwards.

        Raises:
            BudgetExhausted: The probes need more queries than are left.
            ObjectiveError: The objective returned something that is not a loss.
        """
        self.reserve(sum(len(probe.batch) for probe in probes))
        if self._graphs is not None:
            self._graphs.begin()
        with torch.no_grad(), self.ready():
            together = self._joint.answers(probes)
            returned = [
                self._scored([together[index]], [len(probe.batch)])
                if index in together
                else self._evaluate(probe)
                for index, probe in enumerate(probes)
            ]
        self.view.updates.locate()  # while the GPU is still at it
        return [self._combine(*one) for one in on_host(returned)]

    @property
    def one_at_a_time(self) -> str | None:
        """Why probes are evaluated one after another; None: they are not, or not known yet."""
        return self._joint.obstacle

    def reserve(self, queries: int) -> None:
        """Count queries that are about to be made.

        Raises:
            BudgetExhausted: More than are left.
        """
        if self.max_queries is not None and self.queries + queries > self.max_queries:
            raise BudgetExhausted
        self.queries += queries

    def ready(self) -> AbstractContextManager[Any]:
        """The objective's own evaluation mode, or a check that the model is in it."""
        return ready(self.objective, self.view.model)

    def _evaluate(self, probe: Probe) -> Returned:
        parts = probe.batch.micro_batches(self.micro_batch_size)
        at = probe.at
        with self.view.shifted(at.terms, at.decay, lambda way: self._captured(parts, way)):
            return self._scored(list(map(self._call, parts)), [len(part) for part in parts])

    def _call(self, part: Batch) -> Any:
        """What the objective makes of one part: values, or predictions."""
        if self.trunk is not None and self.trunk.reason is None:
            if self._trunk_graphs is not None:
                return self._trunk_graphs.call(self._function, part.content, self.view.way)
            return self.trunk.call(self._function, part.content)
        if self._graphs is not None:
            return self._graphs.call(self._function, part.content, self.view.way)
        return self._function(part.content)

    @property
    def _function(self) -> Callable[[Any], Any]:
        function: Callable[[Any], Any] = (
            self.objective.predict if self._is_scored else self.objective  # type: ignore[attr-defined]
        )
        return function

    def _captured(self, parts: list[Batch], way: Hashable) -> bool:
        """Whether none of the parts runs the model's own code.

        With a trunk they may have to, and a replay is right in either case.
        """
        trunk = self.trunk is not None and self.trunk.reason is None
        graphs = None if trunk else self._graphs
        return graphs is not None and all(graphs.holds(part.content, way) for part in parts)

    def _scored(self, returned: list[Any], sizes: list[int]) -> Returned:
        if self._is_scored:
            score: Callable[[list[Any]], Any] = self.objective.score  # type: ignore[attr-defined]
            return Returned([score(returned)], [sum(sizes)])
        return Returned(returned, sizes)

    def _combine(self, returned: list[Any], sizes: list[int]) -> Evaluation:
        values = [checked_values(*one) for one in zip(returned, sizes, strict=True)]
        if all(value.ndim == 1 for value in values):
            per_example = self.sign * (values[0] if len(values) == 1 else np.concatenate(values))
            return Evaluation(float(per_example.sum()) / len(per_example), per_example)
        means = [float(value.mean()) for value in values]
        if len(means) == 1:
            return Evaluation(self.sign * means[0])
        return Evaluation(self.sign * float(np.average(means, weights=sizes)))
