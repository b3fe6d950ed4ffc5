"""Step-like rewards: their smoothed gradient, shaping across directions, ties, flat signals."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, flat, labelled, logistic, problem, squares, steps, vector
from scipy import stats

from zo_adapt import MeZO, MeZOSVRG, ParameterView, Shift, Term, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import FlatObjectiveWarning, OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.optimizers.directions import SHAPES, Directions, leave_one_out
from zo_adapt.optimizers.estimator import Estimator, OneSided, TwoSided

MU, BATCH = 0.05, 6
SETTINGS = {
    "mezo": lambda shaping: MeZO(num_directions=3, one_sided=False, shaping=shaping),
    "mezo one-sided": lambda shaping: MeZO(num_directions=3, one_sided=True, shaping=shaping),
    "mezo plain rate": lambda shaping: MeZO(
        0.01, num_directions=3, one_sided=False, shaping=shaping
    ),
    "svrg": lambda shaping: MeZOSVRG(
        shaping=shaping, weight_decay=0.1, snapshot_interval=1, snapshot_size="batch"
    ),
    "svrg two-sided": lambda shaping: MeZOSVRG(
        one_sided=False, num_directions=3, shaping=shaping, snapshot_interval=1
    ),
}
SHAPED = [
    (name, shaping)
    for name in SETTINGS
    for shaping in (*SHAPES, "others")
    if shaping != "others" or name in ("mezo one-sided", "svrg")
]
EVERY = pytest.mark.parametrize(("name", "shaping"), SHAPED)


def estimate(
    p: Problem,
    kind: Estimator,
    seeds: list[int],
    objective: Callable[[Any], Any] | None = None,
    mu: float = MU,
) -> Any:
    """An estimate on the whole data, shared by all directions."""
    batches = [Batch(as_source(p.data), range(len(p.data)))] * len(seeds)
    directions = Directions(seeds, batches, p.view.groups, mu)
    evaluator = LocalEvaluator(objective or p.objective, p.view)
    answers = evaluator.evaluate(kind.probes(directions))
    return kind.combine(directions, answers), evaluator.queries


# What the shapes are


def test_shapes_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for size in (2, 3, 8, 41):
        values = rng.integers(0, 6, size).astype(float)
        values[0] = 7.0  # not all equal
        ranks = stats.rankdata(values)  # ties: the average
        assert np.allclose(SHAPES["ranks"](values), (ranks - ranks.mean()) / (size - 1), atol=1e-15)
        assert np.allclose(SHAPES["zscore"](values), stats.zscore(values), rtol=1e-12)
        others = [values[k] - np.delete(values, k).mean() for k in range(size)]
        assert np.allclose(leave_one_out(values), others, atol=1e-12)
        for shape in (*SHAPES.values(), leave_one_out):
            assert abs(shape(values).sum()) < 1e-12 * size


@pytest.mark.parametrize("kind", [OneSided, TwoSided])
@pytest.mark.parametrize("shaping", ["ranks", "zscore"])
def test_ranks_and_z_scores_do_not_see_the_scale(shaping: str, kind: Any) -> None:
    p, seeds = problem(logistic), list(range(8))
    plain = estimate(p, kind(8, shaping=shaping), seeds)[0]
    other = estimate(p, kind(8, shaping=shaping), seeds, lambda b: 1000 * p.objective(b) + 5)[0]
    assert np.allclose(other.projected, plain.projected, rtol=1e-7)
    assert len(set(plain.projected)) == 8


def test_one_sided_ranks_see_the_order_alone() -> None:
    p, seeds = problem(logistic), list(range(8))
    kind = OneSided(shaping="ranks")
    plain = estimate(p, kind, seeds)[0]
    bent = estimate(p, kind, seeds, lambda b: math.exp(9 * float(p.objective(b).mean())))[0]
    assert bent.terms == plain.terms
    assert sorted(plain.projected) == pytest.approx([k / 7 - 0.5 for k in range(8)])


def test_two_sided_ranks_are_signed_ranks_of_the_differences() -> None:
    p, seeds = problem(logistic), list(range(7))
    differences = np.array(estimate(p, TwoSided(), seeds)[0].projected)
    signed = np.sign(differences) * stats.rankdata(np.abs(differences))
    shaped = estimate(p, TwoSided(8, shaping="ranks"), seeds)[0]
    # among 2 K values, K of either sign: |rank| 1..K is (2 |rank| - 1) / (2 K - 1) from the centre
    expected = (2 * signed - np.sign(signed)) / 13 / 2
    assert np.allclose(shaped.projected, expected, rtol=1e-12)


def test_two_sided_z_scores_are_differences_over_their_rms() -> None:
    p, seeds = problem(logistic), list(range(7))
    differences = np.array(estimate(p, TwoSided(), seeds)[0].projected)
    shaped = estimate(p, TwoSided(8, shaping="zscore"), seeds)[0]
    expected = differences / np.sqrt((differences**2).mean())
    assert np.allclose(shaped.projected, expected, rtol=1e-10)


def test_directions_are_compared_on_the_same_rows_only() -> None:
    p = problem(logistic, labelled(24, 10))
    parts = Batch(as_source(p.data), range(24)).split(3)
    batches = [part for part in parts for _ in range(4)]
    kind = OneSided(shaping="ranks")
    directions = Directions(range(12), batches, p.view.groups, MU)
    answers = LocalEvaluator(p.objective, p.view).evaluate(kind.probes(directions))
    found = np.array(kind.combine(directions, answers).projected)
    for part in range(3):
        values = [answer.value for answer in answers[4 * part : 4 * part + 4]]
        assert np.allclose(found[4 * part : 4 * part + 4], SHAPES["ranks"](np.array(values)))


def test_no_base_point_is_evaluated() -> None:
    p, seeds = problem(logistic), list(range(8))
    shaped, queries = estimate(p, OneSided(), seeds)
    assert queries == 8 * 24
    assert estimate(p, OneSided(baseline="base"), seeds)[1] == 9 * 24
    centre = float(logistic(flat(p.view), p.data).mean())
    assert shaped.value == pytest.approx(centre, rel=0.1)
    pair = estimate(p, TwoSided(8, shaping="ranks"), seeds)
    assert pair[1] == 16 * 24
    assert pair[0].value == estimate(p, TwoSided(), seeds)[0].value


def test_the_optimizer_uses_it() -> None:
    for one_sided in (False, True):
        shaped = problem(logistic)
        optimizer = MeZO(
            0.01, perturbation_scale=MU, num_directions=3, one_sided=one_sided, shaping="ranks"
        )
        info = next(steps(optimizer, *shaped, batch_size=24, seed=7, count=1))
        assert info.projected_gradient != 0.0
        terms = info.update.terms
        levels = {round(t.coefficient / -0.01 * len(terms) * 2 * 10) for t in terms}
        assert len(terms) == (18 if one_sided else 3)
        # one-sided u in (-1/2, 0, 1/2), two-sided (1, 3, 5) / 10 of either sign
        assert levels <= ({-10, 0, 10} if one_sided else {-10, -6, -2, 2, 6, 10})


# Ties


@EVERY
@pytest.mark.parametrize("constant", [0.1, 1e-17, 1e30, 0.0])
def test_a_constant_objective_moves_nothing(constant: float, name: str, shaping: Any) -> None:
    p = problem(logistic, start=0.3)
    before = p.view.hash()
    minimize(
        lambda batch: constant, p.view, p.data, SETTINGS[name](shaping),
        batch_size=BATCH, max_steps=10, progress=False,
    )  # fmt: skip
    assert p.view.hash() == before


@EVERY
def test_a_constant_for_each_batch_moves_nothing(name: str, shaping: Any) -> None:
    p = problem(logistic, start=0.3)
    before = p.view.hash()
    minimize(
        lambda batch: batch[:, 0], p.view, p.data, SETTINGS[name](shaping),
        batch_size=BATCH, max_steps=10, progress=False,
    )  # fmt: skip
    assert p.view.hash() == before


@EVERY
def test_what_is_not_constant_moves(name: str, shaping: Any) -> None:
    p = problem(logistic, start=0.3)
    before = p.view.hash()
    minimize(
        p.objective, p.view, p.data, SETTINGS[name](shaping),
        batch_size=BATCH, max_steps=10, progress=False,
    )  # fmt: skip
    assert p.view.hash() != before


def test_equal_pairs_have_no_say_among_others() -> None:
    p, seeds = problem(logistic), list(range(5))
    differences = iter([0.0, 0.0, 0.3, 0.1, 0.0, 0.0, 0.1, 0.2, 0.3, 0.1])
    kind = TwoSided(8, shaping="ranks")
    found = estimate(p, kind, seeds, lambda batch: next(differences))[0].projected
    assert found[0] == found[2] == 0.0
    assert found[1] == found[4] > -found[3] > 0


# Without bias


def step_function(x: torch.Tensor, normal: torch.Tensor) -> Callable[[Any], float]:
    """1 where a plane is passed: no gradient anywhere, that of its smoothing is known."""
    return lambda batch: float(x @ normal > 0.04)


@pytest.mark.parametrize("form", [OneSided(baseline="base"), TwoSided(), OneSided()], ids=repr)
def test_the_smoothed_gradient_of_a_step_is_estimated_without_bias(
    form: Estimator, seed: int
) -> None:
    x = torch.tensor([0.02, -0.01, 0.03], dtype=torch.float64)
    normal = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    mu, norm = 0.03, 3.0
    # E f(x + mu z) = Phi(t), t = (a x - c) / (mu |a|): its gradient is phi(t) a / (mu |a|).
    t = (float(x @ normal) - 0.04) / (mu * norm)
    exact = math.exp(-t * t / 2) / math.sqrt(2 * math.pi) * normal / (mu * norm)
    view = ParameterView({"x": x})
    p = Problem(view, step_function(x, normal), torch.zeros(1, 1))
    count = 500
    found = torch.stack(
        [
            vector(view, Shift(estimate(p, form, list(range(first, first + 4)), mu=mu)[0].terms))
            for first in range(seed, seed + 4 * count, 4)
        ]
    )
    error = found.std(0) / count**0.5
    assert float(((found.mean(0) - exact) / error).abs().max()) < 5
    assert float(error.norm()) < 0.3 * float(exact.norm()), "the test has no power"


def test_leave_one_out_is_unbiased_on_a_smooth_function(seed: int) -> None:
    p = problem(squares)
    theta = flat(p.view).requires_grad_()
    (exact,) = torch.autograd.grad(squares(theta, p.data).mean(), theta)
    count = 300
    found = torch.stack(
        [
            vector(
                p.view,
                Shift(estimate(p, OneSided(), list(range(first, first + 4)), mu=1e-3)[0].terms),
            )
            for first in range(seed, seed + 4 * count, 4)
        ]
    )
    error = found.std(0) / count**0.5
    assert float(((found.mean(0) - exact) / error).abs().max()) < 5
    assert float(error.norm()) < 0.5 * float(exact.norm()), "the test has no power"


def test_ranks_withstand_an_outlier() -> None:
    """One direction of 32 with a wild value: the plain step follows it, the ranks do not."""
    p, seeds = problem(squares), list(range(32))

    def spoiled() -> Callable[[Any], Any]:
        count = [0]

        def objective(batch: Any) -> Any:
            count[0] += 1
            return p.objective(batch) + (1e6 if count[0] == 5 else 0.0)

        return objective

    clean = vector(p.view, Shift(estimate(p, TwoSided(), seeds)[0].terms))

    def cosine(terms: tuple[Term, ...]) -> float:
        found = vector(p.view, Shift(terms))
        return float(found @ clean / found.norm() / clean.norm())

    plain = estimate(p, TwoSided(), seeds, spoiled())[0].terms
    ranks = estimate(p, TwoSided(8, shaping="ranks"), seeds, spoiled())[0].terms
    assert cosine(ranks) > 0.6
    assert abs(cosine(plain)) < cosine(ranks)


# Where it makes no sense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeZO(num_directions=1, shaping="ranks"), "num_directions=1; choose at least 2"),
        (lambda: MeZO(num_directions=4, shaping="rank"), "shaping='rank'; choose one of"),
        (lambda: MeZO(one_sided=False, shaping="others"), "each other's baseline"),
        (lambda: MeZO(one_sided=False, shaping="base"), "each other's baseline"),
        (lambda: MeZOSVRG(num_directions=1, shaping="others"), "at least 2"),
        (lambda: OneSided(8, baseline="mean"), "choose 'auto', 'others' or 'base'"),
        (lambda: OneSided(8, baseline="base", shaping="ranks"), "leave out one of the two"),
        (lambda: TwoSided(8, shaping="rank"), "choose 'none' or one of"),
        (lambda: MeZOSVRG(snapshot_interval=2, shaping="ranks"), "needs snapshot_interval=1"),
    ],
)
def test_it_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


# A flat signal


def rarely(share: int) -> Callable[[Any], float]:
    """Every ``share``-th call gives another value, so about 2 / share of the pairs differ."""
    count = [0]

    def objective(batch: Any) -> float:
        count[0] += 1
        return float(count[0] % share == 1)

    return objective


def run(objective: Callable[[Any], float], **options: Any) -> None:
    view = ParameterView({"x": torch.zeros(4)})
    pairs = MeZO(**{"num_directions": 1, "one_sided": False} | options)
    minimize(objective, view, None, pairs, max_steps=120, progress=False)


def test_a_signal_that_is_nearly_always_flat_is_named_with_figures() -> None:
    with pytest.warns(FlatObjectiveWarning) as caught:
        run(rarely(50), displacement=0.25)
    assert len(caught) == 1
    told = str(caught[0].message)
    assert "96 of 100 differences in 100 steps were exactly zero (96%)" in told
    assert "now 0.01; about 12 times" in told  # 0.5 / 0.04
    assert "about 17 times as many" in told  # log 0.5 / log 0.96


def test_with_many_directions_it_is_named_sooner() -> None:
    with pytest.warns(FlatObjectiveWarning, match="of 104 differences in 13 steps"):
        run(rarely(50), num_directions=8, displacement=0.25)


def test_a_signal_that_comes_through_is_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(rarely(11), displacement=0.25)  # 18% differ
