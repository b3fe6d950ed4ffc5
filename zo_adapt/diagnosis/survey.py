"""A probe of an objective at the current weights, before any tuning."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from zo_adapt.data.examples import as_data
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import NoData
from zo_adapt.diagnosis.advice import (
    Diagnosis,
    Scale,
    choose_batch,
    choose_scale,
    judge_snapshot,
)
from zo_adapt.diagnosis.differences import Differences, Jackknife, Survey, anova, rms
from zo_adapt.diagnosis.displacement import find_displacement
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.first_look import look_first
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.locally import look_for_signal
from zo_adapt.evaluation.objective import ObjectiveLike, SetObjective, rows_needed
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.start_checks import check_all_examples, resolve_mean_over_rows
from zo_adapt.evaluation.workers import as_workers
from zo_adapt.loops import former
from zo_adapt.loops.arguments import as_evaluation, check_data, check_view, checked_objective
from zo_adapt.options import at_least_one, check_run, former_keywords, positive, renamed
from zo_adapt.ranks.evaluator import options_of, shared
from zo_adapt.ranks.launched import find_ranks
from zo_adapt.ranks.local_workers import starts_workers
from zo_adapt.ranks.replicas import check_views
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.precision import (
    check_resolution,
    finest_perturbation,
    usual_perturbation,
)

USUAL_ROWS = 16
"""Rows of a direction where the caller names none."""
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Scales to try, in units of the default one."""


@former_keywords(
    former.DATA | {"micro_batch_size": former.EVALUATION["micro_batch_size"]}, former.translate
)
def diagnose(
    objective: ObjectiveLike,
    view: ParameterView,
    data: Any = None,
    *,
    batch_size: int | Literal["auto"] = "auto",
    num_directions: int = 16,
    perturbation_scales: Sequence[float] | Literal["auto"] = "auto",
    seed: int = 0,
    evaluation: EvaluationOptions = EvaluationOptions(),
) -> Diagnosis:
    """Measure signal and noise of an objective at the current weights, and advise on settings.

    How far a run may go is found as the optimizers do it: where the damage of noise alone is a
    fifth of what single examples gain or lose along a direction. Then
    K directions, each on a batch of its own, at several perturbation scales. With p_ki the
    projected gradient of example i along direction k, a random-effects analysis of variance splits
    Var p_ki = G + sigma^2: between directions G = |grad f|^2, within one sigma^2, of the data.
    Of an objective that gives one number a batch, a set objective (F1, ROC-AUC) is scored without
    each row in turn (the jackknife: no further queries); another is asked on four parts of it.

    Args:
        objective: As for ``minimize``.
        view: As for ``minimize``; bit-identical afterwards.
        data: As for ``minimize``; None for a function without data.
        batch_size: Rows that a direction is measured on, at least 2; "auto": 16, or the fewest that
            the objective needs.
        num_directions: K; the relative error of G is about sqrt(2 / K).
        perturbation_scales: mu to try, at least two; "auto": 1/16, 1/4, 1, 4 and 16 times what
            suits the displacement that was found.
        seed: Of directions and rows.
        evaluation: As for ``minimize``.

    Returns:
        The table, the noise and the advice; it cost (2 scales + 1) K b queries beside the search
        for a displacement, of 100 to 200.

    Raises:
        ZOError: Named errors for bad input, before any evaluation.

    Example:
        >>> import torch
        >>> from zo_adapt import ParameterView, diagnose
        >>> x = torch.zeros(8)
        >>> rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) + 3
        >>> found = diagnose(lambda b: (b @ x).square() - b @ x, ParameterView({"x": x}), rows,
        ...                  batch_size=16)
        >>> found.batch_size, found.num_directions, found.snapshot_helps
        (16, 16, False)
        >>> found.queries - found.search_queries
        2816
    """
    batch_size = _auto("batch_size", batch_size)
    perturbation_scales = _auto("perturbation_scales", perturbation_scales)
    objective = checked_objective(objective)
    check_view(view)
    check_data(data)
    evaluation = as_evaluation(evaluation)
    workers = as_workers(evaluation.workers)
    if evaluation.evaluator is not None or starts_workers(workers):
        raise OptionError(
            "diagnose asks the model in this process, or in those that a launcher has started; "
            f"leave evaluator and workers out of {evaluation!r}"
        )
    check_run(at_least_one("num_directions", num_directions), None, seed)
    examples = as_data(data)
    source = examples.source(objective.collate)
    check_all_examples(objective, examples.examples, as_stored=examples.collate is None)
    look_first(objective, source, view)
    objective = resolve_mean_over_rows(objective, source, view.model)
    signal = look_for_signal(objective, source, view)
    least = max(USUAL_ROWS, rows_needed(objective))
    size = min(least, len(source)) if batch_size == "auto" else batch_size
    samples = Samples(source, size, seed, examples.classes(), rows_needed(objective))
    rows = samples.batch_size
    if rows < 2 and not isinstance(source, NoData):
        raise OptionError(f"batch_size={rows}; choose at least 2, to tell the rows' noise")
    view.check_ready()
    searching = LocalEvaluator(objective, view, evaluation, batch_size=rows)
    far = find_displacement(searching, samples, seed)
    usual, scales = _scales(view, far.displacement, objective.step_like, perturbation_scales)
    if isinstance(objective, SetObjective):
        objective = Jackknife(objective)
    ranks = find_ranks(workers)
    if ranks is not None:
        check_views(ranks, view)
    options = options_of(evaluation, ranks)
    evaluator = shared(LocalEvaluator(objective, view, options, batch_size=rows), ranks)
    survey = Survey(evaluator, [samples.minibatch() for _ in range(num_directions)], seed)
    found = [survey.at(mu) for mu in scales]
    table = _table(scales, found)
    chosen, why = choose_scale(table, usual)
    measured = found[table.index(chosen)]
    noise = anova(measured, rows, len(source))
    batch, directions, reasons = choose_batch(noise, chosen.equal, rows, len(source))
    helps, verdict = judge_snapshot(noise, len(source))
    reasons = {
        "displacement": far.reason,
        "perturbation_scale": why,
        **reasons,
        "snapshot": verdict,
    }
    if signal is not None:
        reasons["rounding"] = str(signal)
    return Diagnosis(
        scales=table,
        noise=noise,
        displacement=far.displacement,
        perturbation_scale=chosen.perturbation_scale,
        batch_size=batch,
        num_directions=directions,
        snapshot_helps=helps,
        reasons=reasons,
        queries=far.queries + evaluator.queries,
        search_queries=far.queries,
    )


