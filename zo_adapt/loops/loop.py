"""The loop for anything callable."""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from zo_adapt.data.examples import as_data
from zo_adapt.data.samples import Samples
from zo_adapt.evaluation.locally import Locally
from zo_adapt.evaluation.objective import ObjectiveLike, rows_needed
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import BudgetExhausted, EvaluatedBy
from zo_adapt.evaluation.start_checks import check_all_examples
from zo_adapt.evaluation.workers import as_workers
from zo_adapt.loops import former
from zo_adapt.loops.arguments import (
    as_evaluation,
    check_data,
    check_optimizer,
    check_run_files,
    check_view,
    checked_objective,
)
from zo_adapt.loops.monitor import Metrics, Monitor, as_metrics
from zo_adapt.loops.result import FAULTS, Result, StopReason, reason_of
from zo_adapt.loops.run import Run
from zo_adapt.loops.step_advice import verdict
from zo_adapt.optimizers.mezo import MeZO
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.options import check_run, former_keywords, integer
from zo_adapt.ranks.carried_errors import Stopped
from zo_adapt.ranks.evaluator import options_of, shared
from zo_adapt.ranks.group import closing_ranks
from zo_adapt.ranks.launched import find_ranks
from zo_adapt.ranks.local_workers import started, starts_workers
from zo_adapt.term import Step
from zo_adapt.trajectory.file import TrajectoryFile
from zo_adapt.view.parameters import ParameterView

logger = logging.getLogger(__name__)


def announce(line: str, shown: bool) -> None:
    """Say a line in the log and, where there is a bar, above it."""
    logger.info("%s", line)
    if shown:
        tqdm.write(line, file=sys.stderr)


