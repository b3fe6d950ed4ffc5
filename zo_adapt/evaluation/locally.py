"""The way of evaluating where none is given: in this process, after a look at the objective."""

from zo_adapt.data.sources import Source
from zo_adapt.evaluation.first_look import look_first, naming_unread
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.objective import Objective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Evaluator
from zo_adapt.evaluation.signal import Signal, is_coarse, measured_first
from zo_adapt.evaluation.start_checks import resolve_mean_over_rows
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.precision import finest_perturbation, usual_perturbation

PLAIN = EvaluationOptions(joint_rows="off", reuse_trunk="off", cuda_graphs="off")
"""Nothing that has to be trusted first."""


class Locally:
    """The way of evaluating where none is given: in this process. See ``EvaluatedBy``."""

    def prepared(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The objective, after a look at what an evaluation of it reads and changes."""
        look_first(objective, source, view)
        objective = self.resolved(objective, source, view)
        look_for_signal(objective, source, view)
        return objective

    def resolved(self, objective: Objective, source: Source, view: ParameterView) -> Objective:
        """The objective, saying whether its value is a mean over rows."""
        with naming_unread(objective, source, view):
            return resolve_mean_over_rows(objective, source, view.model)

    def bound_to(
        self,
        objective: Objective,
        view: ParameterView,
        options: EvaluationOptions,
        *,
        batch_size: int | None = None,
        max_queries: int | None = None,
    ) -> Evaluator:
        """An evaluator of this process."""
        return LocalEvaluator(
            objective, view, options, batch_size=batch_size, max_queries=max_queries
        )


def look_for_signal(objective: Objective, source: Source, view: ParameterView) -> Signal | None:
    """Measure whether a coarse model's differences are signal, where they can be.

    Returns:
        What was found; None for models in fp32 and for objectives that jump.
    """
    view.least_perturbation = 0.0
    if not is_coarse(view.model) or objective.step_like:
        return None
    usual = usual_perturbation(view.displacement, finest_perturbation(view), False)
    return measured_first(LocalEvaluator(objective, view, PLAIN), source, usual)
