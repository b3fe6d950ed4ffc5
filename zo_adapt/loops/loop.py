"""The loop for anything callable."""

import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm.auto import tqdm

from zo_adapt.data.labels import class_labels
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Collate, as_source
from zo_adapt.errors import NonFiniteObjectiveError, StepTooLargeError, TrajectoryWriteError
from zo_adapt.evaluation.joint.groups import JointRows
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.objective import ObjectiveLike, as_objective, rows_needed
from zo_adapt.evaluation.protocol import BudgetExhausted
from zo_adapt.evaluation.start_checks import check_all_labels, resolve_mean_over_rows
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk, trunk_for
from zo_adapt.loops.monitor import Metrics, Monitor
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.optimizers.rule import Budget
from zo_adapt.options import at_least_one, check_run
from zo_adapt.step import Step
from zo_adapt.term import HERE
from zo_adapt.view.parameters import ParameterView


class StopReason(StrEnum):
    """Why a run ended; the values are the sentences that users read."""

    MAX_STEPS = "the maximum number of steps was reached"
    MAX_QUERIES = "the next step would exceed the maximum number of queries"
    CALLBACK = "the callback raised StopIteration"
    NON_FINITE = "the objective was not finite; the weights are those of the last good step"
    STEP_TOO_LARGE = "a step left the dtype's range; the weights are those of the last good step"
    CANNOT_WRITE = "the trajectory cannot be written; the weights are those of the last good step"


FAULTS: dict[type[Exception], StopReason] = {
    NonFiniteObjectiveError: StopReason.NON_FINITE,
    StepTooLargeError: StopReason.STEP_TOO_LARGE,
    TrajectoryWriteError: StopReason.CANNOT_WRITE,
}


class Result(NamedTuple):
    """What ``minimize`` returns. The weights are in the view's own tensors.

    Args:
        value: The last record's value, an estimate from one batch; NaN if there was no step.
        nit: Steps done.
        queries: Forwards of one sample.
        stop_reason: Why it ended.
        message: The same, as a sentence, with the details.
        history: One record per step.
        metrics: The metrics of interest at the final weights.
        metric_queries: Forwards of one sample made for them, which ``queries`` leaves out.
    """

    value: float
    nit: int
    queries: int
    stop_reason: StopReason
    message: str
    history: list[Step]
    metrics: dict[str, float] | None = None
    metric_queries: int = 0


