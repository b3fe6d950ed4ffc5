"""Estimates against analytic gradients: exactness, order in mu, expectation, queries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, dense, flat, labelled, logistic, problem, reference, squares, vector
from torch import Tensor

from zo_adapt import Group, Shift, Term
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.optimizers.directions import Directions, Estimate
from zo_adapt.optimizers.estimator import Estimator, OneSided, TwoSided
from zo_adapt.term import HERE, Terms


def two_sided(mu: float) -> TwoSided:
    return TwoSided(perturbation_scale=mu)


def from_base(mu: float) -> OneSided:
    return OneSided(baseline="base", perturbation_scale=mu)


NOISES = pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
ESTIMATORS = pytest.mark.parametrize("kind", [two_sided, from_base], ids=lambda kind: kind.__name__)


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
    p: Problem, estimator: Estimator, seeds: Sequence[int], split: bool = False, at: Shift = HERE
) -> Estimate:
    directions = along(p, estimator, seeds, split)
    answers = LocalEvaluator(p.objective, p.view).evaluate(estimator.probes(directions, at))
    return estimator.combine(directions, answers)


def along(p: Problem, form: Estimator, seeds: Sequence[int], split: bool = False) -> Directions:
    batches, mu = shares(p, len(seeds), split), form.perturbation_scale
    assert mu is not None
    return Directions(seeds, batches, p.view.groups, mu)


@NOISES
@pytest.mark.parametrize("mu", [1e-2, 1.0, 100.0])
def test_spsa_is_exact_on_a_quadratic_at_any_mu(mu: float, noise: str, seed: int) -> None:
    p = problem(squares, noise=noise)
    exact = gradient(p, squares)
    for k in range(10):
        z = dense(p.view, seed + k)
        result = estimate(p, two_sided(mu), [seed + k])
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


@pytest.mark.parametrize(("kind", "order"), [(two_sided, 2.0), (from_base, 1.0)])
def test_the_error_falls_with_the_order_of_the_difference(kind: Any, order: float) -> None:
    mus = [0.04, 0.02, 0.01, 0.005]
    slopes = np.diff(np.log(errors(kind, mus))) / np.diff(np.log(mus))
    assert np.abs(slopes - order).max() < 0.1


GROUPS = [Group("left", perturbation_scale=4.0), Group("bias", perturbation_scale=0.25)]


@pytest.mark.parametrize(
    ("kind", "directions", "split", "groups"),
    [
        (two_sided, 1, False, []),
        (from_base, 1, False, []),
        (two_sided, 4, False, []),
        (two_sided, 4, True, []),
        (from_base, 3, False, []),
        (two_sided, 2, True, GROUPS),
        (from_base, 2, False, GROUPS),
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
    result = estimate(p, two_sided(0.1), seeds, split=True)
    for k, seed in enumerate(seeds):
        exact = gradient(p, squares, p.data[8 * k : 8 * k + 8])
        assert result.projected[k] == pytest.approx(float(dense(p.view, seed) @ exact), rel=1e-9)
        assert result.terms[k] == Term(seed, pytest.approx(result.projected[k] / 3, rel=1e-15))


def test_the_value_is_the_mean_of_the_pair_or_the_base() -> None:
    p = problem(squares)
    here = float(squares(flat(p.view), p.data).mean())
    assert estimate(p, from_base(0.1), [1, 2]).value == pytest.approx(here, rel=1e-14)
    z = dense(p.view, 1)
    pair = [float(squares(flat(p.view) + sign * 0.1 * z, p.data).mean()) for sign in (1, -1)]
    assert estimate(p, two_sided(0.1), [1]).value == pytest.approx(sum(pair) / 2, rel=1e-14)


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

    form = kind(0.1)
    evaluator = LocalEvaluator(counting, p.view)
    evaluator.evaluate(form.probes(along(p, form, range(directions), split)))
    assert evaluator.queries == sum(sizes)
    return len(sizes), evaluator.queries


def test_queries_of_every_kind() -> None:
    assert calls(two_sided, 1, False) == (2, 48)
    assert calls(two_sided, 4, True) == (8, 48)
    assert calls(two_sided, 4, False) == (8, 192)
    assert calls(from_base, 4, False) == (5, 120)  # the base point is shared


def test_groups_are_stretched_by_their_own_scale() -> None:
    p = problem(squares, dtype=torch.float64, groups=GROUPS)
    start = {name: tensor.clone() for name, tensor in p.view.tensors.items()}
    probe = two_sided(0.5).probes(along(p, two_sided(0.5), [7]))[0]
    with p.view.shifted(probe.at.terms):
        for name, mu in (("left", 2.0), ("bias", 0.125), ("right", 0.5)):
            expected = reference(p.view.noise, name, start[name], [Term(7, mu)])
            assert torch.equal(p.view.tensors[name], expected)


def test_a_group_with_a_small_scale_gets_the_same_gradient() -> None:
    plain, grouped = problem(squares), problem(squares, groups=[Group("", perturbation_scale=0.01)])
    terms: Terms = estimate(grouped, two_sided(0.1), [3]).terms
    expected = vector(plain.view, Shift(estimate(plain, two_sided(0.1), [3]).terms))
    assert torch.allclose(vector(grouped.view, Shift(terms)), expected, rtol=1e-8, atol=0)


def sizes(batches: list[Batch]) -> list[int]:
    return [len(batch) for batch in batches]


def test_two_sided_directions_split_the_batch() -> None:
    batch, samples = nine_rows()
    parts = TwoSided(4).divide(batch, samples)
    assert sizes(parts) == [2, 2, 2, 3]
    assert [row for part in parts for row in part.rows] == list(range(9))
    assert TwoSided(10).divide(batch, samples) == [batch] * 10


def test_one_sided_directions_share_the_rows_of_a_part() -> None:
    batch, samples = nine_rows()
    parts = OneSided(3).divide(batch, samples)
    assert sizes(parts) == [4, 4, 4, 5, 5, 5]
    assert len({id(part) for part in parts}) == 2, "the directions of a part share its base point"


def test_parts_have_the_rows_that_the_objective_needs() -> None:
    batch, samples = nine_rows(min_rows=5)
    assert sizes(OneSided(3).divide(batch, samples)) == [9, 9, 9]
    assert TwoSided(2).divide(batch, samples) == [batch] * 2


def nine_rows(min_rows: int = 1) -> tuple[Batch, Samples]:
    source = as_source(labelled(24, 10))
    return Batch(source, range(9)), Samples(source, 9, seed=0, min_rows=min_rows)


def test_a_group_at_rest_is_not_probed_and_not_moved() -> None:
    p = problem(squares, groups=[Group("left", perturbation_scale=0.0)])
    start = {name: tensor.clone() for name, tensor in p.view.tensors.items()}
    probe = two_sided(0.5).probes(along(p, two_sided(0.5), [7]))[0]
    update = Shift(estimate(p, two_sided(0.5), [7]).terms)
    for moved in (p.view.shifted(probe.at.terms), p.view.shifted(update.terms)):
        with moved:
            assert torch.equal(p.view.tensors["left"], start["left"])
            assert not torch.equal(p.view.tensors["right"], start["right"])
