"""Plain functions of few variables: bounds, units, failing simulations, restarts, best points."""

import copy
import itertools
import math
import pickle
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, minimize

from objectives import CallableObjective
from zo_adapt import AskTell, MeZO, MeZOSVRG, ParameterView, StopReason, scipy_method
from zo_adapt import minimize as tune
from zo_adapt.errors import (
    NoisyObjectiveWarning,
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
)
from zo_adapt.evaluation.failures import with_values
from zo_adapt.evaluation.protocol import Evaluation


def bowl(x: Any, at: Any = 3.0) -> float:
    return float(((np.asarray(x) - at) ** 2).sum())


def drive(asker: AskTell, function: Callable[[Any], float]) -> list[Any]:
    seen = []
    while candidates := asker.ask():
        seen += candidates
        asker.tell([function(x) for x in candidates])
    return seen


class TestBounds:
    @pytest.mark.parametrize(
        "bounds",
        [(-1.0, 2.0), [(-1.0, 2.0)] * 3, np.array([[-1.0, 2.0]] * 3), Bounds(-1.0, 2.0)],
        ids=["one pair", "pairs", "array", "scipy"],
    )
    @pytest.mark.parametrize("optimizer", [MeZO(displacement=0.5), MeZOSVRG(displacement=0.5)])
    def test_every_candidate_is_within_and_the_bound_is_reached(
        self, optimizer: Any, bounds: Any
    ) -> None:
        asker = AskTell(optimizer, np.zeros(3), max_queries=3000, bounds=bounds, units=2.0)
        seen = drive(asker, bowl)  # whose best point within is the corner (2, 2, 2)
        assert all((x >= -1.0).all() and (x <= 2.0).all() for x in seen)
        assert abs(asker.x - 2.0).max() < 0.2

    @pytest.mark.parametrize("side, answer", [((0.5, None), 3.0), ((None, 1.0), 1.0)])
    def test_one_sided(self, side: Any, answer: float) -> None:
        asker = AskTell(MeZO(), np.full(2, 0.75), max_queries=3000, bounds=side, units=2.0)
        seen = drive(asker, bowl)
        low, high = (-math.inf if side[0] is None else side[0]), side[1] or math.inf
        assert all((x >= low).all() and (x <= high).all() for x in seen)
        assert abs(asker.x - answer).max() < 0.2

    @pytest.mark.parametrize("seed", [1, 2])
    @pytest.mark.parametrize("units", [None, 2.0, "auto"])
    @pytest.mark.parametrize("make", [MeZO, MeZOSVRG])
    def test_no_step_folds_over_the_bounds(self, make: Any, units: Any, seed: int) -> None:
        """What comes back from beyond repeats itself: there, longer never looks like too long."""
        asker = AskTell(
            make(), np.zeros(3), max_queries=3000, bounds=(-1.0, 2.0), units=units, seed=seed
        )
        drive(asker, bowl)
        assert abs(asker.x - 2.0).max() < 0.05

    def test_a_variable_between_equal_bounds_stays(self) -> None:
        bounds = [(0.0, 0.0), (-1.0, 2.0), (None, None)]
        asker = AskTell(MeZO(), np.zeros(3), max_queries=2000, bounds=bounds, units="auto")
        assert {x[0] for x in drive(asker, bowl)} == {0.0}
        assert abs(asker.x[1:] - [2.0, 3.0]).max() < 0.3

    def test_by_name_and_in_tensors(self) -> None:
        start = {"a": torch.zeros(2, dtype=torch.float64), "b": np.zeros(1)}
        asker = AskTell(MeZO(), start, max_queries=400, bounds={"a": (-1.0, 0.5)})
        seen = drive(asker, lambda x: float(((x["a"] - 3) ** 2).sum()) + bowl(x["b"]))
        assert all(float(x["a"].max()) <= 0.5 for x in seen)
        assert isinstance(asker.x["a"], torch.Tensor) and isinstance(asker.x["b"], np.ndarray)

    def test_within_them_nothing_changes(self) -> None:
        ends = []
        for bounds in (None, (-50.0, 50.0)):
            asker = AskTell(MeZO(), np.zeros(3), max_queries=200, bounds=bounds)
            drive(asker, bowl)
            ends.append(asker.x.tolist())
        assert ends[0] == ends[1]

    @pytest.mark.parametrize(
        "bounds, said",
        [
            ((1.0, -1.0), "above its high"),
            ((math.nan, 1.0), "above its high"),
            ((1.0, 2.0), "outside its bounds"),
            ([(0.0, 1.0)] * 4, "bounds of shape"),
            ("wide", "pairs"),
            ({"y": (0, 1)}, "not the name"),
        ],
    )
    def test_refused(self, bounds: Any, said: str) -> None:
        with pytest.raises(OptionError, match=said):
            AskTell(MeZO(), np.zeros(3), max_steps=1, bounds=bounds)

    def test_by_scipy(self) -> None:
        found = minimize(
            bowl,
            np.zeros(3),
            bounds=[(-1, 2)] * 3,
            method=scipy_method("mezo-svrg", maxfev=3000, units=2.0),
        )
        assert found.success and abs(found.x - 2.0).max() < 0.2 and found.nfev <= 3000


