"""What the noise of a run's estimates is made of, watched while it runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.diagnosis.differences import Differences, Jackknife, Survey, anova
from zo_adapt.errors import ObjectiveError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.objective import SetObjective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.first_order import backpropagated
from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.optimizers.variance_reduced import VarianceReduced
from zo_adapt.options import at_least_one
from zo_adapt.term import Terms
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.precision import finest_perturbation, usual_perturbation


@dataclass(frozen=True)
class TrackVariance:
    """Watch direction noise, data noise and the control variate of a run.

    With p_ki the projected gradient of example i along direction k, Var p_ki = G + sigma^2, between
    and within directions. An estimate from N directions on b rows each has, in a view of d numbers,
    the mean squared error d/N (G + sigma^2 / b). A control variate (a snapshot, a recursion) takes
    out of sigma^2 / b at most: that is the part that matters where it is larger than G. Where it is
    smaller, more directions on the same rows do more. Measured along the same directions on the
    same rows every time, so that a change is one of the weights.

    Goes where objectives go in ``metrics``, and reports under its name there (in ``Step.metrics``
    of the history, ``Result.plot``, and the ``log_history`` of ``ZOTrainer``):
        direction_noise: G = |grad f|^2, estimated as mean_k p_k^2 - sigma^2 / b, p_k the mean of a
            direction's rows. About 0 it may come out negative.
        data_noise: sigma^2 = mean_k Var_i p_ki, of one example.
        data_share: sigma^2 / (max(G, 0) + sigma^2), the data's share in the noise of one example.
        explained: 1 - sum_k (p_k - q_k)^2 / sum_k p_k^2, with q_k the p_k at the snapshot (of
            recursions, where the weights were before): the share of a minibatch estimate that the
            control variate takes out. Optimizers with such a place only.
        distance: |theta - theta_bar| to that place, the root of its expected square over the
            directions between; exact where values are kept. The same optimizers only.
        cosine: -v.grad f / (|v| |grad f|), between the last step v and the gradient by
            backpropagation on the rows, where the step ended, over what moves; with
            ``gradient=True``.

    Args:
        every: Steps from one measurement to the next.
        num_directions: K, of each measurement.
        batch_size: Rows of a direction, at least 2.
        gradient: Whether to backpropagate. Memory: a gradient of the view, and the activations.

    Raises:
        OptionError: A number outside its range.

    Example:
        >>> import torch
        >>> from zo_adapt import MeZOSVRG, ParameterView, TrackVariance, minimize
        >>> x, data = torch.zeros(4), torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> result = minimize(
        ...     lambda batch: (batch - x).square().sum(1), ParameterView({"x": x}), data,
        ...     MeZOSVRG(), batch_size=16, max_steps=20, progress=False,
        ...     metrics={"variance": TrackVariance(every=10)})
        >>> sorted(result.metrics)
        ['variance_data_noise', 'variance_data_share', 'variance_direction_noise', \
'variance_distance', 'variance_explained']

    Reference: arXiv 2404.08080, Section 5 (what the snapshot is for).
    """

    every: int = 100
    num_directions: int = field(default=16, kw_only=True)
    batch_size: int = field(default=16, kw_only=True)
    gradient: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("every", "num_directions", "batch_size"):
            at_least_one(name, getattr(self, name))

    def watching(self, run: Run, evaluation: EvaluationOptions) -> "VarianceMonitor":
        """Watch a run that begins; ``Metrics`` calls this."""
        return VarianceMonitor(self, run, evaluation)


class VarianceMonitor:
    """Measures at the weights as they are.

    Args:
        asked: What to measure.
        run: Its queries are not counted up, and where it is in the data stays as it is.
        evaluation: How.
    """

    def __init__(self, asked: TrackVariance, run: Run, evaluation: EvaluationOptions) -> None:
        evaluator, samples = run.evaluator, run.samples
        if asked.gradient:
            evaluator.view.check_whole("TrackVariance(gradient=True)")
        self.every, self._gradient, self._run = asked.every, asked.gradient, run
        self._rows = min(asked.batch_size, len(samples.source))
        objective = evaluator.objective
        if isinstance(objective, SetObjective):
            objective = Jackknife(objective)
        self._evaluator = LocalEvaluator(
            objective, evaluator.view, evaluation, batch_size=self._rows
        )
        # Rows that stand for all classes have less noise than sigma^2 / b.
        # A score of a set may need every class.
        is_set = isinstance(objective, SetObjective)
        classes = samples.classes.tolist() if is_set and samples.classes is not None else None
        own = Samples(samples.source, self._rows, samples.seed, classes)
        self._batches = [own.minibatch() for _ in range(asked.num_directions)]
        self._seed, self._size = samples.seed, len(samples.source)

    @property
    def queries(self) -> int:
        """Forwards of one sample made here."""
        return self._evaluator.queries

    def measure(self) -> dict[str, float]:
        """What ``TrackVariance`` lists, after the run's last step."""
        optimizer, view, last = self._run.optimizer, self._evaluator.view, self._run.last
        survey = Survey(self._evaluator, self._batches, self._seed)
        mu = _perturbation(optimizer, view)
        here = survey.at(mu)
        noise = anova(here, self._rows, self._size)
        found = {
            "direction_noise": noise.direction,
            "data_noise": noise.data,
            "data_share": noise.data_share,
        }
        if isinstance(optimizer, VarianceReduced):
            snapshot = optimizer.snapshot
            found["explained"] = _explained(here, survey.at(mu, snapshot.place))
            found["distance"] = (
                _norm(snapshot.since.terms, view)
                if snapshot.kept is None
                else snapshot.kept.distance()
            )
        if self._gradient and last is not None:
            found["cosine"] = self._cosine(last.update.terms, self._batches)
        return found

    def _cosine(self, terms: Terms, batches: Sequence[Batch]) -> float:
        """Of the step -v and the negative gradient on the rows; NaN where there is none."""
        view = self._evaluator.view
        moving = [
            name
            for name in view.tensors
            if name not in view.at_rest and view.group_of(name).perturbation_scale > 0
        ]
        total: dict[str, Tensor] = {}
        for batch in batches:
            try:
                _, gradients = backpropagated(self._evaluator, batch)
            except ObjectiveError:
                return math.nan
            for name, gradient in zip(view.tensors, gradients, strict=True):
                if gradient is not None and name in moving:
                    total[name] = total.get(name, 0.0) + gradient.double()
        dot = squares = 0.0
        for name in moving:
            step = view.along(terms, name)
            squares += float(step.square().sum())
            if name in total:
                dot -= float((step * total[name]).sum())
        norm = math.sqrt(squares * sum(float(g.square().sum()) for g in total.values()))
        return dot / norm if norm else math.nan


def _norm(terms: Terms, view: ParameterView) -> float:
    """The root of E|sum_k c_k z_k|^2 over the view."""
    sizes = [0] * len(view.groups)
    groups = list(view.groups)
    for name, tensor in view.tensors.items():
        sizes[groups.index(view.group_of(name))] += tensor.numel()
    squares = (
        term.coefficient**2 * (sum(sizes) if term.group is None else sizes[term.group])
        for term in terms
    )
    return math.sqrt(math.fsum(squares))


def _explained(here: Differences | None, there: Differences | None) -> float:
    if here is None or there is None:
        return math.nan
    left, all_ = np.square(here.mean - there.mean).sum(), np.square(here.mean).sum()
    return float(1.0 - left / all_) if all_ else math.nan


def _perturbation(optimizer: Optimizer, view: ParameterView) -> float:
    """The run's mu; of a first-order run, which has none, the usual one."""
    if isinstance(optimizer, ZerothOrder):
        return optimizer.perturbation_scale
    return usual_perturbation(view.displacement, finest_perturbation(view), step_like=False)
