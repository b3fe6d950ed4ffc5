"""Estimates against analytic gradients: exactness, order in mu, expectation, queries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, dense, flat, labelled, logistic, problem, reference, squares, vector
from torch import Tensor

from zo_adapt import Group, Shift, Term
from zo_adapt.data.batches import Batch
from zo_adapt.data.sources import as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.optimizers.estimator import (
    HERE,
    Directions,
    Estimate,
    OneSided,
    TwoSided,
    dealt,
)
from zo_adapt.term import Terms

NOISES = pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
ESTIMATORS = pytest.mark.parametrize("kind", [TwoSided, OneSided], ids=lambda kind: kind.__name__)


def gradient(p: Problem, function: Any, rows: Tensor | None = None) -> Tensor:
    theta = flat(p.view).detach().clone().requires_grad_()
    loss = function(theta, p.data if rows is None else rows).mean()
    (result,) = torch.autograd.grad(loss, theta)
    return result


def shares(p: Problem, directions: int, split: bool) -> list[Batch]:
    """Its own part of the data for every direction, or all of them for each."""
    whole = Batch(as_source(p.data), range(len(p.data)))
    return whole.split(directions) if split else [whole] * directions


def estimate(
    p: Problem, estimator: Any, seeds: Sequence[int], split: bool = False, at: Shift = HERE
) -> Estimate:
    batches = shares(p, len(seeds), split)
    probes = estimator.probes(Directions(seeds, batches, p.view.groups), at)
    answers = LocalEvaluator(p.objective, p.view).evaluate(probes)
    result: Estimate = estimator.estimate(Directions(seeds, batches, p.view.groups), answers)
    return result


@NOISES
@pytest.mark.parametrize("mu", [1e-2, 1.0, 100.0])
def test_spsa_is_exact_on_a_quadratic_at_any_mu(mu: float, noise: str, seed: int) -> None:
    p = problem(squares, noise=noise)
    exact = gradient(p, squares)
    for k in range(10):
        z = dense(p.view, seed + k)
        result = estimate(p, TwoSided(mu), [seed + k])
        scale = float(z.norm() * exact.norm())
        assert result.projected[0] == pytest.approx(float(z @ exact), abs=1e-10 * scale)
        assert torch.allclose(
            vector(p.view, Shift(result.terms)), result.projected[0] * z, rtol=1e-10, atol=0
        )


def errors(kind: Any, mus: Sequence[float]) -> list[float]:
    p = problem(logistic)
    exact = gradient(p, logistic)
    return [
        abs(estimate(p, kind(mu), [5]).projected[0] - float(dense(p.view, 5) @ exact)) for mu in mus
    ]


@pytest.mark.parametrize(("kind", "order"), [(TwoSided, 2.0), (OneSided, 1.0)])
def test_the_error_falls_with_the_order_of_the_difference(kind: Any, order: float) -> None:
    mus = [0.04, 0.02, 0.01, 0.005]
    slopes = np.diff(np.log(errors(kind, mus))) / np.diff(np.log(mus))
    assert np.abs(slopes - order).max() < 0.1


GROUPS = [Group("left", perturbation_scale=4.0), Group("bias", perturbation_scale=0.25)]


@pytest.mark.parametrize(
    ("kind", "directions", "split", "groups"),
    [
        (TwoSided, 1, False, []),
        (OneSided, 1, False, []),
        (TwoSided, 4, False, []),
        (TwoSided, 4, True, []),
        (OneSided, 3, False, []),
        (TwoSided, 2, True, GROUPS),
        (OneSided, 2, False, GROUPS),
    ],
)
@NOISES
def test_unbiased(
    kind: Any, directions: int, split: bool, groups: list[Group], noise: str, seed: int
) -> None:
    p = problem(squares, noise=noise, groups=groups)
    exact = gradient(p, squares)
    count = 1200 // directions
    found = torch.stack([
        vector(
            p.view,
            Shift(
                estimate(
                    p, kind(1e-3), range(seed + n * directions, seed + (n + 1) * directions), split
                ).terms
            ),
        )
        for n in range(count)
    ])  # fmt: skip
    error = found.std(0) / count**0.5
    assert float((found.mean(0) - exact).abs().div(error).max()) < 5
    assert float(error.norm()) < 0.4 * float(exact.norm()), "the test has no power"


def test_a_split_batch_gives_each_direction_its_own_rows() -> None:
    p = problem(squares)
    seeds = [11, 12, 13]
    result = estimate(p, TwoSided(0.1), seeds, split=True)
    for k, seed in enumerate(seeds):
        exact = gradient(p, squares, p.data[8 * k : 8 * k + 8])
        assert result.projected[k] == pytest.approx(float(dense(p.view, seed) @ exact), rel=1e-9)
        assert result.terms[k] == Term(seed, pytest.approx(result.projected[k] / 3, rel=1e-15))


def test_the_value_is_the_mean_of_the_pair_or_the_base() -> None:
    p = problem(squares)
    here = float(squares(flat(p.view), p.data).mean())
    assert estimate(p, OneSided(0.1), [1, 2]).value == pytest.approx(here, rel=1e-14)
    z = dense(p.view, 1)
    pair = [float(squares(flat(p.view) + sign * 0.1 * z, p.data).mean()) for sign in (1, -1)]
    assert estimate(p, TwoSided(0.1), [1]).value == pytest.approx(sum(pair) / 2, rel=1e-14)


@ESTIMATORS
def test_an_estimate_elsewhere_is_the_estimate_there(kind: Any) -> None:
    p = problem(logistic)
    update = Shift((Term(1, 0.5), Term(2, -0.3)), decay=0.9)
    elsewhere = estimate(p, kind(1e-2), [5], at=HERE.then(update))
    p.view.apply(update)
    assert elsewhere.projected[0] == pytest.approx(
        estimate(p, kind(1e-2), [5]).projected[0], rel=1e-11
    )


def test_points_add_up_and_invert() -> None:
    p = problem(logistic)
    updates = [Shift((Term(k, 0.1 * k),), decay=0.95) for k in (1, 2, 1)]
    point = HERE
    start = flat(p.view)
    for update in updates:
        p.view.apply(update)
        point = point.then(update)
    assert len(point.terms) == 2, "equal directions are one term"
    back = point.inverse()
    with p.view.shifted(back.terms, back.decay):
        assert torch.allclose(flat(p.view), start, rtol=1e-13, atol=1e-13)


def calls(kind: Any, directions: int, split: bool) -> tuple[int, int]:
    p = problem(squares)
    sizes: list[int] = []

    def counting(batch: Tensor) -> Any:
        sizes.append(len(batch))
        return p.objective(batch)

    batches = shares(p, directions, split)
    evaluator = LocalEvaluator(counting, p.view)
    evaluator.evaluate(kind(0.1).probes(Directions(range(directions), batches, p.view.groups)))
    assert evaluator.queries == sum(sizes)
    return len(sizes), evaluator.queries


def test_queries_of_every_kind() -> None:
    assert calls(TwoSided, 1, False) == (2, 48)
    assert calls(TwoSided, 4, True) == (8, 48)
    assert calls(TwoSided, 4, False) == (8, 192)
    assert calls(OneSided, 4, False) == (5, 120)  # the base point is shared


def test_groups_are_stretched_by_their_own_scale() -> None:
    p = problem(squares, dtype=torch.float64, groups=GROUPS)
    start = {name: tensor.clone() for name, tensor in p.view.tensors.items()}
    batches = shares(p, 1, split=False)
    probe = TwoSided(0.5).probes(Directions([7], batches, p.view.groups))[0]
    with p.view.shifted(probe.at.terms):
        for name, mu in (("left", 2.0), ("bias", 0.125), ("right", 0.5)):
            expected = reference(p.view.noise, name, start[name], [Term(7, mu)])
            assert torch.equal(p.view.tensors[name], expected)


def test_a_group_with_a_small_scale_gets_the_same_gradient() -> None:
    plain, grouped = problem(squares), problem(squares, groups=[Group("", perturbation_scale=0.01)])
    terms: Terms = estimate(grouped, TwoSided(0.1), [3]).terms
    expected = vector(plain.view, Shift(estimate(plain, TwoSided(0.1), [3]).terms))
    assert torch.allclose(vector(grouped.view, Shift(terms)), expected, rtol=1e-8, atol=0)


def sizes(batches: list[Batch]) -> list[int]:
    return [len(batch) for batch in batches]


def test_a_batch_is_dealt_to_the_directions() -> None:
    batch = Batch(as_source(labelled(24, 10)), range(9))
    two = dealt(batch, 4, one_sided=False, share=4)
    assert sizes(two) == [2, 2, 2, 3]
    assert [row for part in two for row in part.rows] == list(range(9))
    assert dealt(batch, 10, one_sided=False, share=4) == [batch] * 10
    one = dealt(batch, 3, one_sided=True, share=4)
    assert sizes(one) == [4, 4, 4, 5, 5, 5]
    assert len({id(part) for part in one}) == 2, "the directions of a part share its base point"
    assert sizes(dealt(batch, 3, one_sided=True, share=20)) == [9, 9, 9]


def test_a_group_at_rest_is_not_probed_and_not_moved() -> None:
    p = problem(squares, groups=[Group("left", perturbation_scale=0.0)])
    start = {name: tensor.clone() for name, tensor in p.view.tensors.items()}
    batches = shares(p, 1, split=False)
    probe = TwoSided(0.5).probes(Directions([7], batches, p.view.groups))[0]
    update = Shift(estimate(p, TwoSided(0.5), [7]).terms)
    for moved in (p.view.shifted(probe.at.terms), p.view.shifted(update.terms)):
        with moved:
            assert torch.equal(p.view.tensors["left"], start["left"])
            assert not torch.equal(p.view.tensors["right"], start["right"])