class TestUnits:
    def test_variables_of_unlike_sizes(self) -> None:
        sizes = np.array([1e-3, 1.0, 1e4])

        def function(x: np.ndarray) -> float:
            return bowl(x / sizes, 0.5)

        wide = [(0.0, float(size)) for size in sizes]
        errors = {}
        for units in (None, "auto", sizes):
            asker = AskTell(
                MeZO(displacement=0.5), 0.1 * sizes, max_queries=4000, bounds=wide, units=units
            )
            drive(asker, function)
            errors[str(units)] = float(abs(asker.x / sizes - 0.5).max())
        assert errors.pop("None") > 0.3 and max(errors.values()) < 0.15

    @pytest.mark.parametrize("units", [0.0, -1.0, [1.0, 2.0], "wide", math.inf])
    def test_refused(self, units: Any) -> None:
        with pytest.raises(OptionError, match="units"):
            AskTell(MeZO(), np.zeros(3), max_steps=1, units=units)


def fails_at_times(seed: int = 0, value: float = math.nan) -> Callable[[Any], float]:
    random = np.random.default_rng(seed)
    return lambda x: value if random.random() < 0.1 else bowl(x, 0.5)


class TestNonFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("way", ["worst", "skip"])
    @pytest.mark.parametrize(
        "optimizer",
        [MeZO(), MeZO(displacement=0.5), MeZOSVRG(displacement=0.5), MeZO(lr=1e-2)],
        ids=["measured", "mezo", "mezo-svrg", "rate"],
    )
    def test_a_failing_simulation_ends_nothing(
        self, optimizer: Any, way: Any, value: float
    ) -> None:
        asker = AskTell(optimizer, np.zeros(4), max_queries=2000, on_nonfinite=way)
        drive(asker, fails_at_times(value=value))
        assert np.isfinite(asker.x).all() and asker.queries <= 2000 and asker.steps > 20
        assert bowl(asker.x, 0.5) < 0.5 * bowl(np.zeros(4), 0.5)

    def test_stops_unless_told_otherwise(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4)
        others = [1.0] * (len(asker.ask()) - 1)
        with pytest.raises(NonFiniteObjectiveError):
            asker.tell([math.nan, *others])

    def test_a_skipped_step_counts_its_candidates_and_asks_others(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4, on_nonfinite="skip")
        first = asker.ask()
        record = asker.tell([math.nan] + [1.0] * (len(first) - 1))
        assert record.kind == "skipped" and asker.queries == len(first) and asker.steps == 0
        assert not np.array_equal(first[0], asker.ask()[0]) and (asker.x == 0).all()

    def test_a_function_without_any_value_ends(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4, on_nonfinite="skip")
        with pytest.raises(NonFiniteObjectiveError, match="100 steps in a row"):
            drive(asker, lambda _: math.nan)
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4, on_nonfinite="worst")
        with pytest.raises(NonFiniteObjectiveError):
            drive(asker, lambda _: math.nan)

    def test_by_scipy(self) -> None:
        for way, good in (("stop", False), ("skip", True), ("worst", True)):
            found = minimize(
                fails_at_times(1),
                np.zeros(3),
                method=scipy_method("mezo", maxfev=500, lr=1e-2, on_nonfinite=way),
            )
            assert found.success is (good and bool(np.isfinite(found.fun)))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("way", ["stop", "worst", "skip"])
    def test_no_value_at_all_is_no_success(self, way: str, value: float) -> None:
        method = scipy_method("mezo", maxfev=200, on_nonfinite=way)
        found = minimize(lambda x: value, np.zeros(3), method=method)
        assert not found.success and "finite" in found.message and (found.x == 0).all()

    def test_a_last_point_without_a_value_is_no_success(self) -> None:
        method = scipy_method("mezo", maxfev=200, on_nonfinite="worst")
        found = minimize(lambda x: math.nan if x[0] > -1 else 1.0, np.zeros(1), method=method)
        assert not found.success and not np.isfinite(found.fun)