def minimize(
    objective: ObjectiveLike,
    view: ParameterView,
    data: Any,
    optimizer: Optimizer,
    *,
    batch_size: int | None = None,
    max_steps: int | None = None,
    max_queries: int | None = None,
    seed: int = 0,
    callback: Callable[[Step], None] | None = None,
    progress: bool = True,
    maximize: bool | None = None,
    collate: Collate | None = None,
    micro_batch_size: int | None = None,
    joint_rows: JointRows = "auto",
    stratify: bool = True,
    metrics: Metrics | None = None,
    metrics_data: Any = None,
    metrics_every: int = 100,
    trajectory: str | Path | None = None,
    resume: bool = False,
    reuse_trunk: bool | Literal["auto"] | FrozenTrunk = "auto",
    cuda_graphs: bool | Literal["auto"] = "auto",
) -> Result:
    """Minimise an objective over a view by an optimizer of this package.

    Args:
        objective: Any callable ``batch -> float`` or one value per example; see ``Objective``.
        view: What may change; it is changed in place.
        data: None (the objective is called with None); tensors; or a sequence of examples.
        optimizer: ``MeZOSVRG()``, ``MeZO()``, ... It is restarted.
        batch_size: Rows of a minibatch; not needed without data.
        max_steps: Budget in steps.
        max_queries: Budget in forwards of one sample; never exceeded.
        seed: Of directions and data order, 0 <= seed < 2**64. Same seed, same run.
        callback: Called with a ``Step`` after every step; StopIteration stops the run.
        progress: Show a progress bar.
        maximize: Climb instead of descend; None: as the objective says (a metric is climbed).
        collate: Makes a batch of a list of examples; the objective's own by default.
        micro_batch_size: Most rows in one call of the objective; ``batch_size`` by default, so
            that a snapshot needs no more memory than a minibatch.
        joint_rows: Most rows in a call that evaluates several points at once, each on its own
            rows; it needs the memory of inference on so many. "auto": 8192 tokens on a GPU, 2048 on
            a CPU, beyond which joining gains little. None: one point at a time, in the memory of
            one. Views of linear layers, norms and embeddings (LoRA, new heads) and objectives with
            a value per example can be joined, the others never are. Never more than
            ``micro_batch_size``, where given.
        stratify: Spread the classes evenly over every pass, where the data have a field ``labels``
            or ``label`` of one integer an example.
        metrics: Objectives by name, measured beside the one that is minimised: after every
            ``metrics_every`` steps and at the end. Their queries count apart, outside the budget.
        metrics_data: What they are measured on, all of it; ``data`` by default.
        metrics_every: Steps.
        trajectory: File that every step is appended to; see ``replay``.
        resume: Go on with the trajectory's run if the file is there, bit-identical to a run that
            was never stopped. The view must be at the weights that the run started from.
        reuse_trunk: Run the layers below the first that the view holds weights of once for each
            example, and keep what they put out: "auto" where it is possible, is checked to give the
            same values, and a quarter of the layers or more are frozen (up to 1 GiB, on the model's
            device); True: wherever it is possible, an error where the view rules it out; False:
            never; a ``FrozenTrunk`` says how much is kept and where. Queries are counted as always.
        cuda_graphs: Capture an evaluation's kernels on a GPU, once for each shape of a batch, and
            replay them: "auto" for objectives that say they can be captured; True: for any; False:
            never. Where a trunk is reused, the frozen layers are not captured.

    Returns:
        Value, steps, queries, stop reason and history.

    Raises:
        ZOError: Named errors for bad input, before any evaluation.

    Example:
        >>> import torch
        >>> from zo_adapt import MeZO, ParameterView, minimize
        >>> x = torch.zeros(2)
        >>> result = minimize(
        ...     lambda batch: float(((x - 3) ** 2).sum()), ParameterView({"x": x}), None,
        ...     MeZO(lr=1e-2), max_steps=3, progress=False)
        >>> result.nit, result.queries, result.stop_reason.name
        (3, 6, 'MAX_STEPS')
    """
    check_run(max_steps, max_queries, seed)
    if micro_batch_size is not None:
        at_least_one("micro_batch_size", micro_batch_size)
    objective = as_objective(objective)
    source = as_source(data, collate or objective.collate)
    check_all_labels(objective, data)
    objective = resolve_mean_over_rows(objective, source, view.model)
    classes = class_labels(data) if stratify else None
    samples = Samples(source, batch_size, seed, classes, rows_needed(objective))
    evaluator = LocalEvaluator(
        objective,
        view,
        maximize=maximize,
        micro_batch_size=micro_batch_size,
        max_queries=max_queries,
        joint_rows=joint_rows,
        usual_rows=batch_size,
        trunk=trunk_for(view, reuse_trunk),
        cuda_graphs=cuda_graphs,
    )
    view.check_adapters()
    view.check_finite()
    budget = Budget(max_steps, max_queries)
    monitor = Monitor(
        metrics or {},
        view,
        data if metrics_data is None else metrics_data,
        every=metrics_every,
        collate=collate,
        micro_batch_size=micro_batch_size or batch_size,
    )
    loop = _Loop(Run(optimizer, evaluator, samples, budget, seed, trajectory, resume), monitor)
    with tqdm(
        total=max_queries or max_steps,
        initial=evaluator.queries if max_queries else loop.run.steps,
        unit="query" if max_queries else "step",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        reason, detail = loop.until_stopped(callback, bar)
    value = loop.history[-1].value if loop.history else math.nan
    message = f"{reason}{detail}"
    return Result(
        value,
        loop.run.steps,
        evaluator.queries,
        reason,
        message,
        loop.history,
        monitor.at(loop.run.steps),
        monitor.queries,
    )


class _Loop:
    """Steps a run until something stops it, and keeps the history."""

    def __init__(self, run: Run, monitor: Monitor) -> None:
        self.run, self.monitor = run, monitor
        self.history = [step._replace(update=HERE) for step in run.logged]

    def until_stopped(
        self, callback: Callable[[Step], None] | None, bar: "tqdm[Any]"
    ) -> tuple[StopReason, str]:
        """Step until a budget is used up, the callback stops or a fault does."""
        limit = self.run.budget.max_steps
        while limit is None or self.run.steps < limit:
            try:
                record = self.step()
            except BudgetExhausted:
                return StopReason.MAX_QUERIES, ""
            except tuple(FAULTS) as error:
                return FAULTS[type(error)], f" ({error})"
            bar.update(record.queries - bar.n if self.run.budget.max_queries else 1)
            bar.set_postfix(value=f"{record.value:.4f}", refresh=False)
            try:
                if callback is not None:
                    callback(record)
            except StopIteration:
                return StopReason.CALLBACK, ""
        return StopReason.MAX_STEPS, ""

    def step(self) -> Step:
        """One step, on record."""
        step = self.run.step()
        step = step._replace(metrics=self.monitor.after(step.step))
        self.history.append(step._replace(update=HERE))
        return step
