"""A method of scipy.optimize.minimize: counts, callbacks, options, refusals."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, minimize
from sklearn.datasets import load_breast_cancer

from zo_adapt import SGD, AskTell, MeZO, MeZOSVRG, scipy_method
from zo_adapt.errors import ObjectiveError, OptionError

NAMES = pytest.mark.parametrize("name", ["mezo-svrg", "mezo", "zo-svrg"])
X0 = [1.0, -1.0, 0.5]


class Bowl:
    """sum (x - center)^2, with every place it was asked at."""

    def __init__(self) -> None:
        self.places: list[np.ndarray] = []

    def __call__(self, x: np.ndarray, center: float = 3.0) -> float:
        self.places.append(x.copy())
        return float(((x - center) ** 2).sum())


@NAMES
def test_it_minimises_and_counts_every_call(name: str) -> None:
    fun = Bowl()
    result = minimize(fun, X0, method=scipy_method(name, maxfev=1500))
    assert isinstance(result, OptimizeResult)
    assert result.fun < 0.1 * Bowl()(np.array(X0))
    assert result.nfev == len(fun.places) <= 1500
    assert result.fun == Bowl()(result.x)
    assert np.array_equal(fun.places[-1], result.x)
    assert result.success
    assert result.status == 0
    assert "maximum number of queries" in result.message


@pytest.mark.parametrize(
    ("options", "nit", "nfev"),
    [
        ({"maxiter": 10}, 10, 21),
        ({"maxfev": 10}, 4, 9),
        ({"maxfev": 9}, 4, 9),
        ({"maxfev": 1}, 0, 1),
        ({"maxiter": 3, "maxfev": 100}, 3, 7),
        ({"maxiter": 100, "maxfev": 7}, 3, 7),
        ({}, 1499, 2999),
    ],
)
def test_budgets_are_exact(options: dict[str, int], nit: int, nfev: int) -> None:
    fun = Bowl()
    method = scipy_method("mezo", num_directions=1, displacement=0.5)
    result = minimize(fun, X0, method=method, options=options)
    assert (result.nit, result.nfev, len(fun.places)) == (nit, nfev, nfev)


@pytest.mark.parametrize("maxfev", [1, 2])
def test_a_run_without_a_step_is_no_success(maxfev: int) -> None:
    result = minimize(Bowl(), X0, method=scipy_method("mezo", num_directions=1, maxfev=maxfev))
    assert (result.nit, result.nfev, result.success, result.status) == (0, 1, False, 1)
    assert f"maxfev={maxfev} is less than" in result.message
    assert np.array_equal(result.x, X0)
    enough = minimize(Bowl(), X0, method=scipy_method("mezo", num_directions=1, maxfev=3))
    assert (enough.nit, enough.nfev, enough.success, enough.status) == (1, 3, True, 0)


def test_it_is_ask_and_tell() -> None:
    result = minimize(Bowl(), X0, method=scipy_method("mezo-svrg", maxfev=100, seed=5))
    asker = AskTell(MeZOSVRG(), X0, max_queries=99, seed=5)
    while candidates := asker.ask():
        asker.tell([Bowl()(x) for x in candidates])
    assert np.array_equal(result.x, asker.x)
    other = minimize(Bowl(), X0, method=scipy_method("mezo-svrg", maxfev=100, seed=6))
    assert not np.array_equal(result.x, other.x)


def test_options_of_the_call_win() -> None:
    method = scipy_method("mezo", maxiter=50, lr=1e-2)
    assert minimize(Bowl(), X0, method=method, options={"maxiter": 3}).nit == 3
    assert minimize(Bowl(), X0, method=method).nit == 50
    slow = minimize(Bowl(), X0, method=method, options={"lr": 1e-9})
    assert np.allclose(slow.x, X0, atol=1e-5)


def test_a_step_beyond_every_number_is_a_failure_not_an_error() -> None:
    fun = Bowl()

    def cliff(x: np.ndarray) -> float:
        return 1e200 * fun(x)

    result = minimize(cliff, X0, method=scipy_method("mezo", lr=1e200, maxiter=5))
    assert (result.success, result.status, result.nit, result.nfev) == (False, 3, 0, 9)
    assert "left the dtype's range" in result.message
    assert np.array_equal(result.x, X0)


def test_an_optimizer_of_the_package_and_a_pickle_of_the_method() -> None:
    optimizer = MeZO(lr=1e-2, one_sided=False, num_directions=2)
    method = scipy_method(optimizer, maxiter=5)
    result = minimize(Bowl(), X0, method=method)
    assert result.nfev == 21
    again = minimize(Bowl(), X0, method=pickle.loads(pickle.dumps(method)))
    assert np.array_equal(again.x, result.x)
    assert optimizer.steps == 0


def test_args_reach_the_function_and_x0_is_not_changed() -> None:
    x0 = np.zeros(2, dtype=int)
    result = minimize(
        Bowl(), x0, args=(-3.0,), method=scipy_method("mezo", maxiter=800, displacement=1.0)
    )
    assert np.allclose(result.x, -3.0, atol=0.2)
    assert x0.tolist() == [0, 0]
    single = minimize(Bowl(), x0, args=-3.0, method=scipy_method("mezo", maxiter=2))
    assert single.nit == 2


def test_a_callback_of_xk() -> None:
    seen: list[np.ndarray] = []

    def callback(xk: np.ndarray) -> None:
        seen.append(xk.copy())
        xk[:] = 99.0  # its own copy

    result = minimize(Bowl(), X0, method=scipy_method("mezo", maxiter=5), callback=callback)
    assert len(seen) == 5
    assert np.array_equal(seen[-1], result.x)


def test_a_builtin_as_callback() -> None:
    seen: list[np.ndarray] = []
    minimize(Bowl(), X0, method=scipy_method("mezo", maxiter=5), callback=seen.append)
    assert len(seen) == 5


def test_a_callback_of_the_intermediate_result() -> None:
    seen: list[OptimizeResult] = []

    def callback(intermediate_result: OptimizeResult) -> None:
        seen.append(intermediate_result)

    fun = Bowl()
    method = scipy_method("mezo", maxiter=5, shaping="base", displacement=0.5)
    result = minimize(fun, X0, method=method, callback=callback)
    assert [r.nit for r in seen] == [1, 2, 3, 4, 5]
    assert [r.nfev for r in seen] == [9, 18, 27, 36, 45]
    assert np.array_equal(seen[-1].x, result.x)
    assert result.nfev == 46
    # the value of the base point, x before the step
    assert [r.fun for r in seen[1:]] == [Bowl()(r.x) for r in seen[:-1]]


def test_nothing_but_the_final_value_is_evaluated_after_stop_iteration() -> None:
    fun, calls = Bowl(), []

    def callback(xk: np.ndarray) -> None:
        calls.append(len(fun.places))
        if len(calls) == 3:
            raise StopIteration

    method = scipy_method("mezo", num_directions=1, maxiter=50, displacement=0.5)
    result = minimize(fun, X0, method=method, callback=callback)
    assert calls == [2, 4, 6]
    assert (result.nit, result.nfev, len(fun.places)) == (3, 7, 7)
    assert (result.success, result.status) == (False, 99)
    assert result.message == "`callback` raised `StopIteration`."
    assert result.fun == Bowl()(result.x)


def test_an_error_of_the_function_or_the_callback_is_not_swallowed() -> None:
    def broken(*_: Any) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        minimize(broken, X0, method=scipy_method("mezo", maxiter=5))
    with pytest.raises(ZeroDivisionError):
        minimize(Bowl(), X0, method=scipy_method("mezo", maxiter=5), callback=broken)
    for calls in range(3):
        values = iter([1.0] * calls)
        with pytest.raises(StopIteration):
            minimize(lambda x, v=values: next(v), X0, method=scipy_method("mezo", maxiter=1))


def test_nan_stops_at_the_last_good_step() -> None:
    fun, places = Bowl(), []

    def failing(x: np.ndarray) -> float:
        return math.nan if len(fun.places) == 6 else fun(x)

    method = scipy_method("mezo", num_directions=1, maxiter=50, displacement=0.5)
    result = minimize(failing, X0, method=method, callback=places.append)
    assert (result.success, result.status, result.nit) == (False, 2, 3)
    assert np.array_equal(result.x, places[-1])
    assert "not finite" in result.message
    assert result.nfev == 6 + 2 + 1  # the pair that failed, and the final value
    assert math.isnan(result.fun)


@pytest.mark.parametrize("value", [None, [1.0, 2.0], "a", "3.5", 1 + 2j, 10**400])
def test_a_function_that_gives_no_number_is_named(value: Any) -> None:
    with pytest.raises(ObjectiveError, match="not one number"):
        minimize(lambda x: value, X0, method=scipy_method("mezo", maxiter=5))


@pytest.mark.parametrize(
    "limits",
    [
        {"bounds": [(0, 1)] * 3},
        {"bounds": Bounds(0, 1)},
        {"bounds": np.array([[0, 1]] * 3)},
        {"constraints": {"type": "eq", "fun": np.sum}},
        {"constraints": [{"type": "eq", "fun": np.sum}]},
        {"constraints": LinearConstraint(np.eye(3), 0, 1)},
    ],
)
def test_bounds_and_constraints_are_refused(limits: dict[str, Any]) -> None:
    fun = Bowl()
    with pytest.raises(OptionError, match=next(iter(limits))):
        minimize(fun, X0, method=scipy_method("mezo", maxiter=5), **limits)
    assert not fun.places


def test_derivatives_are_left_unused_with_a_warning() -> None:
    def with_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        return Bowl()(x), 2 * (x - 3)

    method = scipy_method("mezo", maxiter=5)
    plain = minimize(Bowl(), X0, method=method)
    with pytest.warns(RuntimeWarning, match=r"derivative information \(jac\)"):
        warned = minimize(with_gradient, X0, jac=True, method=method)
    assert np.array_equal(warned.x, plain.x)
    with pytest.warns(RuntimeWarning, match=r"\(hess\)"):
        minimize(Bowl(), X0, hess=lambda x: np.eye(3), method=method)


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("adam", {}, "choose one of"),
        ("mezo", {"mxiter": 5}, r"mezo has no \['mxiter'\]"),
        ("mezo", {"lr": -1.0}, "lr=-1.0"),
        ("mezo", {"maxiter": 0}, "maxiter=0"),
        ("mezo", {"maxfev": 1.5}, "maxfev=1.5"),
        (MeZO(), {"lr": 1.0}, "give it to the optimizer"),
    ],
)
def test_bad_options_are_named_at_once(optimizer: Any, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scipy_method(optimizer, **options)


def test_what_comes_with_the_call_is_checked_before_any_evaluation() -> None:
    fun = Bowl()
    with pytest.raises(OptionError, match=r"no \['tol'\]"):
        minimize(fun, X0, method=scipy_method("mezo"), tol=1e-3)
    with pytest.raises(OptionError, match="seed=-1"):
        minimize(fun, X0, method=scipy_method("mezo"), options={"seed": -1})
    with pytest.raises(OptionError, match="SGD"):
        minimize(fun, X0, method=scipy_method(SGD(lr=0.1)))  # type: ignore[arg-type]
    assert not fun.places


def test_disp_prints_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    method = scipy_method("mezo", num_directions=1, maxiter=5, displacement=0.5)
    minimize(Bowl(), X0, method=method)
    assert not capsys.readouterr().out
    minimize(Bowl(), X0, method=method, options={"disp": True})
    shown = capsys.readouterr().out
    assert "Iterations: 5" in shown
    assert "Function evaluations: 11" in shown


def test_no_global_generator_is_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore  # noqa: NPY002
    minimize(Bowl(), X0, method=scipy_method("mezo", maxiter=5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # type: ignore  # noqa: NPY002


def test_a_checklist_is_tuned_on_its_cost_and_carries_over_to_held_out_patients() -> None:
    """Counts: every derivative is zero or does not exist."""
    measured, benign = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(benign))
    ill, tuned_on, held_out = benign[order] == 0, slice(0, 285), slice(285, None)
    measured = measured[order]
    measured = (measured - measured[tuned_on].mean(0)) / measured[tuned_on].std(0)

    def cost(rule: np.ndarray, patients: slice = tuned_on) -> float:
        """5 for a tumour that is missed, 1 for a needless referral."""
        limits, weights, total = rule[:30], rule[30:60], rule[60]
        referred = (measured[patients] > limits) @ weights > 30 * total
        missed, needless = ill[patients] & ~referred, ~ill[patients] & referred
        return float(5 * missed.mean() + needless.mean())

    start = np.concatenate([np.zeros(30), np.ones(30), [0.5]])
    method = scipy_method(displacement=1.0, shaping="ranks", maxfev=4000)
    result = minimize(cost, start, method=method)
    assert result.fun < 0.3 * cost(start)
    assert cost(result.x, held_out) < cost(start, held_out)
    assert minimize(cost, start, method="BFGS").fun > 3 * result.fun