WAYS = pytest.mark.parametrize("way", ["worst", "skip"])


class Solver:
    """A simulation that raises an error at about one point in ten, the same ones every time."""

    def __init__(self, error: BaseException | None = None, *, always: bool = False) -> None:
        self.error = error or RuntimeError("the solver did not converge")
        self.always, self.calls = always, 0

    def __call__(self, x: Any) -> float:
        self.calls += 1
        if self.always or zlib.crc32(np.asarray(x).tobytes()) % 10 == 0:
            raise self.error
        return bowl(x, 0.5)


class Awkward(Exception):
    """One that cannot be made of its message alone, and so not be sent between processes."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"{code} at {where}")


def solved(x: np.ndarray) -> float:
    return Solver(Awkward(3, "mesh"))(x)


class TestRaises:
    @WAYS
    @pytest.mark.parametrize("optimizer", [MeZO(), MeZOSVRG(displacement=0.5), MeZO(lr=1e-2)])
    @pytest.mark.parametrize("error", [RuntimeError("diverged"), None], ids=["error", "none"])
    def test_ask_and_tell(self, optimizer: Any, way: Any, error: Any) -> None:
        asker = AskTell(optimizer, np.zeros(4), max_queries=2000, on_nonfinite=way)
        solver = Solver()
        while candidates := asker.ask():
            values: list[Any] = []
            for x in candidates:
                try:
                    values.append(solver(x))
                except RuntimeError:
                    values.append(error)
            asker.tell(values)
        assert asker.steps > 20 and asker.queries == solver.calls <= 2000
        assert bowl(asker.x, 0.5) < 0.5 * bowl(np.zeros(4), 0.5)

    @pytest.mark.parametrize("value", [None, RuntimeError("diverged")])
    def test_no_value_stops_unless_told_otherwise(self, value: Any) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=4)
        values = [value, *[1.0] * (len(asker.ask()) - 1)]
        with pytest.raises(ObjectiveError, match="number"):
            asker.tell(values)
        assert asker.queries == 0 and asker.tell([1.0, 2.0] * (len(values) // 2)).step == 1

    @WAYS
    @pytest.mark.parametrize("workers", [1, map, lambda f, xs: [f(x) for x in xs]])
    def test_by_scipy(self, way: str, workers: Any) -> None:
        solver = Solver()
        method = scipy_method("mezo", maxfev=900, on_nonfinite=way, workers=workers)
        found = minimize(solver, np.zeros(4), bounds=[(-1, 1)] * 4, method=method)
        assert found.nfev == solver.calls <= 900 and found.nit > 10
        assert found.fun_best < 0.1 and bowl(found.x, 0.5) < 0.5

    @pytest.mark.parametrize("way", ["stop", "worst", "skip"])
    def test_one_that_always_raises_is_a_mistake_and_raised(self, way: Any) -> None:
        solver = Solver(NameError("no such name"), always=True)
        with pytest.raises(NameError, match="no such name"):
            minimize(solver, np.zeros(2), method=scipy_method(maxfev=999, on_nonfinite=way))
        assert solver.calls < 40
        view = ParameterView({"x": np.zeros(2)})
        objective = CallableObjective(lambda batch: solver(0.0), on_nonfinite=way)
        with pytest.raises(NameError, match="no such name"):
            tune(objective, view, max_queries=999, progress=False)

    @pytest.mark.parametrize("way", ["stop", "worst", "skip"])
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_is_never_a_failure(self, way: Any, kind: Any) -> None:
        with pytest.raises(kind):
            method = scipy_method(maxfev=999, on_nonfinite=way)
            minimize(Solver(kind()), np.zeros(2), method=method)
        x = np.zeros(2)
        solver = Solver(kind())
        objective = CallableObjective(lambda batch: solver(x), on_nonfinite=way)
        with pytest.raises(kind):
            tune(objective, ParameterView({"x": x}), max_queries=999, progress=False)

    @WAYS
    def test_a_timeout_of_the_caller_is_never_a_failure(self, way: Any) -> None:
        def alarm(*_: Any) -> None:
            raise TimeoutError("of the caller")

        def slow(x: Any) -> float:
            if np.any(x):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                time.sleep(5.0)
            return 0.0

        before = signal.signal(signal.SIGALRM, alarm)
        try:
            with pytest.raises(TimeoutError, match="of the caller"):
                minimize(slow, np.zeros(2), method=scipy_method(maxfev=99, on_nonfinite=way))
        finally:
            signal.signal(signal.SIGALRM, before)


class TestMinimize:
    """The same by ``zo_adapt.minimize``, where the objective says it."""

    @staticmethod
    def run(way: Any, optimizer: Any = None, value: float | None = None, **more: Any) -> Any:
        x, solver = np.zeros(4), Solver()

        def function(batch: Any) -> Any:
            try:
                return solver(x)
            except RuntimeError:
                if value is None:
                    raise
                return value

        objective = CallableObjective(function, on_nonfinite=way)
        view = ParameterView({"x": x})
        result = tune(objective, view, None, optimizer, progress=False, **more)
        return x, result, solver

    @WAYS
    @pytest.mark.parametrize("value", [None, math.nan, math.inf])
    @pytest.mark.parametrize(
        "optimizer", [None, MeZOSVRG(displacement=0.5), MeZO(lr=1e-2, one_sided=False)]
    )
    def test_a_failing_simulation_ends_nothing(self, way: Any, value: Any, optimizer: Any) -> None:
        x, result, solver = self.run(way, optimizer, value, max_queries=1500)
        assert result.stop_reason is StopReason.MAX_QUERIES
        assert result.queries == solver.calls <= 1500 and result.steps > 20
        assert bowl(x, 0.5) < 0.5 * bowl(np.zeros(4), 0.5)

    def test_stops_unless_told_otherwise(self) -> None:
        with pytest.raises(RuntimeError, match="did not converge"):
            self.run("stop", max_queries=1500)
        assert self.run("stop", None, math.nan, max_queries=1500)[1].stop_reason.is_fault

    @WAYS
    def test_resumed_it_is_the_uninterrupted_run(self, way: Any, tmp_path: Path) -> None:
        optimizer = MeZO(displacement=0.5)
        whole, result, _ = self.run(way, optimizer, max_queries=800, trajectory=tmp_path / "a.zot")
        path = tmp_path / "b.zot"
        stopped = itertools.count()

        def callback(_: Any) -> None:
            if next(stopped) == 20:
                raise StopIteration

        self.run(way, optimizer, max_queries=800, trajectory=path, callback=callback)
        x, again, _ = self.run(way, optimizer, max_queries=800, trajectory=path, resume=True)
        assert np.array_equal(x, whole)
        assert (again.steps, again.queries) == (result.steps, result.queries)
        assert again.history == result.history

    def test_no_value_at_any_other_point_ends_it(self) -> None:
        x = np.zeros(2)

        def function(batch: Any) -> float:
            return 1.0 if not x.any() else math.nan

        for way in ("worst", "skip"):
            objective = CallableObjective(function, on_nonfinite=way)  # type: ignore[arg-type]
            result = tune(
                objective, ParameterView({"x": x}), None, MeZO(lr=1e-2), max_steps=9, progress=False
            )
            assert result.stop_reason is StopReason.NON_FINITE and not x.any()
            assert "100 steps in a row" in result.message

    def test_rows_without_a_value_get_the_worst_of_the_others(self) -> None:
        nan = math.nan
        found = with_values(
            [
                Evaluation(nan, np.array([1.0, nan])),
                Evaluation(2.5, np.array([2.0, 3.0])),
                Evaluation(nan),
            ],
            "worst",
        )
        assert [one.value for one in found] == [2.0, 2.5, 2.5]
        assert found[0].per_example is not None and found[0].per_example.tolist() == [1.0, 3.0]
        with pytest.raises(NonFiniteObjectiveError):
            with_values([Evaluation(nan), Evaluation(1.0)], "skip")

    def test_refused(self) -> None:
        with pytest.raises(OptionError, match="on_nonfinite"):
            CallableObjective(bowl, on_nonfinite="ignore")  # type: ignore[arg-type]

    def test_a_sum_keeps_it(self) -> None:
        part = CallableObjective(bowl, on_nonfinite="skip")
        assert (0.5 * part).on_nonfinite == "skip"
        assert (part + CallableObjective(bowl)).on_nonfinite == "skip"


class TestPoints:
    def test_the_best_and_the_averaged(self) -> None:
        random = np.random.default_rng(0)
        seen = []

        def noisy(x: np.ndarray) -> float:
            seen.append((bowl(x, 0.3) + 0.3 * random.normal(), x.copy()))
            return seen[-1][0]

        asker = AskTell(MeZO(displacement=0.4), np.zeros(6), max_queries=4000)
        assert asker.best is None and (asker.averaged == asker.x).all()
        drive(asker, noisy)
        value, x = min(seen, key=lambda pair: pair[0])
        assert asker.best is not None and asker.best.value == value
        assert np.array_equal(asker.best.x, x)
        assert bowl(asker.averaged, 0.3) < bowl(asker.best.x, 0.3)

    @pytest.mark.parametrize("way", ["minimize", "ask and tell", "scipy"])
    def test_noise_is_noticed_where_the_same_point_is_asked_about_again(self, way: str) -> None:
        def ended(size: float) -> None:
            random = np.random.default_rng(0)

            def noisy(x: Any) -> float:
                return bowl(np.asarray(x), 0.3) * (1 + size * random.random())

            if way == "ask and tell":
                drive(AskTell(MeZO(), np.zeros(6), max_queries=300), noisy)
            elif way == "scipy":
                options = {"maxfev": 300}
                minimize(noisy, np.zeros(6), method=scipy_method(), options=options)
            else:
                x = np.zeros(6)
                view = ParameterView({"x": x})
                tune(lambda _: noisy(x), view, max_queries=300, progress=False)

        with pytest.warns(NoisyObjectiveWarning, match=r"differ by \d+\.\d% at the same point"):
            ended(0.1)
        ended(0.0)  # where a warning would be an error

    def test_the_best_of_what_is_maximised(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=5, maximize=True)
        values = []

        def function(x: np.ndarray) -> float:
            values.append(-bowl(x))
            return values[-1]

        drive(asker, function)
        assert asker.best is not None and asker.best.value == max(values)

    @pytest.mark.parametrize("units", [None, "auto", {"a": [0.5, 2.0], "b": 10.0}])
    @pytest.mark.parametrize("maximize", [False, True])
    def test_both_lie_within_bounds(self, maximize: bool, units: Any) -> None:
        start = {"a": np.full(2, 0.5), "b": torch.full((1,), 20.0, dtype=torch.float64)}
        bounds = {"a": [(0.0, 1.0), (0.0, 4.0)], "b": (0.0, 40.0)}
        asker = AskTell(
            MeZO(), start, max_queries=800, bounds=bounds, units=units, maximize=maximize
        )
        sign = -1.0 if maximize else 1.0
        seen = []

        def function(x: Any) -> float:  # its best point is the corner (1, 2), 40
            at = bowl(x["a"], [3.0, 2.0]) + bowl(x["b"] / 10, 6.0)
            seen.append((at, x))
            return sign * at

        drive(asker, function)
        value, best = min(seen, key=lambda pair: pair[0])
        assert asker.best is not None and asker.best.value == sign * value
        assert np.array_equal(asker.best.x["a"], best["a"])
        for x in (asker.best.x, asker.averaged, asker.x):
            assert (x["a"] >= 0).all() and (x["a"] <= [1.0, 4.0]).all() and 0 <= x["b"] <= 40
        assert sign * function(asker.averaged) < sign * function(start)

    def test_survive_copies(self) -> None:
        asker = AskTell(MeZO(lr=1e-2), np.zeros(2), max_steps=8, bounds=(-1, 1), units="auto")
        drive_some = [asker.tell([bowl(x) for x in asker.ask()]) for _ in range(4)]
        others = [copy.deepcopy(asker), pickle.loads(pickle.dumps(asker)), asker]
        ends = []
        for one in others:
            drive(one, bowl)
            assert one.best is not None
            ends.append((one.x.tolist(), one.averaged.tolist(), one.best.value))
        assert ends[0] == ends[1] == ends[2] and len(drive_some) == 4


class TestScipy:
    def test_restarts_share_the_calls(self) -> None:
        calls = []

        def function(x: np.ndarray) -> float:
            calls.append(x)
            return bowl(x, 0.5)

        found = minimize(function, np.zeros(3), method=scipy_method("mezo", maxfev=900, restarts=2))
        assert found.success and found.nfev == len(calls) <= 900 and found.fun < 0.2
        assert found.fun_best <= found.fun and found.x_mean.shape == (3,)

    @pytest.mark.parametrize("units", ["auto", [1.0, 100.0]])
    def test_restarts_within_bounds_and_in_units(self, units: Any) -> None:
        calls = []

        def function(x: np.ndarray) -> float:  # its best point within is (1, 70)
            calls.append(x)
            return bowl(x / [1.0, 100.0], [2.0, 0.7])

        ends = []
        for restarts in (0, 2):
            calls.clear()
            found = minimize(
                function,
                [0.5, 0.0],
                bounds=[(0, 1), (-100, 100)],
                method=scipy_method("mezo", maxfev=900, restarts=restarts, units=units),
            )
            assert found.nfev == len(calls) <= 900 and found.success
            for x in (*calls, found.x, found.x_best, found.x_mean):
                assert 0 <= x[0] <= 1 and -100 <= x[1] <= 100
            assert function(found.x_best) == found.fun_best <= found.fun
            ends.append(found.x)
        assert not np.array_equal(*ends) and abs(ends[1] - [1.0, 70.0])[0] < 0.1

    @pytest.mark.parametrize("maxiter, restarts", [(1, 2), (4, 2), (7, 1), (9, 0)])
    def test_restarts_share_the_steps(self, maxiter: int, restarts: int) -> None:
        method = scipy_method("mezo", maxiter=maxiter, lr=1e-2, restarts=restarts)
        found = minimize(bowl, np.zeros(3), method=method)
        assert found.nit == maxiter and found.success

    @pytest.mark.parametrize("maxfev", [30, 100, 101])
    def test_restarts_leave_no_step_of_calls_unused(self, maxfev: int) -> None:
        method = scipy_method("mezo", maxfev=maxfev, lr=1e-2, restarts=2)
        found = minimize(bowl, np.zeros(3), method=method)
        assert maxfev - 10 < found.nfev <= maxfev

    def test_workers(self) -> None:
        ends = []
        for workers in (1, 2, map):
            method = scipy_method("mezo", maxfev=90, lr=1e-2, on_nonfinite="skip", workers=workers)
            found = minimize(solved, np.zeros(3), method=method)
            ends.append((found.x.tolist(), found.nfev, found.nit))
        assert ends[0] == ends[1] == ends[2] and ends[0][2] > 0

    @pytest.mark.parametrize(
        "options", [{"workers": 0}, {"workers": "all"}, {"restarts": -1}, {"restarts": 0.5}]
    )
    def test_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            minimize(bowl, np.zeros(2), method=scipy_method("mezo", maxfev=20, **options))

    def test_a_function_that_no_process_can_be_given(self) -> None:
        with pytest.raises(OptionError, match="top of a module"):
            minimize(lambda x: 0.0, np.zeros(2), method=scipy_method(maxfev=20, workers=2))

    @pytest.mark.parametrize("maxfev", [1, 2, 8])
    def test_too_few_calls_are_no_success(self, maxfev: int) -> None:
        found = minimize(bowl, np.zeros(2), method=scipy_method("mezo", maxfev=maxfev, restarts=2))
        assert not found.success and found.nfev == 1 and found.fun == bowl(np.zeros(2))

    @pytest.mark.filterwarnings("ignore::zo_adapt.errors.FlatObjectiveWarning")
    def test_no_success_where_nothing_was_done(self) -> None:
        found = minimize(
            lambda x: 1.0, np.zeros(2), method=scipy_method("mezo", maxfev=100, lr=1e-2)
        )
        assert not found.success and "nothing moved" in found.message
        assert (found.x == 0).all()