def _auto(name: str, value: Any) -> Any:
    """The value, or "auto" for the former None."""
    if value is not None:
        return value
    renamed(f"{name}=None", f"{name}='auto'", stacklevel=5)
    return "auto"


def _scales(
    view: ParameterView,
    displacement: float,
    step_like: bool,
    given: Sequence[float] | Literal["auto"],
) -> tuple[float, list[float]]:
    """What suits a displacement, and the scales to try, in ascending order."""
    finest = finest_perturbation(view)
    least = max(finest, view.least_perturbation / 4)
    usual = usual_perturbation(displacement, least, step_like)
    if isinstance(given, str):
        return usual, [usual * factor for factor in FACTORS if usual * factor >= finest]
    scales = sorted({positive("perturbation_scales", mu) for mu in given})
    if len(scales) < 2:
        raise OptionError(f"perturbation_scales={list(given)}; give at least two, to compare")
    check_resolution(view, scales[0], finest)
    return usual, scales


def _table(scales: Sequence[float], found: Sequence[Differences | None]) -> tuple[Scale, ...]:
    means = [None if d is None else d.mean for d in found]
    agreements = [_cosine(a, b) for a, b in pairwise(means)]
    table = []
    for k, (mu, d) in enumerate(zip(scales, found, strict=True)):
        agreement = min(agreements[max(k - 1, 0) : k + 1])
        if d is None:
            table.append(Scale(mu, math.nan, math.nan, math.nan, agreement))
        else:
            table.append(Scale(mu, rms(d.mean), d.equal, d.curvature, agreement))
    return tuple(table)


def _cosine(a: np.ndarray | None, b: np.ndarray | None) -> float:
    if a is None or b is None or not (a.any() and b.any()):
        return 0.0
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))
