"""How a gradient estimate is formed: probes out, evaluations in, terms of the estimate out.

With K directions z_k and their batches B_k (the same batch for all, or one batch split in K):

    two-sided (SPSA: Spall 1992; MeZO, Definition 1, eq. 1)
        g = 1/K sum_k [f_{B_k}(theta + mu z_k) - f_{B_k}(theta - mu z_k)] / (2 mu)  z_k
    one-sided, with a shared base point
        g = 1/K sum_k [f_{B_k}(theta + mu z_k) - f_{B_k}(theta)] / mu  z_k

E g = grad f + O(mu^2) for both; on a quadratic the two-sided p_k is exact, the one-sided one is
off by mu/2 z_k^T H z_k.
Queries on a batch of b rows: 2b per direction of its own; (K + 1) b one-sided with K directions,
K b where they are compared with each other instead (``shaping``).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from zo_adapt.data.batches import Batch
from zo_adapt.evaluation.protocol import Evaluation, Probe, mean_value
from zo_adapt.term import HERE, Shift, Term, Terms, coalesced
from zo_adapt.view.group import Group


class Estimate(NamedTuple):
    """A gradient estimate.

    Args:
        terms: The vector, as sum_k c_k z(s_k).
        projected: Projected gradients, one per direction.
        value: Mean loss at the point (no probe of its own: the mean of the pair, the base,
            or the mean of the perturbed points where there is no base).
    """

    terms: Terms
    projected: tuple[float, ...]
    value: float


class Directions(NamedTuple):
    """Directions and the batch on which each of them is asked about.

    Args:
        seeds: Of K directions.
        batches: K; the same one may come more than once.
        groups: The parts of the view.
    """

    seeds: Sequence[int]
    batches: Sequence[Batch]
    groups: Sequence[Group]


class Estimator(Protocol):
    """Forms a gradient estimate from evaluations at perturbed points."""

    def probes(self, along: Directions, at: Shift = HERE) -> list[Probe]:
        """The questions to ask."""

    def estimate(self, along: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate from the answers, in the order of the questions."""


class TwoSided:
    """The two-point estimate of SPSA.

    Args:
        perturbation_scale: mu, in the parameters' units; > 0.
    """

    def __init__(self, perturbation_scale: float) -> None:
        self.mu = perturbation_scale

    def probes(self, along: Directions, at: Shift = HERE) -> list[Probe]:
        """The questions to ask."""
        return [
            _probe(at, direction(seed, sign * self.mu, along.groups), batch)
            for seed, batch in zip(along.seeds, along.batches, strict=True)
            for sign in (1.0, -1.0)
        ]

    def estimate(self, along: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate from the answers, in the order of the questions."""
        plus, minus = evaluations[::2], evaluations[1::2]
        projected = [
            (up.value - down.value) / (2 * self.mu) for up, down in zip(plus, minus, strict=True)
        ]
        sizes = [len(batch) for batch in along.batches]
        value = (mean_value(plus, sizes) + mean_value(minus, sizes)) / 2
        return Estimate(gradient(along, projected), tuple(projected), value)


class OneSided:
    """The forward difference; directions on the same batch share its base point.

    Args:
        perturbation_scale: mu, in the parameters' units; > 0.
    """

    def __init__(self, perturbation_scale: float) -> None:
        self.mu = perturbation_scale

    def probes(self, along: Directions, at: Shift = HERE) -> list[Probe]:
        """The questions to ask."""
        base = [_probe(at, (), batch) for batch in _distinct(along.batches)]
        return base + [
            _probe(at, direction(seed, self.mu, along.groups), batch)
            for seed, batch in zip(along.seeds, along.batches, strict=True)
        ]

    def estimate(self, along: Directions, evaluations: Sequence[Evaluation]) -> Estimate:
        """The estimate from the answers, in the order of the questions."""
        distinct = _distinct(along.batches)
        base = dict(zip(map(id, distinct), evaluations, strict=False))
        projected = [
            (up.value - base[id(batch)].value) / self.mu
            for up, batch in zip(evaluations[len(distinct) :], along.batches, strict=True)
        ]
        value = mean_value(evaluations[: len(distinct)], [len(batch) for batch in distinct])
        return Estimate(gradient(along, projected), tuple(projected), value)


def direction(seed: int, coefficient: float, groups: Sequence[Group]) -> Terms:
    """The terms of coefficient * z(seed), each group by its own perturbation_scale."""
    if len(groups) == 1:
        return (Term(seed, coefficient),)
    return tuple(
        Term(seed, coefficient * group.perturbation_scale, index)
        for index, group in enumerate(groups)
        if group.perturbation_scale > 0
    )


def gradient(along: Directions, projected: Sequence[float]) -> Terms:
    """1/K sum_k p_k z_k, unbiased in every group: a direction stretched by s gives p = s z.grad."""
    seeds, groups = along.seeds, along.groups
    share = 1.0 / len(seeds)
    if len(groups) == 1:
        return tuple(Term(s, p * share) for s, p in zip(seeds, projected, strict=True))
    return tuple(
        Term(seed, p * share / group.perturbation_scale, index)
        for seed, p in zip(seeds, projected, strict=True)
        for index, group in enumerate(groups)
        if group.perturbation_scale > 0
    )


def _probe(at: Shift, terms: Terms, batch: Batch) -> Probe:
    return Probe(Shift(coalesced((*at.terms, *terms)), at.decay), batch)


def _distinct(batches: Iterable[Batch]) -> list[Batch]:
    return list({id(batch): batch for batch in batches}.values())


def dealt(
    batch: Batch, directions: int, *, one_sided: bool, share: int, min_rows: int = 1
) -> list[Batch]:
    """The batch of every direction.

    Two-sided: each of the K directions has its own part of the batch, or all share it where the
    parts would have fewer than ``min_rows`` rows. One-sided: the batch is cut into parts of about
    ``share`` rows and each part has K directions, which share its base point.

    Args:
        batch: The rows of the step.
        directions: K.
        one_sided: Which estimate.
        share: Rows of a part, one-sided.
        min_rows: Fewest rows of a part, two-sided.
    """
    if one_sided:
        parts = batch.split(max(1, len(batch) // share))
        return [part for part in parts for _ in range(directions)]
    separate = len(batch) >= directions * min_rows
    return batch.split(directions) if separate else [batch] * directions
