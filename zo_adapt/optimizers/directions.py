"""Directions as terms: from seeds to probes, from projected gradients to an estimate."""

from collections.abc import Sequence
from typing import NamedTuple

from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import Shift, Term, Terms
from zo_adapt.view.group import Group


class Directions(NamedTuple):
    """The directions of an estimate, how far along them it looks, and on which rows.

    Args:
        seeds: Of K directions.
        batches: K, that of every direction; one batch may be that of several.
        groups: The parts of the view.
        perturbation_scale: mu, in the parameters' units; > 0.
    """

    seeds: Sequence[int]
    batches: Sequence[Batch]
    groups: Sequence[Group]
    perturbation_scale: float

    def probe(self, number: int, factor: float, at: Shift) -> Probe:
        """The point ``at`` + factor mu z of one direction, on its batch."""
        along = direction(self.seeds[number], factor * self.perturbation_scale, self.groups)
        # One term a direction, also where the place is reached along the same one.
        return Probe(at.plus(along), self.batches[number])


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


def direction(seed: int, coefficient: float, groups: Sequence[Group]) -> Terms:
    """The terms of coefficient * z(seed), each group by its own perturbation_scale."""
    if len(groups) == 1:
        return (Term(seed, coefficient),)
    return tuple(
        Term(seed, coefficient * group.perturbation_scale, index)
        for index, group in enumerate(groups)
        if group.perturbation_scale > 0
    )


def gradient(directions: Directions, projected: Sequence[float]) -> Terms:
    """1/K sum_k p_k z_k, unbiased in every group."""
    share = 1.0 / len(directions.seeds)
    pairs = zip(directions.seeds, projected, strict=True)
    each = (direction_terms(seed, p * share, directions.groups) for seed, p in pairs)
    return tuple(term for terms in each for term in terms)


def direction_terms(seed: int, projected: float, groups: Sequence[Group]) -> Terms:
    """P z, the estimate along one direction, unbiased in every group."""
    if len(groups) == 1:
        return (Term(seed, projected),)
    # A probe stretched by s in a group sees p = s z.grad there: its share is p z / s, so that
    # E g = grad f in every group, whatever its scale.
    return tuple(
        Term(seed, projected / group.perturbation_scale, index)
        for index, group in enumerate(groups)
        if group.perturbation_scale > 0
    )