class Bar:
    """A progress bar over the budget: in queries where these are limited, else in steps.

    Where both are, its end is what the steps will come to, so that the time left is real.
    """

    def __init__(self, budget: Budget, steps: int, queries: int, *, shown: bool) -> None:
        self._budget = budget
        self._metrics: dict[str, float] = {}
        self._in_queries = budget.max_queries is not None
        self._bar: tqdm[Any] = tqdm(
            total=budget.max_queries if self._in_queries else budget.max_steps,
            initial=queries if self._in_queries else steps,
            unit="query" if self._in_queries else "step",
            disable=not shown,
            dynamic_ncols=True,
        )

    def show(self, step: Step) -> None:
        """Move on to a step, with its value and the last that was measured."""
        bar, budget = self._bar, self._budget
        if budget.max_steps is not None and budget.max_queries is not None and self._in_queries:
            per_step = step.queries / step.step
            bar.total = min(budget.max_queries, round(budget.max_steps * per_step))
        bar.update((step.queries if self._in_queries else step.step) - bar.n)
        self._metrics |= step.metrics or {}
        said = {"value": step.value, **self._metrics}
        words = {name: f"{value + 0.0:.4g}" for name, value in said.items()}  # -0 as 0
        if not self._in_queries:
            words["queries"] = f"{step.queries:,}"
        bar.set_postfix(words, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@former_keywords(
    former.DATA | former.EVALUATION | former.PROCESSES | former.METRICS | former.MAXIMIZE,
    former.translate,
)
def minimize(
    objective: ObjectiveLike,
    view: ParameterView,
    data: Any = None,
    optimizer: Optimizer | None = None,
    *,
    batch_size: int | None = None,
    max_steps: int | None = None,
    max_queries: int | None = None,
    seed: int = 0,
    callback: Callable[[Step], None] | None = None,
    progress: bool = True,
    evaluation: EvaluationOptions | EvaluatedBy = EvaluationOptions(),
    metrics: Metrics | Mapping[str, ObjectiveLike] | None = None,
    trajectory: str | Path | TrajectoryFile | None = None,
    resume: bool = False,
) -> Result:
    """Minimise an objective over a view by forward passes (or maximise it, if it says so).

    Args:
        objective: Any callable ``batch -> float`` or one value per example; see ``Objective``.
        view: What may change; it is changed in place.
        data: None (the objective is called with None); tensors; a sequence of examples; or ``Data``
            of these, with a collate function.
        optimizer: ``MeZOSVRG()``, ``SGD(lr)``, ...; None: the recommended one, ``MeZO()``. It is
            restarted.
        batch_size: Rows of a minibatch; not needed without data.
        max_steps: Budget in steps.
        max_queries: Budget in forwards of one sample; never exceeded.
        seed: Of directions and data order, 0 <= seed < 2**64. Same seed, same run.
        callback: Called with a ``Step`` after every step; StopIteration stops the run.
        progress: Show a progress bar.
        evaluation: Memory against time: rows in one call, candidates together, reuse, graphs,
            processes that share the work; or where values come from: ``ServedEvaluator(server)``,
            a model behind a server.
        metrics: Objectives by name, watched beside the one that is minimised; ``Metrics`` of them
            says on which data and how often (the run's, every 100 steps and at the end).
        trajectory: File that every step is appended to; see ``replay``, and ``TrajectoryFile`` for
            what survives a loss of power. No other run may write it meanwhile.
        resume: Go on with the trajectory's run if the file is there, bit-identical to a run that
            was never stopped. The view must be at the weights that the run started from; base
            model, data, objective and settings must be those of then. The budget may be larger
            than it was: the steps so far stay those of the smaller budget, and the rest are what a
            run of the larger one makes at the same share of it (schedules and the step by distance
            follow that share). It is neither the long run from the start nor the short one and
            another after it, and is the same whenever it is stopped and resumed. Processes that
            torchrun has started anew go on by themselves.

    Returns:
        Value, steps, queries, stop reason and history; ``print`` it.

    Raises:
        ZOError: Named errors for bad input, before any evaluation.
        RankError: Of several processes one has ended, hangs, or holds other weights.

    Example:
        >>> import torch
        >>> from zo_adapt import MeZO, ParameterView, minimize
        >>> x = torch.zeros(2)
        >>> result = minimize(
        ...     lambda batch: float(((x - 3) ** 2).sum()), ParameterView({"x": x}),
        ...     optimizer=MeZO(lr=1e-2), max_steps=3, progress=False)
        >>> result.steps, result.queries, result.stop_reason.name
        (3, 24, 'MAX_STEPS')
    """
    evaluation = as_evaluation(evaluation)
    workers = as_workers(evaluation.workers)
    if starts_workers(workers):
        evaluation = replace(evaluation, workers=replace(workers, count=None))
        given = {"objective": objective, "view": view, "data": data, "optimizer": optimizer}
        given |= {"batch_size": batch_size, "max_steps": max_steps, "max_queries": max_queries}
        given |= {"seed": seed, "evaluation": evaluation, "metrics": metrics, "resume": resume}
        given |= {"trajectory": trajectory}
        with started(workers, minimize, given | {"progress": False}):
            return minimize(**given, progress=progress, callback=callback)
    optimizer = MeZO() if optimizer is None else optimizer
    objective = checked_objective(objective)
    check_view(view)
    check_data(data)
    check_optimizer(optimizer)
    check_run_files(trajectory, callback)
    max_steps, max_queries, seed = check_run(max_steps, max_queries, seed)
    batch_size = None if batch_size is None else integer("batch_size", batch_size)
    examples, watched = as_data(data), as_metrics(metrics)
    ranks = find_ranks(workers)
    evaluation = options_of(evaluation, ranks)
    check_all_examples(objective, examples.examples, as_stored=examples.collate is None)
    view.check_ready()
    source = examples.source(objective.collate)
    way = evaluation.evaluator or Locally()
    objective = way.prepared(objective, source, view)
    samples = Samples(source, batch_size, seed, examples.classes(), rows_needed(objective))
    asked = shared(
        way.bound_to(objective, view, evaluation, batch_size=batch_size, max_queries=max_queries),
        ranks,
    )
    monitor = Monitor(
        watched, view, examples, evaluation=evaluation, batch_size=batch_size, way=way, ranks=ranks
    )
    budget = Budget(max_steps, max_queries)
    run = Run(optimizer, asked, samples, budget, seed, trajectory, resume, ranks)
    monitor.follow(run)
    loop = _Loop(run, monitor)
    shown = progress and run.is_first_rank
    with closing(run):
        run.measure()
        announce(run.outlook(), shown)
        with closing(Bar(budget, run.steps, asked.queries, shown=shown)) as bar:
            reason, detail = loop.until_stopped(callback, bar)
    return Result(
        value=loop.history[-1].value if loop.history else math.nan,
        steps=loop.run.steps,
        queries=asked.queries,
        stop_reason=reason,
        message=f"{reason}{detail}",
        history=loop.history,
        metrics=monitor.at(loop.run.steps),
        metric_queries=monitor.queries,
        evaluation=asked.plan,
        advice=verdict(loop.history, asked.sign, optimizer),
    )


class _Loop:
    """Steps a run until something stops it, and keeps the history."""

    def __init__(self, run: Run, monitor: Monitor) -> None:
        self.run, self.monitor = run, monitor
        self.history = [step.brief() for step in run.logged]

    def until_stopped(
        self, callback: Callable[[Step], None] | None, bar: Bar
    ) -> tuple[StopReason, str]:
        """Step until a budget is used up, the callback stops or a fault does."""
        try:
            with closing_ranks(self.run.ranks):
                self._step_on(callback, bar)
        except BudgetExhausted:
            return StopReason.MAX_QUERIES, ""
        except Stopped:
            return StopReason.CALLBACK, ""
        except FAULTS as error:
            return reason_of(error), f" ({error})"
        return StopReason.MAX_STEPS, ""

    def _step_on(self, callback: Callable[[Step], None] | None, bar: Bar) -> None:
        """Step until the steps are used up or something is raised."""
        limit = self.run.budget.max_steps
        while limit is None or self.run.steps < limit:
            step = self.step()
            bar.show(step)
            try:
                if callback is not None:
                    callback(step)
            except StopIteration as error:  # of an objective it would be a fault
                raise Stopped from error

    def step(self) -> Step:
        """One step, in the history."""
        step = self.run.step().brief()
        step = step._replace(metrics=self.monitor.after(step.step))
        self.history.append(step)
        return step
